"""What the backward pass of a layer makes anew."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import print_saved_residuals

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


def test_a_mesh_keeps_no_weight_that_was_gathered(capsys: pytest.CaptureFixture) -> None:
    def layer(w: jax.Array, x: jax.Array) -> jax.Array:
        w = jax.lax.optimization_barrier(w.astype(jnp.bfloat16).reshape(3, 5))
        return jnp.sum(jnp.sin(x @ w))

    run = recomputed(layer, Remat.NONE, MeshConfig(fsdp=2), in_loop=False)
    print_saved_residuals(run, jnp.ones(15), jnp.ones((2, 3), jnp.bfloat16))
    saved = capsys.readouterr().out.splitlines()
    assert any(line.startswith("bf16[2,5]") for line in saved), saved
    assert not any(line.startswith("bf16[3,5]") for line in saved), saved
