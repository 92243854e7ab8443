"""Flow matching against closed forms: the least error, the field of a Gaussian, the moments of sampled mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tml.config import FlowSolver
from tml.ops.flow_matching import flow_error, integrate

MEANS = np.array([[-2.0, 0.5], [1.0, 2.0], [3.0, -1.0]], np.float32)
DEVIATIONS = np.array([0.4, 0.8, 0.3], np.float32)
SHARES = np.array([0.5, 0.2, 0.3], np.float32)


def mixture_velocity(x_nY: jax.Array, time_n: jax.Array) -> jax.Array:
    """E[x_1 - x_0 | x_t] of a mixture of Gaussians: each component's, weighted by how likely it made the point."""
    t = time_n[:, None, None]
    means, deviations = jnp.asarray(MEANS)[None], jnp.asarray(DEVIATIONS)[None, :, None]
    variance = (1 - t) ** 2 + (t * deviations) ** 2
    away = x_nY[:, None] - t * means
    slopes = means + (t * deviations**2 - (1 - t)) / variance * away
    logs = jnp.log(jnp.asarray(SHARES))[None, :, None] - 0.5 * jnp.sum(
        away**2 / variance + jnp.log(variance), axis=2, keepdims=True
    )
    return jnp.sum(jax.nn.softmax(logs, axis=1) * slopes, axis=1)


@pytest.mark.parametrize(("solver", "num_steps"), [(FlowSolver.EULER, 100), (FlowSolver.MIDPOINT, 24)])
def test_samples_have_the_moments_of_the_mixture(solver: FlowSolver, num_steps: int) -> None:
    noise = jax.random.normal(jax.random.key(0), (20_000, 2))
    found = np.asarray(jax.jit(lambda x: integrate(mixture_velocity, x, num_steps, solver))(noise))
    mean = SHARES @ MEANS
    variance = SHARES @ (DEVIATIONS[:, None] ** 2 + MEANS**2) - mean**2
    np.testing.assert_allclose(found.mean(axis=0), mean, atol=0.06)
    np.testing.assert_allclose(found.var(axis=0), variance, rtol=0.05)
    nearest = np.argmin(np.square(found[:, None] - MEANS[None]).sum(axis=2) / DEVIATIONS[None] ** 2, axis=1)
    np.testing.assert_allclose(np.bincount(nearest, minlength=3) / len(found), SHARES, atol=0.03)


def test_the_closed_form_has_the_least_error_and_that_error_is_known() -> None:
    deviation, mean, count = 0.7, 1.5, 40_000
    for_data, for_noise, for_time = jax.random.split(jax.random.key(1), 3)
    data = mean + deviation * jax.random.normal(for_data, (count, 3))
    noise, time = jax.random.normal(for_noise, (count, 3)), jax.random.uniform(for_time, (count,))

    def best(x: jax.Array, t: jax.Array) -> jax.Array:
        t = t[:, None]
        return mean + (t * deviation**2 - (1 - t)) / ((1 - t) ** 2 + (t * deviation) ** 2) * (x - t * mean)

    # Of x_1 - x_0 given x_t, what is left: the conditional variance, integrated over time.
    times = (np.arange(10_000) + 0.5) / 10_000
    total = (1 - times) ** 2 + (times * deviation) ** 2
    least = np.mean(1 + deviation**2 - (times * deviation**2 - (1 - times)) ** 2 / total)
    found = float(flow_error(best, data, noise, time).mean())
    assert found == pytest.approx(least, rel=0.02)
    for change in (lambda v: 1.1 * v, lambda v: v + 0.2, lambda v: 0.0 * v):
        worse = float(flow_error(lambda x, t, change=change: change(best(x, t)), data, noise, time).mean())
        assert worse > found


def test_a_straight_field_takes_one_step() -> None:
    noise, data = jax.random.normal(jax.random.key(2), (2, 5, 4))
    for solver in FlowSolver:
        found = integrate(lambda x, t: data - noise, noise, 1, solver)
        np.testing.assert_allclose(found, data, rtol=1e-5, atol=1e-6)
