"""The report of a sweep: one HTML file that needs no other, and the same as JSON."""

import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from launch.sweep_runs import Run
from tml.config import Grid, to_mapping
from tml.config.tree import leaves
from tml.whole_folder import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds, with half of its 95 % interval (Student's t); infinite with one seed."""

    mean: float
    half_width: float
    num_seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of one value a seed."""
    from scipy import stats

    num = len(values)
    deviation = float(np.std(values, ddof=1)) if num > 1 else math.inf
    width = float(stats.t.ppf(0.5 + CONFIDENCE / 2, num - 1)) * deviation / math.sqrt(num) if num > 1 else math.inf
    return Estimate(mean=float(np.mean(values)), half_width=width, num_seeds=num)


def write_report(grid: Grid, runs: Sequence[Run], failures: Mapping[str, str], workdir: Path) -> Path:
    """Writes report.html and report.json; returns the path of the former.

    Args:
        grid: what was asked.
        runs: all runs, trained or not.
        failures: by the name of a run, what went wrong with it.
        workdir: where both go.
    """
    # Of a run that has not come to its end, nothing is drawn: its last value is one of another step.
    done = {name: [run.curve for run in runs if run.variant == name and run.is_done] for name in grid.variants}
    finals = {
        measure: {
            name: estimate(values)
            for name, of_seeds in done.items()
            if (values := [curve[-1][measure] for curve in of_seeds if measure in curve[-1]])
        }
        for measure in grid.measures
    }
    differing = _differences(runs)
    workdir.mkdir(parents=True, exist_ok=True)
    plain = {
        "question": grid.question,
        "base": grid.base,
        "config": differing,
        "final": {
            measure: {name: vars(found) | {"half_width": _finite(found.half_width)} for name, found in of.items()}
            for measure, of in finals.items()
        },
        "failed": dict(failures),
    }
    write_whole(workdir / "report.json", json.dumps(plain, indent=2) + "\n")
    sections = [
        f"<h1>{html.escape(grid.question)}</h1>",
        f"<p>{html.escape(grid.base)}, seeds {', '.join(map(str, grid.seeds))}</p>",
        "<h2>What differs</h2>"
        + _table(["", *grid.variants], [[key, *row.values()] for key, row in differing.items()]),
        "<h2>Final values, mean and 95 % interval over seeds</h2>"
        + _table(["", *grid.variants], _final_rows(grid, finals)),
        *(f"<h2>{html.escape(name)}</h2>" + _figure(name, done, finals[name]) for name in grid.measures),
        "<h2>Runs without a result</h2>"
        + (_table(["run", "why"], [[name, why] for name, why in failures.items()]) if failures else "<p>none</p>"),
    ]
    path = workdir / "report.html"
    write_whole(path, _PAGE.format(title=html.escape(grid.question), body="\n".join(sections)))
    return path


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse}}td,th{{border:1px solid #ccc;padding:.2em .6em;text-align:left}}svg{{max-width:100%}}
</style>{body}</html>
"""


def _differences(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """By key of the config, its value in every variant: only keys with different values, and not the seed."""
    configs = {run.variant: dict(leaves(to_mapping(run.experiment))) for run in runs}
    keys = sorted({key for config in configs.values() for key in config} - {"seed"})
    table = {key: {name: str(config.get(key, "")) for name, config in configs.items()} for key in keys}
    return {key: row for key, row in table.items() if len(set(row.values())) > 1}


def _final_rows(grid: Grid, finals: Mapping[str, Mapping[str, Estimate]]) -> list[list[str]]:
    return [
        [measure, *(_cell(finals[measure][name]) if name in finals[measure] else "-" for name in grid.variants)]
        for measure in grid.measures
    ]


def _cell(found: Estimate) -> str:
    width = f" ± {found.half_width:.2g}" if math.isfinite(found.half_width) else ""
    return f"{found.mean:.4g}{width} ({found.num_seeds})"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(cells)}</table>"


def _figure(measure: str, curves: Mapping[str, Sequence[list[dict[str, float]]]], final: Mapping[str, Estimate]) -> str:
    """What `draw` draws, as SVG."""
    return _svg(draw(measure, curves, final))


def draw(
    measure: str, curves: Mapping[str, Sequence[list[dict[str, float]]]], final: Mapping[str, Estimate]
) -> "Figure":
    """Curves with the seeds as bands on the left, final values with intervals on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    curve_axes, bar_axes = figure.subplots(1, 2, width_ratios=(2, 1))
    for index, (name, of_seeds) in enumerate(curves.items()):
        values = [{at["step"]: at[measure] for at in curve if measure in at} for curve in of_seeds]
        steps = sorted(set.intersection(*map(set, values)) if values else ())
        if steps:
            by_seed = np.array([[of[step] for step in steps] for of in values])
            curve_axes.plot(steps, by_seed.mean(0), color=f"C{index}", marker="o", markersize=3, label=name)
            curve_axes.fill_between(steps, by_seed.min(0), by_seed.max(0), color=f"C{index}", alpha=0.2, linewidth=0)
        if name in final:
            width = final[name].half_width
            error = width if math.isfinite(width) else None
            bar_axes.bar(index, final[name].mean, yerr=error, color=f"C{index}", capsize=4)
    curve_axes.set(xlabel="step", ylabel=measure)
    if curve_axes.lines:
        curve_axes.legend(fontsize="small")
    bar_axes.set_xticks(range(len(curves)), list(curves), rotation=20)
    return figure


def _svg(figure: "Figure") -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue().split("?>", 1)[-1]
