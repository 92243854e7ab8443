import subprocess
import sys

import pytest
from small_sets import make_session

from data_pipelines.documents import Document, decode_document, write_documents
from data_pipelines.record_writer import SessionWriter
from data_pipelines.records import RecordError, RecordKind, RecordSource
from data_pipelines.tfds_builder import TfdsRecords, write_tfds
from tml.session import session_from_bytes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    with SessionWriter(root / "ours", name="ours", num_shards=2, meta={"licence": "CC0", "split": "heldout"}) as writer:
        for number in range(12):
            writer.write(make_session(number))
    return root / "ours", write_tfds(root / "ours", root / "theirs")


def test_sessions_come_back_byte_for_byte_and_in_order(written):
    ours, theirs = written
    source, records = RecordSource(ours), TfdsRecords(theirs)
    assert [records[i] for i in range(len(records))] == [source[i] for i in range(12)]
    assert records.session(3) == session_from_bytes(source[3])
    assert (records.kind, records.name, records.split) == (RecordKind.SESSIONS, "ours", "heldout")
    assert records.identity == source.manifest.identity
    assert records.meta["licence"] == "CC0"
    with pytest.raises(IndexError):
        records[12]


def test_tfds_alone_reads_it_without_our_code_and_without_tensorflow(written):
    ours, theirs = written
    program = (
        "import sys, tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "source = builder.as_data_source(split='heldout')\n"
        "assert not {'tensorflow', 'data_pipelines', 'tml'} & {name.split('.')[0] for name in sys.modules}\n"
        "print(len(source), list(source[0]), source[5]['record'].hex())\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(theirs)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"12 ['record'] {RecordSource(ours)[5].hex()}"


def test_documents_too_and_no_writing_over(tmp_path):
    write_documents(tmp_path / "texts", [Document(document_id="a", text="one")], name="texts")
    directory = write_tfds(tmp_path / "texts", tmp_path / "theirs")
    records = TfdsRecords(directory)
    assert decode_document(records[0]).text == "one"
    assert (records.kind, records.split) == (RecordKind.DOCUMENTS, "train")
    with pytest.raises(RecordError, match="record 0"):
        records.session(0)
    with pytest.raises(ValueError, match="exists"):
        write_tfds(tmp_path / "texts", tmp_path / "theirs")
    write_documents(tmp_path / "texts", [Document(document_id="a", text="two")], name="texts", overwrite=True)
    assert write_tfds(tmp_path / "texts", tmp_path / "theirs", overwrite=True) == directory
    assert decode_document(TfdsRecords(directory)[0]).text == "two"
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which TFDS did not write"):
        write_tfds(tmp_path / "texts", tmp_path / "theirs", overwrite=True)
    assert (directory / "notes.txt").read_text() == "mine"


def test_a_name_that_leads_elsewhere_is_refused(tmp_path):
    with SessionWriter(tmp_path / "set", name="../../evil", num_shards=1, meta={"licence": "CC0"}) as writer:
        writer.write(make_session(1))
    with pytest.raises(ValueError, match=r"has the name '../../evil', which cannot be a directory's"):
        write_tfds(tmp_path / "set", tmp_path / "tfds")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_export_that_fails_leaves_the_old_one(tmp_path):
    write_documents(tmp_path / "texts", [Document(document_id="a", text="one")], name="texts")
    directory = write_tfds(tmp_path / "texts", tmp_path / "theirs")
    (shard,) = (tmp_path / "texts").glob("shard-*")
    shard.unlink()
    with pytest.raises(RecordError, match="missing"):
        write_tfds(tmp_path / "texts", tmp_path / "theirs", overwrite=True)
    assert decode_document(TfdsRecords(directory)[0]).text == "one"
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["tml_records"], "nothing unfinished is left"


def test_damage_and_other_directories_are_refused(tmp_path, written):
    with pytest.raises(FileNotFoundError):
        write_tfds(tmp_path, tmp_path / "theirs")
    with pytest.raises(ValueError, match="write_tfds"):
        TfdsRecords(tmp_path)
    ours, _ = written
    directory = write_tfds(ours, tmp_path / "theirs")
    (shard,) = directory.glob("*.array_record*")
    whole = shard.read_bytes()
    for length in (0, 65_536, len(whole) // 2):
        shard.write_bytes(whole[:length])
        with pytest.raises(RecordError, match="record 11: unreadable"):
            TfdsRecords(directory)
    shard.unlink()
    with pytest.raises(ValueError, match=r"cannot be read|unreadable"):
        TfdsRecords(directory)
    (directory / "metadata.json").unlink()
    with pytest.raises(ValueError, match="write_tfds"):
        TfdsRecords(directory)
