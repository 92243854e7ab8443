"""Pictures with captions: imported, packed beside sessions of a model with a voice, and learnt from."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from small_model import small_experiment, small_session
from small_sets import WORDS, encode_all
from tiny import VOICE

from data_pipelines.clips_importer import find_clips
from data_pipelines.documents import Document, decode_document, encode_document, pieces
from data_pipelines.encoded import EncodedDocument
from data_pipelines.importing import import_as_documents
from data_pipelines.laid_out import segments_of
from data_pipelines.loader import RowLoader
from data_pipelines.pictures_importer import PICTURE_SUFFIXES, read_picture
from data_pipelines.record_writer import SessionWriter
from tml.codec.text import Tokenizer
from tml.codec.video import picture_tiles
from tml.config import DataConfig, Experiment, SourceConfig, SourceKind, VideoConfig
from tml.microturn import Kind, Layout, Target
from tml.model import transformer
from tml.params import init_params
from tml.session import SessionError

VIDEO = VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(6, 10), max_tiles_per_turn=3)
NUM_PICTURES = 5


def make_pictures(folder: Path) -> None:
    """Pictures of two to four tiles, some with short captions and some with long ones."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        pixels = rng.integers(0, 256, (4, 4 * (1 + number % 3) - 1, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(" ".join(WORDS[number : 3 * number + 1]))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Experiment:
    root = tmp_path_factory.mktemp("pictures")
    make_pictures(root / "in")
    found = find_clips(root / "in", suffixes=PICTURE_SUFFIXES)
    summary = import_as_documents(found.clips, read_picture, root / "pictures", file_of=str, name="pictures")
    assert (summary.records, summary.failures) == (NUM_PICTURES, [])
    with SessionWriter(root / "talk", name="talk", num_shards=1) as writer:
        for number in range(3):
            writer.write(small_session(number))
    made = small_experiment(VOICE, VIDEO, vocab_size=tokenizer.vocab_size)
    sources = {
        "talk": SourceConfig(path=str(root / "talk")),
        "pictures": SourceConfig(path=str(root / "pictures"), kind=SourceKind.DOCUMENTS, weight=3.0),
    }
    data = DataConfig(sources=sources, row_slots=96, rows_per_batch=2, segments_per_epoch=40)
    experiment = Experiment(name="pictures", model=made.model, turn=made.turn, data=data)
    encode_all(experiment, tokenizer)
    return experiment


def test_rows_hold_pictures_beside_sessions_and_their_captions_are_targets(
    experiment: Experiment, tokenizer: Tokenizer
) -> None:
    loader = RowLoader(experiment.data.sources, experiment, tokenizer)
    source = Path(experiment.data.sources["pictures"].path).parent / "in"
    wanted = {}
    for number in range(NUM_PICTURES):
        tokens = tuple(tokenizer.encode((source / f"{number}.txt").read_text()))
        wanted[tokens] = picture_tiles((source / f"{number}.png").read_bytes(), VIDEO)
    seen, mixed = set(), 0
    for position in range(12):
        row = jax.tree.map(lambda leaf: leaf[0], loader.rows([position]))
        kinds_of_segments = set()
        for number in range(1, int(row.segment_ids_BS.max()) + 1):
            here = np.flatnonzero(row.segment_ids_BS == number)
            kinds_of_segments.add(row.tokens_BS[here[0]] == tokenizer.special.document)
            if row.tokens_BS[here[0]] != tokenizer.special.document:
                continue
            tiles = here[row.kinds_BS[here] == Kind.TILE]
            learnt = here[row.target_kinds_BS[here] == Target.DOCUMENT]
            *caption, end = row.targets_BS[learnt].tolist()
            assert end == tokenizer.special.end_of_text
            assert learnt[0] == tiles[-1], "the first word is learnt from the last tile"
            np.testing.assert_array_equal(row.tiles_BP[row.tile_index_BS[tiles]], wanted[tuple(caption)])
            assert np.all(row.loss_weights_BS[here] == (row.target_kinds_BS[here] == Target.DOCUMENT))
            seen.add(tuple(caption))
        mixed += len(kinds_of_segments) == 2
    assert seen == set(wanted)
    assert mixed


def test_the_image_tower_learns_from_a_caption(experiment: Experiment, tokenizer: Tokenizer) -> None:
    batch = RowLoader(experiment.data.sources, experiment, tokenizer).rows([0, 1])
    params = init_params(transformer.specs(experiment.model), jax.random.key(0))
    is_caption = batch.target_kinds_BS == Target.DOCUMENT
    assert is_caption.any()

    def loss(params, batch):
        logits_BSV = transformer.apply(params, batch, experiment.model).logits_BSV
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_BSV), batch.targets_BS[:, :, None], axis=2)[:, :, 0]
        return -jnp.sum(jnp.where(is_caption, chosen, 0.0))

    gradients = jax.jit(jax.grad(loss))(params, batch)["embed"]["video"]
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))


def test_a_picture_is_laid_out_before_its_text_and_takes_no_more_tiles_than_turns_do(
    experiment: Experiment, tokenizer: Tokenizer
) -> None:
    layout, special = Layout.of(experiment.turn, experiment.model, tokenizer.special), tokenizer.special
    segment = layout.lay_out_document([40, 41], num_tiles=4)
    assert segment.tokens[:8].tolist() == [special.document, *[special.tile] * 4, 40, 41, special.end_of_text]
    assert segment.kinds[:8].tolist() == [Kind.TOKEN, *[Kind.TILE] * 4, *[Kind.TOKEN] * 3]
    assert segment.source[1:5].tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(segment.target_kinds == Target.DOCUMENT).tolist() == [4, 5, 6]
    assert segment.targets[4:7].tolist() == [40, 41, special.end_of_text]
    # Four tiles at three a turn: as many other positions as two turns have.
    assert segment.num_slots == 4 + 2 * (layout.min_slots_in + layout.min_slots_out)
    assert segment.tokens[8:].tolist() == [special.pad] * (segment.num_slots - 8)
    text = layout.lay_out_document([40, 41])
    assert text.tokens.tolist() == [special.document, 40, 41, special.end_of_text]


def test_what_cannot_be_is_refused(experiment: Experiment, tokenizer: Tokenizer, tmp_path: Path) -> None:
    layout = Layout.of(experiment.turn, experiment.model, tokenizer.special)
    blind = Layout.of(experiment.turn, small_experiment().model, tokenizer.special)
    with pytest.raises(SessionError, match="max_tiles_per_turn is 0"):
        blind.lay_out_document([40], num_tiles=1)
    make_pictures(tmp_path / "in")
    data = (tmp_path / "in" / "0.png").read_bytes()
    with pytest.raises(SessionError, match="this model has no eyes"):
        picture_tiles(data, VideoConfig())
    document = EncodedDocument(
        document_id="d", tokens=np.arange(30, dtype=np.int32), tiles_P=np.zeros((4, 2, 4, 4, 3), np.int16)
    )
    with pytest.raises(SessionError, match=r"picture of 4 tiles does not fit in a row of data.row_slots = 9"):
        segments_of(document, layout, 9)
    (tmp_path / "in" / "0.png").write_bytes(b"no picture")
    found = find_clips(tmp_path / "in", suffixes=PICTURE_SUFFIXES)
    summary = import_as_documents(
        found.clips, read_picture, tmp_path / "out", file_of=lambda p: str(p.path), max_failed_fraction=0.5, name="out"
    )
    assert summary.records == NUM_PICTURES - 1
    assert "cannot be decoded as a picture" in summary.failures[0].reason


def test_a_document_keeps_its_picture_and_its_first_piece_has_it() -> None:
    document = Document(document_id="d", text="one two three four", picture=b"bytes")
    assert decode_document(encode_document(document)) == document
    found = list(pieces(document, 9))
    assert len(found) > 1
    assert [piece.picture for piece in found] == [b"bytes"] + [b""] * (len(found) - 1)
