import io
import itertools
import os
import shutil
from collections import Counter
from dataclasses import fields, replace

import jax
import numpy as np
import pytest
from PIL import Image
from small_sets import encode_all, make_session, with_sources

from data_pipelines.encoded import codec_header, encoded_directory
from data_pipelines.laid_out import segments_of
from data_pipelines.loader import (
    RowLoader,
    eval_batches,
    process_batches,
)
from data_pipelines.record_writer import SessionWriter
from data_pipelines.records import RecordKind, read_manifest, shard_name
from data_pipelines.rows import loss_weight_table
from tml.batch import Batch, max_tiles_per_row
from tml.codec.audio import pad_frames
from tml.config import Boundary, DataConfig, LossConfig, MicroTurnConfig, SlotScheme, SourceConfig, SourceKind
from tml.mesh import RowPart
from tml.microturn import Kind, Layout, Target
from tml.session import Stream, VideoFrame


def same(left: Batch, right: Batch) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(left), jax.tree.leaves(right)))


def take(batches, count):
    return list(itertools.islice(batches, count))


def concatenated(parts):
    return jax.tree.map(lambda *columns: np.concatenate(columns), *parts)


@pytest.fixture
def loader(mixture, tokenizer):
    return RowLoader(mixture.data.sources, mixture, tokenizer)


def test_row_is_a_function_of_its_position(mixture, tokenizer, loader):
    again = RowLoader(mixture.data.sources, mixture, tokenizer)
    positions = [140, 3, 77, 3, 0]
    rows = [again.rows([position]) for position in positions]
    assert all(same(row, loader.rows([position])) for row, position in zip(rows, positions, strict=True))
    assert not same(loader.rows([3]), loader.rows([77]))
    other = RowLoader(mixture.data.sources, replace(mixture, seed=1), tokenizer)
    assert not same(other.rows([3]), loader.rows([3]))


def train_batches(experiment, tokenizer, **steps):
    return process_batches(RowLoader(experiment.data.sources, experiment, tokenizer), experiment, **steps)


def test_any_number_of_processes_reads_the_same_global_batches(mixture, tokenizer):
    whole = take(train_batches(mixture, tokenizer, start_step=0), 20)
    for count in (2, 4):
        shares = [
            take(train_batches(mixture, tokenizer, start_step=0, part=RowPart(index=i, count=count, groups=(i,))), 20)
            for i in range(count)
        ]
        for step in range(20):
            assert same(concatenated([share[step] for share in shares]), whole[step])
    with pytest.raises(ValueError, match="rows_per_batch = 4 does not divide into 3 parts"):
        train_batches(mixture, tokenizer, start_step=0, part=RowPart(index=0, count=3, groups=(0,)))


def test_resume_at_any_step_is_the_uninterrupted_stream(mixture, tokenizer):
    whole = take(train_batches(mixture, tokenizer, start_step=0), 40)
    for step in (1, 14, 15, 37):
        resumed = take(train_batches(mixture, tokenizer, start_step=step), 3)
        assert all(same(batch, whole[step + i]) for i, batch in enumerate(resumed))


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (4, 8)])
def test_threads_change_nothing(mixture, tokenizer, threads, prefetch):
    other = replace(mixture, data=replace(mixture.data, read_threads=threads, prefetch_rows=prefetch))
    left = take(train_batches(mixture, tokenizer, start_step=0), 15)
    right = take(train_batches(other, tokenizer, start_step=0), 15)
    assert all(same(a, b) for a, b in zip(left, right, strict=True))


def test_every_record_of_an_epoch_appears_once_and_whole(mixture, loader):
    """The positions of the epoch's rows are those of the records that the order names, no more and no fewer."""
    index = loader._indexes.epoch(1)
    offsets = np.cumsum([0, *(len(source.records) for source in loader.sources)])
    order = [int(loader._indexes._order[k]) for k in range(50, 100)]
    placed = Counter(zip(index.source.tolist(), index.part.tolist(), strict=True))
    expected: Counter[tuple[int, int]] = Counter()
    for number in order:
        source = int(np.searchsorted(offsets, number, side="right")) - 1
        starts = loader.sources[source].laid_out.parts.part_starts
        record = number - int(offsets[source])
        expected.update((source, part) for part in range(starts[record], starts[record + 1]))
    assert placed == expected
    start = loader.rows_in_epoch(0)
    used = sum(int((loader.rows([start + r]).kinds_BS > 0).sum()) for r in range(index.num_rows))
    assert used == int(index.slots.sum())
    assert loader.padding_fraction(1) < 0.1


def test_rows_hold_what_the_layout_says(mixture, tokenizer, loader):
    """Every segment of every row of an epoch equals the part that the index names, whole turns at a time."""
    layout, table = Layout.of(mixture.turn, mixture.model, tokenizer.special), loss_weight_table(mixture.loss)
    index = loader._indexes.epoch(0)
    for r in range(index.num_rows):
        row, place = loader.rows([r]), 0
        for number, at in enumerate(range(index.row_starts[r], index.row_starts[r + 1]), start=1):
            source, part = loader.sources[index.source[at]], int(index.part[at])
            encoded, starts = source.records[int(index.record[at])], source.laid_out.parts.part_starts
            segments = segments_of(encoded, layout, 128)
            first_part = int(starts[index.record[at]])
            if source.name == "c":
                segment, first = segments[part - first_part], 0
            else:
                segment = segments[0]
                first = int(source.laid_out.parts.slots[first_part:part].sum())
                assert first in segment.turn_starts
                assert first + index.slots[at] in segment.turn_starts
            there, here = slice(first, first + index.slots[at]), slice(place, place + index.slots[at])
            np.testing.assert_array_equal(row.tokens_BS[0, here], segment.tokens[there])
            np.testing.assert_array_equal(row.kinds_BS[0, here], segment.kinds[there])
            np.testing.assert_array_equal(row.targets_BS[0, here], segment.targets[there])
            np.testing.assert_array_equal(row.target_kinds_BS[0, here], segment.target_kinds[there])
            np.testing.assert_array_equal(row.loss_weights_BS[0, here], table[segment.target_kinds[there]])
            np.testing.assert_array_equal(row.positions_BS[0, here], np.arange(index.slots[at]))
            assert (row.segment_ids_BS[0, here] == number).all()
            if source.name != "c":
                heard = row.levels_BSM[0, here][segment.kinds[there] == Kind.AUDIO]
                frames = segment.source[there][segment.kinds[there] == Kind.AUDIO]
                num_frames = 4 * (len(segment.turn_starts) - 1)
                np.testing.assert_array_equal(
                    heard, pad_frames(encoded.levels_TM, num_frames, mixture.model.audio)[frames]
                )
            assert not row.levels_BSM[0, here][segment.kinds[there] != Kind.AUDIO].any()
            place = here.stop
        for name in ("tokens_BS", "kinds_BS", "segment_ids_BS", "loss_weights_BS", "targets_BS", "levels_BSM"):
            assert not getattr(row, name)[0, place:].any()


def test_what_a_loader_keeps_in_a_data_set_is_overwritten_with_it(mixture, loader, tmp_path):
    loader.rows([0])
    folders = [
        shutil.copytree(source.path, tmp_path / name, symlinks=True) for name, source in mixture.data.sources.items()
    ]
    kept = {path.name.split("-")[0] for folder in folders for path in folder.rglob("*") if path.is_dir()}
    assert kept == {"encoded", "layout", "rows"}
    for folder in folders:
        with SessionWriter(folder, name="again", overwrite=True):
            pass
        assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", shard_name(0, 1)]


def test_loss_weights_come_from_the_config():
    table = loss_weight_table(
        LossConfig(
            listen_weight=1.0,
            speak_weight=2.0,
            text_weight=3.0,
            action_weight=4.0,
            document_weight=5.0,
            heard_weight=6.0,
        )
    )
    assert [float(table[kind]) for kind in Target] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0]


def test_most_tiles_of_a_row(mixture, tokenizer):
    """Against a search over every mix of turns that fits."""
    limits = {"max_text_in_per_turn": 2, "max_text_out_per_turn": 1}
    for boundary, slots, most, row_slots in itertools.product(Boundary, SlotScheme, (0, 1, 3), (5, 9, 10, 24, 31)):
        turn = MicroTurnConfig(boundary=boundary, slots=slots, **limits)
        layout = replace(Layout.of(mixture.turn, mixture.model, tokenizer.special), max_tiles_per_turn=most, turn=turn)
        others = (boundary is Boundary.TICK) + 4 + (1 if slots is SlotScheme.VARIABLE else 2 + 3)
        best = [0] * (row_slots + 1)
        for size in range(row_slots + 1):
            best[size] = max([best[size - others - t] + t for t in range(most + 1) if others + t <= size], default=0)
        assert max_tiles_per_row(layout, row_slots) == max(best)


def test_evaluation_reads_in_order_and_only_once(mixture, tokenizer):
    data = replace(mixture.data, eval_sources={"b": mixture.data.sources["b"]})
    experiment = replace(mixture, data=data)
    batches = eval_batches(experiment, tokenizer, 1_000)
    loader = RowLoader(data.eval_sources, experiment, tokenizer, shuffle=False)
    assert len(batches) == -(-loader.rows_in_epoch(0) // data.rows_per_batch)
    rows = loader._indexes.epoch(0)
    assert rows.record[0] == 0
    assert sorted(set(rows.record.tolist())) == list(range(25))
    assert len(eval_batches(experiment, tokenizer, 2)) == 2
    assert same(eval_batches(experiment, tokenizer, 2)[1], batches[1])
    assert eval_batches(replace(mixture, data=replace(data, eval_sources={})), tokenizer, 2) == []


def test_without_shuffle_an_epoch_is_one_pass_over_each_source(mixture, tokenizer):
    """Whatever their weights: here 40 records of weight 2 and 12 of weight 0.5, then the other way round."""
    for weights in ((2.0, 0.5), (0.5, 2.0)):
        sources = {n: replace(mixture.data.sources[n], weight=w) for n, w in zip(("a", "c"), weights, strict=True)}
        loader = RowLoader(sources, mixture, tokenizer, shuffle=False)
        for epoch in range(2):
            rows = loader._indexes.epoch(epoch)
            assert sorted(set(rows.record[rows.source == 0].tolist())) == list(range(40))
            assert sorted(set(rows.record[rows.source == 1].tolist())) == list(range(12))
        assert "a: 77% of segments" in loader.summary_lines()[0], "40 of 52"


def test_a_truncated_row_index_is_made_again_and_says_so(mixture, tokenizer, loader, capsys):
    expected = loader.rows([0])
    path = loader._indexes.directory / "epoch-000000.npz"
    whole = path.read_bytes()
    for size in (0, 2, 100, len(whole) - 10):
        path.write_bytes(whole[:size])
        assert same(RowLoader(mixture.data.sources, mixture, tokenizer).rows([0]), expected)
        assert path.read_bytes() == whole
        assert f"{path} is damaged and made again" in capsys.readouterr().err


def damaged_copy(mixture, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(next(iter(mixture.data.sources.values())).path + "/..", root)
    return with_sources(mixture, root)


def encoded_shard(experiment, tokenizer, name):
    source = experiment.data.sources[name]
    header = codec_header(RecordKind(source.kind.value), experiment.model, tokenizer.fingerprint())
    directory = encoded_directory(source.path, header)
    return directory / read_manifest(directory).shards[0].file


@pytest.mark.parametrize("damage", ["corrupt record", "truncated shard", "deleted shard"])
def test_damage_at_load_leaves_every_other_segment_as_it_was(mixture, tokenizer, tmp_path, loader, damage):
    loader.rows([0])
    damaged = damaged_copy(mixture, tmp_path)
    damaged = replace(damaged, data=replace(damaged.data, max_quarantined_fraction=1.0))
    shard = encoded_shard(damaged, tokenizer, "b")
    index = loader._indexes.epoch(0)
    match damage:
        case "corrupt record":
            victim = loader.sources[1].records[int(index.record[index.source == 1][0])]
            data = bytearray(shard.read_bytes())
            data[data.index(victim.session_id.encode()) + 500] ^= 0xFF
            shard.write_bytes(data)
        case "truncated shard":
            os.truncate(shard, 5_000)
        case "deleted shard":
            shard.unlink()
    hurt = RowLoader(damaged.data.sources, damaged, tokenizer)
    assert loader.rows_in_epoch(0) == hurt.rows_in_epoch(0)
    lost = 0
    for r in range(index.num_rows):
        expected, found = loader.rows([r]), hurt.rows([r])
        parts = range(index.row_starts[r], index.row_starts[r + 1])
        for number, part in enumerate(parts, start=1):
            bad = hurt.sources[index.source[part]].name == "b" and int(index.record[part]) in {
                entry.index for entry in hurt.quarantined["b"]
            }
            here = expected.segment_ids_BS[0] == number
            for f in fields(Batch):
                if f.name in ("tiles_BP", "own"):
                    continue
                value = getattr(found, f.name)[0, here]
                if bad:
                    assert not value.any(), "a quarantined segment is padding of the same length"
                else:
                    np.testing.assert_array_equal(value, getattr(expected, f.name)[0, here])
            lost += bad
    assert lost
    entries = hurt.quarantined["b"]
    assert all(entry.file == shard.name and entry.reason for entry in entries)
    assert len(entries) == len({entry.index for entry in entries})
    if damage == "corrupt record":
        assert len(entries) == 1
    hurt.rows([0])
    assert hurt.quarantined["b"] == entries, "each is counted once"


def test_damage_above_the_fraction_is_fatal(mixture, tokenizer, tmp_path):
    damaged = damaged_copy(mixture, tmp_path)
    encoded_shard(damaged, tokenizer, "b").unlink()
    with pytest.raises(ValueError, match=r"data source b: 8 of 25 records are unreadable, .* = 0.3; .*missing"):
        take(train_batches(damaged, tokenizer, start_step=0), 200)


def test_quarantined_while_encoding_keeps_the_order(mixture, tokenizer, tmp_path, loader):
    """A lost session shard changes which segments are there, never which record comes when."""
    damaged = damaged_copy(mixture, tmp_path)
    damaged = replace(damaged, data=replace(damaged.data, max_quarantined_fraction=0.6))
    source = damaged.data.sources["a"]
    (next(iter((tmp_path / "copy" / "a").glob("shard-00001*")))).unlink()
    for encoded in (tmp_path / "copy" / "a").glob("encoded-*"):
        shutil.rmtree(encoded)
    encode_all(damaged, tokenizer)
    hurt = RowLoader(damaged.data.sources, damaged, tokenizer)
    assert {entry.index for entry in hurt.quarantined["a"]} == set(range(20, 40))
    assert "missing" in hurt.quarantined["a"][0].reason
    assert [int(hurt._indexes._order[k]) for k in range(100)] == [int(loader._indexes._order[k]) for k in range(100)]
    index = hurt._indexes.epoch(0)
    stubs = index.slots == 0
    assert set(index.record[stubs & (index.source == 0)].tolist()) <= set(range(20, 40))
    assert not (index.record[~stubs & (index.source == 0)] >= 20).any()
    for r in range(index.num_rows):
        hurt.rows([r])
    strict = replace(damaged, data=replace(damaged.data, max_quarantined_fraction=0.4))
    with pytest.raises(ValueError, match=f"data source a: 20 of 40 records .* = 0.4; the first is .*{'missing'}"):
        RowLoader({"a": source}, strict, tokenizer)


def test_sources_that_are_not_there(mixture, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="names no data sources"):
        train_batches(replace(mixture, data=DataConfig()), tokenizer, start_step=0)
    with pytest.raises(FileNotFoundError, match="not a data set"):
        train_batches(with_sources(mixture, tmp_path), tokenizer, start_step=0)
    other_rate = replace(mixture, model=replace(mixture.model, audio=replace(mixture.model.audio, level_low=-6.0)))
    with pytest.raises(FileNotFoundError, match=r"not encoded; run launch.encode"):
        train_batches(other_rate, tokenizer, start_step=0)


def test_sources_that_do_not_fit_the_config(mixture, tokenizer):
    books = {"c": replace(mixture.data.sources["c"], kind=SourceKind.SESSIONS)}
    with pytest.raises(ValueError, match=r"holds documents, but its kind in data.sources is sessions"):
        RowLoader(books, mixture, tokenizer)
    small = replace(mixture, model=replace(mixture.model, vocab_size=256))
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, the model 256 logits; raise"):
        RowLoader(small.data.sources, small, tokenizer)


def test_batches_have_the_shape_of_the_config(mixture, tokenizer, loader):
    batch = next(process_batches(loader, mixture, start_step=5))
    assert batch.tokens_BS.shape == (4, 128)
    assert batch.levels_BSM.shape == (4, 128, 80)
    assert batch.tiles_BP.shape == (4, 0, 2, 40, 40, 3)


def picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((40, 30, 3), number, np.uint8)).save(data, "PNG")
    return data.getvalue()


def test_tiles_of_packed_sessions_stand_where_the_index_says(mixture, tokenizer, tmp_path):
    with SessionWriter(tmp_path / "video", name="video") as writer:
        for number in range(6):
            session = make_session(number, (1.0, 1.5))
            frames = tuple(VideoFrame(sample=i * 3_200, data=picture(10 * number + i)) for i in range(5))
            writer.write(replace(session, frames=frames, streams=(*session.streams, Stream.VIDEO)))
    model = replace(mixture.model, video=replace(mixture.model.video, max_tiles_per_turn=2))
    source = SourceConfig(path=str(tmp_path / "video"))
    data = replace(mixture.data, sources={"video": source}, segments_per_epoch=6, row_slots=160)
    experiment = replace(mixture, model=model, data=data)
    encode_all(experiment, tokenizer)
    loader = RowLoader(data.sources, experiment, tokenizer)
    layout = Layout.of(experiment.turn, model, tokenizer.special)
    seen = []
    for r in range(loader.rows_in_epoch(0)):
        row = loader.rows([r])
        assert row.tiles_BP.shape[1] == max_tiles_per_row(layout, 160)
        slots = np.flatnonzero(row.kinds_BS[0] == Kind.TILE)
        assert row.tile_index_BS[0, slots].tolist() == list(range(len(slots)))
        assert (row.tokens_BS[0, slots] == tokenizer.special.tile).all()
        assert len(set(row.segment_ids_BS[0, slots].tolist())) == row.segment_ids_BS.max()
        seen += row.tiles_BP[0, : len(slots), :, 0, 0, 0].tolist()
        assert not row.tiles_BP[0, len(slots) :].any()
    expected = [[10 * n + i, 10 * n + min(i + 1, 4)] for n in range(6) for i in (0, 2, 4)]
    assert sorted(seen) == expected
