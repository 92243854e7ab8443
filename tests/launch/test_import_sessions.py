"""The apps that import and export data sets: exit codes, one-line errors, and what they write."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines import espeak
from data_pipelines.records import RecordSource, iter_sessions, read_manifest
from data_pipelines.speech import SAMPLE_RATE_HZ
from data_pipelines.tfds_builder import TfdsRecords


def run(module: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", f"launch.{module}", *flags], capture_output=True, text=True)


def test_clips_are_imported_and_exported(tmp_path):
    (tmp_path / "clips").mkdir()
    for name, text in (("one", "open the window"), ("two", "turn on the light")):
        soundfile.write(
            tmp_path / "clips" / f"{name}.wav", espeak.synthesise(text, espeak.Voice()).samples, SAMPLE_RATE_HZ
        )
        (tmp_path / "clips" / f"{name}.txt").write_text(text)
    (tmp_path / "clips" / "alone.txt").write_text("alone")
    flags = ("--format=clips", f"--source={tmp_path}/clips", f"--out={tmp_path}/set", "--name=mine", "--licence=CC0")
    failed = run("import_sessions", *flags)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "1 of 3 files failed" in failed.stderr
    assert "alone.txt: there is no clip" in failed.stdout
    assert not (tmp_path / "set").exists()
    done = run("import_sessions", *flags, "--max_failed_fraction=0.4", "--role=own")
    assert done.returncode == 0, done.stderr
    assert "2 sessions" in done.stdout
    assert "7 own words" in done.stdout
    assert "forced alignment in 2 sessions, evenly spread in 0" in done.stdout
    assert "1 files failed" in done.stdout
    assert "alone.txt" in done.stdout
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.name, manifest.meta["licence"], manifest.meta["role"]) == ("mine", "CC0", "own")
    assert [session.session_id for session in iter_sessions(tmp_path / "set")] == ["one", "two"]
    exported = run("export_tfds", f"--source={tmp_path}/set", f"--data_dir={tmp_path}/tfds")
    assert exported.returncode == 0, exported.stderr
    records = TfdsRecords(tmp_path / "tfds" / "tml_records" / "mine" / "1.0.0")
    assert records[1] == RecordSource(tmp_path / "set")[1]
    again = run("export_tfds", f"--source={tmp_path}/set", f"--data_dir={tmp_path}/tfds")
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "exists" in again.stderr


def test_pictures_are_imported_with_a_list_of_captions(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "list.tsv").write_text("image\tcaption\na.png\tnothing at all\nb.png\tblack\n")
    flags = ("--format=pictures", f"--source={tmp_path}/in", f"--out={tmp_path}/set")
    done = run("import_sessions", *flags, f"--transcripts={tmp_path}/list.tsv")
    assert done.returncode == 0, done.stderr
    assert "set: 2 records" in done.stdout
    assert "1 files are not in" in done.stdout
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.kind.value, manifest.meta["task"]) == ("documents", "imported pictures")
    wrong = run("import_sessions", *flags, "--max_chars=4")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --max_chars belongs to --format=documents, not pictures\n")


def test_talks_and_documents_are_imported(tmp_path):
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "talk.wav", np.full((8_000, 2), 0.1, np.float32), SAMPLE_RATE_HZ)
    words = {"alignments": [["hi", [0.1, 0.2], "A"], ["you", [0.3, 0.4], "B"]]}
    (tmp_path / "in" / "talk.json").write_text(json.dumps(words))
    (tmp_path / "in" / "text.txt").write_text("some text")
    source = f"--source={tmp_path}/in"
    done = run("import_sessions", "--format=stereo", source, f"--out={tmp_path}/talks", "--main_speaker=A")
    assert done.returncode == 0, done.stderr
    assert "1 own words, 1 user words" in done.stdout
    assert read_manifest(tmp_path / "talks").meta["main_speaker"] == "A"
    done = run("import_sessions", "--format=documents", source, f"--out={tmp_path}/texts")
    assert done.returncode == 0, done.stderr
    assert "1 records" in done.stdout


@pytest.mark.parametrize(
    ("module", "flags", "code", "message"),
    [
        ("import_sessions", ("--format=clips", "--source=x"), 2, "--out names"),
        ("import_sessions", ("--format=clips", "--source=absent", "--out=x"), 1, "absent is not a folder"),
        ("import_sessions", ("--format=stereo", "--source=.", "--out=x", "--role=own"), 2, "belongs to --format=clips"),
        ("import_sessions", ("--format=mp4",), 2, "stereo|clips|documents"),
        ("export_tfds", ("--source=x",), 2, "--data_dir"),
        ("export_tfds", ("--source=absent", "--data_dir=x"), 1, "absent is not a data set"),
    ],
)
def test_bad_flags_are_one_line_and_a_non_zero_exit(module, flags, code, message):
    done = run(module, *flags)
    assert done.returncode == code
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
