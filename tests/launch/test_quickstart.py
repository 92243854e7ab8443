"""The quickstart's own part: signals go on to the command that runs, and data that does not fit is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import quickstart

ROOT = Path(__file__).parents[2]

SLOW_TO_STOP = """
import signal, sys, time

def stop(*_):
    time.sleep(0.6)
    print("saved", flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_the_command_which_may_save(tmp_path: Path, number: signal.Signals):
    (tmp_path / "slow_to_stop.py").write_text(SLOW_TO_STOP)
    process = subprocess.Popen(
        [sys.executable, "-c", "from launch.quickstart import _run; _run('slow_to_stop')"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready":
            break
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "saved" in out
    assert "stopped in slow_to_stop; run the same command again" in error


def test_a_command_that_fails_ends_the_quickstart(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match=r"launch\.describe ended with code 2.*try this\. When that is mended, run"):
        quickstart._run("launch.describe", "--no_such_flag", hint="try this")
    assert "no_such_flag" in capfd.readouterr().err


def test_data_of_another_size_is_refused(tmp_path: Path):
    (tmp_path / "dataset.json").write_text(json.dumps({"shards": [{"num_records": 20}, {"num_records": 22}]}))
    quickstart._synthesise(tmp_path, num_sessions=42)
    with pytest.raises(ValueError, match="holds 42 sessions, 50 are wanted; name another folder"):
        quickstart._synthesise(tmp_path, num_sessions=50)
