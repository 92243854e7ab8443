"""Writes a data set of generated sessions with several processes; the bytes do not depend on how many."""

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Protocol, runtime_checkable

from data_pipelines.record_writer import UNCOMPRESSED, commit, stage, write_shard
from data_pipelines.records import RecordKind, Shard, shard_name
from data_pipelines.worker_process import end_with_parent
from tml.session import ExpectationKind, Session, session_to_bytes

_POLL_S = 0.5
_SESSIONS_MEASURED = 64
_SESSIONS_PER_SHARD = 4_000


@runtime_checkable
class SessionTask(Protocol):
    """Something that makes session `index` of a split, the same in every process."""

    def session(self, split: str, index: int) -> Session:
        """The session."""


@dataclass(kw_only=True)
class GenerateSummary:
    """What was written.

    Attributes:
        sessions: how many.
        audio_s: their length.
        wall_s: time it took.
        voices: sessions by voice.
        tags: expectations by tag.
        answers: expected answers by word.
    """

    sessions: int = 0
    audio_s: float = 0.0
    wall_s: float = 0.0
    voices: Counter[str] = field(default_factory=Counter)
    tags: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)

    def add(self, session: Session) -> None:
        """Counts one session."""
        self.sessions += 1
        self.audio_s += session.duration_s
        self.voices.update([session.meta["voice"]])
        self.tags.update(item.tag for item in session.expectations)
        self.answers.update(
            item.text for item in session.expectations if item.kind in (ExpectationKind.ANSWER, ExpectationKind.SAY)
        )

    def merge(self, other: "GenerateSummary") -> None:
        """Adds the counts of another part of the data set."""
        self.sessions += other.sessions
        self.audio_s += other.audio_s
        self.voices += other.voices
        self.tags += other.tags
        self.answers += other.answers


def shard_bounds(num_sessions: int, num_shards: int) -> list[tuple[int, int]]:
    """The sessions [first, last) of each shard."""
    bounds = [num_sessions * i // num_shards for i in range(num_shards + 1)]
    return list(itertools.pairwise(bounds))


def shards_for(num_sessions: int) -> int:
    """How many shards so many sessions should have: 8, and more from 32,000 on, so that none passes about 1 GB."""
    return max(8, -(-num_sessions // _SESSIONS_PER_SHARD))


def sessions_for(task: SessionTask, split: str, hours: float) -> int:
    """How many sessions last about so many hours, by the mean length of the first 64; the same for any process."""
    lengths_s = [task.session(split, index).duration_s for index in range(_SESSIONS_MEASURED)]
    return max(1, round(hours * 3600 / (sum(lengths_s) / len(lengths_s))))


def generate(
    directory: Path | str,
    task: SessionTask,
    *,
    name: str,
    split: str,
    num_sessions: int,
    num_shards: int = 8,
    num_workers: int = 2,
    meta: Mapping[str, str] | None = None,
    attachments: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> GenerateSummary:
    """Writes sessions 0 … `num_sessions` - 1 of a split, each shard a run of them.

    Args:
        directory: where the data set goes.
        task: what makes the sessions; it is sent to the workers.
        name: of the data set.
        split: passed to the task.
        num_sessions: how many.
        num_shards: files; at most as many as sessions are written.
        num_workers: processes.
        meta: strings about origin, for the manifest.
        attachments: files to lay beside the records, such as licences, by path.
        overwrite: replace what is at `directory`.
        progress: called twice a second with the number of sessions made so far.

    Raises:
        ValueError: a count below 1, or something is at `directory` and `overwrite` is False.
    """
    for label, value in (("num_sessions", num_sessions), ("num_shards", num_shards), ("num_workers", num_workers)):
        if value < 1:
            raise ValueError(f"{label} = {value} must be at least 1")
    num_shards = min(num_shards, num_sessions)
    begun = time.monotonic()
    summary = GenerateSummary()
    shards: list[Shard] = []
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with stage(directory, overwrite=overwrite) as staging:
        pool = concurrent.futures.ProcessPoolExecutor(
            num_workers, mp_context=context, initializer=_begin_worker, initargs=(counter, stop, os.getpid())
        )
        try:
            jobs = [
                pool.submit(_write, task, split, staging / shard_name(i, num_shards), first, last)
                for i, (first, last) in enumerate(shard_bounds(num_sessions, num_shards))
            ]
            waiting = set(jobs)
            while waiting:
                done, waiting = concurrent.futures.wait(
                    waiting, timeout=_POLL_S, return_when=concurrent.futures.FIRST_EXCEPTION
                )
                for job in done:
                    job.result()
                progress(counter.value)
            for job in jobs:
                shard, part = job.result()
                shards.append(shard)
                summary.merge(part)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        commit(
            staging,
            directory,
            shards,
            kind=RecordKind.SESSIONS,
            name=name,
            meta=meta,
            attachments=attachments,
            overwrite=overwrite,
        )
    summary.wall_s = time.monotonic() - begun
    return summary


class _StoppedError(Exception):
    """The data set is not wanted any more."""


# What a worker process was started with: the sessions made by all, and whether to stop.
_worker: "list[tuple[Synchronized[int], Event]]" = []


def _begin_worker(counter: "Synchronized[int]", stop: Event, parent: int) -> None:
    _worker.append((counter, stop))
    # A worker whose parent is killed would otherwise wait for ever; Ctrl-C is the parent's to handle.
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write(task: SessionTask, split: str, path: Path, first: int, last: int) -> tuple[Shard, GenerateSummary]:
    [(counter, stop)] = _worker

    def made() -> None:
        with counter.get_lock():
            counter.value += 1
        if stop.is_set():
            raise _StoppedError

    return write_sessions(task, split, path, first, last, made)


def write_sessions(
    task: SessionTask, split: str, path: Path, first: int, last: int, made: Callable[[], None] = lambda: None
) -> tuple[Shard, GenerateSummary]:
    """Writes sessions [first, last) of a split as one shard; calls `made` after each."""
    summary = GenerateSummary()

    def records() -> Iterator[bytes]:
        for index in range(first, last):
            session = task.session(split, index)
            summary.add(session)
            yield session_to_bytes(session)
            made()

    # Sound is FLAC already: compressing it again only takes time.
    return write_shard(path, records(), options=UNCOMPRESSED), summary
