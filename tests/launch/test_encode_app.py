"""The apps that encode and describe data, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.documents import Document, write_documents
from data_pipelines.record_writer import SessionWriter
from data_pipelines.records import shard_name
from tml.codec.waveform import encode_clip
from tml.session import Session, Stream, TextEvent

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
from tml.config import *

def get_config():
    return to_config_dict(Experiment(
        name="tiny",
        text=TextConfig(tokenizer="tokenizer", train_vocab_size=300),
        data=DataConfig(
            sources={
                "talk": SourceConfig(path="talk"),
                "books": SourceConfig(path="books", kind=SourceKind.DOCUMENTS),
            },
            eval_sources={"talk": SourceConfig(path="talk")},
            row_slots=64,
        ),
    ))
"""


def run(app: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"launch.{app}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    with SessionWriter(tmp_path / "talk", name="talk", num_shards=2, meta={"licence": "CC0"}) as writer:
        for number in range(4):
            sound = rng.normal(0, 0.1, 32_000).astype(np.float32)
            words = (TextEvent(stream=Stream.OWN_TEXT, start=16_000, end=17_000, text="seven"),)
            writer.write(
                Session(
                    session_id=f"s{number}",
                    sample_rate_hz=16_000,
                    num_samples=32_000,
                    streams=(Stream.USER_AUDIO, Stream.OWN_TEXT),
                    audio={Stream.USER_AUDIO: encode_clip(sound, 16_000)},
                    texts=words,
                    meta={"voice": f"v{number % 2}"},
                )
            )
    write_documents(tmp_path / "books", [Document(document_id="d", text="three four five")], name="books")
    (tmp_path / "tiny.py").write_text(EXPERIMENT)
    return tmp_path


def test_encode_does_everything_once(folder):
    first = run("encode", "--config=tiny.py", "--num_workers=1", cwd=folder)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].startswith("tokenizer tokenizer: trained, ")
    assert "talk: 4 records encoded in" in first.stdout
    assert any(
        re.fullmatch(r"  talk: 50% of segments; 4 records, 0.00 h of sound, 2\d\d positions, 0 quarantined", line)
        for line in lines
    )
    assert lines[-1].strip().endswith("padding")
    again = run("encode", "--config=tiny.py", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("records encoded before") == 2
    assert again.stdout.startswith("tokenizer tokenizer: is there")
    assert again.stdout.splitlines()[-3:] == lines[-3:]


def test_data_for_other_micro_turns_is_warned_of(folder):
    made = run("synthesize", "--task=requests", "--out=made", "--num_sessions=4", "--turn_ms=400", cwd=folder)
    assert made.returncode == 0, made.stderr
    common = ("--config=tiny.py", "--config.data.sources.talk.path=made", "--config.text.train_vocab_size=300")
    warning = "warning: made was made for micro-turns of 400 ms, turn.turn_ms is 1000"
    assert warning in run("encode", *common, "--config.turn.turn_ms=1000", cwd=folder).stdout
    assert "warning" not in run("encode", *common, "--config.turn.turn_ms=200", cwd=folder).stdout


def test_too_many_broken_records_end_with_one_line(folder):
    (folder / "talk" / shard_name(0, 2)).unlink()
    result = run("encode", "--config=tiny.py", "--num_workers=1", cwd=folder)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: talk: 2 of 4 records are unreadable, more than data.max_quarantined_fraction = 0.01; "
        f"the first is {shard_name(0, 2)}, record 0: the shard is missing"
    )
    assert "Traceback" not in result.stderr


def test_describe_counts_and_draws(folder):
    result = run("describe", "--data=talk", "--sample=1", "--png=out/sample.png", cwd=folder)
    assert result.returncode == 0, result.stderr
    for line in (
        "talk: 4 sessions in 2 shards",
        "  licence: CC0",
        "stream user_audio: 4 sessions, 0.00 h of sound",
        "stream own_text: 4 sessions, 4 events",
        "speakers: 2; most sessions: v0 (2), v1 (2)",
        "unreadable: 0 records",
        "tick    5    1.0 s  own text: seven",
    ):
        assert line in result.stdout.splitlines()
    with Image.open(folder / "out" / "sample.png") as picture:
        assert picture.width == 1_540


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "--data is missing"),
        (("--data=nowhere",), 1, "nowhere is not a data set"),
        (("--data=talk", "--sample=9"), 1, "--sample=9 is outside"),
    ],
)
def test_describe_says_what_is_wrong_in_one_line(folder, arguments, code, message):
    result = run("describe", *arguments, cwd=folder)
    assert result.returncode == code
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_a_reader_who_has_enough_ends_an_app_quietly_and_another_broken_pipe_does_not(folder):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "launch.describe", "--data=talk"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    breaks = "from launch.app import run_app\ndef main(_): raise BrokenPipeError('of a tool')\nrun_app(main)"
    done = subprocess.run([sys.executable, "-c", breaks], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: of a tool\n")
