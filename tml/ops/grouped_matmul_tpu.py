"""Grouped matmul on TPU: Pallas kernels that visit every tile of rows once for each group that has rows in it.

The summed axis is whole in vector memory. Groups come in the order of their rows, so a group's matrix is fetched
once for all its tiles. A tile that two groups share is visited by both, one after the other, while it stays where
it is; how many visits there are is decided while the program runs, so rows of no group cost nothing. They come out
as anything. (Tiles of rows and their table are as in megablox, after Gale et al. 2022, arXiv:2211.15841.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

from tml.ops.row_gather_tpu import is_paired, pair

LANES = 128
"""Lanes of a vector register: tiles are multiples of it."""

SUBLANES = 16
"""Rows of a vector register of bfloat16."""

TILE_ROWS, TILE_WIDTH = 256, 1_024
"""The largest tile of rows, and of the result's width. A tile that two groups share is computed twice."""

FEW_ROWS = 128
"""The largest tile of rows where a few rows meet many groups: most of a tile is not its group's."""

MATRIX_BYTES = 4 * 2**20
"""The largest part of a matrix that is fetched at once where rows are few: two are in vector memory."""

TILE_DEPTH = 2_048
"""The largest tile of the other width of a group's sum: its float32 sums fill 8 MiB of vector memory."""

VMEM_LIMIT_BYTES = 60 * 2**20
"""What a kernel may take of a core's vector memory: v5p and tpu7x have 64 MiB (jax `pltpu.get_tpu_info`)."""

Ref = Any
"""Memory that a kernel reads and writes."""


class _Visits(NamedTuple):
    """Tiles of rows in the order in which they are visited, and the groups' rows.

    Attributes:
        group: the group of each visit.
        tile: its tile of rows.
        first_row: first row of every group.
        end_row: the row behind its last.
    """

    group: jax.Array
    tile: jax.Array
    first_row: jax.Array
    end_row: jax.Array


def _plan_visits(
    group_sizes_E: jax.Array, num_tiles: int, tile_rows: int, least_visits: int
) -> tuple[_Visits, jax.Array]:
    """The visits, and how many of them there are; a group without rows is visited `least_visits` times."""
    num_groups = group_sizes_E.shape[0]
    end_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    first_E = end_E - group_sizes_E
    first_tile_E = jnp.minimum(first_E // tile_rows, num_tiles - 1)
    visits_E = jnp.where(group_sizes_E > 0, (end_E - 1) // tile_rows - first_tile_E + 1, least_visits)
    ends_E = jnp.cumsum(visits_E, dtype=jnp.int32)
    visit = jnp.arange(num_tiles + num_groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(visit[:, None] >= ends_E[None], axis=1, dtype=jnp.int32), num_groups - 1)
    # The sum of one value and zeros: single numbers are gathered slower.
    is_group_VE = group[:, None] == jnp.arange(num_groups, dtype=jnp.int32)[None]
    tile = visit + jnp.sum(jnp.where(is_group_VE, (first_tile_E - ends_E + visits_E)[None], 0), axis=1, dtype=jnp.int32)
    return _Visits(group, jnp.clip(tile, 0, num_tiles - 1), first_E, end_E), ends_E[-1]


def _is_in_group(visits: _Visits, visit: jax.Array, tile_rows: int) -> jax.Array:
    """Which rows of the visit's tile are its group's."""
    group = visits.group[visit]
    row = visits.tile[visit] * tile_rows + jax.lax.broadcasted_iota(jnp.int32, (tile_rows, 1), 0)
    return (row >= visits.first_row[group]) & (row < visits.end_row[group])


def _rows_kernel(*refs: Ref, is_transposed: bool) -> None:
    visits, (x_ref, *w_refs, out_ref) = _Visits(*refs[:4]), refs[4:]
    own = _is_in_group(visits, pl.program_id(1), x_ref.shape[0])
    summed = (((1,), (1 if is_transposed else 0,)), ((), ()))
    precision = _precision(x_ref.dtype)
    halves = [
        jax.lax.dot_general(x_ref[...], w_ref[...], summed, precision, preferred_element_type=jnp.float32)
        for w_ref in w_refs
    ]
    # Groups before this one have written their rows of the tile; those behind will.
    if len(halves) == 2:
        out_ref[...] = jnp.where(own, pair(*halves), out_ref[...])
    else:
        out_ref[...] = jnp.where(own, halves[0], out_ref[...].astype(jnp.float32)).astype(out_ref.dtype)


def _groups_kernel(*refs: Ref) -> None:
    visits, (x_ref, y_ref, out_ref, sum_ref) = _Visits(*refs[:4]), refs[4:]
    visit = pl.program_id(2)
    group, last = visits.group[visit], pl.num_programs(2) - 1
    own = _is_in_group(visits, visit, x_ref.shape[0])
    # What stands in other rows need not be a number, so times zero would not do.
    x, y = (jnp.where(own, ref[...].astype(jnp.float32), 0.0).astype(ref.dtype) for ref in (x_ref, y_ref))
    summed = (((0,), (0,)), ((), ()))
    product = jax.lax.dot_general(x, y, summed, _precision(x.dtype), preferred_element_type=jnp.float32)

    @pl.when((visit == 0) | (visits.group[jnp.maximum(visit - 1, 0)] != group))
    def _() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += product

    @pl.when((visit == last) | (visits.group[jnp.minimum(visit + 1, last)] != group))
    def _() -> None:
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _precision(dtype: jnp.dtype) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _tile(size: int, unit: int, at_most: int) -> int:
    """The largest multiple of `unit` up to `at_most` that divides `size`, itself a multiple of `unit`."""
    return max(part for part in range(unit, min(size, at_most) + 1, unit) if size % part == 0)


def _padded(x: jax.Array, units: tuple[int, ...]) -> jax.Array:
    return jnp.pad(x, [(0, -size % unit) for size, unit in zip(x.shape, units, strict=True)])


def _cost(rows: int, tile_rows: int, num_groups: int, widths: tuple[int, int], num_bytes: float) -> pl.CostEstimate:
    """What a kernel computes when groups end inside tiles: each but the last has one that the next visits again."""
    visited_rows = (-(-rows // tile_rows) + num_groups - 1) * tile_rows
    flops = 2 * visited_rows * widths[0] * widths[1]
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=int(num_bytes))


def _bytes(*arrays: jax.Array | jax.ShapeDtypeStruct) -> list[int]:
    return [array.size * array.dtype.itemsize for array in arrays]


def multiply_rows(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E _ _"],
    group_sizes_E: Int32[Array, "E"],
    is_transposed: bool = False,
    is_gathered_next: bool = False,
    usual_rows: int | None = None,
    unit: int = LANES,
    interpret: bool = False,
) -> Shaped[Array, "R _"]:
    """Every row times the matrix of its group (or its transpose), summed in float32; anything in rows of no group.

    Args:
        x_RD: rows, those of group 0 first.
        w_EDF: matrices.
        group_sizes_E: rows of each group.
        is_transposed: whether the matrices come as E x F x D.
        is_gathered_next: whether the result is as `row_gather_tpu.gather_rows` wants it: R x W instead of R x F.
        usual_rows: rows that the stated cost counts, where groups usually leave some of R over; R by default.
        unit: what tiles are multiples of.
        interpret: runs the kernel operation by operation, on any platform, for tests.
    """
    num_rows, width = x_RD.shape[0], w_EDF.shape[1 if is_transposed else 2]
    num_parts = 2 if is_gathered_next and is_paired(x_RD.dtype) else 1
    width_unit = num_parts * unit
    w_units = (1, width_unit, unit) if is_transposed else (1, unit, width_unit)
    x, w = _padded(x_RD, (unit, unit)), _padded(w_EDF, w_units)
    depth, full_width = x.shape[1], w.shape[1 if is_transposed else 2]
    out_width = full_width // num_parts
    tile_rows, tile_width = _tile(x.shape[0], unit, TILE_ROWS), _tile(out_width, unit, TILE_WIDTH // num_parts)
    num_tiles, num_widths = x.shape[0] // tile_rows, out_width // tile_width
    visits, num_visits = _plan_visits(group_sizes_E, num_tiles, tile_rows, 0)
    rows = num_rows if usual_rows is None else usual_rows
    x_bytes, w_bytes = _bytes(x, w)

    def part_of_matrix(part: int) -> pl.BlockSpec:
        if is_transposed:
            return pl.BlockSpec((None, tile_width, depth), lambda n, v, group, *_: (group[v], n + part * num_widths, 0))
        return pl.BlockSpec((None, depth, tile_width), lambda n, v, group, *_: (group[v], 0, n + part * num_widths))

    out = pl.pallas_call(
        functools.partial(_rows_kernel, is_transposed=is_transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(num_widths, num_visits),
            in_specs=[
                pl.BlockSpec((tile_rows, depth), lambda n, v, group, tile, *_: (tile[v], 0)),
                *map(part_of_matrix, range(num_parts)),
            ],
            out_specs=pl.BlockSpec((tile_rows, tile_width), lambda n, v, group, tile, *_: (tile[v], n)),
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], out_width), jnp.uint32 if num_parts == 2 else x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=_cost(
            rows,
            tile_rows,
            w.shape[0],
            (depth, full_width),
            rows / num_rows * x_bytes * (num_widths + full_width / depth) + w_bytes,
        ),
        interpret=interpret,
        name="grouped_matmul_rows",
    )(*visits, x, *[w] * num_parts)
    return out[:num_rows] if is_gathered_next else out[:num_rows, :width]


def multiply_groups(
    x_RD: Float[Array, "R D"],
    y_RF: Float[Array, "R F"],
    group_sizes_E: Int32[Array, "E"],
    usual_rows: int | None = None,
    unit: int = LANES,
    interpret: bool = False,
) -> Float[Array, "E D F"]:
    """The transposed rows of each group in x times those in y, summed in float32; arguments as of `multiply_rows`."""
    depth, width, num_groups = x_RD.shape[1], y_RF.shape[1], group_sizes_E.shape[0]
    x, y = _padded(x_RD, (unit, unit)), _padded(y_RF, (unit, unit))
    tile_rows = _tile(x.shape[0], unit, TILE_ROWS)
    tile_depth, tile_width = _tile(x.shape[1], unit, TILE_DEPTH), _tile(y.shape[1], unit, TILE_WIDTH)
    num_tiles, grid = x.shape[0] // tile_rows, (x.shape[1] // tile_depth, y.shape[1] // tile_width)
    visits, num_visits = _plan_visits(group_sizes_E, num_tiles, tile_rows, 1)
    out = jax.ShapeDtypeStruct((num_groups, x.shape[1], y.shape[1]), x.dtype)
    num_rows = x_RD.shape[0]
    rows = num_rows if usual_rows is None else usual_rows
    x_bytes, y_bytes, out_bytes = _bytes(x, y, out)
    sums = pl.pallas_call(
        _groups_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(*grid, num_visits),
            in_specs=[
                pl.BlockSpec((tile_rows, tile_depth), lambda d, f, v, group, tile, *_: (tile[v], d)),
                pl.BlockSpec((tile_rows, tile_width), lambda d, f, v, group, tile, *_: (tile[v], f)),
            ],
            out_specs=pl.BlockSpec((None, tile_depth, tile_width), lambda d, f, v, group, *_: (group[v], d, f)),
            scratch_shapes=[pltpu.VMEM((tile_depth, tile_width), jnp.float32)],
        ),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=_cost(
            rows,
            tile_rows,
            num_groups,
            (x.shape[1], y.shape[1]),
            rows / num_rows * (x_bytes * grid[1] + y_bytes * grid[0]) + out_bytes,
        ),
        interpret=interpret,
        name="grouped_matmul_groups",
    )(*visits, x, y)
    return sums[:, :depth, :width]


def _layer_kernel(*refs: Ref) -> None:
    # The layer, behind the visits, is for the index maps alone.
    _rows_kernel(*refs[:4], *refs[5:], is_transposed=False)


def multiply_rows_of_layer(
    x_RD: Float[Array, "R D"],
    w_LEZDF: Float[Array, "L E Z D F"],
    layer: jax.Array | int,
    group_sizes_E: Int32[Array, "E"],
    usual_groups: float,
    unit: int = LANES,
    interpret: bool = False,
) -> Float[Array, "R O"]:
    """A few rows times the Z matrices of their group in one layer of a stack, side by side; anything in rows of none.

    The layer is told to the kernel: cut out of the stack, every matrix would be moved before any is used. The width
    of the result comes in two parts at least, one for each core of a v5p, which reads its part of the matrices.

    Args:
        x_RD: rows, those of group 0 first.
        w_LEZDF: matrices of every layer.
        layer: which layer's.
        group_sizes_E: rows of each group.
        usual_groups: groups that usually have rows; the stated cost counts their matrices.
        unit: what widths of tiles are multiples of.
        interpret: runs the kernel operation by operation, on any platform, for tests.
    """
    (num_rows, depth), (num_matrices, width) = x_RD.shape, (w_LEZDF.shape[2], w_LEZDF.shape[4])
    assert width % unit == 0, f"a device's part of a matrix has {width} columns, which {unit} does not divide"
    x = _padded(x_RD, (SUBLANES, 1))
    tile_rows = _tile(x.shape[0], SUBLANES, FEW_ROWS)
    most = max(unit, min(num_matrices * width // 2, MATRIX_BYTES // (depth * x.dtype.itemsize)))
    tile_width = _tile(width, unit, most)
    num_tiles, per_matrix = x.shape[0] // tile_rows, width // tile_width
    visits, num_visits = _plan_visits(group_sizes_E, num_tiles, tile_rows, 0)
    usual_visits = num_tiles - 1 + usual_groups
    matrices_bytes = usual_groups * num_matrices * depth * width * x.dtype.itemsize
    # A tile of rows stays where it is while group after group visits it.
    rows_bytes = x.shape[0] * (num_matrices * per_matrix * depth + num_matrices * width)
    out = pl.pallas_call(
        _layer_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits) + 1,
            grid=(num_matrices * per_matrix, jnp.maximum(num_visits, 1)),
            in_specs=[
                pl.BlockSpec((tile_rows, depth), lambda n, v, group, tile, *_: (tile[v], 0)),
                pl.BlockSpec(
                    (None, None, None, depth, tile_width),
                    lambda n, v, group, tile, first, end, layer: (
                        layer[0],
                        group[v],
                        jax.lax.div(n, per_matrix),
                        0,
                        jax.lax.rem(n, per_matrix),
                    ),
                ),
            ],
            out_specs=pl.BlockSpec((tile_rows, tile_width), lambda n, v, group, tile, *_: (tile[v], n)),
        ),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], num_matrices * width), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(2 * usual_visits * tile_rows * depth * num_matrices * width),
            transcendentals=0,
            bytes_accessed=int(matrices_bytes + rows_bytes * x.dtype.itemsize),
        ),
        interpret=interpret,
        name="grouped_matmul_layer",
    )(*visits, jnp.asarray(layer, jnp.int32).reshape(1), x, w_LEZDF)
    return out[:num_rows]
