"""What a model emitted in a session: words and calls with their times, whoever emitted them.

A trace is made from the outputs of a streaming model. Times are seconds on the session's clock.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tml.microturn import Clock


@runtime_checkable
class Emission(Protocol):
    """What a micro-turn put out, as a streaming engine tells it (`tml.stream.outputs.Said`)."""

    @property
    def emitted_s(self) -> float:
        """When it was emitted."""

    @property
    def text(self) -> str:
        """What was added to the text."""

    @property
    def actions(self) -> tuple[str, ...]:
        """Payloads of actions."""


@dataclass(frozen=True, kw_only=True)
class TimedWord:
    """A normalised word: when it was emitted, and until when it lasts at most."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True, kw_only=True)
class TimedCall:
    """The payload of an action and when it was emitted."""

    at_s: float
    payload: str


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Everything that was emitted in one session, ordered by time."""

    words: tuple[TimedWord, ...] = ()
    calls: tuple[TimedCall, ...] = ()


def normalise(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def trace_of_said(said: Sequence[Emission], clock: Clock) -> Trace:
    """What a streaming model put out; a word lasts until the end of the micro-turn in which it is heard."""
    turn_s = clock.turn_samples / clock.sample_rate_hz
    return Trace(
        words=tuple(
            TimedWord(start_s=turn.emitted_s, end_s=turn.emitted_s + turn_s, text=word)
            for turn in said
            for word in normalise(turn.text)
        ),
        calls=tuple(TimedCall(at_s=turn.emitted_s, payload=payload) for turn in said for payload in turn.actions),
    )
