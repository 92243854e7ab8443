"""Full-Duplex-Bench's folders: the files its scorers read, and numbers that its definitions give back."""

import json

import numpy as np
import pytest
import soundfile

from tml.codec.waveform import encode_clip
from tml.duplex.full_duplex_bench import write_samples
from tml.duplex.judge import take_over
from tml.duplex.trace import TimedWord, Trace
from tml.session import Expectation, ExpectationKind, Session, Stream, Word

RATE = 16_000
SECONDS = 8


def session(behaviour: str, *expected: tuple) -> Session:
    sound = np.linspace(0.0, 0.5, SECONDS * RATE, dtype=np.float32)
    return Session(
        session_id=behaviour,
        sample_rate_hz=RATE,
        num_samples=len(sound),
        streams=(Stream.USER_AUDIO,),
        audio={Stream.USER_AUDIO: encode_clip(sound, RATE)},
        user_words=(Word(text="count", start=RATE, end=RATE + 1), Word(text="stop", start=4 * RATE, end=5 * RATE)),
        expectations=tuple(
            Expectation(kind=kind, start=round(start * RATE), end=round(end * RATE), text=text, tag=tag)
            for kind, start, end, text, tag in expected
        ),
        meta={"behaviour": behaviour},
    )


def trace(*words: tuple[float, float, str]) -> Trace:
    return Trace(words=tuple(TimedWord(start_s=a, end_s=b, text=text) for a, b, text in words))


def written(tmp_path, one: Session, emitted: Trace):
    own = np.full(one.num_samples, 0.25, np.float32)
    counts = write_samples(tmp_path, [one], [emitted], [own])
    return counts, lambda path: json.loads((tmp_path / path).read_text())


def test_every_request_of_turn_taking_is_a_sample(tmp_path):
    asked = [
        (ExpectationKind.ANSWER, 1.0, 2.0, "one two three four", "count"),
        (ExpectationKind.ANSWER, 5.0, 6.0, "six", "say"),
    ]
    words = [(2.4, 2.7, "one"), (3.0, 3.3, "two"), (3.6, 4.0, "three"), (6.4, 6.8, "six")]
    counts, read = written(tmp_path, session("turn_taking", *asked), trace(*words))
    assert counts == {"smooth_turn_taking": 2}
    output = read("smooth_turn_taking/0/output.json")
    assert output["text"] == "one two three"
    assert output["chunks"][0] == {"text": "one", "timestamp": pytest.approx([1.4, 1.7])}
    (note,) = read("smooth_turn_taking/0/turn_taking.json")
    assert note["timestamp"][0] == pytest.approx(1.0)
    chunks = [TimedWord(start_s=c["timestamp"][0], end_s=c["timestamp"][1], text=c["text"]) for c in output["chunks"]]
    assert take_over(chunks, note["timestamp"][0]) == (True, pytest.approx(0.4))
    samples, rate = soundfile.read(tmp_path / "smooth_turn_taking/0/input.wav", dtype="float32")
    assert (len(samples), rate) == (4 * RATE, RATE)
    assert samples[0] == pytest.approx(0.5 / SECONDS, abs=1e-3)
    own, _ = soundfile.read(tmp_path / "smooth_turn_taking/1/output.wav", dtype="float32")
    assert len(own) == 3 * RATE
    assert own[0] == pytest.approx(0.25, abs=1e-3)
    # Fewer samples leave none of an earlier writing behind, nor of its scores, and nothing else goes with it.
    (tmp_path / "smooth_turn_taking/0/rating.json").write_text("{}")
    assert written(tmp_path, session("turn_taking", asked[0]), trace(*words))[0] == {"smooth_turn_taking": 1}
    assert [folder.name for folder in (tmp_path / "smooth_turn_taking").iterdir()] == ["0"]
    mine = tmp_path / "user_interruption/1/input.wav"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=r"holds user_interruption/1/input\.wav, which no export of tml wrote"):
        written(tmp_path, session("turn_taking", asked[0]), trace(*words))
    assert mine.read_text() == "mine"


def test_a_paused_request_ends_with_its_last_pause(tmp_path):
    expected = [
        (ExpectationKind.ANSWER, 1.0, 4.0, "six", "say"),
        (ExpectationKind.SILENCE, 2.0, 2.5, "", "pause"),
        (ExpectationKind.SILENCE, 3.0, 3.6, "", "pause"),
    ]
    counts, read = written(tmp_path, session("pause_handling", *expected), trace((2.2, 2.4, "six"), (4.4, 4.8, "six")))
    assert counts == {"pause_handling": 1}
    assert [note["timestamp"] for note in read("pause_handling/0/pause.json")] == [
        pytest.approx([1.0, 1.5]), pytest.approx([2.0, 2.6]),
    ]  # fmt: skip
    assert read("pause_handling/0/output.json")["text"] == "six"
    assert soundfile.info(tmp_path / "pause_handling/0/output.wav").frames == round(2.6 * RATE)


def test_an_interruption_keeps_what_is_said_behind_it(tmp_path):
    stop = (ExpectationKind.STOP, 4.0, 5.0, "", "stop")
    counts, read = written(tmp_path, session("interruption", stop), trace((3.8, 4.1, "three"), (5.4, 5.8, "red")))
    assert counts == {"user_interruption": 1}
    assert read("user_interruption/0/interrupt.json") == [
        {"context": "count", "interrupt": "stop", "timestamp": [4.0, 5.0]}
    ]
    assert read("user_interruption/0/output.json")["text"] == "red"


def test_other_behaviours_hold_no_sample_and_stories_do(tmp_path):
    nod = (ExpectationKind.NOD, 1.0, 2.0, "okay", "story")
    assert written(tmp_path / "a", session("backchannel", nod), trace())[0] == {"backchannel": 1}
    assert written(tmp_path / "b", session("cued"), trace())[0] == {}
    # The scorer knows no more than 55.
    many, own = [session("backchannel", nod)] * 57, np.zeros(SECONDS * RATE, np.float32)
    assert write_samples(tmp_path / "c", many, [trace()] * 57, [own] * 57) == {"backchannel": 55}
    assert {folder.name for folder in (tmp_path / "c/backchannel").iterdir()} == {str(number) for number in range(55)}


def test_a_sound_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 128000 samples, the model's sound 5"):
        write_samples(tmp_path, [session("cued")], [trace()], [np.zeros(5, np.float32)])
