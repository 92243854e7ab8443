"""Flow matching along straight lines: the loss of a velocity field, and sampling by integrating it.

A line goes from noise to data: x_t = (1 - t) x_0 + t x_1 with x_0 standard normal, so its velocity is x_1 - x_0. The
field that minimises the loss is E[x_1 - x_0 | x_t], and integrating it from t = 0 to 1 turns noise into data.

Source: Lipman et al. 2023; Liu et al. 2023 (rectified flow).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from tml.config import FlowSolver

Velocity = Callable[[Float32[Array, "*n Y"], Float32[Array, "*n"]], Float32[Array, "*n Y"]]
"""(x_t, t) to the velocity there."""


def flow_error(
    velocity: Velocity, data: Float32[Array, "*n Y"], noise: Float32[Array, "*n Y"], time: Float32[Array, "*n"]
) -> Float32[Array, "*n"]:
    """The mean squared error of a velocity field on lines from noise to data, at one time each.

    Example: for data of one Gaussian with deviation d, the least expected error is that of
    E[x_1 - x_0 | x_t] = mean + (t d^2 - (1 - t)) / ((1 - t)^2 + t^2 d^2) (x_t - t mean).
    """
    t = time[..., None]
    found = velocity((1.0 - t) * noise + t * data, time)
    return jnp.mean(jnp.square(found - (data - noise)), axis=-1)


def integrate(
    velocity: Velocity, noise: Float32[Array, "*n Y"], num_steps: int, solver: FlowSolver
) -> Float32[Array, "*n Y"]:
    """Follows the velocity field from noise at t = 0 to data at t = 1, in equal steps."""
    step = 1.0 / num_steps

    def advance(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        start = jnp.broadcast_to(number.astype(jnp.float32) * step, x.shape[:-1])
        slope = velocity(x, start)
        if solver is FlowSolver.MIDPOINT:
            slope = velocity(x + 0.5 * step * slope, start + 0.5 * step)
        return x + step * slope, None

    return jax.lax.scan(advance, noise, jnp.arange(num_steps))[0]
