"""Experts in live sessions: what a token chose is what it gets, whatever the others do."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.model.test_expert_dispatch import CHOICES, EXPERTS, WIDTH, config
from tml.model.expert_dispatch import dense_experts
from tml.model.live_weights import LayerOfStack, chosen_experts


def test_streamed_tokens_get_their_experts_whatever_the_others_choose() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    weights = {
        "gate_up": jax.random.normal(keys[0], (EXPERTS, WIDTH, 2, 5)),
        "down": jax.random.normal(keys[1], (EXPERTS, 5, WIDTH)),
    }
    h = jax.random.normal(keys[2], (4, WIDTH))
    gates = jax.random.uniform(keys[3], (4, CHOICES))
    experts = jnp.array([[6, 1], [1, 2], [7, 3], [5, 0]], jnp.int32)
    cfg, everyone = config(1.25), jnp.ones(4, bool)
    run = jax.jit(chosen_experts, static_argnums=5)
    stacks = {name: LayerOfStack(jnp.stack([jnp.zeros_like(each), each]), 1) for name, each in weights.items()}
    out = run(stacks, h, gates, experts, everyone, cfg).out_TD
    np.testing.assert_allclose(out, dense_experts(weights, h, gates, experts, cfg, None).out_TD, rtol=1e-5, atol=1e-5)
    # Another token that overflows, chooses differently or is not there leaves the first two as they are, to the bit.
    others = run(stacks, h.at[2:].set(1e38), gates, experts.at[2:].set(4), everyone, cfg).out_TD
    alone = run(stacks, h, gates, experts, jnp.arange(4) < 2, cfg).out_TD
    np.testing.assert_array_equal(others[:2], out[:2])
    np.testing.assert_array_equal(alone[:2], out[:2])
