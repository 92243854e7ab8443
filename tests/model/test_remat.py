"""What the backward pass of a layer makes anew."""

import jax
import jax.numpy as jnp
import pytest

from tml.config import MeshConfig, Remat
from tml.model.remat import kept, recomputed


@pytest.mark.parametrize(
    ("remat", "kept_anew", "others_anew"), [(Remat.NONE, 0, 0), (Remat.EXPERTS, 0, 1), (Remat.LAYER, 1, 1)]
)
def test_what_is_kept_is_made_once(remat: Remat, kept_anew: int, others_anew: int) -> None:
    def layer(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x) ** 2 * kept(jnp.arctan(x)) ** 2)

    run = recomputed(layer, remat, MeshConfig(), in_loop=True)
    program = str(jax.make_jaxpr(jax.grad(run))(jnp.ones(3)))
    assert program.count("= sin ") == 1 + others_anew
    assert program.count("= atan ") == 1 + kept_anew
