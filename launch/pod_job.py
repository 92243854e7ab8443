"""What runs on every host of a pod, whatever schedules it: the command, its environment with reasons, the checks."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from launch.pod_topology import Topology
from tml.config import Experiment
from tml.config.mesh import check_slices, describe_nearest
from tml.xla_flags import FLAGS_VARIABLE, Platform, flags_environment

COORDINATOR_PORT = 8476
"""Where process 0 listens for the others; jax takes the same one on Cloud TPUs."""

MAX_NAME = 40
"""Names of pods are made from the job's and have 63 characters at most (RFC 1123)."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One variable of the environment, and why it is set."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PodJob:
    """One training run on one machine.

    Attributes:
        name: the experiment's, as schedulers want names.
        topology: the machine.
        command: what every host runs; relative paths in it mean `shared`.
        settings: the environment that all hosts share.
        shared: folder that every host sees: data, run folder, compile cache.
        code: folder of the code on every host.
        max_restarts: restarts after failures; those after a preemption, with the state saved, are free.
        grace_s: seconds between the notice and the end, in which the step is finished and the state saved.
    """

    name: str
    topology: Topology
    command: tuple[str, ...]
    settings: tuple[Setting, ...]
    shared: PurePosixPath
    code: PurePosixPath
    max_restarts: int
    grace_s: int

    @property
    def environment(self) -> Mapping[str, str]:
        """The settings without their reasons."""
        return {setting.name: setting.value for setting in self.settings}


def job_name(experiment: Experiment) -> str:
    """The experiment's name as a label of RFC 1123.

    Raises:
        ValueError: it cannot be one.
    """
    name = experiment.name.lower().replace("_", "-").replace(".", "-")
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ValueError(
            f"config.name = {experiment.name!r} cannot name a job: schedulers want a letter, then letters, digits "
            f"and dashes, {MAX_NAME} at most; choose another with --config.name=NAME"
        )
    return name


def check_mesh(experiment: Experiment, topology: Topology) -> None:
    """Checks that the mesh covers the machine, and that slices are whole.

    Raises:
        ValueError: with both numbers and the nearest mesh that fits.
    """
    shape, wanted = experiment.mesh.shape, topology.num_devices
    if math.prod(shape.values()) != wanted:
        per_chip = topology.chip.devices_per_chip
        devices = f"{wanted} devices" + (f" ({per_chip} a chip)" if per_chip > 1 else "")
        nearest = describe_nearest(experiment.mesh, wanted, experiment.splits, topology.num_slices)
        raise ValueError(
            f"config.mesh {shape} is for {math.prod(shape.values())} devices, but {topology.num_slices} slice(s) of "
            f"{topology.chip.name}:{'x'.join(map(str, topology.shape))} have {devices}; "
            f"{nearest} (--config.mesh.fsdp=N and the like)"
        )
    check_slices(experiment.mesh, topology.num_slices, experiment.splits)


def settings_for(topology: Topology, shared: PurePosixPath, code: PurePosixPath, config: str) -> tuple[Setting, ...]:
    """The environment that every host shares, in a fixed order.

    Args:
        topology: the machine.
        shared: folder that every host sees.
        code: where the code lies on every host.
        config: hash of the experiment that this job was rendered from.
    """
    platform = topology.chip.platform
    ((flags_name, flags),) = flags_environment(platform, topology.num_slices, topology.chip.name).items()
    rows = [
        ("JAX_PLATFORMS", f"{platform},cpu", "A host whose accelerators are missing fails, and does not train on CPU."),
        (
            "JAX_COMPILATION_CACHE_DIR",
            str(shared / "compiled"),
            "A restart reads the compiled step, not minutes of XLA.",
        ),
        ("PYTHONPATH", str(code), "Packages and experiments are those of the code folder."),
        ("PYTHONUNBUFFERED", "1", "The scheduler's log gets every line when it is printed, also before a crash."),
        (flags_name, flags, f"Each flag has its reason in tml/xla_flags.py; {FLAGS_VARIABLE[platform]} is read once."),
        ("TML_CONFIG_HASH", config, "The job refuses to start with another experiment than it was rendered from."),
        ("TML_NUM_PROCESSES", str(topology.num_processes), "One process a host; fewer are a missing host, by name."),
    ]
    if platform is Platform.CUDA:
        rows.append(
            ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92", "The default leaves a quarter; NCCL and CUDA need less.")
        )
    return tuple(Setting(name=name, value=value, reason=reason) for name, value, reason in rows)


def train_command(
    overrides: Sequence[str], code: PurePosixPath, python: str, workdir: str, start_timeout_s: int
) -> tuple[str, ...]:
    """The command line of every host: the flags of the config as they were given, its file found in the code folder."""
    config = [re.sub(r"^--?config=", f"--config={code}/", flag) for flag in overrides]
    return (
        python,
        "-m",
        "launch.train",
        *config,
        f"--workdir={workdir}",
        "--noprint_config",
        f"--start_timeout_s={start_timeout_s}",
    )


class _ManifestDumper(yaml.SafeDumper):
    """Writes scripts as blocks, a line a line, and repeats what occurs twice instead of pointing at it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_ManifestDumper.add_representer(str, _represent_text)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as YAML, in its own order."""
    return yaml.dump(manifest, Dumper=_ManifestDumper, sort_keys=False, width=10_000)
