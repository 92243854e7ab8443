"""The evaluation: windows and words on timelines made by hand, its controls, and a run from end to end."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats
from small_model import RATE_HZ, small_model, small_session, without_sound

from tml import evaluate
from tml.codec.waveform import resample
from tml.config import AudioOutConfig, FlowConfig
from tml.duplex.player import Player
from tml.evaluate import Condition, Rate, Scores, envelope_noise, score
from tml.export.bundle import Model
from tml.session import Expectation, ExpectationKind, Session
from tml.stream.live import LiveSession
from tml.stream.outputs import Said


def timeline(*expected: Expectation, seconds: float = 6.0) -> Session:
    size = int(seconds * RATE_HZ)
    return Session(
        session_id="by hand", sample_rate_hz=RATE_HZ, num_samples=size, streams=(), expectations=tuple(expected)
    )


def answer(text: str, start_s: float, end_s: float, tag: str = "say") -> Expectation:
    span = {"start": int(start_s * RATE_HZ), "end": int(end_s * RATE_HZ)}
    return Expectation(kind=ExpectationKind.ANSWER, text=text, tag=tag, **span)


def silence(start_s: float, end_s: float, tag: str = "") -> Expectation:
    span = {"start": int(start_s * RATE_HZ), "end": int(end_s * RATE_HZ)}
    return Expectation(kind=ExpectationKind.SILENCE, tag=tag, **span)


def said(*words: tuple[float, str]) -> list[Said]:
    return [
        Said(turn=round(at / 0.2) - 1, emitted_s=at, tokens=(), text=text, actions=()) for at, text in sorted(words)
    ]


def scored(expected: list[Expectation], *words: tuple[float, str], window_s: float = 2.0) -> Scores:
    return score([timeline(*expected)], [said(*words)], window_s)


@pytest.mark.parametrize(
    ("at", "responded"), [(1.8, False), (2.0, False), (2.2, True), (3.8, True), (4.0, True), (4.2, False)]
)
def test_an_answer_counts_after_the_end_and_up_to_the_window(at: float, responded: bool) -> None:
    scores = scored([answer("seven", 1.0, 2.0)], (at, " seven"))
    assert scores.responded == scores.correct == Rate(hits=int(responded), cases=1)
    assert scores.latencies_s == pytest.approx((at - 2.0,) if responded else ())


def test_the_first_word_in_the_window_is_the_answer_and_its_latency() -> None:
    wrong_first = scored([answer("seven", 1.0, 2.0)], (2.4, " two"), (2.6, " seven"))
    assert (wrong_first.responded.hits, wrong_first.correct.hits) == (1, 0)
    assert wrong_first.median_latency_s == pytest.approx(0.4)
    too_early = scored([answer("seven", 1.0, 2.0)], (1.6, " two"), (2.6, " seven nine"))
    assert (too_early.responded.hits, too_early.correct.hits) == (1, 1)
    assert too_early.median_latency_s == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("words", "correct"),
    [
        (((2.2, "a"), (2.4, "table for"), (2.8, "two")), True),
        (((2.2, "a"), (2.4, "table for"), (2.8, "two"), (3.0, "please")), True),
        (((2.2, "a"), (2.4, "table for")), False),
        (((2.2, "the"), (2.4, "table for"), (2.8, "two")), False),
    ],
)
def test_an_answer_of_several_words_is_right_when_the_first_words_are_its_own(words, correct: bool) -> None:
    scores = scored([answer("A table for two!", 1.0, 2.0)], *words)
    assert (scores.responded.hits, scores.correct.hits) == (1, int(correct))


@pytest.mark.parametrize(("at", "hits"), [(1.0, 0), (1.2, 1), (1.8, 1), (2.0, 1), (2.2, 0)])
def test_words_over_a_request_are_premature_in_a_pause_or_not(at: float, hits: int) -> None:
    scores = scored([silence(1.4, 1.6, "pause"), answer("seven", 1.0, 2.0)], (at, "two"))
    assert scores.premature == Rate(hits=hits, cases=1)


@pytest.mark.parametrize("text", [" Seven", " seven.", "SEVEN!", ' "seven"', "\n seven, two"])
def test_case_and_punctuation_do_not_count(text: str) -> None:
    assert scored([answer("Seven?", 1.0, 2.0)], (2.4, text)).correct == Rate(hits=1, cases=1)


def test_words_are_letters_of_any_language_with_their_apostrophes() -> None:
    assert evaluate.normalise("Don't  say ¡Ocho!, Élan-vital 7") == ["don't", "say", "ocho", "élan", "vital", "7"]


def test_text_without_a_word_is_no_response() -> None:
    scores = scored([answer("seven", 1.0, 2.0)], (2.2, " "), (2.4, " ?!"))
    assert scores.responded == scored([answer("?", 1.0, 2.0)]).correct == Rate(hits=0, cases=1)
    assert math.isnan(scores.median_latency_s)


@pytest.mark.parametrize(("at", "heard"), [(0.8, False), (1.0, True), (1.4, True), (1.6, False)])
@pytest.mark.parametrize("tag", ["pause", "noise"])
def test_words_inside_a_span_of_silence_count_its_end_excluded(at: float, heard: bool, tag: str) -> None:
    scores = scored([silence(1.0, 1.6, tag)], (at, " two"), (at, " three"))
    by_tag = {"pause": scores.takeover, "noise": scores.false_alarm}
    assert by_tag.pop(tag) == Rate(hits=int(heard), cases=1)
    assert by_tag.popitem()[1] == Rate(hits=0, cases=0)
    assert scores.responded.cases == scores.correct.cases == 0


def test_sessions_of_behaviours_are_refused_before_anything_is_streamed(model: Model) -> None:
    expected = Expectation(kind=ExpectationKind.SAY, start=0, end=RATE_HZ, text="red")
    player = Player(model.params, model.experiment.model, model.layout, model.experiment.stream, model.tokenizer, 1)
    with pytest.raises(ValueError, match=r"the sessions expect say, not only answers and silence; .*--suite=duplex"):
        evaluate.evaluate(player, [timeline(answer("red", 1, 2), expected)], model.experiment.evaluation)


def test_sessions_add_up_and_types_are_told_apart() -> None:
    sessions = [
        timeline(silence(0.5, 1.0, "pause"), answer("seven", 0.0, 2.0), answer("two", 3.0, 4.0, "count")),
        timeline(answer("two", 0.0, 2.0, "count"), silence(4.0, 6.0, "noise")),
    ]
    scores = score(sessions, [said((0.6, "oh"), (2.4, "seven"), (4.2, "two")), said((2.8, "three"), (5.0, "two"))], 2.0)
    assert scores.responded == Rate(hits=3, cases=3)
    assert scores.correct == Rate(hits=2, cases=3)
    assert scores.takeover == Rate(hits=1, cases=1)
    assert scores.false_alarm == Rate(hits=1, cases=1)
    assert scores.correct_by_tag == {"count": Rate(hits=1, cases=2), "say": Rate(hits=1, cases=1)}
    assert scores.median_latency_s == pytest.approx(0.4)


@pytest.mark.parametrize(("hits", "cases"), [(0, 1), (1, 1), (0, 40), (40, 40), (3, 7), (199, 400), (997, 1000)])
def test_the_interval_is_wilsons(hits: int, cases: int) -> None:
    wanted = scipy.stats.binomtest(hits, cases).proportion_ci(0.95, method="wilson")
    assert Rate(hits=hits, cases=cases).interval == pytest.approx((wanted.low, wanted.high), abs=1e-4)


def test_a_rate_of_nothing_is_not_a_number() -> None:
    rate = Rate(hits=0, cases=0)
    assert all(math.isnan(value) for value in (rate.value, *rate.interval))


def energies(sound: np.ndarray, width: int = 400) -> np.ndarray:
    return np.sqrt(np.mean(np.square(sound[: len(sound) // width * width].reshape(-1, width)), axis=1))


def flatness(sound: np.ndarray) -> float:
    """Geometric over arithmetic mean of the spectrum, averaged into bands: 1 is white."""
    power = np.square(np.abs(np.fft.rfft(sound)))[1:8_001].reshape(40, 200).mean(axis=1)
    return float(np.exp(np.mean(np.log(power))) / np.mean(power))


def test_noise_with_the_envelope_of_speech_has_its_loudness_and_nothing_of_its_spectrum() -> None:
    seconds = np.arange(2 * RATE_HZ) / RATE_HZ
    syllables = np.maximum(np.sin(2 * np.pi * 2 * seconds), 0) ** 2
    speech = (syllables * np.sin(2 * np.pi * 300 * seconds) * 0.3).astype(np.float32)
    noise = envelope_noise(speech, np.random.default_rng(0), 16_000)
    assert noise.shape == speech.shape
    assert noise.dtype == np.float32
    assert np.corrcoef(energies(speech), energies(noise))[0, 1] > 0.97
    assert np.sqrt(np.mean(noise**2)) == pytest.approx(np.sqrt(np.mean(speech**2)), rel=0.05)
    assert flatness(speech) < 0.01
    assert flatness(noise) > 0.9
    assert abs(np.corrcoef(noise, speech)[0, 1]) < 0.05


def heard_under(condition: Condition, sessions: list[Session]) -> list[np.ndarray]:
    return [evaluate.heard(session) for session in evaluate.heard_instead(sessions, condition)]


def test_each_condition_does_what_it_says_and_keeps_lengths() -> None:
    sessions = [small_session(number, seconds) for number, seconds in enumerate([1.5, 2.5, 2.0])]
    sounds = [evaluate.heard(session) for session in sessions]
    sizes = [session.num_samples for session in sessions]
    for condition in Condition:
        assert [len(sound) for sound in heard_under(condition, sessions)] == sizes
    assert all(map(np.array_equal, heard_under(Condition.SPEECH, sessions), sounds))
    assert not any(sound.any() for sound in heard_under(Condition.BLANKED, sessions))
    swapped = heard_under(Condition.SWAPPED, sessions)
    np.testing.assert_array_equal(swapped[0], sounds[1][: sizes[0]])
    np.testing.assert_array_equal(swapped[1], np.append(sounds[2], sounds[2][: sizes[1] - sizes[2]]))
    np.testing.assert_array_equal(swapped[2][: sizes[0]], sounds[0])
    noises = [heard_under(Condition.ENVELOPE_NOISE, sessions) for _ in range(2)]
    for first, again, sound in zip(*noises, sounds, strict=True):
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, sound)
    assert not heard_under(Condition.SPEECH, [without_sound(sessions[0])])[0].any()
    assert heard_under(Condition.SWAPPED, [without_sound(sessions[0]), sessions[1]])[0].any()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("evaluated"))


def evaluated(model: Model, sessions: list[Session], conditions: tuple[Condition, ...], **stream) -> evaluate.Report:
    config = model.experiment
    stream = dataclasses.replace(config.stream, **stream)
    player = Player(model.params, config.model, model.layout, stream, model.tokenizer, config.evaluation.num_slots)
    return evaluate.evaluate(player, sessions, config.evaluation, conditions)


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    """Three, over two slots, of different lengths."""
    return [small_session(1, 2.0), small_session(2, 1.7), small_session(2, 1.4)]


@pytest.fixture(scope="module")
def report(model: Model, sessions: list[Session]) -> evaluate.Report:
    return evaluated(model, sessions, tuple(Condition))


def test_every_condition_is_streamed_and_scored(report: evaluate.Report, sessions: list[Session]) -> None:
    assert report.num_sessions == 3
    assert report.chance == pytest.approx(2 / 3)
    assert list(report.scores) == list(Condition)
    for scores in report.scores.values():
        rates = (scores.responded, scores.correct, scores.takeover, scores.premature, scores.false_alarm)
        assert [rate.cases for rate in rates] == [3] * 5
    assert [len(turns) for turns in report.said] == [10, 9, 7]
    assert any(turn.text for turns in report.said for turn in turns)
    table = evaluate.report_table(report).splitlines()
    assert [line.split("  ")[0] for line in table[1:5]] == [condition.value for condition in Condition]
    plain = evaluate.report_json(report)
    assert plain["conditions"]["blanked"]["responded"]["cases"] == 3
    assert plain["chance_accuracy"] == report.chance
    json.dumps(plain, allow_nan=False)


def test_a_report_without_cases_is_still_json(model: Model) -> None:
    report = evaluated(model, [timeline()], tuple(Condition))
    assert Condition.SWAPPED not in report.scores
    plain = evaluate.report_json(report)
    assert plain["conditions"]["speech"]["accuracy"] == {"value": None, "interval": None, "cases": 0}
    json.dumps(plain, allow_nan=False)


def test_blanked_is_silence_and_nothing_else_is(report: evaluate.Report, model: Model, sessions: list[Session]) -> None:
    silent = evaluated(model, [without_sound(session) for session in sessions], (Condition.SPEECH,))
    assert silent.scores[Condition.SPEECH] == report.scores[Condition.BLANKED]
    assert silent.said != report.said


def said_live(model: Model, session: Session, number: int) -> list[Said]:
    config = model.experiment
    live = LiveSession(model.params, config.model, model.layout, config.stream, model.tokenizer, number)
    return [
        turn.said for turn in live.push(resample(evaluate.heard(session), RATE_HZ, config.model.audio.sample_rate_hz))
    ]


@pytest.mark.parametrize("number", [0, 2])
def test_the_evaluation_hears_and_draws_what_a_live_session_of_its_number_does(
    number: int, report: evaluate.Report, model: Model, sessions: list[Session]
) -> None:
    assert said_live(model, sessions[number], number) == list(report.said[number])


def test_a_voice_speaks_in_the_evaluation_as_it_does_live(sessions: list[Session], tmp_path) -> None:
    flow = FlowConfig(width=8, num_blocks=1, num_steps=1)
    voiced = small_model(tmp_path, AudioOutConfig(frames_per_position=4, num_mels=20, flow=flow))
    report = evaluated(voiced, sessions, (Condition.SPEECH,))
    assert said_live(voiced, sessions[2], 2) == list(report.said[2])
    assert any(turn.tokens for turn in report.said[2])


def test_sessions_that_cannot_be_streamed_are_refused(model: Model, sessions: list[Session]) -> None:
    with pytest.raises(ValueError, match="there is no session to evaluate"):
        evaluated(model, [], (Condition.SPEECH,))
