"""Clips with transcripts: imported, packed beside sessions of other kinds, their words learnt where they end."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from recordings import SENTENCES, speech, write_clip
from small_sets import WORDS, encode_all, make_session

from data_pipelines.clips_importer import find_clips, read_clip
from data_pipelines.forced_alignment import ForcedAligner
from data_pipelines.importing import write_sessions
from data_pipelines.loader import RowLoader
from data_pipelines.record_writer import SessionWriter
from data_pipelines.records import iter_sessions
from tml.codec.text import Tokenizer, train_tokenizer
from tml.config import DataConfig, Experiment, LossConfig, ModelConfig, SourceConfig
from tml.microturn import Kind, Target

HEARD_WEIGHT, NUM_CLIPS, HOP_SAMPLES = 3.0, 3, 800


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One that knows these words: spelt in bytes, they would not fit in their sessions."""
    return train_tokenizer([*SENTENCES, " ".join(WORDS)] * 3, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Experiment:
    root, aligner = tmp_path_factory.mktemp("pairs"), ForcedAligner()
    for index in range(NUM_CLIPS):
        write_clip(root / "in" / f"{index}.wav", speech(index).samples, SENTENCES[index])
    write_sessions(
        root / "clips", find_clips(root / "in").clips, lambda clip: read_clip(clip, aligner), file_of=str, name="clips"
    )
    with SessionWriter(root / "talk", name="talk", num_shards=1) as writer:
        for number in range(3):
            writer.write(make_session(number, (1.0, 2.0)))
    data = DataConfig(
        sources={name: SourceConfig(path=str(root / name)) for name in ("clips", "talk")},
        row_slots=320,
        rows_per_batch=2,
        segments_per_epoch=40,
    )
    loss = LossConfig(heard_weight=HEARD_WEIGHT)
    made = Experiment(name="pairs", model=ModelConfig(vocab_size=tokenizer.vocab_size), data=data, loss=loss)
    encode_all(made, tokenizer)
    return made


def test_words_of_a_clip_are_targets_where_they_end(experiment: Experiment, tokenizer: Tokenizer) -> None:
    loader = RowLoader(experiment.data.sources, experiment, tokenizer)
    sessions = list(iter_sessions(Path(experiment.data.sources["clips"].path)))
    words_of = {}
    for session in sessions:
        found = [(tokenizer.encode_word(word.text.lower()), word.end) for word in session.user_words]
        words_of[tuple(itertools.chain(*(tokens for tokens, _ in found)))] = found
    seen, mixed = set(), 0
    for position in range(10):
        row = jax.tree.map(lambda leaf: leaf[0], loader.rows([position]))
        kinds = set()
        for number in range(1, int(row.segment_ids_BS.max()) + 1):
            here = np.flatnonzero(row.segment_ids_BS == number)
            learnt = here[row.target_kinds_BS[here] == Target.HEARD]
            kinds.add(bool(len(learnt)))
            if not len(learnt):
                continue
            assert np.all(row.loss_weights_BS[learnt] == HEARD_WEIGHT)
            assert np.all(row.kinds_BS[learnt] == Kind.AUDIO)
            said = tuple(row.targets_BS[learnt].tolist())
            # Only the last tokens may find no position behind the last word.
            [whole] = [tokens for tokens in words_of if tokens[: len(said)] == said]
            assert len(said) > 0.8 * len(whole)
            frames = np.searchsorted(here[row.kinds_BS[here] == Kind.AUDIO], learnt)
            first = 0
            for tokens, end in words_of[whole]:
                if first < len(said):
                    assert frames[first] >= -(-end // HOP_SAMPLES) - 1, "learnt before it has ended"
                first += len(tokens)
            seen.add(whole)
        mixed += len(kinds) == 2
    assert seen == set(words_of)
    assert mixed, "no row holds a clip beside another session"
