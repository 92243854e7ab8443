"""The duplex suite: sessions of every behaviour through the streaming engine, scored beside their controls.

A behaviour counts as learnt when the 95 % interval of the metric that it is about lies clear of the intervals of all
its controls. The ceiling is what the sessions' own targets score in the model's layout; it is no control.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tml.duplex.controls import STREAMED, Control, applies, best_guesses, changed, donors
from tml.duplex.player import Played, Player, recorded_trace
from tml.duplex.rates import Rate
from tml.duplex.scores import (
    BARS,
    HEADLINES,
    LOW_IS_GOOD,
    BehaviourScores,
    aligned,
    behaviour_of,
    is_clear,
    is_good,
    judged,
    macro_average,
    score,
    scores_json,
)
from tml.duplex.trace import Trace, trace_of_said
from tml.session import Behaviour, Session

Scores = Mapping[Behaviour, BehaviourScores]
TracesByIndex = dict[int, Trace]


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """What the suite found.

    Attributes:
        sessions: as they were given.
        played: what the model did in each.
        traces: the same, as it is scored.
        control_traces: what came under each control, by index of the session; not every session is under each.
        scores: of the model.
        controls: of each control, for the behaviours that it applies to.
        ceiling: of the sessions' own targets.
    """

    sessions: Sequence[Session]
    played: Sequence[Played]
    traces: Sequence[Trace]
    control_traces: Mapping[Control, Mapping[int, Trace]]
    scores: Scores
    controls: Mapping[Control, Scores]
    ceiling: Scores

    def control_rates(self, behaviour: Behaviour, metric: str) -> dict[Control, Rate]:
        """The rates of a metric under the controls that have cases of it."""
        rates = {
            control: found[behaviour].rate(metric) for control, found in self.controls.items() if behaviour in found
        }
        return {control: rate for control, rate in rates.items() if rate.cases}

    def is_learnt(self, behaviour: Behaviour) -> bool | None:
        """Whether the metric that a behaviour is about is clear of all controls; None if there is none, or no case."""
        return self.is_clear(behaviour, HEADLINES[behaviour][0])

    def is_clear(self, behaviour: Behaviour, metric: str) -> bool | None:
        """Whether a metric's 95 % interval is clear of all controls; None if there is none, or no case."""
        rate, controls = self.scores[behaviour].rate(metric), self.control_rates(behaviour, metric)
        return is_clear(metric, rate, controls.values()) if controls and rate.cases else None


def run_suite(
    player: Player,
    sessions: Sequence[Session],
    controls: Iterable[Control] = tuple(Control),
    max_control_sessions: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SuiteReport:
    """Streams the sessions, and the first of every behaviour under every control that applies, and scores both.

    Args:
        player: the model.
        sessions: that were made for behaviours.
        controls: which; those that need no streaming take all sessions.
        max_control_sessions: of a behaviour that are streamed under a control; 0 is all.
        progress: called after every tick with the micro-turns done and the micro-turns to do.

    Raises:
        ValueError: there is no session, or one was made for no behaviour.
    """
    if not sessions:
        raise ValueError("there is no session to evaluate")
    by_behaviour = sessions_by_behaviour(sessions)
    ceiling = [recorded_trace(one, player.layout, player.tokenizer, player.model) for one in sessions]
    wanted = [control for control in Control if control in set(controls)]
    under = {control: _under(control, sessions, by_behaviour, max_control_sessions) for control in wanted}
    changes: dict[Control, dict[int, Session]] = {}
    for control in wanted:
        if control in STREAMED:
            made = {number: changed(sessions[number], control) for number in under[control]}
            changes[control] = {number: one for number, one in made.items() if one is not sessions[number]}
    total = sum(map(player.num_turns, sessions))
    total += sum(player.num_turns(one) for made in changes.values() for one in made.values())
    done = 0

    def play(some: Sequence[Session], numbers: Sequence[int]) -> list[Played]:
        nonlocal done
        before = done
        played = player.play(some, lambda turns: progress(before + turns, total), numbers)
        done += sum(map(player.num_turns, some))
        return played

    clock = player.layout.clock
    played = play(sessions, range(len(sessions)))
    traces = [trace_of_said(one.said, clock) for one in played]
    found: dict[Control, TracesByIndex] = {}
    for control in wanted:
        if control in changes:
            numbers = list(changes[control])
            streamed = play([changes[control][number] for number in numbers], numbers)
            found[control] = {number: traces[number] for number in under[control]}
            found[control] |= {n: trace_of_said(one.said, clock) for n, one in zip(numbers, streamed, strict=True)}
        else:
            found[control] = _computed(control, sessions, under[control], traces)
    return SuiteReport(
        sessions=sessions,
        played=played,
        traces=traces,
        control_traces=found,
        scores=score(sessions, traces),
        controls={
            control: score([sessions[n] for n in traced], list(traced.values())) for control, traced in found.items()
        },
        ceiling=score(sessions, ceiling),
    )


def sessions_by_behaviour(sessions: Sequence[Session]) -> dict[Behaviour, list[int]]:
    """The indices of the sessions of each behaviour. Raises ValueError if one was made for none."""
    found: dict[Behaviour, list[int]] = {}
    for number, session in enumerate(sessions):
        found.setdefault(behaviour_of(session), []).append(number)
    return found


def _under(
    control: Control, sessions: Sequence[Session], by_behaviour: Mapping[Behaviour, list[int]], most: int
) -> list[int]:
    """The indices of the sessions that are put under a control."""
    numbers: list[int] = []
    for same in by_behaviour.values():
        if applies(control, [sessions[number] for number in same]):
            numbers += same[: most or None] if control in STREAMED else same
    return sorted(numbers)


def _computed(
    control: Control, sessions: Sequence[Session], numbers: Sequence[int], traces: Sequence[Trace]
) -> TracesByIndex:
    """The traces of a control for which nothing is streamed."""
    if control is Control.SILENCE:
        return {number: Trace() for number in numbers}
    if control is Control.SWAP:
        return {number: traces[donor] for number, donor in enumerate(donors(sessions)) if donor is not None}
    assert control is Control.WORDS_ALONE, control
    return dict(zip(numbers, best_guesses([sessions[number] for number in numbers]), strict=True))


def suite_table(report: SuiteReport) -> str:
    """One line a headline: the shares of the model and of its controls with 95 % intervals, its ceiling; then a mean.

    Whether a behaviour is learnt stands behind the first of its headlines, which it is about.
    """
    controls = list(report.controls)
    header = ("behaviour", "sessions", "metric", "model", *(c.value for c in controls), "ceiling", "latency", "learnt")
    rows: list[tuple[str, ...]] = [header]
    learnt = {True: "yes", False: "no", None: "-"}
    for behaviour, found in report.scores.items():
        for place, metric in enumerate(HEADLINES[behaviour]):
            rates = report.control_rates(behaviour, metric)
            rows.append(
                (
                    "" if place else behaviour.value,
                    "" if place else str(found.num_sessions),
                    metric + (" (low)" if metric in LOW_IS_GOOD else ""),
                    cell(found.rate(metric)),
                    *(cell(rates[control]) if control in rates else "-" for control in controls),
                    cell(report.ceiling[behaviour].rate(metric), interval=False),
                    latency_cell(found, metric),
                    "" if place else learnt[report.is_learnt(behaviour)],
                )
            )
    return f"{aligned(rows)}\nmacro average {macro_average(report.scores):.3f}"


def bars_table(report: SuiteReport) -> str:
    """One line a bar: what was found, whether it is reached, and whether what shows it is clear of all controls."""
    rows: list[tuple[str, ...]] = [("behaviour", "metric", "bar", "found", "reached", "clear of controls")]
    for bar in _bars(report):
        found = "-" if bar["found"] is None else f"{bar['found']:.3f}"
        beside = "" if bar["compared"] == bar["metric"] else f" ({bar['compared']})"
        sign = "<=" if bar["metric"] in (*LOW_IS_GOOD, "latency_s") else ">="
        clear = {True: "yes", False: "no", None: "-"}[bar["clear"]] + beside
        reached = "yes" if bar["reached"] else "no"
        rows.append((bar["behaviour"], bar["metric"], f"{sign} {bar['value']:g}", found, reached, clear))
    return aligned(rows)


def _bars(report: SuiteReport) -> list[dict[str, Any]]:
    found = []
    for behaviour, scores in report.scores.items():
        for bar in BARS.get(behaviour, ()):
            value = scores.found(bar)
            found.append(
                {
                    "behaviour": behaviour.value,
                    "metric": bar.metric,
                    "value": bar.value,
                    "found": None if math.isnan(value) else value,
                    "reached": scores.reaches(bar),
                    "compared": bar.compared,
                    "clear": report.is_clear(behaviour, bar.compared),
                }
            )
    return found


def cell(rate: Rate, *, interval: bool = True) -> str:
    """A share with its 95 % interval, as text; a dash without cases."""
    if not rate.cases:
        return "-"
    low, high = rate.interval
    return f"{rate.value:.3f} [{low:.3f}, {high:.3f}]" if interval else f"{rate.value:.3f}"


def latency_cell(scores: BehaviourScores, metric: str) -> str:
    """A median latency with its 95 % interval, if there are enough for one, as text; a dash without."""
    median_s, (low, high) = scores.median_latency_s(metric), scores.latency_interval_s(metric)
    if math.isnan(median_s):
        return "-"
    return f"{median_s:.2f} s" if math.isnan(low) else f"{median_s:.2f} s [{low:.2f}, {high:.2f}]"


def suite_json(report: SuiteReport) -> dict[str, Any]:
    """The report as plain values, for a file."""
    learnt = {behaviour.value: report.is_learnt(behaviour) for behaviour in report.scores}
    bars = _bars(report)
    macro = macro_average(report.scores)
    return {
        "num_sessions": len(report.sessions),
        "macro_average": None if math.isnan(macro) else macro,
        "learnt": learnt,
        "bars_reached": sum(bar["reached"] for bar in bars),
        "bars_clear": sum(bar["clear"] is True for bar in bars),
        "bars": bars,
        "model": scores_json(report.scores),
        "controls": {control.value: scores_json(found) for control, found in report.controls.items()},
        "ceiling": scores_json(report.ceiling),
    }


def session_json(session: Session, trace: Trace, played: Played, control_traces: Mapping[str, Trace]) -> dict[str, Any]:
    """What was expected, done and found in one session, in seconds, as plain values for a line of a file."""
    rate = session.sample_rate_hz

    def emitted(some: Trace) -> dict[str, Any]:
        return {
            "words": [[round(word.start_s, 3), word.text] for word in some.words],
            "calls": [[round(call.at_s, 3), call.payload] for call in some.calls],
        }

    return {
        "session": session.session_id,
        "meta": dict(session.meta),
        "emitted": emitted(trace),
        "background": [[event.start / rate, event.text] for event in played.background],
        "expected": [
            {
                "kind": item.kind.value,
                "start_s": item.start / rate,
                "end_s": item.end / rate,
                "text": item.text,
                "tag": item.tag,
                "metrics": {outcome.metric: outcome.hit for outcome in came},
                "good": all(map(is_good, came)),
            }
            for item, came in judged(session, trace)
        ],
        "controls": {name: emitted(some) for name, some in control_traces.items()},
    }
