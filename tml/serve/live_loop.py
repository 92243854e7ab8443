"""The loop that keeps a live session going: sound in on time, calls out, results in, and never a wait for either."""

import enum
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tml.serve.background import Background
from tml.session import Stream
from tml.stream.live import LiveSession, TurnResult


class Pace(enum.StrEnum):
    """When sound goes in."""

    REAL_TIME = "real_time"
    """When its last sample would have come from a sound card."""
    AT_ONCE = "at_once"
    """As fast as it can be taken."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One micro-turn as the loop saw it; times are from the session's start.

    Attributes:
        result: what the turn put out.
        due_s: when its last sample is there, on the session's clock; that of the wall too in real time.
        done_s: when its output was out, on the clock of the wall.
        came_back: what the background said that went in with it or, where it is more, with the turns after it, unless
            the model cancelled before.
        num_in_flight: tasks of the background once its own calls were made.
    """

    result: TurnResult
    due_s: float
    done_s: float
    came_back: tuple[str, ...]
    num_in_flight: int

    @property
    def behind_s(self) -> float:
        """How long after its last sample the output was out; of sound in real time alone."""
        return self.done_s - self.due_s


def run_session(
    live: LiveSession,
    samples: np.ndarray,
    chunk: int,
    background: Background | None = None,
    pace: Pace = Pace.AT_ONCE,
    before: Callable[[int], None] = lambda sample: None,
) -> Iterator[Tick]:
    """Streams sound through a session, a Tick for every micro-turn that it completes.

    Args:
        live: the session, which has heard nothing yet.
        samples: the sound (float32 [n], at the model's rate).
        chunk: samples that arrive together; at most a micro-turn, so that calls are carried out turn by turn.
        background: carries out what the model calls; without one, calls are only shown.
        pace: when sound goes in.
        before: called with the number of samples that have gone in, ahead of every chunk: what is typed or shown then.

    Raises:
        ValueError: `chunk` is less than a sample or longer than a micro-turn; what `LiveSession.push` raises.
    """
    clock = live.clock
    if not 0 < chunk <= clock.turn_samples:
        raise ValueError(f"chunks of {chunk} samples are not in 1..{clock.turn_samples}, a micro-turn")
    begun = time.perf_counter()
    came_back: list[str] = []
    for first in range(0, len(samples), chunk):
        piece = samples[first : first + chunk]
        if pace is Pace.REAL_TIME:
            ahead_s = begun + (first + len(piece)) / clock.sample_rate_hz - time.perf_counter()
            time.sleep(max(0.0, ahead_s))
        before(first)
        # A message waits until the one before has gone in, and so begins with a marker of its own.
        if background is not None and not live.waits(Stream.BACKGROUND) and (text := background.take()) is not None:
            live.type_text(text, Stream.BACKGROUND)
            came_back.append(text)
        for result in live.push(piece):
            done_s = time.perf_counter() - begun
            if background is not None:
                for payload in result.said.actions:
                    if background.act(payload, functools.partial(live.recording().session, "live")):
                        _drop_waiting(live, background)
            yield Tick(
                result=result,
                due_s=clock.emission_s(result.said.turn),
                done_s=done_s,
                came_back=tuple(came_back),
                num_in_flight=0 if background is None else background.num_in_flight,
            )
            came_back.clear()


def _drop_waiting(live: LiveSession, background: Background) -> None:
    """Keeps what has come back, but not gone in whole, from going on."""
    text = live.drop_waiting(Stream.BACKGROUND)
    if text:
        background.notices.append(f"dropped, as the model cancelled while it went in: {text!r}")
