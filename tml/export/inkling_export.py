"""Writes a checkpoint of ours in Inkling's published layout, one shard at a time, for transformers, SGLang and vLLM."""

import enum
import filecmp
import json
import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tml.checkpoint_pieces import ParamsReader
from tml.codec.text import TOKENIZER_FILES
from tml.export import inkling_config, inkling_layout, interaction_head
from tml.export.inkling_import import (
    ABOUT_TOKENIZERS,
    CONFIG,
    KEEPSAKE,
    SIDE_FILES,
    STORED,
    origin,
    read_config,
    rows_at_a_time,
)
from tml.export.inkling_layout import FLOAT32_NAMES, Part, Tensor
from tml.export.tensor_folder import DTYPES, Planned, write_shards
from tml.whole_folder import Kind, whole_folder

MAX_SHARD_BYTES = 5 * 10**9
"""What a shard may hold; a larger tensor has one of its own."""

DTYPE_KEYS = {"dtype", "torch_dtype"}
"""How config.json names what tensors are stored in: of today and of before."""


class StoredAs(enum.StrEnum):
    """What the exported tensors are stored in."""

    AS_IMPORTED = "as_imported"
    """Each as it was in the folder it came from; float32 if it came from none."""
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    """All but those that engines keep in float32."""


def export_folder(
    workdir: Path,
    folder: Path,
    step: int | None = None,
    stored_as: StoredAs = StoredAs.AS_IMPORTED,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ParamsReader:
    """Exports a checkpoint, its voice in files beside it; returns what it was read with.

    Args:
        workdir: the run folder.
        folder: what is written; an older export there is replaced when the new one is whole, anything else refused.
        step: the checkpoint, the newest if None.
        stored_as: the dtypes.
        max_shard_bytes: the size of a shard.

    Raises:
        ValueError: the model cannot be described by a config.json, or the folder holds something else.
        CheckpointError: there is no checkpoint, or it is damaged.
        OSError: the disk is full.
    """
    reader = ParamsReader(workdir, step)
    keepsake, model = workdir / KEEPSAKE, interaction_head.published(reader.experiment.model)
    kept = read_config(keepsake) if keepsake.is_dir() else {}
    before = json.loads((keepsake / STORED).read_text())["dtypes"] if keepsake.is_dir() else {}
    config = inkling_config.from_model(model, kept)
    layout = inkling_layout.tensors(model)
    dtypes = {tensor.name: dtype_of(tensor.name, stored_as, before) for tensor in layout}
    if stored_as is not StoredAs.AS_IMPORTED or not kept:
        _state_dtype(config, "bfloat16" if stored_as is StoredAs.BFLOAT16 else "float32")
    planned = [
        Planned(
            tensor.name,
            math.prod(tensor.shape) * dtypes[tensor.name].itemsize,
            partial(_made, tensor, dtypes[tensor.name], reader),
        )
        for tensor in layout
    ]
    with whole_folder(folder, Kind.HF, ValueError) as staging:
        write_shards(staging, planned, max_shard_bytes)
        interaction_head.write(staging, reader)
        reader.check()
        for name in SIDE_FILES:
            if (keepsake / name).is_file():
                shutil.copyfile(keepsake / name, staging / name)
        _copy_tokenizer(workdir / "tokenizer", staging)
        (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return reader


def _state_dtype(config: dict[str, Any], dtype: str) -> None:
    """Names the dtype wherever config.json names one, in either spelling, and at the top anyway."""
    sections = [config[name] for name in inkling_config.SECTIONS if name in config]
    for group in (config, *sections):
        group |= dict.fromkeys(DTYPE_KEYS & group.keys(), dtype)
    if not DTYPE_KEYS & config.keys():
        config["dtype"] = dtype


def _copy_tokenizer(trained: Path, folder: Path) -> None:
    """Puts the run's own tokenizer in place of the one that came with what it began with, where they differ."""
    files = [trained / name for name in TOKENIZER_FILES.values() if (trained / name).is_file()]
    if not files or all((folder / f.name).is_file() and filecmp.cmp(f, folder / f.name, False) for f in files):
        return
    for name in (*TOKENIZER_FILES.values(), *ABOUT_TOKENIZERS):
        (folder / name).unlink(missing_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def dtype_of(name: str, stored_as: StoredAs, before: Mapping[str, str]) -> np.dtype:
    """What a tensor is stored in; `before` has the dtypes of the folder it came from, if it came from one."""
    if stored_as is StoredAs.AS_IMPORTED:
        return DTYPES[before.get(name, "F32")]
    if stored_as is StoredAs.FLOAT32 or FLOAT32_NAMES.fullmatch(name):
        return DTYPES["F32"]
    return DTYPES["BF16"]


def _made(tensor: Tensor, dtype: np.dtype, reader: ParamsReader) -> np.ndarray:
    """Reads and rearranges a tensor."""
    values = np.empty(tensor.shape, dtype)
    for part in tensor.parts:
        place, step = tensor.rows(part), rows_at_a_time(part)
        for start in range(place.start, place.stop, step):
            stop = min(start + step, place.stop)
            values[start:stop] = part.to_theirs(_read(part, start - place.start, stop - start, reader))
    return values


def _read(part: Part, first: int, num_rows: int, reader: ParamsReader) -> np.ndarray:
    """The rows of ours that become some rows of theirs, or the whole part where they change places."""
    if not part.spec.shape:
        return reader.read(part.path, origin(part, 0), 1).reshape(())
    return reader.read(part.path, origin(part, first), num_rows if part.leads_alike else part.spec.shape[0])
