"""Encoded records: a data set after its codecs, kept beside it, so that every later epoch only copies bytes.

`<source>/encoded-<hash>/` is a data set of kind `encoded` whose record i comes from record i of the
source. A record that cannot be encoded keeps its place as a stub and is listed, with file, record
and reason, in `quarantine.jsonl`. Every record begins with the header of the codecs that made it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from data_pipelines.records import Manifest, RecordError, RecordKind, RecordSource, read_manifest
from tml.config import ModelConfig
from tml.microturn import EncodedSession, EncodedText
from tml.session import Stream

SCHEMA_VERSION = 3
QUARANTINE_NAME = "quarantine.jsonl"
OWN_SOUND = (
    "frames_per_position", "num_mels", "window_samples", "log_floor", "log_mean", "log_deviation", "audible_log",
)  # fmt: skip
"""What decides the values of own sound; the first alone decides that there are none."""
_STREAMS = tuple(Stream)
_STREAM_NUMBER = {stream: number for number, stream in enumerate(_STREAMS)}

Header = dict[str, str | int | float]


class HeaderError(ValueError):
    """Encoded records that were made with other codecs than this run's."""


@dataclass(frozen=True, kw_only=True)
class EncodedDocument:
    """A plain text after the tokenizer (int32 [S]), and the tiles of its picture (int16 [P, t, h, w, 3])."""

    document_id: str
    tokens: np.ndarray
    tiles_P: np.ndarray


class Media(NamedTuple):
    """The sound and the pictures of an encoded session, as in `EncodedSession`, or the picture of a document."""

    levels_TM: np.ndarray
    tiles_P: np.ndarray
    own_mels_TY: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """One record that cannot be used: its index in the data set, its file, its index there, and the reason."""

    index: int
    file: str
    record: int
    reason: str

    @classmethod
    def of(cls, index: int, source: RecordSource, error: Exception) -> "Quarantined":
        """What to say about record `index` of `source` after `error`."""
        if isinstance(error, RecordError):
            return cls(index=index, file=error.file, record=error.record, reason=error.reason)
        file, record = source.place(index)
        first_line = str(error).splitlines()[0] if str(error) else ""
        return cls(index=index, file=file, record=record, reason=f"{type(error).__name__}: {first_line}")


def codec_header(kind: RecordKind, model: ModelConfig, tokenizer_fingerprint: str) -> Header:
    """What determines encoded values: level range, floor, rates, levels, tiles, own sound and tokenizer."""
    header: Header = {"schema": SCHEMA_VERSION, "kind": kind.value, "tokenizer": tokenizer_fingerprint}
    seen = ("tile_px", "frames_per_tile", "frames_per_second", "max_tiles_per_turn")
    header |= {f"video.{name}": getattr(model.video, name) for name in seen}
    if kind is RecordKind.DOCUMENTS:
        return header
    header |= {f"audio.{name}": value for name, value in asdict(model.audio).items()}
    for name in OWN_SOUND if model.has_voice else OWN_SOUND[:1]:
        header[f"audio_out.{name}"] = getattr(model.audio_out, name)
    return header


def check_header(found: Mapping[str, Any], expected: Header, where: str) -> None:
    """Raises HeaderError, with both values, when encoded records were made with other codecs."""
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise HeaderError(
                f"{where} was encoded with {name} = {found.get(name)}, this run has {expected.get(name)}; "
                f"run launch.encode with this run's config"
            )


def encoded_directory(source: Path | str, header: Header) -> Path:
    """Where the encoded records of a data set with these codecs lie. Raises FileNotFoundError without a data set."""
    identity = read_manifest(source).identity
    text = json.dumps([identity, header], sort_keys=True)
    return Path(source) / f"encoded-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def pack_header(header: Header) -> bytes:
    """The header as every record carries it."""
    return msgpack.packb(header)


def pack_session(encoded: EncodedSession, header: bytes) -> bytes:
    """One encoded session as a record: a msgpack map of small values and packed arrays."""
    tokens = [event.tokens for event in encoded.texts]
    return msgpack.packb(
        {
            "header": header,
            "id": encoded.session_id,
            "num_samples": encoded.num_samples,
            "levels": _packed(encoded.levels_TM, np.uint8),
            "streams": [_STREAM_NUMBER[event.stream] for event in encoded.texts],
            "starts": [event.start for event in encoded.texts],
            "tokens": tokens,
            "tiles": _packed(encoded.tiles_P, np.int16),
            "tile_samples": _packed(encoded.tile_samples_P, np.int64),
            "own_mels": None if encoded.own_mels_TY is None else _packed(encoded.own_mels_TY, np.float16),
            "own_audible": None if encoded.own_audible_T is None else _packed(encoded.own_audible_T, np.bool_),
        }
    )


def pack_document(document: EncodedDocument, header: bytes) -> bytes:
    """One encoded document as a record."""
    tokens, tiles = _packed(document.tokens, np.int32), _packed(document.tiles_P, np.int16)
    return msgpack.packb({"header": header, "id": document.document_id, "document": tokens, "tiles": tiles})


def pack_stub(entry: Quarantined, header: bytes) -> bytes:
    """The record that keeps the place of one that could not be encoded."""
    return msgpack.packb({"header": header, "quarantined": entry.reason})


def _packed(array: np.ndarray, dtype: type) -> tuple[Sequence[int], bytes]:
    assert np.can_cast(array.dtype, dtype) or array.size == 0, f"{array.dtype} does not fit {dtype}"
    return list(array.shape), np.ascontiguousarray(array, dtype).tobytes()


def _unpacked(value: tuple[Sequence[int], bytes], dtype: type) -> np.ndarray:
    shape, data = value
    return np.frombuffer(data, dtype).reshape(shape)


def _session_of(body: dict[str, Any]) -> EncodedSession:
    streams = (_STREAMS[number] for number in body["streams"])
    texts = tuple(map(EncodedText._make, zip(streams, body["starts"], body["tokens"], strict=True)))
    return EncodedSession(
        session_id=body["id"],
        num_samples=body["num_samples"],
        levels_TM=_unpacked(body["levels"], np.uint8),
        texts=texts,
        tiles_P=_unpacked(body["tiles"], np.int16),
        tile_samples_P=_unpacked(body["tile_samples"], np.int64),
        own_mels_TY=None if body["own_mels"] is None else _unpacked(body["own_mels"], np.float16),
        own_audible_T=None if body["own_audible"] is None else _unpacked(body["own_audible"], np.bool_),
    )


class EncodedSource:
    """Random access to encoded records, from any number of threads.

    Attributes:
        quarantined: records that could not be encoded, by index.
    """

    def __init__(self, directory: Path | str, header: Header) -> None:
        """Opens the encoded records of one data set.

        Raises:
            FileNotFoundError: not encoded yet.
            HeaderError: encoded with other codecs.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is absent: these records are not encoded; run launch.encode first")
        self.records = RecordSource(directory)
        if self.manifest.kind is not RecordKind.ENCODED:
            raise ValueError(f"{directory} holds {self.manifest.kind.value}, not encoded records")
        check_header(json.loads(self.manifest.meta["header"]), header, str(directory))
        self.header, self._packed_header = header, pack_header(header)
        self.quarantined = {entry.index: entry for entry in read_quarantine(directory)}
        promised = int(self.manifest.meta["num_quarantined"])
        if len(self.quarantined) != promised:
            raise ValueError(
                f"{directory / QUARANTINE_NAME} lists {len(self.quarantined)} records, the manifest says {promised}"
            )

    @property
    def manifest(self) -> Manifest:
        """What the encoded data set is."""
        return self.records.manifest

    @property
    def directory(self) -> Path:
        """Where the encoded records lie."""
        return self.records.directory

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EncodedSession | EncodedDocument:
        """One encoded record.

        Raises:
            RecordError: it cannot be read, or it is the stub of a quarantined record.
            HeaderError: it was made with other codecs.
        """
        body = self._body(index, self.records[index])
        try:
            if "document" in body:
                tokens, tiles_P = _unpacked(body["document"], np.int32), _unpacked(body["tiles"], np.int16)
                return EncodedDocument(document_id=body["id"], tokens=tokens, tiles_P=tiles_P)
            return _session_of(body)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._malformed(index, error) from error

    def media(self, index: int, data: bytes) -> Media:
        """The sound and the pictures in the bytes of record `index`; raises as reading it whole does."""
        body = self._body(index, data)
        try:
            if "document" in body:
                return Media(np.zeros((0, 0), np.uint8), _unpacked(body["tiles"], np.int16), None)
            own_mels = body["own_mels"]
            return Media(
                levels_TM=_unpacked(body["levels"], np.uint8),
                tiles_P=_unpacked(body["tiles"], np.int16),
                own_mels_TY=None if own_mels is None else _unpacked(own_mels, np.float16),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._malformed(index, error) from error

    def _body(self, index: int, data: bytes) -> dict[str, Any]:
        place = self.records.place(index)
        try:
            body = msgpack.unpackb(data, use_list=False)
            header = body["header"]
        except (msgpack.UnpackException, ValueError, KeyError, TypeError) as error:
            raise self._malformed(index, error) from error
        if header != self._packed_header:
            check_header(msgpack.unpackb(header), self.header, f"{self.directory / place[0]}, record {place[1]},")
        if "quarantined" in body:
            raise RecordError(*place, f"quarantined when it was encoded: {body['quarantined']}")
        return body

    def _malformed(self, index: int, error: Exception) -> RecordError:
        reason = f"not an encoded record of schema {SCHEMA_VERSION}: {repr(error)[:200]}"
        return RecordError(*self.records.place(index), reason)


def read_quarantine(directory: Path | str) -> list[Quarantined]:
    """The records of a data set that could not be encoded, in order."""
    with open(Path(directory) / QUARANTINE_NAME) as file:
        return [Quarantined(**json.loads(line)) for line in file]


def write_quarantine(directory: Path, entries: list[Quarantined]) -> None:
    """Writes `quarantine.jsonl`, one record a line."""
    lines = [json.dumps(asdict(entry)) + "\n" for entry in entries]
    (directory / QUARANTINE_NAME).write_text("".join(lines))


def check_fraction(
    entries: Sequence[Quarantined], num_records: int, max_fraction: float, name: str, way_out: str = ""
) -> None:
    """Raises ValueError, ending with `way_out`, when more than `max_fraction` of the records are quarantined."""
    if len(entries) <= max_fraction * num_records:
        return
    first = entries[0]
    raise ValueError(
        f"{name}: {len(entries)} of {num_records} records are unreadable, more than "
        f"data.max_quarantined_fraction = {max_fraction}; the first is {first.file}, record {first.record}: "
        f"{first.reason}{way_out and f'; {way_out}'}"
    )
