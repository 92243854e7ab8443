"""The whole network over training rows: embeddings, a stack scanned over its repeating groups of layers, the head."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from tml.batch import Batch
from tml.config import ModelConfig, Remat
from tml.model import block, embed, moe, mtp
from tml.model.block import LayerKind
from tml.model.layer_functions import LayerFunctions, LayerState, row_functions
from tml.ops.norm import rms_norm
from tml.params import Leaf, PyTree, Update, param, scale, stack


class Stage(NamedTuple):
    """Consecutive layers of given kinds, repeated as a group; one `lax.scan` when repeated."""

    kinds: tuple[LayerKind, ...]
    repeats: int


@flax.struct.dataclass
class Outputs:
    """What the network computes for a batch.

    Attributes:
        logits_BSV: float32, cut to the unpadded vocabulary.
        hidden_BSD: what the head reads: the last layer's output, normed.
        expert_load_LE: copies of valid positions routed to each expert, a row a mixture layer.
    """

    logits_BSV: Leaf
    hidden_BSD: Leaf
    expert_load_LE: Leaf


def layer_kinds(cfg: ModelConfig) -> tuple[LayerKind, ...]:
    """The kind of every layer, from the first."""
    return tuple(
        LayerKind(is_global=layer in cfg.global_layers, is_dense=layer < cfg.num_dense_layers)
        for layer in range(cfg.num_layers)
    )


def layer_stages(cfg: ModelConfig) -> tuple[Stage, ...]:
    """The stack as a few single layers followed by a group that repeats to the end: the split that traces least."""
    kinds = layer_kinds(cfg)
    total = len(kinds)
    candidates = [
        (first + period, first, period)
        for first in range(total)
        for period in range(1, total - first + 1)
        if (total - first) % period == 0
        and kinds[first:] == kinds[first : first + period] * ((total - first) // period)
    ]
    _, first, period = min(candidates)
    singles = [Stage((kind,), 1) for kind in kinds[:first]]
    return (*singles, Stage(kinds[first : first + period], (total - first) // period))


def specs(cfg: ModelConfig) -> dict[str, PyTree]:
    """Every parameter of the network. The layers of a stage are stacked along a leading L axis."""
    sizes = {"D": cfg.d_model, "V": cfg.vocab_size}
    ahead = {"mtp": mtp.specs(cfg)} if cfg.mtp.num_blocks else {}
    return ahead | {
        "embed": embed.specs(cfg),
        "stages": [
            [stack(block.specs(kind, cfg), stage.repeats) for kind in stage.kinds] for stage in layer_stages(cfg)
        ],
        "norm": scale("D", sizes),
        "unembed": param("D V", sizes, fan_in="D", update=Update.EMBEDDING),
    }


def apply(params: Mapping[str, PyTree], batch: Batch, cfg: ModelConfig) -> Outputs:
    """The forward pass over packed rows; every segment is independent of its neighbours."""
    with jax.named_scope("embed"):
        x_BSD = embed.embed(
            params["embed"],
            batch.tokens_BS,
            batch.kinds_BS,
            batch.levels_BSM,
            batch.tiles_BP,
            batch.tile_index_BS,
            cfg,
        )
    functions = row_functions(batch.segment_ids_BS, batch.positions_BS, cfg)
    x_BSD, _, load_LE = run_layers(params["stages"], x_BSD, None, functions, cfg)
    with jax.named_scope("head"):
        h_BSD = rms_norm(x_BSD, params["norm"], cfg.norm_eps)
        return Outputs(logits_BSV=unembed(params, h_BSD, cfg), hidden_BSD=h_BSD, expert_load_LE=load_LE)


def apply_ahead(
    params: Mapping[str, PyTree], hidden_BSD: Float[Array, "B S D"], batch: Batch, cfg: ModelConfig
) -> list[Float32[Array, "B S V"]]:
    """The logits of every block of multi-token prediction, from `Outputs.hidden_BSD`."""
    blocks = mtp.apply(params["mtp"], params["embed"]["tokens"]["table"], hidden_BSD, batch, cfg)
    return [unembed(params, h_BSD, cfg) for h_BSD in blocks]


def run_layers(
    stages: list[list[PyTree]],
    x_BSD: Float[Array, "B S D"],
    states: list[list[LayerState]] | None,
    functions: LayerFunctions,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B S D"], list[list[LayerState]] | None, Float32[Array, "L E"]]:
    """Runs every stage.

    Args:
        stages: parameters, stacked along L within a stage.
        x_BSD: embedded inputs.
        states: states of the layers, stacked like the parameters; None for training rows.
        functions: how the layers look back.
        cfg: the model.

    Returns:
        Outputs, states, and the load of every mixture layer in order.
    """
    new_states: list[list[LayerState]] = []
    loads: list[jax.Array] = []
    for index, stage in enumerate(layer_stages(cfg)):
        stage_states = None if states is None else states[index]

        def group(x: jax.Array, layers: PyTree, kinds: tuple[LayerKind, ...] = stage.kinds) -> tuple[jax.Array, PyTree]:
            group_params, group_states = layers
            after, group_loads = [], []
            for place, kind in enumerate(kinds):
                state = None if group_states is None else group_states[place]
                x, state, load_E = _layer(group_params[place], x, state, kind, functions, cfg)
                after.append(state)
                group_loads += [] if load_E is None else [load_E]
            return x, (None if group_states is None else after, group_loads)

        if stage.repeats == 1:
            x_BSD, results = group(x_BSD, jax.tree.map(lambda leaf: leaf[0], (stages[index], stage_states)))
            results = jax.tree.map(lambda leaf: leaf[None], results)
        else:
            x_BSD, results = jax.lax.scan(group, x_BSD, (stages[index], stage_states))
        after, stage_loads = results
        new_states.append(after)
        if stage_loads:
            loads.append(jnp.stack(stage_loads, axis=1).reshape(-1, cfg.moe.num_experts))
    load_LE = jnp.concatenate(loads) if loads else jnp.zeros((0, cfg.moe.num_experts), jnp.float32)
    return x_BSD, None if states is None else new_states, load_LE


def _layer(
    params: PyTree, x: jax.Array, state: LayerState | None, kind: LayerKind, functions: LayerFunctions, cfg: ModelConfig
) -> tuple[jax.Array, LayerState | None, jax.Array | None]:
    def run(params: PyTree, x: jax.Array) -> tuple[jax.Array, LayerState | None, jax.Array | None]:
        return block.apply(params, x, state, kind, functions, cfg)

    return jax.checkpoint(run)(params, x) if cfg.remat is Remat.LAYER else run(params, x)


def logits(params: Mapping[str, PyTree], x_BSD: Float[Array, "B S D"], cfg: ModelConfig) -> Float32[Array, "B S V"]:
    """The head over the last layer's output: norm, then `unembed`."""
    return unembed(params, rms_norm(x_BSD, params["norm"], cfg.norm_eps), cfg)


def unembed(params: Mapping[str, PyTree], h_BSD: Float[Array, "B S D"], cfg: ModelConfig) -> Float32[Array, "B S V"]:
    """The head over what is normed: muP divisor, unembedding, cut to the unpadded vocabulary."""
    h_BSD = h_BSD / cfg.mup_width_multiplier
    unembed_DV = params["unembed"].astype(h_BSD.dtype)[:, : cfg.num_logits]
    return jnp.einsum("BSD,DV->BSV", h_BSD, unembed_DV, preferred_element_type=jnp.float32)


def move_router_bias(
    params: dict[str, PyTree], expert_load_LE: Float32[Array, "L E"], cfg: ModelConfig
) -> dict[str, PyTree]:
    """Moves every mixture layer's selection bias by its load; the rest of the parameters is untouched."""
    stages, first = [], 0
    for stage, layers in zip(layer_stages(cfg), params["stages"], strict=True):
        num_mixtures = sum(not kind.is_dense for kind in stage.kinds)
        load_LGE = expert_load_LE[first : first + stage.repeats * num_mixtures]
        load_LGE = load_LGE.reshape(stage.repeats, num_mixtures, cfg.moe.num_experts)
        first += stage.repeats * num_mixtures
        moved, place = [], 0
        for kind, layer in zip(stage.kinds, layers, strict=True):
            if not kind.is_dense:
                bias_LE = moe.balanced_bias(layer["mlp"]["router_bias"], load_LGE[:, place], cfg.moe.balance_rate)
                layer = {**layer, "mlp": {**layer["mlp"], "router_bias": bias_LE}}
                place += 1
            moved.append(layer)
        stages.append(moved)
    return {**params, "stages": stages}
