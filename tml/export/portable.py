"""Portable programs: the streaming network as StableHLO, which jax runs without this package.

    portable.json         format, platforms, and for every program its file, bucket, arguments and results in order
    params.safetensors    every parameter in float32, by its path; an argument of every program
    init_bB.stablehlo     no sessions yet: the state of B sessions that have not begun
    append_bB.stablehlo   a micro-turn's input slots for B sessions, to the state and the logits after the last one
    decode_bB.stablehlo   one output token for each of B sessions that is active, to the state and the next logits
    tml_export.json       by which the next export knows what it may replace (tml.whole_folder)

A server keeps a bucket's state on the device, pads its sessions to the next bucket, and leaves a place idle with
counts_B = 0 or active_B = false. The tokens that may stand at a place are the server's to choose (tml.stream.engine);
with fixed slots (turn.slots), it also feeds the [pad] tokens that fill up a turn's output, as output tokens.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from tml.config import ModelConfig, config_hash
from tml.export.bundle import PARAMS, Model, by_path, digest
from tml.export.tensor_folder import save_tensors
from tml.microturn import Layout
from tml.model import cache, transformer
from tml.model.cache import DecodeState, slots_of
from tml.params import PyTree, abstract_params
from tml.stream.inputs import TurnInputs
from tml.whole_folder import Kind, whole_folder

FORMAT = 1
MARKER = "portable.json"
PLATFORMS = ("cpu", "cuda", "tpu")
BUCKETS = (1, 8, 16)
"""Numbers of sessions that programs are made for."""


class PortableError(ValueError):
    """A folder that holds something else than portable programs."""


def save(model: Model, folder: Path, buckets: Sequence[int] = BUCKETS) -> None:
    """Writes the programs of every bucket, the weights and the manifest; an older export there is replaced.

    Raises:
        PortableError: the folder holds anything but what `save` wrote, or the model has a voice.
        OSError: the disk is full.
    """
    if model.experiment.model.has_voice:
        raise PortableError(
            "portable programs have no flow head yet, and this model has a voice (model.audio_out); export a bundle"
        )
    with whole_folder(folder, Kind.STABLEHLO, PortableError) as staging:
        save_tensors(by_path(model.params, model.experiment), staging / PARAMS)
        programs = [
            _write_program(staging, name, bucket, function, arguments)
            for bucket in buckets
            for name, function, arguments in _programs(model, bucket)
        ]
        manifest = {
            "format": FORMAT,
            "config_hash": config_hash(model.experiment),
            "jax": jax.__version__,
            "platforms": PLATFORMS,
            "max_positions": model.experiment.stream.max_positions,
            "weights": PARAMS,
            "sha256": {name: digest(staging / name) for name in (PARAMS, *(each["file"] for each in programs))},
            "programs": programs,
        }
        (staging / MARKER).write_text(json.dumps(manifest, indent=1) + "\n")


def _programs(model: Model, bucket: int) -> list[tuple[str, Callable[..., PyTree], dict[str, PyTree]]]:
    """Name, function and arguments (as shapes, by group) of every program of a bucket."""
    cfg, layout = model.experiment.model, model.layout
    params = abstract_params(transformer.specs(cfg))

    def init() -> PyTree:
        max_slots = max(layout.max_slots_in, 1)
        return {"state": cache.init_state(cfg, bucket, model.experiment.stream.max_positions, max_slots)}

    def append(params: PyTree, state: DecodeState, slots: TurnInputs) -> PyTree:
        state, logits_BWV = cache.append(params, state, slots.slots(), cfg)
        last_B = jnp.maximum(slots.counts_B - 1, 0)
        return {"state": state, "logits_BV": jnp.take_along_axis(logits_BWV, last_B[:, None, None], axis=1)[:, 0]}

    def decode(params: PyTree, state: DecodeState, tokens: dict[str, jax.Array]) -> PyTree:
        slots = slots_of(tokens["tokens_B"][:, None], tokens["active_B"].astype(jnp.int32), cfg)
        state, logits_BWV = cache.append(params, state, slots, cfg)
        return {"state": state, "logits_BV": logits_BWV[:, 0]}

    state = jax.eval_shape(init)["state"]
    slots = jax.eval_shape(lambda: _no_inputs(cfg, layout, bucket))
    tokens = {
        "tokens_B": jax.ShapeDtypeStruct((bucket,), jnp.int32),
        "active_B": jax.ShapeDtypeStruct((bucket,), jnp.bool_),
    }
    return [
        ("init", init, {}),
        ("append", append, {"params": params, "state": state, "input": slots}),
        ("decode", decode, {"params": params, "state": state, "input": tokens}),
    ]


def _no_inputs(cfg: ModelConfig, layout: Layout, num_rows: int) -> TurnInputs:
    """The inputs of a micro-turn in which no session takes part."""
    width, video = max(layout.max_slots_in, 1), cfg.video
    tile = (video.frames_per_tile, video.tile_px, video.tile_px, 3)
    return TurnInputs(
        tokens_BW=jnp.zeros((num_rows, width), jnp.int32),
        kinds_BW=jnp.zeros((num_rows, width), jnp.uint8),
        levels_BWM=jnp.zeros((num_rows, width, cfg.audio.num_mels), jnp.uint8),
        tiles_BP=jnp.zeros((num_rows, layout.max_tiles_per_turn, *tile), jnp.int16),
        tile_index_BW=jnp.zeros((num_rows, width), jnp.int32),
        counts_B=jnp.zeros(num_rows, jnp.int32),
    )


def _write_program(
    folder: Path, name: str, bucket: int, function: Callable[..., PyTree], arguments: dict[str, PyTree]
) -> dict[str, Any]:
    """Lowers a program over flat lists of arrays, as our pytree classes are unknown elsewhere; returns its entry."""
    leaves, structure = jax.tree.flatten(tuple(arguments.values()))

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(function(*jax.tree.unflatten(structure, arrays)))

    # Arguments that a program does not read stay, so that the manifest's order is the program's.
    exported = export.export(jax.jit(flat, keep_unused=True), platforms=PLATFORMS)(*leaves)
    file = f"{name}_b{bucket}.stablehlo"
    (folder / file).write_bytes(exported.serialize())
    results = jax.eval_shape(function, *arguments.values())
    return {
        "name": name,
        "bucket": bucket,
        "file": file,
        "calling_convention": exported.calling_convention_version,
        "arguments": [entry for group, tree in arguments.items() for entry in _described({group: tree})],
        "results": _described(results),
    }


def _described(tree: PyTree) -> list[dict[str, Any]]:
    """Name, shape and dtype of every leaf, in order; parameters have the names of the safetensors file."""
    return [
        {
            "name": jax.tree_util.keystr(path, simple=True, separator="/"),
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
        }
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
