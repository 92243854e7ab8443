"""launch.evaluate --suite=duplex as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import small_model, small_session

from data_pipelines.behaviours.task import BehaviourTask
from data_pipelines.record_writer import SessionWriter
from tml.config import MicroTurnConfig
from tml.export import bundle
from tml.session import Behaviour

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random values without a voice, sessions of two behaviours, and one of none."""
    root = tmp_path_factory.mktemp("duplex")
    bundle.save(small_model(root, turn=MicroTurnConfig()), root / "bundle")
    with SessionWriter(root / "heldout", name="heldout", num_shards=1, meta={"licence": "CC0"}) as writer:
        for behaviour in (Behaviour.TURN_TAKING, Behaviour.PROACTIVE):
            task = BehaviourTask(seed=0, shares={behaviour: 1.0})
            for index in range(3):
                writer.write(task.session("heldout", index))
    with SessionWriter(root / "plain", name="plain", num_shards=1, meta={"licence": "CC0"}) as writer:
        writer.write(small_session(1))
    return root


def run(*flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.evaluate", "--suite=duplex", *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_it_prints_a_table_and_writes_reports_and_the_benchmarks_folders(folder: Path) -> None:
    flags = ("--model=bundle", "--data=heldout", "--limit=2", "--max_control_sessions=1", "--pictures=1", "--out=out")
    done = run(*flags, "--controls=silence,swap,blank_audio", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "streaming 4 of 6 sessions of heldout" in done.stdout
    header = next(line for line in done.stdout.splitlines() if line.startswith("behaviour "))
    assert header.split()[3:] == ["model", "silence", "swap", "blank_audio", "ceiling", "latency", "learnt"]
    assert "\nturn_taking  2 " in done.stdout
    assert "\nproactive    2 " in done.stdout
    assert "learnt: " in done.stdout
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["num_sessions"] == 4
    assert set(report["controls"]) == {"silence", "swap", "blank_audio"}
    lines = [json.loads(line) for line in (folder / "out" / "sessions.jsonl").read_text().splitlines()]
    assert set(lines[0]["controls"]) == {"silence", "swap", "blank_audio"}
    assert (folder / "out" / "report.html").read_text().count("<figure>") == 2
    sample = folder / "out" / "full_duplex_bench" / "smooth_turn_taking" / "0"
    names = {path.name for path in sample.iterdir()}
    assert names == {"input.wav", "output.wav", "output.json", "turn_taking.json"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--controls=noise",), "--controls=noise must name some of silence, swap, blank_audio"),
        (("--max_sessions=3",), "--max_sessions goes with --suite=requests; leave it out for --suite=duplex"),
        (("--suite=requests", "--limit=3"), "--limit goes with --suite=duplex; leave it out for --suite=requests"),
        (("--data=nowhere",), "nowhere"),
        (("--data=plain",), "was made for no behaviour (its meta has ''); evaluate it with --suite=requests"),
        ((), "--sessions is missing"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_non_zero_exit(
    folder: Path, flags: tuple[str, ...], message: str
) -> None:
    done = run("--model=bundle", *flags, folder=folder)
    assert done.returncode in (1, 2), done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
