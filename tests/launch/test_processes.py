"""Processes find each other and agree, or say which of them does not fit; made of two real ones."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from absl import app, flags
from absl.testing import flagsaver
from made_up import made_up_experiment

from launch import processes
from launch.processes import Place, disagreement
from tml.config import config_hash

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("processes_program.py")


def start_two(*ends: tuple[str, str], num_processes: int = 2, timeout_s: int = 120) -> list[tuple[int, str]]:
    """Runs the program once for every (config hash, error); returns exit codes and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    environment |= {"TML_NUM_PROCESSES": str(num_processes), "TML_COORDINATOR_ADDRESS": address}
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), f"--process_id={number}", f"--start_timeout_s={timeout_s}", *end],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, end in enumerate(ends)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def test_two_processes_find_each_other_and_agree() -> None:
    for number, (code, output) in enumerate(start_two(("abc", ""), ("abc", ""))):
        assert code == 0, output
        host = rf"process {number} of 2 on {re.escape(socket.gethostname())}"
        assert re.search(rf"^{host} waits for 2 processes at 127.0.0.1:\d+$", output, re.M), output
        assert re.search(rf"^{host} joined after [\d.]+ s with 1 cpu device\(s\)$", output, re.M), output
        assert re.search(rf"^{host} agrees on config abc, code \w{{12}}$", output, re.M), output
        assert output.splitlines()[-1] == "2 processes, 2 devices"


def test_both_end_when_one_of_them_finds_something_wrong_or_differs() -> None:
    for code, output in start_two(("abc", ""), ("abc", "no disk here")):
        assert code == 1, output
        assert re.search(r"^error: process 1 on \S+: no disk here$", output, re.M), output
    for code, output in start_two(("abc", ""), ("xyz", "")):
        assert code == 1, output
        assert re.search(r"^error: the processes do not have the same config: process 1 on \S+ has xyz; 1 of 2, "
                         r"process 0 on \S+ among them, have abc", output, re.M), output  # fmt: skip


@pytest.mark.slow
def test_a_process_that_never_comes_is_a_time_out() -> None:
    ((code, output),) = start_two(("abc", ""), timeout_s=5)
    assert code == 1, output
    assert "waits for 2 processes" in output
    assert re.search(r"^error: process 0 on \S+ did not find 2 processes at 127.0.0.1:\d+ within 5 s; see which",
                     output, re.M), output  # fmt: skip
    assert "Fatal" not in output, output


def test_the_few_are_named_not_the_many() -> None:
    hosts = [[f"host{i}", "aaa", "same"] for i in range(6)]
    assert disagreement(["config", "code"], hosts) == ""
    hosts[4][1] = "bbb"
    text = disagreement(["config", "code"], hosts)
    assert text.startswith("the processes do not have the same config: process 4 on host4 has bbb; 5 of 6, process 0")
    hosts[4][1], hosts[2][2] = "aaa", "other"
    assert "the same code: process 2 on host2 has other; 5 of 6" in disagreement(["config", "code"], hosts)


@pytest.fixture
def parsed() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


@pytest.mark.usefixtures("parsed")
def test_a_place_comes_from_flags_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.read_place() is None
    monkeypatch.setenv("TML_NUM_PROCESSES", "4")
    monkeypatch.setenv("TML_PROCESS_ID", "1")
    with pytest.raises(app.UsageError, match="--num_processes is given but --coordinator_address is not"):
        processes.read_place()
    with flagsaver.flagsaver(coordinator_address="host:1", process_id=2, heartbeat_timeout_s=9):
        wanted = Place(
            coordinator_address="host:1", num_processes=4, process_id=2, start_timeout_s=300, heartbeat_timeout_s=9
        )
        assert processes.read_place() == wanted
    for name, value, message in (
        ("TML_PROCESS_ID", "4", "--process_id=4 must lie between 0 and 3"),
        ("TML_PROCESS_ID", "one", "TML_PROCESS_ID=one is not a whole number"),
        ("TML_COORDINATOR_ADDRESS", "host", "--coordinator_address=host is not HOST:PORT"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv("TML_COORDINATOR_ADDRESS", "host:1")
            changed.setenv(name, value)
            with pytest.raises(app.UsageError, match=message):
                processes.read_place()


def test_a_job_rendered_from_another_config_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = made_up_experiment()
    monkeypatch.setenv("TML_CONFIG_HASH", config_hash(experiment))
    assert processes.run_identity(experiment)["config"] == config_hash(experiment)
    monkeypatch.setenv("TML_CONFIG_HASH", "123456")
    with pytest.raises(
        ValueError, match=r"rendered from config 123456, but the code here makes config \w+ of the same"
    ):
        processes.run_identity(experiment)


def test_the_code_hash_changes_with_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in processes.CODE_PACKAGES:
        (tmp_path / package).mkdir()
    (tmp_path / "launch" / "processes.py").write_text("a = 1")
    monkeypatch.setattr(processes, "__file__", str(tmp_path / "launch" / "processes.py"))
    hashes = []
    for text in ("a = 1", "a = 2", "a = 1"):
        (tmp_path / "tml" / "file.py").write_text(text)
        hashes.append(processes.code_hash.__wrapped__())
    assert hashes[0] == hashes[2] != hashes[1]
