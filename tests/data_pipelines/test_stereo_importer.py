import json

import numpy as np
import pytest
import soundfile
from recordings import alignments, write_talk, write_words

from data_pipelines.importing import FailedFilesError, write_sessions
from data_pipelines.records import iter_sessions, read_manifest
from data_pipelines.speech import SAMPLE_RATE_HZ
from data_pipelines.stereo_importer import Channel, find_recordings, read_recording
from tml.codec.waveform import decode_clip
from tml.session import Stream


def read_only(folder, **options):
    (recording,), failures = find_recordings(folder)
    assert not failures
    return read_recording(recording, **options)


def test_a_talk_keeps_its_channels_words_and_times(tmp_path):
    own, user = write_talk(tmp_path / "a" / "talk.wav")
    session = read_only(tmp_path, licence="CC0")
    assert session.session_id == "a/talk"
    assert session.streams == (Stream.USER_AUDIO, Stream.OWN_AUDIO, Stream.OWN_TEXT)
    assert session.meta["licence"] == "CC0"
    assert [(event.text, event.start, event.end) for event in session.texts] == [
        (word.text, word.start, word.end) for word in own.words
    ]
    shift = len(own.samples)
    expected = [(word.text, word.start + shift, word.end + shift) for word in user.words]
    assert [(word.text, word.start, word.end) for word in session.user_words] == expected
    wav = soundfile.read(tmp_path / "a" / "talk.wav", dtype="float32")[0]
    for stream, channel in ((Stream.OWN_AUDIO, 0), (Stream.USER_AUDIO, 1)):
        np.testing.assert_array_equal(decode_clip(session.audio[stream], SAMPLE_RATE_HZ), wav[:, channel])


def test_channel_and_speaker_can_be_the_other_ones(tmp_path):
    own, user = write_talk(tmp_path / "talk.wav")
    straight = read_only(tmp_path)
    turned = read_only(tmp_path, own_channel=Channel.RIGHT, main_speaker="SPEAKER_1")
    assert turned.audio[Stream.OWN_AUDIO] == straight.audio[Stream.USER_AUDIO]
    assert [event.text for event in turned.texts] == [word.text for word in user.words]
    assert len(turned.user_words) == len(own.words)


def test_another_rate_keeps_the_seconds(tmp_path):
    write_talk(tmp_path / "talk.wav")
    slow = read_only(tmp_path)
    write_talk(tmp_path / "talk.wav", rate_hz=48_000)
    entries = json.loads((tmp_path / "talk.json").read_text())["alignments"]
    write_words(tmp_path / "talk.wav", [[word, [start / 3, end / 3], who] for word, (start, end), who in entries])
    fast = read_only(tmp_path)
    assert fast.sample_rate_hz == SAMPLE_RATE_HZ
    assert fast.num_samples == -(-slow.num_samples // 3)
    assert [event.start for event in fast.texts] == [round(event.start / 3) for event in slow.texts]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda entries: {"words": 1}, "list of"),
        (lambda entries: [["one", [0.1, 0.2]]], "alignment 0 .*is not .word"),
        (lambda entries: [["one", [0.3, 0.2], "SPEAKER_MAIN"]], "0 <= start <= end"),
        (lambda entries: [["one", [0.1, "x"], "SPEAKER_MAIN"]], "two numbers"),
        (lambda entries: [["one", [0.1, float("nan")], "SPEAKER_MAIN"]], "not finite"),
        (lambda entries: [[" ", [0.1, 0.2], "SPEAKER_MAIN"]], "not empty"),
        (lambda entries: [*entries, ["late", [90.0, 90.5], "SPEAKER_MAIN"]], "outside"),
        (lambda entries: [["one", [0.1, 0.2], "A"]], "no word of the main speaker SPEAKER_MAIN, only of A"),
    ],
)
def test_words_that_do_not_fit_are_refused(tmp_path, change, reason):
    write_words(tmp_path / "talk.wav", change(alignments(*write_talk(tmp_path / "talk.wav"))))
    with pytest.raises(ValueError, match=reason):
        read_only(tmp_path)


def test_sound_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "talk.wav"
    write_talk(path)
    whole = path.read_bytes()
    soundfile.write(path, np.zeros(16_000, np.float32), SAMPLE_RATE_HZ)
    with pytest.raises(ValueError, match="has 1 channel"):
        read_only(tmp_path)
    path.write_bytes(b"no sound")
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_only(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    # Half a file, in whichever of the two ways it shows: the decoder's promise, or words behind the end.
    with pytest.raises(ValueError, match=r"cut short|outside"):
        read_only(tmp_path)


def test_a_manifest_chooses_and_its_durations_are_checked(tmp_path):
    for name in ("a", "b", "c"):
        write_talk(tmp_path / f"{name}.wav")
    duration_s = soundfile.info(tmp_path / "a.wav").duration
    lines = [
        {"path": "a.wav", "duration": duration_s},
        {"path": "b.wav", "duration": duration_s + 1},
        {"path": "absent.wav"},
        {"path": "a.wav"},
    ]
    manifest = tmp_path / "talks.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    recordings, failures = find_recordings(tmp_path, manifest)
    assert [recording.recording_id for recording in recordings] == ["a", "b"]
    assert ["line 3" in failures[0].reason, "second time" in failures[1].reason] == [True, True]
    assert read_recording(recordings[0]).session_id == "a"
    with pytest.raises(ValueError, match="the manifest says"):
        read_recording(recordings[1])
    manifest.write_text('{"file": "a.wav"}')
    with pytest.raises(ValueError, match="line 1"):
        find_recordings(tmp_path, manifest)


def test_failed_files_are_listed_and_too_many_of_them_write_nothing(tmp_path):
    write_talk(tmp_path / "talks" / "good.wav")
    (tmp_path / "talks" / "alone.json").write_text("{}")
    soundfile.write(tmp_path / "talks" / "mute.wav", np.zeros((99, 2), np.float32), SAMPLE_RATE_HZ)
    (tmp_path / "talks" / "noise.wav").write_bytes(b"no sound")
    write_words(tmp_path / "talks" / "noise.wav", [])
    recordings, failures = find_recordings(tmp_path / "talks")

    def write(fraction: float):
        return write_sessions(
            tmp_path / "set",
            recordings,
            read_recording,
            file_of=lambda recording: str(recording.path),
            name="set",
            failures=failures,
            max_failed_fraction=fraction,
        )

    with pytest.raises(FailedFilesError, match="3 of 4 files failed") as caught:
        write(0.5)
    assert sorted(failure.file.rsplit("/", 1)[1] for failure in caught.value.failures) == [
        "alone.json", "mute.wav", "noise.wav",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["talks"]
    summary = write(0.75)
    assert (summary.records, len(summary.failures)) == (1, 3)
    assert [session.session_id for session in iter_sessions(tmp_path / "set")] == ["good"]
    listed = json.loads(read_manifest(tmp_path / "set").meta["failures"])
    assert any("cannot be decoded" in reason for _, reason in listed)
    with pytest.raises(FailedFilesError, match="no files"):
        write_sessions(tmp_path / "none", [], read_recording, file_of=str, name="none")
