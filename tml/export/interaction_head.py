"""What Inkling's published layout cannot hold: files of its own beside it, which other engines do not read.

That is the voice, an image tower whose widths no config.json of Inkling's can name, and a layout of micro-turns that is
not the usual one.

interaction_head.safetensors   flow head, table of own audio and such a tower, by our paths, in float32
interaction_head.json          format, voice (`model.audio_out`), layout of micro-turns (`turn`), such a tower (`video`)
vocoder/                       the vocoder's program, where the voice names one
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.numpy

from tml.checkpoint_pieces import ParamsReader, Piece, PiecewiseArray
from tml.codec.vocoder_program import carried, carry
from tml.config import AudioOutConfig, MicroTurnConfig, ModelConfig, VideoConfig, to_mapping
from tml.config.tree import from_mapping
from tml.export.tile_folds import is_planned
from tml.model import transformer
from tml.params import ParamSpec, spec_leaves

FORMAT = 1
WEIGHTS, DESCRIPTION = "interaction_head.safetensors", "interaction_head.json"


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the description says.

    Attributes:
        audio_out: the voice.
        turn: the layout of micro-turns that the model was trained in.
        video: the image tower; None if the published layout holds it, or there is none.
    """

    audio_out: AudioOutConfig
    turn: MicroTurnConfig
    video: VideoConfig | None

    def whole(self, model: ModelConfig) -> ModelConfig:
        """The model of which the published layout has held a part."""
        return replace(model, audio_out=self.audio_out, video=self.video or model.video)


def published(model: ModelConfig) -> ModelConfig:
    """The part of a model that the published layout holds: all but its voice, and a tower that is not Inkling's."""
    return replace(model, audio_out=AudioOutConfig(), video=VideoConfig() if _has_own_tower(model) else model.video)


def _has_own_tower(model: ModelConfig) -> bool:
    video = model.video
    folds = (video.fold_px, video.fold_dims)
    return video.max_tiles_per_turn > 0 and not is_planned(video.tile_px, video.frames_per_tile, folds)


def head_specs(model: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters that stand beside, by path; often none."""
    outside = {path for path, _ in spec_leaves(transformer.specs(published(model)))}
    return {path: spec for path, spec in spec_leaves(transformer.specs(model)) if path not in outside}


def write(folder: Path, reader: ParamsReader) -> None:
    """Writes what stands beside a checkpoint; nothing if nothing does."""
    experiment = reader.experiment
    specs = head_specs(experiment.model)
    if not specs and experiment.turn == MicroTurnConfig():
        return
    if specs:
        _write_weights(folder, reader, specs)
    described = {
        "format": FORMAT,
        "audio_out": to_mapping(carry(experiment.model.audio_out, folder)),
        "turn": to_mapping(experiment.turn),
    }
    if _has_own_tower(experiment.model):
        described["video"] = to_mapping(experiment.model.video)
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def _write_weights(folder: Path, reader: ParamsReader, specs: Mapping[str, ParamSpec]) -> None:
    tensors = {path: np.asarray(reader.read(path, (0,), spec.shape[0])) for path, spec in specs.items()}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def read(folder: Path) -> Described | None:
    """What lies beside a checkpoint of the published layout, if something does.

    Raises:
        ValueError: a damaged description, another format, or one of the two files without the other that it needs.
    """
    file, has_weights = folder / DESCRIPTION, (folder / WEIGHTS).is_file()
    if not file.is_file() and not has_weights:
        return None
    halves = f"of {WEIGHTS} and {DESCRIPTION} both are needed, or neither"
    if not file.is_file():
        raise ValueError(f"{folder} holds {WEIGHTS}, but {halves}")
    try:
        described = json.loads(file.read_text())
        found = described["format"]
        if found != FORMAT:
            raise ValueError(f"format {found}, this code reads {FORMAT}")
        video = described.get("video")
        beside = Described(
            audio_out=carried(from_mapping(AudioOutConfig, described["audio_out"], "audio_out"), folder),
            turn=from_mapping(MicroTurnConfig, described["turn"], "turn"),
            video=None if video is None else from_mapping(VideoConfig, video, "video"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; export it again") from error
    if not has_weights and (beside.audio_out.frames_per_position or beside.video):
        raise ValueError(f"{folder} holds {DESCRIPTION} with a voice or a tower, but {halves}")
    return beside


def piecewise(folder: Path, model: ModelConfig) -> dict[str, PiecewiseArray]:
    """Every parameter that stands beside, read when its turn comes; often none.

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
