"""Configuration of the micro-turn and of its text."""

import enum
from dataclasses import dataclass

from tml.config.checks import check_positive


class Boundary(enum.StrEnum):
    """Whether a micro-turn opens with a [tick] token."""

    NONE = "none"
    TICK = "tick"


class Control(enum.StrEnum):
    """How a micro-turn says that it speaks: a [listen]/[speak] token, or just text before [end of text]."""

    EXPLICIT = "explicit"
    IMPLICIT = "implicit"


class Modality(enum.StrEnum):
    """What comes in during a micro-turn."""

    AUDIO = "audio"
    VIDEO = "video"
    TEXT = "text"
    """System text, typed text and background results, in this order."""


class SlotScheme(enum.StrEnum):
    """Whether a micro-turn takes the positions that it needs, or always as many."""

    VARIABLE = "variable"
    FIXED = "fixed"
    """[pad] tokens fill up text in, and what goes out but actions, to the most that they can be: attention measures
    distance in positions, which then is one in time. Tiles and actions, seldom and many, still take what they need."""


@dataclass(frozen=True, kw_only=True)
class MicroTurnConfig:
    """One micro-turn: its length, boundary, order and slots, and how many tokens of each text stream fit in it."""

    turn_ms: int = 200
    boundary: Boundary = Boundary.TICK
    control: Control = Control.EXPLICIT
    order: tuple[Modality, ...] = (Modality.AUDIO, Modality.VIDEO, Modality.TEXT)
    """In which order the input half of a turn holds what came in."""
    slots: SlotScheme = SlotScheme.VARIABLE
    """Fixed slots make a turn of silence as long as a turn of speech: small limits below keep it short."""
    max_text_in_per_turn: int = 16
    """Tokens of system text, typed text and background results (markers included) that one turn may hold;
    what is over waits for the next turn."""
    max_text_out_per_turn: int = 8
    """Tokens of own text that one turn may hold; what is over waits for the next turn."""
    max_action_per_turn: int = 64
    """Tokens of actions (markers included) that one turn may hold; a session with more is refused."""

    def __post_init__(self) -> None:
        check_positive(
            "turn",
            turn_ms=self.turn_ms,
            max_text_out_per_turn=self.max_text_out_per_turn,
            max_action_per_turn=self.max_action_per_turn,
        )
        if sorted(self.order) != sorted(Modality):
            raise ValueError(
                f"turn.order = {tuple(map(str, self.order))} must name each of {tuple(map(str, Modality))} once"
            )
        if self.max_text_in_per_turn < 2:
            raise ValueError(
                f"turn.max_text_in_per_turn = {self.max_text_in_per_turn} must be at least 2: a marker and one token"
            )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The tokenizer: a directory with tokenizer.json or tokenizer.tiktoken, or such a file."""

    tokenizer: str = ""
    train_vocab_size: int = 0
    """When greater than 0 and `tokenizer` does not exist, `launch.encode` trains a byte-level BPE of this size."""
