"""Sessions through the engine that serves: as live sessions, in any slot; results come when they are asked for."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from random_player import NUM_SLOTS, delegations, random_model, random_player, sessions_of
from small_model import RATE_HZ, small_session

from tml.codec.encode import encode_session
from tml.codec.waveform import decode_clip
from tml.config import MicroTurnConfig, SlotScheme
from tml.duplex import player as player_module
from tml.duplex.controls import without
from tml.duplex.player import Played, Player, _Feed, opening_call, recorded_trace
from tml.duplex.scores import HEADLINES, is_good, outcomes, score
from tml.duplex.trace import Trace
from tml.microturn import Clock
from tml.session import Behaviour, Session, Stream, TextEvent
from tml.stream.inputs import session_inputs
from tml.stream.live import LiveSession
from tml.stream.outputs import Said

CALL = '{"name":"delegate","arguments":{}}'


@pytest.mark.parametrize("behaviour", list(Behaviour))
@pytest.mark.parametrize("slots", SlotScheme)
def test_the_targets_of_a_session_score_one_on_everything_and_silence_on_nothing(slots, behaviour):
    model = random_model()
    layout = replace(model.layout, turn=replace(model.layout.turn, slots=slots))
    sessions = sessions_of(behaviour)
    traces = [recorded_trace(one, layout, model.tokenizer, model.experiment.model) for one in sessions]
    for session, trace in zip(sessions, traces, strict=True):
        assert all(map(is_good, outcomes(session, trace))), session.session_id
    assert score(sessions, traces)[behaviour].macro == 1.0
    silent = score(sessions, [Trace()] * len(sessions))[behaviour]
    assert silent.rate(HEADLINES[behaviour][0]).hits == 0


def test_a_layout_that_is_too_coarse_lowers_the_ceiling():
    model = random_model()
    turn = MicroTurnConfig(turn_ms=1000)
    slow = replace(model.layout, turn=turn, clock=Clock.of(turn, model.experiment.model.audio))
    sessions = sessions_of(Behaviour.CUED)
    traces = [recorded_trace(one, slow, model.tokenizer, model.experiment.model) for one in sessions]
    assert score(sessions, traces)[Behaviour.CUED].macro < 1.0


def small_sessions() -> list[Session]:
    """More than there are slots, of different lengths."""
    return [small_session(number, seconds) for number, seconds in enumerate((1.2, 2.0, 1.7, 1.4))]


@pytest.fixture(scope="module")
def played() -> list[Played]:
    return random_player().play(small_sessions())


def assert_same(one: Played, other: Played) -> None:
    """The same words and the same turns of speech; sound to the rounding of float16, across programs."""
    assert one.said == other.said
    for mine, others in zip(one.mels, other.mels, strict=True):
        assert (mine is None) == (others is None)
        if mine is not None and others is not None:
            np.testing.assert_allclose(mine, others, rtol=2e-3, atol=2e-3)


def test_the_suite_streams_what_a_live_session_streams(played):
    model, config = random_model(), random_model().experiment
    roomy = replace(config.stream, max_positions=1_024)
    for number, session in enumerate(small_sessions()[:2]):
        live = LiveSession(model.params, config.model, model.layout, roomy, model.tokenizer, number)
        turns = live.push(decode_clip(session.audio[Stream.USER_AUDIO], RATE_HZ))
        mels = tuple(turn.mels for turn in turns)
        lived = Played(said=tuple(turn.said for turn in turns), mels=mels, background=())
        assert_same(lived, played[number])
        record = decode_clip(live.record("live").audio[Stream.OWN_AUDIO], RATE_HZ)
        own = random_player().own_sound(session, lived)
        assert len(own) == session.num_samples
        np.testing.assert_allclose(np.clip(own, -1, 1 - 1 / 32_768), record[: len(own)], atol=1 / 32_768)


def test_progress_counts_the_micro_turns_of_all_sessions():
    seen: list[int] = []
    random_player().play(small_sessions(), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == sum(map(random_player().num_turns, small_sessions())) == 6 + 10 + 9 + 7


def test_caches_grow_until_a_session_fits(played, monkeypatch):
    monkeypatch.setattr(player_module, "POSITIONS_STEP", 1)
    monkeypatch.setattr(player_module, "LIKELY_SLOTS_OUT", 0)
    model, config = random_model(), random_model().experiment
    small = Player(model.params, config.model, model.layout, config.stream, model.tokenizer, NUM_SLOTS)
    for one, other in zip(small.play(small_sessions()), played, strict=True):
        assert_same(one, other)
    assert small._max_positions > 10 * model.layout.max_slots_in


def feed_of(session: Session) -> _Feed:
    model = random_model()
    return _Feed(session, model.layout, model.experiment.model, model.tokenizer)


def called(turn: int, payload: str = CALL) -> Said:
    emitted_s = random_model().layout.clock.emission_s(turn)
    return Said(turn=turn, emitted_s=emitted_s, tokens=(), text="", actions=(payload,))


def results_in(feed: _Feed) -> list[int]:
    """The turns in which something comes in from the background."""
    marker = random_model().layout.special.background
    return [turn for turn in range(feed.num_turns) if marker in feed.turn(turn).tokens_BW]


def test_results_come_as_in_training_to_a_model_that_calls_as_recorded():
    model, clock = random_model(), random_model().layout.clock
    for session in delegations():
        feed = feed_of(session)
        assert results_in(feed) == []
        first = session.texts_of(Stream.ACTION)[0]
        feed.hear(called(clock.output_turn_of(first.start)))
        trained = session_inputs(
            model.layout, encode_session(session, model.experiment.model, model.tokenizer), model.experiment.model
        )
        for turn in range(feed.num_turns):
            same = jax.tree.map(lambda leaf, turn=turn: leaf[turn : turn + 1], trained)
            jax.tree.map(np.testing.assert_array_equal, feed.turn(turn), same)
        assert [event.text for event in feed.background] == [e.text for e in session.texts_of(Stream.BACKGROUND)]
        assert results_in(feed)


def test_no_result_comes_before_its_call_or_after_another():
    session, clock = delegations()[0], random_model().layout.clock
    arrival = clock.turn_of(session.texts_of(Stream.BACKGROUND)[0].start)
    late = feed_of(session)
    late.hear(called(arrival + 3))
    assert results_in(late)[0] == arrival + 4
    assert late.background[0].start == (arrival + 4) * clock.turn_samples
    wrong = feed_of(session)
    for payload in ('{"name":"draw","arguments":{}}', "delegate", '{"name":', ""):
        wrong.hear(called(2, payload))
    assert (results_in(wrong), wrong.background) == ([], ())
    last = feed_of(session)
    last.hear(called(last.num_turns - 1))
    assert (results_in(last), last.background) == ([], ())


def test_results_of_a_session_without_a_call_come_as_they_are():
    event = TextEvent(stream=Stream.BACKGROUND, start=RATE_HZ, end=RATE_HZ, text="result six")
    session = replace(small_session(1), texts=(event,), streams=(Stream.USER_AUDIO, Stream.BACKGROUND))
    assert opening_call(session) is None
    assert opening_call(delegations()[0]) == "delegate"
    assert opening_call(sessions_of(Behaviour.TOOLS)[0]) is None
    assert results_in(feed_of(session))[0] == 5
    assert feed_of(session).background == (event,)


def test_the_model_is_never_given_what_was_recorded_of_it():
    session = delegations()[0]
    outputs = (Stream.OWN_TEXT, Stream.OWN_AUDIO)
    one, other = feed_of(session), feed_of(without(session, *outputs))
    for turn in range(one.num_turns):
        jax.tree.map(np.testing.assert_array_equal, one.turn(turn), other.turn(turn))
    assert not one.turn(one.num_turns).counts_B.any()
