"""Parameters into and out of a checkpoint piece by piece, for checkpoints that are larger than memory.

What is written here is read by `tml.checkpoint`, and the other way round: the same folders, checksums
and manifest. It holds no optimizer, so a run can start from it but not go on in it.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from tml.checkpoint import FOLDER, CheckpointError, manifest_of, opened
from tml.checksums import bit_sum_of_part
from tml.config import Experiment

STEP = 0
"""The step of a checkpoint that was not trained here."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring rows of an array.

    Attributes:
        origin: the index of the first row, one number an axis up to that along which the rows follow.
        values: the rows; along later axes they are whole.
    """

    origin: tuple[int, ...]
    values: np.ndarray

    @property
    def index(self) -> tuple[int | slice, ...]:
        """Where it stands in the whole array."""
        return rows_index(self.origin, len(self.values) if self.origin else 1)

    def bit_sum(self, shape: Sequence[int]) -> int:
        """Its part of the checksum of the whole array, which has this shape."""
        first = sum(place * math.prod(shape[axis + 1 :]) for axis, place in enumerate(self.origin))
        return bit_sum_of_part(self.values, first)


@dataclass(frozen=True)
class PiecewiseArray:
    """A float32 array that is made piece by piece.

    Attributes:
        shape: of the whole.
        chunk: the shape in which it is stored; every piece but the last along an axis fills a chunk.
        pieces: makes the pieces anew.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    pieces: Callable[[], Iterator[Piece]]


def write_params(workdir: Path, experiment: Experiment, arrays: Mapping[str, PiecewiseArray]) -> None:
    """Writes a checkpoint of parameters alone, one piece at a time; it exists whole or not at all.

    Args:
        workdir: the run folder, without checkpoints.
        experiment: the config of the parameters.
        arrays: every parameter by its path, as `spec_leaves` names it.
    """
    assert not committed_steps(workdir), f"{workdir} holds checkpoints"
    folder = (workdir / FOLDER).absolute()
    staging = folder / f".{STEP}.new"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    handler = _PiecewiseHandler()
    registry = ocp.type_handlers.create_type_handler_registry((PiecewiseArray, handler))
    stored = {stored_path(path): array for path, array in arrays.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as writer:
        writer.save(staging / "params", args=ocp.args.PyTreeSave(stored))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        manifest = manifest_of(experiment, STEP, handler.checksums)
        writer.save(staging / "manifest", args=ocp.args.JsonSave(manifest))
    staging.rename(folder / str(STEP))


def committed_steps(workdir: Path) -> list[int]:
    """The checkpoints of a folder, which need not be there."""
    if not (workdir / FOLDER).is_dir():
        return []
    with opened(workdir) as checkpoints:
        return checkpoints.steps()


class ParamsReader:
    """Reads the parameters of a checkpoint piece by piece, and checks them when all were read.

    Example:
        >>> reader = ParamsReader(Path("runs/inkling"))
        >>> layer = reader.read("stages/1/0/mlp/gate_up", (3,), 1)[0]
        >>> reader.check()  # raises: other parameters were not read yet
    """

    def __init__(self, workdir: Path, step: int | None = None) -> None:
        """Opens a checkpoint of a run folder, the newest if `step` is None.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        with opened(workdir) as checkpoints:
            self.step = checkpoints.chosen(step)
            self._manifest = checkpoints.manifest(self.step)
            self.experiment = checkpoints.experiment(self.step, self._manifest)
        self._workdir = workdir
        self._folder = (workdir / FOLDER / str(self.step) / "params").absolute()
        self._stores: dict[str, tensorstore.TensorStore] = {}
        self._sums: dict[str, int] = {}

    def read(self, path: str, origin: tuple[int, ...], num_rows: int) -> np.ndarray:
        """Some rows of a parameter: `num_rows` along the last axis of `origin`. Each row must be read once.

        Raises:
            CheckpointError: it cannot be read.
        """
        name = stored_path(path)
        try:
            store = self._open(name)
            values = np.asarray(store[rows_index(origin, num_rows)].read().result())
        except Exception as error:
            raise self._damaged(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
        self._sums[name] = self._sums.get(name, 0) + Piece(origin, values).bit_sum(store.shape)
        return values

    def check(self) -> None:
        """Compares what was read with the checksums.

        Raises:
            CheckpointError: a parameter was not read once as a whole, or is damaged.
        """
        for name, wanted in self._manifest["checksums"].items():
            if name.startswith("params.") and self._sums.get(name, 0) % 2**32 != wanted:
                raise self._damaged(f"the checksum of {name} is wrong")

    def _damaged(self, reason: str) -> CheckpointError:
        with opened(self._workdir) as checkpoints:
            return checkpoints.damaged(self.step, reason)

    def _open(self, name: str) -> tensorstore.TensorStore:
        if name not in self._stores:
            base = {"driver": "file", "path": f"{self._folder}/"}
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            self._stores[name] = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
        return self._stores[name]


def rows_index(origin: Sequence[int], num_rows: int) -> tuple[int | slice, ...]:
    """The index of `num_rows` rows from `origin` on, along its last axis; a number has no rows, and no origin."""
    return (*origin[:-1], *(slice(first, first + num_rows) for first in origin[-1:]))


def stored_path(path: str) -> str:
    """The name of a parameter in a checkpoint's folder and manifest."""
    return f"params.{path.replace('/', '.')}"


class _PiecewiseHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax write PiecewiseArrays as it does numpy's: each piece is made, written and forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.checksums: dict[str, int] = {}

    async def serialize(
        self,
        values: Sequence[PiecewiseArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[Any]:
        """Writes every array and keeps its checksum."""
        for array, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=True,
                global_shape=array.shape,
                local_shape=array.chunk,
                dtype=np.dtype(np.float32),
                process_index=0,
            )
            store = await tensorstore.open(spec, create=True, open=True, context=info.ts_context)
            total = 0
            for piece in array.pieces():
                assert piece.values.dtype == np.float32, f"{info.name} has a piece of {piece.values.dtype}"
                await store[piece.index].write(piece.values)
                total += piece.bit_sum(array.shape)
            self.checksums[str(info.name)] = total % 2**32
        return []
