"""The row index: which parts of which records stand in which row, a pure function of (seed, epoch).

The order of records is endless: every source is shuffled anew in each pass, and the sources are
mixed by weight; or, without a seed, each is read once a pass in its own order. An epoch is the next
`segments_per_epoch` records of that order, packed into rows. A quarantined record keeps its
place in the order and takes no slots.
"""

import hashlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from data_pipelines.encoded import EncodedSource
from data_pipelines.laid_out import LaidOut
from tml.config import SourceKind, config_hash

SCHEMA_VERSION = 1
# Rows that stay open while an epoch is packed; more rows leave less padding and cost more time.
OPEN_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class RowIndex:
    """The rows of one epoch; row r holds parts row_starts[r] to row_starts[r + 1].

    Attributes:
        row_starts: int64 [R + 1].
        source: which source each part is from (int32 [K]).
        record: its record in that source (int64 [K]).
        part: its number in the source's `PartTable` (int64 [K]).
        slots: positions that it takes (int32 [K]).
    """

    row_starts: np.ndarray
    source: np.ndarray
    record: np.ndarray
    part: np.ndarray
    slots: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the epoch."""
        return len(self.row_starts) - 1


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One source of a mixture: its name, its kind, its weight, its records, and these laid out."""

    name: str
    kind: SourceKind
    weight: float
    records: EncodedSource
    laid_out: LaidOut


def record_order(lengths: Sequence[int], weights: Sequence[float], seed: int | None) -> grain.MapDataset:
    """The endless order of records; element k is a record number, counted through all sources.

    Args:
        seed: of the shuffles; None reads every source in its own order, spread evenly over a pass of all of them,
            whatever the weights: every `sum(lengths)` elements hold each record once.
    """
    if seed is None:
        place_in_pass = np.concatenate([(np.arange(length) + 0.5) / length for length in lengths])
        return grain.MapDataset.source(np.argsort(place_in_pass, kind="stable").tolist()).repeat()
    offsets = np.cumsum([0, *lengths]).tolist()
    passes = [_Passes(length, offsets[i], seed, i) for i, length in enumerate(lengths)]
    return grain.MapDataset.mix([grain.MapDataset.source(each) for each in passes], weights=list(weights))


class _Passes(Sequence[int]):
    """The record numbers of one source, pass after pass without end, each in an order of its own.

    Grain's own shuffle takes 10 ms an element for sources of a few records.
    """

    def __init__(self, length: int, offset: int, seed: int, number: int) -> None:
        self._length, self._offset, self._seed, self._number = length, offset, seed, number
        self._kept: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> int:  # type: ignore[override]
        turn, place = divmod(k, self._length)
        kept = self._kept
        if kept[0] != turn:
            kept = self._kept = (turn, permutation(self._length, f"{self._seed}/{self._number}/{turn}"))
        return self._offset + int(kept[1][place])


def permutation(length: int, key: str) -> np.ndarray:
    """The numbers below `length` in an order that follows from `key` alone, whatever numpy's version (int64).

    They are sorted by a hash: splitmix64, whose steps and constants are those of Steele et al. 2014.
    """
    start = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], "<u8")
    hashed = start + np.arange(length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(hashed ^ (hashed >> np.uint64(31)), kind="stable")


def pack(slots: np.ndarray, row_slots: int) -> np.ndarray:
    """The row of each part: the fullest of the open rows that still holds it, else a new one.

    Args:
        slots: positions of each part, in order (int [K]).

    Returns:
        Row numbers, counted in the order in which rows open (int64 [K]).
    """
    free = np.full(OPEN_ROWS, -1, np.int64)
    row_of_open = np.zeros(OPEN_ROWS, np.int64)
    rows = np.zeros(len(slots), np.int64)
    num_rows = 0
    for k, size in enumerate(slots.tolist()):
        left = free - size
        place = int(np.argmin(np.where(left >= 0, left, row_slots + 1)))
        if left[place] < 0:
            place = int(np.argmin(free))
            free[place], row_of_open[place] = row_slots, num_rows
            num_rows += 1
        free[place] -= size
        rows[k] = row_of_open[place]
    return rows


def build_row_index(order: np.ndarray, sources: Sequence[MixtureSource], row_slots: int) -> RowIndex:
    """Packs the parts of the records in `order` (numbers of `record_order`) into rows."""
    offsets = np.cumsum([0, *(len(source.records) for source in sources)])
    source_of = np.searchsorted(offsets, order, side="right") - 1
    record_of = order - offsets[source_of]
    columns: list[np.ndarray] = []
    for number, source in enumerate(sources):
        parts = source.laid_out.parts
        chosen = np.flatnonzero(source_of == number)
        starts = parts.part_starts[record_of[chosen]]
        counts = parts.part_starts[record_of[chosen] + 1] - starts
        place = np.repeat(chosen, counts)
        part = np.arange(len(place)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        columns.append(np.stack([place, np.full(len(part), number), record_of[place], part, parts.slots[part]]))
    parts_5K = np.concatenate(columns, axis=1)
    parts_5K = parts_5K[:, np.argsort(parts_5K[0], kind="stable")]
    row_K = pack(parts_5K[4], row_slots)
    by_row = np.argsort(row_K, kind="stable")
    _, source, record, part, slots = parts_5K[:, by_row]
    return RowIndex(
        row_starts=np.searchsorted(row_K[by_row], np.arange(int(row_K.max()) + 2)).astype(np.int64),
        source=source.astype(np.int32),
        record=record,
        part=part,
        slots=slots.astype(np.int32),
    )


class RowIndexes:
    """The row indexes of all epochs of one mixture, built when asked for and kept on disk."""

    def __init__(
        self,
        sources: Sequence[MixtureSource],
        *,
        seed: int | None,
        segments_per_epoch: int,
        row_slots: int,
        layout_hash: str,
    ) -> None:
        self._sources, self._row_slots, self._segments_per_epoch = sources, row_slots, segments_per_epoch
        self._order = record_order([len(s.records) for s in sources], [s.weight for s in sources], seed)
        key: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "seed": seed,
            "segments_per_epoch": segments_per_epoch,
            "layout": layout_hash,
            "sources": [
                [s.name, "one pass" if seed is None else s.weight, s.records.manifest.identity, _digest(s.laid_out)]
                for s in sources
            ],
        }
        # The index lies with the first source; its name tells mixtures and seeds apart.
        self.directory = sources[0].records.directory / f"rows-{config_hash(key)}"

    def epoch(self, epoch: int) -> RowIndex:
        """The rows of one epoch; a damaged file of them is made again."""
        path = self.directory / f"epoch-{epoch:06d}.npz"
        if path.is_file():
            try:
                with path.open("rb") as file, np.load(file) as arrays:
                    return RowIndex(**arrays)
            except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
                print(f"{path} is damaged and made again: {error!r}", file=sys.stderr, flush=True)
        first = epoch * self._segments_per_epoch
        order = np.array([self._order[first + k] for k in range(self._segments_per_epoch)], np.int64)
        index = build_row_index(order, self._sources, self._row_slots)
        self.directory.mkdir(exist_ok=True)
        _save(path, vars(index))
        return index


def _digest(laid_out: LaidOut) -> str:
    parts = laid_out.parts
    return hashlib.sha256(parts.part_starts.tobytes() + parts.slots.tobytes()).hexdigest()[:16]


def _save(path: Path, arrays: dict[str, Any]) -> None:
    """Writes an .npz at once or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".npz")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **arrays)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
