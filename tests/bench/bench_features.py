"""Hours of audio per second that become dMel levels on one core, beside this machine's float32 matmul rate.

Run: python -m tests.bench.bench_features (or by path). The bar is 1.5 hours per second. The fastest of
many short pieces is taken, so that other work on the machine does not count.
"""

import os

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import time
from collections.abc import Callable

import numpy as np

from tml.codec.audio import init_state, levels, log_mels, push
from tml.config import AudioConfig

BAR_HOURS_PER_S = 1.5
PIECE_S = 30
PIECES = 100


def fastest_s(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Prints the rate offline, the time of one streamed tick, and the matmul rate, all on one core."""
    cfg = AudioConfig()
    rng = np.random.default_rng(0)
    sound = (0.1 * rng.standard_normal(PIECE_S * cfg.sample_rate_hz)).astype(np.float32)
    offline_s = fastest_s(lambda: levels(log_mels(sound, cfg), cfg), PIECES)
    state, tick = init_state(cfg), sound[: cfg.sample_rate_hz // 5]
    tick_s = fastest_s(lambda: push(state, tick, cfg), PIECES)
    a = rng.standard_normal((1024, 1024)).astype(np.float32)
    matmul_s = fastest_s(lambda: a @ a, 20)
    hours_per_s = PIECE_S / 3600 / offline_s
    print(
        f"features: {hours_per_s:.2f} hours of audio per second on one core (bar {BAR_HOURS_PER_S}); "
        f"one streamed tick of 200 ms: {1e3 * tick_s:.2f} ms; "
        f"numpy float32 matmul on one core: {2 * 1024**3 / matmul_s / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
