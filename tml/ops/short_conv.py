"""The residual short convolution: x + depthwise causal convolution of x, in float32 whatever the input's dtype."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def short_conv_rows(
    x_BSD: Float[Array, "B S D"], taps_YD: Float[Array, "Y D"], positions_BS: Int32[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Convolves packed rows; a tap that would reach before its segment's start reads zero.

    Args:
        x_BSD: inputs.
        taps_YD: taps, oldest first; the last one multiplies the present position.
        positions_BS: position within the segment.
    """
    num_taps, num_slots = taps_YD.shape[0], x_BSD.shape[1]
    x_f32 = x_BSD.astype(jnp.float32)
    out = x_f32 * (1.0 + taps_YD[-1])[None, None]
    for lag in range(1, min(num_taps, num_slots)):
        past = jnp.pad(x_f32[:, :-lag], ((0, 0), (lag, 0), (0, 0)))
        past = jnp.where((positions_BS >= lag)[:, :, None], past, 0.0)
        out = out + past * taps_YD[num_taps - 1 - lag][None, None]
    return out.astype(x_BSD.dtype)


def short_conv_stream(
    x_BWD: Float[Array, "B W D"],
    taps_YD: Float[Array, "Y D"],
    history_BYD: Float[Array, "B y D"],
    counts_B: Int32[Array, "B"],
) -> tuple[Float[Array, "B W D"], Float[Array, "B y D"]]:
    """Convolves the next slots of live sessions, of which the first `counts_B` are valid.

    Args:
        x_BWD: inputs of this turn.
        taps_YD: taps, oldest first.
        history_BYD: the last Y - 1 valid inputs (float32, zeros at the start of a session).
        counts_B: valid slots of each session.

    Returns:
        The outputs, and the history after the valid slots.
    """
    num_taps, num_slots = taps_YD.shape[0], x_BWD.shape[1]
    line_BTD = jnp.concatenate([history_BYD, x_BWD.astype(jnp.float32)], axis=1)
    out = line_BTD[:, num_taps - 1 :] * (1.0 + taps_YD[-1])[None, None]
    for lag in range(1, num_taps):
        first = num_taps - 1 - lag
        out = out + line_BTD[:, first : first + num_slots] * taps_YD[first][None, None]
    keep_BY = counts_B[:, None] + jnp.arange(num_taps - 1)[None]
    history_BYD = jnp.take_along_axis(line_BTD, keep_BY[:, :, None], axis=1)
    return out.astype(x_BWD.dtype), history_BYD


def zero_history(num_rows: int, num_taps: int, width: int) -> Float[Array, "B y D"]:
    """The history of a session that has not begun."""
    return jnp.zeros((num_rows, num_taps - 1, width), jnp.float32)
