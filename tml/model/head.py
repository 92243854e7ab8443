"""The head over tokens: from the last layer's outputs to logits, or straight to the losses of targets."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from tml.config import MeshConfig, ModelConfig
from tml.ops.collectives import gather_params
from tml.ops.cross_entropy import TokenLosses, token_losses_in_blocks
from tml.ops.cross_entropy import token_losses as losses_of_whole_logits
from tml.ops.projection import project
from tml.params import ParamSpec, PyTree, Update, param, scale


def specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters between the last layer and the logits."""
    sizes = {"D": cfg.d_model, "V": cfg.vocab_size}
    return {
        "norm": scale("D", sizes),
        "unembed": param("D V", sizes, fan_in="D", update=Update.EMBEDDING),
    }


def unembed(unembed_DV: Float[Array, "D V"], h_BSD: Float[Array, "B S D"], cfg: ModelConfig) -> Float32[Array, "B S v"]:
    """The logits, cut to the unpadded vocabulary, of the normed output of the last layer."""
    unembed_DV = unembed_DV.astype(h_BSD.dtype)[:, : cfg.num_logits]
    return project(h_BSD / cfg.mup_width_multiplier, unembed_DV, out_dtype=jnp.float32)


def logits(
    params: Mapping[str, PyTree], h_BSD: Float[Array, "B S D"], cfg: ModelConfig, mesh: MeshConfig
) -> Float32[Array, "B S V"]:
    """The logits of live sessions, of the normed output of the last layer; whole on every device."""
    if mesh.tensor == 1:
        return unembed(params["unembed"], h_BSD, cfg)
    part_BSV = project(h_BSD / cfg.mup_width_multiplier, params["unembed"].astype(h_BSD.dtype), out_dtype=jnp.float32)
    return jax.lax.all_gather(part_BSV, "tensor", axis=2, tiled=True)[..., : cfg.num_logits]


def token_losses(
    params: Mapping[str, PyTree],
    h_BSD: Float[Array, "B S D"],
    targets_BS: Int32[Array, "B S"],
    vocab_block: int,
    cfg: ModelConfig,
    mesh: MeshConfig,
) -> TokenLosses:
    """The losses of the predictions from `transformer.hidden`, whole or a block of the vocabulary at a time.

    Args:
        params: all parameters, or this device's parts.
        h_BSD: `Hidden.h_BSD`.
        targets_BS: token to predict.
        vocab_block: entries of the vocabulary whose logits exist at a time; 0 makes all of them at once.
        cfg: the model.
        mesh: sizes of the axes.
    """
    spec, part_DV = specs(cfg)["unembed"], params["unembed"].astype(h_BSD.dtype)
    h_BSD = h_BSD / cfg.mup_width_multiplier
    if mesh.tensor == 1 and not vocab_block:
        unembed_DV = gather_params(part_DV, spec, mesh, h_BSD.dtype)
        return losses_of_whole_logits(h_BSD, unembed_DV[:, : cfg.num_logits], targets_BS)
    width = min(vocab_block or part_DV.shape[1], part_DV.shape[1])
    block_spec = dataclasses.replace(spec, shape=(cfg.d_model, width * mesh.tensor))

    def gather(block_DV: jax.Array) -> jax.Array:
        return gather_params(block_DV, block_spec, mesh, h_BSD.dtype)

    return token_losses_in_blocks(h_BSD, part_DV, targets_BS, cfg.num_logits, width, gather, mesh)
