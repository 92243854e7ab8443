"""Brings a folder of Inkling's published layout in as a checkpoint of ours, a few rows of a tensor at a time.

The run folder gets, in this order: what is needed for the way back (`inkling/`), the vocoder's program and the
tokenizer if there are any, the resolved config, and last the checkpoint, whose being there says that the import is
whole.
"""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from tml.checkpoint import FOLDER, CheckpointError
from tml.checkpoint_pieces import STEP, ParamsReader, Piece, PiecewiseArray, committed_steps, write_params
from tml.codec import vocoder_program
from tml.codec.text import TOKENIZER_FILES, tokenizer_file
from tml.codec.vocoder_program import carried, carry
from tml.config import Experiment, ModelConfig, TextConfig, describe, difference, to_json, to_mapping
from tml.export import inkling_config, inkling_layout, interaction_head
from tml.export.inkling_layout import Part, Tensor
from tml.export.tensor_folder import TensorFolder
from tml.foreign_files import foreign_files
from tml.model import transformer
from tml.params import spec_leaves

PIECE_BYTES = 64 * 2**20
"""Rows that can be rearranged alone are taken so many at a time."""

MTP = "model.mtp."
"""Names of the blocks of multi-token prediction begin so."""
WITHOUT_MTP = (
    "; a checkpoint without these blocks, as transformers saves them, needs num_nextn_predict_layers = 0 "
    "and no local_layer_ids in mtp_config (num_mtp_layers = 0 and no mtp_local_layer_ids, where transformers wrote it)"
)

KEEPSAKE = "inkling"
"""Folder of a run folder with what the network does not need and an export gives back."""
CONFIG, STORED = "config.json", "stored.json"
ABOUT_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json")
SIDE_FILES = (
    *TOKENIZER_FILES.values(),
    *ABOUT_TOKENIZERS,
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""Text files beside the weights that engines read; they are carried along as they are."""
KEPT = (STORED, CONFIG, *SIDE_FILES)
"""What may lie in `inkling/`."""

LOCK = ".lock"
"""What a training process leaves in a run folder, even if it went no further."""
OWN_FILES = re.compile(
    rf"{re.escape(LOCK)}|config\.json|{KEEPSAKE}/({'|'.join(map(re.escape, KEPT))})"
    rf"|tokenizer/({'|'.join(map(re.escape, TOKENIZER_FILES.values()))})"
    rf"|{vocoder_program.FOLDER}/({'|'.join(map(re.escape, vocoder_program.FILES))})|{FOLDER}/\.{STEP}\.new/.*"
)
"""What an import that was killed may have left in a run folder."""

Source = tuple[Tensor, Part]


def import_folder(folder: Path, workdir: Path, max_tiles_per_turn: int | None = None) -> Experiment:
    """Imports a checkpoint. What is whole already is not done again.

    Args:
        folder: config.json and safetensors, in one file or in shards.
        workdir: the run folder that is made.
        max_tiles_per_turn: image tiles one micro-turn may hold, if the checkpoint has an image tower; by default as
            many as an export of ours says, else 1.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something that this import does not know, or that does not fit together.
        CheckpointError: the folder holds another checkpoint already, or files that are no import of ours.
    """
    source = TensorFolder(folder)
    config = read_config(folder)
    has_tower = any(name.startswith("model.visual.") for name in source.tensors)
    try:
        model = inkling_config.to_model(config, has_tower, max_tiles_per_turn or 1)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} holds a value of another kind than it must be: {error}") from error
    layout = inkling_layout.tensors(model)
    beside = interaction_head.read(folder)
    check_tensors(layout, source)
    tokenizer = tokenizer_file(folder)
    text = TextConfig(tokenizer=str(workdir / "tokenizer" / tokenizer.name) if tokenizer else "")
    experiment = Experiment(name=folder.resolve().name, model=model, text=text)
    if beside:
        experiment = beside.whole(experiment)
        video = replace(experiment.model.video, max_tiles_per_turn=max_tiles_per_turn or 1)
        if max_tiles_per_turn and experiment.model.video.max_tiles_per_turn:
            experiment = replace(experiment, model=replace(experiment.model, video=video))
    voice = experiment.model.audio_out
    experiment = replace(experiment, model=replace(experiment.model, audio_out=carried(voice, workdir)))
    if committed_steps(workdir):
        _refuse_another(source, workdir, experiment)
        return experiment
    _refuse_others(workdir)
    _keep(source, workdir / KEEPSAKE)
    carry(voice, workdir)
    if tokenizer:
        (workdir / "tokenizer").mkdir(exist_ok=True)
        shutil.copyfile(tokenizer, workdir / "tokenizer" / tokenizer.name)
    (workdir / CONFIG).write_text(to_json(experiment) + "\n")
    arrays = {**piecewise(layout, model, source), **interaction_head.piecewise(folder, experiment.model)}
    write_params(workdir, experiment, arrays)
    return experiment


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no group of keys.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; a checkpoint has one beside its weights")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}; download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds {type(config).__name__}, not a group of keys")
    return config


def check_tensors(layout: Sequence[Tensor], source: TensorFolder) -> None:
    """Compares names and shapes with what config.json asks for.

    Raises:
        ValueError: a tensor too many, too few, or of another shape.
    """
    wanted = {tensor.name: tensor.shape for tensor in layout}
    found = {name: stored.shape for name, stored in source.tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) == found.get(name):
            continue
        if name not in wanted:
            raise ValueError(f"{source.folder} holds {name} {found[name]}, which its config.json does not ask for")
        raise ValueError(
            f"{source.folder}: {name} has shape {found.get(name, 'none: it is missing')}, "
            f"its config.json asks for {wanted[name]}{WITHOUT_MTP if name.startswith(MTP) else ''}"
        )


def piecewise(layout: Sequence[Tensor], model: ModelConfig, source: TensorFolder) -> dict[str, PiecewiseArray]:
    """Every parameter of ours, read from the source when its turn comes."""
    sources: dict[str, list[Source]] = defaultdict(list)
    for tensor in layout:
        for part in tensor.parts:
            sources[part.path].append((tensor, part))
    return {
        path: PiecewiseArray(spec.shape, _chunk(sources[path][0][1]), partial(_pieces, sources[path], source))
        for path, spec in spec_leaves(transformer.specs(model))
    }


def rows_at_a_time(part: Part) -> int:
    """How many rows of theirs are rearranged at a time: all, where the leading axes change places."""
    if not part.leads_alike:
        return part.shape[0]
    return min(part.shape[0], max(1, PIECE_BYTES * part.shape[0] // (4 * part.spec.size)))


def origin(part: Part, first: int) -> tuple[int, ...]:
    """Where the rows of a part from `first` on stand in our parameter."""
    layer = () if isinstance(part.index, EllipsisType) else (part.index,)
    return (*layer, first) if part.spec.shape else layer


def _chunk(part: Part) -> tuple[int, ...]:
    layer = () if isinstance(part.index, EllipsisType) else (1,)
    first, rest = part.spec.shape[:1], part.spec.shape[1:]
    return (*layer, *((rows_at_a_time(part),) if part.leads_alike else first), *rest)


def _pieces(sources: Sequence[Source], source: TensorFolder) -> Iterator[Piece]:
    for tensor, part in sources:
        place, step = tensor.rows(part), rows_at_a_time(part)
        for start in range(place.start, place.stop, step):
            values = part.to_ours(source.read(tensor.name, slice(start, min(start + step, place.stop))))
            place_of_ours = origin(part, start - place.start)
            yield Piece(place_of_ours, np.atleast_1d(values) if place_of_ours else values)


def _described(source: TensorFolder) -> dict[str, Any]:
    """How each tensor is stored, and in which files of what size and date."""
    beside = {name for name in (interaction_head.WEIGHTS,) if (source.folder / name).is_file()}
    files = {stored.file for stored in source.tensors.values()} | beside
    stats = {name: (source.folder / name).stat() for name in files}
    return {
        "dtypes": {name: stored.dtype for name, stored in source.tensors.items()},
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def _keep(source: TensorFolder, keepsake: Path) -> None:
    """Puts aside what an export gives back: how every tensor was stored, config.json and its neighbours."""
    keepsake.mkdir(parents=True, exist_ok=True)
    # First: by this file a folder is known for one of an import.
    (keepsake / STORED).write_text(json.dumps(_described(source), indent=1, sort_keys=True) + "\n")
    for name in (CONFIG, *SIDE_FILES):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, keepsake / name)
        else:
            (keepsake / name).unlink(missing_ok=True)


def _refuse_others(workdir: Path) -> None:
    """Raises CheckpointError unless the run folder holds nothing but what an import left that was killed."""
    if not (workdir / KEEPSAKE / STORED).is_file():
        others = foreign_files(workdir, (LOCK,).__contains__)
        why = f"and no {KEEPSAKE}/{STORED}, so no import began there"
    else:
        others = foreign_files(workdir, OWN_FILES.fullmatch)
        why = "which no import writes"
    if others:
        raise CheckpointError(f"{workdir} holds {others}, {why}; name another --workdir")


def _refuse_another(source: TensorFolder, workdir: Path, experiment: Experiment) -> None:
    """Raises CheckpointError unless the run folder holds this very import, whole."""
    steps, stored = committed_steps(workdir), workdir / KEEPSAKE / STORED
    is_import = steps == [STEP] and stored.is_file()
    if not is_import or json.loads(stored.read_text()) != _described(source):
        raise CheckpointError(f"{workdir} holds a checkpoint of step {steps[-1]} already; name another --workdir")
    changed = difference(to_mapping(ParamsReader(workdir).experiment), to_mapping(experiment))
    if changed:
        raise CheckpointError(
            f"{workdir} holds this import with another config: {describe(changed)}; name another --workdir"
        )
