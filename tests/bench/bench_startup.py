"""Seconds from the command to the first step, warm, and the import time of tml.

Run: python tests/bench/bench_startup.py. It needs the prepared quickstart data (see the README). The first
run fills the compile cache and does not count. The bars are 20 s and 2 s.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BAR_FIRST_STEP_S, BAR_IMPORT_S = 20.0, 2.0
ROOMS = "tml, tml.config, tml.microturn, tml.session"


def first_step_s(workdir: Path) -> float:
    """Starts training, waits for the line about the first step, and ends the run."""
    command = [sys.executable, "-u", "-m", "launch.train", "--config=experiments/quickstart.py", f"--workdir={workdir}"]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        if re.match(r"first step ", line):
            seconds = time.perf_counter() - began
            process.send_signal(signal.SIGKILL)
            process.wait()
            return seconds
    raise RuntimeError("training ended without a step:\n" + "".join(output))


def import_s(modules: str) -> float:
    """Seconds of a fresh interpreter that imports the modules."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {modules}"], cwd=ROOT, check=True)
    return time.perf_counter() - began


def main() -> None:
    """Prints both times, the best of three each."""
    with tempfile.TemporaryDirectory() as folder:
        first_step_s(Path(folder) / "cold")
        warm_s = min(first_step_s(Path(folder) / f"warm-{index}") for index in range(3))
    print(f"command to first step, warm: {warm_s:.1f} s (bar {BAR_FIRST_STEP_S:g})")
    print(f"import {ROOMS}: {min(import_s(ROOMS) for _ in range(3)):.2f} s (bar {BAR_IMPORT_S:g})")
    whole = "tml.train, tml.checkpoint, tml.stream"
    print(f"import {whole} (with jax, optax and orbax): {min(import_s(whole) for _ in range(3)):.2f} s")


if __name__ == "__main__":
    main()
