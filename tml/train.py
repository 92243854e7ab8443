"""The training loop, and what it shows: a first screen, a log that is one step late, a summary."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tml.batch import Batch
from tml.checkpoint import Checkpoints, opened, state_hash
from tml.config import Experiment, SourceConfig, config_hash, describe
from tml.flops import measure_matmul_rate, param_table, param_table_text, row_flops, token_flops
from tml.mesh import make_mesh
from tml.metrics import Sink, Window, duration, format_scalars, open_sinks, short_number
from tml.model import transformer
from tml.params import PyTree, fill_params
from tml.train_step import (
    EvalStep,
    Metrics,
    TrainState,
    first_state,
    init_state,
    make_eval_step,
    make_train_step,
    to_devices,
)

GROUPS = (
    ("loss", "train"),
    ("accuracy", "train"),
    ("grad_norm", "train"),
    ("lr", "train"),
    ("num_skipped", "train"),
    ("load", "moe"),
    ("dropped_fraction", "moe"),
    ("tokens", "data"),
    ("fill", "data"),
)
"""Under which name, and in which order, the metrics of a step are logged."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        state: the last state, which is also saved.
        is_interrupted: whether a signal ended the run before `num_steps`.
        scalars: the last logged metrics and evaluation.
    """

    state: TrainState
    is_interrupted: bool
    scalars: Mapping[str, float]


def train(
    experiment: Experiment,
    workdir: Path,
    train_batches: Callable[[int], Iterator[Batch]],
    eval_batches: Callable[[], Iterable[Batch]],
) -> TrainResult:
    """Trains from the newest checkpoint in `workdir`, or from the start, to `train.num_steps`.

    Args:
        experiment: the run.
        workdir: its folder; gets `checkpoints/`, `metrics.jsonl` and `tensorboard/`.
        train_batches: the batches from a given step on; batch k must depend on k alone.
        eval_batches: the held-out batches, the same every time.

    Raises:
        ValueError: the mesh does not fit the devices, or the checkpoint belongs to another model.
    """
    cfg, mesh = experiment.train, make_mesh(experiment.mesh, splits=experiment.splits)
    # A signal while the last save is written must not end it, so the checkpoints are left first.
    with make_interrupts() as interrupts, Checkpoints(workdir, cfg.keep_checkpoints) as checkpoints:
        first, state = start(experiment, mesh, checkpoints)
        with open_sinks(workdir, cfg.num_steps, first) as sinks:
            train_step, eval_step = make_train_step(experiment, mesh), make_eval_step(experiment, mesh)
            log = Log(experiment, mesh, sinks, first, int(state.num_skipped))
            show(first_screen(experiment, mesh, workdir, log.peak_flops_per_s, first))
            batches, step, saved = train_batches(first), first, checkpoints.latest_step()
            while step < cfg.num_steps and not interrupts.stop_at(step):
                with log.waiting_for_data():
                    batch = next(batches)
                state, metrics = train_step(state, to_devices(batch, mesh))
                step += 1
                log.add(step, metrics)
                checkpoints.check()
                if step % cfg.eval_every == 0 or step == cfg.num_steps:
                    with log.paused():
                        log.write(step, evaluate(eval_step, state.params, eval_batches(), mesh))
                if step % cfg.checkpoint_every == 0:
                    with log.paused():
                        checkpoints.save(state, experiment)
                        saved = step
            log.finish()
            if saved != step:
                checkpoints.save(state, experiment)
    result = TrainResult(state=state, is_interrupted=step < cfg.num_steps, scalars=log.latest)
    show(summary(result, workdir, step, time.monotonic() - log.start_time))
    return result


def show(text: str) -> None:
    """Prints, but on the first of several processes only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def start(experiment: Experiment, mesh: Mesh, checkpoints: Checkpoints) -> tuple[int, TrainState]:
    """The newest checkpoint, or a first state, drawn or from another run; also the number of steps it has made."""
    latest, origin = checkpoints.latest_step(), experiment.train.init_from
    if latest is not None:
        return latest, checkpoints.restore(experiment, mesh, latest)
    if not origin:
        return 0, init_state(jax.random.key(experiment.seed), experiment, mesh)
    with opened(Path(origin)) as others:
        trained, params, changed = others.first_params(experiment, mesh)
    show(f"beginning with the parameters of {origin} at step {trained}")
    if changed:
        show(f"which were of another model than this one: {describe(changed, most=30)}")
    params, drawn = fill_params(params, transformer.specs(experiment.model), jax.random.key(experiment.seed))
    if drawn:
        names = ", ".join(drawn[:3]) + (", …" if len(drawn) > 3 else "")
        show(f"which lack {len(drawn)} arrays of this model, drawn anew: {names}")
    return 0, first_state(params, experiment, mesh)


def evaluate(eval_step: EvalStep, params: PyTree, batches: Iterable[Batch], mesh: Mesh) -> dict[str, float]:
    """Means over held-out batches, named `eval/…`; nothing if there are none."""
    window = Window()
    for batch in batches:
        window.add(eval_step(params, to_devices(batch, mesh)))
    return grouped(window.take(), (("loss", "eval"), ("accuracy", "eval")))


def grouped(values: Mapping[str, float], groups: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The values whose name begins like one of the groups, in their order, as `group/name`."""
    return {f"{group}/{name}": values[name] for prefix, group in groups for name in values if name.startswith(prefix)}


class Log:
    """Collects metrics one step late, measures time, and writes both every `log_every` steps.

    The metrics of a step are fetched after the next one has been sent to the device, so that the
    device always has work while the host waits.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh, sink: Sink, first: int, num_skipped: int) -> None:
        """Begins after `first` steps, of which `num_skipped` were not finite."""
        cfg, devices = experiment.train, mesh.local_devices
        specs = transformer.specs(experiment.model)
        self.peak_flops_per_s = cfg.peak_flops_per_s or measure_matmul_rate(devices)
        self.latest: dict[str, float] = {}
        self.start_time = time.monotonic()
        self._cfg, self._sink, self._window = cfg, sink, Window()
        self._batch_flops = (
            row_flops(specs, experiment.model, experiment.data.row_slots) * experiment.data.rows_per_batch
        )
        self._all_peak_flops_per_s = self.peak_flops_per_s * mesh.size
        self._pending: tuple[int, Metrics] | None = None
        self._first, self._num_skipped = first, num_skipped
        self._restart_clock()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of the step just sent, and handles those of the step before."""
        self._settle()
        self._pending = (step, metrics)
        if step == self._first + 1:
            self._settle()
            show(f"first step {time.monotonic() - self.start_time:.1f} s after the start of the loop")
            self._restart_clock()  # the first step also compiles

    def _settle(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = self._window.add(metrics)
        self._steps += 1
        self._tokens += values["tokens"]
        if values["num_skipped"] > self._num_skipped:
            self._num_skipped = int(values["num_skipped"])
            print(f"step {step} was not finite and changed nothing ({self._num_skipped} so far)", file=sys.stderr)
        if step % self._cfg.log_every == 0 or step == self._cfg.num_steps:
            self._write_window(step)

    def _write_window(self, step: int) -> None:
        scalars = grouped(self._window.take(), GROUPS)
        seconds = time.monotonic() - self._clock_start
        if self._steps and seconds > 0:
            flops_per_s = self._batch_flops * self._steps / seconds
            scalars |= {
                "throughput/tokens_per_s": self._tokens / seconds,
                "throughput/model_flops_per_s": flops_per_s,
                "throughput/mfu": flops_per_s / self._all_peak_flops_per_s,
                "throughput/step_s": seconds / self._steps,
                "throughput/data_wait_s": self._waited / self._steps,
                "throughput/eta_s": (self._cfg.num_steps - step) * seconds / self._steps,
            }
        self.write(step, scalars)
        self._restart_clock()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars now."""
        if scalars:
            self.latest |= scalars
            self._sink.write(step, scalars)

    def finish(self) -> None:
        """Handles the last step."""
        self._settle()

    def _restart_clock(self) -> None:
        self._clock_start, self._waited, self._steps, self._tokens = time.monotonic(), 0.0, 0, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for the next batch."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Settles the last step, then keeps the time inside out of the throughput."""
        self._settle()
        began = time.monotonic()
        yield
        self._clock_start += time.monotonic() - began


class Interrupts:
    """While entered, SIGTERM and Ctrl-C ask for an orderly end; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.requested = False

    def stop_at(self, step: int) -> bool:
        """Whether the run ends here, after `step` steps."""
        return self.requested

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come while the loop was printing.
        os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: finishing the step and saving\n".encode())


class SharedInterrupts:
    """The same for several processes: a signal to any of them ends all of them after the same step.

    jax.distributed takes SIGTERM as notice of a preemption, finds out how far every process has come, and names
    a step that none of them has passed; the devices do not wait for it. Ctrl-C becomes SIGTERM; a second one ends.
    """

    def stop_at(self, step: int) -> bool:
        """Whether the run ends here, after `step` steps. Every process must ask at every step."""
        reached = multihost_utils.reached_preemption_sync_point(step)
        if reached:
            print(f"SIGTERM: process {jax.process_index()} stops and saves at step {step}, as all do", file=sys.stderr)
        return reached

    def __enter__(self) -> "SharedInterrupts":
        self._before = signal.signal(signal.SIGINT, self._pass_on)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)


def make_interrupts() -> Interrupts | SharedInterrupts:
    """What listens for the end of this run, of one process or of several."""
    return Interrupts() if jax.process_count() == 1 else SharedInterrupts()


def first_screen(experiment: Experiment, mesh: Mesh, workdir: Path, peak_flops_per_s: float, first: int) -> str:
    """What is about to run: parameters, FLOPs, mesh, data, folder, and where the state comes from."""
    model, data, cfg = experiment.model, experiment.data, experiment.train
    specs = transformer.specs(model)
    flops_per_token = token_flops(specs, model, data.row_slots)
    device = mesh.devices.flat[0]
    origin = "stated" if cfg.peak_flops_per_s else "measured float32 matmuls"
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    new = f"new, parameters of {cfg.init_from}" if cfg.init_from else f"new, seed {experiment.seed}"
    checkpoint = workdir / "checkpoints" / str(first)
    resumed = f"resuming from {checkpoint}" if checkpoint.is_dir() else new
    lines = [
        param_table_text(param_table(specs, model)),
        f"flops    {short_number(flops_per_token)} per token (forward and backward, active experts, "
        f"row of {data.row_slots}); {short_number(flops_per_token * data.row_slots * data.rows_per_batch)} per step",
        f"mesh     {axes} on {mesh.size} {device.device_kind} device(s), "
        f"peak {short_number(peak_flops_per_s)}FLOP/s each ({origin})",
        f"batch    {data.rows_per_batch} rows of {data.row_slots}, in {cfg.grad_accum_steps} part(s)",
        f"data     {mixture_text(data.sources)}",
        f"held out {mixture_text(data.eval_sources)}",
        f"run      {experiment.name} ({config_hash(experiment)}) in {workdir}",
        f"state    {resumed}; {cfg.num_steps - first} of {cfg.num_steps} steps to go",
    ]
    return "\n".join(lines)


def mixture_text(sources: Mapping[str, SourceConfig]) -> str:
    """The sources with their shares."""
    total = math.fsum(source.weight for source in sources.values())
    parts = [f"{name} {source.weight / total:.0%} ({source.path})" for name, source in sources.items()]
    return ", ".join(parts) if parts else "none"


def summary(result: TrainResult, workdir: Path, step: int, seconds: float) -> str:
    """The last lines of a run."""
    how = "interrupted, saved" if result.is_interrupted else "finished"
    shown = {name: value for name, value in result.scalars.items() if name.startswith(("train/loss", "eval/"))}
    return (
        f"{how} at step {step} after {duration(seconds)}; state {state_hash(result.state)} "
        f"in {workdir / 'checkpoints' / str(step)}\n{format_scalars(shown)}"
    )
