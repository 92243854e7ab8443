"""A tiny Inkling beside `transformers`' with the same weights on CPU: training, one decoded token, eight appended ones.

Run: GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1 python -m tests.bench.bench_inkling [--rounds=12]
[--only=training|decode|append] [--experts=eager|grouped_mm], twice, for the reasons that bench_moe names.
Six layers of width 256 (the first dense, of 1024; the last global), 4/2 heads of 64, window 128, extent 256, 32 experts
top-6 and 2 shared of width 256, vocabulary 8192, float32. Training: 8 rows of 512, cross entropy, backward, AdamW.
Decoding and appending: one session with 256 positions cached. The weights are imported from what `transformers` saves;
logits of rows and of the cached steps are compared first (1e-4), and both losses. The two sides take turns, in training
each in a process of its own: what one leaves in the heap would slow the other.

Wanted: twice the training tokens per second, half the latency of decoding, two thirds of that of appending. FLOPs per
token are those of `tml.flops`, alike on both sides. Training is put beside the float32 matmul rate of either library in
the same run, latencies beside the rate at which memory is read: weights that a step needs, once each, over its time.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests")]

import jax
import jax.numpy as jnp
import numpy as np
import torch
from inkling_oracle import oracle_of
from transformers.cache_utils import DynamicCache

from launch.app import prepare_jax
from tml import checkpoint
from tml.batch import Batch, empty_rows
from tml.config import (
    AttentionConfig,
    AudioConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Optimizer,
    VideoConfig,
)
from tml.export.inkling_import import import_folder
from tml.flops import measure_matmul_rate, param_table, row_flops
from tml.mesh import make_mesh, param_sharding
from tml.microturn import Kind, Target
from tml.model import cache, transformer
from tml.train_step import first_state, make_train_step, to_devices

ROWS, SLOTS = 8, 512
CACHED, APPENDED = 256, 8
MAX_POSITIONS = 512

MODEL = ModelConfig(
    num_layers=6,
    num_dense_layers=1,
    global_layers=(5,),
    d_model=256,
    dense_dim=1_024,
    vocab_size=8_192,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, window=128, global_extent=256),
    moe=MoEConfig(num_experts=32, num_experts_per_token=6, num_shared_experts=2, expert_dim=256, block_rows=64),
    audio=AudioConfig(num_mels=1, num_levels=2),
    video=VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(64, 64), max_tiles_per_turn=1),
    scan_layers=False,
)
OPTIM = OptimConfig(optimizer=Optimizer.ADAMW, peak_lr=1e-4, warmup_steps=1, max_grad_norm=1.0)

Timed = Callable[[], None]


def text_rows(tokens_BS: np.ndarray) -> Batch:
    """Rows of one segment of text each, every position with the next token as its target."""
    batch = empty_rows(*tokens_BS.shape, 1, MODEL)  # a model with eyes wants places for tiles
    batch.tokens_BS[:], batch.kinds_BS[:], batch.segment_ids_BS[:] = tokens_BS, Kind.TOKEN, 1
    batch.positions_BS[:] = np.arange(tokens_BS.shape[1])
    batch.targets_BS[:, :-1] = tokens_BS[:, 1:]
    batch.target_kinds_BS[:, :-1], batch.loss_weights_BS[:, :-1] = Target.TEXT, 1.0
    return batch


def slots_of(tokens_BW: np.ndarray) -> cache.Slots:
    """Tokens as slots to append."""
    num_rows, width = tokens_BW.shape
    return cache.slots_of(jnp.asarray(tokens_BW, jnp.int32), jnp.full(num_rows, width, jnp.int32), MODEL)


class Pair:
    """Both sides with the same weights, and the tokens they are fed."""

    def __init__(self, experts: str) -> None:
        self.theirs = oracle_of(MODEL)
        self.theirs.set_experts_implementation(experts)
        with tempfile.TemporaryDirectory() as folder:
            self.theirs.save_pretrained(f"{folder}/in")
            experiment = import_folder(Path(f"{folder}/in"), Path(f"{folder}/run"))
            self.params = checkpoint.restore(Path(f"{folder}/run"))[1]
        assert experiment.model.moe.num_experts == MODEL.moe.num_experts
        self.tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (ROWS, SLOTS))

    def check_rows(self) -> None:
        """The same logits of a row."""
        with torch.no_grad():
            wanted = self.theirs(input_ids=torch.from_numpy(self.tokens[:1])).logits.numpy()
        ours = jax.jit(lambda params, batch: transformer.apply(params, batch, MODEL).logits_BSV)
        compare("logits of a row", ours(self.params, text_rows(self.tokens[:1])), wanted)

    def train_ours(self) -> Callable[[], float]:
        """A step of ours, which returns the loss: forward, backward, update."""
        data = DataConfig(row_slots=SLOTS, rows_per_batch=ROWS)
        experiment = Experiment(name="inkling", model=MODEL, data=data, optim=OPTIM)
        mesh = make_mesh(experiment.mesh)
        step = make_train_step(experiment, mesh)
        batch = to_devices(text_rows(self.tokens), mesh)
        params = jax.device_put(self.params, param_sharding(transformer.specs(MODEL), mesh))
        state = first_state(params, experiment, mesh)

        def run() -> float:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
            return float(metrics["loss_text"].total / metrics["loss_text"].count)

        return run

    def train_theirs(self) -> Callable[[], float]:
        """A step of theirs."""
        theirs, tokens = self.theirs.train(), torch.from_numpy(self.tokens)
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=OPTIM.peak_lr, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps)

        def run() -> float:
            optimizer.zero_grad()
            loss = theirs(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), OPTIM.max_grad_norm)
            optimizer.step()
            return loss.item()

        return run

    def stepping(self, num_tokens: int) -> tuple[Timed, Timed]:
        """A cached step of one session of either side; each call goes on from the same state, after `CACHED` tokens."""
        prompt, more = self.tokens[:1, :CACHED], self.tokens[:1, CACHED : CACHED + num_tokens]
        append = jax.jit(lambda params, state, slots: cache.append(params, state, slots, MODEL), donate_argnums=1)
        state, slots = cache.init_state(MODEL, 1, MAX_POSITIONS, APPENDED), slots_of(more)
        for first in range(0, CACHED, APPENDED):
            state, _ = append(self.params, state, slots_of(prompt[:, first : first + APPENDED]))
        memory = DynamicCache(config=self.theirs.config.get_text_config())
        with torch.inference_mode():
            self.theirs(input_ids=torch.from_numpy(prompt), cache=memory, use_cache=True)
        ids, found = torch.from_numpy(more), {}

        def ours() -> None:
            nonlocal state
            state, logits = append(self.params, state, slots)
            found["ours"] = np.asarray(logits)

        def torch_step() -> None:
            with torch.inference_mode():
                found["theirs"] = self.theirs(input_ids=ids, cache=memory, use_cache=True).logits.numpy()

        for _ in range(2):
            ours(), torch_step()
            compare(f"logits of {num_tokens} cached", found["ours"], found["theirs"])
        return ours, torch_step


def compare(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """The same thing is timed only if the same comes out."""
    np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=what)
    print(f"{what}: alike, largest difference {np.abs(np.asarray(ours) - theirs).max():.1e}", flush=True)


def seconds(run: Timed) -> float:
    """One call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def torch_matmul_rate(size: int = 1_024) -> float:
    """The float32 matmul rate of torch in FLOP/s, the best of a few."""
    x = torch.ones(size, size)
    return 2.0 * size**3 / min(seconds(lambda: x @ x) for _ in range(12))


def read_rate(num_bytes: int) -> float:
    """Bytes a second that a sum over so many reads, the best of a few."""
    x, total = jnp.ones(num_bytes // 4, jnp.float32), jax.jit(jnp.sum)
    return num_bytes / min(seconds(lambda: total(x).block_until_ready()) for _ in range(12))


def weights_read(num_tokens: int) -> int:
    """Bytes of the weights that these positions multiply, each read once; experts as many as are expected to differ."""
    routed = 3 * MODEL.d_model * MODEL.moe.expert_dim * (MODEL.num_layers - MODEL.num_dense_layers)
    share = MODEL.moe.num_experts_per_token / MODEL.moe.num_experts
    distinct = MODEL.moe.num_experts * (1 - (1 - share) ** num_tokens)
    others = param_table(transformer.specs(MODEL), MODEL)[-1].multiplied - routed * MODEL.moe.num_experts_per_token
    return round(4 * (others + routed * distinct))


def take_turns(rounds: int, calls: int, sides: tuple[Timed, Timed]) -> tuple[list[float], list[float]]:
    """Seconds of every call, some calls of one side and then of the other."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, found in zip(sides, times, strict=True):
            found += [seconds(run) for _ in range(calls)]
    return times


def ratios(ours: list[float], theirs: list[float]) -> str:
    """Theirs over ours, of the medians and of the fastest."""
    median, fastest = (pick(theirs) / pick(ours) for pick in (statistics.median, min))
    return f"ratio of medians {median:.2f}, of the fastest {fastest:.2f}"


class Step(NamedTuple):
    """What a process says of one step: its loss, how long it took, and the matmul rate of its library just before."""

    loss: float
    seconds: float
    rate: float


def train(side: str, experts: str, asked: Connection) -> None:
    """A process of one side, which takes a step whenever it is asked."""
    prepare_jax()
    pair = Pair(experts)
    run = pair.train_ours() if side == "tml" else pair.train_theirs()
    del pair  # and with it the other side's weights
    while asked.recv():
        rate = measure_matmul_rate(jax.local_devices(), seconds=0.1) if side == "tml" else torch_matmul_rate()
        start = time.perf_counter()
        loss = run()
        asked.send(Step(loss, time.perf_counter() - start, rate))


def measure_training(experts: str, rounds: int) -> None:
    """Prints tokens per second of both sides."""
    flops = ROWS * row_flops(transformer.specs(MODEL), MODEL, SLOTS)
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    steps: dict[str, list[Step]] = {"tml": [], "transformers": []}
    for side in steps:
        pipes[side], asked = spawn.Pipe()
        processes.append(spawn.Process(target=train, args=(side, experts, asked), daemon=True))
        processes[-1].start()
        asked.close()
    for _ in range(rounds + 1):
        for side, found in steps.items():
            pipes[side].send(True)
            found.append(pipes[side].recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    compare("loss", steps["tml"][0].loss, steps["transformers"][0].loss)
    # The first step compiles.
    times = {side: [step.seconds for step in found[1:]] for side, found in steps.items()}
    for side, found in times.items():
        middle, rate = statistics.median(found), statistics.median(step.rate for step in steps[side][1:])
        print(
            f"training, {side}: {ROWS * SLOTS / middle:,.0f} tokens/s (fastest {ROWS * SLOTS / min(found):,.0f}), "
            f"{flops / ROWS / SLOTS / 1e6:.1f} MFLOP a token, {flops / middle / 1e9:.0f} GFLOP/s = "
            f"{flops / middle / rate:.0%} of its measured {rate / 1e9:.0f} GFLOP/s"
        )
    print(f"training: {ratios(times['tml'], times['transformers'])} (wanted 2)", flush=True)


def measure_steps(pair: Pair, name: str, num_tokens: int, rounds: int, calls: int, wanted: float) -> None:
    """Prints latencies of a cached step of both sides."""
    times = take_turns(rounds, calls, pair.stepping(num_tokens))
    num_bytes, flops = weights_read(num_tokens), 2 * param_table(transformer.specs(MODEL), MODEL)[-1].multiplied
    rate = read_rate(num_bytes)
    for side, found in zip(("tml", "transformers"), times, strict=True):
        middle = statistics.median(found)
        print(
            f"{name}, {side}: {middle * 1e3:.2f} ms (fastest {min(found) * 1e3:.2f}), {flops / 1e6:.1f} MFLOP a token, "
            f"{num_bytes / 1e6:.0f} MB of weights = {num_bytes / middle / rate:.0%} of the measured "
            f"{rate / 1e9:.1f} GB/s"
        )
    print(f"{name}: {ratios(*times)} (wanted {wanted:g})", flush=True)


def main() -> None:
    """Compares, then measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="turns that each side gets")
    parser.add_argument("--only", choices=("training", "decode", "append"), help="what to measure; all by default")
    parser.add_argument(
        "--experts", default="eager", help="how transformers runs experts: eager, grouped_mm or batched_mm"
    )
    flags = parser.parse_args()
    prepare_jax()
    if flags.only in (None, "training"):
        measure_training(flags.experts, flags.rounds)
    if flags.only == "training":
        return
    pair = Pair(flags.experts)
    pair.check_rows()
    if flags.only in (None, "decode"):
        measure_steps(pair, "decode of 1 token", 1, flags.rounds, 8, wanted=2.0)
    if flags.only in (None, "append"):
        measure_steps(pair, f"append of {APPENDED} tokens", APPENDED, flags.rounds, 2, wanted=1.5)


if __name__ == "__main__":
    main()
