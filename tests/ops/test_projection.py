"""A projection equals the einsum it stands for, forward and in both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tml.ops.projection import project


@pytest.mark.parametrize(
    ("formula", "x_shape", "w_shape", "num_summed"),
    [
        ("BSD,DNH->BSNH", (2, 5, 8), (8, 3, 4), 1),
        ("BSNH,NHD->BSD", (2, 5, 3, 4), (3, 4, 8), 2),
        ("tD,DF->tF", (7, 8), (8, 6), 1),
        ("BSMQ,MQD->BSD", (2, 5, 3, 4), (3, 4, 6), 2),
    ],
)
def test_equals_the_einsum(formula, x_shape, w_shape, num_summed):
    drawn = np.random.default_rng(0)
    x, w = (jnp.asarray(drawn.normal(size=shape), jnp.float32) for shape in (x_shape, w_shape))
    expected, pull = jax.vjp(lambda x, w: jnp.einsum(formula, x, w, precision="highest"), x, w)
    found, pull_found = jax.vjp(lambda x, w: project(x, w, num_summed), x, w)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    grad = jnp.asarray(drawn.normal(size=expected.shape), jnp.float32)
    for one, other in zip(pull_found(grad), pull(grad), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_sums_in_another_dtype():
    x, w = jnp.full((1, 2, 512), 1.0, jnp.bfloat16), jnp.full((512, 3), 1.0 / 64, jnp.bfloat16)
    assert project(x, w).dtype == jnp.bfloat16
    assert project(x, w, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(("w_shape", "num_summed"), [((4, 5), 1), ((3, 2, 6), 2)])
def test_axes_that_do_not_fit_are_an_error(w_shape, num_summed):
    with pytest.raises(AssertionError):
        project(jnp.ones((7, 2, 3)), jnp.ones(w_shape), num_summed)
