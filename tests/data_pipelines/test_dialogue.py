"""Conversations of two: words where they sound, replies after requests, interruptions that stop the reply."""

import itertools

import numpy as np
import pytest

from data_pipelines import espeak
from data_pipelines.dialogue import DialogueConfig, DialogueTask
from data_pipelines.dialogue_script import EXCHANGES, NODS, SLOTS, draw_exchange
from data_pipelines.speech import audible_span
from data_pipelines.voices import OWN_VOICE
from tml.codec.waveform import decode_clip
from tml.session import ExpectationKind, Session, Stream, session_to_bytes

RATE = 16_000
TASK = DialogueTask(seed=2)


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    return [TASK.session("train", i) for i in range(8)] + [TASK.session("heldout", i) for i in range(4)]


def track(session: Session, stream: Stream) -> np.ndarray:
    return decode_clip(session.audio[stream], RATE)


def test_sessions_are_well_formed_and_hold_both_voices(sessions):
    for session in sessions:
        session_to_bytes(session)
        assert session.streams == (Stream.USER_AUDIO, Stream.OWN_TEXT, Stream.OWN_AUDIO)
        assert np.abs(track(session, Stream.OWN_AUDIO)).max() == pytest.approx(0.99 * 10 ** (-6 / 20), abs=1e-3)
        variant = session.meta["voice"].split("+")[1].split("@")[0].replace("base", "")
        assert variant in espeak.split_variants(session.session_id.split("-")[1])


def test_own_words_are_heard_where_they_stand_and_nothing_else_is(sessions):
    for session in sessions:
        own = track(session, Stream.OWN_AUDIO)
        inside = np.zeros(len(own), bool)
        for event in session.texts_of(Stream.OWN_TEXT):
            inside[event.start - 800 : event.end + 1600] = True
            assert np.square(own[event.start : event.end]).mean() > 1e-5, event
        assert not own[~inside].any()


def test_own_words_do_not_overlap(sessions):
    for session in sessions:
        events = session.texts_of(Stream.OWN_TEXT)
        for one, other in itertools.pairwise(events):
            assert one.end <= other.start


def test_user_words_are_heard_where_they_stand():
    quiet = 0
    for index in range(20):
        session = TASK.session("train", index)
        if session.meta["noise"] != "none":
            continue
        quiet += 1
        user = track(session, Stream.USER_AUDIO)
        inside = np.zeros(len(user), bool)
        for word in session.user_words:
            inside[word.start - 800 : word.end + 1600] = True
            assert np.square(user[word.start : word.end]).mean() > 1e-4 * np.square(user).max(), word
        assert not user[~inside].any()
    assert quiet >= 3


def test_every_request_is_answered_in_time_with_the_words_expected(sessions):
    for session in sessions:
        events = list(session.texts_of(Stream.OWN_TEXT))
        for item in session.expectations:
            if item.kind is not ExpectationKind.ANSWER:
                continue
            words = item.text.split()
            reply = [event for event in events if event.start >= item.end][: len(words)]
            assert [event.text for event in reply] == words
            assert 0.28 * RATE <= reply[0].start - item.end <= 0.65 * RATE


def test_the_model_is_silent_where_silence_is_expected(sessions):
    kinds = set()
    for session in sessions:
        for item in session.expectations:
            if item.kind is ExpectationKind.SILENCE:
                kinds.add(item.tag)
                assert item.start < item.end
                spoken = [e for e in session.texts_of(Stream.OWN_TEXT) if e.start < item.end and item.start < e.end]
                assert not spoken, (item, spoken)
    assert kinds == {"pause", "interruption"}


def test_an_interruption_overlaps_the_reply_and_stops_it_soon():
    task = DialogueTask(seed=4, config=DialogueConfig(interruption_probability=1.0, nod_probability=0.0))
    found = 0
    for index in range(10):
        session = task.session("train", index)
        for item in session.expectations:
            if item.tag == "interruption":
                found += 1
                last = max(e.end for e in session.texts_of(Stream.OWN_TEXT) if e.end <= item.start)
                assert item.start - last < 0.1 * RATE
                begun = min(a.start for a in session.expectations if a.end == item.end and a.tag != "interruption")
                assert any(abs(word.start - begun) < 0.1 * RATE for word in session.user_words)
                assert 0.1 * RATE < item.start - begun < 1.2 * RATE
    assert found > 10


def test_nods_come_on_both_sides():
    task = DialogueTask(seed=5, config=DialogueConfig(nod_probability=1.0, pause_probability=1.0))
    own, user = 0, 0
    for index in range(10):
        session = task.session("train", index)
        words = {e.text for e in session.texts_of(Stream.OWN_TEXT)}
        own += bool(words & {*NODS, "see"})
        user += any(word.text in ("right", "okay", "sure", "yes", "see") for word in session.user_words)
    assert own >= 3
    assert user >= 5


def test_every_word_of_every_reply_has_its_own_times():
    for seed in range(60):
        exchange = draw_exchange(np.random.default_rng(seed))
        assert [word.text for word in OWN_VOICE.say(exchange.own).words] == exchange.own.split()


def test_slots_are_filled_and_no_part_holds_a_comma():
    for exchange in EXCHANGES:
        filled = " ".join((*exchange.user, exchange.own)).format(**{slot: words[0] for slot, words in SLOTS.items()})
        assert "," not in filled
        assert "{" not in filled


def test_the_same_index_gives_the_same_bytes(sessions):
    espeak.synthesise.cache_clear()
    assert session_to_bytes(TASK.session("train", 5)) == session_to_bytes(sessions[5])


def test_own_sound_ends_when_the_reply_is_cut_without_a_click():
    task = DialogueTask(seed=4, config=DialogueConfig(interruption_probability=1.0, nod_probability=0.0))
    session = task.session("train", 0)
    own = track(session, Stream.OWN_AUDIO)
    cuts = [item.start for item in session.expectations if item.tag == "interruption"]
    assert cuts
    for cut in cuts:
        assert np.abs(own[cut - 4 : cut]).max() < 0.05 * np.abs(own).max()
        assert audible_span(own[cut - 8000 : cut])[1] > 7000
