"""Griffin-Lim block by block: mel frames to sound, each turn's phases found in the company of those before it.

A block's frames are iterated between their magnitudes and a signal that all of them agree on, in which the frames
before them stand fixed. Then they are fixed themselves: the sound is the sum of their windowed segments, so it has no
seams, whatever the blocks. What the last segments still lack waits in the state for the next block.

Source: Griffin and Lim 1984; Perraudin, Balazs and Søndergaard 2013 (momentum); Zhu, Beauregard and Wyse 2007 (a
stream); Beauregard, Harish and Wyse 2015 (phases to begin with, from spectral peaks).
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.sparse
from jaxtyping import Complex64, Float16, Float32

from tml.codec.audio import mel_basis
from tml.codec.own_sound import frame_config, magnitudes
from tml.config import ModelConfig

INVERSION_STEPS = 40
"""Multiplicative updates from mel magnitudes to those of the FFT's bins (Lee and Seung 2001)."""
_TINY = np.float32(1e-12)


@dataclass(frozen=True, kw_only=True, eq=False)
class GriffinLimState:
    """What a block leaves to the next.

    Attributes:
        tail: sum of the windowed segments of fixed frames, past the last sample that was put out.
        held: magnitudes of the frames that wait, `look_ahead_frames` of them.
        held_spectra: what was found for these so far.
        phases: of the last frame, for the first guess of the next one.
    """

    tail: Float32[np.ndarray, " n"]
    held: Float32[np.ndarray, "A bins"]
    held_spectra: Complex64[np.ndarray, "A bins"]
    phases: Float32[np.ndarray, " bins"]


class GriffinLim:
    """The default vocoder (`tml.codec.vocoder.Vocoder`)."""

    def __init__(self, model: ModelConfig) -> None:
        cfg = frame_config(model)
        self._own, self._cfg = model.audio_out, model.audio_out.vocoder
        self._hop, self._size = cfg.hop_samples, cfg.window_samples
        self._overlap = self._size // self._hop
        phase = 2 * np.pi * np.arange(self._size) / self._size
        self._window = (0.5 - 0.5 * np.cos(phase)).astype(np.float32)
        self._squares = np.square(self._window).reshape(self._overlap, self._hop)
        self._level = self._squares.sum(axis=0)
        self._basis = scipy.sparse.csr_array(mel_basis(cfg))
        self._transposed = scipy.sparse.csr_array(self._basis.T)
        self.delay_samples = self._size - self._hop + self._cfg.look_ahead_frames * self._hop

    def init_state(self) -> GriffinLimState:
        """Silence until now."""
        bins, held = self._size // 2 + 1, self._cfg.look_ahead_frames
        return GriffinLimState(
            tail=np.zeros(self._size - self._hop, np.float32),
            held=np.zeros((held, bins), np.float32),
            held_spectra=np.zeros((held, bins), np.complex64),
            phases=np.zeros(bins, np.float32),
        )

    def step(
        self, state: GriffinLimState, mels: Float16[np.ndarray, "T Y"]
    ) -> tuple[GriffinLimState, Float32[np.ndarray, " n"]]:
        """The next block: as many samples as its frames cover, `delay_samples` late."""
        new = self.bin_magnitudes(mels)
        wanted = np.concatenate([state.held, new])
        num_fixed = len(new)
        guesses = self._first_phases(new, state.phases)
        spectra = np.concatenate([state.held_spectra, new * np.exp(np.complex64(1j) * guesses)])
        spectra = self._iterated(wanted, spectra.astype(np.complex64), state.tail)
        segments = scipy.fft.irfft(spectra[:num_fixed], n=self._size, axis=1) * self._window
        sum_rows = self._overlap_add(segments, state.tail)
        out = (sum_rows[:num_fixed] / self._level).reshape(-1)
        return GriffinLimState(
            tail=sum_rows[num_fixed:].reshape(-1),
            held=wanted[num_fixed:],
            held_spectra=spectra[num_fixed:],
            phases=np.angle(spectra[-1]).astype(np.float32),
        ), out

    def bin_magnitudes(self, mels: Float16[np.ndarray, "T Y"]) -> Float32[np.ndarray, "F bins"]:
        """Magnitudes of the FFT's bins that have these mels, none below zero; each bin begins at its filters' mean."""
        mel_FM = magnitudes(mels, self._own)
        if not mel_FM.any():
            return np.zeros((len(mel_FM), self._basis.shape[1]), np.float32)
        wanted = self._transposed @ np.ascontiguousarray(mel_FM.T)
        ones = np.ones((self._basis.shape[1], 1), np.float32)
        found = wanted / np.maximum(self._transposed @ (self._basis @ ones), _TINY)
        for _ in range(INVERSION_STEPS):
            found *= wanted / np.maximum(self._transposed @ (self._basis @ found), _TINY)
        return np.ascontiguousarray(found.T)

    def _first_phases(self, new: np.ndarray, phases: np.ndarray) -> np.ndarray:
        """Phases to begin with: every spectral peak turns on at its own frequency, its neighbours with it."""
        found = np.empty(new.shape, np.float32)
        bins = np.arange(new.shape[1])
        for frame, magnitude in enumerate(new):
            inner = magnitude[1:-1]
            peaks = 1 + np.flatnonzero((inner > magnitude[:-2]) & (inner >= magnitude[2:]))
            if not len(peaks):
                found[frame] = phases
                continue
            low, mid, high = (np.log(magnitude[peaks + shift] + _TINY) for shift in (-1, 0, 1))
            offset = 0.5 * (low - high) / (low - 2 * mid + high - _TINY)
            frequency = 2 * np.pi * (peaks + np.clip(offset, -0.5, 0.5)) / self._size
            at_peaks = phases[peaks] + frequency * self._hop
            nearest = np.searchsorted((peaks[:-1] + peaks[1:]) / 2, bins)
            # Neighbours of a peak alternate in sign: the window's main lobe, centred half a window later.
            alternating = np.pi * (bins - peaks[nearest])
            phases = (at_peaks[nearest] + alternating).astype(np.float32)
            found[frame] = phases
        return np.mod(found, np.float32(2 * np.pi))

    def _iterated(self, wanted: np.ndarray, spectra: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """Spectra with the wanted magnitudes whose frames agree with each other and with the fixed ones."""
        if not wanted.any():
            return spectra
        count = len(wanted)
        level = self._overlap_level(count)
        rows_of_frames = np.arange(count)[:, None] + np.arange(self._overlap)
        momentum = np.float32(self._cfg.momentum)
        before = np.zeros_like(spectra)
        for _ in range(self._cfg.num_iterations):
            segments = scipy.fft.irfft(spectra, n=self._size, axis=1) * self._window
            rows = self._overlap_add(segments, tail) / level
            frames = rows[rows_of_frames].reshape(count, self._size)
            agreed = scipy.fft.rfft(frames * self._window, axis=1)
            ahead = agreed + momentum * (agreed - before)
            spectra = wanted * (ahead / np.maximum(np.abs(ahead), _TINY))
            before = agreed
        return spectra

    def _overlap_add(self, segments: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """The sum of the segments, one hop apart, and of the tail, as rows of one hop."""
        count, overlap = len(segments), self._overlap
        rows = np.zeros((count + overlap - 1, self._hop), np.float32)
        rows[: overlap - 1] = tail.reshape(overlap - 1, self._hop)
        parts = segments.reshape(count, overlap, self._hop)
        for shift in range(overlap):
            rows[shift : shift + count] += parts[:, shift]
        return rows

    def _overlap_level(self, count: int) -> np.ndarray:
        """What the squared windows of `count` frames and of all before them add up to, as rows of one hop."""
        rows = np.tile(self._level, (count + self._overlap - 1, 1))
        for row in range(1, self._overlap):
            rows[count - 1 + row] = self._squares[row:].sum(axis=0)
        return np.maximum(rows, np.float32(1e-3))
