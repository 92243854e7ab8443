"""A sweep of a tiny grid: real runs, one of which cannot work; going on; the report."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import app
from scipy import stats

from launch.app import EXIT_INTERRUPTED
from launch.sweep_report import draw, estimate, write_report
from launch.sweep_runs import experiment_of, load, missing, runs_of, train
from tml.checkpoint_pieces import committed_steps
from tml.config import Grid, to_json

ROOT = Path(__file__).parents[2]

GRID = """
from tml.config import Grid


def get_grid():
    return Grid(
        question="Is <this> well?",
        base="experiments/quickstart.py",
        common={{
            "train.num_steps": {steps},
            "train.log_every": 1,
            "optim.warmup_steps": 0,
            "train.eval_every": 2,
            "train.eval_batches": 1,
            "train.checkpoint_every": 2,
            "model.num_layers": 2,
            "model.global_layers": (1,),
            "text.tokenizer": "{folder}/tokenizer",
            "text.train_vocab_size": 512,
            "data.sources.requests.path": "{folder}/data",
            "data.eval_sources.requests.path": "{folder}/data",
            "evaluation.sessions": "",
        }},
        variants={{
            "tick": {{"turn.boundary": "tick"}},
            "absent": {{"data.sources.requests.path": "{folder}/absent"}},
        }},
        seeds=(0,),
        measures=("eval/loss_text",),
    )
"""


def environment() -> dict[str, str]:
    """That of these tests, on one device."""
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    return {**os.environ, "XLA_FLAGS": flags}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_a_sweep_trains_goes_on_and_reports_what_failed(tmp_path: Path) -> None:
    made = run("launch.synthesize", "--task=requests", f"--out={tmp_path}/data", "--num_sessions=12", "--num_workers=1")
    assert made.returncode == 0, made.stderr
    grid, workdir = tmp_path / "grid.py", tmp_path / "runs"
    grid.write_text(GRID.format(steps=2, folder=tmp_path))

    first = run("launch.sweep", f"--grid={grid}", f"--workdir={workdir}")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "1 of 2 runs are done, 1 are not" in first.stdout
    report = json.loads((workdir / "report.json").read_text())
    assert list(report["failed"]) == ["absent/seed-0"]
    assert "absent" in report["failed"]["absent/seed-0"]
    assert report["config"]["turn.boundary"] == {"tick": "tick", "absent": "none"}
    assert set(report["config"]) == {"turn.boundary", "data.sources.requests.path"}
    assert set(report["final"]["eval/loss_text"]) == {"tick"}
    page = (workdir / "report.html").read_text()
    assert all(text in page for text in ("Is &lt;this&gt; well?", "<svg", "absent/seed-0"))
    assert not re.search(r'(src|href)="(?!#)', page), "the page needs another file"

    # Nothing is trained twice, and nothing longer than it was meant to be.
    log = (workdir / "tick/seed-0/log.txt").read_text()
    again = run("launch.sweep", f"--grid={grid}", f"--workdir={workdir}")
    assert "tick/seed-0: done" in again.stdout
    assert (workdir / "tick/seed-0/log.txt").read_text() == log
    grid.write_text(GRID.format(steps=4, folder=tmp_path))
    longer = run("launch.sweep", f"--grid={grid}", f"--workdir={workdir}")
    assert longer.returncode == 1
    assert "(train.num_steps was 2 and is 4); delete it, or name another --workdir" in longer.stdout
    assert (workdir / "tick/seed-0/log.txt").read_text() == log


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_in_the_middle_of_a_run(tmp_path: Path) -> None:
    made = run("launch.synthesize", "--task=requests", f"--out={tmp_path}/data", "--num_sessions=12", "--num_workers=1")
    assert made.returncode == 0, made.stderr
    grid, workdir = tmp_path / "grid.py", tmp_path / "runs"
    grid.write_text(re.sub(r'\n *"absent".*', "", GRID.format(steps=40, folder=tmp_path)))
    log = workdir / "tick/seed-0/log.txt"
    command = [sys.executable, "-m", "launch.sweep", f"--grid={grid}", f"--workdir={workdir}"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True) as process:
        while not (log.exists() and "step 4/40" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == EXIT_INTERRUPTED
    stopped_at = max(committed_steps(workdir / "tick/seed-0"))
    assert 4 <= stopped_at < 40
    again = run("launch.sweep", f"--grid={grid}", f"--workdir={workdir}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 of 1 runs are done" in again.stdout
    first, second = re.findall(r"(\d+) of 40 steps to go", log.read_text())
    assert (int(first), int(second)) == (40, 40 - stopped_at)
    [run_of_grid] = runs_of(load(str(grid), "get_grid"), workdir)
    assert run_of_grid.is_done


def test_a_grid_that_cannot_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    base = str(ROOT / "experiments/quickstart.py")
    misspelt = Grid(question="?", base=base, variants={"a": {"model.num_layer": 3}})
    with pytest.raises(app.UsageError) as refused:
        experiment_of(misspelt, "a", 0)
    begin = "variant 'a' of the grid: unknown key config.model.num_layer; did you mean num_layers"
    assert str(refused.value).startswith(begin)
    assert "'d_model'" not in str(refused.value), "not all keys, with their values"
    with pytest.raises(ValueError, match="variants"):
        Grid(question="?", base="", variants={})
    with pytest.raises(ValueError, match=r"'a/b'.*folders"):
        Grid(question="?", base="", variants={"a/b": {}})
    with pytest.raises(ValueError, match="repeat"):
        Grid(question="?", base="", variants={"a": {}}, seeds=(1, 1))
    (tmp_path / "broken.py").write_text("def get_grid(:")
    with pytest.raises(app.UsageError, match=r"broken.py cannot be read: SyntaxError"):
        load(str(tmp_path / "broken.py"), "get_grid")
    with pytest.raises(app.UsageError, match="no Python file"):
        load(str(tmp_path / "absent.py"), "get_grid")
    with pytest.raises(app.UsageError, match=r"quickstart.py defines no get_grid\(\)"):
        load(str(ROOT / "experiments/quickstart.py"), "get_grid")


def test_a_report_holds_finished_runs_of_this_grid_alone(tmp_path: Path) -> None:
    grid = Grid(
        question="?",
        base=str(ROOT / "experiments/quickstart.py"),
        variants={"a": {}, "b": {"optim.peak_lr": 1e-3}},
        common={"train.num_steps": 100},
        measures=("eval/loss",),
    )
    runs = runs_of(grid, tmp_path)
    for run in runs:
        run.folder.mkdir(parents=True)
        config = json.loads(to_json(run.experiment))
        del config["turn"]["slots"]  # as written before there was this key
        (run.folder / "config.json").write_text(json.dumps(config))
        steps = (50,) if run.name == "a/seed-2" else (50, 50, 100)
        lines = [{"step": step, "eval/loss": 300.0 / step + run.seed} for step in steps]
        (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    other = next(run for run in runs if run.name == "b/seed-0")
    (other.folder / "config.json").write_text(to_json(experiment_of(grid, "a", 0)))

    assert [run.name for run in runs if not run.is_done] == ["b/seed-0", "a/seed-2"]
    assert "optim.peak_lr was 0.006 and is 0.001" in train(other, grid, "")
    shorter = runs_of(dataclasses.replace(grid, common={"train.num_steps": 60}), tmp_path)[0]
    assert (shorter.is_done, shorter.changed) == (False, "train.num_steps was 100 and is 60")
    assert missing(runs[0], grid) == ""
    misspelt = dataclasses.replace(grid, measures=("eval/loss", "eval/los"))
    assert missing(runs[0], misspelt) == "measures names 'eval/los', which it did not measure; it has eval/loss"
    unfinished = next(run for run in runs if run.name == "a/seed-2")
    assert "has it data.eval_sources?" in missing(unfinished, grid)
    page = write_report(grid, runs, {"a/seed-2": "it <broke>"}, tmp_path).read_text()
    differs, _, failed = (re.findall(r"<t[hd]>(.*?)</t[hd]>", table) for table in page.split("<table>")[1:])
    assert differs == ["", "a", "b", "optim.peak_lr", "0.006", "0.001"]
    assert failed == ["run", "why", "a/seed-2", "it &lt;broke&gt;"]
    final = json.loads((tmp_path / "report.json").read_text())["final"]["eval/loss"]
    assert {name: (found["mean"], found["num_seeds"]) for name, found in final.items()} == {
        "a": (3.5, 2),
        "b": (4.5, 2),
    }


def test_a_figure_has_the_seeds_as_bands_and_finals_with_their_intervals() -> None:
    curves = {
        "a": [[{"step": 1, "eval/loss": 3.0}, {"step": 2, "eval/loss": 1.0}], [{"step": 1, "eval/loss": 5.0}]],
        "b": [[{"step": 1, "eval/loss": 4.0}]],
    }
    final = {"a": estimate([1.0, 2.0]), "b": estimate([4.0])}
    curve_axes, bar_axes = draw("eval/loss", curves, final).axes
    # Of step 2 one seed alone is known.
    assert [line.get_xydata().tolist() for line in curve_axes.lines] == [[[1.0, 4.0]], [[1.0, 4.0]]]
    spans = [band.get_paths()[0].get_extents() for band in curve_axes.collections]
    assert [(span.y0, span.y1) for span in spans] == [(3.0, 5.0), (4.0, 4.0)]
    assert [bar.get_height() for bar in bar_axes.patches] == [1.5, 4.0]
    [whole] = [container for container in bar_axes.containers if getattr(container, "errorbar", None)]
    [[low, high]] = [segment[:, 1].tolist() for segment in whole.errorbar.lines[2][0].get_segments()]
    assert (high - low) / 2 == pytest.approx(final["a"].half_width)


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "experiments/ablations").glob("[a-z]*.py")))
def test_every_grid_builds_its_experiments(name: str) -> None:
    grid = load(str(ROOT / f"experiments/ablations/{name}.py"), "get_grid")
    experiments = [experiment_of(grid, variant, seed) for variant in grid.variants for seed in grid.seeds]
    assert len({str(experiment) for experiment in experiments}) == len(experiments)


def test_an_estimate_is_students_interval() -> None:
    values = [1.0, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(values))
    found = estimate(values)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    assert math.isinf(estimate([3.0]).half_width)
