"""What an app is to write: a folder, and no file is in its way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app

from launch.app import output_folder, writable_folder

ROOT = Path(__file__).parents[2]


def test_a_folder_may_be_there_or_not(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "a", tmp_path / "a/b/c", Path("runs/x")):
        assert output_folder("out", str(folder)) == folder


@pytest.mark.parametrize(
    ("name", "message"), [("notes.txt", "is a file; name a folder"), ("notes.txt/a/b", "notes.txt, which is a file")]
)
def test_a_file_in_its_way_is_named(tmp_path: Path, name: str, message: str):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(app.UsageError, match=message):
        output_folder("out", tmp_path / name)


def test_a_link_to_nowhere_and_a_place_that_cannot_be_written_are_named(tmp_path: Path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(app.UsageError, match=r"--out=.*link is a link to nowhere \(nowhere\); name a folder"):
        writable_folder("out", tmp_path / "link")
    with pytest.raises(app.UsageError, match=r"--out=/proc/.*: /proc/\S+ cannot be written; name another folder"):
        writable_folder("out", Path("/proc/sys/kernel/out"))


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("train", ("--config=experiments/quickstart.py", "--workdir=notes.txt")),
        ("export", ("--workdir=run", "--out=notes.txt")),
        ("import_hf", ("--hf_dir=hf", "--workdir=notes.txt")),
        ("import_sessions", ("--format=stereo", "--source=talks", "--out=notes.txt", "--overwrite")),
        ("synthesize", ("--out=notes.txt", "--overwrite")),
        ("prompts", ("--out=notes.txt", "--overwrite")),
        ("export_tfds", ("--source=set", "--data_dir=notes.txt")),
        ("quickstart", ("--workdir=notes.txt",)),
    ],
)
def test_apps_refuse_a_file_before_any_work(tmp_path: Path, module: str, flags: tuple[str, ...]):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    command = [sys.executable, "-m", f"launch.{module}", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "=notes.txt is a file; name a folder" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experiments", "notes.txt"]
