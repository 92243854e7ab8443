"""Small data sets, written and encoded by the real components."""

import numpy as np
import pytest
from small_sets import WORDS, encode_all, make_session

from data_pipelines.documents import Document, write_documents
from data_pipelines.record_writer import SessionWriter
from tml.codec.text import Tokenizer, train_tokenizer
from tml.config import DataConfig, Experiment, ModelConfig, SourceConfig, SourceKind


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 3, 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory, tokenizer) -> Experiment:
    """An experiment over two sets of sessions and one of documents, written and encoded; tests copy it."""
    root = tmp_path_factory.mktemp("mixture")
    for name, numbers in (("a", range(40)), ("b", range(100, 125))):
        with SessionWriter(root / name, name=name, num_shards=2) as writer:
            for number in numbers:
                writer.write(make_session(number))
    rng = np.random.default_rng(0)
    documents = [
        Document(document_id=f"d{i}", text=" ".join(rng.choice(WORDS, rng.integers(5, 150)))) for i in range(12)
    ]
    write_documents(root / "c", documents, name="c")
    sources = {
        "a": SourceConfig(path=str(root / "a"), weight=2.0),
        "b": SourceConfig(path=str(root / "b")),
        "c": SourceConfig(path=str(root / "c"), weight=0.5, kind=SourceKind.DOCUMENTS),
    }
    data = DataConfig(
        sources=sources,
        row_slots=128,
        rows_per_batch=4,
        segments_per_epoch=50,
        max_quarantined_fraction=0.3,
        read_threads=2,
        prefetch_rows=4,
    )
    experiment = Experiment(name="mixture", model=ModelConfig(vocab_size=tokenizer.vocab_size), data=data)
    encode_all(experiment, tokenizer)
    return experiment
