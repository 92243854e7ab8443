"""What a microphone, a room and a telephone line do to sound, as pure functions of (samples, rng).

All sound is mono at 16 kHz in [-1, 1]; lengths never change, and nothing is heard before it is said:
the direct sound keeps its place on the clock.
"""

import functools

import numpy as np
import scipy.signal
from jaxtyping import Float32

from data_pipelines import noise
from data_pipelines.speech import SAMPLE_RATE_HZ

Samples = Float32[np.ndarray, " n"]
Response = Float32[np.ndarray, " taps"]

TELEPHONE_BAND_HZ = (300.0, 3400.0)
"""ITU-T G.712: the pass band of a telephone channel."""

_BAND_ORDER = 4
_MU = 255.0
_FLOOR_DB = 60.0


def gain(samples: Samples, gain_db: float) -> Samples:
    """The sound louder by `gain_db`."""
    return samples * np.float32(10 ** (gain_db / 20))


def add_noise(samples: Samples, kind: str, snr_db: float, rng: np.random.Generator) -> Samples:
    """The sound with noise (see `noise.NOISE_KINDS`) at a ratio of mean powers over the whole length.

    Raises:
        ValueError: there is no such kind, or the sound is silent, so that no ratio exists.
    """
    power = float(np.square(samples).mean())
    if power == 0.0:
        raise ValueError("silence has no signal-to-noise ratio; add noise of a level instead")
    added = noise.noise(kind, len(samples), rng)
    level = np.sqrt(power / float(np.square(added).mean()) * 10 ** (-snr_db / 10))
    return samples + np.float32(level) * added


def band_limit(samples: Samples, low_hz: float, high_hz: float) -> Samples:
    """What lies between two frequencies, by causal Butterworth filters of order 4; 0 and 8000 Hz leave an end open.

    Raises:
        ValueError: the band is empty or lies outside 0 to 8000 Hz.
    """
    if not 0 <= low_hz < high_hz <= SAMPLE_RATE_HZ / 2:
        raise ValueError(f"the band {low_hz:g} to {high_hz:g} Hz must lie in 0 to {SAMPLE_RATE_HZ / 2:g} Hz")
    return _filtered(samples, _band(low_hz, high_hz))


def room_response(rng: np.random.Generator, *, reverberation_s: float, direct_db: float) -> Response:
    """The response of a small room to an impulse at sample 0.

    A direct sound, up to six early reflections within 20 ms, and a tail of noise that falls by 60 dB in
    `reverberation_s`, whose energy lies `direct_db` below that of the direct sound.
    """
    length = max(1, round(reverberation_s * SAMPLE_RATE_HZ))
    time_s = np.arange(length) / SAMPLE_RATE_HZ
    tail = rng.standard_normal(length) * 10 ** (-3 * time_s / reverberation_s)
    # The tail begins where sound has crossed the room: about 3 m.
    tail[: min(length, round(0.008 * SAMPLE_RATE_HZ))] = 0.0
    for _ in range(6):
        place = int(rng.integers(16, 320))
        if place < length:
            tail[place] += rng.uniform(-1.0, 1.0) * 20 * 10 ** (-3 * time_s[place] / reverberation_s)
    energy = float(np.square(tail).sum())
    if energy:
        tail *= np.sqrt(10 ** (-direct_db / 10) / energy)
    tail[0] = 1.0
    return tail.astype(np.float32)


def reverberate(samples: Samples, response: Response) -> Samples:
    """The sound in a room; what rings on behind the last sample is cut."""
    return scipy.signal.oaconvolve(samples, response)[: len(samples)].astype(np.float32)


def mu_law(samples: Samples) -> Samples:
    """The sound after 8-bit companding as telephones do it (the continuous law behind ITU-T G.711, mu = 255)."""
    inside = np.clip(samples, -1.0, 1.0)
    companded = np.sign(inside) * np.log1p(_MU * np.abs(inside)) / np.log1p(_MU)
    steps = np.rint(companded * 127.0) / 127.0
    return (np.sign(steps) * np.expm1(np.abs(steps) * np.log1p(_MU)) / _MU).astype(np.float32)


def coarse_spectrum(samples: Samples, step_db: float) -> Samples:
    """The sound after a codec that rounds the level of every 32 ms, 31 Hz piece of it to steps of `step_db`.

    Pieces more than 60 dB below the loudest are dropped, as codecs drop what is masked; phases are kept.
    """
    transform = scipy.signal.ShortTimeFFT(
        np.hanning(513)[:512], hop=128, fs=SAMPLE_RATE_HZ, fft_mode="onesided", scale_to=None
    )
    padded = samples if len(samples) >= 512 else np.pad(samples, (0, 512 - len(samples)))
    spectrum = transform.stft(padded)
    level = np.abs(spectrum)
    loudest = float(level.max())
    if loudest == 0.0:
        return samples
    level_db = 20 * np.log10(np.maximum(level, loudest * 1e-9) / loudest)
    rounded = np.where(level_db < -_FLOOR_DB, 0.0, loudest * 10 ** (np.rint(level_db / step_db) * step_db / 20))
    coarse = spectrum * (rounded / np.maximum(level, loudest * 1e-9))
    return transform.istft(coarse, k1=len(padded))[: len(samples)].astype(np.float32)


def tilt(samples: Samples, slope_db: float) -> Samples:
    """The sound through a microphone whose response rises by `slope_db` from low to high frequencies.

    A first-order shelf around 1 kHz, of gain 0 dB at 0 Hz.
    """
    high = 10 ** (slope_db / 20)
    # H(s) = (1 + s sqrt(high) / w) / (1 + s / (w sqrt(high))): 1 at 0 Hz, `high` far above 1 kHz.
    w, root = 2 * np.pi * 1000.0, np.sqrt(high)
    b, a = scipy.signal.bilinear([root / w, 1.0], [1 / (w * root), 1.0], fs=SAMPLE_RATE_HZ)
    return scipy.signal.lfilter(b, a, samples).astype(np.float32)


def channel(samples: Samples, rng: np.random.Generator) -> Samples:
    """A random chain of the above: half of all sounds are band limited, 40 % in a room, and so on."""
    if rng.random() < 0.4:
        response = room_response(rng, reverberation_s=rng.uniform(0.08, 0.4), direct_db=rng.uniform(3.0, 15.0))
        samples = reverberate(samples, response)
    if rng.random() < 0.5:
        samples = tilt(samples, rng.uniform(-10.0, 10.0))
    band = rng.random()
    if band < 0.2:
        samples = band_limit(samples, *TELEPHONE_BAND_HZ)
    elif band < 0.5:
        samples = band_limit(samples, rng.uniform(0.0, 250.0), rng.uniform(3500.0, 7000.0))
    codec = rng.random()
    if codec < 0.15:
        peak = float(np.abs(samples).max(initial=0.0))
        if peak:
            samples = mu_law(samples / np.float32(peak)) * np.float32(peak)
    elif codec < 0.3:
        samples = coarse_spectrum(samples, rng.uniform(1.0, 5.0))
    return samples


@functools.lru_cache(maxsize=64)
def _band(low_hz: float, high_hz: float) -> np.ndarray:
    nyquist_hz = SAMPLE_RATE_HZ / 2
    if low_hz > 0 and high_hz < nyquist_hz:
        low = scipy.signal.butter(_BAND_ORDER, low_hz, "highpass", fs=SAMPLE_RATE_HZ, output="sos")
        high = scipy.signal.butter(_BAND_ORDER, high_hz, "lowpass", fs=SAMPLE_RATE_HZ, output="sos")
        return np.concatenate([low, high])
    if low_hz > 0:
        return scipy.signal.butter(_BAND_ORDER, low_hz, "highpass", fs=SAMPLE_RATE_HZ, output="sos")
    if high_hz < nyquist_hz:
        return scipy.signal.butter(_BAND_ORDER, high_hz, "lowpass", fs=SAMPLE_RATE_HZ, output="sos")
    return np.array([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0]])


def _filtered(samples: Samples, sections: np.ndarray) -> Samples:
    return scipy.signal.sosfilt(sections, samples).astype(np.float32)
