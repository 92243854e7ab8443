"""The planning app, run as a user runs it. What needs a compiler for a pod is slow and wants the extra `plan`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ("--config=experiments/quickstart.py", "--config.data.row_slots=64", "--config.data.rows_per_batch=8")


def run(*flags: str, timeout: int = 60) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launch.plan", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def test_a_plan_needs_a_pod():
    done = run(*TINY)
    assert done.returncode == 2
    assert done.stderr == "error: --topology is missing; name a pod, as in --topology=v5p:8x8x8\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--search=mesh", "--step=decode"), "--step does not go with --search, which plans train steps; leave it out"),
        (("--search=mesh", "--hlo=x"), "--hlo does not go with --search; leave it out"),
        (("--step=decode", "--tokens=1e9"), "--tokens does not go with --step=decode; leave it out"),
        (("--num_sessions=4",), "--num_sessions does not go with a train step; leave it out"),
        (("--json=x.json", "--hlo=x"), "--json and --hlo would both write x.json; name another file"),
        (("--json=tests",), "tests is a folder; name a file for --json and --hlo"),
        (("--search=mesk",), "search cannot vary 'mesk'; it can vary mesh, remat, rows"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags: tuple[str, ...], message: str):
    done = run(*TINY, "--topology=h100:1x1x8", *flags)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


@pytest.mark.parametrize(
    ("config", "topology", "message"),
    [
        ("quickstart.py", "v5q:2x2x2", "unknown chip 'v5q'; did you mean v5p or v5e?"),
        ("quickstart.py", "v5p:2x2", "must give 3 sizes"),
        (
            "interaction_1b.py:h100",
            "h100:1x1x8",
            "interaction_1b.py has no settings to choose of, so :h100 says nothing",
        ),
        ("interaction_276b.py:nope", "h100:1x1x8", "interaction_276b has no settings for pod 'nope'; choose of v5p"),
        ("interaction_2b.py", "h100:1x1x8", "there is no config file experiments/interaction_2b.py; did you mean"),
    ],
)
def test_what_is_no_pod_and_no_config_is_said_in_a_line(config: str, topology: str, message: str):
    done = run(f"--config=experiments/{config}", f"--topology={topology}")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_a_plan_for_eight_gpus(tmp_path: Path):
    pytest.importorskip("jax_cuda12_plugin")
    files = tmp_path / "plan.json", tmp_path / "step.hlo"
    mesh = ("--config.mesh.fsdp=8", "--config.data.rows_per_batch=16")  # two parts of a row a GPU
    flags = (*mesh, "--topology=h100:1x1x8", f"--json={files[0]}", f"--hlo={files[1]}")
    done = run(*TINY, *flags, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "quickstart, train step on h100:1x1x8: 8 chips, mesh fsdp=8" in done.stdout
    numbers = json.loads(files[0].read_text())
    assert numbers["fits"] is True
    assert numbers["rows_per_chip"] == 2
    assert 0 < numbers["mfu_estimate"] <= numbers["mfu_bound"] < 1
    assert numbers["step_seconds_lower"] <= numbers["step_seconds_estimate"]
    assert "all-gather" in {line["category"] for line in numbers["categories"]}
    assert files[1].read_text().startswith("HloModule")
    assert json.loads(Path(f"{files[1]}.json").read_text())["mesh"]["fsdp"] == 8
