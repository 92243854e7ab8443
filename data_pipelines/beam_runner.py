"""Writes a data set of generated sessions with Apache Beam, for clusters: the same bytes as with local processes.

The pipeline maps the numbers of the shards to files: every shard is an element, any worker may write it, and
a shard that is written twice (Beam repeats what failed or was slow) is put in place by one rename. Workers
must see `directory` at the same path as the program that starts the pipeline: one machine, or a file system
that all machines mount. The manifest is written at the end, by the program that started the pipeline.
"""

import functools
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipelines.generate import GenerateSummary, SessionTask, shard_bounds, write_sessions
from data_pipelines.record_writer import commit, stage
from data_pipelines.records import RecordKind, Shard, shard_name

LOCAL_OPTIONS = ("--runner=FnApiRunner", "--direct_running_mode=in_memory")
"""Beam's own local runner, in this process. (DirectRunner may fetch a program from the network and run that.)"""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard: sessions [first, last) of a split, to be written to `path`."""

    task: SessionTask
    split: str
    path: str
    first: int
    last: int


def generate_with_beam(
    directory: Path | str,
    task: SessionTask,
    *,
    name: str,
    split: str,
    num_sessions: int,
    num_shards: int = 8,
    options: Sequence[str] = LOCAL_OPTIONS,
    meta: Mapping[str, str] | None = None,
    attachments: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> GenerateSummary:
    """Like `generate.generate`, by a pipeline of Apache Beam.

    Args:
        directory: where the data set goes; every worker must be able to write beside it.
        task: what makes the sessions; it is sent to the workers.
        name: of the data set.
        split: passed to the task.
        num_sessions: how many.
        num_shards: files, each one element of the pipeline; at most as many as sessions are written.
        options: Beam's, such as `--runner=FlinkRunner`; by default the pipeline runs in this process.
        meta: strings about origin, for the manifest.
        attachments: files to lay beside the records, by path.
        overwrite: replace what is at `directory`.

    Raises:
        ValueError: Apache Beam is not installed, a count is below 1, or something is at `directory`.
        RuntimeError: the pipeline failed; nothing is left behind.
    """
    for label, value in (("num_sessions", num_sessions), ("num_shards", num_shards)):
        if value < 1:
            raise ValueError(f"{label} = {value} must be at least 1")
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError("Apache Beam is not installed; pip install -e '.[beam]'") from error
    num_shards = min(num_shards, num_sessions)
    begun = time.monotonic()
    with stage(directory, overwrite=overwrite) as staging:
        jobs = [
            _Job(task=task, split=split, path=str(staging / shard_name(i, num_shards)), first=first, last=last)
            for i, (first, last) in enumerate(shard_bounds(num_sessions, num_shards))
        ]
        # Beam removes what it knows from the options it is given, so that a wrong one is an error here.
        pipeline_options = PipelineOptions([*options], save_main_session=False)
        _refuse_unknown(pipeline_options, options)
        with beam.Pipeline(options=pipeline_options) as pipeline:
            shards = pipeline | "shards" >> beam.Create(range(num_shards)) | "spread" >> beam.Reshuffle()
            _ = shards | "write" >> beam.Map(functools.partial(_write, jobs))
        summary, written = _gather(jobs)
        commit(
            staging,
            directory,
            written,
            kind=RecordKind.SESSIONS,
            name=name,
            meta=meta,
            attachments=attachments,
            overwrite=overwrite,
        )
    summary.wall_s = time.monotonic() - begun
    return summary


def _refuse_unknown(pipeline_options, options: Sequence[str]) -> None:
    """Beam ignores options that it does not know; here they are an error."""
    known = pipeline_options.get_all_options(drop_default=False, retain_unknown_options=False)
    unknown = [option for option in options if option.split("=")[0].lstrip("-").removeprefix("no_") not in known]
    if unknown:
        raise ValueError(f"Apache Beam knows no option {', '.join(unknown)}")


def _write(jobs: Sequence[_Job], index: int) -> int:
    """Writes one shard and, beside it, what is in it; runs on a worker."""
    job = jobs[index]
    path = Path(job.path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    shard, summary = write_sessions(job.task, job.split, partial, job.first, job.last)
    facts = {"shard": {**asdict(shard), "file": path.name}, "summary": vars(summary)}
    note = partial.with_suffix(".json")
    note.write_text(json.dumps(facts))
    os.replace(partial, path)
    os.replace(note, _note_of(path))
    return index


def _note_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _gather(jobs: Sequence[_Job]) -> tuple[GenerateSummary, list[Shard]]:
    """Reads and removes the workers' notes, in the order of the shards, and what failed workers left."""
    summary, shards = GenerateSummary(), []
    for job in jobs:
        note = _note_of(Path(job.path))
        facts = json.loads(note.read_text())
        counts = {key: Counter(value) for key, value in facts["summary"].items() if isinstance(value, dict)}
        summary.merge(GenerateSummary(**{**facts["summary"], **counts}))
        shards.append(Shard(**facts["shard"]))
        note.unlink()
    for left in Path(jobs[0].path).parent.glob(".shard-*"):
        left.unlink()
    return summary, shards
