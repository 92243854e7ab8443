"""The device mesh and the two axis tables: where parameters live, and where activations live."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tml.batch import Batch, OwnAudio
from tml.config import DATA_AXES, ROW_AXES, SHARD_AXES, MeshConfig, Split
from tml.config.mesh import check_slices, describe_nearest
from tml.params import ParamSpec, PyTree, map_specs

PARAM_AXES: dict[str, tuple[str, ...]] = {
    "E": ("expert",),
    "I": SHARD_AXES,
    "O": SHARD_AXES,
    "D": SHARD_AXES,
    "F": ("tensor",),
    "N": ("tensor",),
    "K": ("tensor",),
    "V": ("tensor",),
}
"""Mesh axes that split a parameter's dimension letter; letters that are not here are whole on every device.

A parameter uses a mesh axis once, for the first of its letters that asks for it: D of a stack of
experts, E D Z F, is split by `fsdp` and `context` only, E having taken `expert`.
"""

WHERE_EVEN = ("I", "O")
"""Letters that are split only where the mesh divides them: widths inside the image tower follow from its pixels."""

ACTIVATION_AXES: dict[str, tuple[str, ...]] = {
    "B": ROW_AXES,
    "S": ("context",),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}
"""Mesh axes that split an activation's dimension letter. The model runs inside `shard_map`, so this is no hint to a
partitioner: these are the parts that one device's program computes. The model dimension D is whole everywhere."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None, splits: Sequence[Split] = ()) -> Mesh:
    """Builds the mesh: the only place that orders devices.

    TPU devices are ordered along the links of their topology. Devices of several slices are
    ordered slice by slice along `replica`, the slowest axis.

    Args:
        config: sizes of the axes.
        devices: all devices by default.
        splits: what the mesh must divide (`Experiment.splits`), so that an error names a mesh that does.

    Raises:
        ValueError: the product of the axes is not the number of devices, or `replica` does not divide among slices.
    """
    devices = jax.devices() if devices is None else devices
    wanted = config.num_devices
    if wanted != len(devices):
        raise ValueError(
            f"mesh {config.shape} needs {wanted} devices, but there are {len(devices)}; "
            f"{describe_nearest(config, len(devices), splits, _num_slices(devices))}"
        )
    check_slices(config, _num_slices(devices), splits)
    return Mesh(_ordered(config, devices), tuple(config.shape), axis_types=(AxisType.Auto,) * len(config.shape))


def _ordered(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    sizes = tuple(config.shape.values())
    is_tpu, num_slices = devices[0].platform == "tpu", _num_slices(devices)
    if num_slices > 1:
        within, across = (config.replica // num_slices, *sizes[1:]), (num_slices, *(1 for _ in sizes[1:]))
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=is_tpu)
    if is_tpu:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return np.array(devices).reshape(sizes)


def _num_slices(devices: Sequence[jax.Device]) -> int:
    # XLA numbers the hosts of GPUs as slices too; GPUs stand in the order of their numbers, as the planner takes them.
    is_gpu = devices[0].platform in ("gpu", "cuda", "rocm")
    return 1 if is_gpu else len({getattr(device, "slice_index", 0) for device in devices})


def param_sharding(specs: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every parameter, from its dimension letters.

    Raises:
        ValueError: a sharded dimension is not divisible by its mesh axes.
    """
    return map_specs(lambda spec: NamedSharding(mesh, partition(spec, mesh_config(mesh))), specs)


def param_partition(specs: PyTree, mesh: MeshConfig) -> PyTree:
    """The partition of every parameter, from its dimension letters."""
    return map_specs(lambda spec: partition(spec, mesh), specs)


def mesh_config(mesh: Mesh) -> MeshConfig:
    """The sizes of a mesh's axes."""
    return MeshConfig(**mesh.shape)


def partition(spec: ParamSpec, mesh: MeshConfig) -> PartitionSpec:
    """The mesh axes of every dimension of a parameter; axes of size 1 are left out.

    Raises:
        ValueError: a sharded dimension is not divisible by its mesh axes.
    """
    return PartitionSpec(*(axes or None for axes in split_axes(spec, mesh)))


def split_axes(spec: ParamSpec, mesh: MeshConfig) -> list[tuple[str, ...]]:
    """The mesh axes that split each dimension of a parameter."""
    free = set(mesh.present(tuple(mesh.shape)))
    found = []
    for letter, size in zip(spec.axes, spec.shape, strict=True):
        axes = tuple(axis for axis in PARAM_AXES.get(letter, ()) if axis in free)
        if size % mesh.product(axes) and letter in WHERE_EVEN:
            axes = ()
        if size % mesh.product(axes):
            raise ValueError(
                f"a parameter with axes {' '.join(spec.axes)} has {letter} = {size}, which "
                f"{' * '.join(f'mesh.{axis}' for axis in axes)} = {mesh.product(axes)} does not divide; "
                f"the nearest valid product is {math.gcd(size, mesh.product(axes))}"
            )
        free -= set(axes)
        found.append(axes)
    return found


def activation_partition(letters: str) -> PartitionSpec:
    """The mesh axes of an activation's dimensions: `activation_partition("BSD")`."""
    return PartitionSpec(*(ACTIVATION_AXES.get(letter) for letter in letters))


def batch_partition(has_voice: bool = False) -> Batch:
    """The partition of every field of a Batch, from the letters of its name; with a voice it holds own audio."""

    def partitions(kind: type) -> dict[str, PartitionSpec]:
        return {f.name: activation_partition(f.name.rpartition("_")[2]) for f in fields(kind) if f.name != "own"}

    return Batch(**partitions(Batch), own=OwnAudio(**partitions(OwnAudio)) if has_voice else None)


def batch_sharding(mesh: Mesh, has_voice: bool = False) -> Batch:
    """The sharding of every field of a Batch: rows over the row axes, their positions over `context`."""
    return jax.tree.map(lambda entry: NamedSharding(mesh, entry), batch_partition(has_voice))


@dataclass(frozen=True, kw_only=True)
class RowPart:
    """Which rows of a batch a process loads. Processes that work on the same rows load the same part.

    Attributes:
        index: which part of the batch, of `count` equal ones.
        count: parts of the batch.
        groups: places, along the row axes of the mesh, of the devices that hold the part's rows, in their order.
    """

    index: int
    count: int
    groups: tuple[int, ...]


ALL_ROWS = RowPart(index=0, count=1, groups=(0,))
"""The part of a process that has none beside it."""


def row_part(mesh: Mesh, process_index: int) -> RowPart:
    """The rows that a process loads.

    Raises:
        ValueError: some processes share only a part of their rows, so that no equal parts exist.
    """
    num_groups = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    owners = np.array([device.process_index for device in mesh.devices.flat]).reshape(num_groups, -1)
    held = {
        process: tuple(np.flatnonzero((owners == process).any(axis=1)).tolist())
        for process in np.unique(owners).tolist()
    }
    parts = sorted(set(held.values()))
    if sum(map(len, parts)) != num_groups or len({len(groups) for groups in parts}) != 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)} gives the {len(held)} processes rows that overlap in part ({held}); "
            f"let mesh.context * mesh.tensor be a multiple or a divisor of the devices of one process"
        )
    mine = held[process_index]
    return RowPart(index=parts.index(mine), count=len(parts), groups=mine)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and counters."""
    return NamedSharding(mesh, PartitionSpec())


def copy_axes(spec: ParamSpec, mesh: MeshConfig) -> tuple[str, ...]:
    """The mesh axes along which devices hold copies of a parameter, whose gradients must be added up."""
    used = {axis for axes in split_axes(spec, mesh) for axis in axes}
    return tuple(axis for axis in mesh.present((*DATA_AXES, "tensor")) if axis not in used)
