"""Attention with a relative bias on TPU: plans and calls the kernels, forward and backward, and states their cost.

How the kernels work is told in `tml.ops.attention_tpu_kernels`.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from tml.ops.attention_tpu_kernels import MASK_ROWS, MASKED, Plan, Tables, backward_kernel, forward_kernel
from tml.params import Leaf, PyTree

LANES = 128
"""Lanes of a vector register: compiled blocks are this many queries."""

NEAR_TILE_KEYS, FAR_TILE_KEYS = 640, 512
"""The most keys that one pass over a block of queries takes."""

STEP_QUERIES = 1_024
"""The most queries of one grid step."""

LONG_ROW_KEYS, LONG_ROW_STEP_QUERIES = 16_384, 256
"""Where more keys than this fill the vector memory, a step has fewer queries."""

VMEM_LIMIT_BYTES = 60 * 2**20
"""What a kernel may take of a core's vector memory: v5p and tpu7x have 64 MiB (jax `pltpu.get_tpu_info`)."""


def _largest_divisor(number: int, unit: int, at_most: int) -> int:
    """The largest multiple of `unit` that divides `number` and is `at_most` or less; `unit` itself at least."""
    return max((part for part in range(unit, at_most + 1, unit) if number % part == 0), default=unit)


def _near_keys(first: int, plan: Plan) -> list[int]:
    """Widths of the near tiles that a block whose first query is at `first` visits in a row of one segment."""
    ends = range(first - plan.span + plan.near_tile, first + plan.block + 1, plan.near_tile)
    return [plan.near_tile for end in ends if end > 0]


def _cost(num_queries: int, num_keys: int, products: int, arrays: PyTree, plan: Plan) -> pl.CostEstimate:
    """What a kernel computes on rows of one segment whose queries are the last: every tile it visits, seen or not.

    Args:
        num_queries: queries of a row.
        num_keys: keys of a row.
        products: matmuls of head_dim for a query and key: 2 forward, 5 backward. Those of the bias follow.
        arrays: what is read and written, once each.
        plan: the plan.
    """
    firsts = range(num_keys - num_queries, num_keys, plan.block)
    near = [width for first in firsts for width in _near_keys(first, plan)]
    far = 0
    if plan.far_tile:
        far = sum(-(-max(first - plan.span, 0) // plan.far_tile) * plan.far_tile for first in firsts)
    leaves = jax.tree.leaves(arrays)
    rows = leaves[0].shape[0] * leaves[0].shape[2] // plan.head_dim * plan.block
    bias_products = {2: 1, 5: 3}[products]
    mixes = plan.rank + MASK_ROWS
    by_distance = sum(near) + len(near) * plan.block
    return pl.CostEstimate(
        flops=2 * rows * (products * plan.head_dim * (sum(near) + far) + bias_products * mixes * by_distance),
        transcendentals=rows * (sum(near) + far),
        bytes_accessed=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    )


class _Arrays(NamedTuple):
    """What both kernels read: heads side by side in lanes, mixes with the queries in lanes.

    Attributes:
        q: B x S x (N H).
        k: B x T x (K H).
        v: B x T x (K H).
        r: B x (N J) x S.
        profiles: (J + MASK_ROWS) x (span + 2 block), by falling distance, with the row of what is seen.
        q_segments: B x 1 x S.
        k_segments: B x 1 x (span + T).
    """

    q: Leaf
    k: Leaf
    v: Leaf
    r: Leaf
    profiles: Leaf
    q_segments: Leaf
    k_segments: Leaf


def _specs(arrays: _Arrays, plan: Plan) -> _Arrays:
    """How the grid (rows, key/value heads, steps) cuts the arrays."""
    queries = pl.BlockSpec((None, plan.step, plan.groups * plan.head_dim), lambda b, k, i, *_: (b, i, k))
    keys = pl.BlockSpec(memory_space=pl.ANY)
    return _Arrays(
        q=queries,
        k=keys,
        v=keys,
        r=pl.BlockSpec((None, plan.groups * plan.rank, plan.step), lambda b, k, i, *_: (b, k, i)),
        profiles=pl.BlockSpec(arrays.profiles.shape, lambda b, k, i, *_: (0, 0)),
        q_segments=pl.BlockSpec((None, 1, plan.step), lambda b, k, i, *_: (b, 0, i)),
        k_segments=pl.BlockSpec((None, 1, arrays.k_segments.shape[2]), lambda b, k, i, *_: (b, 0, 0)),
    )


def _lse_spec(plan: Plan) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, plan.groups, plan.step), lambda b, k, i, *_: (b, k, 0, i))


def _call(
    kernel: Callable[..., None],
    tables: Tables,
    inputs: tuple[jax.Array, ...],
    in_specs: tuple[pl.BlockSpec, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    out_specs: tuple[pl.BlockSpec, ...],
    scratch: list[tuple[tuple[int, int], jnp.dtype]],
    products: int,
    plan: Plan,
) -> tuple[jax.Array, ...]:
    q, k = inputs[:2]
    head_dim = plan.head_dim
    num_rows, num_keys, num_kv_heads = k.shape[0], k.shape[1], k.shape[2] // head_dim
    scratch_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in scratch)
    if scratch_bytes > VMEM_LIMIT_BYTES:
        raise ValueError(
            f"attention over {num_keys} keys of {head_dim} takes {scratch_bytes} bytes of vector memory, "
            f"the limit is {VMEM_LIMIT_BYTES}; use shorter rows"
        )
    return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=(num_rows, num_kv_heads, q.shape[1] // plan.step),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=_cost(q.shape[1], num_keys, products, (inputs, outputs), plan),
        interpret=plan.interpret,
        name=kernel.__name__.strip("_"),
    )(*tables, *inputs)


def _forward(plan: Plan, arrays: _Arrays, tables: Tables) -> tuple[jax.Array, jax.Array]:
    """The output like q, and the logsumexp (B x K x groups x S)."""
    specs = _specs(arrays, plan)
    head_dim = plan.head_dim
    rows, padded = plan.groups * plan.block, (plan.span + arrays.k.shape[1], head_dim)
    f32 = jnp.dtype(jnp.float32)
    num_rows, num_queries, width = arrays.q.shape
    lse_shape = (num_rows, width // head_dim // plan.groups, plan.groups, num_queries)
    out, lse = _call(
        forward_kernel,
        tables,
        tuple(arrays),
        tuple(specs),
        (jax.ShapeDtypeStruct(arrays.q.shape, arrays.q.dtype), jax.ShapeDtypeStruct(lse_shape, f32)),
        (specs.q, _lse_spec(plan)),
        [
            (padded, arrays.k.dtype),
            (padded, arrays.v.dtype),
            ((rows, plan.block), f32),
            ((rows, plan.block), f32),
            ((rows, head_dim), f32),
        ],
        2,
        plan,
    )
    return out, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, arrays: _Arrays, tables: Tables) -> jax.Array:
    return _forward(plan, arrays, tables)[0]


def _attend_fwd(plan: Plan, arrays: _Arrays, tables: Tables) -> tuple[jax.Array, PyTree]:
    out, lse = _forward(plan, arrays, tables)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (arrays, tables, out, lse)


def _attend_bwd(plan: Plan, saved: PyTree, grad: jax.Array) -> tuple[_Arrays, None]:
    arrays, tables, out, lse = saved
    specs = _specs(arrays, plan)
    head_dim = plan.head_dim
    rows, num_keys = plan.groups * plan.block, plan.span + arrays.k.shape[1]
    f32 = jnp.dtype(jnp.float32)
    by_head = (*lse.shape[:2], *arrays.profiles.shape)
    dq, dk, dv, dr, dprofiles = _call(
        backward_kernel,
        tables,
        (*arrays, out, lse, grad),
        (
            *specs,
            specs.q,
            pl.BlockSpec((None, None, plan.groups, plan.step), lambda b, k, i, *_: (b, k, 0, i)),
            specs.q,
        ),
        (
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (arrays.q, arrays.k, arrays.v, arrays.r)),
            jax.ShapeDtypeStruct(by_head, f32),
        ),
        (*specs[:4], pl.BlockSpec((None, None, *by_head[2:]), lambda b, k, i, *_: (b, k, 0, 0))),
        [
            ((num_keys, head_dim), arrays.k.dtype),
            ((num_keys, head_dim), arrays.v.dtype),
            ((head_dim, num_keys), f32),
            ((head_dim, num_keys), f32),
            ((rows, head_dim), f32),
            ((arrays.profiles.shape[0], rows), f32),
        ],
        5,
        plan,
    )
    dprofiles = jnp.sum(dprofiles, axis=(0, 1)).astype(arrays.profiles.dtype)
    return _Arrays(dq, dk, dv, dr, dprofiles, None, None), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _make_tables(q_segments_BS: jax.Array, k_segments_BT: jax.Array, first_query: jax.Array, plan: Plan) -> Tables:
    """Finds for every block of queries the first block of keys with a segment between its least and greatest."""

    def bounds(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        blocks = segments.reshape(segments.shape[0], -1, plan.block)
        return jnp.min(blocks, axis=2), jnp.max(blocks, axis=2)

    (q_low, q_high), (k_low, k_high) = bounds(q_segments_BS), bounds(k_segments_BT)
    shared = (k_low[:, None, :] <= q_high[:, :, None]) & (k_high[:, None, :] >= q_low[:, :, None])
    first = first_query + plan.block * jnp.arange(q_low.shape[1], dtype=jnp.int32)[None]
    first_key = jnp.minimum(jnp.argmax(shared, axis=2).astype(jnp.int32) * plan.block, first)
    num_far = jnp.zeros_like(first_key)
    if plan.far_tile:
        num_far = jnp.maximum(first - plan.span - first_key + plan.far_tile - 1, 0) // plan.far_tile
    return Tables(first_query[None], first_key, num_far)


def _by_falling_distance(profiles_JX: jax.Array, window: int | None, plan: Plan) -> jax.Array:
    """The profiles at distances span + block - 1 to -block, zero where they end, and the row of what is not seen."""
    extent = profiles_JX.shape[1]
    falling = jnp.pad(profiles_JX[:, ::-1], ((0, 0), (plan.span + plan.block - extent, plan.block)))
    distance = jnp.arange(plan.span + plan.block - 1, -plan.block - 1, -1)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    mask = jnp.where(seen, 0.0, MASKED).astype(profiles_JX.dtype)[None]
    return jnp.concatenate([falling, mask, jnp.zeros((MASK_ROWS - 1, falling.shape[1]), falling.dtype)])


def attend_tpu(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    r_BSNJ: Float[Array, "B S N J"],
    profiles_JX: Float[Array, "J X"],
    segment_ids_BT: Int32[Array, "B T"],
    window: int | None,
    first_query: Int32[Array, ""] | None = None,
    block: int = LANES,
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
        block: queries of one block; what is compiled takes 128.
        interpret: runs the kernel operation by operation, on any platform, for tests.

    Raises:
        ValueError: sizes that cannot be compiled.
    """
    num_rows, num_queries, num_heads, head_dim = q_BSNH.shape
    num_keys, num_kv_heads = k_BTKH.shape[1:3]
    rank = profiles_JX.shape[0]
    if not interpret and (head_dim % LANES or rank % MASK_ROWS or block != LANES):
        raise ValueError(
            f"attention on TPU takes a head_dim that is a multiple of {LANES}, a rel_rank that is a multiple of "
            f"{MASK_ROWS} and blocks of {LANES}, not {head_dim}, {rank} and {block}; change the model, or use the "
            "BLOCKED back-end"
        )
    first_query = jnp.int32(0) if first_query is None else first_query
    queries, keys = (-(-number // block) * block for number in (num_queries, num_keys))
    profiles_JX = profiles_JX[:, : min(num_keys, window or num_keys)]
    reach = profiles_JX.shape[1] if window is None else min(window, num_keys)
    span = -(-reach // block) * block
    plan = Plan(
        block=block,
        span=span,
        near_tile=_largest_divisor(span + block, block, NEAR_TILE_KEYS),
        far_tile=min(FAR_TILE_KEYS // block * block, span) if window is None else 0,
        step=_largest_divisor(queries, block, STEP_QUERIES if keys <= LONG_ROW_KEYS else LONG_ROW_STEP_QUERIES),
        groups=num_heads // num_kv_heads,
        head_dim=head_dim,
        rank=rank,
        precision=jax.lax.Precision.HIGHEST if q_BSNH.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
        interpret=interpret,
    )

    def side_by_side(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x.reshape(num_rows, x.shape[1], -1), ((0, 0), (0, length - x.shape[1]), (0, 0)))

    def segments(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=-1)

    q_segments_BS = jax.lax.dynamic_slice_in_dim(segment_ids_BT, first_query, num_queries, axis=1)
    q_segments, k_segments = segments(q_segments_BS, queries), segments(segment_ids_BT, keys)
    arrays = _Arrays(
        q=side_by_side(q_BSNH, queries),
        k=side_by_side(k_BTKH, keys),
        v=side_by_side(v_BTKH, keys),
        r=side_by_side(r_BSNJ, queries).swapaxes(1, 2),
        profiles=_by_falling_distance(profiles_JX, window, plan),
        q_segments=q_segments[:, None],
        k_segments=jnp.pad(k_segments, ((0, 0), (span, 0)), constant_values=-1)[:, None],
    )
    out = _attend(plan, arrays, _make_tables(q_segments, k_segments, first_query, plan))
    return out[:, :num_queries].reshape(q_BSNH.shape)
