"""The feed-forward sub-layers: dense, and a mixture of routed and shared experts under one softmax."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from tml.config import ModelConfig, MoEConfig
from tml.model.expert_dispatch import ExpertFunction, SharedExperts, SharedFunction
from tml.model.remat import kept
from tml.ops.projection import project
from tml.params import Init, ParamSpec, PyTree, Update, param, scale


class Load(NamedTuple):
    """What a mixture layer reports of a batch, or of this device's part of it.

    Attributes:
        copies_E: copies of valid positions routed to each expert.
        num_dropped: copies, padding's included, that found no room.
    """

    copies_E: Float32[Array, "*L E"]
    num_dropped: Int32[Array, "*L"]


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
    routed = {
        "router": param("D E", sizes, fan_in="D", update=Update.EMBEDDING),
        "router_bias": param("E", sizes, init=Init.ZEROS, update=Update.BALANCE),
        "scale": scale("", sizes),
        "gate_up": param("E D Z F", sizes, fan_in="D"),
        "down": param("E F D", sizes, fan_in="F"),
    }
    shared = {
        "shared_router": param("D A", sizes, fan_in="D", update=Update.EMBEDDING),
        "shared_gate_up": param("A D Z F", sizes, fan_in="D"),
        "shared_down": param("A F D", sizes, fan_in="F"),
    }
    return {**routed, **shared} if moe.num_shared_experts else routed


def apply_dense(
    params: Mapping[str, PyTree], h_BSD: Float[Array, "B S D"], add_shards: Callable[[jax.Array], jax.Array]
) -> Float[Array, "B S D"]:
    """(silu(gate) * up) down, times a learned scalar; `add_shards` sums over the devices that split F."""
    dtype = h_BSD.dtype
    gate_up_DZF = params["gate_up"].astype(dtype)
    gate, up = jnp.split(kept(project(h_BSD, gate_up_DZF.reshape(gate_up_DZF.shape[0], -1))), 2, axis=-1)
    return kept(add_shards(project(jax.nn.silu(gate) * up, params["down"].astype(dtype)))) * params["scale"].astype(
        dtype
    )


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
    z_TE = kept(jnp.einsum("tD,DE->tE", h_f32, params["router"], precision="highest"))
    preference_TE = jax.lax.stop_gradient(jax.nn.sigmoid(z_TE) + params["router_bias"][None])
    _, experts_TK = jax.lax.top_k(preference_TE, cfg.num_experts_per_token)
    # The sum of one value and zeros: TPUs gather single numbers slowly.
    is_choice_TKE = experts_TK[:, :, None] == jnp.arange(cfg.num_experts, dtype=jnp.int32)[None, None]
    chosen_TK = jnp.sum(jnp.where(is_choice_TKE, z_TE[:, None], 0.0), axis=2)
    if cfg.num_shared_experts:
        z_TA = jnp.einsum("tD,DA->tA", h_f32, params["shared_router"], precision="highest")
        chosen_TK = jnp.concatenate([chosen_TK, z_TA], axis=1)
    gates = jax.nn.softmax(jax.nn.log_sigmoid(chosen_TK), axis=-1) * cfg.route_scale * params["scale"]
    return experts_TK, gates[:, : cfg.num_experts_per_token], gates[:, cfg.num_experts_per_token :]


def apply_moe(
    params: Mapping[str, PyTree],
    h_BSD: Float[Array, "B S D"],
    valid_BS: Bool[Array, "B S"],
    experts: ExpertFunction,
    shared_experts: SharedFunction,
    add_shards: Callable[[jax.Array], jax.Array],
    cfg: MoEConfig,
) -> tuple[Float[Array, "B S D"], Load]:
    """The gated sum over routed and shared experts, and their load; `add_shards` sums over devices that split F."""
    dtype = h_BSD.dtype
    h_TD = h_BSD.reshape(-1, h_BSD.shape[-1])
    with jax.named_scope("router"):
        experts_TK, gates_TK, shared_gates_TA = route(params, h_TD, cfg)
        choice_TKE = jax.nn.one_hot(experts_TK, cfg.num_experts, dtype=jnp.float32)
        load_E = jnp.einsum("tkE,t->E", choice_TKE, valid_BS.reshape(-1).astype(jnp.float32))
    weights, shared_weights = (
        {name: params[f"{which}{name}"].astype(dtype) for name in ("gate_up", "down") if f"{which}{name}" in params}
        for which in ("", "shared_")
    )
    shared = SharedExperts(shared_experts, shared_weights, shared_gates_TA) if shared_weights else None
    out_TD, num_dropped = experts(weights, h_TD, gates_TK.astype(dtype), experts_TK, cfg, shared)
    return kept(add_shards(out_TD)).reshape(h_BSD.shape), Load(load_E, num_dropped)


def balanced_bias(
    bias_E: Float32[Array, "*L E"], load_E: Float32[Array, "*L E"], rate: float
) -> Float32[Array, "*L E"]:
    """Moves the selection bias by a fixed step towards under-loaded experts (Wang et al. 2024, algorithm 1)."""
    return bias_E + rate * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)
