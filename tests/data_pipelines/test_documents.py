import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.documents import (
    Document,
    decode_document,
    encode_document,
    pieces,
    read_document,
    read_texts,
    write_documents,
)
from data_pipelines.record_writer import RecordWriter
from data_pipelines.records import RecordError, RecordKind, RecordSource


@given(st.text(alphabet="ab. \n", max_size=300), st.integers(1, 40))
def test_pieces_join_to_the_document(text, max_chars):
    parts = list(pieces(Document(document_id="d", text=text), max_chars))
    assert "".join(part.text for part in parts) == text
    assert all(len(part.text) <= max_chars for part in parts)
    assert len({part.document_id for part in parts}) == len(parts)


def test_a_piece_ends_at_the_best_break():
    text = "one two three. four five\n\nsix seven eight nine"
    assert [p.text for p in pieces(Document(document_id="d", text=text), 30)] == [
        "one two three. four five\n\n",
        "six seven eight nine",
    ]


def test_files_become_records(tmp_path):
    (tmp_path / "a.txt").write_text("first text")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n{"text": "third", "more": 1}\n')
    count = write_documents(tmp_path / "set", read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"]), name="set")
    source = RecordSource(tmp_path / "set")
    assert count == len(source) == 3
    assert [read_document(source, i) for i in range(3)] == [
        Document(document_id="a.txt", text="first text"),
        Document(document_id="b.jsonl:1", text="second"),
        Document(document_id="b.jsonl:3", text="third"),
    ]


def test_bad_input_is_named(tmp_path):
    bad = tmp_path / "bad.jsonl"
    for content, reason in [("{", "line 1"), ('{"text": "a"}\n{"t": 1}', "line 2"), ('{"text": 3}', "is int")]:
        bad.write_text(content)
        with pytest.raises(ValueError, match=reason):
            list(read_texts([bad]))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        list(read_texts([tmp_path / "latin.txt"]))
    with pytest.raises(FileNotFoundError, match="absent"):
        list(read_texts([tmp_path / "absent.txt"]))
    with pytest.raises(ValueError, match="no text"):
        write_documents(tmp_path / "none", [Document(document_id="blank", text=" \n")], name="none")
    assert not (tmp_path / "none").exists()


def test_record_that_is_no_document(tmp_path):
    with pytest.raises(ValueError, match="schema 7"):
        decode_document(encode_document(Document(document_id="a", text="b")).replace(b"schema\x01", b"schema\x07"))
    with RecordWriter(tmp_path / "set", kind=RecordKind.DOCUMENTS, name="set") as writer:
        writer.write(b"\x80")
    with pytest.raises(RecordError, match="no schema version"):
        read_document(RecordSource(tmp_path / "set"), 0)
