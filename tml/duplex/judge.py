"""Holds what was emitted against one expectation: no judge, only words, calls and windows.

| kind      | metrics                     | a hit                                                            |
|-----------|-----------------------------|------------------------------------------------------------------|
| ANSWER    | responded, correct          | any word in the window / its first words are the answer's        |
| SILENCE   | pause_takeover, premature,  | any word in the span: a pause, a request that is still being     |
|           | false_alarm                 | said, or another (low is good)                                   |
| SAY       | on_time, acknowledged       | the words, one behind the other, in the window; the second for   |
|           |                             | words to a failure or a cancellation, which use no result        |
| COUNT     | within_one, exact           | the last number that was said                                    |
| NOD       | nodded, took_turn           | one of the nods, two words at most / more words (low is good)    |
| STOP      | stopped                     | it spoke until then, and emitted no word later than 0.6 s behind |
|           |                             | the start                                                        |
| GO_ON     | went_on                     | no 1.2 s without a word                                          |
| ACTION    | right_tool, right_call,     | the name / name and arguments, in the window / any other call    |
|           | wrong_call                  | in it (low is good)                                              |
| NO_ACTION | false_call                  | any call in the span (low is good)                               |

An answer of four words or more has responded when it is a turn by Full-Duplex-Bench v1 (`take_over`).
Windows and emissions are compared as whole samples of the session's clock.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tml.calls import Call, CallError, read_call
from tml.duplex.trace import TimedWord, Trace, normalise
from tml.session import Expectation, ExpectationKind

ANSWER_WINDOW_S = 2.0
"""How long after a request any word is a response (interaction.md)."""
STOP_S = 0.6
"""An interrupted model has stopped when it emits no word later than this (the bar of issue 4)."""
MAX_GAP_S = 1.2
"""Speech that goes on has no longer gap between emissions: a slow word, a pause and two micro-turns."""
NOD_WORDS = 2
LONG_ANSWER_WORDS = 4
TURN_S, TURN_WORDS = 1.0, 3
"""Full-Duplex-Bench v1: output is no turn when it is shorter than a second and has three words at most."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One case of one metric.

    Attributes:
        metric: its name, as in the table above.
        hit: whether what the metric names has happened.
        tag: of the expectation.
        latency_s: from what was reacted to, to the reaction, where there was one.
    """

    metric: str
    hit: bool
    tag: str
    latency_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One expectation and what was emitted; times are samples."""

    wanted: Expectation
    trace: Trace
    rate_hz: int
    until: int

    def samples(self, time_s: float) -> int:
        return round(time_s * self.rate_hz)

    def after(self, start: int, end: int) -> list[TimedWord]:
        """Words emitted in (start, end]."""
        return [word for word in self.trace.words if start < self.samples(word.start_s) <= end]

    def inside(self, start: int, end: int) -> list[TimedWord]:
        """Words emitted in [start, end)."""
        return [word for word in self.trace.words if start <= self.samples(word.start_s) < end]

    def window(self) -> list[TimedWord]:
        """Words emitted in (start, end] of the expectation."""
        return self.after(self.wanted.start, self.wanted.end)

    def latency_s(self, at_s: float, reference: int) -> float:
        return (self.samples(at_s) - reference) / self.rate_hz

    def outcome(self, metric: str, hit: bool, latency_s: float | None = None) -> Outcome:
        return Outcome(metric=metric, hit=hit, tag=self.wanted.tag, latency_s=latency_s)


def judge(expectation: Expectation, trace: Trace, sample_rate_hz: int, until: int) -> list[Outcome]:
    """The outcomes of one expectation.

    Args:
        expectation: what was expected.
        trace: what was emitted in the session.
        sample_rate_hz: the session's clock.
        until: what is emitted behind this sample belongs to the next request.
    """
    case = _Case(wanted=expectation, trace=trace, rate_hz=sample_rate_hz, until=until)
    return _JUDGES[expectation.kind](case)


def take_over(words: Sequence[TimedWord], reference_s: float) -> tuple[bool, float | None]:
    """Full-Duplex-Bench v1's take-over and latency: whether words are a turn, and when it began after `reference_s`.

    No turn: no words, or less than a second from the first one's start to the last one's end and at most three of
    them. The latency of a turn is never less than 0 (Lin et al. 2025, arXiv 2503.04721; `eval_smooth_turn_taking.py`).
    """
    if not words:
        return False, None
    if words[-1].end_s - words[0].start_s < TURN_S and len(words) <= TURN_WORDS:
        return False, None
    return True, max(0.0, words[0].start_s - reference_s)


def _answer(case: _Case) -> list[Outcome]:
    wanted, end = normalise(case.wanted.text), case.wanted.end
    following = case.after(end, case.until)
    in_time = case.after(end, min(case.until, end + case.samples(ANSWER_WINDOW_S)))
    if len(wanted) >= LONG_ANSWER_WORDS:
        responded, latency_s = take_over(following, end / case.rate_hz)
    else:
        responded = bool(in_time)
        latency_s = case.latency_s(in_time[0].start_s, end) if in_time else None
    correct = bool(in_time) and [word.text for word in following[: len(wanted)]] == wanted
    return [case.outcome("responded", responded, latency_s), case.outcome("correct", correct)]


def _silence(case: _Case) -> list[Outcome]:
    metric = {"pause": "pause_takeover", "request": "premature"}.get(case.wanted.tag, "false_alarm")
    return [case.outcome(metric, bool(case.inside(case.wanted.start, case.wanted.end)))]


def _say(case: _Case) -> list[Outcome]:
    wanted, words = normalise(case.wanted.text), case.window()
    texts = [word.text for word in words]
    places = (i for i in range(len(texts) - len(wanted) + 1) if texts[i : i + len(wanted)] == wanted)
    place = next(places, None)
    latency_s = None if place is None else case.latency_s(words[place].start_s, case.wanted.start)
    metric = "acknowledged" if case.wanted.tag in ("failure", "cancel") else "on_time"
    return [case.outcome(metric, place is not None, latency_s)]


def _count(case: _Case) -> list[Outcome]:
    numbers = [number for word in case.window() if (number := number_of(word.text)) is not None]
    wanted = number_of(case.wanted.text)
    assert wanted is not None, case.wanted.text
    error = abs(numbers[-1] - wanted) if numbers else None
    return [case.outcome("within_one", error is not None and error <= 1), case.outcome("exact", error == 0)]


def number_of(word: str) -> int | None:
    """The number that a word or its digits mean, or None."""
    if word in NUMBERS:
        return NUMBERS.index(word)
    return int(word) if word.isascii() and word.isdigit() else None


def _nod(case: _Case) -> list[Outcome]:
    words = case.window()
    nodded = 0 < len(words) <= NOD_WORDS and words[0].text in normalise(case.wanted.text)
    latency_s = case.latency_s(words[0].start_s, case.wanted.start) if nodded else None
    return [case.outcome("nodded", nodded, latency_s), case.outcome("took_turn", len(words) > NOD_WORDS)]


def _stop(case: _Case) -> list[Outcome]:
    start, end = case.wanted.start, case.wanted.end
    deadline = start + case.samples(STOP_S)
    spoke = bool(case.inside(start - case.samples(MAX_GAP_S), start + 1))
    over = case.inside(start, end)
    if not spoke or any(case.samples(word.start_s) > deadline for word in over):
        return [case.outcome("stopped", False)]
    return [case.outcome("stopped", True, case.latency_s(over[-1].start_s, start) if over else 0.0)]


def _go_on(case: _Case) -> list[Outcome]:
    start, end, gap = case.wanted.start, case.wanted.end, case.samples(MAX_GAP_S)
    spoke = bool(case.inside(start - gap, end))
    marks = [start, *(case.samples(word.start_s) for word in case.inside(start, end)), end]
    longest = max(later - earlier for earlier, later in itertools.pairwise(marks))
    return [case.outcome("went_on", spoke and longest <= gap)]


def _action(case: _Case) -> list[Outcome]:
    wanted, (start, end) = read_call(case.wanted.text), (case.wanted.start, case.wanted.end)
    made = [(c.at_s, call_of(c.payload)) for c in case.trace.calls if start < case.samples(c.at_s) <= end]
    named = [(at_s, call) for at_s, call in made if call is not None and call.name == wanted.name]
    right = [at_s for at_s, call in named if call.arguments == wanted.arguments]
    latency_s = case.latency_s(right[0], start) if right else None
    return [
        case.outcome("right_tool", bool(named)),
        case.outcome("right_call", bool(right), latency_s),
        case.outcome("wrong_call", len(made) > len(right[:1])),
    ]


def call_of(payload: str) -> Call | None:
    """The call in the payload of an action, or None where it holds none."""
    try:
        return read_call(payload)
    except CallError:
        return None


def _no_action(case: _Case) -> list[Outcome]:
    start, end = case.wanted.start, case.wanted.end
    called = any(start <= case.samples(call.at_s) < end for call in case.trace.calls)
    return [case.outcome("false_call", called)]


_JUDGES: dict[ExpectationKind, Callable[[_Case], list[Outcome]]] = {
    ExpectationKind.ANSWER: _answer,
    ExpectationKind.SILENCE: _silence,
    ExpectationKind.SAY: _say,
    ExpectationKind.COUNT: _count,
    ExpectationKind.NOD: _nod,
    ExpectationKind.STOP: _stop,
    ExpectationKind.GO_ON: _go_on,
    ExpectationKind.ACTION: _action,
    ExpectationKind.NO_ACTION: _no_action,
}
