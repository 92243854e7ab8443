"""Attention with a relative bias on GPU: Pallas kernels through Triton, forward and backward.

One program holds a block of queries (for dk and dv: of keys) and walks over the blocks it meets. Near blocks carry a
bias: r @ profiles for the 2 blocks' worth of distances that a pair of blocks spans, written to memory of the program's
own and read back a place further on for every row, so that distances become keys; a barrier lies between. The gradient
of the bias goes the same way back. Far blocks, which the bias does not reach, are a loop of their own. Softmax is
online (Dao et al. 2022, arXiv:2205.14135), in float32. dprofiles is added up by atomic operations, so its last bits
depend on the order of programs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32

from tml.ops.kernel_cost import stated
from tml.params import Leaf, PyTree

MASKED = -1e30
"""Logit of a key that is not seen; finite, so that a difference of two is no NaN."""

BLOCK = 64
"""Queries, and keys, of a block: the strip of distances is a power of two wide."""

Ref = Any
"""Memory that a kernel reads and writes."""


class Plan(NamedTuple):
    """What is static about one call.

    Attributes:
        block: queries, and keys, of a block.
        window: distances seen; None sees all.
        interpret: runs the kernels' operations one by one instead of compiling them.
    """

    block: int
    window: int | None
    interpret: bool


class Arrays(NamedTuple):
    """What every kernel reads: first query's place, ranges of blocks, and the inputs in their public layout.

    Attributes:
        first_query: place of query 0 among the keys.
        first_key_block: by row and block of queries, the first block of keys to visit.
        end_query_block: by row and block of keys, the end of the blocks of queries to visit.
        q: B S N H.
        k: B T K H.
        v: B T K H.
        r: B S N J.
        profiles: J X.
        q_segments: B S.
        k_segments: B T.
    """

    first_query: Leaf
    first_key_block: Leaf
    end_query_block: Leaf
    q: Leaf
    k: Leaf
    v: Leaf
    r: Leaf
    profiles: Leaf
    q_segments: Leaf
    k_segments: Leaf


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """A product in float32, of float32 factors without TF32's rounding."""
    return plgpu.dot(x, y, allow_tf32=False)


def _head(ref: Ref, b: jax.Array, slots: jax.Array, head: jax.Array) -> Ref:
    """The slots of one head of a B S N H array."""
    return ref.at[b, slots[:, None], head, jnp.arange(ref.shape[3], dtype=jnp.int32)[None, :]]


def _quotient(number: jax.Array, divisor: int) -> jax.Array:
    """Rounded down, of what is 0 or more; what is less counts as 0."""
    return jax.lax.div(jnp.maximum(number, 0), jnp.int32(divisor))


class _Strip:
    """The distances between a block of queries and one of keys, and the memory in which they are skewed."""

    def __init__(
        self, memory: Ref, program: tuple[jax.Array, ...], profiles: Ref, ahead: jax.Array, plan: Plan
    ) -> None:
        """`program` finds its memory; `ahead` is how far the first query stands after the first key."""
        row = jnp.arange(plan.block, dtype=jnp.int32)
        place = jnp.arange(2 * plan.block, dtype=jnp.int32)
        rank, extent = profiles.shape
        distance = ahead + plan.block - 1 - place
        self._distance = distance
        self._flat = memory.at[(*program, row[:, None], place[None, :])]
        self._skewed = memory.at[(*program, row[:, None], row[None, :] + plan.block - 1 - row[:, None])]
        self._profiles = profiles.at[jnp.arange(rank, dtype=jnp.int32)[:, None], distance[None, :]]
        self._is_covered = ((distance >= 0) & (distance < extent))[None, :]
        self._shape = (plan.block, 2 * plan.block)
        self._interpret = plan.interpret

    def _wait(self) -> None:
        if not self._interpret:
            plgpu.debug_barrier()

    def load_profiles(self) -> jax.Array:
        """J x 2 block, by falling distance."""
        return plgpu.load(self._profiles, mask=self._is_covered, other=0.0)

    def to_keys(self, by_distance: jax.Array) -> jax.Array:
        """Turns distances into keys."""
        self._wait()
        plgpu.store(self._flat, by_distance)
        self._wait()
        return plgpu.load(self._skewed)

    def to_distances(self, by_key: jax.Array) -> jax.Array:
        """Turns keys into distances: the transpose of `to_keys`."""
        self._wait()
        plgpu.store(self._flat, jnp.zeros(self._shape, by_key.dtype))
        self._wait()
        plgpu.store(self._skewed, by_key)
        self._wait()
        return plgpu.load(self._flat)

    def add_to(self, dprofiles: Ref, head: tuple[jax.Array, jax.Array], by_distance: jax.Array) -> None:
        """Adds J x 2 block to the profiles' gradient, whose columns begin at distance -block."""
        rank, block = dprofiles.shape[2], self._shape[0]
        index = *head, jnp.arange(rank, dtype=jnp.int32)[:, None], self._distance[None, :] + block
        plgpu.atomic_add(dprofiles, index, by_distance)


def _logits(
    q: jax.Array,
    k: jax.Array,
    r: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    ahead: jax.Array,
    strip: _Strip | None,
    plan: Plan,
) -> jax.Array:
    """Logits of a block of queries and a block of keys; far ones come without a strip."""
    logits = _dot(q, k.T)
    if strip is not None:
        logits = logits + strip.to_keys(_dot(r, strip.load_profiles()))
    row = jnp.arange(plan.block, dtype=jnp.int32)
    distance = ahead + row[:, None] - row[None, :]
    seen = (segments[0][:, None] == segments[1][None, :]) & (distance >= 0)
    if plan.window is not None:
        seen = seen & (distance < plan.window)
    return jnp.where(seen, logits, MASKED)


def _forward_kernel(*refs: Ref, plan: Plan) -> None:
    x, (out_ref, lse_ref, memory_ref) = Arrays(*refs[:10]), refs[10:]
    i, n, b = (pl.program_id(axis) for axis in range(3))
    slot = jnp.arange(plan.block, dtype=jnp.int32)
    queries = i * plan.block + slot
    first = x.first_query[0] + i * plan.block
    head = jax.lax.div(n, jnp.int32(x.q.shape[2] // x.k.shape[2]))
    q, r = plgpu.load(_head(x.q, b, queries, n)), plgpu.load(_head(x.r, b, queries, n))
    q_segments = x.q_segments[b, pl.ds(i * plan.block, plan.block)]

    def visit(j: jax.Array, carry: PyTree, is_near: bool) -> PyTree:
        out, largest, total = carry
        keys, ahead = j * plan.block + slot, first - j * plan.block
        k_segments = x.k_segments[b, pl.ds(j * plan.block, plan.block)]
        strip = _Strip(memory_ref, (b, n, i), x.profiles, ahead, plan) if is_near else None
        logits = _logits(q, plgpu.load(_head(x.k, b, keys, head)), r, (q_segments, k_segments), ahead, strip, plan)
        now = jnp.maximum(largest, jnp.max(logits, axis=1))
        weights, shrink = jnp.exp(logits - now[:, None]), jnp.exp(largest - now)
        v = plgpu.load(_head(x.v, b, keys, head))
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return out, now, total * shrink + jnp.sum(weights, axis=1)

    low = x.first_key_block[b, i]
    near = jnp.maximum(low, _quotient(first - x.profiles.shape[1] + 1, plan.block))
    zero = jnp.zeros(plan.block, jnp.float32)
    carry = jnp.zeros((plan.block, q.shape[1]), jnp.float32), zero + MASKED, zero
    carry = jax.lax.fori_loop(low, near, functools.partial(visit, is_near=False), carry)
    end = _quotient(first, plan.block) + 1
    out, largest, total = jax.lax.fori_loop(near, end, functools.partial(visit, is_near=True), carry)
    plgpu.store(_head(out_ref, b, queries, n), (out / total[:, None]).astype(out_ref.dtype))
    lse_ref[b, n, pl.ds(i * plan.block, plan.block)] = largest + jnp.log(total)


def _queries_kernel(*refs: Ref, plan: Plan) -> None:
    """Gradients of q, r and the profiles."""
    x, (grad_ref, lse_ref, delta_ref, _, dq_ref, dr_ref, dprofiles_ref, memory_ref) = Arrays(*refs[:10]), refs[10:]
    i, n, b = (pl.program_id(axis) for axis in range(3))
    slot = jnp.arange(plan.block, dtype=jnp.int32)
    here = pl.ds(i * plan.block, plan.block)
    queries = i * plan.block + slot
    first = x.first_query[0] + i * plan.block
    head = jax.lax.div(n, jnp.int32(x.q.shape[2] // x.k.shape[2]))
    q, r, grad = (plgpu.load(_head(ref, b, queries, n)) for ref in (x.q, x.r, grad_ref))
    lse, delta, q_segments = lse_ref[b, n, here], delta_ref[b, n, here], x.q_segments[b, here]

    def visit(j: jax.Array, carry: PyTree, is_near: bool) -> PyTree:
        dq, dr = carry
        keys, ahead = j * plan.block + slot, first - j * plan.block
        k_segments = x.k_segments[b, pl.ds(j * plan.block, plan.block)]
        strip = _Strip(memory_ref, (b, n, i), x.profiles, ahead, plan) if is_near else None
        k = plgpu.load(_head(x.k, b, keys, head))
        logits = _logits(q, k, r, (q_segments, k_segments), ahead, strip, plan)
        v = plgpu.load(_head(x.v, b, keys, head))
        dlogits = jnp.exp(logits - lse[:, None]) * (_dot(grad, v.T) - delta[:, None])
        if strip is not None:
            by_distance = strip.to_distances(dlogits).astype(q.dtype)
            dr = dr + _dot(by_distance, strip.load_profiles().T)
            strip.add_to(dprofiles_ref, (b, n), _dot(r.T, by_distance))
        return dq + _dot(dlogits.astype(k.dtype), k), dr

    low = x.first_key_block[b, i]
    near = jnp.maximum(low, _quotient(first - x.profiles.shape[1] + 1, plan.block))
    carry = jnp.zeros((plan.block, q.shape[1]), jnp.float32), jnp.zeros((plan.block, r.shape[1]), jnp.float32)
    carry = jax.lax.fori_loop(low, near, functools.partial(visit, is_near=False), carry)
    end = _quotient(first, plan.block) + 1
    dq, dr = jax.lax.fori_loop(near, end, functools.partial(visit, is_near=True), carry)
    plgpu.store(_head(dq_ref, b, queries, n), dq.astype(dq_ref.dtype))
    plgpu.store(_head(dr_ref, b, queries, n), dr.astype(dr_ref.dtype))


def _keys_kernel(*refs: Ref, plan: Plan) -> None:
    """Gradients of k and v, over the heads that share them."""
    x, (grad_ref, lse_ref, delta_ref, dk_ref, dv_ref, memory_ref) = Arrays(*refs[:10]), refs[10:]
    j, head, b = (pl.program_id(axis) for axis in range(3))
    slot = jnp.arange(plan.block, dtype=jnp.int32)
    keys = j * plan.block + slot
    k, v = plgpu.load(_head(x.k, b, keys, head)), plgpu.load(_head(x.v, b, keys, head))
    k_segments = x.k_segments[b, pl.ds(j * plan.block, plan.block)]
    groups = x.q.shape[2] // x.k.shape[2]

    def visit(i: jax.Array, carry: PyTree, n: jax.Array, is_near: bool) -> PyTree:
        dk, dv = carry
        here = pl.ds(i * plan.block, plan.block)
        queries = i * plan.block + slot
        ahead = x.first_query[0] + (i - j) * plan.block
        q, r, grad = (plgpu.load(_head(ref, b, queries, n)) for ref in (x.q, x.r, grad_ref))
        strip = _Strip(memory_ref, (b, head, j), x.profiles, ahead, plan) if is_near else None
        logits = _logits(q, k, r, (x.q_segments[b, here], k_segments), ahead, strip, plan)
        weights = jnp.exp(logits - lse_ref[b, n, here][:, None])
        dlogits = weights * (_dot(grad, v.T) - delta_ref[b, n, here][:, None])
        dk = dk + _dot(dlogits.astype(q.dtype).T, q)
        return dk, dv + _dot(weights.astype(grad.dtype).T, grad)

    first = _quotient(j * plan.block - x.first_query[0], plan.block)
    end = x.end_query_block[b, j]
    # The last near block of queries begins at most extent + block - 2 after the keys.
    reach = x.profiles.shape[1] + plan.block - 2 + j * plan.block - x.first_query[0]
    far = jnp.clip(jnp.where(reach < 0, 0, _quotient(reach, plan.block) + 1), first, jnp.maximum(end, first))
    carry = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for group in range(groups):
        n = head * groups + group
        carry = jax.lax.fori_loop(first, far, functools.partial(visit, n=n, is_near=True), carry)
        carry = jax.lax.fori_loop(far, end, functools.partial(visit, n=n, is_near=False), carry)
    plgpu.store(_head(dk_ref, b, keys, head), carry[0].astype(dk_ref.dtype))
    plgpu.store(_head(dv_ref, b, keys, head), carry[1].astype(dv_ref.dtype))


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
    out, lse = _call(_forward_kernel, 2, 1, grid, tuple(arrays), outputs, plan, {})
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
    dq, dr, dprofiles = _call(_queries_kernel, 3, 3, grid, (*inputs, by_head), outputs, plan, {len(inputs): 2})
    grid = arrays.k.shape[1] // plan.block, arrays.k.shape[2], num_rows
    dk, dv = _call(_keys_kernel, 4, 1, grid, inputs, (_like(arrays.k), _like(arrays.v)), plan, {})
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
