"""What a voice adds to Inkling's published layout: files of its own beside it, which other engines do not read.

interaction_head.safetensors   the flow head and the table of own audio, by our paths, in float32
interaction_head.json          format, the voice (`model.audio_out`) and the layout of micro-turns (`turn`)
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.numpy

from tml.checkpoint_pieces import ParamsReader, Piece, PiecewiseArray
from tml.config import AudioOutConfig, MicroTurnConfig, ModelConfig, to_mapping
from tml.config.tree import from_mapping
from tml.model import transformer
from tml.params import ParamSpec, spec_leaves

FORMAT = 1
WEIGHTS, DESCRIPTION = "interaction_head.safetensors", "interaction_head.json"


@dataclass(frozen=True, kw_only=True)
class Voice:
    """What the description says.

    Attributes:
        audio_out: the voice.
        turn: the layout of micro-turns that it was trained in.
    """

    audio_out: AudioOutConfig
    turn: MicroTurnConfig


def published(model: ModelConfig) -> ModelConfig:
    """The part of a model that the published layout holds: all but its voice."""
    return replace(model, audio_out=AudioOutConfig())


def head_specs(model: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters of the voice, by path; none without one."""
    outside = {path for path, _ in spec_leaves(transformer.specs(published(model)))}
    return {path: spec for path, spec in spec_leaves(transformer.specs(model)) if path not in outside}


def write(folder: Path, reader: ParamsReader) -> None:
    """Writes the voice of a checkpoint; nothing for a model without one."""
    experiment = reader.experiment
    if not experiment.model.has_voice:
        return
    specs = head_specs(experiment.model)
    tensors = {path: np.asarray(reader.read(path, (0,), spec.shape[0])) for path, spec in specs.items()}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    described = {
        "format": FORMAT,
        "audio_out": to_mapping(experiment.model.audio_out),
        "turn": to_mapping(experiment.turn),
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def read(folder: Path) -> Voice | None:
    """The voice that lies beside a checkpoint of the published layout, if one does.

    Raises:
        ValueError: a damaged description, another format, or one of the two files without the other.
    """
    there = [name for name in (WEIGHTS, DESCRIPTION) if (folder / name).is_file()]
    if not there:
        return None
    if len(there) == 1:
        raise ValueError(f"{folder} holds {there[0]}, but of {WEIGHTS} and {DESCRIPTION} both are needed, or neither")
    file = folder / DESCRIPTION
    try:
        described = json.loads(file.read_text())
        found = described["format"]
        if found != FORMAT:
            raise ValueError(f"format {found}, this code reads {FORMAT}")
        return Voice(
            audio_out=from_mapping(AudioOutConfig, described["audio_out"], "audio_out"),
            turn=from_mapping(MicroTurnConfig, described["turn"], "turn"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; export it again") from error


def piecewise(folder: Path, model: ModelConfig) -> dict[str, PiecewiseArray]:
    """Every parameter of the voice, read when its turn comes; none for a model without one.

    Raises:
        ValueError: a parameter too many, too few, or of another shape.
    """
    specs = head_specs(model)
    if not specs:
        return {}
    with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as stored:
        found = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    for name in sorted(found.keys() | specs.keys()):
        wanted = specs[name].shape if name in specs else None
        if found.get(name) != wanted:
            raise ValueError(
                f"{folder / WEIGHTS}: {name} has shape {found.get(name)}, {DESCRIPTION} asks for {wanted}; "
                f"export it again"
            )
    return {
        path: PiecewiseArray(spec.shape, spec.shape, partial(_whole, folder / WEIGHTS, path))
        for path, spec in specs.items()
    }


def _whole(file: Path, path: str) -> Iterator[Piece]:
    with safetensors.safe_open(file, framework="numpy") as stored:
        yield Piece((0,), stored.get_tensor(path))
