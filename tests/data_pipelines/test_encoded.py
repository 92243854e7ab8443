import json
import os
import shutil
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from small_sets import make_session

from data_pipelines.documents import Document, write_documents
from data_pipelines.encoded import (
    QUARANTINE_NAME,
    EncodedDocument,
    EncodedSource,
    HeaderError,
    codec_header,
    encoded_directory,
)
from data_pipelines.encoding import encode_dataset
from data_pipelines.record_writer import RecordWriter, SessionWriter
from data_pipelines.records import RecordError, RecordKind, RecordSource, read_manifest, shard_name
from tml.codec.encode import encode_session
from tml.config import AudioConfig, ModelConfig, VideoConfig
from tml.session import Stream, session_to_bytes

MODEL = ModelConfig()


def write_sessions(directory, count=9, broken=()):
    """Session records; those in `broken` promise a stream that they do not hold."""
    with RecordWriter(directory, kind=RecordKind.SESSIONS, name="set", num_shards=2) as writer:
        for number in range(count):
            data = session_to_bytes(make_session(number, (0.3, 0.6)))
            if number in broken:
                body = msgpack.unpackb(data)
                body["streams"].append(Stream.ACTION.value)
                data = msgpack.packb(body)
            writer.write(data)
    return directory


def encode(directory, tokenizer, **kwargs):
    return encode_dataset(directory, MODEL, tokenizer, **{"max_quarantined_fraction": 0.0, **kwargs})


def assert_same(left, right):
    for name, value in vars(left).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(right, name))
        else:
            assert value == getattr(right, name), name


def test_records_are_what_the_codecs_give(tmp_path, tokenizer):
    source = encode(write_sessions(tmp_path / "set"), tokenizer)
    order = [*range(0, 9, 2), *range(1, 9, 2)]
    assert len(source) == 9
    for index, number in enumerate(order):
        assert_same(source[index], encode_session(make_session(number, (0.3, 0.6)), MODEL, tokenizer))
    assert not source.quarantined


def test_documents_become_tokens(tmp_path, tokenizer):
    write_documents(tmp_path / "set", [Document(document_id="d", text="seven three")], name="set")
    document = encode(tmp_path / "set", tokenizer)[0]
    assert isinstance(document, EncodedDocument)
    assert document.tokens.tolist() == tokenizer.encode("seven three")


def test_worker_count_does_not_matter(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("data_pipelines.encoding.records_per_shard", lambda num_records: 4)
    identities = []
    for workers in (1, 2):
        directory = write_sessions(tmp_path / f"set{workers}", broken=(3,))
        done = []
        source = encode(
            directory,
            tokenizer,
            num_workers=workers,
            max_quarantined_fraction=0.5,
            progress=lambda *counts, done=done: done.append(counts),
        )
        assert done == [(4, 9), (8, 9), (9, 9)]
        assert len(source.quarantined) == 1
        identities.append(source.manifest.identity)
    assert identities[0] == identities[1]


def test_a_complete_cache_is_reused_and_a_damaged_one_is_made_again(tmp_path, tokenizer):
    source = encode(write_sessions(tmp_path / "set"), tokenizer)
    shard = source.directory / source.manifest.shards[0].file
    before = shard.stat().st_mtime_ns
    encode(tmp_path / "set", tokenizer)
    assert shard.stat().st_mtime_ns == before
    for derived in ("layout-0123456789ab/parts.npz", "rows-0123456789ab/epoch-000000.npz"):
        (source.directory / derived).parent.mkdir()
        (source.directory / derived).write_bytes(b"of the damaged one")
    os.truncate(shard, 100)
    again = encode(tmp_path / "set", tokenizer)
    assert again.manifest.identity == source.manifest.identity
    assert len(again[0].levels_TM)
    (again.directory / QUARANTINE_NAME).unlink()
    assert len(encode(tmp_path / "set", tokenizer).quarantined) == 0


@pytest.mark.parametrize("damage", ["deleted shard", "truncated shard", "broken promise", "corrupt record"])
def test_what_cannot_be_encoded_keeps_its_place(tmp_path, tokenizer, damage):
    whole = encode(write_sessions(tmp_path / "whole"), tokenizer)
    directory = write_sessions(tmp_path / "set", broken=(2,) if damage == "broken promise" else ())
    shard = directory / shard_name(1, 2)
    match damage:
        case "deleted shard":
            shard.unlink()
            lost, reason = {5, 6, 7, 8}, "missing"
        case "truncated shard":
            os.truncate(shard, 1_000)
            lost, reason = {5, 6, 7, 8}, "1000 bytes"
        case "broken promise":
            lost, reason = {1}, "promises"
        case "corrupt record":
            data = bytearray(shard.read_bytes())
            data[data.index(b"session-3") + 200] ^= 0xFF
            shard.write_bytes(data)
            lost, reason = {6}, "hash mismatch"
    source = encode(directory, tokenizer, max_quarantined_fraction=0.5)
    assert len(source) == 9
    assert set(source.quarantined) == lost
    listed = [json.loads(line) for line in (source.directory / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["index"] for entry in listed] == sorted(lost)
    for entry in listed:
        assert (entry["file"], entry["record"]) == RecordSource(directory).place(entry["index"])
        assert reason in entry["reason"]
    for index in range(9):
        if index in lost:
            with pytest.raises(RecordError, match="quarantined when it was encoded"):
                source[index]
        else:
            assert_same(source[index], whole[index])


def test_too_many_are_fatal_and_leave_nothing(tmp_path, tokenizer):
    directory = write_sessions(tmp_path / "set", broken=(2, 3))
    with pytest.raises(ValueError, match=r"2 of 9 records .*max_quarantined_fraction = 0.2.*promises"):
        encode(directory, tokenizer, max_quarantined_fraction=0.2)
    assert not list(directory.glob("encoded-*"))
    assert not list(directory.glob(".encoded-*"))
    assert len(encode(directory, tokenizer, max_quarantined_fraction=2 / 9).quarantined) == 2


def test_other_codecs_other_place(tmp_path, tokenizer):
    write_sessions(tmp_path / "set")
    models = (
        MODEL,
        replace(MODEL, audio=AudioConfig(level_low=-6.0)),
        replace(MODEL, video=VideoConfig(max_tiles_per_turn=2)),
    )
    places = {
        encoded_directory(tmp_path / "set", codec_header(RecordKind.SESSIONS, model, fingerprint))
        for model in models
        for fingerprint in ("one", "two")
    }
    assert len(places) == 6
    same = replace(MODEL, d_model=64, video=VideoConfig(fold_dims=(16, 32, 64)))
    assert encoded_directory(tmp_path / "set", codec_header(RecordKind.SESSIONS, same, "one")) in places


def test_header_mismatch_is_refused_with_both_values(tmp_path, tokenizer):
    source = encode(write_sessions(tmp_path / "set"), tokenizer)
    other = codec_header(
        RecordKind.SESSIONS, replace(MODEL, audio=AudioConfig(level_low=-6.0)), tokenizer.fingerprint()
    )
    with pytest.raises(HeaderError, match=r"audio.level_low = -7.0, this run has -6.0"):
        EncodedSource(source.directory, other)
    # The manifest may lie; the records say it too.
    manifest = json.loads((source.directory / "dataset.json").read_text())
    manifest["meta"]["header"] = json.dumps(other)
    (source.directory / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(HeaderError, match=r"record 0, .*audio.level_low = -7.0, this run has -6.0"):
        EncodedSource(source.directory, other)[0]


def test_missing_pieces_are_named(tmp_path, tokenizer):
    source = encode(write_sessions(tmp_path / "set", broken=(1,)), tokenizer, max_quarantined_fraction=0.5)
    with pytest.raises(ValueError, match="is encoded already"):
        encode(source.directory, tokenizer)
    with pytest.raises(FileNotFoundError, match="not encoded"):
        EncodedSource(tmp_path / "set" / "encoded-0", source.header)
    with pytest.raises(ValueError, match="holds sessions, not encoded"):
        EncodedSource(tmp_path / "set", source.header)
    (source.directory / "quarantine.jsonl").write_text("")
    with pytest.raises(ValueError, match="lists 0 records, the manifest says 1"):
        EncodedSource(source.directory, source.header)
    with SessionWriter(tmp_path / "empty", name="empty"):
        pass
    assert len(encode(tmp_path / "empty", tokenizer)) == 0
    assert read_manifest(tmp_path / "empty").num_records == 0
    shutil.rmtree(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="not a data set"):
        encode(tmp_path / "set", tokenizer)
