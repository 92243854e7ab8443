"""Trains every run of a grid of ablations, one after another, and writes one report about all of them.

    python -m launch.sweep --grid=experiments/ablations/control.py --workdir=runs/ablations/control
    python -m launch.sweep --grid=experiments/ablations/control.py --workdir=runs/ablations/control --report_only

Runs lie in WORKDIR/VARIANT/seed-N, with the output of their commands in log.txt. The same command goes on where a sweep
stopped: runs that are done stay, a run that was interrupted continues, one that failed is tried again. A run that fails
does not stop the others; one that was trained with another config, also for fewer steps, has failed.
WORKDIR/report.html shows what differs between the configs, curves of held-out metrics with the seeds as bands, final
values with 95 % intervals over seeds, and the runs that failed; report.json holds the same.

Exit codes: 0 all runs are done, 1 some failed, 75 interrupted.
"""

from pathlib import Path

from absl import app, flags

from launch.app import output_folder, run_app
from launch.sweep_report import write_report
from launch.sweep_runs import load, missing, runs_of, train

_GRID = flags.DEFINE_string("grid", "", "A file that defines get_grid(), such as experiments/ablations/control.py.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the runs; runs/ablations/NAME by default.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Train nothing; write the report of what is there.")


def main(argv: list[str]) -> int:
    """Checks every config of the grid, trains what is not trained yet, writes the report."""
    if not _GRID.value:
        raise app.UsageError("--grid is missing; name a grid, as in --grid=experiments/ablations/control.py")
    grid = load(_GRID.value, "get_grid")
    workdir = output_folder("workdir", _WORKDIR.value or f"runs/ablations/{Path(_GRID.value).stem}")
    runs = runs_of(grid, workdir)
    print(f"{len(runs)} runs, {len(grid.variants)} variants of {grid.base} by {len(grid.seeds)} seeds, in {workdir}")
    failures: dict[str, str] = {}
    for index, run in enumerate(runs):
        progress = f"[{index + 1}/{len(runs)}] {run.name}"
        if run.is_done and not (error := missing(run, grid)):
            print(f"{progress}: done", flush=True)
        elif run.is_done:
            print(f"{progress}: FAILED, {error}", flush=True)
            failures[run.name] = error
        elif _REPORT_ONLY.value:
            failures[run.name] = "not trained to its end"
        elif error := train(run, grid, progress):
            failures[run.name] = error
    path = write_report(grid, runs, failures, workdir)
    print(f"{len(runs) - len(failures)} of {len(runs)} runs are done, {len(failures)} are not; report {path}")
    return 1 if failures else 0


if __name__ == "__main__":
    run_app(main)
