"""Attention with a relative bias on GPU: plans and calls the kernels, forward and backward, and states their cost.

How the kernels work is told in `tml.ops.attention_gpu_kernels`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from tml.ops.attention_gpu_kernels import Arrays, Plan, forward_kernel, keys_kernel, queries_kernel
from tml.ops.kernel_cost import stated
from tml.params import PyTree

BLOCK = 64
"""Queries, and keys, of a block: the strip of distances is a power of two wide."""


def _pairs(num_queries: int, num_keys: int, plan: Plan, extent: int) -> tuple[int, int]:
    """Pairs of blocks that one head visits, and the near ones among them, in a row of one segment."""
    near = visited = 0
    for first in range(num_keys - num_queries, num_keys, plan.block):
        low = 0 if plan.window is None else max(first - plan.window + 1, 0) // plan.block
        end = first // plan.block + 1
        visited += end - low
        near += end - max(low, max(first - extent + 1, 0) // plan.block)
    return visited, near


def _call(
    kernel: Callable[..., None],
    products: int,
    bias_products: int,
    grid: tuple[int, int, int],
    inputs: tuple[jax.Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    plan: Plan,
    aliases: dict[int, int],
) -> tuple[jax.Array, ...]:
    """Calls a kernel of so many matmuls over head_dim and over the profiles a pair of blocks.

    The last output is the programs' own memory.
    """
    arrays = Arrays(*inputs[:10])
    num_rows, num_queries, num_heads, head_dim = arrays.q.shape
    rank, extent = arrays.profiles.shape
    visited, near = _pairs(num_queries, arrays.k.shape[1], plan, extent)
    pair = 2 * num_rows * num_heads * plan.block**2
    memory = jax.ShapeDtypeStruct((num_rows, *grid[1::-1], plan.block, 2 * plan.block), jnp.float32)
    cost = pl.CostEstimate(
        flops=pair * (products * head_dim * visited + bias_products * 2 * rank * near),
        transcendentals=num_rows * num_heads * plan.block**2 * visited,
        bytes_accessed=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((inputs, outputs, memory))),
    )
    results = pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=grid,
        out_shape=(*outputs, memory),
        input_output_aliases=aliases,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        **stated(cost),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(*inputs)
    return tuple(results[:-1])


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward(plan: Plan, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    num_rows, num_queries, num_heads, _ = arrays.q.shape
    outputs = _like(arrays.q), jax.ShapeDtypeStruct((num_rows, num_heads, num_queries), jnp.float32)
    grid = num_queries // plan.block, num_heads, num_rows
    out, lse = _call(forward_kernel, 2, 1, grid, tuple(arrays), outputs, plan, {})
    return out, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, arrays: Arrays) -> jax.Array:
    return _forward(plan, arrays)[0]


def _attend_fwd(plan: Plan, arrays: Arrays) -> tuple[jax.Array, PyTree]:
    out, lse = _forward(plan, arrays)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (arrays, out, lse)


def _attend_bwd(plan: Plan, saved: PyTree, grad: jax.Array) -> tuple[Arrays]:
    arrays, out, lse = saved
    num_rows, num_queries, num_heads, _ = arrays.q.shape
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=3).swapaxes(1, 2)
    rank, extent = arrays.profiles.shape
    # Strips begin a block before distance 0 and end two behind the last.
    by_head = jnp.zeros((num_rows, num_heads, rank, extent + 3 * plan.block), jnp.float32)
    inputs = (*arrays, grad, lse, delta)
    grid = num_queries // plan.block, num_heads, num_rows
    outputs = (_like(arrays.q), _like(arrays.r), _like(by_head))
    dq, dr, dprofiles = _call(queries_kernel, 3, 3, grid, (*inputs, by_head), outputs, plan, {len(inputs): 2})
    grid = arrays.k.shape[1] // plan.block, arrays.k.shape[2], num_rows
    dk, dv = _call(keys_kernel, 4, 1, grid, inputs, (_like(arrays.k), _like(arrays.v)), plan, {})
    dprofiles = jnp.sum(dprofiles, axis=(0, 1))[:, plan.block : plan.block + extent].astype(arrays.profiles.dtype)
    return (Arrays(None, None, None, dq, dk, dv, dr, dprofiles, None, None),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _block_ranges(
    q_segments_BS: jax.Array, k_segments_BT: jax.Array, first_query: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """The first block of keys for each block of queries, and the end of the blocks of queries for each of keys.

    Two blocks meet where the spans between their least and greatest segments do, and window and order allow it.
    """

    def bounds(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = segments.reshape(segments.shape[0], -1, plan.block)
        return jnp.min(blocks, axis=2), jnp.max(blocks, axis=2)

    (q_low, q_high), (k_low, k_high) = bounds(q_segments_BS), bounds(k_segments_BT)
    q_first = first_query + plan.block * jnp.arange(q_low.shape[1], dtype=jnp.int32)
    k_first = plan.block * jnp.arange(k_low.shape[1], dtype=jnp.int32)
    ahead = q_first[:, None] - k_first[None, :]
    near = ahead >= 0 if plan.window is None else (ahead >= 0) & (ahead - plan.block + 1 < plan.window)
    meet = (k_low[:, None, :] <= q_high[:, :, None]) & (k_high[:, None, :] >= q_low[:, :, None]) & near[None]
    own = (q_first // plan.block)[None]
    first_key_block = jnp.where(jnp.any(meet, axis=2), jnp.argmax(meet, axis=2).astype(jnp.int32), own)
    last = q_low.shape[1] - jnp.argmax(meet[:, ::-1], axis=1).astype(jnp.int32)
    return first_key_block, jnp.where(jnp.any(meet, axis=1), last, jnp.int32(0))


def attend_gpu(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    r_BSNJ: Float[Array, "B S N J"],
    profiles_JX: Float[Array, "J X"],
    segment_ids_BT: Int32[Array, "B T"],
    window: int | None,
    first_query: Int32[Array, ""] | None = None,
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "B S N H"]:
    """Attention of S queries to T keys, of which the S from `first_query` on are the queries' own.

    Args:
        q_BSNH: scaled queries.
        k_BTKH: keys.
        v_BTKH: values.
        r_BSNJ: what mixes the profiles into a bias.
        profiles_JX: bias by distance; 0 from X on.
        segment_ids_BT: segments, 0 or more; -1 hides a key.
        window: distances seen; None sees all.
        first_query: place of the first query among the keys, a multiple of `block`; None where S is T.
        block: queries, and keys, of a block.
        interpret: runs the kernels operation by operation, on any platform, for tests.

    Raises:
        ValueError: sizes that Triton cannot compile.
    """
    head_dim, rank = q_BSNH.shape[3], profiles_JX.shape[0]
    if not interpret and any(size < 16 or size & (size - 1) for size in (head_dim, rank, block)):
        raise ValueError(
            f"attention on GPU takes a head_dim, a rel_rank and blocks that are powers of two from 16 on, not "
            f"{head_dim}, {rank} and {block}; change the model, or use the BLOCKED back-end"
        )
    num_queries, num_keys = q_BSNH.shape[1], k_BTKH.shape[1]
    first_query = jnp.int32(0) if first_query is None else first_query
    plan = Plan(block=block, window=window, interpret=interpret)

    def whole_blocks(x: jax.Array, fill: int = 0) -> jax.Array:
        tail = [(0, -x.shape[1] % block) if axis == 1 else (0, 0) for axis in range(x.ndim)]
        return jnp.pad(x, tail, constant_values=fill)

    q_segments_BS = jax.lax.dynamic_slice_in_dim(segment_ids_BT, first_query, num_queries, axis=1)
    q_segments, k_segments = whole_blocks(q_segments_BS, -1), whole_blocks(segment_ids_BT, -1)
    first_key_block, end_query_block = _block_ranges(q_segments, k_segments, first_query, plan)
    arrays = Arrays(
        first_query=first_query[None],
        first_key_block=first_key_block,
        end_query_block=end_query_block,
        q=whole_blocks(q_BSNH),
        k=whole_blocks(k_BTKH),
        v=whole_blocks(v_BTKH),
        r=whole_blocks(r_BSNJ),
        profiles=profiles_JX[:, :num_keys],
        q_segments=q_segments,
        k_segments=k_segments,
    )
    return _attend(plan, arrays)[:, :num_queries]
