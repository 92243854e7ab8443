"""Causal attention with a relative bias: over packed rows (sliding and global) and over a cache.

All of it computes, for query t and visible key s of the same segment, with d = t - s,

    out_t = sum_s softmax_s(q_t . k_s + bias_t[d]) v_s,    bias_t[d] = r_t . profiles[:, d], 0 where d >= X.

Queries come scaled. Logits and softmax are float32. A sliding layer sees 0 <= d < X; X is its window.
The bias is made block by block, where it is used: a bias by distance for a whole row is larger than its logits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from tml.config import AttentionBackend
from tml.ops.attention_gpu import attend_gpu
from tml.ops.attention_tpu import attend_tpu
from tml.ops.projection import project

SLIDING_BLOCK_SLOTS = 64
"""The most queries in one block of sliding attention; a block sees its own keys and a window's worth before them."""

GLOBAL_BLOCK_SLOTS = 64
"""Queries of one block of global attention: the blocks before a query's end cost, those after do not."""

LANES = 128
"""Values in a row of a TPU's vector register."""

MASKED = -1e30
"""Logit of a key that is not seen; finite, so that a fully masked row is no NaN."""


def attend(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    r_BSNJ: Float[Array, "B S N J"],
    profiles_JX: Float[Array, "J X"],
    segment_ids_BT: Int32[Array, "B T"],
    window: int | None,
    backend: AttentionBackend,
    first_query: Int32[Array, ""] | None = None,
) -> Float[Array, "B S N H"]:
    """Causal attention over packed rows, or over a part of their queries.

    It works on the rows and heads of one device: under `shard_map` each shard calls it with its own. Where the
    sequence is sharded, a shard hands over its S queries, the T keys that they may see (its own among them), and
    where among those its queries begin.

    Args:
        q_BSNH: scaled queries.
        k_BTKH: keys.
        v_BTKH: values.
        r_BSNJ: what mixes the profiles into a bias.
        profiles_JX: bias by distance, J of them; it is 0 from X on.
        segment_ids_BT: segments of the keys, 0 or more; -1 hides a key. Queries have those of their own keys.
        window: distances seen; None sees all.
        backend: who computes it; one that the target platform does not have is an error of the compiler.
        first_query: place of the first query among the keys, a multiple of 128; None where S is T.

    Example:
        >>> attend(q, k, v, r, profiles, segment_ids, window=512, backend=AttentionBackend.BLOCKED)
    """
    return BACKENDS[backend](q_BSNH, k_BTKH, v_BTKH, r_BSNJ, profiles_JX, segment_ids_BT, window, first_query)


def attention_reference(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    r_BSNJ: Float[Array, "B S N J"],
    profiles_JX: Float[Array, "J X"],
    segment_ids_BT: Int32[Array, "B T"],
    window: int | None,
    first_query: Int32[Array, ""] | None = None,
) -> Float[Array, "B S N H"]:
    """The definition, with every S x T array in full; what the others are tested against."""
    num_queries, num_keys, extent = q_BSNH.shape[1], k_BTKH.shape[1], profiles_JX.shape[-1]
    first_query = jnp.int32(0) if first_query is None else first_query
    segment_ids_BS = jax.lax.dynamic_slice_in_dim(segment_ids_BT, first_query, num_queries, axis=1)
    groups = q_BSNH.shape[2] // k_BTKH.shape[2]
    k_BTNH, v_BTNH = (jnp.repeat(x, groups, axis=2) for x in (k_BTKH, v_BTKH))
    distance_ST = first_query + jnp.arange(num_queries)[:, None] - jnp.arange(num_keys)[None, :]
    seen_BST = (segment_ids_BS[:, :, None] == segment_ids_BT[:, None, :]) & (distance_ST >= 0)[None]
    if window is not None:
        seen_BST &= (distance_ST < window)[None]
    profiles_JST = jnp.where((distance_ST < extent)[None], profiles_JX[:, jnp.clip(distance_ST, 0, extent - 1)], 0.0)
    bias_BNST = jnp.einsum("BSNJ,JST->BNST", r_BSNJ, profiles_JST)
    logits_BNST = jnp.einsum("BSNH,BTNH->BNST", q_BSNH, k_BTNH) + bias_BNST
    weights_BNST = jax.nn.softmax(jnp.where(seen_BST[:, None], logits_BNST, MASKED), axis=-1)
    return jnp.einsum("BNST,BTNH->BSNH", weights_BNST, v_BTNH)


def attend_blocked(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    r_BSNJ: Float[Array, "B S N J"],
    profiles_JX: Float[Array, "J X"],
    segment_ids_BT: Int32[Array, "B T"],
    window: int | None,
    first_query: Int32[Array, ""] | None = None,
) -> Float[Array, "B S N H"]:
    """Attention in blocks of queries, by XLA on any platform; a part of a row's queries costs as much as all."""
    num_queries = q_BSNH.shape[1]
    if first_query is not None:
        q_BSNH, r_BSNJ = (
            jax.lax.dynamic_update_slice_in_dim(
                jnp.zeros((x.shape[0], k_BTKH.shape[1], *x.shape[2:]), x.dtype), x, first_query, axis=1
            )
            for x in (q_BSNH, r_BSNJ)
        )
    if window is None:
        out = attend_global(q_BSNH, k_BTKH, v_BTKH, r_BSNJ, profiles_JX, segment_ids_BT)
    else:
        block_slots = min(SLIDING_BLOCK_SLOTS, window)
        out = attend_sliding(q_BSNH, k_BTKH, v_BTKH, r_BSNJ, profiles_JX, segment_ids_BT, block_slots)
    return out if first_query is None else jax.lax.dynamic_slice_in_dim(out, first_query, num_queries, axis=1)


def skewed_bias(r_BANJ: Float[Array, "B A N J"], profiles_JX: Float[Array, "J X"]) -> Float[Array, "B N A T"]:
    """The bias of A queries for the X keys before them and their own A (T = X + A).

    Query a stands at key X + a, so key c is at distance X + a - c. With the distances reversed,
    the shift by one a row is a reshape of rows that are one longer than they are read back.
    """
    num_rows, num_queries, num_heads, _ = r_BANJ.shape
    extent = profiles_JX.shape[-1]
    num_keys = extent + num_queries
    bias_BNAX = project(r_BANJ.swapaxes(1, 2), profiles_JX[:, ::-1])
    longer = jnp.pad(bias_BNAX, ((0, 0), (0, 0), (0, 0), (1, num_queries)))
    flat = longer.reshape(num_rows, num_heads, num_queries * (num_keys + 1))[..., : num_queries * num_keys]
    return flat.reshape(num_rows, num_heads, num_queries, num_keys)


def attend_global(
    q_BSNH: Float[Array, "B S N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    r_BSNJ: Float[Array, "B S N J"],
    profiles_JX: Float[Array, "J X"],
    segment_ids_BS: Int32[Array, "B S"],
) -> Float[Array, "B S N H"]:
    """Full causal attention within segments, in blocks of queries that see only the keys before their end."""
    num_slots = q_BSNH.shape[1]
    profiles_JX = profiles_JX[:, :num_slots]
    extent = profiles_JX.shape[-1]
    out = []
    for first in range(0, num_slots, GLOBAL_BLOCK_SLOTS):
        last = min(first + GLOBAL_BLOCK_SLOTS, num_slots)
        # The skewed bias covers `extent` keys before the block and the block; make those the row's first `last` keys.
        bias_BNAT = skewed_bias(r_BSNJ[:, first:last], profiles_JX)[..., max(extent - first, 0) :]
        bias_BNAT = jnp.pad(bias_BNAT, ((0, 0), (0, 0), (0, 0), (max(first - extent, 0), 0)))
        seen_BAT = segment_ids_BS[:, first:last, None] == segment_ids_BS[:, None, :last]
        seen_BAT &= (jnp.arange(first, last)[:, None] >= jnp.arange(last)[None])[None]
        out.append(_attend(q_BSNH[:, first:last], k_BSKH[:, :last], v_BSKH[:, :last], bias_BNAT, seen_BAT))
    return jnp.concatenate(out, axis=1)


def attend_sliding(
    q_BSNH: Float[Array, "B S N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    r_BSNJ: Float[Array, "B S N J"],
    profiles_JX: Float[Array, "J X"],
    segment_ids_BS: Int32[Array, "B S"],
    block_slots: int,
) -> Float[Array, "B S N H"]:
    """Attention within segments to the last X positions, in blocks of `block_slots` queries that see X + block keys."""
    num_rows, num_slots = segment_ids_BS.shape
    window = profiles_JX.shape[-1]
    past_blocks = -(-window // block_slots)
    past = past_blocks * block_slots
    num_blocks = -(-num_slots // block_slots)
    tail = num_blocks * block_slots - num_slots

    def in_blocks(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(num_rows * num_blocks, block_slots, *x.shape[2:])

    def with_past(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (past, tail)] + [(0, 0)] * (x.ndim - 2))
        blocks = padded.reshape(num_rows, num_blocks + past_blocks, block_slots, *x.shape[2:])
        parts = [blocks[:, shift : shift + num_blocks] for shift in range(past_blocks + 1)]
        return jnp.concatenate(parts, axis=2).reshape(num_rows * num_blocks, past + block_slots, *x.shape[2:])

    bias_CNAT = skewed_bias(in_blocks(r_BSNJ), jnp.pad(profiles_JX, ((0, 0), (0, past - window))))
    distance_AT = past + jnp.arange(block_slots)[:, None] - jnp.arange(past + block_slots)[None, :]
    # Keys before the row have segment -1, which no query has.
    key_segments_CT = with_past(segment_ids_BS + 1) - 1
    seen_CAT = in_blocks(segment_ids_BS)[:, :, None] == key_segments_CT[:, None, :]
    seen_CAT &= ((distance_AT >= 0) & (distance_AT < window))[None]
    out = _attend(in_blocks(q_BSNH), with_past(k_BSKH), with_past(v_BSKH), bias_CNAT, seen_CAT)
    return out.reshape(num_rows, num_blocks * block_slots, *q_BSNH.shape[2:])[:, :num_slots]


def attend_cache(
    q_BWNH: Float[Array, "B W N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    r_BWNJ: Float[Array, "B W N J"],
    profiles_JX: Float[Array, "J X"],
    query_positions_BW: Int32[Array, "B W"],
    key_positions_BT: Int32[Array, "B T"],
    window: int | None,
    heads_at_once: bool = False,
) -> Float[Array, "B W N H"]:
    """Attention of the next W positions of live sessions, one behind the other, to a cache that holds them already.

    Args:
        q_BWNH: scaled queries.
        k_BTKH: cached keys.
        v_BTKH: cached values.
        r_BWNJ: what mixes the profiles into a bias.
        profiles_JX: bias by distance, J of them.
        query_positions_BW: positions of the queries.
        key_positions_BT: positions of the cache's entries; negative where empty.
        window: distances seen; None sees all.
        heads_at_once: read the cache as it lies, in one matmul over all its heads, instead of one a head.
    """
    distance_BWT = query_positions_BW[:, :, None] - key_positions_BT[:, None, :]
    seen_BWT = (distance_BWT >= 0) & (key_positions_BT >= 0)[:, None, :]
    if window is not None:
        seen_BWT &= distance_BWT < window
    first_B, num_entries = query_positions_BW[:, 0], k_BTKH.shape[1]
    bias_BNWT = cache_bias(r_BWNJ, profiles_JX, first_B, num_entries, is_ring=window is not None)
    bias_BNWT = jnp.where((distance_BWT < profiles_JX.shape[-1])[:, None], bias_BNWT, jnp.zeros_like(bias_BNWT))
    attend = _attend_heads_at_once if heads_at_once else _attend
    return attend(q_BWNH, k_BTKH, v_BTKH, bias_BNWT, seen_BWT)


def cache_bias(
    r_BWNJ: Float[Array, "B W N J"],
    profiles_JX: Float[Array, "J X"],
    first_B: Int32[Array, "B"],
    num_entries: int,
    is_ring: bool,
) -> Float[Array, "B N W T"]:
    """The bias of W consecutive queries for the entries of a cache; it means nothing at distances beyond X.

    An entry's place is its position, in a ring modulo the ring's size. So the bias by place is the bias by distance,
    skewed by one a query, which is the same for all sessions, and turned by each session's own position. It is turned
    by a matmul with a permutation, which is exact; a gather along the last axis takes TPUs a time for every value.

    Args:
        r_BWNJ: what mixes the profiles into a bias.
        profiles_JX: bias by distance, J of them.
        first_B: position of the first query of each session.
        num_entries: size of the cache.
        is_ring: whether places repeat; the ring holds X + W - 1 entries at least.
    """
    num_queries, extent = r_BWNJ.shape[1], profiles_JX.shape[-1]
    num_near = extent + num_queries - 1
    # Where places do not repeat, the pattern does, in whole registers.
    period = num_entries if is_ring else num_near + -num_near % LANES
    # Of the X + W keys, the first is beyond every query's extent.
    near_BNWC = skewed_bias(r_BWNJ, profiles_JX)[..., 1:]
    near_BNWC = jnp.pad(near_BNWC, ((0, 0), (0, 0), (0, 0), (0, period - num_near)))
    places = jnp.arange(period, dtype=jnp.int32)
    source_BM = (places[None] - first_B[:, None] + extent - 1) % period
    turn_BCM = (places[None, :, None] == source_BM[:, None, :]).astype(near_BNWC.dtype)
    turned_BNWM = jnp.einsum("BNWC,BCM->BNWM", near_BNWC, turn_BCM, precision="highest")
    repeats = -(-num_entries // period)
    return jnp.concatenate([turned_BNWM] * repeats, axis=-1)[..., :num_entries]


def _attend(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    bias_BNST: Float[Array, "B N S T"],
    seen_BST: Bool[Array, "B S T"],
) -> Float[Array, "B S N H"]:
    num_rows, num_queries, num_heads, head_dim = q_BSNH.shape
    num_kv_heads = k_BTKH.shape[2]
    # Heads go in front of the slots here, once and while arrays are small, so that the logits are never transposed.
    q = q_BSNH.swapaxes(1, 2).reshape(num_rows, num_kv_heads, -1, head_dim)
    k, v = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    logits = jnp.einsum("BKXH,BKTH->BKXT", q, k, preferred_element_type=jnp.float32)
    weights, sums = _weights(logits, bias_BNST, seen_BST)
    out = jnp.einsum("BKXT,BKTH->BKXH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / sums).astype(v.dtype)
    return out.reshape(num_rows, num_heads, num_queries, head_dim).swapaxes(1, 2)


def _weights(logits: jax.Array, bias_BNST: jax.Array, seen_BST: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over the keys that are seen, in the shape of the logits, but undivided; and the sums to divide by.

    The output is a fraction of the logits' size, and the way back asks for no sum of the weights' gradients.
    """
    biased_BNST = logits.reshape(bias_BNST.shape) + bias_BNST.astype(jnp.float32)
    logits = jnp.where(seen_BST[:, None], biased_BNST, MASKED).reshape(logits.shape)
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


def _attend_heads_at_once(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    bias_BNST: Float[Array, "B N S T"],
    seen_BST: Bool[Array, "B S T"],
) -> Float[Array, "B S N H"]:
    """As `_attend` with K times the operations and no transposed copy: queries are zero for the keys of other heads."""
    num_rows, num_queries, num_heads, head_dim = q_BSNH.shape
    num_keys, num_kv_heads = k_BTKH.shape[1:3]
    grouped = (num_rows, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    own_KK = jnp.eye(num_kv_heads, dtype=q_BSNH.dtype)
    q = jnp.einsum("BSKGH,KJ->BKGSJH", q_BSNH.reshape(grouped), own_KK)
    q = q.reshape(num_rows, num_heads * num_queries, num_kv_heads * head_dim)
    k, v = (x.reshape(num_rows, num_keys, num_kv_heads * head_dim) for x in (k_BTKH, v_BTKH))
    logits = jnp.einsum("BXC,BTC->BXT", q, k, preferred_element_type=jnp.float32)
    weights, sums = _weights(logits, bias_BNST, seen_BST)
    out = jnp.einsum("BXT,BTC->BXC", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / sums).astype(v.dtype)
    out = out.reshape(num_rows, num_kv_heads, -1, num_queries, num_kv_heads, head_dim)
    return jnp.einsum("BKGSJH,KJ->BSKGH", out, own_KK).reshape(q_BSNH.shape)


AttendFunction = Callable[..., jax.Array]
"""(q, k, v, r, profiles, segments, window, first query) to the output: what `attend` asks of a back-end."""

BACKENDS: dict[AttentionBackend, AttendFunction] = {
    AttentionBackend.REFERENCE: attention_reference,
    AttentionBackend.BLOCKED: attend_blocked,
    AttentionBackend.TPU: attend_tpu,
    AttentionBackend.GPU: attend_gpu,
}
