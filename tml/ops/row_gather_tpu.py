"""Rows gathered by their places on TPU: a Pallas kernel that starts a copy for every row.

A row of 16-bit numbers cannot be copied by itself, because two rows share a register's lines. So the source comes
paired: in every 32-bit number stand one of the row's first half and one of its second. XLA's own gather takes such
rows apart in vector registers, at half of the bandwidth of main memory (`tests/bench/bench_row_gather.py`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

LANES = 128
"""Lanes of a vector register: widths are padded to multiples of it."""

CHUNK_ROWS = 128
"""Rows that are waited for and unpaired together, while those behind them are on their way."""

TILE_BYTES = 8 * 2**20
"""The largest tile of rows: it is in vector memory three times, as it comes and twice as it goes."""

CORES = 2
"""Cores among which tiles are dealt out: those of a v5p. A grid of one axis, as long as it turns out, is one core's."""

UNROLLED_ROWS = 8
"""Copies that are started between two jumps."""

VMEM_LIMIT_BYTES = 60 * 2**20
"""What the kernel may take of a core's vector memory, of which v5p and tpu7x have 64 MiB."""

Ref = Any
"""Memory that a kernel reads and writes."""


def pair(low: Float[Array, "..."], high: Float[Array, "..."]) -> Shaped[Array, "..."]:
    """Two float32 numbers as bfloat16 in one of 32 bits."""
    low_bits, high_bits = (
        jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32) for x in (low, high)
    )
    return high_bits | (low_bits >> 16)


def _unpair(pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    halves = pairs << 16, pairs & jnp.uint32(0xFFFF0000)
    low, high = (jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16) for bits in halves)
    return low, high


def is_paired(dtype: jnp.dtype) -> bool:
    """Whether rows of this type are gathered as pairs; those of 32 bits are as they are."""
    assert dtype in (jnp.bfloat16, jnp.float32), f"rows are gathered in bfloat16 and float32, not in {dtype}"
    return dtype == jnp.bfloat16


def pair_halves(x_TD: Float[Array, "t D"], unit: int = LANES) -> Shaped[Array, "t p"]:
    """Rows as `gather_rows` wants them: padded to whole registers, bfloat16 in pairs.

    Args:
        x_TD: rows.
        unit: what the halves' width is a multiple of.
    """
    paired = is_paired(x_TD.dtype)
    x_TD = jnp.pad(x_TD, ((0, 0), (0, -x_TD.shape[1] % (2 * unit if paired else unit))))
    return pair(*jnp.split(x_TD.astype(jnp.float32), 2, axis=1)) if paired else x_TD


def _gather_kernel(places_ref: Ref, x_ref: Ref, out_ref: Ref, tile_ref: Ref, semaphores: Ref, *, chunk: int) -> None:
    def start_chunk(index: jax.Array, _: None) -> None:
        def start(row: jax.Array, _: None) -> None:
            row += index * chunk
            source, target = x_ref.at[pl.ds(places_ref[0, row], 1)], tile_ref.at[pl.ds(row, 1)]
            pltpu.make_async_copy(source, target, semaphores.at[index]).start()

        jax.lax.fori_loop(0, chunk, start, None, unroll=min(UNROLLED_ROWS, chunk))

    def take_chunk(index: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(index * chunk, chunk), chunk)
        # A semaphore counts bytes: it is those of all the chunk's rows that are waited for.
        pltpu.make_async_copy(tile_ref.at[rows], tile_ref.at[rows], semaphores.at[index]).wait()
        if not is_paired(out_ref.dtype):
            out_ref[rows] = tile_ref[rows]
            return
        half = out_ref.shape[1] // 2
        lanes = min(LANES, half)
        for first in range(0, half, lanes):
            low, high = _unpair(tile_ref[rows, first : first + lanes])
            out_ref[rows, first : first + lanes] = low
            out_ref[rows, half + first : half + first + lanes] = high

    num_chunks = tile_ref.shape[0] // chunk
    jax.lax.fori_loop(0, num_chunks, start_chunk, None)
    jax.lax.fori_loop(0, num_chunks, take_chunk, None)


def gather_rows(
    x_TP: Shaped[Array, "t p"],
    place_R: Int32[Array, "r"],
    num_used: Int32[Array, ""],
    like: jax.Array | jax.ShapeDtypeStruct,
    usual_rows: int | None = None,
    unit: int = LANES,
    interpret: bool = False,
) -> Float[Array, "r D"]:
    """The row at every place, for the first `num_used` places; anything in rows behind them.

    Args:
        x_TP: rows as `pair_halves` or `multiply_rows` leaves them.
        place_R: which row; all of them are there.
        num_used: how many are asked for.
        like: rows of the width and type that these had before they were paired.
        usual_rows: rows that the stated cost counts; all by default.
        unit: the most rows of a chunk; for tests.
        interpret: runs the kernel operation by operation, on any platform, for tests.
    """
    num_rows, chunk = place_R.shape[0], min(CHUNK_ROWS, unit)
    paired = is_paired(like.dtype)
    full_width = x_TP.shape[1] * (2 if paired else 1)
    most = max(1, TILE_BYTES // (full_width * like.dtype.itemsize * chunk))
    per_tile = min(most, -(-num_rows // (CORES * chunk)))
    tile_rows = per_tile * chunk
    num_tiles = -(-num_rows // tile_rows)
    places = jnp.pad(place_R, (0, num_tiles * tile_rows - num_rows)).reshape(num_tiles, 1, tile_rows)
    rows = num_rows if usual_rows is None else usual_rows

    def tile(core: jax.Array, index: jax.Array) -> jax.Array:
        # Of an odd number of tiles, the last is gathered by both cores.
        return jnp.minimum(CORES * index + core, num_tiles - 1)

    out = pl.pallas_call(
        functools.partial(_gather_kernel, chunk=chunk),
        grid=(CORES, -(-num_used // (CORES * tile_rows))),
        in_specs=[
            pl.BlockSpec((None, 1, tile_rows), lambda core, i: (tile(core, i), 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((tile_rows, full_width), lambda core, i: (tile(core, i), 0)),
        scratch_shapes=[
            pltpu.VMEM((tile_rows, x_TP.shape[1]), x_TP.dtype),
            pltpu.SemaphoreType.DMA((per_tile,)),
        ],
        out_shape=jax.ShapeDtypeStruct((num_rows, full_width), like.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT_BYTES,
            # Checked, to start a copy would take twice the time.
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=2 * rows * full_width * like.dtype.itemsize + 4 * rows
        ),
        interpret=interpret,
        name="gather_rows",
    )(places, x_TP)
    return out[:, : like.shape[-1]]
