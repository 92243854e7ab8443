"""Speech: sound with the words in it and where they stand, whatever made it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import soxr
from jaxtyping import Float32, Int16

from tml.session import Word

SAMPLE_RATE_HZ = 16_000
"""The clock of every synthesised or recorded clip of this package."""

FRAME_S = 0.01
"""Length of the frames in which the level of speech is measured."""

AUDIBLE_DB = -40.0
"""A frame this far below the loudest one is silence; steady vowels of speech lie within 25 dB of each other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Speech:
    """One utterance at 16 kHz.

    Attributes:
        samples: in [-1, 1].
        start: first audible sample.
        end: one past the last audible sample.
        words: with their times where the maker knows them, else empty.
    """

    samples: Float32[np.ndarray, " n"]
    start: int
    end: int
    words: tuple[Word, ...] = ()


@runtime_checkable
class Speaker(Protocol):
    """A voice that can say things: the same text gives the same bytes in every process."""

    @property
    def maker(self) -> str:
        """The program or corpus the voice comes from."""

    @property
    def name(self) -> str:
        """What tells the voice from every other."""

    def say(self, text: str) -> Speech:
        """The text spoken."""


def audible_span(
    samples: Float32[np.ndarray, " n"], sample_rate_hz: int = SAMPLE_RATE_HZ, audible_db: float = AUDIBLE_DB
) -> tuple[int, int]:
    """First and one past the last sample of the frames of 10 ms that are audible; (0, 0) for silence.

    A frame is audible when its mean power is within `audible_db` of the loudest frame's.
    """
    frame = max(1, round(FRAME_S * sample_rate_hz))
    count = -(-len(samples) // frame)
    padded = np.zeros(count * frame, np.float32)
    padded[: len(samples)] = samples
    power = np.square(padded).reshape(count, frame).mean(axis=1)
    loudest = float(power.max()) if count else 0.0
    if loudest == 0.0:
        return 0, 0
    audible = np.flatnonzero(power >= loudest * 10 ** (audible_db / 10))
    return int(audible[0]) * frame, min(len(samples), (int(audible[-1]) + 1) * frame)


def speech_of(samples: Float32[np.ndarray, " n"], words: tuple[Word, ...] = ()) -> Speech:
    """Samples as Speech, its audible span measured.

    Raises:
        ValueError: there is nothing to hear.
    """
    start, end = audible_span(samples)
    if end == 0:
        raise ValueError(f"{len(samples)} samples of speech are all silent; the voice said nothing")
    return Speech(samples=samples, start=start, end=end, words=words)


def to_clock(samples: Int16[np.ndarray, " n"], rate_hz: int) -> Float32[np.ndarray, " m"]:
    """16-bit samples of any rate as samples in [-1, 1] at 16 kHz."""
    return soxr.resample(samples.astype(np.float32) / 32768, rate_hz, SAMPLE_RATE_HZ, quality="HQ")


def warp(samples: Float32[np.ndarray, " n"], factor: float) -> Float32[np.ndarray, " m"]:
    """The sound with pitch and formants `factor` times higher, and as much shorter: another person's vocal tract."""
    return samples if factor == 1.0 else soxr.resample(samples, factor * SAMPLE_RATE_HZ, SAMPLE_RATE_HZ, quality="HQ")


@dataclass(frozen=True, kw_only=True, eq=False)
class Utterance:
    """Speech with silences inside it; it begins with its first audible sample and ends with the last.

    Attributes:
        samples: in [-1, 1].
        pauses: the silences, [start, end).
        words: as in Speech.
    """

    samples: Float32[np.ndarray, " n"]
    pauses: tuple[tuple[int, int], ...]
    words: tuple[Word, ...]


def utter(speaker: Speaker, parts: Sequence[str], pauses_s: Sequence[float]) -> Utterance:
    """Says `parts`, with `pauses_s[i]` seconds from the audible end of part i to the audible start of the next.

    A voice that knows its word times says the whole sentence with commas between the parts, so that
    it sounds unfinished before a pause; others say each part by itself.
    """
    if len(parts) != len(pauses_s) + 1:
        raise ValueError(f"{len(parts)} parts need {len(parts) - 1} pauses, but there are {len(pauses_s)}")
    whole = speaker.say(", ".join(parts))
    if len(parts) == 1:
        pieces = [whole]
    else:
        pieces = _cut_at_commas(whole, len(parts)) if whole.words else [speaker.say(part) for part in parts]
    sounds: list[np.ndarray] = []
    pauses: list[tuple[int, int]] = []
    words: list[Word] = []
    place = 0
    for i, piece in enumerate(pieces):
        if i:
            silence = round(pauses_s[i - 1] * SAMPLE_RATE_HZ)
            pauses.append((place, place + silence))
            sounds.append(np.zeros(silence, np.float32))
            place += silence
        length = piece.end - piece.start
        sounds.append(piece.samples[piece.start : piece.end])
        shift = place - piece.start
        for word in piece.words:
            start, end = (min(max(sample + shift, place), place + length) for sample in (word.start, word.end))
            words.append(Word(text=word.text.rstrip(","), start=start, end=end))
        place += length
    return Utterance(samples=np.concatenate(sounds), pauses=tuple(pauses), words=tuple(words))


def _cut_at_commas(whole: Speech, num_parts: int) -> list[Speech]:
    """Cuts speech with word times in the middle of the gap behind every word that ends with a comma."""
    pieces: list[Speech] = []
    start, first = 0, 0
    lasts = [i for i, word in enumerate(whole.words[:-1]) if word.text.endswith(",")]
    if len(lasts) != num_parts - 1:
        raise ValueError(f"{num_parts} parts with {len(lasts)} commas between them; a part must not hold a comma")
    for last in [*lasts, len(whole.words) - 1]:
        is_end = last == len(whole.words) - 1
        stop = len(whole.samples) if is_end else (whole.words[last].end + whole.words[last + 1].start) // 2
        inside = whole.words[first : last + 1]
        words = tuple(Word(text=w.text, start=w.start - start, end=min(w.end, stop) - start) for w in inside)
        pieces.append(speech_of(whole.samples[start:stop], words))
        start, first = stop, last + 1
    return pieces
