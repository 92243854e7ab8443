"""What runs on a GPU, through Triton: the forward and backward kernels of attention with a relative bias.

One program holds a block of queries (for dk and dv: of keys) and walks over the blocks it meets. Near blocks carry a
bias: r @ profiles for the 2 blocks' worth of distances that a pair of blocks spans, written to memory of the program's
own and read back a place further on for every row, so that distances become keys; a barrier lies between. The gradient
of the bias goes the same way back. Far blocks, which the bias does not reach, are a loop of their own. Softmax is
online (Dao et al. 2022, arXiv:2205.14135), in float32. dprofiles is added up by atomic operations, so its last bits
depend on the order of programs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tml.params import Leaf, PyTree

MASKED = -1e30
"""Logit of a key that is not seen; finite, so that a difference of two is no NaN."""

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


def forward_kernel(*refs: Ref, plan: Plan) -> None:
    """Outputs and logsumexp of a block of queries."""
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


def queries_kernel(*refs: Ref, plan: Plan) -> None:
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


def keys_kernel(*refs: Ref, plan: Plan) -> None:
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
