"""The network over live sessions: the same layers, fed a few slots at a time, with everything remembered in a state."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Int16, Int32, UInt8

from tml.config import MeshConfig, ModelConfig
from tml.microturn import Kind
from tml.model import embed, transformer
from tml.model.expert_dispatch import streaming_experts
from tml.model.layer_functions import Bias, LayerFunctions, LayerState
from tml.ops.attention import attend_cache
from tml.ops.short_conv import short_conv_stream, zero_history
from tml.params import Leaf, PyTree

ONE_DEVICE = MeshConfig()
"""Live sessions run on one device."""


@flax.struct.dataclass
class DecodeState:
    """Everything B live sessions remember.

    Attributes:
        layers: a `LayerState` for every layer, stacked like the parameters.
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
        own_BY: the mel of own audio that stands at the first slot of each session where it is OWN_AUDIO; None if no
            session speaks.
    """

    tokens_BW: Int32[Array, "B W"]
    kinds_BW: UInt8[Array, "B W"]
    levels_BWM: UInt8[Array, "B W M"]
    tiles_BP: Int16[Array, "B P f h w 3"]
    tile_index_BW: Int32[Array, "B W"]
    counts_B: Int32[Array, "B"]
    own_BY: Float16[Array, "B Y"] | None = None


def init_state(cfg: ModelConfig, num_rows: int, max_positions: int, max_slots: int) -> DecodeState:
    """The state of sessions that have not begun.

    Args:
        cfg: the model.
        num_rows: sessions.
        max_positions: what the global layers can hold.
        max_slots: the most slots of one `append`; the rings hold window + max_slots - 1, so that
            the last slot written cannot overwrite a key that the first one still sees.
    """
    attention = cfg.attention
    ring = attention.window + max_slots - 1
    heads = (attention.num_kv_heads, attention.head_dim)
    widths = {"k": heads[0] * heads[1], "v": heads[0] * heads[1], "attention": cfg.d_model, "mlp": cfg.d_model}
    dtype = embed.compute_dtype(cfg)

    def layer(is_global: bool, repeats: int) -> LayerState:
        shape = (repeats, num_rows, max_positions if is_global else ring, *heads)
        histories = {name: zero_history(num_rows, cfg.conv_taps, width) for name, width in widths.items()}
        histories = {name: jnp.stack([history] * repeats) for name, history in histories.items()}
        return LayerState(k_BTKH=jnp.zeros(shape, dtype), v_BTKH=jnp.zeros(shape, dtype), histories=histories)

    return DecodeState(
        layers=[
            [layer(kind.is_global, stage.repeats) for kind in stage.kinds] for stage in transformer.layer_stages(cfg)
        ],
        num_positions_B=jnp.zeros(num_rows, jnp.int32),
        ring_positions_BT=jnp.full((num_rows, ring), -1, jnp.int32),
        full_positions_BT=jnp.full((num_rows, max_positions), -1, jnp.int32),
    )


def append(
    params: Mapping[str, PyTree], state: DecodeState, slots: Slots, cfg: ModelConfig
) -> tuple[DecodeState, Float32[Array, "B W V"]]:
    """Feeds the valid slots to the sessions; returns the state after them and the logits at every slot (see `feed`)."""
    state, h_BWD = feed(params, state, slots, cfg)
    return state, transformer.unembed(params["unembed"], h_BWD, cfg)


def feed(
    params: Mapping[str, PyTree], state: DecodeState, slots: Slots, cfg: ModelConfig
) -> tuple[DecodeState, Float[Array, "B W D"]]:
    """Feeds the valid slots to the sessions; returns the state after them and the inputs of the heads at every slot.

    Those at slots that are not valid mean nothing. A session whose global cache is full must
    not be fed: what is over `max_positions` would be lost (the engine checks).
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
        ONE_DEVICE,
    )
    if slots.own_BY is not None:
        slots_B1 = jnp.where(slots.kinds_BW[:, :1] == Kind.OWN_AUDIO, 0, -1).astype(jnp.int32)
        x_BWD = embed.put_own_audio(x_BWD, params["embed"], slots.kinds_BW, slots.own_BY[:, None], slots_B1, cfg)
    ring_BW = _places(positions_BW, valid_BW, state.ring_positions_BT.shape[1])
    full_BW = _places(positions_BW, valid_BW, state.full_positions_BT.shape[1])
    ring_positions_BT = _write(state.ring_positions_BT, ring_BW, positions_BW)
    full_positions_BT = _write(state.full_positions_BT, full_BW, positions_BW)

    def conv(name: str, x: jax.Array, taps: jax.Array, layer: PyTree) -> tuple[jax.Array, PyTree]:
        out, history = short_conv_stream(x, taps, layer.histories[name], slots.counts_B)
        return out, replace(layer, histories={**layer.histories, name: history})

    def attend(is_global: bool, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias, layer: LayerState) -> PyTree:
        places_BW, key_positions_BT = (full_BW, full_positions_BT) if is_global else (ring_BW, ring_positions_BT)
        layer = replace(layer, k_BTKH=_write(layer.k_BTKH, places_BW, k), v_BTKH=_write(layer.v_BTKH, places_BW, v))
        window = None if is_global else cfg.attention.window
        out = attend_cache(q, layer.k_BTKH, layer.v_BTKH, *bias, positions_BW, key_positions_BT, window)
        return out, layer

    functions = LayerFunctions(
        positions=positions_BW,
        valid=valid_BW,
        conv=conv,
        attend=attend,
        experts=streaming_experts(valid_BW.size, cfg.moe),
        add_shards=lambda x: x,
    )
    layers: PyTree
    (x_BWD,), layers, _ = transformer.run_layers(params["stages"], [x_BWD], state.layers, [functions], cfg, ONE_DEVICE)
    state = DecodeState(
        layers=layers,
        num_positions_B=state.num_positions_B + slots.counts_B,
        ring_positions_BT=ring_positions_BT,
        full_positions_BT=full_positions_BT,
    )
    return state, transformer.head_input(params["norm"], x_BWD, cfg)


def _places(positions_BW: jax.Array, valid_BW: jax.Array, size: int) -> jax.Array:
    """The cache entry of every slot; slots that are not valid point past the end, where writes are dropped."""
    return jnp.where(valid_BW, positions_BW % size, size)


def _write(cache_BT: jax.Array, places_BW: jax.Array, values_BW: jax.Array) -> jax.Array:
    rows_B1 = jnp.arange(cache_BT.shape[0])[:, None]
    return cache_BT.at[rows_B1, places_BW].set(values_BW, mode="drop")
