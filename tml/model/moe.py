"""The feed-forward sub-layers: dense, and a mixture of routed and shared experts under one softmax."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from tml.config import MatmulBackend, ModelConfig, MoEConfig
from tml.ops.grouped_matmul import block_matmul, collect, dispatch, grouped_matmul, plan_blocks
from tml.params import Init, ParamSpec, PyTree, Update, param, scale

ExpertFunction = Callable[
    [Mapping[str, jax.Array], Float[Array, "t D"], Float[Array, "t k"], Int32[Array, "t k"], MoEConfig],
    Float[Array, "t D"],
]
"""(weights, tokens, gate of each choice, expert of each choice, config) to the gated sum over the choices."""


def dense_specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters of a dense gated MLP."""
    sizes = {"D": cfg.d_model, "F": cfg.dense_dim, "Z": 2}
    return {
        "gate_up": param("D Z F", sizes, fan_in="D"),
        "down": param("F D", sizes, fan_in="F"),
        "scale": scale("", sizes),
    }


def moe_specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters of a mixture-of-experts sub-layer."""
    moe = cfg.moe
    sizes = {"D": cfg.d_model, "F": moe.expert_dim, "Z": 2, "E": moe.num_experts, "A": moe.num_shared_experts}
    return {
        "router": param("D E", sizes, fan_in="D", update=Update.EMBEDDING),
        "shared_router": param("D A", sizes, fan_in="D", update=Update.EMBEDDING),
        "router_bias": param("E", sizes, init=Init.ZEROS, update=Update.BALANCE),
        "scale": scale("", sizes),
        "gate_up": param("E D Z F", sizes, fan_in="D"),
        "down": param("E F D", sizes, fan_in="F"),
        "shared_gate_up": param("A D Z F", sizes, fan_in="D"),
        "shared_down": param("A F D", sizes, fan_in="F"),
    }


def apply_dense(params: Mapping[str, PyTree], h_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """(silu(gate) * up) down, times a learned scalar."""
    dtype = h_BSD.dtype
    both = jnp.einsum("BSD,DZF->BSZF", h_BSD, params["gate_up"].astype(dtype))
    hidden = jax.nn.silu(both[:, :, 0]) * both[:, :, 1]
    return (hidden @ params["down"].astype(dtype)) * params["scale"].astype(dtype)


def route(
    params: Mapping[str, PyTree], h_TD: Float[Array, "t D"], cfg: MoEConfig
) -> tuple[Int32[Array, "t k"], Float32[Array, "t k"], Float32[Array, "t A"]]:
    """Chooses experts and gates, in float32.

    The bias moves the choice only. Gates are a softmax over the log-sigmoids of the chosen and
    the shared experts together.

    Returns:
        Expert and gate of each choice, and the gates of the shared experts.
    """
    h_f32 = h_TD.astype(jnp.float32)
    z_TE = jnp.einsum("tD,DE->tE", h_f32, params["router"], precision="highest")
    z_TA = jnp.einsum("tD,DA->tA", h_f32, params["shared_router"], precision="highest")
    preference_TE = jax.lax.stop_gradient(jax.nn.sigmoid(z_TE) + params["router_bias"][None])
    _, experts_TK = jax.lax.top_k(preference_TE, cfg.num_experts_per_token)
    chosen_TK = jnp.take_along_axis(z_TE, experts_TK, axis=1)
    log_gates = jax.nn.log_sigmoid(jnp.concatenate([chosen_TK, z_TA], axis=1))
    gates = jax.nn.softmax(log_gates, axis=-1) * cfg.route_scale * params["scale"]
    return experts_TK, gates[:, : cfg.num_experts_per_token], gates[:, cfg.num_experts_per_token :]


def apply_moe(
    params: Mapping[str, PyTree],
    h_BSD: Float[Array, "B S D"],
    valid_BS: Bool[Array, "B S"],
    experts: ExpertFunction,
    cfg: MoEConfig,
) -> tuple[Float[Array, "B S D"], Float32[Array, "E"]]:
    """The gated sum over routed and shared experts, and how many valid copies each routed expert got."""
    dtype = h_BSD.dtype
    h_TD = h_BSD.reshape(-1, h_BSD.shape[-1])
    with jax.named_scope("router"):
        experts_TK, gates_TK, shared_gates_TA = route(params, h_TD, cfg)
        choice_TKE = jax.nn.one_hot(experts_TK, cfg.num_experts, dtype=jnp.float32)
        load_E = jnp.einsum("tkE,t->E", choice_TKE, valid_BS.reshape(-1).astype(jnp.float32))
    with jax.named_scope("experts"):
        weights = {name: params[name].astype(dtype) for name in ("gate_up", "down")}
        out_TD = experts(weights, h_TD, gates_TK.astype(dtype), experts_TK, cfg)
    with jax.named_scope("shared_experts"):
        both = jnp.einsum("tD,ADZF->tAZF", h_TD, params["shared_gate_up"].astype(dtype))
        hidden = jax.nn.silu(both[:, :, 0]) * both[:, :, 1] * shared_gates_TA.astype(dtype)[:, :, None]
        down_AFD = params["shared_down"].astype(dtype)
        shared = jnp.einsum("tAF,AFD->tD", hidden, down_AFD, preferred_element_type=jnp.float32)
        out_TD = out_TD + shared.astype(dtype)
    return out_TD.reshape(h_BSD.shape), load_E


def blocked_experts(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    cfg: MoEConfig,
) -> Float[Array, "t D"]:
    """Training: copies gathered into blocks of one expert each, so that cost follows active experts."""
    plan = plan_blocks(experts_TK, cfg.num_experts, cfg.block_rows)
    both = block_matmul(dispatch(h_TD, plan), _fused(weights["gate_up"]), plan.expert_of_block)
    gate, up = jnp.split(both, 2, axis=-1)
    down = block_matmul(jax.nn.silu(gate) * up, weights["down"], plan.expert_of_block)
    return jnp.sum(collect(down, plan) * gates_TK[:, :, None], axis=1)


def sorted_experts(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    cfg: MoEConfig,
    backend: MatmulBackend,
) -> Float[Array, "t D"]:
    """Training with a platform's kernels: copies sorted by expert, then two grouped matmuls."""
    plan = plan_blocks(experts_TK, cfg.num_experts, block_rows=1)
    choice_TKE = jax.nn.one_hot(experts_TK, cfg.num_experts, dtype=jnp.int32)
    group_sizes_E = jnp.sum(choice_TKE, axis=(0, 1))
    both = grouped_matmul(dispatch(h_TD, plan), _fused(weights["gate_up"]), group_sizes_E, backend)
    gate, up = jnp.split(both, 2, axis=-1)
    down = grouped_matmul(jax.nn.silu(gate) * up, weights["down"], group_sizes_E, backend)
    return jnp.sum(collect(down, plan) * gates_TK[:, :, None], axis=1)


def dense_experts(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    cfg: MoEConfig,
) -> Float[Array, "t D"]:
    """The definition: every expert on every token, weighted by its gate or by zero."""
    both = jnp.einsum("tD,EDZF->tEZF", h_TD, weights["gate_up"])
    out_TED = jnp.einsum("tEF,EFD->tED", jax.nn.silu(both[:, :, 0]) * both[:, :, 1], weights["down"])
    choice_TKE = jax.nn.one_hot(experts_TK, cfg.num_experts, dtype=gates_TK.dtype)
    return jnp.einsum("tED,tk,tkE->tD", out_TED, gates_TK, choice_TKE)


def gathered_experts(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    cfg: MoEConfig,
) -> Float[Array, "t D"]:
    """Streaming: each of a few tokens fetches its own experts, so that no session can change another's bits."""
    both = jnp.einsum("tD,tkDF->tkF", h_TD, _fused(weights["gate_up"])[experts_TK])
    gate, up = jnp.split(both, 2, axis=-1)
    out_TKD = jnp.einsum("tkF,tkFD->tkD", jax.nn.silu(gate) * up, weights["down"][experts_TK])
    return jnp.sum(out_TKD * gates_TK[:, :, None], axis=1)


def _fused(gate_up_EDZF: Float[Array, "E D Z F"]) -> Float[Array, "E D f"]:
    return gate_up_EDZF.reshape(*gate_up_EDZF.shape[:2], -1)


EXPERT_FUNCTIONS: dict[MatmulBackend, ExpertFunction] = {
    MatmulBackend.BLOCKED: blocked_experts,
    MatmulBackend.DENSE: dense_experts,
    MatmulBackend.TPU: functools.partial(sorted_experts, backend=MatmulBackend.TPU),
    MatmulBackend.GPU: functools.partial(sorted_experts, backend=MatmulBackend.GPU),
}


def balanced_bias(
    bias_E: Float32[Array, "*L E"], load_E: Float32[Array, "*L E"], rate: float
) -> Float32[Array, "*L E"]:
    """Moves the selection bias by a fixed step towards under-loaded experts (Wang et al. 2024, algorithm 1)."""
    return bias_E + rate * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)
