"""Fixed slots: the [pad] tokens of an output half, which the sessions are fed at once when their words are over."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from tml.config import ModelConfig
from tml.microturn import Layout
from tml.model.cache import Slots, slots_of


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
    # Were all tokens the same, the compiler would embed them once before a loop over turns, and round otherwise than
    # in a single turn: slots that are not valid, which nothing reads, hold another one.
    special, valid_BW = layout.special, jnp.arange(layout.max_padding_out)[None] < counts_B[:, None]
    tokens_BW = jnp.where(valid_BW, special.pad, special.end_of_text).astype(jnp.int32)
    return slots_of(tokens_BW, counts_B, model)
