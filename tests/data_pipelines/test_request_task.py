"""Sessions of the request task: what is asked, when the answer is due, where silence is due."""

import io
import itertools
import re
from collections import Counter

import numpy as np
import pytest
import soundfile

from data_pipelines import espeak
from data_pipelines.noise import NOISE_KINDS, noise
from data_pipelines.request_session import PACES, RequestTaskConfig, answer_event
from data_pipelines.request_task import RequestTask
from data_pipelines.request_vocabulary import DIGITS, FOREIGN, REQUEST_TYPES, STATEMENTS
from data_pipelines.speech import audible_span
from tml.config import AudioConfig, MicroTurnConfig
from tml.microturn import Clock
from tml.session import ExpectationKind, Session, Stream, session_to_bytes

RATE = 16_000
TASK = RequestTask(seed=3)


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    return [TASK.session("train", i) for i in range(24)] + [TASK.session("heldout", i) for i in range(10)]


def sound(session: Session) -> np.ndarray:
    return soundfile.read(io.BytesIO(session.audio[Stream.USER_AUDIO].data), dtype="float32")[0]


def of_kind(session: Session, kind: ExpectationKind):
    return [item for item in session.expectations if item.kind is kind]


def test_there_are_thirty_types_and_every_digit_is_asked_alone_and_in_phrases():
    assert len(REQUEST_TYPES) >= 30
    assert len({kind.tag for kind in REQUEST_TYPES}) == len(REQUEST_TYPES)
    pairs = dict(pair for kind in REQUEST_TYPES for pair in kind.requests)
    for i, digit in enumerate(DIGITS):
        assert pairs[digit] == digit
        assert pairs[f"say {digit}"] == digit
        if i < 9:
            assert pairs[f"what comes after {digit}"] == DIGITS[i + 1]
            assert pairs[f"what comes before {DIGITS[i + 1]}"] == digit


def test_a_request_has_one_answer_of_one_word_and_begins_no_other():
    requests, answers = zip(*(pair for kind in REQUEST_TYPES for pair in kind.requests), strict=True)
    assert len({*requests}) == len(requests)
    assert all(re.fullmatch("[a-z]+", answer) for answer in answers)
    for one, other in itertools.permutations(requests, 2):
        assert not f"{other} ".startswith(f"{one} "), (one, other)


def test_what_asks_for_nothing_is_no_request():
    requests = {request for kind in REQUEST_TYPES for request, _ in kind.requests}
    assert not requests & {*STATEMENTS, *(text for _, text in FOREIGN)}
    assert {language for language, _ in FOREIGN} <= {*espeak.languages()}


@pytest.mark.parametrize("end", [0, 1, 3199, 3200, 17_601, 31_999])
@pytest.mark.parametrize("delay_s", [0.1, 0.25, 0.3])
def test_the_answer_is_emitted_in_the_first_turn_that_ends_late_enough(end, delay_s):
    clock = Clock.of(MicroTurnConfig(), AudioConfig())
    event = answer_event("seven", end, delay_s=delay_s)
    emitted_s = clock.emission_s(clock.output_turn_of(event.start))
    due_s = end / RATE + delay_s
    assert emitted_s >= due_s - 1e-9
    assert emitted_s - 0.2 < due_s - 1e-9


def test_sessions_are_well_formed(sessions):
    for session in sessions:
        session_to_bytes(session)
        assert 6.0 <= session.duration_s <= 12.0
        samples = sound(session)
        assert len(samples) == session.num_samples
        assert np.abs(samples).max() < 1.0


def test_every_answer_has_room_and_no_other_answer_in_its_window(sessions):
    for session in sessions:
        answers = of_kind(session, ExpectationKind.ANSWER)
        events = session.texts_of(Stream.OWN_TEXT)
        assert [event.text for event in events] == [item.text for item in answers]
        for i, (item, event) in enumerate(zip(answers, events, strict=True)):
            assert 0.3 * RATE <= event.start - item.end < 0.5 * RATE
            assert item.end + 2 * RATE <= session.num_samples
            if i + 1 < len(events):
                assert events[i + 1].start >= item.end + 2 * RATE


def test_pauses_lie_inside_requests_and_last_what_they_should(sessions):
    pauses = 0
    for session in sessions:
        answers = of_kind(session, ExpectationKind.ANSWER)
        for item in of_kind(session, ExpectationKind.SILENCE):
            if item.tag == "pause":
                pauses += 1
                assert 0.4 * RATE <= item.end - item.start <= 1.2 * RATE
                assert any(answer.start < item.start and item.end < answer.end for answer in answers)
    assert pauses > 10


def test_brisk_requests_pause_up_to_twice_and_sessions_are_as_long_as_a_row():
    task, counts = RequestTask(seed=3, config=PACES["brisk"]), Counter()
    for i in range(12):
        session = task.session("train", i)
        assert 11 * RATE <= session.num_samples <= 12 * RATE
        pauses = [item for item in of_kind(session, ExpectationKind.SILENCE) if item.tag == "pause"]
        assert all(first.end < second.start for first, second in itertools.pairwise(pauses))
        for answer in of_kind(session, ExpectationKind.ANSWER):
            counts[sum(answer.start < item.start and item.end < answer.end for item in pauses)] += 1
    assert set(counts) == {0, 1, 2}


def test_a_request_ends_where_its_sound_ends():
    task = RequestTask(seed=5)
    checked = 0
    for i in range(80):
        session = task.session("train", i)
        if session.meta["noise"] != "none":
            continue
        samples = sound(session)
        for item in of_kind(session, ExpectationKind.ANSWER):
            start, end = audible_span(samples[item.start - 1600 : item.end + 4800])
            assert abs(start + item.start - 1600 - item.start) <= 160
            assert abs(end + item.start - 1600 - item.end) <= 160
            checked += 1
    assert checked > 10


def test_the_noise_has_the_stated_ratio():
    task = RequestTask(seed=6, config=RequestTaskConfig(silent_fraction=0.0))
    checked = 0
    for i in range(30):
        session = task.session("train", i)
        if session.meta["noise"] in ("none", "babble", "brown"):
            continue
        samples = sound(session).astype(np.float64)
        spans = [(item.start, item.end) for item in session.expectations if item.kind is ExpectationKind.ANSWER]
        spans += [
            (word.start, word.end)
            for item in session.expectations
            if item.tag in ("statement", "foreign")
            for word in session.user_words
            if item.start <= word.start < item.end
        ]
        inside = np.zeros(len(samples), bool)
        for start, end in spans:
            inside[start:end] = True
        for item in session.expectations:
            if item.tag == "pause":
                inside[item.start : item.end] = False
        quiet = np.square(samples[~inside]).mean()
        loud = np.square(samples[inside]).mean()
        measured_db = 10 * np.log10(max(loud / quiet - 1, 1e-9))
        assert abs(measured_db - float(session.meta["snr_db"])) < 2.0, session.meta
        checked += 1
    assert checked > 8


def test_some_sessions_ask_for_nothing():
    task = RequestTask(seed=1, config=RequestTaskConfig(silent_fraction=1.0))
    tags = set()
    for i in range(12):
        session = task.session("train", i)
        assert session.streams == (Stream.USER_AUDIO,)
        assert session.texts == ()
        assert session.expectations
        assert all(item.kind is ExpectationKind.SILENCE for item in session.expectations)
        tags |= {item.tag for item in session.expectations}
    assert tags == {"noise", "statement", "foreign"}


def test_heldout_sessions_use_heldout_variants_only(sessions):
    for session in sessions:
        variant = session.meta["voice"].split("+")[1].split("@")[0].replace("base", "")
        split = session.session_id.split("-")[1]
        assert variant in espeak.split_variants(split)


def test_the_same_index_gives_the_same_bytes_in_any_order(sessions):
    espeak.synthesise.cache_clear()
    for i in (17, 4):
        assert session_to_bytes(TASK.session("train", i)) == session_to_bytes(sessions[i])
    assert session_to_bytes(RequestTask(seed=4).session("train", 4)) != session_to_bytes(sessions[4])


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test' is not one of train, heldout"):
        TASK.session("test", 0)


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_has_mean_power_one_over_the_long_run(kind):
    wave = noise(kind, 30 * RATE, np.random.default_rng(0))
    assert wave.dtype == np.float32
    assert np.mean(np.square(wave)) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(("kind", "slope_db"), [("white", 0.0), ("pink", -3.01), ("brown", -6.02)])
def test_noise_falls_by_its_slope_per_octave(kind, slope_db):
    wave = noise(kind, 30 * RATE, np.random.default_rng(0))
    power = np.square(np.abs(np.fft.rfft(wave)))
    hz = np.fft.rfftfreq(len(wave), 1 / RATE)
    octaves = [10 * np.log10(power[(hz >= low) & (hz < 2 * low)].mean()) for low in (250, 500, 1000, 2000)]
    np.testing.assert_allclose(np.diff(octaves), slope_db, atol=0.3)


def test_unknown_noise_is_refused():
    with pytest.raises(ValueError, match="'red' is not one of white"):
        noise("red", 10, np.random.default_rng(0))
