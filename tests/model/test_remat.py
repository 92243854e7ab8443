"""What the backward pass of a layer makes anew."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from tml.config import MeshConfig, Remat
from tml.model.remat import EXPERT_RESULTS, kept, recomputed


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize(
    ("remat", "kept_anew", "experts_anew"),
    [
        (Remat.NONE, (0, 0), (0, 0)),
        (Remat.LAYER, (1, 1), (1, 1)),
        (Remat.EXPERTS, (0, 0), (1, 1)),
        (Remat.SLIDING_EXPERTS, (0, 0), (1, 0)),
    ],
)
def test_what_is_kept_is_made_once(
    remat: Remat, kept_anew: tuple[int, int], experts_anew: tuple[int, int], is_global: bool
) -> None:
    def layer(x: jax.Array) -> jax.Array:
        rows, units = checkpoint_name(jnp.sin(x), EXPERT_RESULTS[0]), checkpoint_name(jnp.log1p(x), EXPERT_RESULTS[1])
        return jnp.sum(rows**2 * units**2 * kept(jnp.arctan(x)) ** 2)

    run = recomputed(layer, remat, MeshConfig(), in_loop=True, is_global=is_global)
    program = str(jax.make_jaxpr(jax.grad(run))(jnp.ones(3)))
    assert program.count("= sin ") == program.count("= log1p ") == 1 + experts_anew[is_global]
    assert program.count("= atan ") == 1 + kept_anew[is_global]
