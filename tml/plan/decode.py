"""The plan of a micro-turn of live sessions: append what came in, then decode so many positions one after another."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from tml.config import Experiment
from tml.flops import param_table
from tml.mesh import param_sharding
from tml.model import embed, transformer
from tml.model.live_weights import experts_chosen
from tml.plan.estimate import Estimate, estimate
from tml.plan.hlo import parse
from tml.plan.program import Compiled, Memory, compile_decode_step, forget, planned_layout
from tml.plan.topology import Topology
from tml.stream.placement import served_params, stream_mesh


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """A micro-turn of live sessions on a pod.

    Attributes:
        experiment: whose model streams.
        topology: where.
        mesh_shape: devices along each mesh axis.
        num_sessions: sessions, all of them live.
        output_positions: positions decoded one after another in a turn.
        memory: bytes of one chip.
        param_bytes: parameters on one chip, as they are served.
        estimated: the time; None when the compiler refused.
        compile_seconds: tracing and compiling on this machine.
    """

    experiment: Experiment
    topology: Topology
    mesh_shape: dict[str, int]
    num_sessions: int
    output_positions: int
    memory: Memory
    param_bytes: float
    estimated: Estimate | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits into the chip's memory."""
        return not self.memory.is_refused and self.memory.total_bytes <= self.topology.chip.hbm_bytes

    @property
    def most_sessions(self) -> int:
        """Sessions that fit, if all but the parameters grows with their number; 0 if not even those fit."""
        if self.memory.is_refused or self.param_bytes >= self.topology.chip.hbm_bytes:
            return 0
        each = (self.memory.total_bytes - self.param_bytes) / self.num_sessions
        return int((self.topology.chip.hbm_bytes - self.param_bytes) / each)

    def cache_bytes_per_minute(self) -> float:
        """What a session's global caches grow by in a minute of sound, without pictures or typed text."""
        model, layout = self.experiment.model, planned_layout(self.experiment)
        positions = layout.min_slots_in
        positions += max(self.output_positions + layout.own_positions_per_turn, layout.min_slots_out)
        attention, itemsize = model.attention, embed.compute_dtype(model).itemsize
        per_position = 2 * attention.num_kv_heads * attention.head_dim * itemsize * len(set(model.global_layers))
        return per_position * positions * 60_000 / layout.turn.turn_ms

    def numbers(self) -> dict[str, Any]:
        """Everything as plain values."""
        model, input_positions = self.experiment.model.streamed, planned_layout(self.experiment).max_slots_in
        whole = param_table(transformer.specs(model), model)[-1]
        found = self.estimated
        numbers: dict[str, Any] = {
            "experiment": self.experiment.name,
            "step": "decode",
            "topology": self.topology.name,
            "slices": self.topology.num_slices,
            "chips": self.topology.num_chips,
            "mesh": self.mesh_shape,
            "sessions": self.num_sessions,
            "most_sessions": self.most_sessions,
            "input_positions": input_positions,
            "output_positions": self.output_positions,
            "max_positions": self.experiment.stream.max_positions,
            "params_total": whole.total,
            "params_active": whole.active,
            "params_multiplied": whole.multiplied,
            "fits": self.fits,
            "hbm_bytes_of_chip": self.topology.chip.hbm_bytes,
            "hbm_bytes_per_chip": self.memory.total_bytes,
            "argument_bytes_per_chip": self.memory.argument_bytes,
            "output_bytes_per_chip": self.memory.output_bytes,
            "temporary_bytes_per_chip": self.memory.temporary_bytes,
            "param_bytes_per_chip": self.param_bytes,
            "cache_bytes_per_session_minute": self.cache_bytes_per_minute(),
            "experts_per_layer": model.moe.num_experts,
            "experts_read_per_layer": experts_chosen(self.num_sessions, model.moe),
            "experts_read_per_layer_of_input": experts_chosen(self.num_sessions * input_positions, model.moe),
            "compile_seconds": self.compile_seconds,
            "step_seconds_estimate": found.seconds if found else None,
            "step_seconds_lower": found.lower_seconds if found else None,
        }
        return numbers | ({"lower_limit": found.lower_limit, **found.numbers()} if found else {})


def plan_decode_step(
    experiment: Experiment,
    topology: Topology,
    num_sessions: int,
    output_positions: int,
    keep: Callable[[Compiled, Mesh], None] = forget,
) -> DecodePlan:
    """Compiles the engine's step for a pod, and estimates a turn in which so many positions are decoded.

    `keep` gets the program before it is estimated: a compilation may take minutes.

    Raises:
        ValueError: `stream.tensor` is not the number of devices, or does not divide the model.
    """
    mesh = stream_mesh(experiment.model, experiment.stream, topology.devices)
    compiled = compile_decode_step(experiment, topology, num_sessions)
    keep(compiled, mesh)
    fabric = topology.fabric(list(mesh.devices.flat))
    model = experiment.model.streamed
    params = jax.tree.leaves(served_params(model))
    shardings = jax.tree.leaves(param_sharding(transformer.specs(model), mesh))
    shapes = [sharding.shard_shape(leaf.shape) for leaf, sharding in zip(params, shardings, strict=True)]
    held = sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in zip(params, shapes, strict=True))
    return DecodePlan(
        experiment=experiment,
        topology=topology,
        mesh_shape=dict(mesh.shape),
        num_sessions=num_sessions,
        output_positions=output_positions,
        memory=compiled.memory,
        param_bytes=float(held) * topology.chip.devices_per_chip,
        # The engine's loop ends when every session is done, so its count is what we say it is.
        estimated=estimate(parse(compiled.text), fabric, output_positions) if compiled.text else None,
        compile_seconds=compiled.compile_seconds,
    )
