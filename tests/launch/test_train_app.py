"""The app that trains, run as a user runs it: on data of ours, killed, continued, and refused."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.documents import Document, write_documents
from data_pipelines.record_writer import SessionWriter
from data_pipelines.records import read_manifest
from tml.codec.waveform import encode_clip
from tml.session import Session, Stream, TextEvent

ROOT = Path(__file__).parents[2]
NUM_STEPS = 40
LOGGED = re.compile(r"^step (\d+)/")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
EXPERIMENT = f"""
from tml.config import *

def get_config():
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=8, global_extent=16, rel_rank=2)
    return to_config_dict(Experiment(
        name="tiny",
        model=ModelConfig(
            num_layers=1,
            num_dense_layers=0,
            global_layers=(),
            d_model=16,
            dense_dim=24,
            vocab_size=320,
            attention=attention,
            moe=MoEConfig(num_experts=4, expert_dim=8, block_rows=8),
            audio=AudioConfig(num_mels=4, num_levels=4),
        ),
        text=TextConfig(tokenizer="tokenizer", train_vocab_size=290),
        data=DataConfig(
            sources={{
                "talk": SourceConfig(path="talk"),
                "books": SourceConfig(path="books", kind=SourceKind.DOCUMENTS),
            }},
            eval_sources={{"talk": SourceConfig(path="talk")}},
            row_slots=64,
            rows_per_batch=2,
            segments_per_epoch=16,
            max_quarantined_fraction=0.2,
            read_threads=1,
            prefetch_rows=4,
        ),
        optim=OptimConfig(warmup_steps=2, peak_lr=1e-2),
        train=TrainConfig(
            num_steps={NUM_STEPS}, log_every=1, eval_every=30, eval_batches=1, checkpoint_every=8, peak_flops_per_s=1e9
        ),
    ))
"""


def environment() -> dict[str, str]:
    """One device, and no optimisation."""
    changes = {
        "XLA_FLAGS": " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **changes}


def run(folder: Path, app: str, *flags: str, stop: signal.Signals | None = None, after: int = 0) -> tuple[int, str]:
    """Runs an app with the experiment; sends `stop` when `after` steps are logged. Returns exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"launch.{app}", "--config=tiny.py", *flags],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines, logged = [], 0
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        logged += bool(LOGGED.match(line))
        if stop is not None and logged == after:
            process.send_signal(stop)
            stop = None
    return process.wait(), "".join(lines)


def train(folder: Path, workdir: str, *flags: str, **stop) -> tuple[int, str]:
    return run(folder, "train", f"--workdir={workdir}", "--noprint_config", *flags, **stop)


def hash_of(output: str) -> str:
    found = re.search(rf"finished at step {NUM_STEPS} after .*; state (\w+) in", output)
    assert found, output
    return found.group(1)


def talk(number: int) -> Session:
    sound = np.random.default_rng(number).normal(0, 0.1, 24_000).astype(np.float32)
    return Session(
        session_id=f"session-{number}",
        sample_rate_hz=16_000,
        num_samples=24_000,
        streams=(Stream.USER_AUDIO, Stream.OWN_TEXT),
        audio={Stream.USER_AUDIO: encode_clip(sound, 16_000)},
        texts=(TextEvent(stream=Stream.OWN_TEXT, start=16_000, end=17_000, text=WORDS[number % len(WORDS)]),),
    )


def write_talk(folder: Path, numbers: range) -> None:
    with SessionWriter(folder, name="talk", num_shards=1, meta={"licence": "CC0"}) as writer:
        for number in numbers:
            writer.write(talk(number))


def spoil(folder: Path, session_id: str) -> str:
    """Damages one encoded session after it was laid out, as a failing disk would; returns its name in messages."""
    (place,) = folder.glob("encoded-*")
    (shard,) = (place / each.file for each in read_manifest(place).shards)
    content = bytearray(shard.read_bytes())
    content[content.index(session_id.encode()) + 40] ^= 0xFF
    shard.write_bytes(content)
    return str(shard)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with encoded data, one record of it spoilt, a whole run, its output, and the spoilt shard's name."""
    folder = tmp_path_factory.mktemp("train")
    write_talk(folder / "talk", range(8))
    documents = [Document(document_id=f"d{i}", text=" ".join(WORDS[i:] * 3)) for i in range(4)]
    write_documents(folder / "books", documents, name="books")
    (folder / "tiny.py").write_text(EXPERIMENT)
    code, output = run(folder, "encode", "--num_workers=1")
    assert code == 0, output
    shard = spoil(folder / "talk", "session-3").removeprefix(f"{folder}/")
    code, output = train(folder, "whole")
    assert code == 0, output
    return folder, output, shard


def test_a_lost_record_is_named_and_counted(trained) -> None:
    _, output, shard = trained
    assert "records  books: 50% of segments; 4 records" in output
    assert re.search(r"\n +talk: 50% of segments; 8 records, 0.00 h of sound, \d+ positions, 0 quarantined\n", output)
    assert f"data source talk: {shard}, record 3 is quarantined: " in output
    assert output.splitlines()[-1] == "1 of 12 records quarantined (talk 1)"


def test_a_run_that_is_killed_interrupted_and_moved_ends_in_the_same_state(trained) -> None:
    folder, whole, _ = trained
    code, output = train(folder, "broken", stop=signal.SIGKILL, after=12)
    assert code == -signal.SIGKILL, output
    code, output = train(folder, "broken", stop=signal.SIGTERM, after=3)
    assert code == 75, output
    assert "SIGTERM: finishing the step and saving" in output
    saved = int(re.search(r"interrupted, saved at step (\d+)", output).group(1))
    assert 3 <= saved < NUM_STEPS

    moved = folder / "moved"
    for name in ("broken", "talk", "books", "tokenizer"):
        shutil.copytree(folder / name, moved / name)
    code, output = train(
        folder,
        "moved/broken",
        "--config.text.tokenizer=moved/tokenizer",
        "--config.data.sources.talk.path=moved/talk",
        "--config.data.sources.books.path=moved/books",
        "--config.data.eval_sources.talk.path=moved/talk",
        "--config.data.max_quarantined_fraction=0.5",
        "--config.data.read_threads=2",
        "--config.data.prefetch_rows=8",
    )
    assert code == 0, output
    assert f"resuming from moved/broken/checkpoints/{saved}; {NUM_STEPS - saved} of {NUM_STEPS} steps to go" in output
    assert "config.data.read_threads was 1 in this folder, is 2 from here on" in output
    assert hash_of(output) == hash_of(whole)
    assert json.loads((moved / "broken" / "data.json").read_text())["talk"]["path"] == "moved/talk"


def test_other_data_tokenizer_and_optimizer_are_refused_and_change_nothing(trained) -> None:
    folder, _, _ = trained
    kept = {path: path.read_bytes() for path in (folder / "whole").rglob("*") if path.suffix in (".json", ".jsonl")}
    assert {path.name for path in kept} >= {"config.json", "data.json", "tokenizer.json"}

    write_talk(folder / "other", range(1, 9))
    shutil.copytree(folder / "tokenizer", folder / "changed")
    content = json.loads((folder / "changed" / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (folder / "changed" / "tokenizer.json").write_text(json.dumps(content))
    refusals = {
        "--config.data.sources.talk.path=other": r"other data: source talk held 8 records \(\w+\), other holds",
        "--config.text.tokenizer=changed": r"whole was trained with tokenizer \w+, changed is \w+; choose another",
        "--config.optim.optimizer=adamw": r"belongs to another model: optim.optimizer was 'muon', is 'adamw'",
        "--config.data.rows_per_batch=4": r"belongs to another run: data.rows_per_batch was 2, is 4",
    }
    for flag, message in refusals.items():
        code, output = train(folder, "whole", flag)
        assert code == 1, output
        errors = [line for line in output.splitlines() if not line.startswith("config ")]
        assert len(errors) == 1, output
        assert re.search(f"^error: .*{message}", errors[0]), output
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_finished_run_says_so_and_keeps_its_config(trained) -> None:
    folder, whole, _ = trained
    config = (folder / "whole" / "config.json").read_bytes()
    code, output = train(folder, "whole", "--config.optim.peak_lr=0.5")
    assert code == 0, output
    assert f"nothing is left to train: {NUM_STEPS} steps are made, config.train.num_steps = {NUM_STEPS}" in output
    assert hash_of(output) == hash_of(whole)
    assert (folder / "whole" / "config.json").read_bytes() == config


def train_together(
    folder: Path, workdir: str, *flags: str, only: str = "", stop: signal.Signals | None = None, after: int = 0
) -> list[tuple[int, str]]:
    """Two processes of one run; the second alone gets the flag `only`, and the signal when `after` steps are logged.

    Returns:
        Exit code and output of both.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "launch.train", "--config=tiny.py", f"--workdir={workdir}", "--noprint_config"]
    place = {"TML_COORDINATOR_ADDRESS": address, "TML_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [*command, "--config.mesh.fsdp=2", *flags, *([only] if only and number else [])],
            cwd=folder,
            env={**environment(), **place, "TML_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    lines, logged = [], 0
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        lines.append(line)
        logged += bool(LOGGED.match(line))
        if stop is not None and logged == after:
            processes[1].send_signal(stop)
            stop = None
    ends = ["".join(lines), processes[1].communicate(timeout=60)[0]]
    return [(process.wait(timeout=60), end) for process, end in zip(processes, ends, strict=True)]


def losses_of(workdir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_train_as_one(trained) -> None:
    folder, _, _ = trained
    ends = train_together(folder, "two", stop=signal.SIGTERM, after=3)
    steps = []
    for number, (code, output) in enumerate(ends):
        assert code == 75, ends
        assert re.search(rf"process {number} of 2 on \S+ joined after [\d.]+ s with 1 cpu device", output), output
        assert re.search(rf"process {number} of 2 on \S+ agrees on config \w+, code \w+, libraries \w+\n", output), (
            output
        )
        steps += re.findall(rf"process {number} stops and saves at step (\d+), as all do", output)
    assert len(steps) == 2, ends
    assert len(set(steps)) == 1, ends
    assert "first step" not in ends[1][1]

    ends = train_together(folder, "two")
    assert [code for code, _ in ends] == [0, 0], ends
    assert f"resuming from two/checkpoints/{steps[0]}; " in ends[0][1]
    alone, both = losses_of(folder / "whole"), losses_of(folder / "two")
    assert alone.keys() == both.keys()
    # Later, experts that are almost equally likely are chosen otherwise.
    first = range(1, 11)
    np.testing.assert_allclose([both[step] for step in first], [alone[step] for step in first], rtol=1e-5)


@pytest.mark.slow
def test_processes_that_differ_are_named_and_change_nothing(trained) -> None:
    folder, _, _ = trained
    ends = train_together(folder, "differing", only="--config.seed=7")
    for code, output in ends:
        assert code == 1, ends
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert re.search(r"do not have the same config: process 1 on \S+ has \w+; 1 of 2, process 0 on", error), error
    assert not (folder / "differing").exists()
