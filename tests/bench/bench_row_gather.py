"""Static cycles of rows gathered on TPU, by our kernel and by XLA, compiled for an absent v5p.

Run: python -m tests.bench.bench_row_gather   (needs libtpu; half a minute)

122,880 rows of 4,096 bfloat16 numbers out of 131,072, as a layer of the 276B model on 512 chips gathers them. The
compiler's last schedule gives the bundles of every loop; a bundle is a cycle when nothing waits. A program for both
cores of a v5p, as its first form says, has half of the rows on either. Main memory moves each row twice at least.
"""

import jax
import jax.numpy as jnp

from tests.bench.static_schedule import clear, compile_for_v5p, is_on_one_core, pieces
from tml.ops import row_gather_tpu
from tml.ops.grouped_matmul import dense_kernels, tpu_kernels
from tml.plan.chips import CHIPS

TOKENS, ROWS, WIDTH = 131_072, 122_880, 4_096
XLA_ROWS = 128
"""Rows that a turn of XLA's loop takes: so many copies are in its schedule."""


def our_cycles() -> float:
    """A row's: a copy is started, and its chunk unpaired; what a tile takes besides left out."""
    pairs = jax.ShapeDtypeStruct((TOKENS, WIDTH // 2), jnp.uint32)
    like = jax.ShapeDtypeStruct((1, WIDTH), jnp.bfloat16)
    num_used = jax.ShapeDtypeStruct((), jnp.int32)
    compile_for_v5p(lambda *a: tpu_kernels().gather(*a, like=like), pairs, places(), num_used)
    found, cores = pieces("gather_rows"), 1 if is_on_one_core("gather_rows") else 2
    clear()
    innermost = max(depth for depth, _ in found)
    started = max(bundles for depth, bundles in found if depth == innermost)
    unpaired = max(bundles for depth, bundles in found if depth == innermost - 1)
    return (started / row_gather_tpu.UNROLLED_ROWS + unpaired / row_gather_tpu.CHUNK_ROWS) / cores


def xla_cycles() -> float:
    """A row's."""
    x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
    gather = dense_kernels().gather
    compile_for_v5p(lambda *a: gather(*a, None, None), x, places())
    bundles = max(bundles for _, bundles in pieces("gather_fusion"))
    cores = 1 if is_on_one_core("gather_fusion") else 2
    clear()
    return bundles / XLA_ROWS / cores


def places() -> jax.ShapeDtypeStruct:
    """Which rows."""
    return jax.ShapeDtypeStruct((ROWS,), jnp.int32)


def main() -> None:
    """Prints a line."""
    chip = CHIPS["v5p"]
    memory = 2 * 2 * WIDTH / chip.hbm_bytes_per_s * chip.clock_hz
    ours, theirs = our_cycles(), xla_cycles()
    print(
        f"cycles a row: ours {ours:.1f}, XLA {theirs:.1f}, main memory {memory:.1f}; "
        f"the longer of ours and main memory's over XLA's {max(ours, memory) / theirs:.2f}"
    )


if __name__ == "__main__":
    main()
