"""Starts the processes of one run: they find each other, say who they are, and agree on what they run.

Where a process stands comes from flags or, as launch.pod writes it, from the environment: TML_COORDINATOR_ADDRESS,
TML_NUM_PROCESSES and TML_PROCESS_ID. With none of them this is a run of one process, and nothing here does anything.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import sys
import threading
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from absl import app, flags

from launch.app import EXIT_FAILED, prepare_jax
from tml.config import Experiment, config_hash

_COORDINATOR = flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0; TML_COORDINATOR_ADDRESS.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of this run; TML_NUM_PROCESSES.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0; TML_PROCESS_ID.")
_START_TIMEOUT_S = flags.DEFINE_integer("start_timeout_s", 300, "Seconds that the processes wait for each other.")
_HEARTBEAT_TIMEOUT_S = flags.DEFINE_integer(
    "heartbeat_timeout_s", 100, "Seconds without a sign of life after which a process counts as dead, and all end."
)

CODE_PACKAGES = ("tml", "data_pipelines", "experiments", "launch")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""What a step is computed with; other versions compile to other programs, or save in other ways."""

COORDINATOR_WAITS_S = 3
"""Seconds that process 0 waits longer for the others than they do for it."""

WIDTH = 512
"""Bytes of one value that the processes show each other."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among those of its run.

    Attributes:
        coordinator_address: HOST:PORT on which process 0 listens.
        num_processes: processes of the run.
        process_id: the number of this one.
        start_timeout_s: how long it waits for the others to come.
        heartbeat_timeout_s: how long one may be silent before all end.
    """

    coordinator_address: str
    num_processes: int
    process_id: int
    start_timeout_s: int
    heartbeat_timeout_s: int

    def __post_init__(self) -> None:
        port = re.fullmatch(r".+:(\d{1,5})", self.coordinator_address)
        if not port or not 0 < int(port[1]) < 2**16:
            raise ValueError(f"--coordinator_address={self.coordinator_address} is not HOST:PORT, as in 10.0.0.5:8476")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"--process_id={self.process_id} must lie between 0 and {self.num_processes - 1}, "
                f"as --num_processes={self.num_processes}"
            )
        if self.start_timeout_s <= 0 or self.heartbeat_timeout_s <= 0:
            raise ValueError(
                f"--start_timeout_s={self.start_timeout_s} and --heartbeat_timeout_s={self.heartbeat_timeout_s} "
                "must be greater than 0"
            )


def read_place() -> Place | None:
    """What flags and environment say; None where they say nothing: a run of one process.

    Raises:
        app.UsageError: only some of the three, or values that cannot be.
    """
    found = {
        "coordinator_address": _COORDINATOR.value or os.environ.get("TML_COORDINATOR_ADDRESS"),
        "num_processes": _number(_NUM_PROCESSES, "TML_NUM_PROCESSES"),
        "process_id": _number(_PROCESS_ID, "TML_PROCESS_ID"),
    }
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == len(found):
        return None
    if missing:
        given = [name for name in found if name not in missing]
        raise app.UsageError(
            f"--{given[0]} is given but --{missing[0]} is not (nor TML_{missing[0].upper()}); a run of several "
            "processes needs all of --coordinator_address, --num_processes and --process_id"
        )
    timeouts = {"start_timeout_s": _START_TIMEOUT_S.value, "heartbeat_timeout_s": _HEARTBEAT_TIMEOUT_S.value}
    try:
        return Place(**found, **timeouts)  # type: ignore[arg-type]
    except ValueError as error:
        raise app.UsageError(str(error)) from error


def _number(flag: flags.FlagHolder[int | None], variable: str) -> int | None:
    if flag.value is not None:
        return flag.value
    text = os.environ.get(variable)
    if text is not None and not text.isdigit():
        raise app.UsageError(f"{variable}={text} is not a whole number")
    return None if text is None else int(text)


def join(place: Place | None) -> None:
    """Waits for the other processes; then `jax.devices()` are those of all. Call it before the first array.

    If not all come in time, the process ends here, with one line of what it knows and exit code 1.

    Raises:
        ValueError: it cannot listen or connect, for another reason.
    """
    if place is None:
        return
    prepare_jax()
    import jax

    # Without this line a job that hangs at its start names no host.
    say(place, f"waits for {place.num_processes} processes at {place.coordinator_address}")
    began = time.monotonic()
    # The coordinator ends last: those that lose it while they wait are aborted, with a trace of its native code.
    late_s = 0 if place.process_id else COORDINATOR_WAITS_S
    timer = threading.Timer(place.start_timeout_s + late_s, _end, (place,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator_address=place.coordinator_address,
            num_processes=place.num_processes,
            process_id=place.process_id,
            cluster_detection_method="deactivate",
            # Where the others do not come in this time, jax ends the process by SIGABRT; the timer is earlier.
            initialization_timeout=place.start_timeout_s + 10 * COORDINATOR_WAITS_S,
            heartbeat_timeout_seconds=place.heartbeat_timeout_s,
            shutdown_timeout_seconds=place.heartbeat_timeout_s,
        )
    except RuntimeError as error:
        raise ValueError(
            f"process {place.process_id} on {platform.node()} cannot join at {place.coordinator_address}: {error}"
        ) from error
    finally:
        timer.cancel()
    devices = jax.local_devices()
    say(place, f"joined after {time.monotonic() - began:.1f} s with {len(devices)} {devices[0].device_kind} device(s)")


def _end(place: Place) -> None:
    """Ends this process, which waits in native code, because others did not come in time."""
    print(
        f"error: process {place.process_id} on {platform.node()} did not find {place.num_processes} processes at "
        f"{place.coordinator_address} within {place.start_timeout_s} s; see which of them wrote no line "
        "'process N of M', or raise --start_timeout_s",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_FAILED)


def say(place: Place, what: str) -> None:
    """One line of this host's log."""
    print(f"process {place.process_id} of {place.num_processes} on {platform.node()} {what}", flush=True)


def agree(place: Place | None, values: Mapping[str, str]) -> None:
    """Checks that every process has the same values.

    Args:
        place: where this process stands.
        values: by name, such as the hash of the config; the names are the same everywhere.

    Raises:
        ValueError: some differ; names every process that does, with its host and its value.
    """
    if place is None:
        return
    problem = disagreement(list(values), gather([platform.node(), *values.values()]))
    if problem:
        raise ValueError(problem)
    say(place, "agrees on " + ", ".join(f"{name} {value}" for name, value in values.items()))


def together(place: Place | None, action: Callable[[], Result]) -> Result:
    """Does something on every process that may fail on some: then it fails on all, and none is left waiting.

    Raises:
        ValueError: it failed somewhere; names those processes, their hosts and their errors.
    """
    if place is None:
        return action()
    try:
        result, problem = action(), ""
    except (ValueError, OSError) as error:
        result, problem = None, str(error) or repr(error)
    found = gather([platform.node(), problem])
    failed = [f"process {number} on {host}: {what}" for number, (host, what) in enumerate(found) if what]
    if failed:
        raise ValueError("; ".join(failed[:8]) + (f"; and {len(failed) - 8} more" if len(failed) > 8 else ""))
    return typing.cast(Result, result)


def gather(texts: list[str]) -> list[list[str]]:
    """The texts of every process, in the order of their numbers; each cut to `WIDTH` bytes."""
    import numpy as np
    from jax.experimental import multihost_utils

    mine = np.zeros((len(texts), WIDTH), np.uint8)
    for row, text in zip(mine, texts, strict=True):
        encoded = text.encode()[:WIDTH]
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    return [[bytes(row).rstrip(b"\0").decode(errors="replace") for row in process] for process in everyone]


def disagreement(names: list[str], found: list[list[str]]) -> str:
    """What differs from the value that most processes have; empty if nothing does.

    Args:
        names: of the values.
        found: for every process its host, then its values.
    """
    for column, name in enumerate(names, start=1):
        values = [process[column] for process in found]
        usual = max(sorted(set(values)), key=values.count)
        others = [
            f"process {number} on {process[0]} has {process[column]}"
            for number, process in enumerate(found)
            if process[column] != usual
        ]
        if others:
            shown = "; ".join(others[:8]) + (f"; and {len(others) - 8} more" if len(others) > 8 else "")
            holder = values.index(usual)
            return (
                f"the processes do not have the same {name}: {shown}; {values.count(usual)} of {len(values)}, "
                f"process {holder} on {found[holder][0]} among them, have {usual}; give all of them the same"
            )
    return ""


def run_identity(experiment: Experiment) -> dict[str, str]:
    """What all processes of a run must have in common before they start.

    Raises:
        ValueError: this is not the experiment that the job was rendered from (TML_CONFIG_HASH).
    """
    config, wanted = config_hash(experiment), os.environ.get("TML_CONFIG_HASH")
    if wanted and wanted != config:
        raise ValueError(
            f"this job was rendered from config {wanted}, but the code here makes config {config} of the same "
            "flags; render it again with this code, or bring the code that rendered it"
        )
    return {"config": config, "code": code_hash(), "libraries": library_hash()}


@functools.cache
def code_hash() -> str:
    """A short hash of every Python file of the project."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for package in CODE_PACKAGES for file in (root / package).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def library_hash() -> str:
    """A short hash of the versions of Python and of the libraries that compute."""
    versions = [sys.version.split()[0], *(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)]
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()[:12]
