"""Dense projections: every position times one matrix."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def project(x: jax.Array, weights: jax.Array, num_summed: int = 1, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Sums the last `num_summed` axes of x with the first ones of the weights, as one product of two matrices.

    Positions are flattened first. An einsum over rows and slots gives the same, but its gradient by the weights sums
    over two axes, for which XLA on CPU writes the other factor out transposed: a fifth of a small model's step.

    Args:
        x: positions, then the axes that are summed.
        weights: the axes that are summed, then those of the output.
        num_summed: how many axes are summed.
        out_dtype: of the sums; that of x by default.

    Returns:
        Positions, then the output's axes.

    Example:
        >>> q_BSNH = project(h_BSD, q_DNH)
        >>> h_BSD = project(out_BSNH, o_NHD, num_summed=2)
    """
    positions, outputs = x.shape[: x.ndim - num_summed], weights.shape[num_summed:]
    assert x.shape[x.ndim - num_summed :] == weights.shape[:num_summed], (
        f"{x.shape} do not end as {weights.shape} begin"
    )
    inner = math.prod(weights.shape[:num_summed])
    product = jnp.matmul(x.reshape(-1, inner), weights.reshape(inner, -1), preferred_element_type=out_dtype)
    return _with_stored_gradient(product).reshape(*positions, *outputs)


@jax.custom_vjp
def _with_stored_gradient(x: jax.Array) -> jax.Array:
    """x, whose gradient is stored before it is used.

    Two matmuls use it. XLA on TPU would fuse what makes it into both of them, to be made again for every tile.
    """
    return x


def _stored_fwd(x: jax.Array) -> tuple[jax.Array, None]:
    return x, None


def _stored_bwd(_: None, grad: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.optimization_barrier(grad),)


_with_stored_gradient.defvjp(_stored_fwd, _stored_bwd)
