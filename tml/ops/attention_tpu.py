"""Attention with a relative bias on TPU: Pallas kernels, forward and backward, the bias made where it is used.

A grid step holds some hundred queries of all heads that share a key/value head, and all keys and values of that
head. It walks over blocks of queries. A block's heads are stacked as rows of one matrix, so that keys enter the
matrix unit once for all of them, and the keys before it come in two parts:

- the *near* keys, `span` of them and the block's own, which the bias covers: r @ profiles by distance for a strip of
  distances, then a roll that moves row a by a more than row a - 1, turns distances into keys. One more row of
  profiles, which every query mixes with weight one, is -1e30 at distances that are not seen: causality and window
  cost nothing more;
- the *far* keys, which only a global layer sees and the bias does not reach.

Softmax is online (Dao et al. 2022, arXiv:2205.14135) and in float32, near keys first: among them is the query's own,
so the running maximum is finite. Tiles of keys before the first key of the block's segments are left out. The
backward pass makes the probabilities again from the saved logsumexp; dk, dv and dprofiles gather in VMEM.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from tml.params import Leaf, PyTree

MASKED = -1e30
"""Logit of a key that is not seen; finite, so that a difference of two is no NaN."""

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

MASK_ROWS = 16
"""Rows by which the profiles grow: the first says which distances are seen; a bfloat16 tile has 16 rows."""


Ref = Any
"""Memory that a kernel reads and writes."""


class Plan(NamedTuple):
    """What is static about one call.

    Attributes:
        block: queries of one block, and rows a roll shifts over.
        span: near keys before a block; the bias reaches no further.
        near_tile: near keys that one pass takes; divides span + block.
        far_tile: far keys that one pass takes; 0 where none are seen.
        step: queries of one grid step; divides the queries.
        groups: query heads of a key/value head.
        head_dim: width of a head.
        rank: rows of the profiles.
        precision: precision of matmuls.
        interpret: runs the kernels' operations one by one instead of compiling them.
    """

    block: int
    span: int
    near_tile: int
    far_tile: int
    step: int
    groups: int
    head_dim: int
    rank: int
    precision: jax.lax.Precision
    interpret: bool


class Tables(NamedTuple):
    """What a kernel's scalar core reads before it starts.

    Attributes:
        first_query: place of query 0 among the keys.
        first_key: by row and block of queries, the first key that the block may see.
        num_far: by row and block of queries, the far tiles it sees.
    """

    first_query: Ref
    first_key: Ref
    num_far: Ref


def _largest_divisor(number: int, unit: int, at_most: int) -> int:
    """The largest multiple of `unit` that divides `number` and is `at_most` or less; `unit` itself at least."""
    return max((part for part in range(unit, at_most + 1, unit) if number % part == 0), default=unit)


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int], plan: Plan) -> jax.Array:
    """The product of two matrices over one axis of each, in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=plan.precision, preferred_element_type=jnp.float32)


def _heads_to_rows(x: jax.Array, groups: int) -> jax.Array:
    """(block, groups * H) to (groups * block, H)."""
    return jnp.concatenate(jnp.split(x, groups, axis=1), axis=0)


def _rows_to_heads(x: jax.Array, groups: int) -> jax.Array:
    """(groups * block, H) to (block, groups * H)."""
    return jnp.concatenate(jnp.split(x, groups, axis=0), axis=1)


def _skewed(by_distance: jax.Array, plan: Plan) -> jax.Array:
    """Turns distances into keys: of each head's rows, row a reads block - 1 - a places further on."""
    width = by_distance.shape[1] - plan.block
    heads = [
        pltpu.roll(head, width + 1, 1, stride=1, stride_axis=0)[:, :width]
        for head in jnp.split(by_distance, plan.groups, axis=0)
    ]
    return jnp.concatenate(heads, axis=0)


def _unskewed(by_key: jax.Array, plan: Plan) -> jax.Array:
    """Turns keys into distances: the transpose of `_skewed`, a block of keys at a time."""
    block = plan.block
    row = jax.lax.broadcasted_iota(jnp.int32, (block, block), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, (block, block), 1)
    shift = block - 1 - row
    source = jnp.where(lane >= shift, lane - shift, lane - shift + block)
    nothing = jnp.zeros((block, block), by_key.dtype)
    heads = []
    for head in jnp.split(by_key, plan.groups, axis=0):
        rolled = [jnp.take_along_axis(keys, source, axis=1) for keys in jnp.split(head, head.shape[1] // block, axis=1)]
        pairs = zip([nothing, *rolled], [*rolled, nothing], strict=True)
        heads.append(jnp.concatenate([jnp.where(lane >= shift, here, before) for before, here in pairs], axis=1))
    return jnp.concatenate(heads, axis=0)


def _in_lanes(column: jax.Array, width: int) -> jax.Array:
    """Repeats a value per row, which stands in every lane, to `width` lanes."""
    return jnp.concatenate([column] * -(-width // column.shape[1]), axis=1)[:, :width]


def _first_lanes(columns: list[jax.Array]) -> jax.Array:
    """Values per row, each of which stands in every lane, side by side in the first lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, columns[0].shape, 1)
    beside = columns[0]
    for place, column in enumerate(columns[1:], 1):
        beside = jnp.where(lane == place, column, beside)
    return beside


class _Block(NamedTuple):
    """A block of queries, as matrices of groups * block rows (mixes: columns)."""

    q: jax.Array
    mixes: jax.Array
    segments: jax.Array


def _read_block(row: jax.Array, q_ref: Ref, r_ref: Ref, segments_ref: Ref, plan: Plan) -> _Block:
    here = pl.ds(row, plan.block)
    r = jnp.concatenate(jnp.split(r_ref[:, here], plan.groups, axis=0), axis=1)
    ones = jnp.ones((MASK_ROWS, r.shape[1]), r.dtype)
    segments = jnp.broadcast_to(segments_ref[:, here], (plan.block, plan.block)).T
    return _Block(_heads_to_rows(q_ref[here, :], plan.groups), jnp.concatenate([r, ones], axis=0), segments)


def _logits(block: _Block, k: jax.Array, key_segments: jax.Array, profiles: jax.Array | None, plan: Plan) -> jax.Array:
    """Logits of a block and a tile of keys; far tiles come without profiles."""
    logits = _dot(block.q, k, (1, 1), plan)
    if profiles is not None:
        logits = logits + _skewed(_dot(block.mixes, profiles, (0, 0), plan), plan)
    rows, width = logits.shape
    seen = _in_lanes(block.segments, width) == key_segments
    logits = jnp.where(seen[None], logits.reshape(plan.groups, plan.block, width), MASKED)
    return logits.reshape(rows, width)


def _walk(
    b: jax.Array,
    index: jax.Array,
    tables: Tables,
    tile_of_keys: Callable[[jax.Array, int, int | None], None],
    plan: Plan,
) -> None:
    """Calls `tile_of_keys(start, width, column)` on every tile that block `index` of row b sees, its own keys first.

    `start` counts from `span` before key 0; `column` is where the profiles of a near tile start, None for a far one.
    """
    first = tables.first_query[0] + index * plan.block
    first_key, num_far = (table[b, index] for table in (tables.first_key, tables.num_far))
    for column in reversed(range(0, plan.span + plan.block, plan.near_tile)):
        end = first - plan.span + column + plan.near_tile

        @pl.when(end > first_key)
        def _(column: int = column) -> None:
            tile_of_keys(pl.multiple_of(first + column, plan.block), plan.near_tile, column)

    if plan.far_tile:

        def far(tile: jax.Array, _: None) -> None:
            start = first - (tile + 1) * plan.far_tile
            tile_of_keys(pl.multiple_of(start, plan.block), plan.far_tile, None)

        jax.lax.fori_loop(0, num_far, far, None)


def _of_head(keys_ref: Ref, row: jax.Array, head: jax.Array, head_dim: int) -> Ref:
    """The keys of a row and key/value head, in main memory."""
    return keys_ref.at[row, :, pl.ds(pl.multiple_of(head * head_dim, head_dim), head_dim)]


def _fetch_after_span(padded_ref: Ref, keys_ref: Ref, plan: Plan) -> None:
    """Brings a head's keys from main memory: a window of them would be there twice, and once more padded."""
    padded_ref[: plan.span, :] = jnp.zeros((plan.span, plan.head_dim), padded_ref.dtype)
    pltpu.sync_copy(keys_ref, padded_ref.at[pl.ds(plan.span, padded_ref.shape[0] - plan.span), :])


def _forward_kernel(
    first_query, first_key, num_far, q_ref, k_ref, v_ref, r_ref, profiles_ref, q_segments_ref, k_segments_ref,
    out_ref, lse_ref, keys_ref, values_ref, max_ref, sum_ref, acc_ref, *, plan: Plan,
):  # fmt: skip
    tables = Tables(first_query, first_key, num_far)
    b, head, step, blocks = pl.program_id(0), pl.program_id(1), pl.program_id(2), plan.step // plan.block

    @pl.when(step == 0)
    def _() -> None:
        _fetch_after_span(keys_ref, _of_head(k_ref, b, head, plan.head_dim), plan)
        _fetch_after_span(values_ref, _of_head(v_ref, b, head, plan.head_dim), plan)

    def block_of_queries(index: jax.Array, _: None) -> None:
        row = pl.multiple_of(index * plan.block, plan.block)
        block = _read_block(row, q_ref, r_ref, q_segments_ref, plan)
        max_ref[...] = jnp.full_like(max_ref, MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

        def tile_of_keys(start: jax.Array, width: int, column: int | None) -> None:
            here = pl.ds(start, width)
            profiles = None if column is None else profiles_ref[:, column : column + width + plan.block]
            logits = _logits(block, keys_ref[here, :], k_segments_ref[:, here], profiles, plan)
            before = max_ref[...]
            largest = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp(logits - _in_lanes(largest, width))
            shrink = jnp.exp(before - largest)
            max_ref[...] = largest
            sum_ref[...] = sum_ref[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            values = values_ref[here, :]
            mixed = _dot(weights.astype(values.dtype), values, (1, 0), plan)
            acc_ref[...] = acc_ref[...] * _in_lanes(shrink, acc_ref.shape[1]) + mixed

        _walk(b, step * blocks + index, tables, tile_of_keys, plan)
        total = sum_ref[...]
        out = (acc_ref[...] / _in_lanes(total, acc_ref.shape[1])).astype(out_ref.dtype)
        out_ref[pl.ds(row, plan.block), :] = _rows_to_heads(out, plan.groups)
        lse = jnp.split(max_ref[...] + jnp.log(total), plan.groups, axis=0)
        lse_ref[:, pl.ds(row, plan.block)] = _first_lanes(lse).T[: plan.groups]

    jax.lax.fori_loop(0, blocks, block_of_queries, None)


def _backward_kernel(
    first_query, first_key, num_far, q_ref, k_ref, v_ref, r_ref, profiles_ref, q_segments_ref, k_segments_ref,
    out_ref, lse_ref, grad_ref, dq_ref, dk_ref, dv_ref, dr_ref, dprofiles_ref,
    keys_ref, values_ref, dkeys_ref, dvalues_ref, dq_acc_ref, dr_acc_ref, *, plan: Plan,
):  # fmt: skip
    tables = Tables(first_query, first_key, num_far)
    b, head, step, blocks = pl.program_id(0), pl.program_id(1), pl.program_id(2), plan.step // plan.block
    last, groups, dtype = pl.num_programs(2) - 1, plan.groups, q_ref.dtype

    @pl.when(step == 0)
    def _() -> None:
        _fetch_after_span(keys_ref, _of_head(k_ref, b, head, plan.head_dim), plan)
        _fetch_after_span(values_ref, _of_head(v_ref, b, head, plan.head_dim), plan)
        dkeys_ref[...] = jnp.zeros_like(dkeys_ref)
        dvalues_ref[...] = jnp.zeros_like(dvalues_ref)
        dprofiles_ref[...] = jnp.zeros_like(dprofiles_ref)

    def block_of_queries(index: jax.Array, _: None) -> None:
        row = pl.multiple_of(index * plan.block, plan.block)
        queries = pl.ds(row, plan.block)
        block = _read_block(row, q_ref, r_ref, q_segments_ref, plan)
        grad, out = (_heads_to_rows(ref[queries, :], groups) for ref in (grad_ref, out_ref))
        delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=1, keepdims=True)
        by_head = [jnp.broadcast_to(lse_ref[g : g + 1, queries], (plan.block, plan.block)).T for g in range(groups)]
        lse = jnp.concatenate(by_head, axis=0)
        q_transposed, grad_transposed = block.q.T, grad.T
        dq_acc_ref[...] = jnp.zeros_like(dq_acc_ref)
        dr_acc_ref[...] = jnp.zeros_like(dr_acc_ref)

        def tile_of_keys(start: jax.Array, width: int, column: int | None) -> None:
            here = pl.ds(start, width)
            distances = slice(column, None if column is None else column + width + plan.block)
            profiles = None if column is None else profiles_ref[:, distances]
            k, v = keys_ref[here, :], values_ref[here, :]
            logits = _logits(block, k, k_segments_ref[:, here], profiles, plan)
            weights = jnp.exp(logits - _in_lanes(lse, width))
            dvalues_ref[:, here] += _dot(grad_transposed, weights.astype(dtype), (1, 0), plan)
            dlogits = weights * (_dot(grad, v, (1, 1), plan) - delta)
            rounded = dlogits.astype(dtype)
            dkeys_ref[:, here] += _dot(q_transposed, rounded, (1, 0), plan)
            dq_acc_ref[...] += _dot(rounded, k, (1, 0), plan)
            if profiles is not None:
                by_distance = _unskewed(dlogits, plan).astype(dtype)
                dprofiles_ref[:, distances] += _dot(block.mixes, by_distance, (1, 0), plan)
                dr_acc_ref[...] += _dot(profiles, by_distance, (1, 1), plan)

        _walk(b, step * blocks + index, tables, tile_of_keys, plan)
        dq_ref[queries, :] = _rows_to_heads(dq_acc_ref[...].astype(dq_ref.dtype), groups)
        dr = jnp.split(dr_acc_ref[: plan.rank, :].astype(dr_ref.dtype), groups, axis=1)
        dr_ref[:, queries] = jnp.concatenate(dr, axis=0)

    jax.lax.fori_loop(0, blocks, block_of_queries, None)

    @pl.when(step == last)
    def _() -> None:
        # Keys and values are not needed any more: their place takes the gradients on their way out.
        def block_of_keys(index: jax.Array, _: None) -> None:
            here = pl.ds(pl.multiple_of(plan.span + index * plan.block, plan.block), plan.block)
            keys_ref[here, :] = dkeys_ref[:, here].T.astype(keys_ref.dtype)
            values_ref[here, :] = dvalues_ref[:, here].T.astype(values_ref.dtype)

        jax.lax.fori_loop(0, dk_ref.shape[1] // plan.block, block_of_keys, None)
        for whole_ref, sums_ref in ((dk_ref, keys_ref), (dv_ref, values_ref)):
            own_ref = _of_head(whole_ref, b, head, plan.head_dim)
            pltpu.sync_copy(sums_ref.at[pl.ds(plan.span, dk_ref.shape[1]), :], own_ref)


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
        _forward_kernel,
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
        _backward_kernel,
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
