"""Scores of sets of sessions: rates, macro averages, bars, controls."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from session_trace import trace_of_session

from tml.duplex import scores
from tml.duplex.rates import Rate, median_interval
from tml.duplex.trace import TimedWord, Trace, trace_of_said
from tml.microturn import Clock
from tml.session import Behaviour, Expectation, ExpectationKind, Session, Stream, TextEvent
from tml.stream.outputs import Said

RATE = 16_000
CLOCK = Clock(turn_samples=3_200, hop_samples=800, sample_rate_hz=RATE)


def session(behaviour: str, *expected: tuple, seconds: float = 10.0, texts: tuple = ()) -> Session:
    return Session(
        session_id=f"{behaviour}-1",
        sample_rate_hz=RATE,
        num_samples=round(seconds * RATE),
        streams=tuple({event.stream for event in texts}),
        texts=texts,
        expectations=tuple(
            Expectation(kind=kind, start=round(start * RATE), end=round(end * RATE), text=text, tag=tag)
            for kind, start, end, text, tag in expected
        ),
        meta={"behaviour": behaviour},
    )


def trace(*words: tuple[float, str]) -> Trace:
    return Trace(words=tuple(TimedWord(start_s=at, end_s=at + 0.2, text=text) for at, text in words))


CUE = (ExpectationKind.SAY, 1.0, 2.0, "red", "cue")
LATER_CUE = (ExpectationKind.SAY, 4.0, 5.0, "red", "late")


def test_rates_count_cases_and_macro_counts_sessions():
    sessions = [session("cued", CUE, LATER_CUE), session("cued", CUE)]
    found = scores.score(sessions, [trace((1.2, "red")), trace((1.4, "red"))])
    cued = found[Behaviour.CUED]
    assert cued.num_sessions == 2
    assert cued.rate("on_time") == Rate(hits=2, cases=3)
    assert cued.macro == pytest.approx(0.75)
    assert cued.by_tag == {"cue": Rate(hits=2, cases=2), "late": Rate(hits=0, cases=1)}
    assert cued.median_latency_s("on_time") == pytest.approx(0.3)
    assert math.isnan(cued.median_latency_s("responded"))


def test_false_alarms_are_spans_and_a_session_is_alarmed_by_any_of_them():
    spans = [(ExpectationKind.SILENCE, at, at + 1.0, "", tag) for at, tag in ((0.0, "request"), (2.0, "a"), (4.0, "b"))]
    sessions = [session("proactive", *spans), session("proactive", *spans), session("cued", CUE)]
    found = scores.score(sessions, [trace((2.2, "red")), trace((0.4, "red")), trace()])
    proactive = found[Behaviour.PROACTIVE]
    assert proactive.rate("false_alarm") == Rate(hits=1, cases=4)
    assert proactive.rate("alarmed") == Rate(hits=1, cases=2)
    assert proactive.rate("premature") == Rate(hits=1, cases=2)
    assert not found[Behaviour.CUED].rate("alarmed").cases


def test_the_macro_average_is_over_behaviours():
    sessions = [session("cued", CUE), session("timed", CUE), session("timed", CUE)]
    found = scores.score(sessions, [trace((1.2, "red")), trace(), trace()])
    assert list(found) == [Behaviour.TIMED, Behaviour.CUED]
    assert scores.macro_average(found) == pytest.approx(0.5)
    assert math.isnan(scores.macro_average({}))


PAUSED = (
    (ExpectationKind.ANSWER, 1.0, 3.0, "six", "say"),
    (ExpectationKind.SILENCE, 1.5, 2.2, "", "pause"),
)


@pytest.mark.parametrize(
    ("words", "waited", "takeover"),
    [
        (((3.4, "six"),), True, False),
        (((3.4, "two"),), True, False),
        (((1.6, "six"), (3.4, "six")), False, True),
        (((1.6, "six"),), False, True),
        ((), False, False),
    ],
)
def test_waiting_is_to_answer_and_not_to_speak_in_the_pause(words, waited, takeover):
    found = scores.score([session("pause_handling", *PAUSED)], [trace(*words)])[Behaviour.PAUSE_HANDLING]
    assert found.rate("waited") == Rate(hits=int(waited), cases=1)
    assert found.rate("pause_takeover") == Rate(hits=int(takeover), cases=1)
    assert found.macro == float(waited)


@pytest.mark.parametrize(
    ("answer", "words", "on_time", "used"),
    [
        (("it", "is", "six"), (1.0, 1.8, 2.6), True, True),
        # Silent until the result is there, and behind it.
        (("it", "is", "six"), (), True, False),
        (("it", "is", "six"), (1.0, 1.8), True, False),
        ((), (1.0, 1.8, 2.6), False, False),
    ],
)
def test_a_result_is_used_when_no_gap_is_before_it(answer, words, on_time, used):
    wait = (ExpectationKind.GO_ON, 1.0, 2.4, "", "waiting")
    say = (ExpectationKind.SAY, 2.4, 4.8, "it is six", "result")
    said = trace(*((at, "moment") for at in words), *((3.2 + 0.2 * i, word) for i, word in enumerate(answer)))
    found = scores.score([session("delegation", wait, say)], [said])[Behaviour.DELEGATION]
    assert (found.rate("on_time").hits, found.rate("used").hits) == (on_time, used)
    assert found.rate("used").cases == 1
    late = trace(*((at, "moment") for at in (1.0, 1.8)), *((4.2 + 0.2 * i, word) for i, word in enumerate(answer)))
    found = scores.score([session("delegation", wait, say)], [late])[Behaviour.DELEGATION]
    assert (found.rate("on_time").hits, found.rate("went_on").hits, found.rate("used").hits) == (bool(answer), 1, 0)


def test_a_request_without_a_pause_has_not_waited():
    found = scores.score([session("turn_taking", PAUSED[0])], [trace((3.4, "six"))])
    assert "waited" not in found[Behaviour.TURN_TAKING].rates


def test_an_answer_ends_where_the_next_request_begins():
    asked = [(ExpectationKind.ANSWER, start, start + 1.0, "six", "say") for start in (0.0, 2.0)]
    found = scores.score([session("turn_taking", *asked)], [trace((2.4, "six"), (3.4, "six"))])
    assert found[Behaviour.TURN_TAKING].rate("responded") == Rate(hits=1, cases=2)


def test_a_session_of_no_behaviour_is_refused():
    with pytest.raises(ValueError, match="was made for no behaviour"):
        scores.score([session("", CUE)], [trace()])
    with pytest.raises(ValueError, match="zip"):
        scores.score([session("cued", CUE)], [])


def test_bars_hold_from_below_or_above():
    def reached(behaviour, metric, hits, cases, bar_metric=None, **more):
        found = scores.BehaviourScores(
            behaviour=behaviour, num_sessions=1, rates={metric: Rate(hits=hits, cases=cases)}, **more
        )
        return {bar.metric: found.reaches(bar) for bar in scores.BARS[behaviour]}[bar_metric or metric]

    assert reached(Behaviour.TONE, "correct", 8, 10)
    assert not reached(Behaviour.TONE, "correct", 79, 100)
    assert reached(Behaviour.PAUSE_HANDLING, "pause_takeover", 1, 10)
    assert not reached(Behaviour.PAUSE_HANDLING, "pause_takeover", 11, 100)
    assert not reached(Behaviour.TONE, "correct", 0, 0)
    late = {"latencies_s": {"responded": (0.4, 0.4, 0.6)}}
    assert reached(Behaviour.TURN_TAKING, "responded", 1, 1, "latency_s", **late)
    assert not reached(Behaviour.TURN_TAKING, "responded", 1, 1, "latency_s")


def test_every_behaviour_has_headlines_and_every_bar_is_one_of_them():
    assert set(scores.HEADLINES) == set(Behaviour)
    for behaviour, bars in scores.BARS.items():
        assert {bar.metric for bar in bars} - {"latency_s"} <= set(scores.HEADLINES[behaviour])
        assert {bar.compared for bar in bars} <= set(scores.HEADLINES[behaviour]) - scores.LOW_IS_GOOD


def test_clear_of_controls_means_that_no_intervals_touch():
    high, low = Rate(hits=90, cases=100), Rate(hits=10, cases=100)
    assert scores.is_clear("on_time", high, [low, Rate(hits=50, cases=100)])
    assert not scores.is_clear("on_time", high, [low, Rate(hits=85, cases=100)])
    assert scores.is_clear("false_alarm", low, [high])
    assert not scores.is_clear("false_alarm", high, [low])
    assert not scores.is_clear("on_time", high, [Rate(hits=0, cases=0)])


@pytest.mark.parametrize(("hits", "cases"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 7), (997, 1000)])
def test_the_interval_is_wilsons(hits, cases):
    wanted = scipy.stats.binomtest(hits, cases).proportion_ci(0.95, method="wilson")
    assert Rate(hits=hits, cases=cases).interval == pytest.approx((wanted.low, wanted.high), abs=1e-4)
    assert Rate.of([True] * hits + [False] * (cases - hits)) == Rate(hits=hits, cases=cases)


@pytest.mark.parametrize("count", [1, 5, 6, 7, 20, 61])
def test_the_interval_of_a_median_is_that_of_its_order_statistics(count):
    values = np.random.default_rng(count).exponential(size=count).tolist()
    wanted = scipy.stats.quantile_test(values, q=float(np.median(values))).confidence_interval(0.95)
    np.testing.assert_array_equal(median_interval(values), (wanted.low, wanted.high))


def test_the_json_holds_metrics_bars_and_the_mean():
    found = scores.score([session("cued", CUE), session("turn_taking", PAUSED[0])], [trace((1.2, "red")), trace()])
    plain = json.loads(json.dumps(scores.scores_json(found), allow_nan=False))
    assert plain["behaviours"]["cued"]["metrics"]["on_time"]["value"] == 1.0
    assert plain["behaviours"]["turn_taking"]["bars"][0]["reached"] is False
    assert plain["behaviours"]["cued"]["bars"][0]["reached"] is True
    assert plain["macro_average"] == 0.5
    assert json.loads(json.dumps(scores.scores_json({}), allow_nan=False)) == {"macro_average": None, "behaviours": {}}


def test_a_trace_of_outputs_has_words_and_calls_at_their_emission():
    said = [
        Said(turn=4, emitted_s=1.0, tokens=(), text=" It is,", actions=()),
        Said(turn=5, emitted_s=1.2, tokens=(), text=" Six!", actions=('{"name":"x"}',)),
    ]
    found = trace_of_said(said, CLOCK)
    assert [(w.start_s, w.end_s, w.text) for w in found.words] == [
        (1.0, 1.2, "it"), (1.0, 1.2, "is"), (1.2, 1.4, "six"),
    ]  # fmt: skip
    assert [(call.at_s, call.payload) for call in found.calls] == [(1.2, '{"name":"x"}')]


@pytest.mark.parametrize(("start", "emitted_s"), [(0, 0.2), (3_200, 0.2), (6_400, 0.4), (9_599, 0.4), (9_600, 0.6)])
def test_a_trace_of_a_session_is_emitted_when_the_layout_would(start, emitted_s):
    event = TextEvent(stream=Stream.OWN_TEXT, start=start, end=start + 4_000, text="Six")
    (word,) = trace_of_session(session("cued", texts=(event,)), CLOCK).words
    assert (word.start_s, word.text) == (pytest.approx(emitted_s), "six")
    assert word.end_s == pytest.approx((start + 4_000) / RATE)
