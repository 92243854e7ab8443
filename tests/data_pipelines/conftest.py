"""Small data sets, written and encoded by the real components."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.documents import Document, write_documents
from data_pipelines.encoding import encode_dataset
from data_pipelines.records import SessionWriter
from tml.codec.text import Tokenizer, train_tokenizer
from tml.codec.waveform import encode_clip
from tml.config import DataConfig, Experiment, ModelConfig, SourceConfig, SourceKind
from tml.session import Session, Stream, TextEvent

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 3, 300, tmp_path_factory.mktemp("tokenizer"))


def make_session(number: int, seconds: tuple[float, float] = (1.0, 6.0), rate: int = 16_000) -> Session:
    """A session of noise in which words are said and typed."""
    rng = np.random.default_rng(number)
    size = int(rng.uniform(*seconds) * rate)
    samples = rng.normal(0, 0.1, size).astype(np.float32)
    starts = np.sort(rng.integers(0, max(1, size - rate // 2), 4)).tolist()
    texts = tuple(
        TextEvent(stream=stream, start=start, end=min(start + rate // 10, size), text=WORDS[rng.integers(10)])
        for stream, start in zip(
            (Stream.USER_TEXT, Stream.OWN_TEXT, Stream.OWN_TEXT, Stream.OWN_TEXT), starts, strict=True
        )
    )
    return Session(
        session_id=f"session-{number}",
        sample_rate_hz=rate,
        num_samples=size,
        streams=(Stream.USER_AUDIO, Stream.USER_TEXT, Stream.OWN_TEXT),
        audio={Stream.USER_AUDIO: encode_clip(samples, rate)},
        texts=texts,
    )


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


def encode_all(experiment: Experiment, tokenizer: Tokenizer, num_workers: int = 1) -> None:
    for source in experiment.data.sources.values():
        encode_dataset(
            source.path,
            experiment.model,
            tokenizer,
            max_quarantined_fraction=experiment.data.max_quarantined_fraction,
            num_workers=num_workers,
        )


def with_sources(experiment: Experiment, root: Path, **data: object) -> Experiment:
    """The experiment with its sources below another directory, and other data settings."""
    sources = {
        name: replace(source, path=str(root / Path(source.path).name))
        for name, source in experiment.data.sources.items()
    }
    return replace(experiment, data=replace(experiment.data, **{"sources": sources, **data}))
