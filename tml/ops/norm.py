"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*b D"], weight_D: Float[Array, "D"], eps: float) -> Float[Array, "*b D"]:
    """Divides by the root mean square over the last axis, in float32, then scales (Zhang and Sennrich 2019)."""
    x_f32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight_D.astype(x.dtype), range(x.ndim - 1))
    return weight * (x_f32 * scale).astype(x.dtype)
