"""What a position of a row is: the kinds of inputs and targets, the special tokens, segments and their cuts."""

import enum
from dataclasses import dataclass, fields

import numpy as np

from tml.session import SessionError


class Kind(enum.IntEnum):
    """What the input embedding of a position is made from."""

    PAD = 0
    TOKEN = 1
    AUDIO = 2
    TILE = 3
    OWN_AUDIO = 4


class Target(enum.IntEnum):
    """Which stream a target belongs to; losses are weighted and logged by it."""

    NONE = 0
    LISTEN = 1
    SPEAK = 2
    TEXT = 3
    ACTION = 4
    DOCUMENT = 5
    HEARD = 6
    AUDIO = 7
    """A mel, not a token: the loss of the flow head."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens that structure the stream, as the run's tokenizer numbers them."""

    pad: int
    tick: int
    listen: int
    speak: int
    end_of_text: int
    system: int
    user_text: int
    background: int
    action: int
    document: int
    audio: int
    tile: int


SPECIAL_TOKEN_NAMES: dict[str, str] = {f.name: f"<|{f.name}|>" for f in fields(SpecialTokens)}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One session or document laid out as consecutive positions of a row (each array int32 [S]).

    Attributes:
        tokens: token ids; placeholders where the input is audio or a tile.
        kinds: `Kind` of each position.
        source: index into `levels_TM` for audio, into `tiles_P` for tiles, into `own_mels_TY` for own audio, else 0.
        targets: the token to predict, 0 where there is none, or a mel.
        target_kinds: `Target` of each position.
        turn_starts: position at which each turn begins, and the end (int32 [U + 1]).
    """

    tokens: np.ndarray
    kinds: np.ndarray
    source: np.ndarray
    targets: np.ndarray
    target_kinds: np.ndarray
    turn_starts: np.ndarray

    @property
    def num_slots(self) -> int:
        """Positions in the segment."""
        return len(self.tokens)


def cut_at_turns(turn_starts: np.ndarray, max_slots: int) -> list[tuple[int, int]]:
    """Cuts a segment that is longer than a row into parts [first slot, last slot), never inside a turn.

    Raises:
        SessionError: one turn alone is longer than a row.
    """
    parts: list[tuple[int, int]] = []
    start = 0
    for turn_start, turn_end in zip(turn_starts[:-1].tolist(), turn_starts[1:].tolist(), strict=True):
        if turn_end - turn_start > max_slots:
            raise SessionError(f"one micro-turn takes {turn_end - turn_start} slots, data.row_slots is {max_slots}")
        if turn_end - start > max_slots:
            parts.append((start, turn_start))
            start = turn_start
    return [*parts, (start, int(turn_starts[-1]))]
