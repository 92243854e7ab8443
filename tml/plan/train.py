"""The plan of a train step on a pod: its memory, its time, and what a run of it takes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from tml.config import Experiment
from tml.config.mesh import check_slices
from tml.flops import param_table, row_flops
from tml.mesh import make_mesh
from tml.model import transformer
from tml.plan.estimate import Estimate, estimate
from tml.plan.hlo import parse
from tml.plan.program import Compiled, Memory, compile_train_step, forget, tiles_per_row
from tml.plan.topology import Topology
from tml.train_step import abstract_state

SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """A train step on a pod.

    Attributes:
        experiment: what is planned.
        topology: where.
        mesh_shape: devices along each mesh axis.
        memory: bytes of one chip.
        state_bytes: parameters, moments and counters on one chip, by their shardings.
        least_state_bytes: the whole state divided by the chips of a replica.
        estimated: the time; None when the compiler refused.
        compile_seconds: tracing and compiling on this machine.
    """

    experiment: Experiment
    topology: Topology
    mesh_shape: dict[str, int]
    memory: Memory
    state_bytes: float
    least_state_bytes: float
    estimated: Estimate | None
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """Whether the step fits into the chip's memory."""
        return not self.memory.is_refused and self.memory.total_bytes <= self.topology.chip.hbm_bytes

    @property
    def tokens_per_step(self) -> int:
        """Positions of one step, padding included."""
        return self.experiment.data.rows_per_batch * self.experiment.data.row_slots

    @property
    def tokens_of_config(self) -> float:
        """Positions of all the steps that the config asks for."""
        return float(self.tokens_per_step * self.experiment.train.num_steps)

    @property
    def model_flops_per_step(self) -> float:
        """By the convention of `tml.flops`; image tower and flow head do not count."""
        model = self.experiment.model
        flops = row_flops(transformer.specs(model), model, self.experiment.data.row_slots)
        return flops * self.experiment.data.rows_per_batch

    def mfu(self, seconds: float) -> float:
        """Model FLOPs in so many seconds over what the chips could do."""
        return self.model_flops_per_step / (seconds * self.topology.num_chips * self.topology.chip.peak_flops_per_s)

    def numbers(self, num_tokens: float) -> dict[str, Any]:
        """Everything as plain values.

        Args:
            num_tokens: positions of the whole run, for its days and chip-hours.
        """
        whole = param_table(transformer.specs(self.experiment.model), self.experiment.model)[-1]
        chip, chips, data = self.topology.chip, self.topology.num_chips, self.experiment.data
        numbers: dict[str, Any] = {
            "experiment": self.experiment.name,
            "step": "train",
            "topology": self.topology.name,
            "slices": self.topology.num_slices,
            "chips": chips,
            "mesh": self.mesh_shape,
            "rows": data.rows_per_batch,
            "row_slots": data.row_slots,
            "remat": self.experiment.model.remat.value,
            "rows_per_chip": data.rows_per_batch / chips,
            "tile_places_per_row": tiles_per_row(self.experiment),
            "tokens_per_step": self.tokens_per_step,
            "params_total": whole.total,
            "params_active": whole.active,
            "params_multiplied": whole.multiplied,
            "fits": self.fits,
            "hbm_bytes_of_chip": chip.hbm_bytes,
            "hbm_bytes_per_chip": self.memory.total_bytes,
            "argument_bytes_per_chip": self.memory.argument_bytes,
            "output_bytes_per_chip": self.memory.output_bytes,
            "temporary_bytes_per_chip": self.memory.temporary_bytes,
            "state_bytes_per_chip": self.state_bytes,
            "least_state_bytes_per_chip": self.least_state_bytes,
            "compile_seconds": self.compile_seconds,
            "model_flops_per_step": self.model_flops_per_step,
            "mfu_convention": MFU_CONVENTION,
            "num_tokens_of_run": num_tokens,
        }
        return numbers | self._times(num_tokens)

    def _times(self, num_tokens: float) -> dict[str, Any]:
        names = ("step_seconds_estimate", "step_seconds_lower", "mfu_estimate", "mfu_bound", "tokens_per_s")
        found = self.estimated
        if found is None:
            return dict.fromkeys(names)
        run_seconds = num_tokens / self.tokens_per_step * found.seconds
        return {
            "step_seconds_estimate": found.seconds,
            "step_seconds_lower": found.lower_seconds,
            "lower_limit": found.lower_limit,
            "mfu_estimate": self.mfu(found.seconds),
            "mfu_bound": self.mfu(found.lower_seconds),
            "tokens_per_s": self.tokens_per_step / found.seconds,
            "days_of_run": run_seconds / SECONDS_PER_DAY,
            "chip_hours_of_run": run_seconds / 3_600 * self.topology.num_chips,
            **found.numbers(),
        }


MFU_CONVENTION = (
    "model FLOPs a row = 6 N S + 12 heads head_dim span a layer; N = parameters that a position multiplies; span = "
    "S^2/2 on global layers, S w - w^2/2 on sliding ones; blocks of multi-token prediction are layers, each with the "
    "unembedding once more; no recomputation, no image tower, no flow head"
)


def plan_train_step(
    experiment: Experiment, topology: Topology, keep: Callable[[Compiled, Mesh], None] = forget
) -> TrainPlan:
    """Compiles the train step of an experiment for a pod, and estimates it.

    `keep` gets the program before it is estimated: a compilation may take minutes.

    Raises:
        ValueError: the mesh of the experiment does not fit the pod.
    """
    mesh = make_mesh(experiment.mesh, topology.devices, experiment.splits)
    check_slices(experiment.mesh, topology.num_slices, experiment.splits)
    compiled = compile_train_step(experiment, mesh, topology)
    keep(compiled, mesh)
    fabric = topology.fabric(list(mesh.devices.flat))
    state_bytes, least_bytes = bytes_of_state(experiment, mesh)
    return TrainPlan(
        experiment=experiment,
        topology=topology,
        mesh_shape=dict(mesh.shape),
        memory=compiled.memory,
        state_bytes=state_bytes * topology.chip.devices_per_chip,
        least_state_bytes=least_bytes * topology.chip.devices_per_chip,
        estimated=estimate(parse(compiled.text), fabric) if compiled.text else None,
        compile_seconds=compiled.compile_seconds,
    )


def bytes_of_state(experiment: Experiment, mesh: Mesh) -> tuple[float, float]:
    """Bytes of the TrainState on one device: by its shardings, and if each replica's were split evenly."""
    leaves = jax.tree.leaves(abstract_state(experiment, mesh))
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    devices_of_replica = mesh.size // mesh.shape["replica"]
    return float(held), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / devices_of_replica
