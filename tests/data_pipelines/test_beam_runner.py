"""Apache Beam's local runner writes what the local processes write. Wants the extra `beam`."""

import pytest
from test_generate import Typed

from data_pipelines.beam_runner import LOCAL_OPTIONS, generate_with_beam
from data_pipelines.behaviours.task import BehaviourTask
from data_pipelines.generate import generate
from data_pipelines.records import read_manifest

COMMON = {"name": "x", "split": "train", "num_sessions": 7, "num_shards": 3, "meta": {"licence": "none"}}


@pytest.mark.slow
def test_beam_writes_the_bytes_of_the_local_processes(tmp_path):
    task = BehaviourTask(seed=9)
    licences = {"licences/a.txt": b"free"}
    beam = generate_with_beam(tmp_path / "beam", task, attachments=licences, **COMMON)
    local = generate(tmp_path / "local", task, num_workers=1, attachments=licences, **COMMON)
    assert read_manifest(tmp_path / "beam") == read_manifest(tmp_path / "local")
    assert (beam.sessions, beam.audio_s, beam.tags, beam.answers) == (
        local.sessions, local.audio_s, local.tags, local.answers,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "beam").iterdir()) == [
        "dataset.json", "licences", *(f"shard-0000{i}-of-00003.array_record" for i in range(3)),
    ]  # fmt: skip


@pytest.mark.slow
def test_an_error_in_the_pipeline_is_raised_and_leaves_nothing(tmp_path):
    with pytest.raises(Exception, match="session 5 cannot be made"):
        generate_with_beam(tmp_path / "set", Typed(fails_at=5), **COMMON)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_option_that_beam_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="knows no option --speed=3"):
        generate_with_beam(tmp_path / "set", Typed(), options=[*LOCAL_OPTIONS, "--speed=3"], **COMMON)
    assert not list(tmp_path.iterdir())


def test_counts_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_shards = 0 must be at least 1"):
        generate_with_beam(tmp_path / "set", Typed(), **{**COMMON, "num_shards": 0})
