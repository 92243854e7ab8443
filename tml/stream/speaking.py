"""The own audio of a micro-turn: sampled, and fed back as the model heard it in training, if it did."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float16, Int32

from tml.config import Feedback, ModelConfig
from tml.microturn import Kind, Layout
from tml.model import flow_head
from tml.model.cache import DecodeState, Slots, slots_of
from tml.params import PyTree

SOUND = 0x50_0D
"""Folded into a session's key, so that its sound does not draw what its words have drawn."""


Feed = Callable[[PyTree, DecodeState, Slots, jax.Array], tuple[DecodeState, jax.Array]]
"""(params, state, slots, the slots of each session that are wanted) to the state, and the heads' inputs at those."""


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
    """Samples the own audio of the sessions that speak, and feeds it to the network.

    Each position is fed before the next is sampled. Where nothing of a sample is fed back (`Feedback.NONE`), all of a
    turn are fed at once, and then sampled at once. Nothing is computed when all sessions listen.

    Args:
        params: the parameters.
        decode: the network's state after the turn's tokens.
        h_BD: the head's input at each session's last position.
        speaks_B: which sessions speak.
        keys_B2: data of the sessions' keys; a sample depends on its session's key and position alone.
        feed: feeds slots to the network.
        layout: the layout of micro-turns.
        model: the model.
    """
    num_rows, count = h_BD.shape[0], layout.own_positions_per_turn
    at_once = count if model.audio_out.feedback is Feedback.NONE else 1
    slots_BT = jnp.broadcast_to(jnp.arange(at_once, dtype=jnp.int32), (num_rows, at_once))

    def put_in(decode: DecodeState, mels_BTY: jax.Array) -> tuple[DecodeState, jax.Array]:
        return feed(params, decode, own_slots(mels_BTY, speaks_B, layout, model), slots_BT)

    def sample(decode: DecodeState, h_BTD: jax.Array) -> jax.Array:
        """Mels of the positions that follow those of the state."""
        at_BT = jax.vmap(sound_keys)(keys_B2, decode.num_positions_B[:, None] + slots_BT)
        mels_nY = flow_head.sample(params["audio_out"], h_BTD.reshape(-1, h_BTD.shape[-1]), at_BT.reshape(-1), model)
        return jnp.where(speaks_B[:, None, None], mels_nY.reshape(num_rows, at_once, -1), jnp.float16(0))

    def part(
        number: jax.Array, carry: tuple[DecodeState, jax.Array, jax.Array]
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        before, h_BD, mels_BTY = carry
        if at_once == 1:
            new_BTY = sample(before, h_BD[:, None])
            decode, h_BTD = put_in(before, new_BTY)
        else:
            decode, h_BTD = put_in(before, jnp.zeros_like(mels_BTY))
            new_BTY = sample(before, jnp.concatenate([h_BD[:, None], h_BTD[:, :-1]], axis=1))
        mels_BTY = jax.lax.dynamic_update_slice_in_dim(mels_BTY, new_BTY, number * at_once, axis=1)
        return decode, h_BTD[:, -1], mels_BTY

    with jax.named_scope("turn_sound"):
        silence_BTY = jnp.zeros((num_rows, count, model.audio_out.values_per_position), jnp.float16)
        num_parts = jnp.where(jnp.any(speaks_B), count // at_once, 0)
        decode, _, mels_BTY = jax.lax.fori_loop(0, num_parts, part, (decode, h_BD, silence_BTY))
    return decode, Spoken(mels_BTY=mels_BTY, speaks_B=speaks_B)


def sound_keys(key_2: jax.Array, positions_T: Int32[Array, "T"]) -> jax.Array:
    """The keys by which a session draws the sound that stands at positions."""
    key = jax.random.wrap_key_data(key_2)
    return jax.vmap(lambda position: jax.random.fold_in(jax.random.fold_in(key, position), SOUND))(positions_T)


def own_slots(
    mels_BTY: Float16[Array, "B T Y"], speaks_B: Bool[Array, "B"], layout: Layout, model: ModelConfig
) -> Slots:
    """T own audio positions for every session that speaks, as slots to feed."""
    num_rows, count = mels_BTY.shape[:2]
    tokens_BW = jnp.full((num_rows, count), layout.special.audio, jnp.int32)
    counts_B = jnp.where(speaks_B, count, 0).astype(jnp.int32)
    return slots_of(tokens_BW, counts_B, model, Kind.OWN_AUDIO, mels_BTY)
