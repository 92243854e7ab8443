"""The device mesh and the two axis tables: where parameters live, and where activations live."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tml.config import MeshConfig
from tml.params import ParamSpec, PyTree, map_specs

ROW_AXES = ("replica", "fsdp", "expert")
"""Mesh axes over which rows are split outside the experts."""

PARAM_AXES: dict[str, str] = {"E": "expert", "D": "fsdp", "F": "tensor", "N": "tensor", "K": "tensor", "V": "tensor"}
"""Mesh axis of a parameter's dimension letter; letters that are not here are replicated."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh.

    Raises:
        ValueError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    wanted = math.prod(config.shape.values())
    if wanted != len(devices):
        raise ValueError(
            f"mesh {config.shape} needs {wanted} devices, but there are {len(devices)}; "
            f"the nearest valid mesh is {nearest_mesh(config, len(devices))}"
        )
    grid = np.array(devices).reshape(tuple(config.shape.values()))
    return Mesh(grid, tuple(config.shape), axis_types=(AxisType.Auto,) * len(config.shape))


def nearest_mesh(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The mesh for `num_devices` that keeps every axis that divides them and gives the rest to `fsdp`."""
    shape, left = {}, num_devices
    for axis in ("tensor", "context", "expert", "replica"):
        shape[axis] = math.gcd(config.shape[axis], left)
        left //= shape[axis]
    return {axis: left if axis == "fsdp" else shape[axis] for axis in config.shape}


def param_sharding(specs: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every parameter, from its dimension letters.

    Raises:
        ValueError: a sharded dimension is not divisible by its mesh axis.
    """
    return map_specs(lambda spec: NamedSharding(mesh, _partition(spec, mesh)), specs)


def _partition(spec: ParamSpec, mesh: Mesh) -> PartitionSpec:
    entries: list[str | None] = []
    for letter, size in zip(spec.axes, spec.shape, strict=True):
        axis = PARAM_AXES.get(letter)
        if axis is None or axis in entries or mesh.shape[axis] == 1:
            entries.append(None)
            continue
        if size % mesh.shape[axis]:
            raise ValueError(
                f"a parameter with axes {' '.join(spec.axes)} has {letter} = {size}, which mesh.{axis} = "
                f"{mesh.shape[axis]} does not divide; the nearest valid mesh.{axis} is "
                f"{math.gcd(size, mesh.shape[axis])}"
            )
        entries.append(axis)
    return PartitionSpec(*entries)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every field of a Batch: rows over the row axes."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and counters."""
    return NamedSharding(mesh, PartitionSpec())
