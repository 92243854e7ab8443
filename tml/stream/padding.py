"""Fixed slots: the [pad] tokens of an output half, which the sessions are fed at once when their words are over."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from tml.config import ModelConfig
from tml.microturn import Kind, Layout
from tml.model.cache import Slots


def padding_counts(
    num_words_B: Int32[Array, "B"], speaks_B: Bool[Array, "B"], layout: Layout
) -> tuple[Int32[Array, "B"], Int32[Array, "B"]]:
    """The [pad] tokens of each session's output half, and the slot of the last one (0 where there is none).

    Args:
        num_words_B: tokens that it holds without actions; 0 for an idle session, which gets none.
        speaks_B: which sessions speak, with own audio to come.
        layout: the layout of micro-turns.
    """
    own_B = jnp.where(speaks_B, layout.own_positions_per_turn, 0)
    counts_B = jnp.where(num_words_B > 0, layout.min_slots_out - num_words_B - own_B, 0).astype(jnp.int32)
    return counts_B, jnp.maximum(counts_B - 1, 0)


def padding_slots(counts_B: Int32[Array, "B"], layout: Layout, model: ModelConfig) -> Slots:
    """So many [pad] tokens for each session, as slots to feed: W = `max_padding_out`."""
    num_rows, width, video = counts_B.shape[0], layout.max_padding_out, model.video
    # Were all tokens the same, the compiler would embed them once before a loop over turns, and round otherwise than
    # in a single turn: slots that are not valid, which nothing reads, hold another one.
    special, valid_BW = layout.special, jnp.arange(width)[None] < counts_B[:, None]
    return Slots(
        tokens_BW=jnp.where(valid_BW, special.pad, special.end_of_text).astype(jnp.int32),
        kinds_BW=jnp.full((num_rows, width), Kind.TOKEN, jnp.uint8),
        levels_BWM=jnp.zeros((num_rows, width, model.audio.num_mels), jnp.uint8),
        tiles_BP=jnp.zeros((num_rows, 0, video.frames_per_tile, video.tile_px, video.tile_px, 3), jnp.int16),
        tile_index_BW=jnp.zeros((num_rows, width), jnp.int32),
        counts_B=counts_B,
    )
