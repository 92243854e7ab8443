"""Sound as bytes and files, to and from float32 samples in [-1, 1)."""

import io
from pathlib import Path

import numpy as np
import soundfile
import soxr
from jaxtyping import Float32, Int16

from tml.session import AudioClip, AudioEncoding, SessionError

PCM16_SCALE = 32_768
"""Steps of a 16-bit sample in one unit."""


def decode_clip(clip: AudioClip, sample_rate_hz: int) -> Float32[np.ndarray, " n"]:
    """The samples of a clip, exactly `clip.num_samples` at `sample_rate_hz`, the session's clock.

    Raises:
        SessionError: the bytes cannot be decoded, are not mono, or have another rate or length.
    """
    if clip.encoding is AudioEncoding.PCM16:
        if len(clip.data) != 2 * clip.num_samples:
            raise SessionError(
                f"a pcm16 clip of {clip.num_samples} samples needs {2 * clip.num_samples} bytes, not {len(clip.data)}"
            )
        return np.frombuffer(clip.data, "<i2").astype(np.float32) / np.float32(PCM16_SCALE)
    try:
        samples_nC, rate = soundfile.read(io.BytesIO(clip.data), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise SessionError(f"a clip of {len(clip.data)} bytes cannot be decoded: {_line(error)}") from error
    if rate != sample_rate_hz or samples_nC.shape != (clip.num_samples, 1):
        raise SessionError(
            f"a clip holds {samples_nC.shape[0]} samples x {samples_nC.shape[1]} channels at {rate} Hz, "
            f"the session promises {clip.num_samples} x 1 at {sample_rate_hz} Hz"
        )
    return samples_nC[:, 0]


def encode_clip(samples: Float32[np.ndarray, " n"], sample_rate_hz: int) -> AudioClip:
    """A clip of 16-bit FLAC; what lies outside [-1, 1) is clipped.

    Raises:
        ValueError: there are no samples, or one is not finite.
    """
    if not len(samples):
        raise ValueError("a clip needs at least one sample")
    if not np.isfinite(samples).all():
        raise ValueError("the sound holds samples that are NaN or infinite")
    steps = steps_of(samples)
    file = io.BytesIO()
    soundfile.write(file, steps, sample_rate_hz, format="FLAC", subtype="PCM_16")
    return AudioClip(encoding=AudioEncoding.FILE, data=file.getvalue(), num_samples=len(samples))


def steps_of(samples: Float32[np.ndarray, " n"]) -> Int16[np.ndarray, " n"]:
    """The samples in steps of 16 bits, as a clip holds them; divided by 32768 they make the same clip."""
    return np.clip(np.rint(samples * np.float32(PCM16_SCALE)), -PCM16_SCALE, PCM16_SCALE - 1).astype(np.int16)


def read_audio(path: str | Path, sample_rate_hz: int) -> Float32[np.ndarray, "channels n"]:
    """A whole audio file (wav, flac, ogg, opus, mp3), resampled to `sample_rate_hz`.

    Raises:
        ValueError: no such file, not decodable, cut short, empty, or with samples that are no numbers.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        with soundfile.SoundFile(path) as file:
            rate, promised = file.samplerate, file.frames
            samples_nC = file.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path}: cannot be decoded as sound (wav, flac, ogg, opus, mp3): {_line(error)}") from error
    if not len(samples_nC):
        raise ValueError(f"{path}: holds no samples")
    if len(samples_nC) < promised:
        raise ValueError(f"{path}: ends after {len(samples_nC)} of {promised} samples; the file is cut short")
    if not np.isfinite(samples_nC).all():
        raise ValueError(f"{path}: holds samples that are NaN or infinite")
    return np.stack([resample(channel, rate, sample_rate_hz) for channel in samples_nC.T])


def resample(samples: Float32[np.ndarray, " n"], from_hz: int, to_hz: int) -> Float32[np.ndarray, " m"]:
    """The same sound at another rate: ceil(n * to / from) samples, in place on the clock."""
    if from_hz == to_hz:
        return np.ascontiguousarray(samples)
    wanted = resampled_length(len(samples), from_hz, to_hz)
    resampled = soxr.resample(np.ascontiguousarray(samples), from_hz, to_hz)[:wanted]
    return np.pad(resampled, (0, wanted - len(resampled)))


def resampled_length(num_samples: int, from_hz: int, to_hz: int) -> int:
    """Samples that cover the same time at another rate."""
    return -(-num_samples * to_hz // from_hz)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
