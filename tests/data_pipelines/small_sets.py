"""Small sessions and data sets for the tests beside this file."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipelines.encoding import encode_dataset
from tml.codec.text import Tokenizer
from tml.codec.waveform import encode_clip
from tml.config import Experiment
from tml.session import Session, Stream, TextEvent

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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
