import itertools
import json

import numpy as np
import pytest
from recordings import SENTENCES, speech, write_clip

from data_pipelines import espeak
from data_pipelines.clips_importer import Clip, Role, find_clips, read_clip
from data_pipelines.forced_alignment import AlignmentError, ForcedAligner, pronunciation, spread, tokens
from data_pipelines.importing import write_sessions
from data_pipelines.records import iter_sessions, read_manifest
from data_pipelines.speech import SAMPLE_RATE_HZ
from tml.session import Stream


@pytest.fixture(scope="module")
def aligner() -> ForcedAligner:
    return ForcedAligner()


def boundary_errors_s(found, exact) -> list[float]:
    """How far starts and ends lie from the exact ones; a Word of espeak may be several words."""
    errors, place = [], 0
    for word in exact:
        count = len(word.text.split())
        errors += [found[place].start - word.start, found[place + count - 1].end - word.end]
        place += count
    assert place == len(found)
    return [abs(error) / SAMPLE_RATE_HZ for error in errors]


def test_aligned_times_are_those_of_the_synthesiser(aligner):
    forced, evenly = [], []
    for index in range(len(SENTENCES)):
        said = speech(index)
        words = tokens(SENTENCES[index])
        forced += boundary_errors_s(aligner.align(said.samples, words), said.words)
        evenly += boundary_errors_s(spread(said.samples, words), said.words)
    assert np.median(forced) < 0.025
    assert np.quantile(forced, 0.95) < 0.1
    # The fall-back is worse by far, so the numbers above are the aligner's doing.
    assert np.median(evenly) > 2 * np.median(forced)


def test_alignment_does_not_depend_on_what_came_before():
    def align(aligner, index):
        return aligner.align(speech(index).samples, tokens(SENTENCES[index]))

    used = ForcedAligner()
    for index in range(2):
        align(used, index)
    assert align(used, 2) == align(ForcedAligner(), 2)


def test_unknown_words_get_a_pronunciation(aligner):
    text = "Please send 21 zyxgorps to café Blorvik, for $5 — today!"
    said = espeak.synthesise(text, espeak.Voice(accent="en-us"))
    words = aligner.align(said.samples, tokens(text))
    texts = ["Please", "send", "21", "zyxgorps", "to", "café", "Blorvik,", "for", "$5 —", "today!"]
    assert [word.text for word in words] == texts
    exact = {word.text: word for word in said.words}
    for word in (words[3], words[6]):
        assert abs(word.start - exact[word.text].start) < 0.06 * SAMPLE_RATE_HZ
    assert pronunciation("21") == "T W EH N T IY W AH N"
    assert pronunciation("$5") != pronunciation("5")


def test_what_cannot_be_aligned_says_why(aligner):
    samples = speech(0).samples
    with pytest.raises(AlignmentError, match="no Latin letter"):
        aligner.align(samples, tokens("please открой"))
    with pytest.raises(AlignmentError, match="do not fit"):
        aligner.align(samples[:4_000], tokens(SENTENCES[0]))
    with pytest.raises(ValueError, match="no word"):
        tokens(" - … ")
    with pytest.raises(ValueError, match="do not hold"):
        spread(np.zeros(100, np.float32), tokens("one"))


def test_spread_words_cover_what_is_audible():
    said = speech(0)
    samples = np.concatenate([np.zeros(8_000, np.float32), said.samples])
    words = spread(samples, tokens(SENTENCES[0]))
    assert [word.text for word in words] == SENTENCES[0].split()
    assert (words[0].start, words[-1].end) == (said.start + 8_000, said.end + 8_000)
    assert all(word.end == after.start for word, after in itertools.pairwise(words))
    assert all(word.start < word.end for word in words)


def test_a_folder_becomes_sessions_and_counts_what_was_spread(tmp_path, aligner):
    for index, suffix in enumerate(("wav", "flac", "ogg", "mp3")):
        write_clip(tmp_path / "clips" / "deep" / f"{index}.{suffix}", speech(index).samples, SENTENCES[index])
    write_clip(tmp_path / "clips" / "strange.wav", speech(4).samples, "мой друг")
    write_clip(tmp_path / "clips" / "alone.wav", speech(4).samples)
    (tmp_path / "clips" / "lost.txt").write_text("nobody says this")
    write_clip(tmp_path / "clips" / "empty.wav", speech(4).samples, " ")
    write_clip(tmp_path / "clips" / "silent.wav", np.zeros(9_000, np.float32), "silence")
    (tmp_path / "clips" / "broken.mp3").write_bytes(b"no sound at all")
    (tmp_path / "clips" / "broken.txt").write_text("broken")
    found = find_clips(tmp_path / "clips")
    assert {failure.file.rsplit("/", 1)[1] for failure in found.failures} == {"alone.wav", "lost.txt", "empty.wav"}
    summary = write_sessions(
        tmp_path / "set",
        found.clips,
        lambda clip: read_clip(clip, aligner),
        file_of=lambda clip: str(clip.path),
        name="clips",
        num_shards=2,
        failures=found.failures,
        max_failed_fraction=0.5,
    )
    assert summary.alignments == {"forced": 4, "spread": 1}
    assert json.loads(read_manifest(tmp_path / "set").meta["alignments"]) == {"forced": 4, "spread": 1}
    reasons = {failure.file.rsplit("/", 1)[1]: failure.reason for failure in summary.failures}
    assert "cannot be decoded" in reasons["broken.mp3"]
    assert "audible" in reasons["silent.wav"]
    assert len(reasons) == 5
    sessions = {session.session_id: session for session in iter_sessions(tmp_path / "set")}
    assert sessions.keys() == {"deep/0", "deep/1", "deep/2", "deep/3", "strange"}
    session = sessions["deep/1"]
    assert session.streams == (Stream.USER_AUDIO,)
    assert session.meta["alignment"] == "forced"
    assert [word.text for word in session.user_words] == SENTENCES[1].split()
    assert sessions["strange"].meta["alignment"] == "spread"
    assert "Latin" in sessions["strange"].meta["alignment_fault"]


def test_own_speech_has_own_words(tmp_path, aligner):
    stereo = np.stack([speech(0).samples] * 2, axis=1)
    write_clip(tmp_path / "a.wav", stereo)
    clip = Clip(clip_id="a", path=tmp_path / "a.wav", transcript=SENTENCES[0])
    session = read_clip(clip, aligner, role=Role.OWN, licence="CC0")
    assert session.streams == (Stream.OWN_AUDIO, Stream.OWN_TEXT)
    assert [event.text for event in session.texts] == SENTENCES[0].split()
    assert not session.user_words
    assert session.meta["source_channels"] == "2"
    assert session.meta["licence"] == "CC0"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.tsv", 'client\tpath\tsentence\nx\ta.wav\t"say', ),
        ("list.csv", 'file_name,transcription\na.wav,"""say"\n'),
        ("list.jsonl", '{"audio_filepath": "a.wav", "text": "\\"say"}\n\n'),
    ],
)  # fmt: skip
def test_lists_of_transcripts(tmp_path, name, content):
    for clip in ("a.wav", "b.wav"):
        write_clip(tmp_path / "clips" / clip, speech(0).samples[:1_000])
    (tmp_path / name).write_text(content)
    found = find_clips(tmp_path / "clips", tmp_path / name)
    assert [(clip.clip_id, clip.transcript) for clip in found.clips] == [("a", '"say')]
    assert (found.failures, found.unlisted) == ([], 1)


def test_faults_of_a_list(tmp_path):
    write_clip(tmp_path / "a.wav", speech(0).samples[:1_000])
    path = tmp_path / "list.csv"
    path.write_text("path,text\na.wav,one\nb.wav,two\na.wav,three\n")
    found = find_clips(tmp_path, path)
    assert [clip.transcript for clip in found.clips] == ["one"]
    assert ["line 3" in found.failures[0].reason, "same name" in found.failures[1].reason] == [True, True]
    path.write_text("a.wav,one\n")
    assert find_clips(tmp_path, path).clips == []
    for content, reason in (
        ("sound,text\na.wav,one\n", "no text in a column path"),
        ("path,text\na.wav\n", "sentence"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=reason):
            find_clips(tmp_path, path)
    bad = tmp_path / "list.jsonl"
    bad.write_text("{")
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        find_clips(tmp_path, bad)
    with pytest.raises(ValueError, match="must be a"):
        find_clips(tmp_path, tmp_path / "a.wav")
    with pytest.raises(ValueError, match="no list"):
        find_clips(tmp_path, tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="not a folder"):
        find_clips(tmp_path / "absent")
