"""A run that is killed at any moment, or asked to end, continues bit for bit."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tml.metrics import read_json_lines

PROGRAM = Path(__file__).with_name("resume_program.py")
FLAGS = "--xla_backend_optimization_level=0"  # as in conftest.py, but one device
LOGGED = re.compile(r"^step (\d+)/")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One compile cache for all runs of the program, and the same number of devices."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    root = str(PROGRAM.parents[1])  # tests/launch stands beside the program, and is not the one it wants
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "XLA_FLAGS": FLAGS, "PYTHONPATH": root}


def run(
    folder: Path, environment: dict[str, str], stop: signal.Signals | None = None, after: int = 0, delay: float = 0
):
    """Runs the program; sends `stop` some time after it has logged `after` steps. Returns exit code and output."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(PROGRAM), str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, logged = [], 0
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode()
        output.append(line)
        logged += bool(LOGGED.match(line))
        if stop is not None and logged == after:
            time.sleep(delay)
            process.send_signal(stop)
            stop = None
    return process.wait(), "".join(output)


def hash_of(output: str) -> str:
    found = re.search(r"finished at step 60 after .*; state (\w+) in", output)
    assert found, output
    return found.group(1)


def losses_of(folder: Path) -> dict[int, float]:
    lines = list(read_json_lines(folder / "metrics.jsonl"))
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


LOGGED_NAMES = {
    *(f"train/loss{stream}" for stream in ("", "_listen", "_speak", "_text", "_action", "_document")),
    *("train/grad_norm", "train/lr", "train/num_skipped", "moe/load_cv", "moe/load_max_over_mean"),
    "moe/dropped_fraction",
    *("throughput/tokens_per_s", "throughput/model_flops_per_s", "throughput/mfu"),
    *("throughput/data_wait_s", "throughput/eta_s"),
}


@pytest.mark.slow
def test_killed_and_interrupted_runs_end_in_the_same_state(tmp_path: Path, environment: dict[str, str]):
    code, output = run(tmp_path / "whole", environment)
    assert code == 0, output
    wanted = hash_of(output)
    assert "state    new, seed 0; 60 of 60 steps to go" in output

    lines = list(read_json_lines(tmp_path / "whole" / "metrics.jsonl"))
    assert lines[10].keys() >= LOGGED_NAMES
    assert [line["step"] for line in lines if "eval/loss" in line] == [25, 50, 60]
    assert list((tmp_path / "whole" / "tensorboard").glob("events.out.tfevents.*"))

    moment = random.SystemRandom()
    after, delay = moment.randint(7, 25), moment.uniform(0, 0.3)
    code, output = run(tmp_path / "broken", environment, signal.SIGKILL, after, delay)
    assert code == -signal.SIGKILL, (after, delay, output)
    # Orbax gives a checkpoint its plain number when it is whole; step 7 may still be under way at the first kills.
    whole = [int(path.name) for path in (tmp_path / "broken" / "checkpoints").iterdir() if path.name.isdigit()]
    state = rf"resuming from .*broken/checkpoints/{max(whole)}; " if whole else "new, seed 0; 60 of 60 steps to go"
    code, output = run(tmp_path / "broken", environment, signal.SIGTERM, after=10)
    assert code == 75, (after, delay, output)
    assert re.search(f"state    {state}", output), (after, delay, whole, output)
    stopped_at = int(re.search(r"interrupted, saved at step (\d+)", output).group(1))
    assert "SIGTERM: finishing the step and saving" in output
    code, output = run(tmp_path / "broken", environment)
    assert code == 0, output
    assert f"broken/checkpoints/{stopped_at}; {60 - stopped_at} of 60 steps to go" in output
    assert hash_of(output) == wanted, (after, delay)
    assert losses_of(tmp_path / "broken") == losses_of(tmp_path / "whole"), (after, delay)

    code, output = run(tmp_path / "broken", environment)
    assert code == 0, output
    assert "0 of 60 steps to go" in output
    assert hash_of(output) == wanted
