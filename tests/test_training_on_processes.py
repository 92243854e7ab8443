"""Two and four real processes (jax.distributed, gloo) train to the losses of one."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@functools.cache
def losses_of(count: int) -> list[list[float]]:
    """The losses that each of `count` processes prints."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "processes_program.py"), str(port), str(index), str(count)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        ended = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors
    return [[float(line.split()[1]) for line in out.splitlines() if line.startswith("loss ")] for out, _ in ended]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_to_the_losses_of_one(count: int) -> None:
    (alone,) = losses_of(1)
    assert len(alone) == 3
    for losses in losses_of(count):
        np.testing.assert_allclose(losses, alone, rtol=1e-5)
