"""A parameter is described once: initialisation, sharding, counting, manifest and export derive from its ParamSpec."""

import enum
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tml.dims import DIMS

PyTree = Any
"""A tree of arrays, or of what stands in their place."""

Leaf = Any
"""One field of a pytree class: an array, or what jax puts in its place (a sharding, a shape, a placeholder)."""

STACK_AXES = ("L", "E", "A", "Z")
"""Axes that stack independent matrices; the rest of a MATRIX parameter is one matrix, sum axes by other axes."""

SMOOTH_STEPS = 4.0
"""Along a smooth axis, initial values this many places apart correlate by exp(-1/2)."""


class Init(enum.Enum):
    """Initial values. NORMAL has standard deviation 1/sqrt(fan-in), cut at 3 deviations."""

    NORMAL = "normal"
    ONES = "ones"
    ZEROS = "zeros"


class Update(enum.Enum):
    """Who moves a parameter: the optimizer's class of it, or a rule outside the gradient."""

    MATRIX = "matrix"
    """A layer's matrix: Muon if chosen, with weight decay."""
    EMBEDDING = "embedding"
    """Tables and heads: Adam with weight decay."""
    VECTOR = "vector"
    """Norms, convolutions, scalars: Adam without weight decay."""
    BALANCE = "balance"
    """The router's selection bias: moved by the load, never by a gradient."""


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter before any array exists.

    Attributes:
        axes: dimension letters (see `tml.dims`), one an axis.
        shape: sizes of those axes.
        init: initial values.
        sum_axes: the axes that a matmul sums over.
        update: the class of its update.
        smooth_axis: an axis of ordered places (levels of loudness, distances) along which NORMAL draws from a
            Gaussian process, so that neighbours begin alike and what one learns holds for the next; or empty.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    init: Init
    sum_axes: tuple[str, ...]
    update: Update
    smooth_axis: str = ""

    @property
    def fan_in(self) -> int:
        """Product of the axes that a matmul sums over."""
        return math.prod(size for axis, size in zip(self.axes, self.shape, strict=True) if axis in self.sum_axes)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def param(
    layout: str,
    sizes: Mapping[str, int],
    *,
    fan_in: str = "",
    init: Init = Init.NORMAL,
    update: Update = Update.MATRIX,
    smooth_axis: str = "",
) -> ParamSpec:
    """Describes a parameter by its axes: `param("E D F", sizes, fan_in="D")`.

    Args:
        layout: dimension letters, separated by spaces; empty for a scalar.
        sizes: the size of each letter.
        fan_in: letters that the matmul sums over; needed for NORMAL.
        init: initial values.
        update: the class of its update.
        smooth_axis: the letter along which initial values are smooth.
    """
    axes = tuple(layout.split())
    assert all(axis in DIMS for axis in axes), f"{layout!r} has a letter that tml.dims does not know"
    assert not smooth_axis or smooth_axis in axes, f"{layout!r} has no axis {smooth_axis!r}"
    assert fan_in or init is not Init.NORMAL, f"{layout!r} is drawn from a normal, so it needs a fan-in"
    return ParamSpec(
        axes=axes,
        shape=tuple(sizes[axis] for axis in axes),
        init=init,
        sum_axes=tuple(fan_in.split()),
        update=update,
        smooth_axis=smooth_axis,
    )


def scale(layout: str, sizes: Mapping[str, int]) -> ParamSpec:
    """A parameter that multiplies and starts at one: norms and learned scalars."""
    return param(layout, sizes, init=Init.ONES, update=Update.VECTOR)


def taps(layout: str, sizes: Mapping[str, int]) -> ParamSpec:
    """The taps of a residual short convolution; they start at zero, so that the convolution starts as identity."""
    return param(layout, sizes, init=Init.ZEROS, update=Update.VECTOR)


def stack(specs: PyTree, num_layers: int) -> PyTree:
    """Adds a leading layer axis to every spec of a tree, for `lax.scan`."""
    return map_specs(lambda spec: replace(spec, axes=("L", *spec.axes), shape=(num_layers, *spec.shape)), specs)


def map_specs(function: Callable[..., Any], specs: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` over a tree of ParamSpecs."""
    return jax.tree.map(function, specs, *rest, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))


def spec_leaves(specs: PyTree) -> list[tuple[str, ParamSpec]]:
    """Path (joined by "/") and spec of every parameter, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), spec) for path, spec in leaves]


def init_params(specs: PyTree, key: jax.Array, shardings: PyTree | None = None) -> PyTree:
    """Draws every parameter in float32, each born with its sharding.

    Each key is folded from the parameter's path, so that order does not matter. One small
    program is compiled a shape: the whole tree in one program takes half a minute to compile.
    """
    leaves = spec_leaves(specs)
    placed = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    drawn = [_draw(_key_of(key, path), spec, sharding) for (path, spec), sharding in zip(leaves, placed, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(map_specs(lambda spec: 0, specs)), drawn)


def fill_params(params: PyTree, specs: PyTree, key: jax.Array) -> tuple[PyTree, list[str]]:
    """Draws the parameters that are only shapes as `init_params` would; returns all of them, and the paths of these."""
    leaves, structure = jax.tree.flatten(params)
    drawn: list[str] = []
    for place, (path, spec) in enumerate(spec_leaves(specs)):
        if isinstance(leaves[place], jax.ShapeDtypeStruct):
            leaves[place] = _draw(_key_of(key, path), spec, leaves[place].sharding)
            drawn.append(path)
    return jax.tree.unflatten(structure, leaves), drawn


def _key_of(key: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def _draw(key: jax.Array, spec: ParamSpec, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if spec.init is not Init.NORMAL:
        constant = jax.jit(_constant, static_argnums=(0, 1), out_shardings=sharding)
        return constant(float(spec.init is Init.ONES), spec.shape)
    normal = jax.jit(_normal, static_argnums=(2, 3), out_shardings=sharding)
    smooth_axis = spec.axes.index(spec.smooth_axis) if spec.smooth_axis else None
    return normal(key, 1.0 / math.sqrt(spec.fan_in), spec.shape, smooth_axis)


def _normal(key: jax.Array, deviation: float | jax.Array, shape: tuple[int, ...], smooth_axis: int | None) -> jax.Array:
    values = jax.random.truncated_normal(key, -3.0, 3.0, shape, jnp.float32)
    if smooth_axis is not None:
        mixed = jnp.tensordot(values, _smoothing(shape[smooth_axis]), axes=(smooth_axis, 0))
        values = jnp.moveaxis(mixed, -1, smooth_axis)
    return values * deviation


def _smoothing(num_places: int) -> np.ndarray:
    """The square root of the covariance exp(-d^2 / (2 SMOOTH_STEPS^2)): mixes independent values into smooth ones."""
    places = np.arange(num_places)
    covariance = np.exp(-0.5 * ((places[:, None] - places[None]) / SMOOTH_STEPS) ** 2)
    variances, directions = np.linalg.eigh(covariance)
    return (directions * np.sqrt(np.maximum(variances, 0.0)) @ directions.T).astype(np.float32)


def _constant(value: float, shape: tuple[int, ...]) -> jax.Array:
    return jnp.full(shape, value, jnp.float32)


def abstract_params(specs: PyTree) -> PyTree:
    """Shapes and dtypes without arrays."""
    return map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), specs)


def count_params(specs: PyTree) -> int:
    """Number of values in a tree of specs."""
    return sum(spec.size for _, spec in spec_leaves(specs))
