"""What Inkling's published layout cannot hold: files of its own beside it, which other engines do not read.

That is the voice, an image tower whose widths no config.json of Inkling's can name, and what a stream of micro-turns
needs to be the same again, if it is not what an import would take anyway.

interaction_head.safetensors   flow head, table of own audio and such a tower, by our paths, in float32
interaction_head.json          format, voice (`model.audio_out`), what is heard (`model.audio`) and seen (`model.video`)
                               and how often, dtype of computing, what training needs to go on (`mtp_embedding`,
                               `balance_rate`), layout of micro-turns (`turn`), streaming (`stream`)
vocoder/                       the vocoder's program, where the voice names one
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tml.checkpoint_pieces import ParamsReader, Piece, PiecewiseArray
from tml.codec.vocoder_program import carried, carry
from tml.config import (
    AudioConfig,
    AudioOutConfig,
    ComputeDtype,
    Experiment,
    MicroTurnConfig,
    ModelConfig,
    MtpEmbedding,
    StreamConfig,
    VideoConfig,
    to_mapping,
)
from tml.config.tree import from_mapping
from tml.export import inkling_config
from tml.export.tensor_folder import open_tensors, save_tensors
from tml.export.tile_folds import is_planned
from tml.model import transformer
from tml.params import ParamSpec, spec_leaves

FORMAT = 3
LACKED_BY_2 = {"mtp_embedding": MtpEmbedding.RAW.value, "balance_rate": 1e-3}
"""What format 2 does not say, with the values that its imports had."""
WEIGHTS, DESCRIPTION = "interaction_head.safetensors", "interaction_head.json"


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the description says.

    Attributes:
        audio_out: the voice.
        audio: what is heard.
        video: the image tower, if there is one.
        compute_dtype: of activations.
        mtp_embedding: what blocks of multi-token prediction are told of the position ahead.
        balance_rate: step of the router's selection bias.
        turn: the layout of micro-turns that the model was trained in.
        stream: how it is streamed.
    """

    audio_out: AudioOutConfig
    audio: AudioConfig
    video: VideoConfig
    compute_dtype: ComputeDtype
    mtp_embedding: MtpEmbedding
    balance_rate: float
    turn: MicroTurnConfig
    stream: StreamConfig

    @classmethod
    def of(cls, experiment: Experiment) -> "Described":
        """What is to be said of an experiment."""
        model = experiment.model
        return cls(
            audio_out=model.audio_out,
            audio=model.audio,
            video=model.video if model.video.max_tiles_per_turn else VideoConfig(),
            compute_dtype=model.compute_dtype,
            mtp_embedding=model.mtp.embedding,
            balance_rate=model.moe.balance_rate,
            turn=experiment.turn,
            stream=experiment.stream,
        )

    def whole(self, experiment: Experiment) -> Experiment:
        """The experiment of which the published layout has held a part."""
        model = replace(
            experiment.model,
            audio_out=self.audio_out,
            audio=self.audio,
            video=self.video,
            compute_dtype=self.compute_dtype,
            mtp=replace(experiment.model.mtp, embedding=self.mtp_embedding),
            moe=replace(experiment.model.moe, balance_rate=self.balance_rate),
        )
        return replace(experiment, model=model, turn=self.turn, stream=self.stream)


def published(model: ModelConfig) -> ModelConfig:
    """The part of a model that the published layout holds: all but its voice, and a tower that is not Inkling's."""
    return replace(model, audio_out=AudioOutConfig(), video=VideoConfig() if _is_own(model.video) else model.video)


def _is_own(video: VideoConfig) -> bool:
    """Whether there is a tower, and none of Inkling's."""
    folds = (video.fold_px, video.fold_dims)
    return video.max_tiles_per_turn > 0 and not is_planned(video.tile_px, video.frames_per_tile, folds)


def head_specs(model: ModelConfig) -> dict[str, ParamSpec]:
    """The parameters that stand beside, by path; often none."""
    outside = {path for path, _ in spec_leaves(transformer.specs(published(model)))}
    return {path: spec for path, spec in spec_leaves(transformer.specs(model)) if path not in outside}


def write(folder: Path, reader: ParamsReader) -> None:
    """Writes what stands beside a checkpoint; nothing if nothing does."""
    experiment = reader.experiment
    specs, described = head_specs(experiment.model), Described.of(experiment)
    if not specs and described == Described.of(_as_imported(experiment)):
        return
    if specs:
        _write_weights(folder, reader, specs)
    described = replace(described, audio_out=carry(described.audio_out, folder))
    content = {"format": FORMAT, **to_mapping(described)}
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _as_imported(experiment: Experiment) -> Experiment:
    """What an import would make of the published layout alone."""
    model = published(experiment.model)
    has_tower = model.video.max_tiles_per_turn > 0
    return Experiment(
        name=experiment.name, model=inkling_config.to_model(inkling_config.from_model(model, {}), has_tower)
    )


def _write_weights(folder: Path, reader: ParamsReader, specs: Mapping[str, ParamSpec]) -> None:
    tensors = {path: np.asarray(reader.read(path, (0,), spec.shape[0])) for path, spec in specs.items()}
    save_tensors(tensors, folder / WEIGHTS)


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
        if found not in (2, FORMAT):
            raise ValueError(f"format {found}, this code reads 2 and {FORMAT}")
        del described["format"]
        beside = from_mapping(Described, (LACKED_BY_2 if found == 2 else {}) | described, DESCRIPTION)
        beside = replace(beside, audio_out=carried(beside.audio_out, folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; export it again") from error
    if not has_weights and (beside.audio_out.frames_per_position or _is_own(beside.video)):
        raise ValueError(f"{folder} holds {DESCRIPTION} with a voice or a tower, but {halves}")
    return beside


def piecewise(folder: Path, model: ModelConfig) -> dict[str, PiecewiseArray]:
    """Every parameter that stands beside, read when its turn comes; often none.

    Raises:
        ValueError: a damaged file, or a parameter too many, too few, or of another shape.
    """
    specs = head_specs(model)
    if not specs:
        return {}
    with open_tensors(folder / WEIGHTS, "export it again") as stored:
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
    with open_tensors(file, "export it again") as stored:
        yield Piece((0,), stored.get_tensor(path))
