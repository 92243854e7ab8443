"""The network over live sessions: the same layers, fed a few slots at a time, with everything remembered in a state."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float16, Float32, Int16, Int32, UInt8

from tml.config import MatmulBackend, MeshConfig, ModelConfig
from tml.microturn import Kind
from tml.model import embed, head, transformer
from tml.model.layer_functions import Bias, LayerFunctions, LayerState, LiveLayer
from tml.model.live_weights import streaming_experts, streaming_output_projection, streaming_shared_experts
from tml.ops.attention import attend_cache
from tml.ops.collectives import sum_over
from tml.ops.norm import rms_norm
from tml.ops.short_conv import short_conv_stream, zero_history
from tml.params import Leaf, PyTree

ONE_DEVICE = MeshConfig()


@flax.struct.dataclass
class DecodeState:
    """Everything B live sessions remember.

    Attributes:
        layers: by stage, a `LayerState` for every place, stacked like the parameters, or one for every layer apart.
        num_positions_B: positions fed so far; also the next position.
        ring_positions_BT: position of every entry of the sliding layers' rings; negative where empty.
        full_positions_BT: the same for the global layers' caches.
    """

    layers: list[list[LayerState]]
    num_positions_B: Leaf
    ring_positions_BT: Leaf
    full_positions_BT: Leaf


class Slots(NamedTuple):
    """The next W slots of B sessions, of which the first `counts_B` are valid.

    Attributes:
        tokens_BW: token ids.
        kinds_BW: `microturn.Kind`.
        levels_BWM: dMel levels.
        tiles_BP: image tiles.
        tile_index_BW: which tile stands at a slot.
        counts_B: valid slots.
        own_BWY: the mel of own audio at the slots that are OWN_AUDIO; None if no session speaks.
    """

    tokens_BW: Int32[Array, "B W"]
    kinds_BW: UInt8[Array, "B W"]
    levels_BWM: UInt8[Array, "B W M"]
    tiles_BP: Int16[Array, "B P f h w 3"]
    tile_index_BW: Int32[Array, "B W"]
    counts_B: Int32[Array, "B"]
    own_BWY: Float16[Array, "B W Y"] | None = None


def slots_of(
    tokens_BW: Int32[Array, "B W"],
    counts_B: Int32[Array, "B"],
    cfg: ModelConfig,
    kind: Kind = Kind.TOKEN,
    own_BWY: Float16[Array, "B W Y"] | None = None,
) -> Slots:
    """Slots of one kind in which no sound or picture comes in."""
    (num_rows, width), video = tokens_BW.shape, cfg.video
    return Slots(
        tokens_BW=tokens_BW,
        kinds_BW=jnp.full((num_rows, width), kind, jnp.uint8),
        levels_BWM=jnp.zeros((num_rows, width, cfg.audio.num_mels), jnp.uint8),
        tiles_BP=jnp.zeros((num_rows, 0, video.frames_per_tile, video.tile_px, video.tile_px, 3), jnp.int16),
        tile_index_BW=jnp.zeros((num_rows, width), jnp.int32),
        counts_B=counts_B,
        own_BWY=own_BWY,
    )


def init_state(cfg: ModelConfig, num_rows: int, max_positions: int, max_slots: int, apart: bool = False) -> DecodeState:
    """The state of sessions that have not begun.

    Args:
        cfg: the model.
        num_rows: sessions.
        max_positions: what the global layers can hold.
        max_slots: the most slots of one `append`; the rings hold window + max_slots - 1, so that
            the last slot written cannot overwrite a key that the first one still sees.
        apart: keep what each layer remembers in arrays of its own. XLA's matmuls on CPUs read those where they lie,
            and copy a layer's part of a stack first; the program has every layer instead of a loop over them.
    """
    attention = cfg.attention
    ring = attention.window + max_slots - 1
    heads = (attention.num_kv_heads, attention.head_dim)
    widths = {"k": heads[0] * heads[1], "v": heads[0] * heads[1], "attention": cfg.d_model, "mlp": cfg.d_model}
    dtype = embed.compute_dtype(cfg)

    def layer(is_global: bool, repeats: int) -> LayerState:
        shape = (repeats, num_rows, max_positions if is_global else ring, *heads)
        histories = {name: zero_history(num_rows, cfg.conv_taps, width, dtype) for name, width in widths.items()}
        histories = {name: jnp.stack([history] * repeats) for name, history in histories.items()}
        return LayerState(k_LBTKH=jnp.zeros(shape, dtype), v_LBTKH=jnp.zeros(shape, dtype), histories=histories)

    def layers(stage: transformer.Stage) -> list[LayerState]:
        kinds, repeats = (stage.kinds * stage.repeats, 1) if apart else (stage.kinds, stage.repeats)
        return [layer(kind.is_global, repeats) for kind in kinds]

    return DecodeState(
        layers=[layers(stage) for stage in transformer.layer_stages(cfg)],
        num_positions_B=jnp.zeros(num_rows, jnp.int32),
        ring_positions_BT=jnp.full((num_rows, ring), -1, jnp.int32),
        full_positions_BT=jnp.full((num_rows, max_positions), -1, jnp.int32),
    )


def partition(state: DecodeState) -> DecodeState:
    """How devices that share a model split its state: keys, values and what led to them by heads; the rest is whole."""
    heads, whole = PartitionSpec(None, None, None, "tensor"), PartitionSpec()

    def layer(of_layer: LayerState) -> LayerState:
        histories = {name: heads if name in ("k", "v") else whole for name in of_layer.histories}
        return LayerState(k_LBTKH=heads, v_LBTKH=heads, histories=histories)

    return DecodeState(
        layers=[[layer(of_layer) for of_layer in stage] for stage in state.layers],
        num_positions_B=whole,
        ring_positions_BT=whole,
        full_positions_BT=whole,
    )


def append(
    params: Mapping[str, PyTree], state: DecodeState, slots: Slots, cfg: ModelConfig
) -> tuple[DecodeState, Float32[Array, "B W V"]]:
    """Feeds the valid slots to the sessions on one device; returns the state and the logits at every slot.

    Logits at slots that are not valid mean nothing. A session whose global cache is full must
    not be fed: what is over `max_positions` would be lost (the engine checks).
    """
    state, x_BWD = feed(params, state, slots, cfg, ONE_DEVICE, MatmulBackend.BLOCKED)
    return state, head.logits(params, rms_norm(x_BWD, params["norm"], cfg.norm_eps), cfg, ONE_DEVICE)


def feed(
    params: Mapping[str, PyTree],
    state: DecodeState,
    slots: Slots,
    cfg: ModelConfig,
    mesh: MeshConfig,
    backend: MatmulBackend,
) -> tuple[DecodeState, Float[Array, "B W D"]]:
    """Feeds the valid slots to the sessions; returns the state after them and the last layer's outputs at every slot.

    Where devices share the model (`mesh.tensor`), this is the program of one of them, inside `shard_map`.

    Args:
        params: parameters, or this device's parts.
        state: the state, or this device's part.
        slots: what comes in.
        cfg: the model.
        mesh: sizes of the axes, of which `tensor` alone may be more than 1.
        backend: who multiplies experts, and how caches are read.
    """
    num_slots = slots.tokens_BW.shape[1]
    valid_BW = jnp.arange(num_slots)[None] < slots.counts_B[:, None]
    positions_BW = state.num_positions_B[:, None] + jnp.arange(num_slots, dtype=jnp.int32)[None]
    x_BWD = embed.embed(
        params["embed"],
        slots.tokens_BW,
        slots.kinds_BW,
        slots.levels_BWM,
        slots.tiles_BP,
        slots.tile_index_BW,
        cfg,
        mesh,
    )
    rows_B1 = jnp.arange(slots.counts_B.shape[0])[:, None]
    if slots.own_BWY is not None:
        own_BW = jnp.where(slots.kinds_BW == Kind.OWN_AUDIO, jnp.arange(num_slots, dtype=jnp.int32)[None], -1)
        x_BWD = embed.put_own_audio(x_BWD, params["embed"], slots.kinds_BW, slots.own_BWY, own_BW, cfg)
    ring_BW = _places(positions_BW, valid_BW, state.ring_positions_BT.shape[1])
    full_BW = _places(positions_BW, valid_BW, state.full_positions_BT.shape[1])
    ring_positions_BT = state.ring_positions_BT.at[rows_B1, ring_BW].set(positions_BW, mode="drop")
    full_positions_BT = state.full_positions_BT.at[rows_B1, full_BW].set(positions_BW, mode="drop")

    def conv(name: str, x: jax.Array, taps: jax.Array, live: LiveLayer) -> tuple[jax.Array, LiveLayer]:
        stack, index = live
        out, history = short_conv_stream(x, taps, stack.histories[name][index], slots.counts_B)
        histories = {**stack.histories, name: stack.histories[name].at[index].set(history)}
        return out, LiveLayer(replace(stack, histories=histories), index)

    def attend(is_global: bool, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias, live: LiveLayer) -> PyTree:
        stack, index = live
        places_BW, key_positions_BT = (full_BW, full_positions_BT) if is_global else (ring_BW, ring_positions_BT)
        stack = replace(
            stack,
            k_LBTKH=stack.k_LBTKH.at[index, rows_B1, places_BW].set(k, mode="drop"),
            v_LBTKH=stack.v_LBTKH.at[index, rows_B1, places_BW].set(v, mode="drop"),
        )
        window = None if is_global else cfg.attention.window
        if is_global and num_slots > 1 and backend is MatmulBackend.TPU:
            # One session's logits stay in vector memory; those of all sessions do not.
            def attend_row(row: jax.Array) -> jax.Array:
                r, profiles = bias
                caches = stack.k_LBTKH[index, row][None], stack.v_LBTKH[index, row][None]
                held = positions_BW[row][None], key_positions_BT[row][None]
                return attend_cache(q[row][None], *caches, r[row][None], profiles, *held, window)[0]

            return jax.lax.map(attend_row, rows_B1[:, 0]), LiveLayer(stack, index)
        inputs = q, stack.k_LBTKH[index], stack.v_LBTKH[index], *bias, positions_BW, key_positions_BT
        if backend is not MatmulBackend.BLOCKED:
            return attend_cache(*inputs, window), LiveLayer(stack, index)
        # A turn's slots are a matmul too small to pay for a cache that is laid out anew. Read in a branch, as XLA fuses
        # the write of one entry into whatever reads it, each time with a copy of the whole cache.
        read = functools.partial(attend_cache, window=window, heads_at_once=True)
        out = jax.lax.cond(valid_BW.any(), read, lambda q, *_: jnp.zeros_like(q), *inputs)
        return out, LiveLayer(stack, index)

    functions = LayerFunctions(
        positions=positions_BW,
        valid=valid_BW,
        conv=conv,
        attend=attend,
        output_projection=streaming_output_projection(backend),
        experts=streaming_experts(valid_BW, backend),
        shared_experts=streaming_shared_experts(backend),
        add_shards=lambda x: sum_over(x, ("tensor",), mesh),
    )
    x_BWD, layers = transformer.run_live_layers(params["stages"], x_BWD, state.layers, functions, cfg)
    state = DecodeState(
        layers=layers,
        num_positions_B=state.num_positions_B + slots.counts_B,
        ring_positions_BT=ring_positions_BT,
        full_positions_BT=full_positions_BT,
    )
    return state, x_BWD


def feed_in_parts(
    params: Mapping[str, PyTree],
    state: DecodeState,
    slots: Slots,
    width: int,
    cfg: ModelConfig,
    mesh: MeshConfig,
    backend: MatmulBackend,
) -> tuple[DecodeState, Float[Array, "B D"]]:
    """Feeds slots `width` at a time, no more often than the fullest session needs.

    Where few of the slots are valid, this does not compute the others. All parts are one program, and one in which a
    session has no slots leaves it as it is: so the others do not change its bits.

    Returns:
        The state after the slots, and the last layer's outputs at each session's last one; anything where it has none.
    """
    num_rows, num_slots = slots.tokens_BW.shape

    def last(x_BWD: jax.Array, counts_B: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_BWD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)[:, 0]

    if num_slots <= width:
        state, x_BWD = feed(params, state, slots, cfg, mesh, backend)
        return state, last(x_BWD, slots.counts_B)
    by_slot = {name: getattr(slots, name) for name in ("tokens_BW", "kinds_BW", "levels_BWM", "tile_index_BW")}
    by_slot = {
        name: jnp.pad(x, [(0, 0), (0, -num_slots % width)] + [(0, 0)] * (x.ndim - 2)) for name, x in by_slot.items()
    }

    def unfinished(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
        return carry[0] < jnp.max(slots.counts_B)

    def part(carry: tuple[jax.Array, DecodeState, jax.Array]) -> tuple[jax.Array, DecodeState, jax.Array]:
        first, state, last_BD = carry
        cut = {name: jax.lax.dynamic_slice_in_dim(x, first, width, axis=1) for name, x in by_slot.items()}
        counts_B = jnp.clip(slots.counts_B - first, 0, width)
        state, x_BWD = feed(params, state, slots._replace(**cut, counts_B=counts_B), cfg, mesh, backend)
        return first + width, state, jnp.where(counts_B[:, None] > 0, last(x_BWD, counts_B), last_BD)

    nothing_BD = jnp.zeros((num_rows, cfg.d_model), embed.compute_dtype(cfg))
    _, state, last_BD = jax.lax.while_loop(unfinished, part, (jnp.int32(0), state, nothing_BD))
    return state, last_BD


def _places(positions_BW: jax.Array, valid_BW: jax.Array, size: int) -> jax.Array:
    """The cache entry of every slot; slots that are not valid point past the end, where writes are dropped."""
    return jnp.where(valid_BW, positions_BW % size, size)
