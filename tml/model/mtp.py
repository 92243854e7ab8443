"""Multi-token prediction: blocks after the last layer, each of which looks one target further ahead.

Block k has h from the block before it (block 0: the normed output of the last layer) and is told what stands k + 1
places ahead, as an embedding e (`MtpEmbedding`). It answers for the target k + 1 places ahead of its position:

    x = layer([hidden_norm(h), embed_norm(e)] @ input_proj)      (a layer with a dense MLP; sliding or global)
    h = chain_norm(x), or x itself (`MtpChain`)                   to the head, and to the next block

Positions are those of the embedding: block k counts from k + 1 (the log-length scaling of global attention reads them).

Source: DeepSeek-V3, section 2.2, as the Inkling family has it (transformers `MtpModel`, with an `MtpCache`).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tml.config import MeshConfig, ModelConfig, MtpChain
from tml.model import block
from tml.model.block import LayerKind
from tml.model.layer_functions import LayerFunctions
from tml.model.remat import recomputed
from tml.ops.collectives import gather_params, with_next
from tml.ops.norm import rms_norm
from tml.ops.projection import project
from tml.params import PyTree, param, scale


def block_kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """The kind of every block's layer, from the first."""
    return tuple(
        LayerKind(is_global=number in cfg.mtp.global_blocks, is_dense=True) for number in range(cfg.mtp.num_blocks)
    )


def specs(cfg: ModelConfig) -> dict[str, PyTree]:
    """The parameters of all blocks."""
    tree: dict[str, PyTree] = {"blocks": [block_specs(kind, cfg) for kind in block_kinds(cfg)]}
    if cfg.mtp.chain is MtpChain.NORMED:
        tree["chain_norm"] = scale("D", {"D": cfg.d_model})
    return tree


def block_specs(kind: LayerKind, cfg: ModelConfig) -> dict[str, PyTree]:
    """The parameters of one block."""
    sizes = {"D": cfg.d_model, "I": 2 * cfg.d_model}
    return {
        "hidden_norm": scale("D", sizes),
        "embed_norm": scale("D", sizes),
        "input_proj": param("I D", sizes, fan_in="I"),
        "layer": block.specs(kind, cfg),
    }


def apply(
    params: Mapping[str, PyTree],
    h_BSD: Float[Array, "B S D"],
    told_BSD: Float[Array, "B S D"],
    functions: LayerFunctions,
    cfg: ModelConfig,
    mesh: MeshConfig,
) -> tuple[Float[Array, "B S D"], ...]:
    """Runs all blocks over training rows.

    The last k + 1 positions of a segment are told what is not theirs; nothing that counts attends to them.

    Args:
        params: of all blocks; on a mesh this device's parts.
        h_BSD: the normed output of the last layer.
        told_BSD: the embedding of every position, which the positions before it are told.
        functions: how the layers look back.
        cfg: the model.
        mesh: sizes of the axes; slots may be split over `context`.

    Returns:
        What the unembedding reads, a block each.
    """
    num_slots, dtype = h_BSD.shape[1], h_BSD.dtype
    told_BTD = with_next(told_BSD, cfg.mtp.num_blocks, 0, mesh)
    shared = {name: gather_params(params[name], specs(cfg)[name], mesh, dtype) for name in params if name != "blocks"}
    found = []
    for number, kind in enumerate(block_kinds(cfg)):
        distance = number + 1
        ahead = functions._replace(positions=functions.positions + distance)

        def run(
            block_params: PyTree,
            h_BSD: jax.Array,
            told_BTD: jax.Array,
            kind: LayerKind = kind,
            ahead: LayerFunctions = ahead,
            distance: int = distance,
        ) -> jax.Array:
            with jax.named_scope("gather"):
                block_params = gather_params(block_params, block_specs(kind, cfg), mesh, dtype)
            told_BSD = told_BTD[:, distance : distance + num_slots]
            return apply_block(block_params, h_BSD, told_BSD, kind, ahead, cfg)

        # All blocks get the whole, so that one copy of it is kept for the backward pass.
        block_of = recomputed(run, cfg.remat, mesh, in_loop=False)
        h_BSD = block_of(params["blocks"][number], h_BSD, told_BTD)
        if cfg.mtp.chain is MtpChain.NORMED:
            h_BSD = rms_norm(h_BSD, shared["chain_norm"], cfg.norm_eps)
        found.append(h_BSD)
    return tuple(found)


def apply_block(
    params: Mapping[str, PyTree],
    h_BSD: Float[Array, "B S D"],
    told_BSD: Float[Array, "B S D"],
    kind: LayerKind,
    functions: LayerFunctions,
    cfg: ModelConfig,
) -> Float[Array, "B S D"]:
    """One block, with what its positions are told in place."""
    h_BSD = rms_norm(h_BSD, params["hidden_norm"], cfg.norm_eps)
    told_BSD = rms_norm(told_BSD, params["embed_norm"], cfg.norm_eps)
    both_BSI = jnp.concatenate([h_BSD, told_BSD], axis=-1)
    x_BSD = project(both_BSI, params["input_proj"].astype(h_BSD.dtype))
    x_BSD, _, _ = block.apply(params["layer"], x_BSD, None, kind, functions, cfg)
    return x_BSD
