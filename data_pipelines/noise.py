"""Background noise of several kinds, cut from long stretches that are made once per process."""

import functools

import numpy as np
import scipy.fft
from jaxtyping import Float32

from data_pipelines import espeak
from data_pipelines.request_vocabulary import FOREIGN, STATEMENTS
from data_pipelines.speech import SAMPLE_RATE_HZ

NOISE_KINDS = ("white", "pink", "brown", "hum", "babble")
"""Flat spectrum; power falling with frequency f as 1/f and as 1/f²; mains hum; five people talking at once."""

_STRETCH_S = 30
_LOWEST_HZ = 30.0
_BABBLE_SPEAKERS = 5


def noise(kind: str, num_samples: int, rng: np.random.Generator) -> Float32[np.ndarray, " n"]:
    """Noise of mean power 1 (over the long run), cut at a random place.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"noise {kind!r} is not one of {', '.join(NOISE_KINDS)}")
    stretch = _stretch(kind)
    start = int(rng.integers(len(stretch)))
    return np.take(stretch, np.arange(start, start + num_samples), mode="wrap")


@functools.cache
def _stretch(kind: str) -> Float32[np.ndarray, " n"]:
    rng = np.random.default_rng([NOISE_KINDS.index(kind), 0x6E6F6973])
    size = _STRETCH_S * SAMPLE_RATE_HZ
    if kind == "babble":
        wave = _babble(size, rng)
    elif kind == "hum":
        wave = _hum(size, rng)
    else:
        power = {"white": 0.0, "pink": 1.0, "brown": 2.0}[kind]
        wave = _coloured(size, power, rng)
    wave = wave - wave.mean()
    return (wave / np.sqrt(np.mean(np.square(wave)))).astype(np.float32)


def _coloured(size: int, power: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose power falls as 1 / f ** power above 30 Hz."""
    spectrum = scipy.fft.rfft(rng.standard_normal(size))
    frequency_hz = scipy.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ)
    spectrum *= np.maximum(frequency_hz, _LOWEST_HZ) ** (-power / 2)
    return scipy.fft.irfft(spectrum, size)


def _hum(size: int, rng: np.random.Generator) -> np.ndarray:
    """50 Hz and its harmonics over a floor of pink noise that lies 12 dB lower."""
    time_s = np.arange(size) / SAMPLE_RATE_HZ
    wave = np.zeros(size)
    for harmonic in range(1, 13):
        phase = rng.uniform(0, 2 * np.pi)
        wave += rng.uniform(0.3, 1.0) / harmonic * np.sin(2 * np.pi * 50 * harmonic * time_s + phase)
    floor = _coloured(size, 1.0, rng)
    return wave / wave.std() + floor / floor.std() * 10 ** (-12 / 20)


def _babble(size: int, rng: np.random.Generator) -> np.ndarray:
    """Training voices that say sentences which ask for nothing, over each other."""
    sentences = [("en", text) for text in STATEMENTS] + list(FOREIGN)
    wave = np.zeros(size)
    for _ in range(_BABBLE_SPEAKERS):
        variant = espeak.split_variants("train")[int(rng.integers(len(espeak.split_variants("train"))))]
        pitch = int(rng.integers(30, 71))
        place = 0
        while place < size:
            accent, text = sentences[int(rng.integers(len(sentences)))]
            spoken = espeak.Voice(accent=accent, variant=variant, pitch=pitch).say(text).samples
            spoken = spoken[: size - place] / np.sqrt(np.mean(np.square(spoken)))
            wave[place : place + len(spoken)] += spoken
            place += len(spoken)
    return wave
