from dataclasses import replace

import numpy as np
import pytest
from small_sets import make_session

from data_pipelines.encoded import EncodedDocument, EncodedSource
from data_pipelines.encoding import encode_dataset
from data_pipelines.laid_out import laid_out_directory, lay_out_source, layout_hash, segments_of
from data_pipelines.loader import RowLoader
from data_pipelines.record_writer import SessionWriter
from tml.config import Boundary, MicroTurnConfig
from tml.microturn import Kind, Layout


def test_parts_cut_between_turns_and_join_to_the_whole(mixture, tokenizer):
    layout, cut = Layout.of(mixture.turn, mixture.model, tokenizer.special), 0
    for source in RowLoader(mixture.data.sources, mixture, tokenizer).sources[:2]:
        laid_out = source.laid_out
        for index in range(len(source.records)):
            encoded = source.records[index]
            segment = layout.lay_out(layout.contents(encoded))
            parts = range(*laid_out.parts.part_starts[index : index + 2].tolist())
            cut += len(parts) > 1
            first = int(laid_out.parts.begin[parts[0]])
            begins = [int(laid_out.parts.begin[part]) - first for part in parts]
            ends = [begin + int(laid_out.parts.slots[part]) for begin, part in zip(begins, parts, strict=True)]
            assert [*begins, segment.num_slots] == [0, *ends], "the parts join"
            assert set(begins) <= set(segment.turn_starts.tolist()), "a tick is never split"
            assert all(0 < end - begin <= 128 for begin, end in zip(begins, ends, strict=True))
            for name in ("tokens", "targets", "kinds", "target_kinds"):
                flat = getattr(laid_out, name)[first : first + segment.num_slots]
                np.testing.assert_array_equal(flat, getattr(segment, name))
            for begin, end, part in zip(begins, ends, parts, strict=True):
                frames = segment.source[begin:end][segment.kinds[begin:end] == Kind.AUDIO]
                assert frames.tolist() == list(range(frames[0], frames[-1] + 1))
                assert laid_out.parts.first_frame[part] == frames[0]
    assert cut > 5, "some of these sessions are longer than a row"


def test_documents_are_cut_to_pieces_that_fill_rows(mixture, tokenizer):
    layout, special = Layout.of(mixture.turn, mixture.model, tokenizer.special), tokenizer.special
    for size in (0, 1, 125, 126, 127, 252, 1_000):
        tokens, tiles_P = np.arange(20, 20 + size, dtype=np.int32), np.zeros((0, 2, 4, 4, 3), np.int16)
        document = EncodedDocument(document_id="d", tokens=tokens, tiles_P=tiles_P)
        pieces = segments_of(document, layout, 128)
        assert np.concatenate([piece.tokens[1:-1] for piece in pieces]).tolist() == document.tokens.tolist()
        assert all(piece.tokens[[0, -1]].tolist() == [special.document, special.end_of_text] for piece in pieces)
        assert all(piece.num_slots == 128 for piece in pieces[:-1])
        assert pieces[-1].num_slots <= 128


def test_layout_hash_covers_layout_and_row(mixture, tokenizer):
    layout = Layout.of(mixture.turn, mixture.model, tokenizer.special)
    others = [
        (layout, 256),
        (replace(layout, max_tiles_per_turn=1), 128),
        (replace(layout, turn=MicroTurnConfig(boundary=Boundary.NONE)), 128),
        (replace(layout, clock=replace(layout.clock, turn_samples=6_400)), 128),
        (replace(layout, special=replace(layout.special, speak=99)), 128),
    ]
    assert len({layout_hash(*other) for other in [(layout, 128), *others]}) == 6


def test_a_source_is_laid_out_once(mixture, tokenizer):
    layout = Layout.of(mixture.turn, mixture.model, tokenizer.special)
    source = RowLoader(mixture.data.sources, mixture, tokenizer).sources[0].records
    directory = laid_out_directory(source, layout, 128)
    before = directory.stat().st_mtime_ns
    again = lay_out_source(source, layout, 128)
    assert directory.stat().st_mtime_ns == before
    assert len(again.parts.part_starts) == len(source) + 1
    assert not list(source.directory.glob(".*")), "nothing unfinished is left"


@pytest.fixture
def source(tmp_path, mixture, tokenizer):
    with SessionWriter(tmp_path / "set", name="set") as writer:
        for number in range(4):
            writer.write(make_session(number))
    return encode_dataset(tmp_path / "set", mixture.model, tokenizer, max_quarantined_fraction=0.0)


def test_what_the_layout_cannot_hold_takes_no_positions(source, mixture, tokenizer):
    """A micro-turn that is longer than a row, and one that is not."""
    layout = Layout.of(mixture.turn, mixture.model, tokenizer.special)
    assert not lay_out_source(source, layout, 20).quarantined
    laid_out = lay_out_source(source, layout, 8)
    assert {entry.index for entry in laid_out.quarantined} == {0, 1, 2, 3}
    assert "data.row_slots is 8" in laid_out.quarantined[0].reason
    assert laid_out.parts.slots.tolist() == [0, 0, 0, 0]
    assert len(laid_out.tokens) == 0


def test_damaged_layout_is_refused_with_the_way_out(source, mixture, tokenizer):
    layout = Layout.of(mixture.turn, mixture.model, tokenizer.special)
    lay_out_source(source, layout, 128)
    directory = laid_out_directory(source, layout, 128)
    (directory / "kinds.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"kinds.bin has 2 bytes instead of \d+; remove .*layout-"):
        lay_out_source(source, layout, 128)


@pytest.mark.parametrize("size", [None, 0, 2, 100, -10])
def test_truncated_parts_are_refused_with_the_way_out(source, mixture, tokenizer, size):
    layout = Layout.of(mixture.turn, mixture.model, tokenizer.special)
    lay_out_source(source, layout, 128)
    path = laid_out_directory(source, layout, 128) / "parts.npz"
    whole = path.read_bytes()
    path.unlink() if size is None else path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"parts.npz is damaged .*; remove .*layout-\w+, it is made again$"):
        lay_out_source(source, layout, 128)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_fault_is_forgotten_when_it_is_gone(source, mixture, tokenizer, fraction):
    """A shard that cannot be reached for a while, with too many records for the fraction, or not."""
    layout = Layout.of(mixture.turn, mixture.model, tokenizer.special)
    directory = laid_out_directory(source, layout, 128)
    (shard,) = source.directory.glob("shard-*")
    shard.rename(shard.with_suffix(".away"))
    away = EncodedSource(source.directory, source.header)
    if fraction < 1.0:
        with pytest.raises(ValueError, match="set: 4 of 4 records are unreadable"):
            lay_out_source(away, layout, 128, max_quarantined_fraction=fraction, name="set")
        assert not directory.exists()
    else:
        assert len(lay_out_source(away, layout, 128).quarantined) == 4
        before = directory.stat().st_mtime_ns
        lay_out_source(away, layout, 128)
        assert directory.stat().st_mtime_ns == before, "it is not made again while the fault is there"
    shard.with_suffix(".away").rename(shard)
    back = lay_out_source(EncodedSource(source.directory, source.header), layout, 128)
    assert not back.quarantined
    assert (back.parts.slots > 0).all()
    assert not list(source.directory.glob(".*")), "nothing unfinished is left"


def test_what_encoding_quarantined_says_what_to_remove(tmp_path, mixture, tokenizer):
    with SessionWriter(tmp_path / "set", name="set") as writer:
        writer.write(make_session(0))
    (shard,) = (tmp_path / "set").glob("shard-*")
    shard.unlink()
    source = encode_dataset(tmp_path / "set", mixture.model, tokenizer, max_quarantined_fraction=1.0)
    layout = Layout.of(mixture.turn, mixture.model, tokenizer.special)
    with pytest.raises(ValueError, match=f"1 of 1 records .*; mend the data, remove {source.directory} and run"):
        lay_out_source(source, layout, 128, max_quarantined_fraction=0.0)
