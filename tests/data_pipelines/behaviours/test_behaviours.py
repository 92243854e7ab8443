"""What holds of every behaviour: exact timings, ground truth that scores 1, nothing else that does, splits, bytes."""

import dataclasses
import itertools

import numpy as np
import pytest
from performances import CLOCK, RATE, both_splits, sessions_of, sound, task_of
from session_trace import trace_of_session

from data_pipelines import espeak
from data_pipelines.behaviours.cast import Axis, BehaviourConfig
from data_pipelines.behaviours.drawing import FRAME_SAMPLES
from data_pipelines.behaviours.task import DEFAULT_SHARES, PERFORM, BehaviourTask
from data_pipelines.behaviours.vocabulary import own_words
from tml.calls import read_call
from tml.duplex.scores import HEADLINES, LOW_IS_GOOD, outcomes, score
from tml.duplex.trace import TimedCall, Trace
from tml.microturn import Clock
from tml.session import Behaviour, ExpectationKind, Session, Stream, session_from_bytes, session_to_bytes

each = pytest.mark.parametrize("behaviour", list(Behaviour))


@each
def test_sessions_are_well_formed_and_short(behaviour):
    for session in both_splits(behaviour):
        assert session_from_bytes(session_to_bytes(session)) == session
        assert 4.0 <= session.duration_s <= 15.0
        assert session.meta["behaviour"] == behaviour.value
        assert session.expectations
        assert (Stream.VIDEO in session.streams) == (behaviour in (Behaviour.COUNTING, Behaviour.PROACTIVE))
        assert (Stream.BACKGROUND in session.streams) <= (behaviour is Behaviour.DELEGATION)


@each
def test_the_ground_truth_scores_one(behaviour):
    sessions = both_splits(behaviour)
    for session in sessions:
        for outcome in outcomes(session, trace_of_session(session, CLOCK)):
            assert outcome.hit != (outcome.metric in LOW_IS_GOOD), (session.session_id, outcome)
    found = score(sessions, [trace_of_session(session, CLOCK) for session in sessions])
    assert found[behaviour].macro == 1.0
    assert set(HEADLINES[behaviour]) <= set(found[behaviour].rates)


@each
def test_the_ground_truth_scores_one_in_shorter_micro_turns(behaviour):
    clock = Clock(turn_samples=800, hop_samples=800, sample_rate_hz=RATE)
    task = task_of(behaviour, config=BehaviourConfig(turn_ms=50))
    for index in range(3):
        session = task.session("heldout", index)
        for outcome in outcomes(session, trace_of_session(session, clock)):
            assert outcome.hit != (outcome.metric in LOW_IS_GOOD), (session.session_id, outcome)


def test_longer_micro_turns_than_the_windows_hold_are_refused():
    with pytest.raises(ValueError, match="turn_ms = 400 must be at most 200 for behaviours"):
        BehaviourConfig(turn_ms=400)


@pytest.mark.parametrize("turn_ms", [50, 100])
@pytest.mark.parametrize("behaviour", [Behaviour.TURN_TAKING, Behaviour.CUED, Behaviour.COUNTING])
def test_in_shorter_micro_turns_no_word_is_emitted_before_what_it_answers_has_come_in(behaviour, turn_ms):
    clock = Clock(turn_samples=turn_ms * RATE // 1000, hop_samples=800, sample_rate_hz=RATE)
    task, found = BehaviourTask(seed=3, shares={behaviour: 1.0}, config=BehaviourConfig(turn_ms=turn_ms)), 0
    for index in range(8):
        session = task.session("train", index)
        for item in session.expectations:
            if item.kind is ExpectationKind.ANSWER:
                seen_s = item.end / RATE
            elif item.kind is ExpectationKind.SAY:
                # What is seen comes in with the frame behind it, and with the turn of that.
                is_seen = behaviour is Behaviour.COUNTING
                seen_s = clock.emission_s(clock.turn_of(item.start + FRAME_SAMPLES)) if is_seen else item.start / RATE
            else:
                continue
            after = item.end if item.kind is ExpectationKind.ANSWER else item.start
            said = [e for e in session.texts_of(Stream.OWN_TEXT) if e.start > after and e.text in item.text.split()]
            begun = min(event.start for event in said)
            assert clock.emission_s(clock.output_turn_of(begun)) >= seen_s, (session.session_id, item)
            found += 1
    assert found > 8


@each
def test_silence_scores_nothing(behaviour):
    sessions = both_splits(behaviour)
    found = score(sessions, [Trace()] * len(sessions))[behaviour]
    assert found.macro == 0.0
    assert not any(rate.hits for rate in found.rates.values())


@each
def test_wrong_words_and_calls_at_the_right_times_score_nothing_that_needs_words(behaviour):
    def wrong(session: Session) -> Trace:
        right = trace_of_session(session, CLOCK)
        words = tuple(dataclasses.replace(word, text="wrong") for word in right.words)
        calls = tuple(TimedCall(at_s=call.at_s, payload='{"name":"wrong","arguments":{}}') for call in right.calls)
        return Trace(words=words, calls=calls)

    sessions = both_splits(behaviour)
    found = score(sessions, [wrong(session) for session in sessions])[behaviour]
    for metric in ("correct", "on_time", "within_one", "exact", "nodded", "right_tool", "right_call"):
        assert found.rate(metric).hits == 0, metric


@each
def test_words_of_another_session_score_little(behaviour):
    """What another session holds is no answer here: the input decides."""
    telling = {Behaviour.BACKCHANNEL: "nodded", Behaviour.TOOLS: "right_call"}
    asked = (Behaviour.TURN_TAKING, Behaviour.PAUSE_HANDLING, Behaviour.INTERRUPTION, Behaviour.TONE)
    metric = telling.get(behaviour, "correct" if behaviour in asked else "on_time")
    sessions = both_splits(behaviour)
    traces = [trace_of_session(session, CLOCK) for session in sessions]
    found = score(sessions, [*traces[1:], traces[0]])[behaviour]
    assert found.rate(metric).value < 0.6


@each
def test_own_words_sound_where_they_stand_and_nothing_else_does(behaviour):
    for session in both_splits(behaviour):
        own = sound(session, Stream.OWN_AUDIO)
        inside = np.zeros(len(own), bool)
        events = session.texts_of(Stream.OWN_TEXT)
        for event in events:
            inside[max(event.start - 800, 0) : event.end + 1600] = True
            assert np.square(own[event.start : event.end]).mean() > 1e-5, event
        assert not own[~inside].any()
        for one, other in itertools.pairwise(events):
            assert one.end <= other.start


@each
def test_user_words_sound_where_they_stand(behaviour):
    for session in (s for s in both_splits(behaviour) if s.meta["noise"] == "none"):
        user = sound(session, Stream.USER_AUDIO)
        inside = np.zeros(len(user), bool)
        for word in session.user_words:
            inside[max(word.start - 800, 0) : word.end + 1600] = True
            assert np.square(user[word.start : word.end]).mean() > 1e-5 * np.square(user).max(), word
        assert np.square(user[~inside]).sum() <= 0.02 * np.square(user).sum()


@each
def test_the_model_begins_to_speak_at_borders_of_micro_turns(behaviour):
    for session in both_splits(behaviour):
        end = -RATE
        for event in session.texts_of(Stream.OWN_TEXT):
            if event.start - end > 0.15 * RATE:
                assert event.start % 3_200 <= 320, event  # the first word may begin 20 ms inside its sound
            end = event.end
        for event in session.texts_of(Stream.ACTION):
            assert event.start % 3_200 == 0
            assert read_call(event.text).spelt() == event.text


@each
def test_answers_are_timely_but_never_before_what_they_answer(behaviour):
    """Everything that is due after something comes 0.25 s later or more, so that it can be known by then."""
    for session in both_splits(behaviour):
        for item in session.expectations:
            if item.kind is ExpectationKind.ANSWER:
                first = min(e.start for e in session.texts_of(Stream.OWN_TEXT) if e.start >= item.end)
                assert 0.25 * RATE <= first - item.end <= 0.47 * RATE


@each
def test_the_vocabulary_is_small(behaviour):
    for session in both_splits(behaviour):
        assert {event.text for event in session.texts_of(Stream.OWN_TEXT)} <= {*own_words()}
    assert len(own_words()) < 45


@each
def test_held_out_sessions_show_held_out_voices(behaviour):
    for split in ("train", "heldout"):
        for session in sessions_of(behaviour, split):
            variant = session.meta["voice"].split("+")[1].split("@")[0].replace("base", "")
            assert variant in espeak.split_variants(split)


@each
def test_the_same_index_gives_the_same_bytes_in_any_order(behaviour):
    sessions = sessions_of(behaviour)
    espeak.synthesise.cache_clear()
    for index in (7, 2):
        assert session_to_bytes(task_of(behaviour).session("train", index)) == session_to_bytes(sessions[index])
    assert session_to_bytes(BehaviourTask(seed=12, shares={behaviour: 1.0}).session("train", 2)) != session_to_bytes(
        sessions[2]
    )


@each
def test_negatives_ask_for_nothing_and_get_nothing(behaviour):
    task = task_of(behaviour, config=BehaviourConfig(negative_fraction=1.0))
    kinds = {behaviour: set() for behaviour in Behaviour}
    silent = 0
    for index in range(6):
        session = task.session("train", index)
        kinds[behaviour] |= {item.kind for item in session.expectations}
        silent += not session.texts_of(Stream.OWN_TEXT) and not session.texts_of(Stream.ACTION)
    if behaviour in (Behaviour.DELEGATION, Behaviour.TOOLS):
        assert ExpectationKind.NO_ACTION in kinds[behaviour]
        assert ExpectationKind.ACTION not in kinds[behaviour]
    elif behaviour is Behaviour.INTERRUPTION:
        assert ExpectationKind.STOP not in kinds[behaviour]
    elif behaviour in (Behaviour.BACKCHANNEL, Behaviour.TONE):
        assert silent
    else:
        assert silent == 6
        assert kinds[behaviour] == {ExpectationKind.SILENCE}


def test_a_mixture_has_its_shares():
    task = BehaviourTask(seed=0, shares={Behaviour.TONE: 3.0, Behaviour.TIMED: 1.0, Behaviour.TOOLS: 0.0})
    rng = np.random.default_rng(0)
    drawn = [task._draw_behaviour(rng) for _ in range(2_000)]
    assert set(drawn) == {Behaviour.TONE, Behaviour.TIMED}
    assert drawn.count(Behaviour.TONE) / 2_000 == pytest.approx(0.75, abs=0.03)
    assert set(DEFAULT_SHARES) == set(PERFORM) == set(Behaviour)


def test_axes_that_are_not_held_out_look_like_training():
    config = BehaviourConfig(held_out=(Axis.TIME,))
    session = task_of(Behaviour.TIMED, config=config).session("heldout", 0)
    assert session.meta["held_out"] == "time"
    assert session.meta["voice"].split("+")[1].split("@")[0].replace("base", "") in espeak.split_variants("train")


@pytest.mark.parametrize("shares", [{}, {Behaviour.TONE: 0.0}, {Behaviour.TONE: -1.0}, {Behaviour.TONE: float("nan")}])
def test_shares_that_choose_nothing_are_refused(shares):
    with pytest.raises(ValueError, match="must be 0 or more"):
        BehaviourTask(seed=0, shares=shares)


def test_unknown_splits_and_fractions_are_refused():
    with pytest.raises(ValueError, match="'test' is not one of train, heldout"):
        BehaviourTask(seed=0).session("test", 0)
    with pytest.raises(ValueError, match=r"negative_fraction = 1.5 must lie in \[0, 1\]"):
        BehaviourConfig(negative_fraction=1.5)
