"""Human prompts: transcripts, sound, and who may train on what."""

import gzip
import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from data_pipelines import prompts
from data_pipelines.behaviours.cast import PROMPT_LANGUAGES, BehaviourConfig
from data_pipelines.behaviours.task import BehaviourTask
from data_pipelines.request_vocabulary import DIGITS
from data_pipelines.speech import audible_span
from tml.session import Behaviour, ExpectationKind, Session, Stream, session_to_bytes

RATE = 16_000


def write_g722(path: Path, samples: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def burst(hz: float, length_s: float) -> np.ndarray:
    time_s = np.arange(round(length_s * RATE)) / RATE
    silence = np.zeros(1600)
    return np.concatenate([silence, 0.5 * np.sin(2 * np.pi * hz * time_s), silence])


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Packages as Debian lays them out, with tones in place of voices."""
    root = tmp_path_factory.mktemp("cache")
    clips = {f"digits/{i}": (word, 0.3 + 0.03 * i) for i, word in enumerate(DIGITS)}
    sentences = {f"say-{i}": ("this is clip number " + DIGITS[i % 10], 1.0) for i in range(40)}
    for language in ("en", *PROMPT_LANGUAGES):
        words, sounds = prompts.packages(language)
        table = {**clips, **sentences, "beep": ("[a tone]", 0.2), "lost": ("there is no file", 0.0)}
        doc = root / "packages" / words / "usr/share/doc" / words
        doc.mkdir(parents=True)
        lines = ["; a comment: no clip", *(f"{key}: {text}" for key, (text, _) in table.items())]
        (doc / f"core-sounds-{language}.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        (doc / "copyright").write_text(f"licence of {language}")
        for i, (key, (_, length_s)) in enumerate(table.items()):
            if length_s:
                folder = root / "packages" / sounds / "usr/share/asterisk/sounds" / f"{language}_person"
                write_g722(folder / f"{key}.g722", burst(300 + 20 * i, length_s))
        (root / "packages" / sounds / "usr/share/doc" / sounds).mkdir(parents=True)
        (root / "packages" / sounds / "usr/share/doc" / sounds / "copyright").write_text("licence")
    return root


def sound(session: Session) -> np.ndarray:
    return soundfile.read(io.BytesIO(session.audio[Stream.USER_AUDIO].data), dtype="float32")[0]


def test_transcripts_leave_out_comments_and_what_is_not_speech():
    text = "; Sounds: here\na: Hello there.\nbeep: [tone]\ns/1: (1 second of silence)\nc: [pause] Good <b> bye\n\nd"
    assert list(prompts.parse_transcripts(text)) == [("a", "Hello there."), ("c", "Good bye")]


def test_clips_have_a_sound_file_and_words(cache):
    found = prompts.read_prompts("en", cache)
    assert len(found) == 50
    assert {prompt.speaker for prompt in found} == {"en_person"}
    speech = prompts.read_sound(next(prompt for prompt in found if prompt.key == "digits/9"))
    assert abs(speech.start - 1600) <= 320
    assert abs(speech.end - speech.start - round(0.57 * RATE)) <= 480


def test_an_unreadable_file_is_named(cache, tmp_path):
    prompt = prompts.Prompt(key="x", language="en", speaker="x", transcript="x", path=tmp_path / "x.g722")
    with pytest.raises(ValueError, match=r"x\.g722 cannot be decoded"):
        prompts.read_sound(prompt)


def test_digit_sessions_hold_one_digit_and_its_answer(cache):
    task = prompts.HumanDigitTask(seed=0, cache=cache)
    quiet = 0
    for index in range(20):
        session = task.session("heldout", index)
        session_to_bytes(session)
        (item,) = session.expectations
        (event,) = session.texts_of(Stream.OWN_TEXT)
        assert item.kind is ExpectationKind.ANSWER
        assert item.text == event.text == DIGITS[index % 10]
        assert item.end + 2 * RATE <= session.num_samples
        assert session.meta["recordings"] == f"digits/{index % 10}"
        if session.meta["noise"] == "none":
            quiet += 1
            start, end = audible_span(sound(session))
            assert abs(start - item.start) <= 160
            assert abs(end - item.end) <= 160
    assert 2 < quiet < 18


def test_prompts_distract_in_behaviours_and_each_split_has_its_own(cache):
    config = BehaviourConfig(negative_fraction=1.0, human_fraction=1.0)
    task = BehaviourTask(seed=0, shares={Behaviour.TURN_TAKING: 1.0}, config=config, cache=cache)
    used = {}
    for split in ("train", "heldout"):
        sessions = [task.session(split, index) for index in range(12)]
        spoken = [session for session in sessions if session.meta["recordings"]]
        assert len(spoken) > 6
        for session in spoken:
            assert {item.tag for item in session.expectations} == {"human"}
            assert all(item.kind is ExpectationKind.SILENCE for item in session.expectations)
        used[split] = {key for session in spoken for key in session.meta["recordings"].split()}
        assert {key.split("/")[0] for key in used[split]} == {*PROMPT_LANGUAGES}
    assert not used["train"] & used["heldout"]


def test_the_test_speaker_never_trains(cache):
    with pytest.raises(ValueError, match="for testing"):
        prompts.HumanDigitTask(seed=0, cache=cache).session("train", 0)
    for language in prompts.TEST_LANGUAGES:
        with pytest.raises(ValueError, match="human test and never train"):
            prompts.HumanSilenceTask(seed=0, cache=cache, languages=(language,)).session("train", 0)


def test_silence_sessions_expect_silence_and_split_their_clips(cache):
    task = prompts.HumanSilenceTask(seed=0, cache=cache, languages=("fr",))
    used = {split: set() for split in ("train", "heldout")}
    for split, keys in used.items():
        for index in range(15):
            session = task.session(split, index)
            assert session.streams == (Stream.USER_AUDIO,)
            assert all(item.kind is ExpectationKind.SILENCE for item in session.expectations)
            assert {item.tag for item in session.expectations} == {"human_fr"}
            assert "fr: " not in session.meta["licence"]
            keys.update(session.meta["recordings"].split())
    assert used["train"]
    assert used["heldout"]
    assert not used["train"] & used["heldout"]
    assert not any(key.startswith("digits/") for keys in used.values() for key in keys)


def test_an_unknown_language_is_refused(cache):
    with pytest.raises(ValueError, match="no prompts in 'de', only in en, es, fr, it, ru"):
        prompts.read_prompts("de", cache)


@pytest.mark.slow
def test_the_real_packages_hold_ten_digits_by_one_person(tmp_path):
    digits = prompts.digit_prompts(tmp_path)
    assert tuple(prompt.transcript for prompt in digits) == DIGITS
    for prompt in digits:
        speech = prompts.read_sound(prompt)
        assert 0.3 * RATE < speech.end - speech.start < 0.9 * RATE
        spectrum = np.square(np.abs(np.fft.rfft(speech.samples)))
        above = spectrum[int(len(spectrum) * 0.5) :].sum() / spectrum.sum()
        assert above > 1e-6
