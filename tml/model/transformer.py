"""The whole network over training rows: embeddings, a stack scanned over its repeating groups of layers, the head."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Float32, Int32

from tml.batch import Batch, OwnAudio
from tml.config import MeshConfig, ModelConfig, MtpEmbedding, Remat
from tml.model import block, embed, flow_head, head, moe, mtp
from tml.model.block import LayerKind
from tml.model.expert_dispatch import keeps_experts_split
from tml.model.layer_functions import LayerFunctions, LayerState, LiveLayer, row_functions
from tml.model.live_weights import params_of_layer
from tml.model.remat import recomputed
from tml.ops.collectives import gather_params, index_along
from tml.ops.norm import rms_norm
from tml.params import Leaf, ParamSpec, PyTree, Update, map_specs, stack

LiveCarry = tuple[Float[Array, "B W D"], list[LayerState]]
"""What goes through live layers: the stream, and the states of the group that is run."""


class Stage(NamedTuple):
    """Consecutive layers of given kinds, repeated as a group; one `lax.scan` when repeated and `cfg.scan_layers`."""

    kinds: tuple[LayerKind, ...]
    repeats: int


@flax.struct.dataclass
class Hidden:
    """What the network computes for a batch, or for this device's part of it, before the unembedding.

    Attributes:
        h_BSD: the normed output of the last layer, which the heads read.
        load: copies routed to each expert and copies dropped, a row a mixture layer.
        ahead: the same as `h_BSD` from every block of multi-token prediction: the k-th is about the target k + 1
            places ahead.
    """

    h_BSD: Leaf
    load: moe.Load
    ahead: tuple[Leaf, ...]


@flax.struct.dataclass
class Outputs:
    """What the network computes for a batch.

    Attributes:
        logits_BSV: float32, cut to the unpadded vocabulary.
        expert_load_LE: copies of valid positions routed to each expert, a row a mixture layer.
    """

    logits_BSV: Leaf
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
    tree = {
        "embed": embed.specs(cfg),
        "stages": [
            [stack(block.specs(kind, cfg), stage.repeats) for kind in stage.kinds] for stage in layer_stages(cfg)
        ],
        **head.specs(cfg),
    }
    if cfg.mtp.num_blocks:
        tree["mtp"] = mtp.specs(cfg)
    if cfg.has_voice:
        tree["audio_out"] = flow_head.specs(cfg)
    return tree


def _check_streams(batch: Batch, cfg: ModelConfig) -> None:
    """Raises ValueError unless a voice has own audio to learn from, eyes have places for tiles, and nothing is over."""
    frames, tiles = cfg.audio_out.frames_per_position, cfg.video.max_tiles_per_turn
    for sense, stream, value, expected, held in (
        ("a voice", "own audio", f"audio_out.frames_per_position = {frames}", cfg.has_voice, batch.own is not None),
        ("eyes", "image tiles", f"video.max_tiles_per_turn = {tiles}", tiles > 0, batch.tiles_BP.shape[1] > 0),
    ):
        if expected != held:
            has = sense if expected else f"no {sense.removeprefix('a ')}"
            holds = f"holds {'' if held else 'no '}{stream}"
            raise ValueError(f"the model has {has}, but the batch {holds} (model.{value}); make it with this config")


def hidden(
    params: Mapping[str, PyTree],
    batch: Batch,
    cfg: ModelConfig,
    mesh: MeshConfig,
    heard_BPY: Float16[Array, "B P Y"] | None = None,
) -> Hidden:
    """The forward pass over packed rows up to the unembedding; every segment is independent of its neighbours.

    On a mesh this is the program of one device: its parts of parameters and batch, inside `shard_map`.

    Args:
        params: the parameters.
        batch: the rows.
        cfg: the model.
        mesh: sizes of the axes.
        heard_BPY: what is fed back of own audio; `batch.own.mels_BPY` by default.

    Raises:
        ValueError: the batch lacks a stream that the model expects, or holds one that the model cannot take.
    """
    _check_streams(batch, cfg)
    with jax.named_scope("embed"):
        dtype = embed.compute_dtype(cfg)
        tokens = params["embed"]["tokens"]
        # The table travels as it is used, as matrices do.
        embed_params = {**params["embed"], "tokens": {**tokens, "table": tokens["table"].astype(dtype)}}
        embed_params = gather_params(embed_params, embed.specs(cfg), mesh, dtype)
        x_BSD = embed.embed(
            embed_params,
            batch.tokens_BS,
            batch.kinds_BS,
            batch.levels_BSM,
            batch.tiles_BP,
            batch.tile_index_BS,
            cfg,
            mesh,
        )
        if batch.own is not None:
            first = index_along("context", mesh) * x_BSD.shape[1]
            slots_BP = _places(batch.own) - first
            mels_BPY = batch.own.mels_BPY if heard_BPY is None else heard_BPY
            x_BSD = embed.put_own_audio(x_BSD, embed_params, batch.kinds_BS, mels_BPY, slots_BP, cfg)
    rows = [jnp.split(x, cfg.row_parts) for x in (x_BSD, batch.segment_ids_BS, batch.positions_BS)]
    functions = [row_functions(segments, positions, cfg, mesh) for segments, positions in zip(*rows[1:], strict=True)]
    parts, load = run_layers(params["stages"], rows[0], functions, cfg, mesh)
    last_BSD = jnp.concatenate(parts)
    with jax.named_scope("head"):
        norm_D = gather_params(params["norm"], head.specs(cfg)["norm"], mesh, last_BSD.dtype)
        h_BSD = rms_norm(last_BSD, norm_D, cfg.norm_eps)
    if "mtp" not in params:
        return Hidden(h_BSD=h_BSD, load=load, ahead=())
    with jax.named_scope("mtp"):
        is_input = cfg.mtp.embedding is MtpEmbedding.INPUT
        told_BSD = x_BSD if is_input else embed.token_rows(embed_params, batch.tokens_BS, cfg, mesh)
        whole = row_functions(batch.segment_ids_BS, batch.positions_BS, cfg, mesh)
        ahead = mtp.apply(params["mtp"], h_BSD, told_BSD, whole, cfg, mesh)
        return Hidden(h_BSD=h_BSD, load=load, ahead=ahead)


def _places(own: OwnAudio) -> Int32[Array, "B P"]:
    """Where own audio stands in whole rows; what there is none of stands nowhere."""
    return jnp.where(own.places_BP > 0, own.places_BP, jnp.iinfo(jnp.int32).max // 2)


def apply(params: Mapping[str, PyTree], batch: Batch, cfg: ModelConfig) -> Outputs:
    """The forward pass on one device, with the logits of every position: the definition, for tests and small uses."""
    found = hidden(params, batch, cfg, MeshConfig())
    with jax.named_scope("head"):
        return Outputs(logits_BSV=head.unembed(params["unembed"], found.h_BSD, cfg), expert_load_LE=found.load.copies_E)


def run_layers(
    stages: list[list[PyTree]],
    parts: list[Float[Array, "B S D"]],
    functions: list[LayerFunctions],
    cfg: ModelConfig,
    mesh: MeshConfig,
) -> tuple[list[Float[Array, "B S D"]], moe.Load]:
    """Runs every stage over training rows.

    Args:
        stages: parameters, stacked along L within a stage.
        parts: embedded inputs, in parts of rows that every layer takes side by side.
        functions: how the layers look back, for each part.
        cfg: the model.
        mesh: sizes of the axes; a layer's parameters are gathered when it runs.

    Returns:
        Outputs, and the load of every mixture layer in order.
    """
    loads: list[moe.Load] = []
    for index, stage in enumerate(layer_stages(cfg)):
        runs = [(kind, len(list(run))) for kind, run in itertools.groupby(stage.kinds)]
        runs = runs if cfg.remat is not Remat.NONE and cfg.scan_layers else [(kind, 1) for kind in stage.kinds]
        in_loop = cfg.scan_layers and stage.repeats > 1

        def group(
            parts: list[jax.Array],
            run_params: PyTree,
            runs: list[tuple[LayerKind, int]] = runs,
            in_loop: bool = in_loop,
        ) -> tuple[list[jax.Array], moe.Load | None]:
            group_loads = []
            for (kind, count), of_run in zip(runs, run_params, strict=True):

                def layer(
                    parts: list[jax.Array], params: PyTree, kind: LayerKind = kind, in_loop: bool = in_loop or count > 1
                ) -> tuple[list[jax.Array], moe.Load | None]:
                    return _layer(params, parts, kind, functions, cfg, mesh, in_loop)

                parts, load = layer(parts, of_run) if count == 1 else jax.lax.scan(layer, parts, of_run)
                if load is not None:
                    group_loads.append(load if count > 1 else _add_axis(load))
            return parts, _join(group_loads) if group_loads else None

        layers = _stack_runs(_as_multiplied(stages[index], stage, cfg), runs)
        if in_loop:
            parts, load = jax.lax.scan(group, parts, layers)
        else:
            group_loads = []
            for of_group in _unstack(layers, stage.repeats):
                parts, load = group(parts, of_group)
                group_loads.append(_add_axis(load))
            load = _join(group_loads)
        if load is not None:
            # In the order of the layers: repetition by repetition, then place by place.
            loads.append(jax.tree.map(lambda x_LG: x_LG.reshape(-1, *x_LG.shape[2:]), load))
    none = moe.Load(jnp.zeros((0, cfg.moe.num_experts), jnp.float32), jnp.zeros(0, jnp.int32))
    return parts, _join(loads) if loads else none


def run_live_layers(
    stages: list[list[PyTree]],
    x_BWD: Float[Array, "B W D"],
    states: list[list[LayerState]],
    functions: LayerFunctions,
    cfg: ModelConfig,
) -> tuple[Float[Array, "B W D"], list[list[LayerState]]]:
    """Runs every stage over the next slots of live sessions.

    Stacks of states are carried along and written in place. Stacks of experts stay whole: whoever multiplies them is
    told the layer, so that only the matrices of chosen experts are ever read.

    Args:
        stages: parameters, stacked along L within a stage; on a mesh, this device's parts.
        x_BWD: embedded inputs.
        states: states of the layers, stacked like the parameters, or apart.
        functions: how the layers look back.
        cfg: the model.
    """
    after: list[list[LayerState]] = []
    for stage, places, of_stage in zip(layer_stages(cfg), stages, states, strict=True):
        run = functools.partial(_run_live_group, stage.kinds, places, functions, cfg)
        size = len(stage.kinds)
        if stage.repeats > 1 and len(of_stage) == size:
            x_BWD, written = _loop(run, (x_BWD, of_stage), stage.repeats)
        else:
            written = []
            for index in range(stage.repeats):
                x_BWD, of_group = run(x_BWD, of_stage[index * size : (index + 1) * size], index, 0)
                written += of_group
        after.append(written)
    return x_BWD, after


def _loop(run: Callable[..., LiveCarry], carry: LiveCarry, repeats: int) -> LiveCarry:
    """The equal groups of a stage as one loop over stacks."""

    def body(carry: LiveCarry, index: jax.Array) -> tuple[LiveCarry, None]:
        return run(*carry, index, index), None

    carry, _ = jax.lax.scan(body, carry, jnp.arange(repeats))
    return carry


def _run_live_group(
    kinds: tuple[LayerKind, ...],
    places: list[PyTree],
    functions: LayerFunctions,
    cfg: ModelConfig,
    x_BWD: Float[Array, "B W D"],
    stacks: list[LayerState],
    params_index: jax.Array | int,
    state_index: jax.Array | int,
) -> LiveCarry:
    """One group of a stage: the layers that stand at these indices of their stacks of parameters and of states."""
    written = []
    for kind, params, state in zip(kinds, places, stacks, strict=True):
        of_layer = params_of_layer(params, params_index)
        x_BWD, live, _ = block.apply(of_layer, x_BWD, LiveLayer(state, state_index), kind, functions, cfg)
        assert live is not None
        written.append(live.stack)
    return x_BWD, written


def _as_multiplied(places: list[PyTree], stage: Stage, cfg: ModelConfig) -> list[PyTree]:
    """The parameters of a stage, matrices in the dtype that multiplies them.

    Cast here and not in the layer, what the loop over layers collects of their gradients is half as large.
    """
    dtype = embed.compute_dtype(cfg)

    def cast(spec: ParamSpec, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if spec.update is Update.MATRIX else leaf

    return [map_specs(cast, block.specs(kind, cfg), params) for kind, params in zip(stage.kinds, places, strict=True)]


def _stack_runs(places: list[PyTree], runs: list[tuple[LayerKind, int]]) -> list[PyTree]:
    """Stacks, behind L, what equal layers in a row have, so that one loop runs them: a program with fewer layers."""
    stacked, rest = [], iter(places)
    for _, count in runs:
        of_run = [next(rest) for _ in range(count)]
        stacked.append(of_run[0] if count == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *of_run))
    return stacked


def _unstack(tree: PyTree, repeats: int) -> list[PyTree]:
    """Each group's own parameters. Their gradients are stacked in one copy; those of indexing are added up in turn."""
    leaves, structure = jax.tree.flatten(tree)
    pieces = [jax.lax.split(leaf, (1,) * repeats) for leaf in leaves]
    return [jax.tree.unflatten(structure, [of_leaf[index][0] for of_leaf in pieces]) for index in range(repeats)]


def _add_axis(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _join(trees: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _layer(
    params: PyTree,
    parts: list[jax.Array],
    kind: LayerKind,
    functions: list[LayerFunctions],
    cfg: ModelConfig,
    mesh: MeshConfig,
    in_loop: bool,
) -> tuple[list[jax.Array], moe.Load | None]:
    def run(params: PyTree, parts: list[jax.Array]) -> tuple[list[jax.Array], moe.Load | None]:
        with jax.named_scope("gather"):
            split_experts = keeps_experts_split(cfg.moe, mesh)
            params = gather_params(params, block.specs(kind, cfg), mesh, embed.compute_dtype(cfg), split_experts)
        # No part needs another's results, so XLA may let one travel while another is computed.
        results = [block.apply(params, x, None, kind, f, cfg) for x, f in zip(parts, functions, strict=True)]
        after, _, loads = zip(*results, strict=True)
        return list(after), None if kind.is_dense else jax.tree.map(lambda *of_part: sum(of_part), *loads)

    return recomputed(run, cfg.remat, mesh, in_loop)(params, parts)


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
