"""dMel: sound to quantised log-mel frames, causally, with the same bits offline and in any chunking.

Frame t hears samples [(t+1) hop - window, (t+1) hop): it ends on its own hop and never looks past
it. Every frame goes through one function of one fixed shape, a block of `BLOCK_FRAMES` frames that
is filled up with zeros, so that neither the FFT's vector lanes nor a matrix product can give a
frame other bits in another company. A mel filter touches few of the FFT's bins, so the filter bank
is a sparse product that adds in one order.

Source: transformers `feature_extraction_inkling.py` (log-mels) and `processing_inkling.py` (levels).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.sparse
from jaxtyping import Float32, UInt8

from tml.config import AudioConfig

BLOCK_FRAMES = 48
"""Frames in one block; a multiple of every CPU's vector width in float32."""


def log_mels(samples: Float32[np.ndarray, " n"], cfg: AudioConfig) -> Float32[np.ndarray, "T M"]:
    """log10 mel magnitudes of a whole recording, T = ceil(n / hop) frames; the last hop is filled with zeros.

    Raises:
        ValueError: a sample is not finite, or a mel filter is empty.

    Example: `levels(log_mels(samples, cfg), cfg)` are the model's input, uint8 [T, M].
    """
    frames = math.ceil(len(samples) / cfg.hop_samples)
    history = cfg.window_samples - cfg.hop_samples
    padded = np.zeros(history + frames * cfg.hop_samples, np.float32)
    padded[history : history + len(samples)] = samples
    return _log_mels_of_frames(padded, cfg)


def levels(log_mels_TM: Float32[np.ndarray, "T M"], cfg: AudioConfig) -> UInt8[np.ndarray, "T M"]:
    """The nearest of `num_levels` evenly spaced centres; half-way in float32 goes to the lower one."""
    starts = _tables(cfg).level_starts
    step = (cfg.level_high - cfg.level_low) / (cfg.num_levels - 1)
    clamped = np.clip(log_mels_TM, np.float32(cfg.level_low), np.float32(cfg.level_high))
    # Rounded up a little, the guess is the right level or the one above it; the exact start decides.
    guess = ((clamped - np.float32(cfg.level_low)) * np.float32(1 / step) + np.float32(0.501)).astype(np.uint8)
    return guess - (clamped < starts[guess])


@dataclass(frozen=True, kw_only=True, eq=False)
class AudioState:
    """What streaming remembers: the samples that the next frame hears too, and those of its hop so far."""

    recent: Float32[np.ndarray, " n"]


def init_state(cfg: AudioConfig) -> AudioState:
    """The state before the first sample: silence."""
    return AudioState(recent=np.zeros(cfg.window_samples - cfg.hop_samples, np.float32))


def push(
    state: AudioState, samples: Float32[np.ndarray, " n"], cfg: AudioConfig
) -> tuple[AudioState, UInt8[np.ndarray, "T M"]]:
    """Takes any number of samples; gives the levels of the frames they complete (perhaps none).

    The frames of all pushes together equal `levels(log_mels(all samples))`, bit for bit, except that the
    last, unfinished hop comes out only once it is filled (push zeros to fill it).

    Raises:
        ValueError: a sample is not finite.
    """
    joined = np.concatenate([state.recent, samples])
    history = cfg.window_samples - cfg.hop_samples
    complete = (len(joined) - history) // cfg.hop_samples * cfg.hop_samples
    frames = _log_mels_of_frames(joined[: history + complete], cfg)
    return AudioState(recent=joined[complete:]), levels(frames, cfg)


@functools.lru_cache(maxsize=8)
def silence_frame(cfg: AudioConfig) -> UInt8[np.ndarray, " M"]:
    """The levels of one frame of digital silence (read-only)."""
    frame = levels(log_mels(np.zeros(cfg.hop_samples, np.float32), cfg), cfg)[0]
    frame.flags.writeable = False
    return frame


def session_frames(samples: Float32[np.ndarray, " n"], cfg: AudioConfig) -> UInt8[np.ndarray, "T M"]:
    """The levels of a whole session: ceil(n / hop) frames, then those that still hear its end.

    After these, every frame is digital silence, as in a stream of the same samples followed by zeros.
    """
    tail = -(-cfg.window_samples // cfg.hop_samples) - 1
    filled = -(-len(samples) // cfg.hop_samples) * cfg.hop_samples
    padded = np.zeros(filled + tail * cfg.hop_samples, np.float32)
    padded[: len(samples)] = samples
    return levels(log_mels(padded, cfg), cfg)


def pad_frames(levels_TM: UInt8[np.ndarray, "T M"], num_frames: int, cfg: AudioConfig) -> UInt8[np.ndarray, "U M"]:
    """Exactly `num_frames` frames: the last ones are cut off, or frames of digital silence appended.

    `Layout.lay_out` numbers U * frames_per_turn frames, of which the session's own fill all but the last turn.
    """
    missing = max(0, num_frames - len(levels_TM))
    return np.concatenate([levels_TM[:num_frames], np.tile(silence_frame(cfg), (missing, 1))])


def mel_basis(cfg: AudioConfig) -> Float32[np.ndarray, "M bins"]:
    """Slaney's mel filters, each of unit area in hertz, over the bins of the window's FFT.

    Raises:
        ValueError: a filter is so narrow that no bin falls into it.

    Source: Slaney, Auditory Toolbox (1998): linear below 1 kHz, logarithmic above.
    """
    corners = _slaney_to_hz(np.linspace(0.0, _hz_to_slaney(cfg.max_hz), cfg.num_mels + 2))
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = np.fft.rfftfreq(cfg.window_samples, 1 / cfg.sample_rate_hz)[None, :]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    basis = np.maximum(triangles, 0.0) * 2 / (high - low)
    empty = np.flatnonzero(basis.max(axis=1) == 0)
    if len(empty):
        raise ValueError(
            f"audio.num_mels = {cfg.num_mels} leaves mel filter {empty[0]} without a bin of the FFT over "
            f"audio.window_samples = {cfg.window_samples}; use fewer mels or a longer window"
        )
    return basis.astype(np.float32)


_BREAK_HZ = 1000.0
_HZ_PER_MEL = 200.0 / 3
_LOG_STEP = math.log(6.4) / 27
"""Above the break, 27 mels are a factor of 6.4 in frequency."""


def _hz_to_slaney(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _HZ_PER_MEL
    return _BREAK_HZ / _HZ_PER_MEL + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _slaney_to_hz(mels: np.ndarray) -> np.ndarray:
    over = mels - _BREAK_HZ / _HZ_PER_MEL
    return np.where(over < 0, mels * _HZ_PER_MEL, _BREAK_HZ * np.exp(_LOG_STEP * np.maximum(over, 0)))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tables:
    """Constants of a config: window, sparse filter bank, and the smallest float32 that has each level."""

    window: np.ndarray
    basis: scipy.sparse.csr_array
    level_starts: np.ndarray


@functools.lru_cache(maxsize=8)
def _tables(cfg: AudioConfig) -> _Tables:
    phase = 2 * np.pi * np.arange(cfg.window_samples) / cfg.window_samples
    window = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)
    starts = _level_starts(cfg)
    window.flags.writeable = starts.flags.writeable = False
    return _Tables(window=window, basis=scipy.sparse.csr_array(mel_basis(cfg)), level_starts=starts)


def _level_starts(cfg: AudioConfig) -> np.ndarray:
    """Bisects, in float32, where each centre becomes nearer than the one below it; level 0 has no start."""
    centres = np.linspace(cfg.level_low, cfg.level_high, cfg.num_levels).astype(np.float32)
    lower, upper = centres[:-1], centres[1:]
    below, above = lower.copy(), upper.copy()
    for _ in range(64):
        middle = (below + above) / np.float32(2)
        is_upper = np.abs(middle - upper) < np.abs(middle - lower)
        below, above = np.where(is_upper, below, middle), np.where(is_upper, middle, above)
    return np.append(np.float32(-np.inf), above)


def _log_mels_of_frames(padded: np.ndarray, cfg: AudioConfig) -> np.ndarray:
    """Log-mels of every whole frame in `padded`, whose first frame starts at sample 0; [T, M]."""
    if not np.isfinite(padded).all():
        raise ValueError("the sound holds samples that are NaN or infinite")
    tables = _tables(cfg)
    num_frames = (len(padded) - cfg.window_samples) // cfg.hop_samples + 1 if len(padded) >= cfg.window_samples else 0
    out_TM = np.empty((num_frames, cfg.num_mels), np.float32)
    if num_frames == 0:
        return out_TM
    frames = np.lib.stride_tricks.sliding_window_view(padded, cfg.window_samples)[:: cfg.hop_samples]
    block = np.zeros((BLOCK_FRAMES, cfg.window_samples), np.float32)
    for start in range(0, num_frames, BLOCK_FRAMES):
        count = min(BLOCK_FRAMES, num_frames - start)
        np.multiply(frames[start : start + count], tables.window, out=block[:count])
        block[count:] = 0
        out_TM[start : start + count] = _log_mels_of_block(block, tables.basis, cfg.power_floor).T[:count]
    return out_TM


def _log_mels_of_block(block: np.ndarray, basis: scipy.sparse.csr_array, power_floor: float) -> np.ndarray:
    """The one function of fixed shape: windowed frames [BLOCK_FRAMES, window] to log-mels [M, BLOCK_FRAMES]."""
    floor = np.float32(power_floor)
    parts = scipy.fft.rfft(block, axis=1).view(np.float32)
    np.multiply(parts, parts, out=parts)
    power = parts[:, 0::2] + parts[:, 1::2]
    magnitude = np.sqrt(np.maximum(power, floor, out=power), out=power)
    mels = basis @ magnitude.T
    np.log(np.maximum(mels, floor, out=mels), out=mels)
    return np.multiply(mels, np.float32(1 / math.log(10)), out=mels)
