"""The runs of a sweep: what each of them is, how far it is, and how it is made."""

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import app
from ml_collections import ConfigDict

from launch.app import EXIT_INTERRUPTED, check_key
from launch.child import run_child
from tml.config import Experiment, Grid, difference, from_config_dict, from_json, to_mapping

CONFIG, METRICS, LOG = "config.json", "metrics.jsonl", "log.txt"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a grid: a variant with a seed."""

    variant: str
    seed: int
    experiment: Experiment
    folder: Path

    @property
    def name(self) -> str:
        """As screen and report name it."""
        return f"{self.variant}/seed-{self.seed}"

    @property
    def curve(self) -> list[dict[str, float]]:
        """Held-out metrics by step, ascending; the last of a step counts, as runs go on after interruptions."""
        from tml.metrics import read_json_lines  # it imports jax, which takes seconds

        path = self.folder / METRICS
        found = read_json_lines(path) if path.exists() else ()
        by_step = {line["step"]: line for line in found if any(key.startswith("eval/") for key in line)}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def changed(self) -> str:
        """Where the config that its folder was trained with differs from the grid's.

        Also in its steps: what was trained longer than it had been meant to has had another learning rate.
        """
        path = self.folder / CONFIG
        if not path.exists():
            return ""
        try:
            then = from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{path} is not a config of this version: {error}"
        found = difference(to_mapping(then), to_mapping(self.experiment))
        return ", ".join(f"{key} was {old!r} and is {new!r}" for key, old, new in found)

    @property
    def is_done(self) -> bool:
        """Whether its last held-out metrics are those of its last step, with the grid's config."""
        return bool(self.curve) and self.curve[-1]["step"] == self.experiment.train.num_steps and not self.changed


def runs_of(grid: Grid, workdir: Path) -> list[Run]:
    """Every run of a grid, all variants of a seed before the next seed.

    Raises:
        app.UsageError: see `experiment_of`.
    """
    return [
        Run(variant=name, seed=seed, experiment=experiment_of(grid, name, seed), folder=workdir / name / f"seed-{seed}")
        for seed in grid.seeds
        for name in grid.variants
    ]


def load(path: str, function: str) -> Any:
    """What a function of a Python file returns.

    Raises:
        app.UsageError: there is no such file, it breaks, or there is no such function in it.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise app.UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise app.UsageError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not hasattr(module, function):
        raise app.UsageError(f"{path} defines no {function}()")
    return getattr(module, function)()


def experiment_of(grid: Grid, variant: str, seed: int) -> Experiment:
    """The experiment of one run.

    Raises:
        app.UsageError: an override names no key of the config, or the values do not fit together.
    """
    config: ConfigDict = load(grid.base, "get_config")
    changes = overrides(grid, variant, seed)
    try:
        for key in changes:
            check_key(key)
        config.update_from_flattened_dict(changes)
        return from_config_dict(config)
    except (app.UsageError, KeyError, TypeError, ValueError) as error:
        raise app.UsageError(f"variant {variant!r} of the grid: {error.args[0]}") from error


def overrides(grid: Grid, variant: str, seed: int) -> dict[str, Any]:
    """Dotted keys of the config and values in which a run differs from the base."""
    return {**grid.common, **grid.variants[variant], "seed": seed}


def missing(run: Run, grid: Grid) -> str:
    """What a run that was trained to its end has not measured of what the grid asks for; empty if nothing."""
    if not run.is_done:
        return "it was trained, but its last held-out metrics are not of its last step; has it data.eval_sources?"
    known = run.curve[-1]
    unknown = [name for name in grid.measures if name not in known]
    if unknown:
        names = ", ".join(name for name in known if name.startswith("eval/"))
        return f"measures names {unknown[0]!r}, which it did not measure; it has {names}"
    return ""


def train(run: Run, grid: Grid, progress: str) -> str:
    """Encodes the run's data and trains it; returns what failed, empty if nothing did.

    Raises:
        SystemExit: a signal stopped it.
    """
    if run.changed:
        error = f"{run.folder} was trained with another config ({run.changed}); delete it, or name another --workdir"
        print(f"{progress}: FAILED, {error}", flush=True)
        return error
    run.folder.mkdir(parents=True, exist_ok=True)
    changes = overrides(grid, run.variant, run.seed)
    config = [f"--config={grid.base}", *(f"--config.{key}={value}" for key, value in changes.items())]
    begun = time.monotonic()
    with (run.folder / LOG).open("a", encoding="utf-8") as log:
        for module, extra in (("launch.encode", []), ("launch.train", [f"--workdir={run.folder}", "--noprint_config"])):
            print(f"{progress}: {module}, output in {log.name}", flush=True)
            code, stopped_by = run_child(module, [*config, *extra], log)
            if stopped_by:
                print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
                raise SystemExit(EXIT_INTERRUPTED)
            if code:
                last = (run.folder / LOG).read_text(encoding="utf-8").strip().splitlines()[-1:]
                error = f"{module} ended with code {code}: {''.join(last)}"
                print(f"{progress}: FAILED, {error}", flush=True)
                return error
    if error := missing(run, grid):
        print(f"{progress}: FAILED, {error}", flush=True)
        return error
    final = run.curve[-1]
    values = ", ".join(f"{name.removeprefix('eval/')} {final[name]:.4g}" for name in grid.measures if name in final)
    print(f"{progress}: done in {time.monotonic() - begun:.0f} s, {values}", flush=True)
    return ""
