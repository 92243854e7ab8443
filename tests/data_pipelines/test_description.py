import pytest
from small_sets import make_session

from data_pipelines.description import describe
from data_pipelines.documents import Document, write_documents
from data_pipelines.encoded import encoded_directory
from data_pipelines.encoding import encode_dataset
from data_pipelines.record_writer import SessionWriter
from data_pipelines.records import shard_name
from tml.config import AudioConfig, ModelConfig


def test_sessions_are_counted(tmp_path, tokenizer):
    with SessionWriter(tmp_path / "set", name="set", num_shards=2) as writer:
        for number in range(6):
            writer.write(make_session(number))
    found = describe(tmp_path / "set", tokenizer, AudioConfig())
    sessions = [make_session(number) for number in range(6)]
    seconds = sum(session.duration_s for session in sessions)
    assert found.duration_s == pytest.approx(seconds)
    assert found.sound_s["user_audio"] == pytest.approx(seconds)
    assert found.events == {"user_text": 6, "own_text": 18}
    assert found.tokens["own_text"] == sum(
        len(tokenizer.encode_word(event.text)) for session in sessions for event in session.texts[1:]
    )
    assert found.tokens["user_audio"] == sum(-(-session.num_samples // 800) for session in sessions)
    assert "speakers: unknown" in "\n".join(found.lines())
    assert not found.unreadable


def test_what_cannot_be_read_is_listed(tmp_path, tokenizer):
    with SessionWriter(tmp_path / "set", name="set", num_shards=2) as writer:
        for number in range(6):
            writer.write(make_session(number))
    (tmp_path / "set" / shard_name(1, 2)).unlink()
    source = encode_dataset(tmp_path / "set", ModelConfig(), tokenizer, max_quarantined_fraction=0.5)
    found = describe(tmp_path / "set")
    assert [entry.index for entry in found.unreadable] == [3, 4, 5]
    assert found.in_stream["user_audio"] == 3
    assert list(found.quarantined) == [encoded_directory(tmp_path / "set", source.header).name]
    lines = found.lines()
    assert "unreadable: 3 records" in lines
    assert f"  {shard_name(1, 2)}, record 0: the shard is missing" in lines


def test_documents_are_counted(tmp_path, tokenizer):
    write_documents(tmp_path / "set", [Document(document_id="d", text="seven three")], name="set")
    assert (
        f"documents: 11 characters, {len(tokenizer.encode('seven three'))} tokens"
        in describe(tmp_path / "set", tokenizer).lines()
    )
    encoded = encode_dataset(tmp_path / "set", ModelConfig(), tokenizer, max_quarantined_fraction=0.0)
    with pytest.raises(ValueError, match="holds encoded records"):
        describe(encoded.directory)
