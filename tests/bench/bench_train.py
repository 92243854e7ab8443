"""Training tokens per second of the quickstart model, and its share of this machine's float32 matmul rate.

Run: python tests/bench/bench_train.py [experiments/quickstart.py]. Batches are made up and full, so the loader
does not count. The fastest and the median step are printed: other work on the machine slows the median.
"""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax
import numpy as np
from made_up import made_up_batch

from launch.app import prepare_jax
from tml.config import Experiment, from_config_dict
from tml.flops import measure_matmul_rate, row_flops
from tml.mesh import make_mesh
from tml.model import transformer
from tml.train_step import init_state, make_train_step, to_devices

NUM_STEPS = 12


def experiment_of(path: Path) -> Experiment:
    """The experiment of a config file."""
    spec = importlib.util.spec_from_file_location("experiment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config())


def measure(experiment: Experiment) -> None:
    """Compiles the step, times it, and prints what it reached."""
    mesh = make_mesh(experiment.mesh)
    began = time.perf_counter()
    state, step = init_state(jax.random.key(0), experiment, mesh), make_train_step(experiment, mesh)
    batch = to_devices(made_up_batch(experiment, 0), mesh)
    state, metrics = step(state, batch)
    jax.block_until_ready(state)
    first_s, times, rates = time.perf_counter() - began, [], []
    for _ in range(NUM_STEPS):
        rates.append(measure_matmul_rate(mesh.local_devices, seconds=0.1))
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    assert np.isfinite(float(metrics["grad_norm"]))
    data = experiment.data
    tokens = float(metrics["tokens"].total)
    flops = data.rows_per_batch * row_flops(transformer.specs(experiment.model), experiment.model, data.row_slots)
    for name, pick in (("fastest", min), ("median", statistics.median)):
        seconds, rate = pick(times), max(rates) if pick is min else statistics.median(rates)
        print(
            f"train {experiment.name}, {name} of {NUM_STEPS} steps: {tokens / seconds:,.0f} tokens/s, "
            f"{seconds:.3f} s a step of {data.rows_per_batch} x {data.row_slots}, "
            f"{flops / tokens / 1e6:.1f} MFLOP a token, "
            f"{flops / seconds / 1e9:.1f} GFLOP/s = {flops / seconds / rate / mesh.size:.1%} "
            f"of the measured {rate / 1e9:.0f} GFLOP/s"
        )
    print(f"first step after {first_s:.1f} s (initialisation and compilation, or the compile cache)", flush=True)


def main() -> None:
    """Measures the experiment that is named, or the quickstart."""
    prepare_jax()
    measure(experiment_of(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "experiments" / "quickstart.py"))


if __name__ == "__main__":
    main()
