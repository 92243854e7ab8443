"""Tries meshes, recomputation and rows a chip for a pod, and ranks what fits."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax

from tml.config import Experiment, MeshConfig, Remat
from tml.config.mesh import fits, meshes_of
from tml.mesh import make_mesh
from tml.plan.topology import Topology
from tml.plan.train import TrainPlan, bytes_of_state, plan_train_step

ROWS_PER_CHIP = (1, 2, 4, 8)
VARIED = ("mesh", "remat", "rows")


def check_varied(varied: Sequence[str]) -> None:
    """Raises ValueError unless all words are in VARIED."""
    unknown = [word for word in varied if word not in VARIED]
    if unknown:
        raise ValueError(f"search cannot vary {unknown[0]!r}; it can vary {', '.join(VARIED)}")


def candidates(experiment: Experiment, topology: Topology, varied: Sequence[str]) -> Iterator[Experiment]:
    """Every variant whose dimensions the mesh divides and whose state alone fits the chips.

    Meshes without `tensor` and `context` come first, then those with few of them; each next variant is the one that is
    least far down in all lists together, so that a search that ends early has tried some of everything.

    Args:
        experiment: what is varied.
        topology: the pod.
        varied: of VARIED; the rest stays as the experiment has it.

    Raises:
        ValueError: a word that is not in VARIED.
    """
    check_varied(varied)
    num_devices = len(topology.devices)
    meshes = all_meshes(num_devices, topology.num_slices) if "mesh" in varied else [experiment.mesh]
    remats = list(Remat) if "remat" in varied else [experiment.model.remat]
    rows = (
        [topology.num_chips * each for each in ROWS_PER_CHIP] if "rows" in varied else [experiment.data.rows_per_batch]
    )
    places = itertools.product(range(len(meshes)), range(len(remats)), range(len(rows)))
    for at in sorted(places, key=lambda at: (sum(at), at)):
        mesh, remat, num_rows = meshes[at[0]], remats[at[1]], rows[at[2]]
        varied_model = dataclasses.replace(experiment.model, remat=remat)
        varied_data = dataclasses.replace(experiment.data, rows_per_batch=num_rows)
        try:
            plain = dataclasses.replace(experiment, mesh=MeshConfig(), model=varied_model, data=varied_data)
            if not fits(mesh, plain.splits):
                continue
            variant = dataclasses.replace(plain, mesh=mesh)
        except ValueError:
            # Rows that its parts do not divide, or a mesh on which it cannot do what it is asked to.
            continue
        held, _ = bytes_of_state(variant, make_mesh(mesh, topology.devices))
        if held * topology.chip.devices_per_chip <= topology.chip.hbm_bytes:
            yield variant


def all_meshes(num_devices: int, num_slices: int) -> list[MeshConfig]:
    """Every way to split a slice's devices among the axes, `replica` going over slices only; the plainest first."""
    meshes = [mesh for mesh in meshes_of(num_devices) if mesh.replica == num_slices]
    return sorted(meshes, key=lambda mesh: (mesh.tensor, mesh.context, mesh.expert))


def search(
    experiments: Iterator[Experiment],
    topology: Topology,
    limit: int,
    failed: Callable[[Experiment, Exception], None] = lambda variant, error: None,
) -> Iterator[TrainPlan]:
    """Compiles and estimates the first `limit` variants, one after another; `failed` gets those that do not compile."""
    for variant in itertools.islice(experiments, limit):
        try:
            plan = plan_train_step(variant, topology)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            failed(variant, error)
        else:
            yield plan


def rank(plans: Sequence[TrainPlan]) -> list[TrainPlan]:
    """Those that fit, by tokens a second; then those that do not, by the memory they want."""

    def order(plan: TrainPlan) -> tuple[bool, float]:
        if not plan.fits or plan.estimated is None:
            return True, plan.memory.total_bytes
        return False, -plan.tokens_per_step / plan.estimated.seconds

    return sorted(plans, key=order)
