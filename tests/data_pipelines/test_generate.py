"""Data sets written by several processes: the same bytes with any number of them, nothing left after an error."""

import dataclasses
import time

import pytest

from data_pipelines.generate import generate
from data_pipelines.records import RecordKind, iter_sessions, read_manifest
from data_pipelines.request_task import RequestTask
from tml.session import Session, Stream, TextEvent


@dataclasses.dataclass(frozen=True)
class Typed:
    """Sessions of one typed word; fails at one index."""

    fails_at: int = -1

    def session(self, split: str, index: int) -> Session:
        if index == self.fails_at:
            raise ValueError(f"session {index} cannot be made")
        return Session(
            session_id=f"{split}-{index}",
            sample_rate_hz=16_000,
            num_samples=16_000,
            streams=(Stream.USER_TEXT,),
            texts=(TextEvent(stream=Stream.USER_TEXT, start=0, end=0, text=str(index)),),
            meta={"voice": "none"},
        )


def write(directory, task=None, **options):
    return generate(
        directory, task or Typed(), **{"name": "x", "split": "train", "num_sessions": 11, "num_workers": 1, **options}
    )


def test_any_number_of_workers_writes_the_same_bytes_in_order(tmp_path):
    task = RequestTask(seed=9)
    one = write(tmp_path / "one", task, num_sessions=7, num_shards=3, num_workers=1)
    two = write(tmp_path / "two", task, num_sessions=7, num_shards=3, num_workers=2)
    assert read_manifest(tmp_path / "one") == read_manifest(tmp_path / "two")
    assert (one.sessions, one.audio_s, one.tags) == (two.sessions, two.audio_s, two.tags)
    names = [session.session_id for session in iter_sessions(tmp_path / "two")]
    assert names == [f"requests-train-9-{i:06d}" for i in range(7)]


def test_the_manifest_and_attachments_are_there(tmp_path):
    seen = []
    summary = write(
        tmp_path / "set",
        num_shards=4,
        meta={"licence": "none"},
        attachments={"licences/a.txt": b"free"},
        progress=seen.append,
    )
    manifest = read_manifest(tmp_path / "set")
    assert manifest.kind is RecordKind.SESSIONS
    assert manifest.meta == {"licence": "none"}
    assert [shard.num_records for shard in manifest.shards] == [2, 3, 3, 3]
    assert (tmp_path / "set/licences/a.txt").read_bytes() == b"free"
    assert summary.sessions == 11
    assert summary.audio_s == 11.0
    assert summary.voices == {"none": 11}
    assert seen[-1] == 11


def test_fewer_sessions_than_shards_leave_no_empty_shard(tmp_path):
    write(tmp_path / "set", num_sessions=2, num_shards=8)
    assert [shard.num_records for shard in read_manifest(tmp_path / "set").shards] == [1, 1]


def test_an_error_in_a_worker_is_raised_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="session 5 cannot be made"):
        write(tmp_path / "set", Typed(fails_at=5), num_shards=3)
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Slow(Typed):
    """Sessions that take a tenth of a second each."""

    def session(self, split: str, index: int) -> Session:
        time.sleep(0.1)
        return super().session(split, index)


def test_an_interrupt_ends_it_promptly_and_leaves_nothing(tmp_path):
    """The shards under way would take a minute to finish."""
    interrupted = []

    def interrupt(done):
        if done:
            interrupted.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", Slow(), num_sessions=1_200, num_shards=2, progress=interrupt)
    assert time.monotonic() - interrupted[0] < 15
    assert not list(tmp_path.iterdir())


def test_a_data_set_is_replaced_only_when_asked(tmp_path):
    write(tmp_path / "set", num_sessions=1)
    with pytest.raises(ValueError, match="exists and is not empty"):
        write(tmp_path / "set", num_sessions=2)
    assert read_manifest(tmp_path / "set").num_records == 1
    write(tmp_path / "set", num_sessions=2, overwrite=True)
    assert read_manifest(tmp_path / "set").num_records == 2


@pytest.mark.parametrize("option", ["num_sessions", "num_shards", "num_workers"])
def test_counts_below_one_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} = 0 must be at least 1"):
        write(tmp_path / "set", **{option: 0})
