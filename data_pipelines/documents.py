"""Plain text documents as a data set: text files and JSON lines, cut into pieces, one record a piece.

A document may begin with a picture, which its text is about.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgpack

from data_pipelines.record_writer import RecordWriter
from data_pipelines.records import RecordError, RecordKind, RecordSource

SCHEMA_VERSION = 1
DEFAULT_PIECE_CHARS = 8_192
# Where a piece may end, best first: a paragraph, a line, a sentence, a word.
_BREAKS = ("\n\n", "\n", ". ", " ")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One piece of plain text, behind a picture if there is one (PNG or JPEG)."""

    document_id: str
    text: str
    picture: bytes = b""


def encode_document(document: Document) -> bytes:
    """One document as a record."""
    body: dict[str, object] = {"schema": SCHEMA_VERSION, "id": document.document_id, "text": document.text}
    if document.picture:
        body["picture"] = document.picture
    return msgpack.packb(body)


def decode_document(data: bytes) -> Document:
    """Reads what `encode_document` wrote. Raises ValueError when it is something else."""
    try:
        body = msgpack.unpackb(data)
    except (msgpack.UnpackException, ValueError) as error:
        raise ValueError(f"a record of {len(data)} bytes is not msgpack: {error}") from error
    if not isinstance(body, dict) or "schema" not in body:
        raise ValueError(f"a record of {len(data)} bytes is not a document: it has no schema version")
    if body["schema"] != SCHEMA_VERSION:
        raise ValueError(f"the record has schema {body['schema']}, this code reads {SCHEMA_VERSION}")
    kinds = {"id": str, "text": str, "picture": bytes}
    if not all(isinstance(body.get(name, b""), kind) for name, kind in kinds.items()):
        raise ValueError(f"the record does not hold a document of schema {SCHEMA_VERSION}: keys {sorted(body)}")
    return Document(document_id=body["id"], text=body["text"], picture=body.get("picture", b""))


def read_document(source: RecordSource, index: int) -> Document:
    """One document. Raises RecordError when the record cannot be read as a document."""
    data = source[index]
    try:
        return decode_document(data)
    except ValueError as error:
        raise RecordError(*source.place(index), str(error)) from error


def read_texts(paths: Iterable[Path | str]) -> Iterator[Document]:
    """Whole documents from text files (one each) and `.jsonl` files (one a line, `{"text": ...}`), in order.

    Raises:
        FileNotFoundError: a path that is no file.
        ValueError: not UTF-8, or a line that is not a JSON object with a `text`; file and line are named.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
        try:
            if path.suffix == ".jsonl":
                yield from _json_lines(path)
            else:
                yield Document(document_id=path.name, text=path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.reason}") from error


def _json_lines(path: Path) -> Iterator[Document]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f'{path} line {number} is not a JSON object with a "text": {error!r}') from error
            if not isinstance(text, str):
                raise ValueError(f'{path} line {number}: "text" is {type(text).__name__}, but must be a string')
            yield Document(document_id=f"{path.name}:{number}", text=text)


def pieces(document: Document, max_chars: int) -> Iterator[Document]:
    """Cuts a document into pieces of at most `max_chars` characters, at the best break in each one's second half.

    The pieces joined are the document; they are numbered behind its id when there are several. A picture goes with the
    first.
    """
    text, start, cuts = document.text, 0, []
    while len(text) - start > max_chars:
        cuts.append(_cut(text, start, start + max_chars))
        start = cuts[-1]
    starts, ends = [0, *cuts], [*cuts, len(text)]
    for number, (first, last) in enumerate(zip(starts, ends, strict=True)):
        name = f"{document.document_id}#{number}" if cuts else document.document_id
        yield Document(document_id=name, text=text[first:last], picture=b"" if number else document.picture)


def _cut(text: str, start: int, end: int) -> int:
    for mark in _BREAKS:
        place = text.rfind(mark, (start + end) // 2, end)
        if place >= 0:
            return place + len(mark)
    return end


def write_documents(
    directory: Path | str,
    documents: Iterable[Document],
    *,
    name: str,
    num_shards: int = 1,
    max_chars: int = DEFAULT_PIECE_CHARS,
    meta: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> int:
    """Writes documents as a data set, one record a piece, and returns the number of records.

    Example:
        write_documents("data/books", read_texts(Path("books").glob("*.txt")), name="books")

    Raises:
        ValueError: no text at all.
    """
    count = 0
    with RecordWriter(
        directory, kind=RecordKind.DOCUMENTS, name=name, num_shards=num_shards, meta=meta, overwrite=overwrite
    ) as writer:
        for document in documents:
            for piece in pieces(document, max_chars):
                if piece.text.strip():
                    writer.write(encode_document(piece))
                    count += 1
        if not count:
            raise ValueError(f"no text to write to {directory}")
    return count
