"""Multi-token prediction: a chain of blocks, each of which looks one token further ahead than the one before.

Block k, counted from 0, sees at position t what the network (or block k - 1) made of t, and the token at
t + k + 1; it predicts what is due at t + k + 1. Embedding and head are the network's, the embedding
without its norm. Source: DeepSeek-V3 (2024), section 2.2; the blocks are Inkling's (`MtpLayer` and
`MtpModel` of transformers' `modeling_layers.py`), with dense feed-forward layers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from tml.batch import Batch
from tml.config import ChainNorm, ModelConfig, Remat
from tml.model import block
from tml.model.block import LayerKind
from tml.model.layer_functions import row_functions
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
    table_VD: Float[Array, "V D"],
    h_BSD: Float[Array, "B S D"],
    batch: Batch,
    cfg: ModelConfig,
) -> list[Float[Array, "B S D"]]:
    """Runs the chain over packed rows.

    Args:
        params: the chain's.
        table_VD: the token embedding.
        h_BSD: what the network made of every position, after its last norm.
        batch: the rows.
        cfg: the model.

    Returns:
        The output of every block, which goes to the head as it is. The last k + 1 positions of a
        segment saw a token of another segment, or none: nothing is due there (`objective`).
    """
    functions, eps, dtype = row_functions(batch.segment_ids_BS, batch.positions_BS, cfg), cfg.norm_eps, h_BSD.dtype
    outputs = []
    for number, kind in enumerate(block_kinds(cfg)):

        def run(block_params: PyTree, h: jax.Array, number: int = number, kind: LayerKind = kind) -> jax.Array:
            embedded_BSD = table_VD.astype(dtype)[ahead(batch.tokens_BS, number + 1)]
            normed = [
                rms_norm(h, block_params["hidden_norm"], eps),
                rms_norm(embedded_BSD, block_params["embed_norm"], eps),
            ]
            x_BSD = jnp.concatenate(normed, axis=-1) @ block_params["input"].astype(dtype)
            x_BSD, _, _ = block.apply(block_params["layer"], x_BSD, None, kind, functions, cfg)
            return rms_norm(x_BSD, params["chain_norm"], eps) if "chain_norm" in params else x_BSD

        with jax.named_scope(f"mtp_{number}"):
            step = jax.checkpoint(run) if cfg.remat is Remat.LAYER else run
            h_BSD = step(params["blocks"][number], h_BSD)
            outputs.append(h_BSD)
    return outputs


def ahead(values_BS: Shaped[Array, "B S"], distance: int) -> Shaped[Array, "B S"]:
    """What stands `distance` positions later in the row; 0 past its end."""
    return jnp.pad(values_BS[:, distance:], ((0, 0), (0, min(distance, values_BS.shape[1]))))
