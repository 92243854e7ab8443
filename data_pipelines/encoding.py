"""Encodes a whole data set over worker processes; the result is the same for any number of them."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.documents import read_document
from data_pipelines.encoded import (
    QUARANTINE_NAME,
    EncodedDocument,
    EncodedSource,
    Header,
    Quarantined,
    check_fraction,
    codec_header,
    encoded_directory,
    pack_document,
    pack_header,
    pack_session,
    pack_stub,
    write_quarantine,
)
from data_pipelines.record_writer import UNCOMPRESSED, commit, stage, write_shard
from data_pipelines.records import (
    MANIFEST_NAME,
    RecordError,
    RecordKind,
    RecordSource,
    Shard,
    faults,
    read_manifest,
    read_session,
    shard_name,
)
from data_pipelines.worker_process import end_with_parent
from tml.codec.encode import encode_session
from tml.codec.text import Tokenizer
from tml.codec.video import picture_tiles
from tml.config import ModelConfig
from tml.session import Stream

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard to write: a range of the source's records, and where they go."""

    path: Path
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """Writes one shard of encoded records at a time; it is sent to every worker once."""

    source: RecordSource
    header: Header
    model: ModelConfig
    tokenizer: Tokenizer

    def write(self, job: _Job) -> tuple[Shard, list[Quarantined]]:
        """Encodes one range of records; what cannot be encoded becomes a stub."""
        quarantined: list[Quarantined] = []
        shard = write_shard(job.path, self._records(job, quarantined), options=UNCOMPRESSED)
        return shard, quarantined

    def _records(self, job: _Job, quarantined: list[Quarantined]) -> Iterator[bytes]:
        header = pack_header(self.header)
        for index in range(job.first, job.last):
            try:
                yield self._encoded(index, header)
            except (ValueError, RuntimeError, OSError) as error:
                quarantined.append(Quarantined.of(index, self.source, error))
                yield pack_stub(quarantined[-1], header)

    def _encoded(self, index: int, header: bytes) -> bytes:
        if self.source.manifest.kind is RecordKind.SESSIONS:
            return pack_session(encode_session(read_session(self.source, index), self.model, self.tokenizer), header)
        document = read_document(self.source, index)
        encoded = EncodedDocument(
            document_id=document.document_id,
            tokens=np.array(self.tokenizer.encode(document.text), np.int32),
            tiles_P=picture_tiles(document.picture, self.model.video),
        )
        return pack_document(encoded, header)


def encode_dataset(
    source: Path | str,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    max_quarantined_fraction: float,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> EncodedSource:
    """Encodes a data set of sessions or documents, unless that is done already.

    Args:
        source: the data set's directory; the encoded records go below it.
        num_workers: processes; with 1 the work is done in this one.
        progress: called with the records done and their number, after every shard.

    Raises:
        FileNotFoundError: no data set there.
        ValueError: it holds something else, or too many of its records cannot be encoded.
    """
    kind = read_manifest(source).kind
    if kind is RecordKind.ENCODED:
        raise ValueError(f"{source} is encoded already; name the data set that it was made from")
    header = codec_header(kind, model, tokenizer.fingerprint())
    directory = encoded_directory(source, header)
    if is_complete(directory):
        return EncodedSource(directory, header)
    records = RecordSource(source)
    with stage(directory, overwrite=True) as staging:
        encoder = _Encoder(source=records, header=header, model=model, tokenizer=tokenizer)
        shards, quarantined = _write_all(encoder, staging, num_workers, progress)
        check_fraction(quarantined, len(records), max_quarantined_fraction, str(source))
        write_quarantine(staging, quarantined)
        meta = {"header": json.dumps(header), "num_quarantined": str(len(quarantined))}
        name = f"{records.manifest.name}, encoded"
        commit(staging, directory, shards, kind=RecordKind.ENCODED, name=name, meta=meta, overwrite=True)
    return EncodedSource(directory, header)


def records_per_shard(num_records: int) -> int:
    """Records of one encoded shard: about 64 shards, so that workers share the work, but no tiny or huge ones."""
    return min(max(64, -(-num_records // 64)), 4_096)


def texts_of(source: Path | str) -> Iterator[str]:
    """All text of a data set of sessions or documents, as it is given to the tokenizer: words with a space before.

    Records that cannot be read are left out; encoding quarantines them.
    """
    records = RecordSource(source)
    for index in range(len(records)):
        try:
            if records.manifest.kind is RecordKind.DOCUMENTS:
                yield read_document(records, index).text
                continue
            session = read_session(records, index)
        except RecordError:
            continue
        for event in session.texts:
            yield f" {event.text.strip()}" if event.stream is Stream.OWN_TEXT else event.text
        for word in session.user_words:
            yield f" {word.text.strip().lower()}"


def is_complete(directory: Path) -> bool:
    """Whether encoded records are there, with every file that the manifest lists and shards of the sizes it states."""
    if not (directory / MANIFEST_NAME).is_file() or faults(directory):
        return False
    return all((directory / name).is_file() for name in (QUARANTINE_NAME, *read_manifest(directory).attachments))


def _write_all(
    encoder: _Encoder, staging: Path, num_workers: int, progress: Progress | None
) -> tuple[list[Shard], list[Quarantined]]:
    total = len(encoder.source)
    size = records_per_shard(total)
    firsts = range(0, max(total, 1), size)
    jobs = [
        _Job(path=staging / shard_name(i, len(firsts)), first=first, last=min(first + size, total))
        for i, first in enumerate(firsts)
    ]
    shards: list[Shard] = []
    quarantined: list[Quarantined] = []
    for job, (shard, entries) in zip(jobs, _results(encoder, jobs, num_workers), strict=True):
        shards.append(shard)
        quarantined += entries
        if progress is not None:
            progress(job.last, total)
    return shards, quarantined


def _results(encoder: _Encoder, jobs: list[_Job], num_workers: int) -> Iterable[tuple[Shard, list[Quarantined]]]:
    if min(num_workers, len(jobs)) <= 1:
        yield from map(encoder.write, jobs)
        return
    pool = ProcessPoolExecutor(
        min(num_workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder, os.getpid()),
    )
    try:
        yield from pool.map(_write_in_worker, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


# What a worker process was started with; empty in every other process.
_worker_encoder: list[_Encoder] = []


def _start_worker(encoder: _Encoder, parent: int) -> None:
    end_with_parent(parent)
    _worker_encoder.append(encoder)


def _write_in_worker(job: _Job) -> tuple[Shard, list[Quarantined]]:
    return _worker_encoder[0].write(job)
