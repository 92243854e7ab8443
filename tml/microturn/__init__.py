"""The micro-turn clock and layout, written once for training and streaming; the table is in `layout`. Plain numpy."""

from tml.microturn.clock import Clock
from tml.microturn.encoded import EncodedSession, EncodedText
from tml.microturn.layout import TEXT_IN_STREAMS, Layout, TurnContents
from tml.microturn.positions import SPECIAL_TOKEN_NAMES, Kind, Segment, SpecialTokens, Target, cut_at_turns

__all__ = [
    "SPECIAL_TOKEN_NAMES",
    "TEXT_IN_STREAMS",
    "Clock",
    "EncodedSession",
    "EncodedText",
    "Kind",
    "Layout",
    "Segment",
    "SpecialTokens",
    "Target",
    "TurnContents",
    "cut_at_turns",
]
