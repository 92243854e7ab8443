"""A session after its codecs: what the layout of micro-turns takes."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tml.session import Stream


class EncodedText(NamedTuple):
    """One text event as tokens; a tuple, because a loader makes thousands a second."""

    stream: Stream
    start: int
    """Sample at which it happens."""
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EncodedSession:
    """A session after its codecs, still on the sample clock, so that any turn length can be laid out.

    Attributes:
        session_id: as in the Session.
        num_samples: length on the sample clock.
        levels_TM: dMel levels, one row a hop: those that cover `num_samples`, then those that still hear its end;
            digital silence follows.
        texts: every text event, ordered by start; words of `user_audio`, at their ends, come first.
        tiles_P: image tiles (int16 pixels, -1 is padding; frames x height x width x 3), ordered by time.
        tile_samples_P: the sample at which each tile is complete.
        own_mels_TY: own sound, one row a hop (`tml.codec.own_sound`); None without a voice. Silence follows.
        own_audible_T: which of these rows can be heard (bool); None without a voice.
    """

    session_id: str
    num_samples: int
    levels_TM: np.ndarray
    texts: tuple[EncodedText, ...]
    tiles_P: np.ndarray
    tile_samples_P: np.ndarray
    own_mels_TY: np.ndarray | None = None
    own_audible_T: np.ndarray | None = None
