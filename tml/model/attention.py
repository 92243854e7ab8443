"""The attention sub-layer: projections, short convolutions of keys and values, per-head norms, relative bias."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tml.config import ModelConfig
from tml.model.layer_functions import LayerFunctions, LiveLayer, log_length_scale
from tml.model.remat import kept
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
    state: LiveLayer | None,
    is_global: bool,
    functions: LayerFunctions,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B S D"], LiveLayer | None]:
    """Attends; logits are q.k / head_dim + bias, because q and k are normed per head (so 1/d, not 1/sqrt(d))."""
    dtype, eps, head_dim = h_BSD.dtype, cfg.norm_eps, cfg.attention.head_dim
    # Heads are joined in the matmuls and in what is kept of them: an axis of 16 would be stored as one of 128 lanes.
    flat = {name: kept(project(h_BSD, _joined(params[name].astype(dtype)))) for name in ("q", "k", "v", "r")}
    for name in ("k", "v"):
        taps_YD = params[f"{name}_conv"].reshape(cfg.conv_taps, -1)
        flat[name], state = functions.conv(name, flat[name], taps_YD, state)
    q_BSNH, k_BSKH, v_BSKH, r_BSNJ = (
        flat[name].reshape(*h_BSD.shape[:2], *params[name].shape[1:]) for name in ("q", "k", "v", "r")
    )
    q_BSNH = rms_norm(q_BSNH, params["q_norm"], eps)
    k_BSKH = rms_norm(k_BSKH, params["k_norm"], eps)
    if is_global:
        tau_BS11 = log_length_scale(functions.positions, cfg.attention)[:, :, None, None]
        q_BSNH = (q_BSNH.astype(jnp.float32) * tau_BS11).astype(dtype)
        r_BSNJ = (r_BSNJ.astype(jnp.float32) * tau_BS11).astype(dtype)
    bias = r_BSNJ, params["profiles"].astype(dtype)
    with jax.named_scope("attend"):
        out_BSNH, state = functions.attend(is_global, q_BSNH / head_dim, k_BSKH, v_BSKH, bias, state)
    return kept(functions.add_shards(functions.output_projection(out_BSNH, params["o"].astype(dtype)))), state


def _joined(weights_DNH: Float[Array, "D N H"]) -> Float[Array, "D O"]:
    return weights_DNH.reshape(weights_DNH.shape[0], -1)
