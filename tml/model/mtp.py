"""Multi-token prediction: a chain of blocks, each of which looks one token further ahead than the one before.

Block k, counted from 0, sees at position t what the network (or block k - 1) made of t, and the token at
t + k + 1; it predicts what is due at t + k + 1. Embedding and head are the network's, the embedding
without its norm. Source: DeepSeek-V3 (2024), section 2.2; the blocks are Inkling's (`MtpLayer` and
`MtpModel` of transformers' `modeling_layers.py`), with dense feed-forward layers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from tml.batch import Batch
from tml.config import ChainNorm, MeshConfig, ModelConfig
from tml.model import block, embed
from tml.model.block import LayerKind
from tml.model.layer_functions import LayerFunctions, row_functions
from tml.model.remat import recomputed
from tml.ops.collectives import gather_params, index_along
from tml.ops.norm import rms_norm
from tml.params import PyTree, param, scale


def block_kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """The kind of layer inside every block."""
    return tuple(
        LayerKind(is_global=number not in cfg.mtp.sliding_blocks, is_dense=True) for number in range(cfg.mtp.num_blocks)
    )


def specs(cfg: ModelConfig) -> dict[str, PyTree]:
    """The parameters of the chain."""
    sizes = {"D": cfg.d_model, "I": 2 * cfg.d_model}
    tree: dict[str, PyTree] = {
        "blocks": [
            {
                "hidden_norm": scale("D", sizes),
                "embed_norm": scale("D", sizes),
                "input": param("I D", sizes, fan_in="I"),
                "layer": block.specs(kind, cfg),
            }
            for kind in block_kinds(cfg)
        ]
    }
    return tree | ({"chain_norm": scale("D", sizes)} if cfg.mtp.chain_norm is ChainNorm.LEARNED else {})


def apply(
    params: Mapping[str, PyTree],
    table_VD: Float[Array, "v D"],
    h_BSD: Float[Array, "B S D"],
    batch: Batch,
    cfg: ModelConfig,
    mesh: MeshConfig,
) -> list[Float[Array, "B S D"]]:
    """Runs the chain over packed rows, or this device's part of them.

    Args:
        params: the chain's.
        table_VD: the token embedding.
        h_BSD: what the network made of every position, after its last norm.
        batch: the rows.
        cfg: the model.
        mesh: sizes of the axes; a block's parameters are gathered when it runs.

    Returns:
        The output of every block, which goes to the head as it is. The last k + 1 positions of a
        segment saw a token of another segment, or none: nothing is due there (`due`).
    """
    functions = row_functions(batch.segment_ids_BS, batch.positions_BS, cfg, mesh)
    dtype, chain = embed.compute_dtype(cfg), specs(cfg)
    table_VD = gather_params(table_VD.astype(dtype), embed.specs(cfg)["tokens"]["table"], mesh, dtype)
    outputs = []
    for number, kind in enumerate(block_kinds(cfg)):
        # A block stands where the token is that it is given: its queries grow with that position.
        later = functions._replace(positions=functions.positions + number + 1)

        def run(
            block_params: PyTree,
            h: jax.Array,
            embedded: jax.Array,
            block_specs: PyTree = chain["blocks"][number],
            kind: LayerKind = kind,
            functions: LayerFunctions = later,
        ) -> jax.Array:
            with jax.named_scope("gather"):
                block_params = gather_params(block_params, block_specs, mesh, dtype)
            normed = [
                rms_norm(h, block_params["hidden_norm"], cfg.norm_eps),
                rms_norm(embedded, block_params["embed_norm"], cfg.norm_eps),
            ]
            x_BSD = jnp.concatenate(normed, axis=-1) @ block_params["input"].astype(dtype)
            return block.apply(block_params["layer"], x_BSD, None, kind, functions, cfg)[0]

        with jax.named_scope(f"mtp_{number}"):
            embedded_BSD = embed.look_up(table_VD, ahead(batch.tokens_BS, number + 1, mesh), mesh)
            h_BSD = recomputed(run, cfg, mesh)(params["blocks"][number], h_BSD, embedded_BSD)
            if cfg.mtp.chain_norm is ChainNorm.LEARNED:
                norm_D = gather_params(params["chain_norm"], chain["chain_norm"], mesh, dtype)
                h_BSD = rms_norm(h_BSD, norm_D, cfg.norm_eps)
            outputs.append(h_BSD)
    return outputs


def due(batch: Batch, distance: int, mesh: MeshConfig) -> tuple[Int32[Array, "B S"], Float32[Array, "B S"]]:
    """What the block that looks `distance` positions ahead predicts: targets, and loss weights, 0 past a segment."""
    is_inside_BS = ahead(batch.segment_ids_BS, distance, mesh) == batch.segment_ids_BS
    weights_BS = jnp.where(is_inside_BS, ahead(batch.loss_weights_BS, distance, mesh), 0.0)
    return ahead(batch.targets_BS, distance, mesh), weights_BS


def ahead(values_BS: Shaped[Array, "B S"], distance: int, mesh: MeshConfig) -> Shaped[Array, "B S"]:
    """What stands `distance` positions later in the row, which may be on another device; 0 past the row's end."""
    local = values_BS.shape[1]
    if mesh.context > 1:
        values_BS = jax.lax.all_gather(values_BS, "context", axis=1, tiled=True)
    later_BS = jnp.pad(values_BS[:, distance:], ((0, 0), (0, min(distance, values_BS.shape[1]))))
    return jax.lax.dynamic_slice_in_dim(later_BS, index_along("context", mesh) * local, local, axis=1)
