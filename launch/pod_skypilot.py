"""A SkyPilot task: GPUs on several nodes, or one TPU slice, of whatever cloud has them."""

import shlex
from typing import Any

from launch.app import EXIT_INTERRUPTED
from launch.pod_job import COORDINATOR_PORT, PodJob, manifest_text
from tml.xla_flags import Platform

SETUP = "cd {code} && python3 -m venv .venv && .venv/bin/pip install --quiet --editable '.[{extra},serve]'"
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


def task(job: PodJob, bucket: str) -> dict[str, Any]:
    """The task, as `sky jobs launch` takes it.

    Args:
        job: what runs.
        bucket: an object store's URI (gs://…, s3://…), mounted at `job.shared`.

    Raises:
        ValueError: a machine that SkyPilot cannot ask for.
    """
    check_machine(job)
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
