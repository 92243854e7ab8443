"""Communication between the devices of a mesh, inside `jax.shard_map`; an axis of size 1 costs nothing.

Differentiation. The program of one device is differentiated as it stands, with the loss of the
device's own positions (divided by the devices that share them): the total is the sum over devices,
and every parameter counts as one copy a device. Then each collective's transpose is that of a
linear map on all devices together (all-gather and reduce-scatter are each other's, a sum is its
own), and a parameter's gradient is the sum of those of its copies (`sum_copies`). This is what
`shard_map` does with `check_vma=False`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tml.config import MeshConfig
from tml.mesh import copy_axes, split_axes
from tml.params import ParamSpec, PyTree, Update, map_specs


def gather_params(
    params: PyTree, specs: PyTree, mesh: MeshConfig, dtype: jnp.dtype, split_experts: bool = False
) -> PyTree:
    """Makes parameters whole, except along `tensor`, for the layer that uses them.

    Their gradients leave by reduce-scatter, the transpose of the gather.

    Matrices are gathered in the dtype they are multiplied in, which for bfloat16 halves the bytes
    of both directions.

    Args:
        params: this device's parts.
        specs: the parameters, as they are here (without a scanned layer axis).
        mesh: sizes of the axes.
        dtype: the compute dtype.
        split_experts: whether stacks of experts stay split along `expert`.
    """
    if mesh.num_devices == mesh.tensor:
        return params
    leaves, structure = jax.tree.flatten(map_specs(_Leaf, specs, params), is_leaf=_is_leaf)
    packs: dict[tuple, list[tuple[int, int]]] = {}
    whole = []
    for place, (spec, part) in enumerate(leaves):
        if spec.update is Update.MATRIX:
            part = part.astype(dtype)
        is_stack = split_experts and spec.update is Update.MATRIX
        gathers = [
            (dim, axes)
            for dim, (letter, axes) in enumerate(zip(spec.axes, split_axes(spec, mesh), strict=True))
            if axes and axes != ("tensor",) and not (letter == "E" and is_stack)
        ]
        first = int("E" in spec.axes[:1] and (is_stack or len(gathers) > 1))
        if len(gathers) == 1 and not first and not travels_alone(part.size // part.shape[gathers[0][0]]):
            ((dim, axes),) = gathers
            alone = place if part.size > MOST_PACKED_VALUES else None
            packs.setdefault((axes, part.dtype, alone), []).append((place, dim))
        else:
            for dim, axes in gathers:
                part = _gather_dim(part, dim, axes, min(dim, first), mesh)
        whole.append(part)
    for (axes, *_), members in packs.items():
        gathered = _gather_packed([jnp.moveaxis(whole[place], dim, 0) for place, dim in members], axes, mesh)
        for (place, dim), values in zip(members, gathered, strict=True):
            whole[place] = jnp.moveaxis(values, 0, dim)
    return jax.tree.unflatten(structure, whole)


class _Leaf(NamedTuple):
    """A parameter and this device's part of it."""

    spec: ParamSpec
    part: jax.Array


def _is_leaf(value: Any) -> bool:
    return isinstance(value, _Leaf)


PACK_ROWS, PACK_LANES = 16, 512
"""Packed parameters travel as rows of so many values, in multiples of so many rows: whole tiles of a TPU. Eight rows a
device libtpu (0.0.42) all-reduces on v6e, and with them what it joins to the same message."""


MOST_PACKED_VALUES = 2**16
"""Parts with more values are packed by themselves."""


def travels_alone(columns: int) -> bool:
    """Whether libtpu (0.0.42) reduce-scatters rows of so many values; else it reduces everything everywhere.

    Found by compiling for 8 x 8 x 8 chips: 128 times a power of two, or three times one. Not so the vocabulary's
    201,024, the image tower's 4,800 and 9,600, nor vectors.
    """
    odd = columns // (columns & -columns)
    return columns % 128 == 0 and odd in (1, 3)


def _gather_packed(parts: list[jax.Array], axes: tuple[str, ...], mesh: MeshConfig) -> list[jax.Array]:
    """Gathers parts along their first dimensions, side by side in one array: one message for all small parameters."""
    flat = jnp.concatenate([part.reshape(-1) for part in parts])
    packed = jnp.pad(flat, (0, -flat.size % (PACK_ROWS * PACK_LANES))).reshape(-1, PACK_LANES)
    # Without a barrier libtpu joins the scatter with the slice that takes the padding off: into a sum everywhere.
    packed = jax.lax.optimization_barrier(packed)
    whole = _all_gather(packed, axes, 0, mesh).reshape(mesh.product(axes), -1)
    ends = np.cumsum([part.size for part in parts]).tolist()
    return [whole[:, end - part.size : end].reshape(-1, *part.shape[1:]) for part, end in zip(parts, ends, strict=True)]


def _all_gather(part: jax.Array, axes: tuple[str, ...], dim: int, mesh: MeshConfig) -> jax.Array:
    """Makes one dimension whole, over several mesh axes at once, or one after another where there are slices.

    In a program for several slices libtpu (0.0.42) sums over all three axes of a torus everywhere, instead of
    scattering the sum; over fewer it scatters.
    """
    if mesh.replica == 1:
        return jax.lax.all_gather(part, axes, axis=dim, tiled=True)
    for axis in reversed(axes):
        part = jax.lax.all_gather(part, axis, axis=dim, tiled=True)
    return part


def _gather_dim(part: jax.Array, dim: int, axes: tuple[str, ...], first: int, mesh: MeshConfig) -> jax.Array:
    """Makes one dimension whole, in the layout that travels best; the views around it cost the small part's bytes.

    The dimension is moved to the front (behind the experts): else its parts may be narrower than a register's lanes.
    The dimensions behind are joined, because a matmul wants them as one, and to join them in the whole would move
    every value.
    """
    part = jnp.moveaxis(part, dim, first)
    behind = part.shape[first + 1 :]
    whole = _all_gather(part.reshape(*part.shape[: first + 1], -1), axes, first, mesh)
    return jnp.moveaxis(whole.reshape(*whole.shape[: first + 1], *behind), first, dim)


def sum_copies(grads: PyTree, specs: PyTree, mesh: MeshConfig) -> PyTree:
    """Adds up the gradients of the copies of every parameter; those that are split everywhere are left alone."""

    def add(spec: ParamSpec, grad: jax.Array) -> jax.Array:
        axes = copy_axes(spec, mesh)
        return jax.lax.psum(grad, axes) if axes else grad

    return map_specs(add, specs, grads)


def sum_over(values: PyTree, axes: Sequence[str], mesh: MeshConfig) -> PyTree:
    """The sum over the devices along some axes."""
    present = mesh.present(tuple(axes))
    return jax.lax.psum(values, present) if present else values


def highest_over(values: jax.Array, axis: str, mesh: MeshConfig) -> jax.Array:
    """The maximum over the devices along an axis; not to be differentiated."""
    return jax.lax.pmax(values, axis) if mesh.shape[axis] > 1 else values


def index_along(axis: str, mesh: MeshConfig) -> jax.Array:
    """The place of this device along an axis."""
    return jax.lax.axis_index(axis) if mesh.shape[axis] > 1 else jnp.int32(0)


def with_halo(part: jax.Array, num_slots: int, fill: int, mesh: MeshConfig) -> jax.Array:
    """Puts the `num_slots` slots that precede this device's in front of them; `fill` stands before the row's start.

    Args:
        part: this device's slots of every row, along axis 1.
        num_slots: how far back; it may reach over several devices.
        fill: what stands where no device precedes.
        mesh: sizes of the axes; slots are split over `context`.
    """
    size, local = mesh.context, part.shape[1]
    index = index_along("context", mesh)
    pieces, missing, hop = [part], num_slots, 1
    while missing:
        count = min(missing, local)
        piece = part[:, local - count :]
        if hop < size:
            piece = jax.lax.ppermute(piece, "context", [(source, source + hop) for source in range(size - hop)])
        piece = jnp.where(index >= hop, piece, jnp.full_like(piece, fill))
        pieces.insert(0, piece)
        missing, hop = missing - count, hop + 1
    return jnp.concatenate(pieces, axis=1)


def with_next(part: jax.Array, num_slots: int, fill: int, mesh: MeshConfig) -> jax.Array:
    """Puts the `num_slots` slots that follow this device's behind them; `fill` stands after the row's end.

    Args:
        part: this device's slots of every row, along axis 1.
        num_slots: how far ahead; it may reach over several devices.
        fill: what stands where no device follows.
        mesh: sizes of the axes; slots are split over `context`.
    """
    size, local = mesh.context, part.shape[1]
    index = index_along("context", mesh)
    pieces, missing, hop = [part], num_slots, 1
    while missing:
        count = min(missing, local)
        piece = part[:, :count]
        if hop < size:
            piece = jax.lax.ppermute(piece, "context", [(place + hop, place) for place in range(size - hop)])
        pieces.append(jnp.where(index < size - hop, piece, jnp.full_like(piece, fill)))
        missing, hop = missing - count, hop + 1
    return jnp.concatenate(pieces, axis=1)


def swap_split(part: jax.Array, split: int, whole: int) -> jax.Array:
    """Splits axis `split`, until now whole, over `context`, and makes axis `whole` whole."""
    return jax.lax.all_to_all(part, "context", split_axis=split, concat_axis=whole, tiled=True)
