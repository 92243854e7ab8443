"""One layer of the backbone: attention and feed-forward, each followed by a short convolution, both residual."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from tml.config import ModelConfig
from tml.model import attention, moe
from tml.model.layer_functions import LayerFunctions, LiveLayer
from tml.ops.norm import rms_norm
from tml.params import PyTree, scale, taps


class LayerKind(NamedTuple):
    """Which of the kinds of layer stands at a place in the stack."""

    is_global: bool
    is_dense: bool


def specs(kind: LayerKind, cfg: ModelConfig) -> dict[str, PyTree]:
    """The parameters of one layer."""
    sizes = {"D": cfg.d_model, "Y": cfg.conv_taps}
    return {
        "attention_norm": scale("D", sizes),
        "attention": attention.specs(kind.is_global, cfg),
        "attention_conv": taps("Y D", sizes),
        "mlp_norm": scale("D", sizes),
        "mlp": moe.dense_specs(cfg) if kind.is_dense else moe.moe_specs(cfg),
        "mlp_conv": taps("Y D", sizes),
    }


def apply(
    params: Mapping[str, PyTree],
    x_BSD: Float[Array, "B S D"],
    state: LiveLayer | None,
    kind: LayerKind,
    functions: LayerFunctions,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B S D"], LiveLayer | None, moe.Load | None]:
    """Runs the layer; returns its output, its state, and the load of its experts (None for a dense layer)."""
    with jax.named_scope("attention"):
        h_BSD = rms_norm(x_BSD, params["attention_norm"], cfg.norm_eps)
        h_BSD, state = attention.apply(params["attention"], h_BSD, state, kind.is_global, functions, cfg)
        h_BSD, state = functions.conv("attention", h_BSD, params["attention_conv"], state)
        x_BSD = x_BSD + h_BSD
    with jax.named_scope("mlp"):
        h_BSD = rms_norm(x_BSD, params["mlp_norm"], cfg.norm_eps)
        load: moe.Load | None = None
        if kind.is_dense:
            h_BSD = moe.apply_dense(params["mlp"], h_BSD, functions.add_shards)
        else:
            h_BSD, load = moe.apply_moe(
                params["mlp"],
                h_BSD,
                functions.valid,
                functions.experts,
                functions.shared_experts,
                functions.add_shards,
                cfg.moe,
            )
        h_BSD, state = functions.conv("mlp", h_BSD, params["mlp_conv"], state)
        return x_BSD + h_BSD, state, load
