"""Runs launch.pod once for every line of flags (JSON) on its input: the program that tests/launch/test_pod.py asks.

Each run is a fork of this process; the answer is a line of JSON with its exit code and what it wrote as errors.
"""

import json
import os
import sys
import tempfile

from launch import pod
from launch.app import run_app
from tml import mesh  # noqa: F401 (the app imports it late; here it is paid once)


def main() -> None:
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as errors:
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(errors.fileno(), 2)
                sys.argv = json.loads(line)
                run_app(pod.main)
            _, status = os.waitpid(child, 0)
            errors.seek(0)
            print(json.dumps([os.waitstatus_to_exitcode(status), errors.read()]), flush=True)


if __name__ == "__main__":
    main()
