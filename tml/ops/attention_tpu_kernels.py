"""What runs on a TPU: the forward and backward kernels of attention with a relative bias.

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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MASKED = -1e30
"""Logit of a key that is not seen; finite, so that a difference of two is no NaN."""

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


def forward_kernel(
    first_query, first_key, num_far, q_ref, k_ref, v_ref, r_ref, profiles_ref, q_segments_ref, k_segments_ref,
    out_ref, lse_ref, keys_ref, values_ref, max_ref, sum_ref, acc_ref, *, plan: Plan,
):  # fmt: skip
    """Outputs and logsumexp of a step's queries."""
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


def backward_kernel(
    first_query, first_key, num_far, q_ref, k_ref, v_ref, r_ref, profiles_ref, q_segments_ref, k_segments_ref,
    out_ref, lse_ref, grad_ref, dq_ref, dk_ref, dv_ref, dr_ref, dprofiles_ref,
    keys_ref, values_ref, dkeys_ref, dvalues_ref, dq_acc_ref, dr_acc_ref, *, plan: Plan,
):  # fmt: skip
    """Dq and dr of a step's queries; dk, dv and dprofiles gather until the last step of their heads."""
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
