"""How a worker process ends when the process that started it does."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent ends; ends it now when that has happened already.

    Args:
        parent: process id of the parent, as the parent itself sees it (1 when it is a container's first process).
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the signal was asked for
        os._exit(1)
