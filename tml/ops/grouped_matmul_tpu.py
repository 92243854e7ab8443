"""Grouped matmul on TPU: jax's megablox kernels with their sizes made to fit.

Megablox (`jax.experimental.pallas.ops.tpu.megablox`; after Gale et al. 2022, arXiv:2211.15841) walks over tiles of
rows, of which a group's first and last are masked. It asks for rows in whole tiles, is wrong where the summed axis
is not, and leaves rows of no group unwritten: here the first two are padded and the last are set to zero.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int32

LANES = 128
"""Lanes of a vector register: tiles are multiples of it."""

TILE_ROWS, TILE_WIDTH = 512, 1_024
"""The largest tile of rows, and of either width: three of them, twice each, fill 20 MiB of vector memory."""


def _tile(size: int, unit: int, at_most: int) -> int:
    """The largest multiple of `unit` up to `at_most` that divides `size`, itself a multiple of `unit`."""
    return max(part for part in range(unit, min(size, at_most) + 1, unit) if size % part == 0)


def _padded(x: jax.Array, units: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, -size % unit) for size, unit in zip(x.shape, units, strict=True)])


def multiply_rows(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E _ _"],
    group_sizes_E: Int32[Array, "E"],
    is_transposed: bool = False,
    unit: int = LANES,
    interpret: bool = False,
) -> Float[Array, "R F"]:
    """Every row times the matrix of its group (or its transpose), summed in float32; anything in rows of no group."""
    num_rows, width = x_RD.shape[0], w_EDF.shape[1 if is_transposed else 2]
    x, w = _padded(x_RD, (unit, unit)), _padded(w_EDF, (1, unit, unit))
    tiling = (
        _tile(x.shape[0], unit, TILE_ROWS),
        _tile(x.shape[1], unit, TILE_WIDTH),
        _tile(w.shape[1 if is_transposed else 2], unit, TILE_WIDTH),
    )
    # Megablox mixes dtypes and ranks in its own arithmetic.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = gmm(x, w, group_sizes_E, x.dtype, tiling, transpose_rhs=is_transposed, interpret=interpret)
    return out[:num_rows, :width]


def multiply_groups(
    x_RD: Float[Array, "R D"],
    y_RF: Float[Array, "R F"],
    group_sizes_E: Int32[Array, "E"],
    unit: int = LANES,
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """The transposed rows of each group in x times those in y, summed in float32."""
    depth, width = x_RD.shape[1], y_RF.shape[1]
    x, y = _padded(x_RD, (unit, unit)), _padded(y_RF, (unit, unit))
    tiling = (
        _tile(x.shape[0], unit, TILE_ROWS),
        _tile(x.shape[1], unit, TILE_WIDTH),
        _tile(y.shape[1], unit, TILE_WIDTH),
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = tgmm(x.swapaxes(0, 1), y, group_sizes_E, x.dtype, tiling, interpret=interpret)
    return out[:, :depth, :width]
