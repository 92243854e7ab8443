"""A SkyPilot task: GPUs on several nodes, or one TPU slice, of whatever cloud has them."""

import dataclasses
import re
import shlex
from typing import Any

from launch.app import EXIT_INTERRUPTED
from launch.pod_job import COORDINATOR_PORT, PodJob, manifest_text
from launch.pod_topology import Topology
from tml.xla_flags import Platform

SETUP = (
    "cd {code} && ~/.local/bin/uv venv --seed --allow-existing --python 3.11 .venv "
    "&& .venv/bin/pip install --quiet --editable '.[{extra},tiktoken]'"
)
"""SkyPilot installs uv on every host, which brings a Python that is new enough; that of TPU images is 3.10. A host that
is used again has the folder."""

RUN = f"""\
set -euo pipefail
# The first address is process 0's, which the others look for.
export TML_COORDINATOR_ADDRESS="${{SKYPILOT_NODE_IPS%%$'\\n'*}}:{COORDINATOR_PORT}"
export TML_PROCESS_ID="$SKYPILOT_NODE_RANK"
"""


def check_machine(job: PodJob) -> None:
    """Checks that SkyPilot can ask for the machine.

    Raises:
        ValueError: a chip that its catalogue lacks, or several slices of TPUs.
    """
    topology = job.topology
    if not topology.machines.skypilot_name:
        raise ValueError(f"SkyPilot has no {topology.chip.name}; render it with --target=gke")
    if topology.chip.platform is Platform.TPU and topology.num_slices > 1:
        raise ValueError(
            f"SkyPilot starts one TPU slice a task, not {topology.num_slices}; set --num_slices=1, or --target=gke"
        )


def with_hosts(topology: Topology) -> Topology:
    """The machine with the hosts that SkyPilot gives it: a small slice of v5e or v6e is one."""
    if topology.chips_per_slice > topology.machines.skypilot_host_chips:
        return topology
    return dataclasses.replace(topology, chips_per_host=topology.chips_per_slice)


def check_bucket(bucket: str) -> None:
    """Checks that a run folder can lie in the bucket.

    SkyPilot's documentation (reference/storage, MOUNT) promises neither appends nor writes in place. gcsfuse, which
    mounts gs://, takes both; goofys, which mounts s3://, fails them.

    Raises:
        ValueError: another store.
    """
    if not re.fullmatch(r"gs://.+", bucket):
        raise ValueError(
            f"--bucket={bucket} must be gs://NAME: a run appends to its metrics.jsonl, which SkyPilot's mount of "
            f"gs:// can do (gcsfuse), and that of s3:// cannot (goofys)"
        )


def task(job: PodJob, bucket: str) -> dict[str, Any]:
    """The task, as `sky jobs launch` takes it.

    Args:
        job: what runs.
        bucket: the URI of a bucket of Google's, gs://NAME, mounted at `job.shared`.

    Raises:
        ValueError: a machine that SkyPilot cannot ask for, or a bucket of another store.
    """
    check_machine(job)
    check_bucket(bucket)
    topology = job.topology
    is_tpu = topology.chip.platform is Platform.TPU
    units = topology.machines.skypilot_units_per_chip
    name = topology.machines.skypilot_name
    # A TPU slice is one node of SkyPilot, which runs the task on each of its hosts.
    accelerators = f"{name}-{topology.chips_per_slice * units}:1" if is_tpu else f"{name}:{topology.chips_per_host}"
    return {
        "name": job.name,
        "num_nodes": 1 if is_tpu else topology.num_processes,
        "resources": {
            "accelerators": accelerators,
            "job_recovery": {
                "max_restarts_on_errors": job.max_restarts,
                "recover_on_exit_codes": [EXIT_INTERRUPTED],
            },
        },
        "file_mounts": {str(job.code): ".", str(job.shared): {"source": bucket, "mode": "MOUNT"}},
        "envs": dict(job.environment),
        "setup": SETUP.format(code=shlex.quote(str(job.code)), extra="tpu" if is_tpu else "gpu"),
        "run": RUN + f"cd {shlex.quote(str(job.shared))}\nexec {shlex.join(job.command)}\n",
    }


def task_text(job: PodJob, bucket: str) -> str:
    """The task as YAML."""
    return manifest_text(task(job, bucket))


def submit_command(file: str) -> str:
    """How the task is handed in, as a managed job that recovers."""
    return shlex.join(["sky", "jobs", "launch", file])
