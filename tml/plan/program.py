"""The real programs of a run, compiled from shapes alone for devices that are not there."""

import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tml.batch import Batch, empty_rows, max_own_per_row, max_tiles_per_row
from tml.config import Experiment
from tml.microturn import Layout, SpecialTokens
from tml.plan.topology import Topology
from tml.stream import engine
from tml.stream.inputs import TurnInputs
from tml.stream.placement import served_params, stream_mesh
from tml.train_step import abstract_state, make_train_step

_OVER = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)")
_IN_HBM = re.compile(r"^Memory Space: default \(color=0\)\s+Total bytes: (\d+)", re.MULTILINE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one chip. What is donated counts once: as argument, not as output.

    Attributes:
        argument_bytes: state and batch.
        output_bytes: what is not written over an argument.
        temporary_bytes: at the worst moment, programs of the kernels included.
        is_refused: whether the compiler gave up for want of memory; then `temporary_bytes` is what it wanted in all.
    """

    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    is_refused: bool = False

    @property
    def total_bytes(self) -> float:
        """All of it."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program.

    Attributes:
        text: its scheduled HLO; empty when the compiler refused.
        memory: what it takes on a chip.
        compile_seconds: tracing and compiling on this machine.
    """

    text: str
    memory: Memory
    compile_seconds: float


def planned_layout(experiment: Experiment) -> Layout:
    """The layout of micro-turns without a tokenizer: which ids the special tokens have changes no cost."""
    special = SpecialTokens(**{f.name: number for number, f in enumerate(fields(SpecialTokens))})
    return Layout.of(experiment.turn, experiment.model, special)


def tiles_per_row(experiment: Experiment) -> int:
    """Places for image tiles in a row of a batch, as the loader makes it."""
    return max_tiles_per_row(planned_layout(experiment), experiment.data.row_slots)


def abstract_batch(experiment: Experiment) -> Batch:
    """Shapes and dtypes of a global batch."""
    own = max_own_per_row(planned_layout(experiment), experiment.data.row_slots)
    row = empty_rows(1, experiment.data.row_slots, tiles_per_row(experiment), experiment.model, own)
    rows = experiment.data.rows_per_batch
    return jax.tree.map(lambda column: jax.ShapeDtypeStruct((rows, *column.shape[1:]), column.dtype), row)


def compile_train_step(experiment: Experiment, mesh: Mesh, topology: Topology) -> Compiled:
    """Compiles the step that `launch.train` would run."""

    def lower() -> jax.stages.Lowered:
        step = cast(jax.stages.Wrapped, make_train_step(experiment, mesh))
        return step.lower(abstract_state(experiment, mesh), abstract_batch(experiment))

    return _compile(lower, topology)


def compile_decode_step(experiment: Experiment, topology: Topology, num_sessions: int) -> Compiled:
    """Compiles one micro-turn of `num_sessions` live sessions: the engine's step, its parameters ready to be served."""

    def lower() -> jax.stages.Lowered:
        layout, model, stream = planned_layout(experiment), experiment.model, experiment.stream
        mesh = stream_mesh(model, stream, topology.devices)
        step = engine.make_step(model, layout, stream, topology.devices)
        state = jax.eval_shape(lambda: engine.init_state(model, layout, stream, num_sessions))
        inputs = _abstract_inputs(experiment, num_sessions)
        return engine.jit_served_step(step, mesh, model.streamed, state).lower(
            served_params(experiment.model), state, inputs
        )

    return _compile(lower, topology)


def _abstract_inputs(experiment: Experiment, num_sessions: int) -> TurnInputs:
    layout, model, video = planned_layout(experiment), experiment.model, experiment.model.video
    slots = (num_sessions, layout.max_slots_in)
    tile = (video.frames_per_tile, video.tile_px, video.tile_px, 3)
    return TurnInputs(
        tokens_BW=jax.ShapeDtypeStruct(slots, jnp.int32),
        kinds_BW=jax.ShapeDtypeStruct(slots, jnp.uint8),
        levels_BWM=jax.ShapeDtypeStruct((*slots, model.audio.num_mels), jnp.uint8),
        tiles_BP=jax.ShapeDtypeStruct((num_sessions, layout.max_tiles_per_turn, *tile), jnp.int16),
        tile_index_BW=jax.ShapeDtypeStruct(slots, jnp.int32),
        counts_B=jax.ShapeDtypeStruct((num_sessions,), jnp.int32),
    )


def _compile(lower: Callable[[], jax.stages.Lowered], topology: Topology) -> Compiled:
    began = time.perf_counter()
    lowered = lower()
    with tempfile.TemporaryDirectory() as folder:
        dumping: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        options = {**topology.compiler_options, **(dumping if topology.chip.is_tpu else {})}
        try:
            compiled = lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            refused = refused_memory(str(error), topology)
            if refused is None:
                raise
            return Compiled(text="", memory=refused, compile_seconds=time.perf_counter() - began)
        reports = [path.read_text() for path in Path(folder).glob("*memory-usage-report.txt")]
    memory = _memory_of(compiled, hbm_of_report(reports[0]) if reports else None, topology)
    return Compiled(text=compiled.as_text() or "", memory=memory, compile_seconds=time.perf_counter() - began)


def _memory_of(compiled: jax.stages.Compiled, hbm_bytes: float | None, topology: Topology) -> Memory:
    """What a program takes; its buffers in HBM together are `hbm_bytes`, where the compiler reports it."""
    found = compiled.memory_analysis()
    assert found is not None, "the compiler states no memory"
    each = float(topology.chip.devices_per_chip)
    output_bytes = found.output_size_in_bytes - found.alias_size_in_bytes
    temporary_bytes = found.temp_size_in_bytes
    if hbm_bytes is not None:
        temporary_bytes = hbm_bytes - found.argument_size_in_bytes - output_bytes
    return Memory(
        argument_bytes=each * found.argument_size_in_bytes,
        output_bytes=each * output_bytes,
        temporary_bytes=each * (temporary_bytes + found.generated_code_size_in_bytes),
    )


def hbm_of_report(report: str) -> float | None:
    """Bytes in HBM by libtpu's report of a program's memory: what it holds against a chip's before it refuses.

    The temporaries of its `memory_analysis` (libtpu 0.0.42) are more: with them count the batch, and some 30 MB for
    every collective of the SparseCores, which is nowhere in HBM.
    """
    found = _IN_HBM.search(report)
    return float(found.group(1)) if found else None


def refused_memory(message: str, topology: Topology) -> Memory | None:
    """The memory that the compiler asked for in vain, where that is why it failed; libtpu says so in two ways."""
    found = _OVER.search(message)
    is_hbm = "hbm" in message.lower() or "HLO temporaries" in message
    if "RESOURCE_EXHAUSTED" not in message or found is None or not is_hbm:
        return None
    wanted = float(found.group(1)) * _UNITS[found.group(2)] * topology.chip.devices_per_chip
    return Memory(argument_bytes=0.0, output_bytes=0.0, temporary_bytes=wanted, is_refused=True)


def forget(compiled: Compiled, mesh: Mesh) -> None:
    """Keeps nothing of a compiled program but its estimate."""
