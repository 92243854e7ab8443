from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.encoded import EncodedDocument
from data_pipelines.loader import RowLoader, layout_of
from data_pipelines.row_index import layout_hash, pack, part_table, parts_of, record_order
from tml.config import Boundary, MicroTurnConfig
from tml.session import SessionError


def first(order, count):
    return [int(order[k]) for k in range(count)]


def test_order_is_a_function_of_the_seed():
    lengths, weights = [30, 20], [2.0, 1.0]
    order = first(record_order(lengths, weights, 3), 200)
    assert order == first(record_order(lengths, weights, 3), 200)
    assert order != first(record_order(lengths, weights, 4), 200)
    again = record_order(lengths, weights, 3)
    assert [int(again[k]) for k in (150, 7, 99)] == [order[k] for k in (150, 7, 99)]


def test_every_pass_holds_each_record_once_in_another_order():
    order = np.array(first(record_order([30, 20], [2.0, 1.0], 3), 180))
    of_first, of_second = order[order < 30], order[order >= 30] - 30
    assert abs(len(of_first) - 120) <= 1
    passes = of_first[:90].reshape(3, 30)
    assert (np.sort(passes, axis=1) == np.arange(30)).all()
    assert len({tuple(row) for row in passes}) == 3
    assert (np.sort(of_second[:20]) == np.arange(20)).all()


def test_neighbouring_seeds_share_no_pass():
    def passes(seed):
        return {tuple(first(record_order([30], [1.0], seed), 90)[k : k + 30]) for k in (0, 30, 60)}

    assert not passes(3) & passes(4)


def test_without_a_seed_sources_are_read_in_order():
    order = np.array(first(record_order([3, 2], [3.0, 2.0], None), 10))
    assert order[order < 3].tolist() == [0, 1, 2, 0, 1, 2]
    assert order[order >= 3].tolist() == [3, 4, 3, 4]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=400))
def test_rows_are_never_too_full(slots):
    rows = pack(np.array(slots), 100)
    assert np.bincount(rows, weights=slots).max() <= 100
    assert set(rows.tolist()) == set(range(int(rows.max()) + 1))


def test_little_padding():
    slots = np.random.default_rng(0).integers(40, 400, 4_096)
    num_rows = int(pack(slots, 512).max()) + 1
    assert slots.sum() / (num_rows * 512) > 0.95


def test_parts_cut_between_turns_and_join_to_the_whole(mixture, tokenizer):
    loader = RowLoader(mixture.data.sources, mixture, tokenizer)
    layout = layout_of(mixture, tokenizer)
    cut = 0
    for source in loader.sources[:2]:
        for index in range(len(source.records)):
            encoded = source.records[index]
            segment = layout.lay_out(layout.contents(encoded))
            parts = parts_of(encoded, layout, 128)
            cut += len(parts) > 1
            assert [part[0] for part in parts] == [0, *(part[1] for part in parts[:-1])]
            assert parts[-1][1] == segment.num_slots
            assert all(0 < last - first_slot == slots <= 128 for first_slot, last, slots in parts)
            assert {part[0] for part in parts} <= set(segment.turn_starts.tolist()), "a tick is never split"
    assert cut > 5, "some of these sessions are longer than a row"


def test_documents_are_cut_to_pieces_that_fill_rows(mixture, tokenizer):
    layout = layout_of(mixture, tokenizer)
    for size in (0, 1, 125, 126, 127, 252, 1_000):
        document = EncodedDocument(document_id="d", tokens=np.arange(size, dtype=np.int32))
        parts = parts_of(document, layout, 128)
        assert sum(last - begin for begin, last, _ in parts) == size
        assert all(slots == last - begin + 2 <= 128 for begin, last, slots in parts)
        assert all(slots == 128 for _, _, slots in parts[:-1])


def test_layout_hash_covers_layout_and_row(mixture, tokenizer):
    layout = layout_of(mixture, tokenizer)
    others = [
        (layout, 256),
        (replace(layout, max_tiles_per_turn=1), 128),
        (replace(layout, turn=MicroTurnConfig(boundary=Boundary.NONE)), 128),
        (replace(layout, clock=replace(layout.clock, turn_samples=6_400)), 128),
        (replace(layout, special=replace(layout.special, speak=99)), 128),
    ]
    assert len({layout_hash(*other) for other in [(layout, 128), *others]}) == 6


def test_part_table_is_kept(mixture, tokenizer):
    records = RowLoader(mixture.data.sources, mixture, tokenizer).sources[0].records
    layout = layout_of(mixture, tokenizer)
    path = records.directory / f"parts-{layout_hash(layout, 128)}.npz"
    before = path.stat().st_mtime_ns
    table = part_table(records, layout, 128)
    assert path.stat().st_mtime_ns == before
    assert len(table.part_starts) == len(records) + 1
    assert table.slots.min() > 0
    assert not list(records.directory.glob(".*")), "no unfinished file is left"


def test_turn_longer_than_a_row_is_an_error(mixture, tokenizer):
    loader = RowLoader(mixture.data.sources, mixture, tokenizer)
    with pytest.raises(SessionError, match=r"data.row_slots is 5"):
        parts_of(loader.sources[0].records[0], layout_of(mixture, tokenizer), 5)
