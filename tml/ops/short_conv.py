"""The residual short convolution: x + depthwise causal convolution of x, in float32 whatever the input's dtype."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32


@jax.custom_vjp
def short_conv_rows(
    x_BSD: Float[Array, "B S D"], taps_YD: Float[Array, "Y D"], positions_BS: Int32[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Convolves packed rows; a tap that would reach before its segment's start reads zero.

    Its gradient is written out, so that what is shifted is in the input's dtype both ways, and only sums are float32.

    Args:
        x_BSD: inputs.
        taps_YD: taps, oldest first; the last one multiplies the present position.
        positions_BS: position within the segment.
    """
    out = x_BSD.astype(jnp.float32) * (1.0 + taps_YD[-1])[None, None]
    for lag in _lags(x_BSD, taps_YD):
        past = _seen(_shifted(x_BSD, lag), positions_BS, lag)
        out = out + past.astype(jnp.float32) * taps_YD[-1 - lag][None, None]
    return out.astype(x_BSD.dtype)


def _short_conv_fwd(
    x_BSD: jax.Array, taps_YD: jax.Array, positions_BS: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return short_conv_rows(x_BSD, taps_YD, positions_BS), (x_BSD, taps_YD, positions_BS)


def _short_conv_bwd(
    saved: tuple[jax.Array, jax.Array, jax.Array], grad_BSD: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_BSD, taps_YD, positions_BS = saved
    grad_f32 = grad_BSD.astype(jnp.float32)
    grad_x = grad_f32 * (1.0 + taps_YD[-1])[None, None]
    grad_taps = [jnp.sum(grad_f32 * x_BSD.astype(jnp.float32), axis=(0, 1))]
    for lag in _lags(x_BSD, taps_YD):
        # A position's gradient comes from those behind it that saw it.
        later = _shifted(_seen(grad_BSD, positions_BS, lag), -lag).astype(jnp.float32)
        grad_x = grad_x + later * taps_YD[-1 - lag][None, None]
        grad_taps.insert(0, jnp.sum(later * x_BSD.astype(jnp.float32), axis=(0, 1)))
    missing = taps_YD.shape[0] - len(grad_taps)
    grad_taps_YD = jnp.pad(jnp.stack(grad_taps), ((missing, 0), (0, 0)))
    return grad_x.astype(x_BSD.dtype), grad_taps_YD.astype(taps_YD.dtype), None


short_conv_rows.defvjp(_short_conv_fwd, _short_conv_bwd)


def _lags(x_BSD: jax.Array, taps_YD: jax.Array) -> range:
    return range(1, min(taps_YD.shape[0], x_BSD.shape[1]))


def _shifted(x_BSD: jax.Array, lag: int) -> jax.Array:
    """Every slot moved `lag` slots on, zeros where none comes from."""
    return jax.lax.pad(x_BSD, jnp.zeros((), x_BSD.dtype), ((0, 0, 0), (lag, -lag, 0), (0, 0, 0)))


def _seen(x_BSD: jax.Array, positions_BS: jax.Array, lag: int) -> jax.Array:
    """Zero where the slot `lag` before belongs to another segment."""
    return jnp.where((positions_BS >= lag)[:, :, None], x_BSD, jnp.zeros((), x_BSD.dtype))


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
        history_BYD: the last Y - 1 valid inputs, as they came (zeros at the start of a session).
        counts_B: valid slots of each session.

    Returns:
        The outputs, and the history after the valid slots.
    """
    num_taps, num_slots = taps_YD.shape[0], x_BWD.shape[1]
    line_BTD = jnp.concatenate([history_BYD, x_BWD], axis=1)
    out = x_BWD.astype(jnp.float32) * (1.0 + taps_YD[-1])[None, None]
    for lag in range(1, num_taps):
        first = num_taps - 1 - lag
        out = out + line_BTD[:, first : first + num_slots].astype(jnp.float32) * taps_YD[first][None, None]
    if num_slots == 1:
        # A choice of two; rows are gathered slower.
        history_BYD = jnp.where((counts_B > 0)[:, None, None], line_BTD[:, 1:], history_BYD)
    else:
        keep_BY = counts_B[:, None] + jnp.arange(num_taps - 1)[None]
        history_BYD = jnp.take_along_axis(line_BTD, keep_BY[:, :, None], axis=1)
    return out.astype(x_BWD.dtype), history_BYD


def zero_history(num_rows: int, num_taps: int, width: int, dtype: DTypeLike) -> Float[Array, "B y D"]:
    """The history of a session that has not begun, in the dtype of the inputs."""
    return jnp.zeros((num_rows, num_taps - 1, width), dtype)
