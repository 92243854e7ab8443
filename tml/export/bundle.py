"""The bundle: parameters, config and tokenizer in one folder, which streams without the run or its data.

bundle/
config.json           the experiment
params.safetensors    every parameter in float32, by its path
tokenizer/            the tokenizer's own file
vocoder/              the vocoder's program, where the voice names one
bundle.json           format, config hash, checksums
tml_export.json       by which the next export knows what it may replace (tml.whole_folder)
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from tml import checkpoint
from tml.codec.text import Tokenizer
from tml.codec.vocoder_program import carried, carry
from tml.config import AudioOutConfig, Experiment, config_hash, to_json
from tml.config.tree import from_json
from tml.export.tensor_folder import save_tensors
from tml.microturn import Layout
from tml.model import transformer
from tml.params import PyTree, map_specs, spec_leaves
from tml.whole_folder import Kind, whole_folder

FORMAT = 1
MARKER = "bundle.json"
PARAMS = "params.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer"


class BundleError(ValueError):
    """A folder that is no bundle, or a damaged one."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that streaming needs.

    Attributes:
        experiment: the config it was trained with, but for blocks of multi-token prediction.
        params: the parameters, without those of such blocks.
        tokenizer: the tokenizer.
    """

    experiment: Experiment
    params: PyTree
    tokenizer: Tokenizer

    @property
    def layout(self) -> Layout:
        """The micro-turn layout."""
        return Layout.of(self.experiment.turn, self.experiment.model, self.tokenizer.special)


def open_model(folder: Path, step: int | None = None) -> Model:
    """Reads a bundle, or the newest (or given) checkpoint of a run folder, for streaming.

    Raises:
        BundleError: neither of the two, or a step of a bundle.
        CheckpointError: the checkpoint is damaged, or there is none.
    """
    if (folder / MARKER).is_file():
        if step is not None:
            raise BundleError(
                f"{folder} is a bundle, which holds one step; leave out step {step}, or name a run folder"
            )
        return load(folder)
    if not (folder / checkpoint.FOLDER).is_dir():
        raise BundleError(
            f"{folder} is neither a bundle (no {MARKER}) nor a run folder (no {checkpoint.FOLDER}); "
            f"train with --workdir={folder} first, or name another folder"
        )
    trained, params = checkpoint.restore(folder, step)
    experiment = replace(trained, model=trained.model.streamed)
    names = transformer.specs(experiment.model)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    return Model(experiment=experiment, params={name: params[name] for name in names}, tokenizer=tokenizer)


def save(model: Model, folder: Path) -> None:
    """Writes a bundle. An older one is replaced only when the new one is whole.

    Raises:
        BundleError: the folder holds anything but a bundle that `save` wrote.
        OSError: the disk is full.
    """
    with whole_folder(folder, Kind.BUNDLE, BundleError) as staging:
        experiment = with_voice(model.experiment, carry(model.experiment.model.audio_out, staging))
        save_tensors(by_path(model.params, experiment), staging / PARAMS)
        (staging / CONFIG).write_text(to_json(experiment) + "\n")
        model.tokenizer.save(staging / TOKENIZER)
        files = sorted(str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file())
        marker = {
            "format": FORMAT,
            "config_hash": config_hash(experiment),
            "sha256": {name: digest(staging / name) for name in files},
        }
        (staging / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def load(folder: Path) -> Model:
    """Reads a bundle.

    Raises:
        BundleError: not a bundle, another format, another checksum, or parameters that do not fit the config.
    """
    _verify(folder)
    try:
        experiment = from_json((folder / CONFIG).read_text())
    except ValueError as error:
        raise BundleError(
            f"{folder / CONFIG} was written by another version of tml: {error}; export it again"
        ) from error
    experiment = with_voice(experiment, carried(experiment.model.audio_out, folder))
    tensors = safetensors.numpy.load_file(folder / PARAMS)
    params, tokenizer = _as_tree(tensors, experiment, folder), Tokenizer.load(folder / TOKENIZER)
    return Model(experiment=experiment, params=params, tokenizer=tokenizer)


def with_voice(experiment: Experiment, own: AudioOutConfig) -> Experiment:
    """The same experiment with another voice."""
    return replace(experiment, model=replace(experiment.model, audio_out=own))


def _verify(folder: Path) -> None:
    """Raises BundleError unless every file of the bundle has the bytes it was written with."""
    if not (folder / MARKER).is_file():
        raise BundleError(f"{folder} is not a bundle: it has no {MARKER}")
    try:
        marker = json.loads((folder / MARKER).read_text())
        found = marker["format"]
        digests = marker["sha256"].items() if found == FORMAT else ()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{folder / MARKER} is damaged: export it again ({error!r})") from error
    if found != FORMAT:
        raise BundleError(f"{folder} has bundle format {found}, this code reads {FORMAT}; export it again")
    for name, written in digests:
        if not (folder / name).is_file():
            raise BundleError(f"{folder / name} is missing from the bundle: export it again")
        found_digest = digest(folder / name)
        if found_digest != written:
            raise BundleError(
                f"{folder / name} has sha256 {found_digest[:12]}, the bundle was written with {written[:12]}; "
                f"it is damaged: export it again"
            )


def digest(file: Path) -> str:
    """The sha256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def by_path(params: PyTree, experiment: Experiment) -> dict[str, np.ndarray]:
    """Every parameter by its path, in tree order."""
    paths = [path for path, _ in spec_leaves(transformer.specs(experiment.model))]
    return {path: np.asarray(leaf) for path, leaf in zip(paths, jax.tree.leaves(params), strict=True)}


def _as_tree(tensors: Mapping[str, np.ndarray], experiment: Experiment, folder: Path) -> PyTree:
    specs = transformer.specs(experiment.model)
    left_over = sorted(tensors.keys() - {path for path, _ in spec_leaves(specs)})
    if left_over:
        raise BundleError(f"{folder / PARAMS} holds {left_over[0]}, which its config does not know; export it again")
    leaves = []
    for path, spec in spec_leaves(specs):
        found = tensors.get(path)
        if found is None or found.shape != spec.shape:
            shape = None if found is None else found.shape
            raise BundleError(f"{folder / PARAMS}: {path} has shape {shape}, its config wants {spec.shape}")
        leaves.append(jax.numpy.asarray(found))
    return jax.tree.unflatten(jax.tree.structure(map_specs(lambda spec: 0, specs)), leaves)
