"""The voice of a live session: its vocoder, tick by tick, and all that it has said."""

import copy

import numpy as np

from tml.codec.griffin_lim import GriffinLim
from tml.codec.own_sound import silent_position
from tml.codec.vocoder import Vocoder
from tml.codec.vocoder_program import VocoderProgram
from tml.config import ModelConfig, VocoderKind


def make_vocoder(model: ModelConfig) -> Vocoder:
    """The vocoder that the model's config names.

    Raises:
        ValueError: its program cannot be read, or is for other mels.
    """
    if model.audio_out.vocoder.kind is VocoderKind.PROGRAM:
        return VocoderProgram(model)
    return GriffinLim(model)


class OwnVoice:
    """What a session says aloud. A turn in which it listens is silent, but for what the vocoder still has to say."""

    def __init__(self, model: ModelConfig, positions_per_turn: int) -> None:
        self._vocoder = make_vocoder(model)
        self._turn_samples = positions_per_turn * model.audio.hop_samples
        self._silence = np.tile(silent_position(model.audio_out), (positions_per_turn, 1))
        self._state = self._vocoder.init_state()
        self._said: list[np.ndarray] = []
        self._no_sound = np.zeros(self._turn_samples, np.float32)

    def warm_up(self) -> None:
        """Vocodes something loud, and forgets it."""
        self._vocoder.step(self._vocoder.init_state(), np.ones_like(self._silence))

    def say(self, mels: np.ndarray | None) -> np.ndarray:
        """The sound of the next turn, from its own audio (float16 [T, Y]); None where it listens."""
        self._state, sound = self._vocoder.step(self._state, self._silence if mels is None else mels)
        # Most turns are silent: all of these are one array, so that a session that listens remembers next to nothing.
        self._said.append(sound if sound.any() else self._no_sound)
        return sound

    def so_far(self) -> "OwnVoice":
        """What it has said up to now, which later turns do not change."""
        taken = copy.copy(self)
        taken._said = list(self._said)
        return taken

    def heard(self, num_samples: int) -> np.ndarray:
        """What was heard of it from the session's start on, as so many samples; what is not out yet follows."""
        _, last = self._vocoder.step(self._state, self._silence)
        sound = np.concatenate([np.zeros(self._turn_samples, np.float32), *self._said, last])
        return np.pad(sound[:num_samples], (0, max(0, num_samples - len(sound))))
