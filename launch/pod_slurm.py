"""A batch script for GPU clusters under Slurm: one task a host, which drives all of its GPUs."""

import shlex
from collections.abc import Mapping

from launch.pod_job import COORDINATOR_PORT, PodJob

WARNING_SIGNAL = "USR1"
"""What Slurm sends the script before the time is up. A cancelled job gets SIGTERM, which must not requeue it."""

WAIT_S = 120
"""Seconds that the other tasks get to end by themselves once one has ended; a crash would leave them waiting."""

PROCESS_SCRIPT = 'export TML_PROCESS_ID="$SLURM_PROCID"; exec "$@"'
"""Numbers the process by its task, then becomes the command."""

RUN = f"""\
# The first host of the allocation holds process 0, which the others look for.
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export TML_COORDINATOR_ADDRESS="${{hosts%%$'\\n'*}}:{COORDINATOR_PORT}"

# Before the time is up, the tasks save and end, and the job goes back into the queue.
requeue=no
trap 'requeue=yes; scancel --signal=TERM "$SLURM_JOB_ID"' {WARNING_SIGNAL}
"""

RESTART = """\
step=$!
code=0
wait "$step" || code=$?
# The trap ends a wait early, with the signal's code; the tasks' own is still to be had.
if [ "$requeue" = yes ] && [ "$code" -gt 128 ]; then
  code=0
  wait "$step" || code=$?
fi

# 0: done. 2: wrong flags, no better next time. 75: saved on someone's request, who does not want it back at once.
# Slurm counts every requeue; failures are counted here.
failures="$SLURM_JOB_ID.failures"
case "$requeue:$code" in
  yes:*) scontrol requeue "$SLURM_JOB_ID" ;;
  no:0 | no:2 | no:75) ;;
  *)
    failed="$(cat "$failures" 2>/dev/null || echo 0)"
    if [ "$failed" -lt "$MAX_RESTARTS" ]; then
      echo "$((failed + 1))" > "$failures"
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$code"
"""


def directives(job: PodJob, time_limit: str, partition: str, account: str) -> Mapping[str, str]:
    """The options of sbatch; those without a value have an empty one."""
    topology = job.topology
    optional = {"partition": partition, "account": account}
    return {
        "job-name": job.name,
        "nodes": str(topology.num_processes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(topology.chips_per_host),
        "exclusive": "",
        "time": time_limit,
        **{name: value for name, value in optional.items() if value},
        "signal": f"B:{WARNING_SIGNAL}@{job.grace_s}",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
        "chdir": str(job.shared),
    }


def sbatch_text(job: PodJob, time_limit: str, partition: str, account: str) -> str:
    """The batch script."""
    options = directives(job, time_limit, partition, account)
    lines = ["#!/usr/bin/env bash"]
    lines += [f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in options.items()]
    lines += ["", "set -euo pipefail", ""]
    for setting in job.settings:
        lines += [f"# {setting.reason}", f"export {setting.name}={shlex.quote(setting.value)}"]
    srun = [
        "srun",
        "--kill-on-bad-exit=0",
        f"--wait={WAIT_S}",
        "--label",
        "bash",
        "-c",
        PROCESS_SCRIPT,
        "train",
        *job.command,
    ]
    lines += [f"MAX_RESTARTS={job.max_restarts}", "", RUN, f"{shlex.join(srun)} &", RESTART]
    return "\n".join(lines)


def submit_command(file: str) -> str:
    """How the script is handed in."""
    return shlex.join(["sbatch", file])
