"""Writes what starts an experiment on a pod: a JobSet for GKE, a batch script for Slurm, or a SkyPilot task.

    python -m launch.pod --config=FILE --target=gke --topology=v5p:8x8x8 --image=IMAGE --claim=CLAIM --out=pods/v5p
    python -m launch.pod --config=FILE --target=slurm --topology=h100:1x64x8 --time_limit=1-00:00:00 --out=pods/h100
    python -m launch.pod --config=FILE --target=skypilot --topology=v6e:16x16 --bucket=gs://BUCKET --out=pods/v6e

The mesh must cover the machine exactly: nothing is written before everything is checked. Overrides of the
config go into the command of the job. Relative paths, of data and of --workdir, mean the --shared folder.
"""

import enum
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from absl import app, flags

from launch import pod_jobset, pod_skypilot, pod_slurm
from launch.app import as_usage, define_config, output_folder, read_experiment, run_app
from launch.pod_job import PodJob, check_mesh, job_name, settings_for, train_command
from launch.pod_topology import Topology, parse_topology
from tml.config import check_platform, config_hash
from tml.whole_folder import write_whole
from tml.xla_flags import xla_flags


class Target(enum.StrEnum):
    """What schedules the job."""

    GKE = "gke"
    SLURM = "slurm"
    SKYPILOT = "skypilot"


_CONFIG = define_config()
_TARGET = flags.DEFINE_enum_class("target", None, Target, "What schedules the job.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "The machine: v5p:8x8x8, v6e:16x16, tpu7x:4x8x8, h100:1x64x8, …")
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of that topology.")
_OUT = flags.DEFINE_string("out", "", "Folder that gets the file.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a file of another text that is in --out.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; runs/NAME by default, in the shared folder.")
_SHARED = flags.DEFINE_string("shared", "/mnt/tml", "Folder that every host sees.")
_CODE = flags.DEFINE_string("code", "/opt/tml", "Folder of the code on every host.")
_PYTHON = flags.DEFINE_string("python", "", "Python on every host; the code folder's .venv, and on gke the image's.")
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts", 10, "Restarts after failures; those after preemption are free.", lower_bound=0
)
_GRACE_S = flags.DEFINE_integer(
    "grace_s", 300, "Seconds to finish the step and save, from notice to end.", lower_bound=1
)
_START_TIMEOUT_S = flags.DEFINE_integer(
    "start_timeout_s", 900, "Seconds that the hosts wait for each other.", lower_bound=1
)
_IMAGE = flags.DEFINE_string("image", "", "gke: the container image, with the code and its packages.")
_CLAIM = flags.DEFINE_string("claim", "", "gke: the PersistentVolumeClaim that is the shared folder.")
_QUEUE = flags.DEFINE_string("queue", "", "gke: the Kueue queue; multislice-queue in XPK's clusters.")
_TIME_LIMIT = flags.DEFINE_string("time_limit", "", "slurm: wall time of one allocation, as in 1-00:00:00.")
_PARTITION = flags.DEFINE_string("partition", "", "slurm: the partition; the cluster's default if empty.")
_ACCOUNT = flags.DEFINE_string("account", "", "slurm: the account; the user's default if empty.")
_BUCKET = flags.DEFINE_string("bucket", "", "skypilot: the bucket that is the shared folder, gs://NAME.")

FLAGS_OF: Mapping[Target, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Target.GKE: (("image", "claim"), ("queue",)),
    Target.SLURM: (("time_limit",), ("partition", "account")),
    Target.SKYPILOT: (("bucket",), ()),
}
"""Flags that a target needs, and flags that it takes; those of the other targets are refused."""

_KUBERNETES = (r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", "a name of Kubernetes: a-z, 0-9, dashes and dots (RFC 1123)")
_OF_SLURM = (r"[^\s#]+", "a name without spaces")
_ABSOLUTE = (r"/[^\n]*", "an absolute path: every host reads it, wherever it starts")
FORMS: Mapping[str, tuple[str, str]] = {
    "image": (r"[^\s]+", "a container image, which has no spaces"),
    "claim": _KUBERNETES,
    "queue": _KUBERNETES,
    "partition": _OF_SLURM,
    "account": _OF_SLURM,
    "shared": _ABSOLUTE,
    "code": _ABSOLUTE,
}
"""What the values of flags look like, as a pattern and in words."""


def main(argv: list[str]) -> int:
    """Checks flags, config and machine, then writes the file and shows what is in it."""
    target = _TARGET.value
    if target is None or not _TOPOLOGY.value or not _OUT.value:
        raise app.UsageError("--target, --topology and --out are needed, as in --target=gke --topology=v5p:8x8x8")
    check_flags(target)
    folder = output_folder("out", _OUT.value)
    with as_usage():
        job = read_job(target)
        name, text, submit = RENDERERS[target](job)
    file = folder / name
    if file.exists() and file.read_text() != text and not _OVERWRITE.value:
        raise ValueError(f"{file} is there and says something else; give another --out, or --overwrite")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)
    print(summary(job))
    print(f"command  {shlex.join(job.command)}")
    print(f"written  {file}; start it with: {submit(str(file))}")
    return 0


def check_flags(target: Target) -> None:
    """Checks that the flags are this target's.

    Raises:
        app.UsageError: one is missing, belongs to another target, or has a value that no scheduler takes.
    """
    for other, (needed, taken) in FLAGS_OF.items():
        for name in (*needed, *taken):
            flag = flags.FLAGS[name]
            if other is target and name in needed and not flag.value:
                raise app.UsageError(f"--{name} is missing; {flag.help}")
            if other is not target and flag.value:
                raise app.UsageError(f"--{name} is for --target={other}, not {target}; leave it out")
    for name, (pattern, words) in FORMS.items():
        value = flags.FLAGS[name].value
        if value and not re.fullmatch(pattern, value):
            raise app.UsageError(f"--{name}={value!r} must be {words}")


def read_job(target: Target) -> PodJob:
    """The job that the flags and the config describe.

    Raises:
        ValueError: the machine, its mesh or its name do not fit.
    """
    experiment = read_experiment(_CONFIG)
    topology = parse_topology(_TOPOLOGY.value, _NUM_SLICES.value)
    check_target(target, topology)
    if target is Target.SKYPILOT:
        topology = pod_skypilot.with_hosts(topology)
    check_mesh(experiment, topology)
    check_platform(experiment.model, topology.chip.platform)
    shared, code = PurePosixPath(_SHARED.value), PurePosixPath(_CODE.value)
    python = _PYTHON.value or ("python" if target is Target.GKE else str(code / ".venv/bin/python"))
    workdir = _WORKDIR.value or f"runs/{experiment.name}"
    return PodJob(
        name=job_name(experiment),
        topology=topology,
        command=train_command(config_flags_of(sys.argv), code, python, workdir, _START_TIMEOUT_S.value),
        settings=settings_for(topology, shared, code, config_hash(experiment)),
        shared=shared,
        code=code,
        max_restarts=_MAX_RESTARTS.value,
        grace_s=_GRACE_S.value,
    )


def check_target(target: Target, topology: Topology) -> None:
    """Checks that the target has machines of this kind.

    Raises:
        ValueError: it has none.
    """
    chip = topology.chip
    if target is Target.GKE and not topology.machines.gke_name:
        raise ValueError(f"--target=gke is for TPU slices; use --target=slurm or skypilot for {chip.name}")
    if target is Target.SLURM and chip.is_tpu:
        raise ValueError(f"--target=slurm is for GPUs; use --target=gke or skypilot for {chip.name}")


def config_flags_of(argv: list[str]) -> list[str]:
    """The flags of the config, as they were given.

    Raises:
        app.UsageError: one has its value in the next argument, or the file is not in the code folder.
    """
    given = [arg for arg in argv[1:] if re.match(r"--?config\b", arg)]
    for arg in given:
        if "=" not in arg:
            raise app.UsageError(f"write {arg}=VALUE, with the equals sign: it goes into the job's command as it is")
        name, _, value = arg.partition("=")
        if name.lstrip("-") == "config" and Path(value).is_absolute():
            raise app.UsageError(f"{arg}: name the file from the top of the code folder, as in experiments/NAME.py")
    return given


def _gke(job: PodJob) -> tuple[str, str, Callable[[str], str]]:
    text = pod_jobset.jobset_text(job, _IMAGE.value, _CLAIM.value, _QUEUE.value)
    return "jobset.yaml", text, pod_jobset.submit_command


def _slurm(job: PodJob) -> tuple[str, str, Callable[[str], str]]:
    pod_slurm.check_times(_TIME_LIMIT.value, job.grace_s, _START_TIMEOUT_S.value)
    text = pod_slurm.sbatch_text(job, _TIME_LIMIT.value, _PARTITION.value, _ACCOUNT.value)
    return "job.sbatch", text, pod_slurm.submit_command


def _skypilot(job: PodJob) -> tuple[str, str, Callable[[str], str]]:
    return "task.yaml", pod_skypilot.task_text(job, _BUCKET.value), pod_skypilot.submit_command


RENDERERS: Mapping[Target, Callable[[PodJob], tuple[str, str, Callable[[str], str]]]] = {
    Target.GKE: _gke,
    Target.SLURM: _slurm,
    Target.SKYPILOT: _skypilot,
}
"""For every target: the file's name, its text, and how it is handed in."""


def summary(job: PodJob) -> str:
    """The machine, and every variable and compiler flag with its reason."""
    topology = job.topology
    lines = [
        f"machine  {topology.num_slices} slice(s) of {topology.hosts_per_slice} hosts with {topology.chips_per_host} "
        f"{topology.chip.name} each: {topology.num_processes} processes, {topology.num_devices} devices",
        f"restarts {job.max_restarts} after failures, any number after preemption with the state saved; "
        f"{job.grace_s} s to save",
        "environment",
        *(f"  {setting.name}={setting.value}\n      {setting.reason}" for setting in job.settings),
        "compiler flags",
        *(
            f"  --{flag.name}={flag.value}\n      {flag.reason}"
            for flag in xla_flags(topology.chip.platform, topology.num_slices, topology.chip.name)
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_app(main)
