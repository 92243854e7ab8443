"""A vocoder turns the mel frames of own sound into samples, block by block, the same live and offline."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float16, Float32


@runtime_checkable
class Vocoder(Protocol):
    """Mel frames to sound with everything remembered in a state, which is an argument and a result.

    Every call takes the positions of one micro-turn. Offline means all of them in order (`vocode`), so a stream
    sounds as its recording does, bit for bit.

    Attributes:
        delay_samples: how much later a frame sounds than the part of the clock that it covers.
    """

    delay_samples: int

    def init_state(self) -> Any:
        """The state before the first frame: silence."""

    def step(self, state: Any, mels: Float16[np.ndarray, "T Y"]) -> tuple[Any, Float32[np.ndarray, " n"]]:
        """As many samples as the positions cover, `delay_samples` late."""


def vocode(vocoder: Vocoder, mels: Float16[np.ndarray, "T Y"], positions_per_turn: int) -> Float32[np.ndarray, " n"]:
    """The sound of a whole recording, turn after turn; it begins `vocoder.delay_samples` late."""
    state, pieces = vocoder.init_state(), [np.zeros(0, np.float32)]
    for first in range(0, len(mels), positions_per_turn):
        state, samples = vocoder.step(state, mels[first : first + positions_per_turn])
        pieces.append(samples)
    return np.concatenate(pieces)
