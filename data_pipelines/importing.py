"""Turns files of other makers into a data set; a file that cannot be had is listed with its reason, never dropped."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.documents import DEFAULT_PIECE_CHARS, Document, read_texts, write_documents
from data_pipelines.record_writer import UNCOMPRESSED, commit, stage, write_shard
from data_pipelines.records import RecordKind, shard_name
from tml.session import Session, Stream, session_to_bytes

DEFAULT_MAX_FAILED_FRACTION = 0.01
DOCUMENT_SUFFIXES = (".txt", ".jsonl")
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A file that did not become a record, and why."""

    file: str
    reason: str


class FailedFilesError(ValueError):
    """Too many files failed; nothing was written. Holds every one of them."""

    def __init__(self, message: str, failures: Sequence[Failure]) -> None:
        super().__init__(message)
        self.failures = tuple(failures)

    def __reduce__(self) -> tuple:
        return type(self), (self.args[0], self.failures)


@dataclass(kw_only=True)
class ImportSummary:
    """What was written.

    Attributes:
        records: how many.
        audio_s: length of the sessions.
        own_words: words of the model's own.
        user_words: words of the user.
        alignments: sessions by how their words got their times; empty when the source has the times.
        failures: files that did not become records.
        wall_s: time it took.
    """

    records: int = 0
    audio_s: float = 0.0
    own_words: int = 0
    user_words: int = 0
    alignments: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    wall_s: float = 0.0

    def add(self, session: Session) -> None:
        """Counts one session."""
        self.records += 1
        self.audio_s += session.duration_s
        self.own_words += len(session.texts_of(Stream.OWN_TEXT))
        self.user_words += len(session.user_words)
        if "alignment" in session.meta:
            self.alignments.update([session.meta["alignment"]])


def check_failures(failures: Sequence[Failure], total: int, max_failed_fraction: float) -> None:
    """Raises FailedFilesError when more than that fraction of `total` files failed, or when there was no file."""
    if not 0.0 <= max_failed_fraction < 1.0:
        raise ValueError(f"max_failed_fraction = {max_failed_fraction} must be at least 0 and less than 1")
    if not total:
        raise FailedFilesError("there are no files to import", failures)
    if len(failures) > max_failed_fraction * total:
        first = f"{failures[0].file}: {failures[0].reason}"
        raise FailedFilesError(
            f"{len(failures)} of {total} files failed, more than max_failed_fraction {max_failed_fraction} allows; "
            f"mend or remove them, or allow more; the first: {first}",
            failures,
        )


def write_sessions(
    directory: Path | str,
    items: Sequence[Item],
    read: Callable[[Item], Session],
    *,
    file_of: Callable[[Item], str],
    name: str,
    num_shards: int = 1,
    failures: Sequence[Failure] = (),
    max_failed_fraction: float = DEFAULT_MAX_FAILED_FRACTION,
    meta: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> ImportSummary:
    """Writes what `read` makes of each item as a data set of sessions, each shard a run of them.

    Args:
        directory: where the data set goes.
        items: what becomes one session each.
        read: makes the session; a ValueError of its own makes the item a failure.
        file_of: names the file of an item.
        name: of the data set.
        num_shards: files; at most as many as items are written.
        failures: files that failed before, while they were looked for; they count.
        max_failed_fraction: of all files.
        meta: strings about origin, for the manifest, which also gets the failures.
        overwrite: replace what is at `directory`.
        progress: called with the number of items done.

    Raises:
        FailedFilesError: there are no files, or too many failed; nothing is written then.
        ValueError: a count below 1, or something is at `directory` and `overwrite` is False.
    """
    if num_shards < 1:
        raise ValueError(f"num_shards = {num_shards} must be at least 1")
    begun = time.monotonic()
    summary = ImportSummary(failures=list(failures))
    total = len(items) + len(failures)
    if not items:
        check_failures(failures, total, max_failed_fraction)

    def records(first: int, last: int) -> Iterator[bytes]:
        for index in range(first, last):
            try:
                session = read(items[index])
                data = session_to_bytes(session)
            except ValueError as error:
                file = file_of(items[index])
                summary.failures.append(Failure(file=file, reason=str(error).removeprefix(f"{file}: ")))
            else:
                summary.add(session)
                yield data
            progress(index + 1)

    with stage(directory, overwrite=overwrite) as staging:
        num_shards = min(num_shards, len(items))
        bounds = [len(items) * i // num_shards for i in range(num_shards + 1)]
        # Sound is FLAC already: compressing it again only takes time.
        shards = [
            write_shard(staging / shard_name(i, num_shards), records(bounds[i], bounds[i + 1]), options=UNCOMPRESSED)
            for i in range(num_shards)
        ]
        check_failures(summary.failures, total, max_failed_fraction)
        listed = [[failure.file, failure.reason] for failure in summary.failures]
        counted = {"alignments": json.dumps(summary.alignments)} if summary.alignments else {}
        commit(
            staging,
            directory,
            shards,
            kind=RecordKind.SESSIONS,
            name=name,
            meta={**(meta or {}), **counted, "failures": json.dumps(listed, ensure_ascii=False)},
            overwrite=overwrite,
        )
    summary.wall_s = time.monotonic() - begun
    return summary


def import_documents(
    source: Path | str,
    directory: Path | str,
    *,
    name: str,
    num_shards: int = 1,
    max_chars: int = DEFAULT_PIECE_CHARS,
    max_failed_fraction: float = DEFAULT_MAX_FAILED_FRACTION,
    meta: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ImportSummary:
    """Writes the `.txt` and `.jsonl` files under a folder as a data set of documents.

    Raises:
        FailedFilesError: there are no files, or too many failed; nothing is written then.
        ValueError: there is no text in them, or something is at `directory` and `overwrite` is False.
    """

    def read(path: Path) -> list[Document]:
        whole = list(read_texts([path]))
        if not any(document.text.strip() for document in whole):
            raise ValueError("holds no text")
        return whole

    return import_as_documents(
        files_under(source, DOCUMENT_SUFFIXES),
        read,
        directory,
        file_of=str,
        max_failed_fraction=max_failed_fraction,
        progress=progress,
        name=name,
        num_shards=num_shards,
        max_chars=max_chars,
        meta=meta,
        overwrite=overwrite,
    )


def import_as_documents(
    items: Sequence[Item],
    read: Callable[[Item], Sequence[Document]],
    directory: Path | str,
    *,
    file_of: Callable[[Item], str],
    failures: Sequence[Failure] = (),
    max_failed_fraction: float = DEFAULT_MAX_FAILED_FRACTION,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **written: Any,
) -> ImportSummary:
    """Writes what `read` makes of each item as a data set of documents.

    Args:
        items: what becomes documents.
        read: makes them; a ValueError of its own makes the item a failure.
        directory: where the data set goes.
        file_of: names the file of an item.
        failures: files that failed before, while they were looked for; they count.
        max_failed_fraction: of all files.
        progress: called with the items done and their number.
        written: passed on to `write_documents`.

    Raises:
        FailedFilesError: there are no files, or too many failed; nothing is written then.
        ValueError: there is no text in them, or something is at `directory`.
    """
    begun, total = time.monotonic(), len(items) + len(failures)
    summary = ImportSummary(failures=list(failures))
    check_failures(failures, total, max_failed_fraction)

    def documents() -> Iterator[Document]:
        for done, item in enumerate(items, start=1):
            try:
                found = read(item)
            except ValueError as error:
                file = file_of(item)
                reason = str(error).removeprefix(f"{file}: ").removeprefix(f"{file} ")
                summary.failures.append(Failure(file=file, reason=reason))
            else:
                yield from found
            progress(done, len(items))
        check_failures(summary.failures, total, max_failed_fraction)

    summary.records = write_documents(directory, documents(), **written)
    summary.wall_s = time.monotonic() - begun
    return summary


def files_under(source: Path | str, suffixes: Iterable[str]) -> list[Path]:
    """Every file in a folder and the folders in it that ends so (in either case), ordered by path.

    Raises:
        ValueError: there is no such folder.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder")
    wanted = {suffix.lower() for suffix in suffixes}
    return sorted(path for path in source.rglob("*") if path.suffix.lower() in wanted and path.is_file())


def sample_at(time_s: float, sample_rate_hz: int) -> int:
    """The sample at a time.

    Raises:
        ValueError: the time is not finite.
    """
    if not math.isfinite(time_s):
        raise ValueError(f"the time {time_s} is not finite")
    return round(time_s * sample_rate_hz)
