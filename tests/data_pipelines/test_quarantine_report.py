"""Records that are lost while reading are announced."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_sets import with_sources

from data_pipelines.loader import RowLoader, encoded_place
from data_pipelines.records import read_manifest


def test_the_first_ten_lost_records_have_a_line_each_and_then_only_their_number(
    mixture, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, source in mixture.data.sources.items():
        shutil.copytree(source.path, tmp_path / name)
    damaged = with_sources(mixture, tmp_path, max_quarantined_fraction=0.5)
    damaged = replace(damaged, data=replace(damaged.data, sources={"a": damaged.data.sources["a"]}))
    RowLoader(damaged.data.sources, damaged, tokenizer)  # lays out what is still whole
    place = encoded_place(damaged.data.sources["a"], damaged, tokenizer)
    shard = place / read_manifest(place).shards[0].file
    shard.unlink()
    loader = RowLoader(damaged.data.sources, damaged, tokenizer)
    assert capsys.readouterr().err == ""
    row = 0
    while len(loader.quarantined["a"]) < 16:
        loader.rows([row])
        row += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    for line, entry in zip(lines[:10], loader.quarantined["a"][:10], strict=True):
        assert line == f"data source a: {shard}, record {entry.record} is quarantined: the shard is missing"
    assert lines[10] == "16 records were quarantined while reading so far"
