import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from small_disk import small_disk

from data_pipelines.record_writer import UNCOMPRESSED, RecordWriter, SessionWriter, commit, stage, write_shard
from data_pipelines.records import RecordError, RecordKind, RecordSource, iter_sessions, read_manifest, shard_name
from tml.session import AudioClip, AudioEncoding, Session, Stream


def records(count: int) -> list[bytes]:
    return [random.Random(i).randbytes(50 + 7 * i) for i in range(count)]


@pytest.fixture
def data_set(tmp_path):
    with RecordWriter(tmp_path / "set", kind=RecordKind.DOCUMENTS, name="set", num_shards=3, meta={"a": "b"}) as writer:
        for record in records(20):
            writer.write(record)
    return tmp_path / "set"


def flip_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def test_round_trip_is_round_robin(data_set):
    source = RecordSource(data_set)
    expected = [record for shard in range(3) for record in records(20)[shard::3]]
    assert [source[i] for i in range(len(source))] == expected
    assert source.place(7) == (shard_name(1, 3), 0)
    assert source.manifest.meta == {"a": "b"}
    with pytest.raises(IndexError):
        source[20]


def test_same_records_same_bytes_other_records_other_identity(data_set, tmp_path):
    for name, changed in (("same", 0), ("other", 1)):
        with RecordWriter(tmp_path / name, kind=RecordKind.DOCUMENTS, name=name, num_shards=3) as writer:
            for record in [*records(20)[:-1], records(20 + changed)[-1]]:
                writer.write(record)
    assert read_manifest(tmp_path / "same").identity == read_manifest(data_set).identity
    assert read_manifest(tmp_path / "other").identity != read_manifest(data_set).identity


def test_existing_target_is_refused_and_overwriting_replaces(data_set):
    with pytest.raises(ValueError, match="not empty"):
        RecordWriter(data_set, kind=RecordKind.DOCUMENTS, name="again")
    with RecordWriter(data_set, kind=RecordKind.DOCUMENTS, name="again", overwrite=True) as writer:
        writer.write(b"one")
    assert RecordSource(data_set)[0] == b"one"
    assert [path.name for path in data_set.parent.iterdir()] == ["set"]


def write_one(directory, **kwargs) -> None:
    with RecordWriter(directory, kind=RecordKind.DOCUMENTS, name="one", **kwargs) as writer:
        writer.write(b"one")


def test_overwriting_takes_what_belongs_to_a_data_set_with_it(tmp_path):
    target = tmp_path / "set"
    with stage(target) as staging:
        shard = write_shard(staging / shard_name(0, 1), records(3))
        attachments = {"licences/a.txt": b"free"}
        commit(staging, target, [shard], kind=RecordKind.DOCUMENTS, name="set", attachments=attachments)
    assert read_manifest(target).attachments == ("licences/a.txt",)
    write_one(target / "encoded-0123456789ab")
    write_one(target, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["dataset.json", shard_name(0, 1)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("set/licences/mine.txt", "set holds licences/mine.txt beside its data set"),
        ("set/other/dataset.json", "set holds other/dataset.json beside its data set"),
        ("set/encoded/notes.txt", "set holds encoded/notes.txt beside its data set"),
        ("set/encoded-0123456789ab.txt", "set holds encoded-0123456789ab.txt beside its data set"),
        ("set/encoded-0123456789ab-mine/dataset.json", "set holds encoded-0123456789ab-mine/dataset.json beside its"),
        ("set/encoded-0123456789ab/notes.txt", "set holds encoded-0123456789ab/notes.txt beside its data set"),
        (
            "set/encoded-0123456789ab/rows-0123456789ab/t.csv",
            "holds encoded-0123456789ab/rows-0123456789ab/t.csv beside",
        ),
        ("wavs/one.wav", "wavs holds files, but no dataset.json"),
        ("parent/set/dataset.json", "parent holds files, but no dataset.json"),
        ("damaged/dataset.json", "is not a data set manifest"),
        ("notes.txt", "notes.txt is a file; name a directory"),
    ],
)
@pytest.mark.parametrize("comes_late", [False, True])
def test_overwriting_deletes_nothing_else(data_set, name, said, comes_late):
    file = data_set.parent / name
    target = data_set.parent / name.split("/")[0]

    def put() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")

    def write() -> None:
        with RecordWriter(target, kind=RecordKind.DOCUMENTS, name="again", overwrite=True):
            put()

    if not comes_late:
        put()
    with pytest.raises(ValueError, match=said):
        write()
    assert file.read_text() == "mine"
    assert len(RecordSource(data_set)) == 20
    assert not list(data_set.parent.glob(".*")), "nothing unfinished is left"


def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path):
    def write() -> None:
        with RecordWriter(tmp_path / "set", kind=RecordKind.DOCUMENTS, name="set", options=UNCOMPRESSED) as writer:
            for _ in range(64):
                writer.write(os.urandom(64 * 1024))

    with small_disk(256 * 1024), pytest.raises(OSError, match=r"cannot be written: .*; make room, and run the same"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_failed_writer_leaves_nothing(tmp_path):
    with pytest.raises(TypeError), RecordWriter(tmp_path / "set", kind=RecordKind.DOCUMENTS, name="set") as writer:
        writer.write(3)
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_no_data_set(tmp_path):
    target = tmp_path / "set"
    code = (
        "import time; from data_pipelines.record_writer import RecordKind, RecordWriter\n"
        f"with RecordWriter({str(target)!r}, kind=RecordKind.DOCUMENTS, name='set') as writer:\n"
        "    writer.write(b'one'); print('written', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not target.exists()
    with RecordWriter(target, kind=RecordKind.DOCUMENTS, name="set") as writer:
        writer.write(b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "the dead writer's directory is cleared"


def test_shards_written_apart_make_one_set(tmp_path):
    parts = [records(5), [], records(3)]
    with stage(tmp_path / "set") as staging:
        shards = [write_shard(staging / shard_name(i, 3), part) for i, part in enumerate(parts)]
        commit(staging, tmp_path / "set", shards, kind=RecordKind.ENCODED, name="set")
    source = RecordSource(tmp_path / "set")
    assert [source[i] for i in range(len(source))] == list(itertools.chain(*parts))
    assert source.manifest.kind is RecordKind.ENCODED


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "emptied"])
def test_damage_is_an_error_of_its_records_only(data_set, damage):
    path = data_set / shard_name(1, 3)
    match damage:
        case "truncated":
            os.truncate(path, path.stat().st_size // 2)
        case "missing":
            path.unlink()
        case "flipped":
            flip_byte(path, path.read_bytes().index(records(20)[4]))
        case "emptied":
            path.write_bytes(b"")
    source = RecordSource(data_set)
    assert len(source) == 20
    failed = []
    for index in range(20):
        try:
            source[index]
        except RecordError as error:
            failed.append((index, (error.file, error.record)))
    assert failed
    assert all(place == source.place(index) and place[0] == path.name for index, place in failed)
    assert {index for index, _ in failed} <= set(range(7, 14)), "only records of the damaged shard fail"
    assert len(failed) == (1 if damage == "flipped" else 7)


def test_threads_read_what_one_thread_reads(data_set):
    source, wrong = RecordSource(data_set), []
    expected = [RecordSource(data_set)[i] for i in range(20)]

    def read(offset):
        wrong.extend(i for k in range(200) if source[i := (offset * 7 + k) % 20] != expected[i])

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_manifest_errors(tmp_path, data_set):
    with pytest.raises(FileNotFoundError, match="has no dataset"):
        RecordSource(tmp_path)
    (data_set / "dataset.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99"):
        RecordSource(data_set)
    (data_set / "dataset.json").write_text("[")
    with pytest.raises(ValueError, match="not a data set manifest"):
        RecordSource(data_set)


def test_sessions_round_trip_and_bad_record_is_named(tmp_path):
    session = Session(
        session_id="one",
        sample_rate_hz=16_000,
        num_samples=320,
        streams=(Stream.USER_AUDIO,),
        audio={Stream.USER_AUDIO: AudioClip(encoding=AudioEncoding.PCM16, data=bytes(640), num_samples=320)},
    )
    with SessionWriter(tmp_path / "good", name="good") as writer:
        writer.write(session)
    assert list(iter_sessions(tmp_path / "good")) == [session]
    with RecordWriter(tmp_path / "bad", kind=RecordKind.SESSIONS, name="bad") as writer:
        writer.write(b"\xc1nonsense")
    with pytest.raises(RecordError, match=r"record 0: .*not msgpack") as caught:
        list(iter_sessions(tmp_path / "bad"))
    assert caught.value.file == shard_name(0, 1)
    with RecordWriter(tmp_path / "texts", kind=RecordKind.DOCUMENTS, name="texts") as writer:
        writer.write(b"")
    with pytest.raises(ValueError, match="holds documents, not sessions"):
        list(iter_sessions(tmp_path / "texts"))


def test_time_of_a_read_does_not_grow_with_the_shard(tmp_path):
    with RecordWriter(tmp_path / "set", kind=RecordKind.DOCUMENTS, name="set") as writer:
        for index in range(2_000):
            writer.write(b"%d" % index)
    source = RecordSource(tmp_path / "set")
    source[0]
    start = time.perf_counter()
    for index in range(0, 2_000, 10):
        assert source[1_999 - index] == b"%d" % (1_999 - index)
    assert time.perf_counter() - start < 2.0
