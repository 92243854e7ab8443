"""The mixture sub-layer by the words of its definition, in NumPy, with shared experts and without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_model

from tml.model import moe
from tml.model.expert_dispatch import dense_experts, shared_experts
from tml.params import init_params


def expert(h_D: np.ndarray, gate_up_DZF: np.ndarray, down_FD: np.ndarray) -> np.ndarray:
    gate_F, up_F = h_D @ gate_up_DZF[:, 0], h_D @ gate_up_DZF[:, 1]
    return (gate_F / (1 + np.exp(-gate_F)) * up_F) @ down_FD


@pytest.mark.parametrize("num_shared", [0, 2])
def test_a_mixture_is_the_gated_sum_of_chosen_and_shared_experts(num_shared):
    cfg = tiny_model()
    cfg = dataclasses.replace(
        cfg, moe=dataclasses.replace(cfg.moe, num_experts=5, num_shared_experts=num_shared, route_scale=2.5)
    )
    specs = moe.moe_specs(cfg)
    assert ("shared_down" in specs) == (num_shared > 0)
    params = init_params(specs, jax.random.key(0))
    params["router_bias"] = jnp.array([0.3, -0.2, 0.0, 0.4, -0.1])
    h_BSD = jax.random.normal(jax.random.key(1), (1, 4, cfg.d_model))
    out, load = moe.apply_moe(
        params, h_BSD, jnp.ones((1, 4), bool), dense_experts, shared_experts, lambda x: x, cfg.moe
    )
    p = jax.tree.map(np.asarray, params)
    copies = np.zeros(5)
    for h_D, out_D in zip(np.asarray(h_BSD[0]), np.asarray(out[0]), strict=True):
        z_E = h_D @ p["router"]
        chosen = np.argsort(-(1 / (1 + np.exp(-z_E)) + p["router_bias"]))[: cfg.moe.num_experts_per_token]
        copies[chosen] += 1
        z = np.concatenate([z_E[chosen], h_D @ p["shared_router"] if num_shared else []])
        sigmoid = 1 / (1 + np.exp(-z))
        gates = 2.5 * float(p["scale"]) * sigmoid / sigmoid.sum()
        matrices = [(p["gate_up"][e], p["down"][e]) for e in chosen]
        matrices += [(p["shared_gate_up"][a], p["shared_down"][a]) for a in range(num_shared)]
        expected = sum(gate * expert(h_D, *pair) for gate, pair in zip(gates, matrices, strict=True))
        np.testing.assert_allclose(out_D, expected, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(load.copies_E, copies)
