"""The row index: which parts of which records stand in which row, a pure function of (seed, epoch).

The order of records is endless: every source is shuffled anew in each pass, and the sources are
mixed by weight. An epoch is the next `segments_per_epoch` records of that order, packed into rows.
A quarantined record keeps its place in the order and takes no slots.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from data_pipelines.encoded import EncodedDocument, EncodedSource, Quarantined
from data_pipelines.records import RecordError
from tml.config import config_hash
from tml.microturn import EncodedSession, Layout, Segment, cut_at_turns
from tml.session import SessionError

SCHEMA_VERSION = 1
# Rows that stay open while an epoch is packed; more rows leave less padding and cost more time.
OPEN_ROWS = 64
# [document] and [end of text], which every piece of a document has.
DOCUMENT_MARKERS = 2


@dataclass(frozen=True, kw_only=True)
class PartTable:
    """The parts of N records under one layout; part k belongs to the record whose range of parts holds k.

    Attributes:
        part_starts: the first part of each record, and the end (int64 [N + 1]).
        first: first position of each part; for documents, the first token (int32 [K]).
        last: one past the last (int32 [K]).
        slots: positions that the part takes in a row; 0 for a quarantined record (int32 [K]).
        quarantined: the records that cannot be laid out.
    """

    part_starts: np.ndarray
    first: np.ndarray
    last: np.ndarray
    slots: np.ndarray
    quarantined: tuple[Quarantined, ...]


@dataclass(frozen=True, kw_only=True)
class RowIndex:
    """The rows of one epoch; row r holds parts row_starts[r] to row_starts[r + 1].

    Attributes:
        row_starts: int64 [R + 1].
        source: which source each part is from (int32 [K]).
        record: its record in that source (int64 [K]).
        first, last, slots: as in `PartTable` (int32 [K]).
    """

    row_starts: np.ndarray
    source: np.ndarray
    record: np.ndarray
    first: np.ndarray
    last: np.ndarray
    slots: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the epoch."""
        return len(self.row_starts) - 1


@dataclass(frozen=True, kw_only=True)
class MixtureSource:
    """One source of a mixture: its name, its weight, its records, and their parts."""

    name: str
    weight: float
    records: EncodedSource
    parts: PartTable


def layout_hash(layout: Layout, row_slots: int) -> str:
    """A short hash of everything that decides how records become positions, and where they are cut."""
    return config_hash({"schema": SCHEMA_VERSION, "layout": layout, "row_slots": row_slots})


def segment_of(encoded: EncodedSession | EncodedDocument, first: int, last: int, layout: Layout) -> Segment:
    """Lays out one part of a record; `first` and `last` are tokens of a document, ignored for a session."""
    if isinstance(encoded, EncodedDocument):
        return layout.lay_out_document(encoded.tokens[first:last].tolist())
    return layout.lay_out(layout.contents(encoded))


def parts_of(encoded: EncodedSession | EncodedDocument, layout: Layout, row_slots: int) -> list[tuple[int, int, int]]:
    """Cuts a record into parts of at most `row_slots` positions, as (first, last, slots).

    Raises:
        SessionError: it cannot be laid out, or one micro-turn alone is longer than a row.
    """
    if isinstance(encoded, EncodedDocument):
        piece, size = row_slots - DOCUMENT_MARKERS, len(encoded.tokens)
        firsts = range(0, max(size, 1), piece)
        return [(a, min(a + piece, size), min(piece, size - a) + DOCUMENT_MARKERS) for a in firsts]
    segment = segment_of(encoded, 0, 0, layout)
    return [(first, last, last - first) for first, last in cut_at_turns(segment.turn_starts, row_slots)]


def part_table(source: EncodedSource, layout: Layout, row_slots: int) -> PartTable:
    """The parts of every record, read once per layout and kept beside the encoded records."""
    path = source.directory / f"parts-{layout_hash(layout, row_slots)}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            entries = tuple(Quarantined(**entry) for entry in json.loads(str(arrays["quarantined"])))
            columns = {name: arrays[name] for name in ("part_starts", "first", "last", "slots")}
            return PartTable(**columns, quarantined=entries)
    quarantined: list[Quarantined] = []
    rows: list[tuple[int, int, int]] = []
    starts = [0]
    for index in range(len(source)):
        try:
            rows += parts_of(source[index], layout, row_slots)
        except (RecordError, SessionError) as error:
            rows.append((0, 0, 0))
            known = source.quarantined.get(index)
            quarantined.append(known or Quarantined.of(index, source.records, error))
        starts.append(len(rows))
    columns_K3 = np.array(rows, np.int32).reshape(-1, 3)
    table = PartTable(
        part_starts=np.array(starts, np.int64),
        first=columns_K3[:, 0],
        last=columns_K3[:, 1],
        slots=columns_K3[:, 2],
        quarantined=tuple(quarantined),
    )
    entries_json = json.dumps([asdict(entry) for entry in quarantined])
    _save(path, {**vars(table), "quarantined": np.array(entries_json)})
    return table


def record_order(lengths: Sequence[int], weights: Sequence[float], seed: int | None) -> grain.MapDataset:
    """The endless order of records; element k is a record number, counted through all sources.

    Args:
        seed: of the shuffles; None reads every source in its own order.
    """
    parents = []
    offset = 0
    for number, length in enumerate(lengths):
        parent = grain.MapDataset.range(offset, offset + length)
        if seed is not None:
            parent = parent.shuffle(seed=_source_seed(seed, number))
        parents.append(parent.repeat())
        offset += length
    return grain.MapDataset.mix(parents, weights=list(weights))


def _source_seed(seed: int, number: int) -> int:
    # Grain adds the pass to the seed, so neighbouring seeds would share passes.
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "little")


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
        chosen = np.flatnonzero(source_of == number)
        starts, ends = source.parts.part_starts[record_of[chosen]], source.parts.part_starts[record_of[chosen] + 1]
        counts = ends - starts
        place = np.repeat(chosen, counts)
        rank = np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        part = np.repeat(starts, counts) + rank
        fields = (source.parts.first[part], source.parts.last[part], source.parts.slots[part])
        columns.append(np.stack([place, rank, np.full(len(part), number), record_of[place], *fields], axis=1))
    parts_K7 = np.concatenate(columns)
    parts_K7 = parts_K7[np.lexsort((parts_K7[:, 1], parts_K7[:, 0]))]
    row_K = pack(parts_K7[:, 6], row_slots)
    by_row = np.argsort(row_K, kind="stable")
    parts_K7 = parts_K7[by_row]
    num_rows = int(row_K.max()) + 1
    return RowIndex(
        row_starts=np.searchsorted(row_K[by_row], np.arange(num_rows + 1)).astype(np.int64),
        source=parts_K7[:, 2].astype(np.int32),
        record=parts_K7[:, 3].astype(np.int64),
        first=parts_K7[:, 4].astype(np.int32),
        last=parts_K7[:, 5].astype(np.int32),
        slots=parts_K7[:, 6].astype(np.int32),
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
            "sources": [[s.name, s.weight, s.records.manifest.identity, _digest(s.parts)] for s in sources],
        }
        # The index lies with the first source; its name tells mixtures and seeds apart.
        self.directory = sources[0].records.directory / f"rows-{config_hash(key)}"

    def epoch(self, epoch: int) -> RowIndex:
        """The rows of one epoch."""
        path = self.directory / f"epoch-{epoch:06d}.npz"
        if path.is_file():
            with np.load(path) as arrays:
                return RowIndex(**arrays)
        first = epoch * self._segments_per_epoch
        order = np.array([self._order[first + k] for k in range(self._segments_per_epoch)], np.int64)
        index = build_row_index(order, self._sources, self._row_slots)
        self.directory.mkdir(exist_ok=True)
        _save(path, vars(index))
        return index


def _digest(parts: PartTable) -> str:
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in (parts.part_starts, parts.slots))
    return hashlib.sha256(data).hexdigest()[:16]


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
