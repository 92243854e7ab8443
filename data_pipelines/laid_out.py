"""Laid-out sources: every record of a source as positions under one layout, kept beside the encoded records.

`<encoded>/layout-<hash>/` holds the positions of all records one after another, one flat file a field,
and the parts into which records are cut so that each fits in a row. Composing a row is then copying.
"""

import contextlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_pipelines.encoded import EncodedDocument, EncodedSource, Quarantined, check_fraction
from data_pipelines.heard_words import with_heard_words
from data_pipelines.records import RecordError
from tml.config import config_hash
from tml.microturn import EncodedSession, Kind, Layout, Segment, cut_at_turns
from tml.session import SessionError

SCHEMA_VERSION = 2
# [document] and [end of text], which every piece of a document has.
DOCUMENT_MARKERS = 2
_FIELDS: dict[str, type] = {
    "tokens": np.int32,
    "targets": np.int32,
    "kinds": np.uint8,
    "target_kinds": np.uint8,
}


@dataclass(frozen=True, kw_only=True)
class PartTable:
    """The parts of N records under one layout; record r has parts part_starts[r] to part_starts[r + 1].

    Attributes:
        part_starts: int64 [N + 1].
        begin: the first position of each part in the flat fields (int64 [K]).
        slots: positions that the part takes in a row; 0 for a quarantined record (int32 [K]).
        first_frame: the audio frame of the part's first audio position (int32 [K]).
        first_tile: the image tile of its first tile position (int32 [K]).
    """

    part_starts: np.ndarray
    begin: np.ndarray
    slots: np.ndarray
    first_frame: np.ndarray
    first_tile: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LaidOut:
    """A source under one layout: flat fields over all positions, as in `Segment`, and the parts.

    Attributes:
        parts: where each part begins.
        tokens, targets: int32, mapped from disk.
        kinds, target_kinds: uint8, mapped from disk.
        quarantined: the records that cannot be laid out.
    """

    parts: PartTable
    tokens: np.ndarray
    targets: np.ndarray
    kinds: np.ndarray
    target_kinds: np.ndarray
    quarantined: tuple[Quarantined, ...]


def layout_hash(layout: Layout, row_slots: int) -> str:
    """A short hash of everything that decides how records become positions, and where they are cut."""
    return config_hash({"schema": SCHEMA_VERSION, "layout": layout, "row_slots": row_slots})


def segments_of(encoded: EncodedSession | EncodedDocument, layout: Layout, row_slots: int) -> list[Segment]:
    """Lays a record out: a session as one segment, a document as pieces that fit in a row; the first has its tiles.

    Raises:
        SessionError: the session holds more text or tiles than the layout, or a picture does not fit in a row.
    """
    if isinstance(encoded, EncodedSession):
        return [with_heard_words(layout.lay_out(layout.contents(encoded)), encoded, layout.clock)]
    piece, tokens, num_tiles = row_slots - DOCUMENT_MARKERS, encoded.tokens.tolist(), len(encoded.tiles_P)
    if num_tiles + max(layout.slots_beside_tiles(num_tiles), DOCUMENT_MARKERS + 1) > row_slots:
        raise SessionError(f"its picture of {num_tiles} tiles does not fit in a row of data.row_slots = {row_slots}")
    first = layout.lay_out_document(tokens[: piece - num_tiles], num_tiles)
    rest = range(piece - num_tiles, len(tokens), piece)
    return [first, *(layout.lay_out_document(tokens[a : a + piece]) for a in rest)]


def laid_out_directory(source: EncodedSource, layout: Layout, row_slots: int) -> Path:
    """Where a source lies when it is laid out."""
    return source.directory / f"layout-{layout_hash(layout, row_slots)}"


def lay_out_source(
    source: EncodedSource,
    layout: Layout,
    row_slots: int,
    *,
    max_quarantined_fraction: float = 1.0,
    name: str = "",
) -> LaidOut:
    """Lays out every record of a source, unless that is done already; a record that fails gets no positions.

    What is there is made again when a record that failed then can be laid out now.

    Args:
        max_quarantined_fraction: with a larger share of failing records nothing is kept.
        name: of the source, for messages.

    Raises:
        ValueError: what lies there is damaged, or too many records fail.
    """
    directory = laid_out_directory(source, layout, row_slots)
    if not directory.is_dir() or _is_outdated(_open(directory), source, layout, row_slots):
        staging = Path(tempfile.mkdtemp(dir=source.directory, prefix=f".{directory.name}-"))
        try:
            _write(staging, source, layout, row_slots)
            _check(_open(staging), source, max_quarantined_fraction, name)
            if directory.is_dir():
                with tempfile.TemporaryDirectory(dir=source.directory, prefix=f".{directory.name}-") as replaced:
                    directory.rename(f"{replaced}/layout")
                    staging.rename(directory)
            else:
                staging.rename(directory)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if not (isinstance(error, OSError) and directory.is_dir()):  # else another process was faster
                raise
    laid_out = _open(directory)
    _check(laid_out, source, max_quarantined_fraction, name)
    return laid_out


def _is_outdated(laid_out: LaidOut, source: EncodedSource, layout: Layout, row_slots: int) -> bool:
    """Whether a record that could not be laid out can be now."""
    for entry in laid_out.quarantined:
        with contextlib.suppress(RecordError, SessionError):
            _cut(source, entry.index, layout, row_slots)
            return True
    return False


def _check(laid_out: LaidOut, source: EncodedSource, max_fraction: float, name: str) -> None:
    way_out = ""
    if any(entry.index in source.quarantined for entry in laid_out.quarantined):
        way_out = f"mend the data, remove {source.directory} and run launch.encode"
    check_fraction(laid_out.quarantined, len(source), max_fraction, name or str(source.directory), way_out)


def _open(directory: Path) -> LaidOut:
    way_out = f"remove {directory}, it is made again"
    path = directory / "parts.npz"
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            entries = tuple(Quarantined(**entry) for entry in json.loads(str(arrays["quarantined"])))
            parts = PartTable(**{name: arrays[name] for name in PartTable.__dataclass_fields__})
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {way_out}") from error
    total = int(parts.slots.sum())
    fields = {}
    for name, dtype in _FIELDS.items():
        path = directory / f"{name}.bin"
        expected, found = total * np.dtype(dtype).itemsize, path.stat().st_size if path.is_file() else 0
        if found != expected:
            raise ValueError(f"{path} has {found} bytes instead of {expected}; {way_out}")
        fields[name] = np.memmap(path, dtype, "r").view(np.ndarray) if total else np.zeros(0, dtype)
    return LaidOut(parts=parts, **fields, quarantined=entries)


def _write(directory: Path, source: EncodedSource, layout: Layout, row_slots: int) -> None:
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(directory / f"{name}.bin", "wb")) for name in _FIELDS}
        rows, starts, quarantined = _write_fields(files, source, layout, row_slots)
    table_K4 = np.array(rows, np.int64).reshape(-1, 4)
    np.savez(
        directory / "parts.npz",
        part_starts=np.array(starts, np.int64),
        begin=table_K4[:, 0],
        slots=table_K4[:, 1].astype(np.int32),
        first_frame=table_K4[:, 2].astype(np.int32),
        first_tile=table_K4[:, 3].astype(np.int32),
        quarantined=np.array(json.dumps([asdict(entry) for entry in quarantined])),
    )


def _cut(
    source: EncodedSource, index: int, layout: Layout, row_slots: int
) -> list[tuple[Segment, list[tuple[int, int]]]]:
    """The segments of one record, each with its cuts; raises RecordError or SessionError."""
    segments = segments_of(source[index], layout, row_slots)
    return [(segment, cut_at_turns(segment.turn_starts, row_slots)) for segment in segments]


def _write_fields(
    files: Mapping[str, BinaryIO], source: EncodedSource, layout: Layout, row_slots: int
) -> tuple[list[tuple[int, int, int, int]], list[int], list[Quarantined]]:
    """Appends every record's positions to the files; returns the parts, the first part of each record, the failures."""
    rows: list[tuple[int, int, int, int]] = []
    starts, quarantined = [0], []
    place = 0
    for index in range(len(source)):
        try:
            pieces = _cut(source, index, layout, row_slots)
        except (RecordError, SessionError) as error:
            rows.append((place, 0, 0, 0))
            known = source.quarantined.get(index)
            quarantined.append(known or Quarantined.of(index, source.records, error))
        else:
            for segment, cut in pieces:
                rows += parts_of(segment, cut, place)
                place += segment.num_slots
                for name, dtype in _FIELDS.items():
                    files[name].write(getattr(segment, name).astype(dtype).tobytes())
        starts.append(len(rows))
    return rows, starts, quarantined


def parts_of(segment: Segment, cut: Sequence[tuple[int, int]], place: int) -> list[tuple[int, int, int, int]]:
    """The parts of one segment that lies at `place`: first position, slots, first frame, first tile."""
    return [
        (
            place + first,
            last - first,
            int(np.count_nonzero(segment.kinds[:first] == Kind.AUDIO.value)),
            int(np.count_nonzero(segment.kinds[:first] == Kind.TILE.value)),
        )
        for first, last in cut
    ]
