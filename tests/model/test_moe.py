"""Expert functions against the definition."""

import jax
import jax.numpy as jnp
import numpy as np

from tml.config import MatmulBackend, MoEConfig
from tml.model.moe import dense_experts, sorted_experts


def test_copies_sorted_by_expert_give_the_definition() -> None:
    cfg = MoEConfig(num_experts=5, num_experts_per_token=2, expert_dim=6)
    keys = jax.random.split(jax.random.key(0), 5)
    weights = {"gate_up": jax.random.normal(keys[0], (5, 4, 2, 6)), "down": jax.random.normal(keys[1], (5, 6, 4))}
    h, gates = jax.random.normal(keys[2], (9, 4)), jax.random.uniform(keys[3], (9, 2))
    experts = jnp.argsort(jax.random.uniform(keys[4], (9, 5)), axis=1)[:, :2].astype(jnp.int32)
    ours, expected = (
        jax.jit(jax.grad(lambda w, h, g, f=f: jnp.sum(jnp.square(f(w, h, g))), (0, 1, 2)))(weights, h, gates)
        for f in (
            lambda w, h, g: sorted_experts(w, h, g, experts, cfg, MatmulBackend.BLOCKED),
            lambda w, h, g: dense_experts(w, h, g, experts, cfg),
        )
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected)
