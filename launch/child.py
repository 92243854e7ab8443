"""One command of ours as a child process, which gets the signals that we get."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import IO

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""XLA on CPU allocates its buffers anew every step; huge pages take about a tenth off the step's time."""


def run_child(module: str, arguments: Sequence[str], output: IO[str] | None = None) -> tuple[int, int]:
    """Runs `python -m module arguments` to its end.

    Ctrl-C and SIGTERM go on to the command, which may take its time to save.

    Args:
        module: such as launch.train.
        arguments: its flags.
        output: where its output goes; this screen by default.

    Returns:
        Its exit code, and the signal that it was stopped by, or 0.
    """
    stopped_by = 0
    command = [sys.executable, "-m", module, *arguments]
    errors = None if output is None else subprocess.STDOUT
    # In a session of its own, so that Ctrl-C reaches it once, through us.
    with subprocess.Popen(
        command, env=HUGE_PAGES | os.environ, start_new_session=True, stdout=output, stderr=errors
    ) as child:

        def pass_on(number: int, _: FrameType | None) -> None:
            nonlocal stopped_by
            stopped_by = number
            child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code, stopped_by
