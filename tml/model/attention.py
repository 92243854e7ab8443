"""The attention sub-layer: projections, short convolutions of keys and values, per-head norms, relative bias."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tml.config import ModelConfig
from tml.model.layer_functions import LayerFunctions, LayerState, log_length_scale
from tml.ops.norm import rms_norm
from tml.ops.projection import project
from tml.params import ParamSpec, PyTree, Update, param, scale, taps


def specs(is_global: bool, cfg: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters of one attention sub-layer."""
    attention = cfg.attention
    sizes = {
        "D": cfg.d_model,
        "N": attention.num_heads,
        "K": attention.num_kv_heads,
        "H": attention.head_dim,
        "J": attention.rel_rank,
        "X": attention.global_extent if is_global else attention.window,
        "Y": cfg.conv_taps,
    }
    return {
        "q": param("D N H", sizes, fan_in="D"),
        "k": param("D K H", sizes, fan_in="D"),
        "v": param("D K H", sizes, fan_in="D"),
        "r": param("D N J", sizes, fan_in="D"),
        "o": param("N H D", sizes, fan_in="N H"),
        "q_norm": scale("H", sizes),
        "k_norm": scale("H", sizes),
        "k_conv": taps("Y K H", sizes),
        "v_conv": taps("Y K H", sizes),
        "profiles": param("J X", sizes, fan_in="J", update=Update.VECTOR, smooth_axis="X"),
    }


def apply(
    params: Mapping[str, PyTree],
    h_BSD: Float[Array, "B S D"],
    state: LayerState | None,
    is_global: bool,
    functions: LayerFunctions,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B S D"], LayerState | None]:
    """Attends; logits are q.k / head_dim + bias, because q and k are normed per head (so 1/d, not 1/sqrt(d))."""
    dtype, eps, head_dim = h_BSD.dtype, cfg.norm_eps, cfg.attention.head_dim
    q_BSNH, r_BSNJ = (project(h_BSD, params[name].astype(dtype)) for name in ("q", "r"))
    kv_shape = (*h_BSD.shape[:2], *params["k"].shape[1:])
    convolved = {}
    for name in ("k", "v"):
        flat = project(h_BSD, params[name].astype(dtype).reshape(h_BSD.shape[-1], -1))
        taps_YD = params[f"{name}_conv"].reshape(cfg.conv_taps, -1)
        flat, state = functions.conv(name, flat, taps_YD, state)
        convolved[name] = flat.reshape(kv_shape)
    q_BSNH = rms_norm(q_BSNH, params["q_norm"], eps)
    k_BSKH = rms_norm(convolved["k"], params["k_norm"], eps)
    if is_global:
        tau_BS11 = log_length_scale(functions.positions, cfg.attention)[:, :, None, None]
        q_BSNH = (q_BSNH.astype(jnp.float32) * tau_BS11).astype(dtype)
        r_BSNJ = (r_BSNJ.astype(jnp.float32) * tau_BS11).astype(dtype)
    bias = r_BSNJ, params["profiles"].astype(dtype)
    with jax.named_scope("attend"):
        out_BSNH, state = functions.attend(is_global, q_BSNH / head_dim, k_BSKH, convolved["v"], bias, state)
    return functions.add_shards(project(out_BSNH, params["o"].astype(dtype), num_summed=2)), state
