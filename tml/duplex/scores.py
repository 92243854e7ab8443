"""The scores of a set of sessions: every metric by behaviour, headlines, bars, and whether controls are left behind.

Cases of one session are not independent, so an interval over cases (`BehaviourScores.rates`) is a little narrow
where sessions hold many; `macro` averages over sessions first.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tml.duplex.judge import MAX_GAP_S, Outcome, judge
from tml.duplex.rates import Rate, median_interval
from tml.duplex.trace import Trace
from tml.session import Behaviour, Expectation, ExpectationKind, Session

LOW_IS_GOOD = frozenset(
    {"pause_takeover", "premature", "false_alarm", "alarmed", "took_turn", "wrong_call", "false_call"}
)

HEADLINES: dict[Behaviour, tuple[str, ...]] = {
    Behaviour.TURN_TAKING: ("responded", "correct"),
    Behaviour.PAUSE_HANDLING: ("waited", "pause_takeover", "correct"),
    Behaviour.INTERRUPTION: ("stopped", "correct"),
    Behaviour.BACKCHANNEL: ("nodded", "went_on"),
    Behaviour.TIMED: ("on_time", "false_alarm"),
    Behaviour.CUED: ("on_time", "false_alarm"),
    Behaviour.COUNTING: ("within_one", "on_time"),
    Behaviour.PROACTIVE: ("on_time", "false_alarm", "alarmed"),
    Behaviour.SIMULTANEOUS: ("on_time",),
    Behaviour.TONE: ("correct",),
    Behaviour.DELEGATION: ("used", "on_time", "right_call", "went_on"),
    Behaviour.TOOLS: ("right_call", "wrong_call", "went_on"),
}
"""The metrics that a behaviour is about, the most telling first: that one is averaged over sessions and behaviours."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value that a metric should reach: at least, or at most if low is good.

    Attributes:
        metric: which.
        value: the value.
        shown_by: the metric whose interval must lie clear of its controls. Who does nothing raises no false alarm and
            takes over in no pause: there it is the metric of doing the right thing; else the same one.
    """

    metric: str
    value: float
    shown_by: str = ""

    @property
    def compared(self) -> str:
        """The metric that is held against its controls."""
        return self.shown_by or self.metric


BARS: dict[Behaviour, tuple[Bar, ...]] = {
    Behaviour.TURN_TAKING: (
        Bar(metric="responded", value=0.9),
        Bar(metric="latency_s", value=0.4, shown_by="responded"),
    ),
    Behaviour.PAUSE_HANDLING: (Bar(metric="pause_takeover", value=0.1, shown_by="waited"),),
    Behaviour.INTERRUPTION: (Bar(metric="stopped", value=0.85),),
    Behaviour.TIMED: (Bar(metric="on_time", value=0.65),),
    Behaviour.CUED: (Bar(metric="on_time", value=0.8),),
    Behaviour.COUNTING: (Bar(metric="within_one", value=0.6),),
    Behaviour.PROACTIVE: (
        Bar(metric="on_time", value=0.6),
        Bar(metric="false_alarm", value=0.1, shown_by="on_time"),
    ),
    Behaviour.TONE: (Bar(metric="correct", value=0.8),),
    Behaviour.DELEGATION: (Bar(metric="used", value=0.8),),
}
"""The bars of the reference run (issue 4); `latency_s` is the median of responses."""


@dataclass(frozen=True, kw_only=True)
class BehaviourScores:
    """The scores of one behaviour.

    Attributes:
        behaviour: which.
        num_sessions: that show it.
        rates: every metric that had cases.
        by_tag: the first headline by the tag of the expectation.
        latencies_s: by metric, of every case that has one.
        macro: mean over sessions of their share of good cases of the first headline.
    """

    behaviour: Behaviour
    num_sessions: int
    rates: Mapping[str, Rate]
    by_tag: Mapping[str, Rate] = field(default_factory=dict)
    latencies_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    macro: float = math.nan

    def rate(self, metric: str) -> Rate:
        """The rate of a metric; without cases if there were none."""
        return self.rates.get(metric, Rate(hits=0, cases=0))

    def median_latency_s(self, metric: str) -> float:
        """The median latency of a metric; not a number when there was none."""
        latencies_s = self.latencies_s.get(metric, ())
        return statistics.median(latencies_s) if latencies_s else math.nan

    def latency_interval_s(self, metric: str) -> tuple[float, float]:
        """The 95 % interval of the median latency of a metric."""
        return median_interval(self.latencies_s.get(metric, ()))

    def found(self, bar: Bar) -> float:
        """The value that a bar asks for; not a number without cases."""
        return self.median_latency_s("responded") if bar.metric == "latency_s" else self.rate(bar.metric).value

    def reaches(self, bar: Bar) -> bool:
        """Whether a bar is reached; not without cases."""
        if bar.metric == "latency_s":
            return self.found(bar) <= bar.value + 1e-9
        return self.found(bar) <= bar.value if bar.metric in LOW_IS_GOOD else self.found(bar) >= bar.value


def judged(session: Session, trace: Trace) -> list[tuple[Expectation, list[Outcome]]]:
    """Every expectation of a session with what came of it.

    A request with pauses also has the metric `waited`: it was answered, and no word was said in its pauses, so
    that neither silence nor chatter scores. A result that is waited for has `used` (see `_used`).
    """
    requests = [e.start for e in session.expectations if e.kind is ExpectationKind.ANSWER]
    found: list[tuple[Expectation, list[Outcome]]] = []
    for item in session.expectations:
        until = min((start for start in requests if start >= item.end), default=session.num_samples)
        came = judge(item, trace, session.sample_rate_hz, until)
        pauses = [e for e in session.expectations if e.tag == "pause" and item.start < e.start and e.end < item.end]
        if item.kind is ExpectationKind.ANSWER and pauses:
            taken = any(o.hit for e in pauses for o in judge(e, trace, session.sample_rate_hz, until))
            answered = any(o.hit for o in came if o.metric == "responded")
            came.append(Outcome(metric="waited", hit=answered and not taken, tag=item.tag))
        waits = [e for e in session.expectations if e.kind is ExpectationKind.GO_ON and e.end <= item.start]
        if item.kind is ExpectationKind.SAY and item.tag in ("result", "chunks"):
            went_on = [o.hit for e in waits for o in judge(e, trace, session.sample_rate_hz, until)]
            came += [_used(o, all(went_on), item.start / session.sample_rate_hz, trace) for o in came]
        found.append((item, came))
    return found


def _used(said: Outcome, went_on: bool, arrival_s: float, trace: Trace) -> Outcome:
    """Whether a result was used without a silent gap: said on time, with speech from the call on until it is said."""
    if said.latency_s is None:
        return Outcome(metric="used", hit=False, tag=said.tag)
    begun_s = arrival_s + said.latency_s
    last_s = max((word.start_s for word in trace.words if word.start_s < begun_s - 1e-6), default=-math.inf)
    is_soon = begun_s - last_s <= MAX_GAP_S + 1e-6
    return Outcome(metric="used", hit=went_on and is_soon, tag=said.tag, latency_s=said.latency_s)


def outcomes(session: Session, trace: Trace) -> list[Outcome]:
    """What came of every expectation of a session, and `alarmed`: whether there was any false alarm in it."""
    found = [outcome for _, came in judged(session, trace) for outcome in came]
    alarms = [outcome.hit for outcome in found if outcome.metric == "false_alarm"]
    return [*found, Outcome(metric="alarmed", hit=any(alarms), tag="session")] if alarms else found


def is_good(outcome: Outcome) -> bool:
    """Whether it is as it should be: a hit, or none where a low rate is good."""
    return outcome.hit != (outcome.metric in LOW_IS_GOOD)


def behaviour_of(session: Session) -> Behaviour:
    """The behaviour that a session was made for.

    Raises:
        ValueError: its meta names none.
    """
    name = session.meta.get("behaviour", "")
    if name not in set(Behaviour):
        raise ValueError(
            f"session {session.session_id} was made for no behaviour (its meta has {name!r}); evaluate it with "
            "--suite=requests"
        )
    return Behaviour(name)


def score(sessions: Sequence[Session], traces: Sequence[Trace]) -> dict[Behaviour, BehaviourScores]:
    """The scores of every behaviour that the sessions show, in the order of `Behaviour`.

    Raises:
        ValueError: a session was made for no behaviour, or there are not as many traces as sessions.
    """
    by_behaviour: dict[Behaviour, list[list[Outcome]]] = defaultdict(list)
    for session, trace in zip(sessions, traces, strict=True):
        by_behaviour[behaviour_of(session)].append(outcomes(session, trace))
    return {name: _scores(name, by_behaviour[name]) for name in Behaviour if name in by_behaviour}


def _scores(behaviour: Behaviour, per_session: Sequence[Sequence[Outcome]]) -> BehaviourScores:
    cases = [outcome for found in per_session for outcome in found]
    first = HEADLINES[behaviour][0]
    good = first not in LOW_IS_GOOD
    shares = [
        statistics.fmean(outcome.hit == good for outcome in found if outcome.metric == first)
        for found in per_session
        if any(outcome.metric == first for outcome in found)
    ]
    latencies_s: dict[str, list[float]] = defaultdict(list)
    for outcome in cases:
        if outcome.latency_s is not None:
            latencies_s[outcome.metric].append(outcome.latency_s)
    return BehaviourScores(
        behaviour=behaviour,
        num_sessions=len(per_session),
        rates=_rates((outcome.metric, outcome.hit) for outcome in cases),
        by_tag=_rates((outcome.tag, outcome.hit) for outcome in cases if outcome.metric == first),
        latencies_s={metric: tuple(values) for metric, values in latencies_s.items()},
        macro=statistics.fmean(shares) if shares else math.nan,
    )


def _rates(marks: Iterable[tuple[str, bool]]) -> dict[str, Rate]:
    found: dict[str, list[bool]] = defaultdict(list)
    for name, hit in marks:
        found[name].append(hit)
    return {name: Rate.of(hits) for name, hits in sorted(found.items())}


def macro_average(scores: Mapping[Behaviour, BehaviourScores]) -> float:
    """The mean over behaviours of their mean over sessions; a low take-over counts as a high score."""
    values = [found.macro for found in scores.values() if not math.isnan(found.macro)]
    return statistics.fmean(values) if values else math.nan


def is_clear(metric: str, rate: Rate, controls: Iterable[Rate]) -> bool:
    """Whether the interval of a rate lies on the good side of every control's, touching none."""
    return all(control.is_above(rate) if metric in LOW_IS_GOOD else rate.is_above(control) for control in controls)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, each column as wide as its longest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def scores_json(scores: Mapping[Behaviour, BehaviourScores]) -> dict[str, Any]:
    """The scores as plain values; what had no case is absent or None."""

    def plain(rate: Rate) -> dict[str, Any]:
        return {"value": rate.value, "interval": rate.interval, "cases": rate.cases}

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    behaviours = {
        name.value: {
            "num_sessions": found.num_sessions,
            "macro": number(found.macro),
            "metrics": {metric: plain(rate) for metric, rate in found.rates.items()},
            "median_latency_s": {metric: found.median_latency_s(metric) for metric in found.latencies_s},
            "latency_interval_s": {
                metric: [number(end) for end in found.latency_interval_s(metric)] for metric in found.latencies_s
            },
            "by_tag": {tag: plain(rate) for tag, rate in found.by_tag.items()},
            "bars": [
                {"metric": bar.metric, "value": bar.value, "reached": found.reaches(bar)} for bar in BARS.get(name, ())
            ],
        }
        for name, found in scores.items()
    }
    return {"macro_average": number(macro_average(scores)), "behaviours": behaviours}
