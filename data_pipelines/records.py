"""Data sets on disk: a directory of ArrayRecord shards and the manifest that says what they must hold.

    prompts/
      dataset.json                          the manifest, written last
      shard-00000-of-00002.array_record
      shard-00001-of-00002.array_record

The manifest's counts, sizes and digests are the truth: array_record's own reader says that a
truncated file holds 0 records. `record_writer` writes them.
"""

import bisect
import enum
import hashlib
import itertools
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from array_record.python import array_record_module

from tml.session import Session, SessionError, session_from_bytes

SCHEMA_VERSION = 1
MANIFEST_NAME = "dataset.json"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class RecordKind(enum.StrEnum):
    """What the records of a data set are."""

    SESSIONS = "sessions"
    DOCUMENTS = "documents"
    ENCODED = "encoded"


class RecordError(ValueError):
    """A record that cannot be read, with the file, its index in that file, and the reason."""

    def __init__(self, file: str, record: int, reason: str) -> None:
        super().__init__(f"{file}, record {record}: {reason}")
        self.file, self.record, self.reason = file, record, reason

    def __reduce__(self) -> tuple:
        return type(self), (self.file, self.record, self.reason)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one file of a data set must hold."""

    file: str
    num_records: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set is.

    Attributes:
        kind: what its records are.
        name: for people.
        shards: its files of records, in order.
        meta: strings about origin: licence, generator, seed.
        attachments: paths of the other files that were written with it.
    """

    kind: RecordKind
    name: str
    shards: tuple[Shard, ...]
    meta: Mapping[str, str] = field(default_factory=dict)
    attachments: tuple[str, ...] = ()

    @property
    def num_records(self) -> int:
        """Records of all shards."""
        return sum(shard.num_records for shard in self.shards)

    @property
    def identity(self) -> str:
        """A short hash of everything the shards hold: equal contents in equal order, equal identity."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()[:16]


def read_manifest(directory: Path | str) -> Manifest:
    """Reads `dataset.json`.

    Raises:
        FileNotFoundError: no data set there.
        ValueError: not a manifest of this schema.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not a data set: it has no {MANIFEST_NAME}; prepare it first")
    try:
        body = json.loads(path.read_text())
        version = body.pop("schema")
        if version == SCHEMA_VERSION:
            shards = tuple(Shard(**shard) for shard in body.pop("shards"))
            kind, attachments = RecordKind(body.pop("kind")), tuple(body.pop("attachments", ()))
            return Manifest(**body, kind=kind, shards=shards, attachments=attachments)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a data set manifest: {error!r}") from error
    raise ValueError(f"{path} has schema {version}, this code reads {SCHEMA_VERSION}; prepare the data again")


def shard_name(index: int, num_shards: int) -> str:
    """The file name of one shard."""
    return f"shard-{index:05d}-of-{num_shards:05d}.array_record"


class RecordSource:
    """Random access to the records of a data set, shard after shard; any number of threads may read.

    `len(source)` is the manifest's count. A shard that is missing, or not of the size that the
    manifest states, makes each of its records a RecordError, never fewer records.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self._ends = list(itertools.accumulate(shard.num_records for shard in self.manifest.shards))
        self._readers: dict[int, array_record_module.ArrayRecordReader | str] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), (self.directory,)

    def __len__(self) -> int:
        return self.manifest.num_records

    def place(self, index: int) -> tuple[str, int]:
        """The file of record `index` and its index in that file."""
        shard = bisect.bisect_right(self._ends, index)
        return self.manifest.shards[shard].file, index - (self._ends[shard - 1] if shard else 0)

    def __getitem__(self, index: int) -> bytes:
        """The bytes of one record.

        Raises:
            RecordError: the record or its shard cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.directory}")
        shard = bisect.bisect_right(self._ends, index)
        file, record = self.place(index)
        reader = self._readers.get(shard) or self._open(shard)
        if isinstance(reader, str):
            raise RecordError(file, record, reader)
        try:
            return reader.read([record])[0]
        except Exception as error:  # array_record raises RuntimeError and IndexError of its own making
            raise RecordError(file, record, f"unreadable: {str(error).splitlines()[0]}") from error

    def _open(self, shard: int) -> array_record_module.ArrayRecordReader | str:
        """The reader of a shard, or what is wrong with its file."""
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = _reader_or_fault(self.directory, self.manifest.shards[shard])
            return self._readers[shard]


def _reader_or_fault(directory: Path, shard: Shard) -> array_record_module.ArrayRecordReader | str:
    path = directory / shard.file
    if not path.is_file():
        return "the shard is missing"
    num_bytes = path.stat().st_size
    if num_bytes != shard.num_bytes:
        return f"the shard has {num_bytes} bytes, the manifest says {shard.num_bytes}"
    try:
        reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS, file_reader_buffer_size=65_536)
        num_records = reader.num_records()
    except Exception as error:  # array_record raises RuntimeError and ValueError of its own making
        return f"the shard cannot be opened: {str(error).splitlines()[0]}"
    if num_records != shard.num_records:
        return f"the shard holds {num_records} records, the manifest says {shard.num_records}"
    return reader


def faults(directory: Path | str) -> dict[str, str]:
    """What is wrong with each shard that cannot be read as the manifest states; empty when all is well.

    Raises:
        FileNotFoundError: no data set there.
    """
    directory = Path(directory)
    found = {shard.file: _reader_or_fault(directory, shard) for shard in read_manifest(directory).shards}
    return {file: fault for file, fault in found.items() if isinstance(fault, str)}


def iter_sessions(directory: Path | str) -> Iterator[Session]:
    """Every session of a data set, in order.

    Raises:
        ValueError: the data set holds something else.
        RecordError: a record cannot be read as a session.
    """
    source = RecordSource(directory)
    if source.manifest.kind is not RecordKind.SESSIONS:
        raise ValueError(f"{directory} holds {source.manifest.kind.value}, not sessions")
    for index in range(len(source)):
        yield read_session(source, index)


def read_session(source: RecordSource, index: int) -> Session:
    """One session. Raises RecordError when the record cannot be read as a session."""
    data = source[index]
    try:
        return session_from_bytes(data)
    except SessionError as error:
        raise RecordError(*source.place(index), str(error)) from error
