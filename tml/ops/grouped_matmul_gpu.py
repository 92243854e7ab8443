"""Grouped matmul on GPU: Pallas kernels through Triton whose tiles begin where a group begins.

A tile of rows belongs to one group; which one, and which rows, is a table of ceil(rows of the group / tile) entries a
group, laid out for the worst case of R / tile + E. Entries beyond the last tile have no rows and write nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from tml.ops.kernel_cost import stated

TILE_ROWS, TILE_WIDTH, TILE_DEPTH = 64, 128, 64
"""Rows and columns of an output tile, and how much of the summed axis is read at a time."""

Ref = Any
"""Memory that a kernel reads and writes."""


def _tile(size: int, at_most: int) -> int:
    """The power of two that holds `size`, 16 at least (the least a tensor core takes) and `at_most` at most."""
    return max(16, min(at_most, pl.next_power_of_2(size)))


def _load(
    ref: Ref, rows: jax.Array, columns: jax.Array, end_row: jax.Array | int, end_column: int, *group: jax.Array
) -> jax.Array:
    """Reads a tile of a matrix, or of the matrix of a group; zero beyond its ends."""
    mask = (rows < end_row)[:, None] & (columns < end_column)[None, :]
    return plgpu.load(ref.at[(*group, rows[:, None], columns[None, :])], mask=mask, other=0.0)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """A product in float32, of float32 factors without TF32's rounding."""
    return plgpu.dot(x, y, allow_tf32=False)


def _rows_kernel(
    group_ref: Ref,
    first_ref: Ref,
    end_ref: Ref,
    x_ref: Ref,
    w_ref: Ref,
    out_ref: Ref,
    *,
    tiles: tuple[int, int, int],
    is_transposed: bool,
) -> None:
    tile_rows, tile_depth, tile_width = tiles
    depth, width = x_ref.shape[1], out_ref.shape[1]
    tile = pl.program_id(0)
    group, end = group_ref[tile], end_ref[tile]
    rows = first_ref[tile] + jnp.arange(tile_rows, dtype=jnp.int32)
    columns = pl.program_id(1) * tile_width + jnp.arange(tile_width, dtype=jnp.int32)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        inner = index * tile_depth + jnp.arange(tile_depth, dtype=jnp.int32)
        x = _load(x_ref, rows, inner, end, depth)
        if is_transposed:
            w = _load(w_ref, columns, inner, width, depth, group).T
        else:
            w = _load(w_ref, inner, columns, depth, width, group)
        return total + _dot(x, w)

    @pl.when(first_ref[tile] < end)
    def _() -> None:
        zero = jnp.zeros((tile_rows, tile_width), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(depth, tile_depth), add, zero)
        mask = (rows < end)[:, None] & (columns < width)[None, :]
        plgpu.store(out_ref.at[rows[:, None], columns[None, :]], total.astype(out_ref.dtype), mask=mask)


def _groups_kernel(
    first_ref: Ref, end_ref: Ref, x_ref: Ref, y_ref: Ref, out_ref: Ref, *, tiles: tuple[int, int, int]
) -> None:
    tile_rows, tile_depth, tile_width = tiles
    depth, width = x_ref.shape[1], y_ref.shape[1]
    group = pl.program_id(0)
    first, end = first_ref[group], end_ref[group]
    inner = pl.program_id(1) * tile_depth + jnp.arange(tile_depth, dtype=jnp.int32)
    columns = pl.program_id(2) * tile_width + jnp.arange(tile_width, dtype=jnp.int32)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        rows = first + index * tile_rows + jnp.arange(tile_rows, dtype=jnp.int32)
        x = _load(x_ref, rows, inner, end, depth)
        y = _load(y_ref, rows, columns, end, width)
        return total + _dot(x.T, y)

    num_tiles = jax.lax.div(end - first + tile_rows - 1, jnp.int32(tile_rows))
    total = jax.lax.fori_loop(0, num_tiles, add, jnp.zeros((tile_depth, tile_width), jnp.float32))
    mask = (inner < depth)[:, None] & (columns < width)[None, :]
    plgpu.store(out_ref.at[group, inner[:, None], columns[None, :]], total.astype(out_ref.dtype), mask=mask)


def _plan_tiles(group_sizes_E: jax.Array, num_rows: int, tile_rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The group of every tile of rows, its first row, and the row behind its group's last."""
    num_groups = group_sizes_E.shape[0]
    ends = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    tiles_E = (group_sizes_E + tile_rows - 1) // tile_rows
    tile_ends = jnp.cumsum(tiles_E, dtype=jnp.int32)
    # Each of the groups that have rows has at most one tile that is not full.
    tile = jnp.arange(num_rows // tile_rows + min(num_groups, num_rows), dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(tile[:, None] >= tile_ends[None], axis=1, dtype=jnp.int32), num_groups - 1)
    # Counted back from the group's end, so that a tile beyond the last group's begins behind its last row.
    first = ends[group] - group_sizes_E[group] + (tile - (tile_ends - tiles_E)[group]) * tile_rows
    return group, first, ends[group]


def _cost(x: jax.Array, y: jax.Array, out: jax.ShapeDtypeStruct, flops: int) -> pl.CostEstimate:
    num_bytes = sum(array.size * array.dtype.itemsize for array in (x, y, out))
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=num_bytes)


def multiply_rows(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E _ _"],
    group_sizes_E: Int32[Array, "E"],
    is_transposed: bool = False,
    usual_rows: int | None = None,
    interpret: bool = False,
) -> Float[Array, "R F"]:
    """Every row times the matrix of its group (or its transpose), summed in float32; anything in rows of no group.

    `usual_rows` are those that the stated cost counts, where groups usually leave some of R over.
    """
    num_rows, depth = x_RD.shape
    width = w_EDF.shape[1 if is_transposed else 2]
    tiles = _tile(num_rows, TILE_ROWS), _tile(depth, TILE_DEPTH), _tile(width, TILE_WIDTH)
    group, first, end = _plan_tiles(group_sizes_E, num_rows, tiles[0])
    out = jax.ShapeDtypeStruct((num_rows, width), x_RD.dtype)
    return pl.pallas_call(
        functools.partial(_rows_kernel, tiles=tiles, is_transposed=is_transposed),
        grid=(len(group), pl.cdiv(width, tiles[2])),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        **stated(_cost(x_RD, w_EDF, out, 2 * (usual_rows or num_rows) * depth * width)),
        interpret=interpret,
        name="grouped_matmul_rows",
    )(group, first, end, x_RD, w_EDF)


def multiply_groups(
    x_RD: Float[Array, "R D"],
    y_RF: Float[Array, "R F"],
    group_sizes_E: Int32[Array, "E"],
    usual_rows: int | None = None,
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """The transposed rows of each group in x times those in y, summed in float32."""
    (num_rows, depth), width = x_RD.shape, y_RF.shape[1]
    tiles = _tile(num_rows, TILE_DEPTH), _tile(depth, TILE_ROWS), _tile(width, TILE_WIDTH)
    ends = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    out = jax.ShapeDtypeStruct((len(group_sizes_E), depth, width), x_RD.dtype)
    return pl.pallas_call(
        functools.partial(_groups_kernel, tiles=tiles),
        grid=(len(group_sizes_E), pl.cdiv(depth, tiles[1]), pl.cdiv(width, tiles[2])),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        **stated(_cost(x_RD, y_RF, out, 2 * (usual_rows or num_rows) * depth * width)),
        interpret=interpret,
        name="grouped_matmul_groups",
    )(ends - group_sizes_E, ends, x_RD, y_RF)


FEW_ROWS = 16
"""Rows of a tile where a few rows meet many groups: the least that a tensor core takes."""


def _layer_kernel(
    group_ref: Ref,
    first_ref: Ref,
    end_ref: Ref,
    layer_ref: Ref,
    x_ref: Ref,
    w_ref: Ref,
    out_ref: Ref,
    *,
    tiles: tuple[int, int, int],
) -> None:
    tile_rows, tile_depth, tile_width = tiles
    depth, width = x_ref.shape[1], w_ref.shape[4]
    tile, part = pl.program_id(0), pl.program_id(1)
    group, end, layer = group_ref[tile], end_ref[tile], layer_ref[0]
    per_matrix = pl.cdiv(width, tile_width)
    matrix = jax.lax.div(part, jnp.int32(per_matrix))
    rows = first_ref[tile] + jnp.arange(tile_rows, dtype=jnp.int32)
    columns = (part - matrix * per_matrix) * tile_width + jnp.arange(tile_width, dtype=jnp.int32)

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        inner = index * tile_depth + jnp.arange(tile_depth, dtype=jnp.int32)
        x = _load(x_ref, rows, inner, end, depth)
        return total + _dot(x, _load(w_ref, inner, columns, depth, width, layer, group, matrix))

    @pl.when(first_ref[tile] < end)
    def _() -> None:
        zero = jnp.zeros((tile_rows, tile_width), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(depth, tile_depth), add, zero)
        mask = (rows < end)[:, None] & (columns < width)[None, :]
        place = matrix * width + columns
        plgpu.store(out_ref.at[rows[:, None], place[None, :]], total.astype(out_ref.dtype), mask=mask)


def multiply_rows_of_layer(
    x_RD: Float[Array, "R D"],
    w_LEZDF: Float[Array, "L E Z D F"],
    layer: jax.Array | int,
    group_sizes_E: Int32[Array, "E"],
    usual_groups: float,
    interpret: bool = False,
) -> Float[Array, "R O"]:
    """A few rows times the Z matrices of their group in one layer of a stack, side by side; anything in rows of none.

    Args:
        x_RD: rows, those of group 0 first.
        w_LEZDF: matrices of every layer; the kernel reads those of the groups that have rows.
        layer: which layer's.
        group_sizes_E: rows of each group.
        usual_groups: groups that usually have rows; the stated cost counts their matrices.
        interpret: runs the kernel operation by operation, on any platform, for tests.
    """
    (num_rows, depth), (num_matrices, width) = x_RD.shape, (w_LEZDF.shape[2], w_LEZDF.shape[4])
    tiles = FEW_ROWS, _tile(depth, TILE_DEPTH), _tile(width, TILE_WIDTH)
    group, first, end = _plan_tiles(group_sizes_E, num_rows, tiles[0])
    parts, usual_tiles = num_matrices * pl.cdiv(width, tiles[2]), num_rows // tiles[0] + usual_groups
    matrices_bytes = usual_groups * num_matrices * depth * width * x_RD.dtype.itemsize
    # The tiles of a group that is read already find its matrices in the L2 cache, and so do parts their rows.
    rows_bytes = num_rows * (depth + num_matrices * width) * x_RD.dtype.itemsize
    cost = pl.CostEstimate(
        flops=int(2 * usual_tiles * tiles[0] * depth * num_matrices * width),
        transcendentals=0,
        bytes_accessed=int(matrices_bytes + rows_bytes),
    )
    return pl.pallas_call(
        functools.partial(_layer_kernel, tiles=tiles),
        grid=(len(group), parts),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_matrices * width), x_RD.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=4),
        **stated(cost),
        interpret=interpret,
        name="grouped_matmul_layer",
    )(group, first, end, jnp.asarray(layer, jnp.int32).reshape(1), x_RD, w_LEZDF)
