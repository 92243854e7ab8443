"""A batch script for GPU clusters under Slurm: one task a host, which drives all of its GPUs."""

import re
import shlex
from collections.abc import Mapping

from launch.pod_job import COORDINATOR_PORT, PodJob

WARNING_SIGNAL = "USR1"
"""What Slurm sends the script before the time is up. A cancelled job gets SIGTERM, which must not requeue it."""

WAIT_S = 120
"""Seconds that the other tasks get to end by themselves once one has ended; a crash would leave them waiting."""

MAX_GRACE_S = 65_535
"""The earliest that sbatch's --signal can warn."""

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

# 0: done. 2: wrong flags, no better next time. 75: saved, because the time is up, or on someone's request, who does not
# want it back at once. Slurm counts every requeue; failures are counted here.
failures="$SLURM_JOB_ID.failures"
case "$requeue:$code" in
  *:0 | *:2 | no:75) ;;
  yes:75) scontrol requeue "$SLURM_JOB_ID" ;;
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


def check_times(time_limit: str, grace_s: int, start_timeout_s: int) -> None:
    """Checks that an allocation has time to train between its start and the warning before its end.

    Without it a job would be requeued for ever and make no step.

    Args:
        time_limit: wall time of one allocation, as sbatch takes it.
        grace_s: seconds from the warning to the end.
        start_timeout_s: seconds that the hosts may wait for each other.

    Raises:
        ValueError: the limit is in no form of sbatch's or too short, or the warning is earlier than Slurm can send it.
    """
    if grace_s > MAX_GRACE_S:
        raise ValueError(f"--grace_s={grace_s} is more than the {MAX_GRACE_S} s before the end that Slurm can warn")
    limit_s = parse_time_limit(time_limit)
    if limit_s <= grace_s + start_timeout_s:
        raise ValueError(
            f"--time_limit={time_limit} is {limit_s} s, and must exceed --grace_s and --start_timeout_s together, "
            f"{grace_s} + {start_timeout_s} s; else an allocation may end before its first step"
        )


def parse_time_limit(text: str) -> int:
    """Seconds of a time limit: m, m:s, h:m:s, d-h, d-h:m or d-h:m:s (sbatch(1), --time).

    Raises:
        ValueError: none of these forms.

    Example:
        >>> parse_time_limit("1-12:30")
        131400
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text)
    if found is None:
        raise ValueError(f"--time_limit={text} is no time of sbatch's: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s")
    days, numbers = found.group(1), [int(number) for number in found.group(2).split(":")]
    units = (3_600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    seconds = sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return 86_400 * int(days or 0) + seconds


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
        "mem": "0",  # all of it; --exclusive gives all CPUs and GPUs, but the default share of memory
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
