"""A track of sound under construction: speech placed on it, then noise, channel and level."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from data_pipelines import noise
from data_pipelines.speech import SAMPLE_RATE_HZ

FULL_SCALE = 0.99
"""No sample of a session is louder than this, so that rounding to 16 bits cannot wrap."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Where and how speech is heard.

    Attributes:
        noise_kind: one of `noise.NOISE_KINDS`, or empty for none.
        snr_db: level of the speech over the noise while it is spoken.
        peak_db: the loudest sample, relative to full scale.
    """

    noise_kind: str
    snr_db: float
    peak_db: float


def draw_surroundings(
    rng: np.random.Generator,
    *,
    quiet_probability: float = 0.3,
    snr_range_db: tuple[float, float] = (10.0, 40.0),
    peak_range_db: tuple[float, float] = (-24.0, -1.0),
) -> Surroundings:
    """Quiet, or noise of some kind and level."""
    quiet = rng.random() < quiet_probability
    kind = noise.NOISE_KINDS[int(rng.integers(len(noise.NOISE_KINDS)))]
    return Surroundings(
        noise_kind="" if quiet else kind,
        snr_db=float(rng.uniform(*snr_range_db)),
        peak_db=float(rng.uniform(*peak_range_db)),
    )


def place(pieces: Sequence[tuple[int, np.ndarray]], num_samples: int) -> Float32[np.ndarray, " n"]:
    """Silence with each piece added at its first sample."""
    track = np.zeros(num_samples, np.float32)
    for start, samples in pieces:
        track[start : start + len(samples)] += samples
    return track


def add_noise(
    track: Float32[np.ndarray, " n"], surroundings: Surroundings, rng: np.random.Generator
) -> Float32[np.ndarray, " n"]:
    """The track with noise; its signal-to-noise ratio counts only the samples that are not zero."""
    if not surroundings.noise_kind:
        return track
    sounding = np.count_nonzero(track)
    power = float(np.square(track).sum()) / sounding if sounding else 1.0
    level = np.float32(np.sqrt(power * 10 ** (-surroundings.snr_db / 10)))
    return track + level * noise.noise(surroundings.noise_kind, len(track), rng)


def to_level(track: Float32[np.ndarray, " n"], peak_db: float) -> Float32[np.ndarray, " n"]:
    """The track scaled so that its loudest sample lies at `peak_db`; silence stays silence."""
    peak = float(np.abs(track).max(initial=0.0))
    return track * np.float32(FULL_SCALE * 10 ** (peak_db / 20) / peak) if peak else track


def seconds(duration_s: float) -> int:
    """A duration in samples of the session clock."""
    return round(duration_s * SAMPLE_RATE_HZ)
