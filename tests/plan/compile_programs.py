"""Programs whose cost is known by arithmetic, compiled for eight devices that stand in a cube."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tml.plan.chips import CHIPS
from tml.plan.hlo import Program, parse
from tml.plan.links import Fabric

V5P = CHIPS["v5p"]


def cube(sizes: tuple[int, int, int] = (2, 2, 2), wrap: bool = False) -> Fabric:
    coords = np.stack(np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij"), axis=-1).reshape(-1, 3)
    return Fabric(V5P, np.concatenate([np.zeros((len(coords), 1), int), coords], axis=1), (wrap,) * 3)


def mesh_of(**axes: int) -> Mesh:
    names, sizes = tuple(axes), tuple(axes.values())
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def array(shape: tuple[int, ...], mesh: Mesh, *axes: str | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def compile_program(function: Callable, *args: jax.ShapeDtypeStruct) -> Program:
    return parse(jax.jit(function).lower(*args).compile().as_text())
