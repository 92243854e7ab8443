"""Folders of safetensors, in one file or in shards with an index: read row by row, written shard by shard."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""What a tensor may be stored in, under its name in a safetensors header; each value is a float32 as well."""


def open_tensors(file: Path, way_out: str) -> Any:
    """Opens a safetensors file and reads its header.

    Args:
        file: which.
        way_out: what the reader of an error can do, such as "download it again".

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is cut off, or is no such file.
    """
    try:
        return safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); {way_out}") from error


def save_tensors(tensors: Mapping[str, np.ndarray], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    try:
        safetensors.numpy.save_file(dict(tensors), file, metadata=metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"{file} cannot be written ({error}); make room, or write elsewhere") from error
    # The library lets only the owner read it; who serves the model may be somebody else.
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


@dataclass(frozen=True)
class Stored:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class TensorFolder:
    """The tensors of a folder; only what is asked for is read. No pickle, and no code of the folder's own."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers.

        Raises:
            FileNotFoundError: the folder, or a shard that its index names, is not there.
            ValueError: there are no safetensors, an index that is none, or a tensor in another dtype.
        """
        self.folder = folder
        self._files = {name: open_tensors(folder / name, "download it again") for name in self._file_names()}
        self.tensors: dict[str, Stored] = {}
        for file, reader in self._files.items():
            for name in reader.keys():  # noqa: SIM118 (it is no mapping)
                header = reader.get_slice(name)
                dtype = header.get_dtype()
                if dtype not in DTYPES:
                    raise ValueError(f"{folder / file}: {name} is stored in {dtype}, can be read: {', '.join(DTYPES)}")
                if name in self.tensors:
                    raise ValueError(f"{name} stands in {self.tensors[name].file} and in {file} of {folder}")
                self.tensors[name] = Stored(tuple(header.get_shape()), dtype, file)

    def read(self, name: str, rows: slice) -> np.ndarray:
        """Some rows of a tensor, in float32."""
        return self._files[self.tensors[name].file].get_slice(name)[rows].astype(np.float32)

    def _file_names(self) -> Sequence[str]:
        folder = self.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        if not (folder / INDEX).is_file():
            if (folder / SINGLE).is_file():
                return [SINGLE]
            others = sorted(path.name for path in folder.iterdir())
            raise ValueError(
                f"{folder} has neither {INDEX} nor {SINGLE}, only {', '.join(others) or 'nothing'}; "
                f"weights in other formats (pickles above all) are not read"
            )
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / INDEX} is no index of shards ({error!r}); download it again") from error
        for file in files:
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX} names {file!r}, which is no safetensors file of this folder")
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file} is missing, but {INDEX} names it; download it again")
        return files


@dataclass(frozen=True)
class Planned:
    """A tensor that is about to be written."""

    name: str
    num_bytes: int
    make: Callable[[], np.ndarray]


def write_shards(folder: Path, tensors: Iterable[Planned], max_shard_bytes: int) -> None:
    """Writes tensors in their order into shards, then the index. Memory holds one shard.

    Args:
        folder: where to.
        tensors: made when their shard is written.
        max_shard_bytes: a shard holds no more, unless one tensor is larger.

    Raises:
        OSError: the disk is full.
    """
    shards: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        if tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    index: Mapping[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(file: Path, shard: Sequence[Planned]) -> None:
    values = {tensor.name: tensor.make() for tensor in shard}
    assert {name: array.nbytes for name, array in values.items()} == {tensor.name: tensor.num_bytes for tensor in shard}
    save_tensors(values, file, metadata={"format": "pt"})  # transformers asks for this word
