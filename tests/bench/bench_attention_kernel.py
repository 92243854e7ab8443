"""Static cycles of the TPU attention kernel and of jax's splash attention, compiled for an absent v5p.

Run: python -m tests.bench.bench_attention_kernel [512|full ...]   (needs libtpu; three minutes and 3 GB each)

One row of 4096, 32 query and 8 key/value heads of 128, bfloat16, segment ids, forward and backward; splash in blocks
of 512 with its fused backward pass, and without the relative bias, which it has not. The compiler's last schedule
gives the bundles of every loop; a bundle is a cycle when nothing waits. Ours is counted high: every near tile, also
those before the row. Splash is counted low: of each grid step only the largest piece, of each block of its outer loop
all the rest once.
"""

import sys

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from tests.bench.static_schedule import clear, compile_for_v5p, pieces
from tml.ops import attention_tpu

SLOTS, HEADS, KV_HEADS, HEAD_DIM, RANK = 4_096, 32, 8, 128, 16
SPLASH_BLOCK = 512


def compile_both_ways(function, *shapes: tuple[int, ...]) -> None:
    """Compiles forward and backward of a function of bfloat16 arrays and of segment ids."""

    def both(*arrays):
        *arrays, segments = arrays
        out, vjp = jax.vjp(lambda *a: function(*a, segments), *arrays)
        return vjp(out)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    compile_for_v5p(both, *arrays, jax.ShapeDtypeStruct((1, SLOTS), jnp.int32))


def our_cycles(window: int | None) -> tuple[int, int]:
    """Forward and backward of `attend_tpu`."""
    span = window or 1_024
    compile_both_ways(
        lambda q, k, v, r, profiles, segments: attention_tpu.attend_tpu(q, k, v, r, profiles, segments, window),
        (1, SLOTS, HEADS, HEAD_DIM),
        (1, SLOTS, KV_HEADS, HEAD_DIM),
        (1, SLOTS, KV_HEADS, HEAD_DIM),
        (1, SLOTS, HEADS, RANK),
        (RANK, span),
    )
    block, far = attention_tpu.LANES, attention_tpu.FAR_TILE_KEYS
    far_tiles = sum(-(-max(first - span, 0) // far) for first in range(0, SLOTS, block))
    trips = [1, KV_HEADS * SLOTS // attention_tpu.STEP_QUERIES, KV_HEADS * SLOTS // block, KV_HEADS * far_tiles]
    forward, backward = (
        sum(trips[depth] * bundles for depth, bundles in pieces(kernel))
        for kernel in ("forward_kernel", "backward_kernel")
    )
    clear()
    return forward, backward


def splash_cycles(window: int | None) -> tuple[int, int]:
    """Forward and backward of splash attention."""
    block = SPLASH_BLOCK
    shape = (SLOTS, SLOTS)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * HEADS), head_shards=1, q_seq_shards=1, block_sizes=sizes
    )
    kv_shape = (KV_HEADS, SLOTS, HEAD_DIM)
    compile_both_ways(
        lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(segments[0], segments[0])),
        (HEADS, SLOTS, HEAD_DIM),
        kv_shape,
        kv_shape,
    )
    outer = SLOTS // block
    visited = sum(min(index, outer if window is None else -(-(window - 1) // block)) + 1 for index in range(outer))
    cycles = []
    for name in ("splash_mha_fwd", "splash_mha_dkv"):
        bundles = [number for _, number in pieces(name)]
        cycles.append(HEADS * (max(bundles) * visited + (sum(bundles) - max(bundles)) * outer))
    clear()
    return cycles[0], cycles[1]


def main() -> None:
    """Prints a line for the window and for full attention."""
    for name in sys.argv[1:] or ["512", "full"]:
        window = None if name == "full" else int(name)
        ours, theirs = our_cycles(window), splash_cycles(window)
        print(
            f"window {name}: ours {ours[0]:,} + {ours[1]:,} cycles, splash {theirs[0]:,} + {theirs[1]:,}, "
            f"ratio {ours[0] / theirs[0]:.2f} forward, {ours[1] / theirs[1]:.2f} backward, "
            f"{sum(ours) / sum(theirs):.2f} together",
            flush=True,
        )


if __name__ == "__main__":
    main()
