"""Every scorer on timelines made by hand: what is a hit, what just is none, and how late it was."""

import json

import pytest

from tml.duplex import judge as judging
from tml.duplex.judge import judge, number_of, take_over
from tml.duplex.trace import TimedCall, TimedWord, Trace
from tml.session import Expectation, ExpectationKind

RATE = 16_000
KIND = ExpectationKind


def trace(*words: tuple[float, str], calls: tuple[tuple[float, str], ...] = ()) -> Trace:
    return Trace(
        words=tuple(TimedWord(start_s=at, end_s=at + 0.2, text=text) for at, text in words),
        calls=tuple(TimedCall(at_s=at, payload=payload) for at, payload in calls),
    )


def judged(kind, start_s, end_s, text, emitted, *, tag="", until_s=20.0):
    item = Expectation(kind=kind, start=round(start_s * RATE), end=round(end_s * RATE), text=text, tag=tag)
    found = judge(item, emitted, RATE, round(until_s * RATE))
    assert all(outcome.tag == tag for outcome in found)
    return {outcome.metric: outcome.hit for outcome in found}, {o.metric: o.latency_s for o in found}


@pytest.mark.parametrize(
    ("at", "responded"), [(1.8, False), (2.0, False), (2.2, True), (3.8, True), (4.0, True), (4.2, False)]
)
def test_an_answer_counts_after_the_end_and_up_to_two_seconds(at, responded):
    hits, latencies = judged(KIND.ANSWER, 1.0, 2.0, "seven", trace((at, "seven")))
    assert hits == {"responded": responded, "correct": responded}
    assert latencies["responded"] == (pytest.approx(at - 2.0) if responded else None)


@pytest.mark.parametrize(
    ("words", "correct"),
    [
        (((2.2, "seven"), (2.4, "eight")), True),
        (((2.2, "two"), (2.4, "seven")), False),
        (((1.8, "two"), (2.4, "seven")), True),
    ],
)
def test_the_first_word_behind_the_request_is_the_answer(words, correct):
    hits, _ = judged(KIND.ANSWER, 1.0, 2.0, "Seven!", trace(*words))
    assert hits == {"responded": True, "correct": correct}


def test_an_answer_may_take_longer_than_its_window_but_not_longer_than_the_next_request():
    words = trace((2.4, "one"), (3.0, "two"), (3.6, "three"), (4.2, "four"))
    wanted = "one two three four"
    assert judged(KIND.ANSWER, 1.0, 2.0, wanted, words)[0] == {"responded": True, "correct": True}
    cut, _ = judged(KIND.ANSWER, 1.0, 2.0, wanted, words, until_s=4.0)
    assert cut == {"responded": True, "correct": False}


def test_an_answer_of_four_words_responds_when_it_is_a_turn():
    wanted = "one two three four"
    assert judged(KIND.ANSWER, 1.0, 2.0, wanted, trace((2.4, "okay")))[0]["responded"] is False
    assert judged(KIND.ANSWER, 1.0, 2.0, "one", trace((2.4, "okay")))[0]["responded"] is True
    long = trace((2.4, "okay"), (3.4, "well"))
    hits, latencies = judged(KIND.ANSWER, 1.0, 2.0, wanted, long)
    assert hits == {"responded": True, "correct": False}
    assert latencies["responded"] == pytest.approx(0.4)


def test_full_duplex_benchs_take_over():
    def words(*spans):
        return [TimedWord(start_s=a, end_s=b, text="x") for a, b in spans]

    assert take_over([], 1.0) == (False, None)
    assert take_over(words((1.0, 1.2), (1.2, 1.5), (1.5, 1.99)), 1.0) == (False, None)
    assert take_over(words((1.0, 1.2), (1.2, 1.5), (1.5, 2.0)), 0.5) == (True, 0.5)
    assert take_over(words((1.0, 1.1), (1.1, 1.2), (1.2, 1.3), (1.3, 1.4)), 2.0) == (True, 0.0)
    assert take_over(words((3.0, 4.0)), 1.0) == (True, 2.0)


@pytest.mark.parametrize(("at", "heard"), [(0.8, False), (1.0, True), (1.4, True), (1.6, False)])
@pytest.mark.parametrize(
    ("tag", "metric"), [("pause", "pause_takeover"), ("request", "premature"), ("noise", "false_alarm")]
)
def test_silence_is_broken_by_any_word_inside(at, heard, tag, metric):
    hits, _ = judged(KIND.SILENCE, 1.0, 1.6, "", trace((at, "two")), tag=tag)
    assert hits == {metric: heard}


@pytest.mark.parametrize(
    ("words", "hit", "lag_s"),
    [
        (((1.2, "red"),), True, 0.2),
        (((1.0, "red"),), False, None),
        (((2.0, "red"),), True, 1.0),
        (((2.2, "red"),), False, None),
        (((1.2, "blue"), (1.4, "red")), True, 0.4),
        (((1.2, "blue"),), False, None),
        ((), False, None),
    ],
)
def test_a_word_is_on_time_inside_its_window(words, hit, lag_s):
    hits, lags = judged(KIND.SAY, 1.0, 2.0, "red", trace(*words))
    assert hits == {"on_time": hit}
    assert lags["on_time"] == (None if lag_s is None else pytest.approx(lag_s))


def test_words_of_a_phrase_follow_each_other():
    wanted = "it is six"
    assert judged(KIND.SAY, 1.0, 3.0, wanted, trace((1.2, "moment"), (1.4, "it"), (1.4, "is"), (1.6, "six")))[0][
        "on_time"
    ]
    assert not judged(KIND.SAY, 1.0, 3.0, wanted, trace((1.2, "it"), (1.4, "is"), (1.6, "two"), (1.8, "six")))[0][
        "on_time"
    ]
    assert not judged(KIND.SAY, 1.0, 3.0, wanted, trace((1.2, "it"), (2.8, "is"), (3.2, "six")))[0]["on_time"]


@pytest.mark.parametrize(
    ("words", "within_one", "exact"),
    [
        (("one", "two", "three"), True, True),
        (("one", "two"), True, False),
        (("one", "two", "three", "four"), True, False),
        (("one",), False, False),
        (("three", "three", "9"), False, False),
        (("3",), True, True),
        (("three", "okay"), True, True),
        ((), False, False),
        (("okay",), False, False),
    ],
)
def test_a_count_is_the_last_number_said(words, within_one, exact):
    emitted = trace(*((1.2 + 0.2 * i, word) for i, word in enumerate(words)), (9.0, "seven"))
    hits, _ = judged(KIND.COUNT, 1.0, 5.0, "three", emitted)
    assert hits == {"within_one": within_one, "exact": exact}


def test_numbers():
    assert [number_of(word) for word in ("zero", "twelve", "7", "12", "seventy", "²", "")] == [
        0, 12, 7, 12, None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "nodded", "took_turn"),
    [
        (("okay",), True, False),
        (("okay", "okay"), True, False),
        (("okay", "so", "then"), False, True),
        (("no",), False, False),
        (("no", "okay"), False, False),
        ((), False, False),
    ],
)
def test_a_nod_is_short_and_begins_with_one_of_its_words(words, nodded, took_turn):
    emitted = trace(*((1.2 + 0.2 * i, word) for i, word in enumerate(words)))
    hits, latencies = judged(KIND.NOD, 1.0, 2.2, "okay yes", emitted)
    assert hits == {"nodded": nodded, "took_turn": took_turn}
    assert latencies["nodded"] == (pytest.approx(0.2) if nodded else None)


@pytest.mark.parametrize(
    ("times", "stopped", "latency_s"),
    [
        ((1.0, 1.6), True, 0.0),
        ((1.6, 2.2, 2.6), True, 0.6),
        ((1.6, 2.2, 2.8), False, None),
        ((1.6, 2.2, 3.4), False, None),
        ((1.6, 2.2, 3.6), True, 0.2),
        ((), False, None),
        ((0.2,), False, None),
        ((3.4,), False, None),
        # What begins only then has nothing to stop.
        ((2.2, 2.4), False, None),
    ],
)
def test_stopping_takes_at_most_six_tenths_of_a_second_from_one_that_spoke(times, stopped, latency_s):
    hits, latencies = judged(KIND.STOP, 2.0, 3.6, "", trace(*((at, "x") for at in times)))
    assert hits == {"stopped": stopped}
    assert latencies["stopped"] == (None if latency_s is None else pytest.approx(latency_s))


@pytest.mark.parametrize(
    ("times", "went_on"),
    [
        ((1.8, 2.4, 3.0, 3.6), True),
        ((2.0, 3.2, 4.4), True),
        ((2.0, 3.4), False),
        ((1.8,), False),
        ((), False),
        ((2.2, 2.6), False),
        ((0.2, 5.0), False),
    ],
)
def test_speech_goes_on_without_a_gap(times, went_on):
    hits, _ = judged(KIND.GO_ON, 2.0, 4.4, "", trace(*((at, "x") for at in times)))
    assert hits == {"went_on": went_on}


def test_a_short_span_needs_a_word_that_still_lasts():
    assert judged(KIND.GO_ON, 2.0, 2.6, "", trace((1.0, "x")))[0] == {"went_on": True}
    assert judged(KIND.GO_ON, 2.0, 2.6, "", trace((0.6, "x")))[0] == {"went_on": False}
    assert judged(KIND.GO_ON, 2.0, 2.6, "", trace())[0] == {"went_on": False}


CALL = '{"name":"light","arguments":{"colour":"red"}}'


@pytest.mark.parametrize(
    ("at", "payload", "tool", "call"),
    [
        (1.2, CALL, True, True),
        (1.2, '{"arguments": {"colour": "red"}, "name": "light"}', True, True),
        (1.2, '{"name":"light","arguments":{"colour":"blue"}}', True, False),
        (1.2, '{"name":"light"}', True, False),
        (1.2, '{"name":"draw","arguments":{"colour":"red"}}', False, False),
        (1.2, '{"name":"light","arguments":', False, False),
        (1.2, "light red", False, False),
        (1.0, CALL, False, False),
        (2.4, CALL, True, True),
        (2.6, CALL, False, False),
    ],
)
def test_a_call_is_right_by_name_and_arguments_in_its_window(at, payload, tool, call):
    hits, latencies = judged(KIND.ACTION, 1.0, 2.4, CALL, trace(calls=((at, payload),)))
    in_window = 1.0 < at <= 2.4
    assert hits == {"right_tool": tool, "right_call": call, "wrong_call": in_window and not call}
    assert latencies["right_call"] == (pytest.approx(at - 1.0) if call else None)


def test_a_wrong_call_beside_the_right_one_does_not_hide_it_and_counts():
    wrong = json.dumps({"name": "light", "arguments": {"colour": "blue"}})
    hits, _ = judged(KIND.ACTION, 1.0, 2.4, CALL, trace(calls=((1.2, wrong), (1.4, CALL))))
    assert hits == {"right_tool": True, "right_call": True, "wrong_call": True}
    twice, _ = judged(KIND.ACTION, 1.0, 2.4, CALL, trace(calls=((1.2, CALL), (1.4, CALL))))
    assert twice == {"right_tool": True, "right_call": True, "wrong_call": True}


@pytest.mark.parametrize(
    ("tag", "metric"), [("cancel", "acknowledged"), ("failure", "acknowledged"), ("result", "on_time")]
)
def test_words_that_use_no_result_are_a_metric_of_their_own(tag, metric):
    assert judged(KIND.SAY, 1.0, 2.0, "okay", trace((1.2, "okay")), tag=tag)[0] == {metric: True}


@pytest.mark.parametrize(("at", "called"), [(0.8, False), (1.0, True), (1.9, True), (2.0, False)])
def test_a_call_where_none_is_due_is_false_whatever_it_says(at, called):
    hits, _ = judged(KIND.NO_ACTION, 1.0, 2.0, "", trace(calls=((at, "nonsense"),)))
    assert hits == {"false_call": called}


def test_every_kind_has_a_judge_and_is_in_the_table():
    for kind in ExpectationKind:
        assert f"| {kind.value.upper()} " in judging.__doc__
        text = {KIND.COUNT: "one", KIND.ACTION: CALL}.get(kind, "one")
        found, _ = judged(kind, 1.0, 2.0, text, trace())
        assert found
        assert not any(found.values())


def test_times_that_are_no_whole_binary_fractions_compare_as_samples():
    at = 0.2 * 3 + 0.6
    assert judged(KIND.SAY, 1.0, 1.2, "red", trace((at, "red")))[0] == {"on_time": True}
    assert judged(KIND.SILENCE, 1.2, 1.4, "", trace((0.1 * 12, "red")))[0] == {"false_alarm": True}
