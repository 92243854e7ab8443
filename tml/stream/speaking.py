"""The own audio of a micro-turn: sampled position by position, and fed back as the model heard it in training."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16

from tml.config import ModelConfig
from tml.microturn import Kind, Layout
from tml.model import flow_head
from tml.model.cache import DecodeState, Slots
from tml.params import PyTree

SOUND = 0x50_0D
"""Folded into a session's key, so that its sound does not draw what its words have drawn."""


Feed = Callable[[PyTree, DecodeState, Slots, jax.Array], tuple[DecodeState, jax.Array]]
"""(params, state, slots, the slot of each session that is wanted) to the state, and what is seen at those slots."""


class Spoken(NamedTuple):
    """The own audio of one micro-turn.

    Attributes:
        mels_BTY: a mel a position (float16); 0 where the session listens.
        speaks_B: which sessions speak.
    """

    mels_BTY: Float16[Array, "B T Y"]
    speaks_B: Bool[Array, "B"]


def speak(
    params: Mapping[str, PyTree],
    decode: DecodeState,
    h_BD: Float[Array, "B D"],
    speaks_B: Bool[Array, "B"],
    keys_B2: jax.Array,
    feed: Feed,
    layout: Layout,
    model: ModelConfig,
) -> tuple[DecodeState, Spoken]:
    """Samples the own audio of the sessions that speak, and feeds each position before the next is sampled.

    Nothing is computed when all sessions listen.

    Args:
        params: the parameters.
        decode: the network's state after the turn's tokens.
        h_BD: the head's input at each session's last position.
        speaks_B: which sessions speak.
        keys_B2: data of the sessions' keys; a sample depends on its session's key and position alone.
        feed: feeds slots to the network; what it sees are the head's inputs.
        layout: the layout of micro-turns.
        model: the model.
    """
    num_rows, count = h_BD.shape[0], layout.own_positions_per_turn
    shape = (num_rows, count, model.audio_out.values_per_position)

    def position(
        number: jax.Array, carry: tuple[DecodeState, jax.Array, jax.Array]
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        decode, h_BD, mels_BTY = carry
        at_B = jax.vmap(_sound_key)(keys_B2, decode.num_positions_B)
        mels_BY = flow_head.sample(params["audio_out"], h_BD, at_B, model)
        mels_BY = jnp.where(speaks_B[:, None], mels_BY, jnp.zeros_like(mels_BY))
        decode, h_BD = feed(params, decode, own_slots(mels_BY, speaks_B, layout, model), jnp.zeros(num_rows, jnp.int32))
        return decode, h_BD, jax.lax.dynamic_update_index_in_dim(mels_BTY, mels_BY, number, axis=1)

    with jax.named_scope("turn_sound"):
        silence = jnp.zeros(shape, jnp.float16)
        num_positions = jnp.where(jnp.any(speaks_B), count, 0)
        decode, _, mels_BTY = jax.lax.fori_loop(0, num_positions, position, (decode, h_BD, silence))
    return decode, Spoken(mels_BTY=mels_BTY, speaks_B=speaks_B)


def _sound_key(key_2: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key_2), position), SOUND)


def own_slots(mels_BY: jax.Array, speaks_B: jax.Array, layout: Layout, model: ModelConfig) -> Slots:
    """One own audio position for every session that speaks, as slots to feed."""
    num_rows, video = mels_BY.shape[0], model.video
    return Slots(
        tokens_BW=jnp.full((num_rows, 1), layout.special.audio, jnp.int32),
        kinds_BW=jnp.full((num_rows, 1), Kind.OWN_AUDIO, jnp.uint8),
        levels_BWM=jnp.zeros((num_rows, 1, model.audio.num_mels), jnp.uint8),
        tiles_BP=jnp.zeros((num_rows, 0, video.frames_per_tile, video.tile_px, video.tile_px, 3), jnp.int16),
        tile_index_BW=jnp.zeros((num_rows, 1), jnp.int32),
        counts_B=speaks_B.astype(jnp.int32),
        own_BY=mels_BY,
    )
