"""Workers end with their parent, and only then; also under a parent that is process 1, as in a container."""

import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest

from data_pipelines.worker_process import end_with_parent

# A data set of one session, written by a worker of process 1.
_GENERATE_AS_PROCESS_1 = """
import os, sys
from data_pipelines.generate import generate
from data_pipelines.request_task import RequestTask
if __name__ == "__main__":
    assert os.getpid() == 1
    generate(sys.argv[1], RequestTask(seed=0), name="x", split="train", num_sessions=1, num_workers=1)
"""


def run(parent):
    end_with_parent(parent)
    os._exit(7)


@pytest.mark.parametrize(("offset", "exit_code"), [(0, 7), (1, 1)])
def test_a_worker_of_another_parent_ends(offset, exit_code):
    worker = multiprocessing.get_context("spawn").Process(target=run, args=(os.getpid() + offset,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == exit_code


def test_process_1_can_have_workers(tmp_path):
    """An app is process 1 when a container starts it; its workers then see 1 as their parent."""
    alone = ["unshare", "--user", "--pid", "--fork", "--kill-child", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a process 1")
    program = tmp_path / "program.py"
    program.write_text(_GENERATE_AS_PROCESS_1)
    done = subprocess.run(
        [*alone, sys.executable, str(program), str(tmp_path / "set")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "set/dataset.json").is_file()
