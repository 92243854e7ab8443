"""Own sound as the mel frames that the model predicts, and back from them to magnitudes.

One position holds the frames of one hop of the input clock, each normalised and in float16: training, the feedback
of what was said, and the vocoder all see the same numbers. The frames are those of `tml.codec.audio` at a finer hop:
each ends on its own part of the hop, so that a turn's frames hold nothing of the sound after it.
"""

import numpy as np
from jaxtyping import Float16, Float32

from tml.codec import audio
from tml.config import AudioConfig, AudioOutConfig, ModelConfig


def frame_config(model: ModelConfig) -> AudioConfig:
    """The front end of own sound: the clock and the filters of the input's, at the hop of its frames."""
    own = model.audio_out
    return AudioConfig(
        sample_rate_hz=model.audio.sample_rate_hz,
        hop_samples=model.audio.hop_samples // own.frames_per_position,
        window_samples=own.window_samples,
        num_mels=own.num_mels,
        max_hz=model.audio.max_hz,
        power_floor=model.audio.power_floor,
    )


def own_mels(samples: Float32[np.ndarray, " n"], model: ModelConfig) -> Float16[np.ndarray, "T Y"]:
    """The positions of a whole recording of own sound: ceil(n / model.audio.hop_samples) rows, normalised.

    Raises:
        ValueError: a sample is not finite.
    """
    own, hop = model.audio_out, model.audio.hop_samples
    num_positions = -(-len(samples) // hop)
    padded = np.zeros(num_positions * hop, np.float32)
    padded[: len(samples)] = samples
    frames = normalised(audio.log_mels(padded, frame_config(model)), own)
    return frames.reshape(num_positions, own.values_per_position)


def normalised(log_mels: Float32[np.ndarray, "*n M"], own: AudioOutConfig) -> Float16[np.ndarray, "*n M"]:
    """Log-mels as the head predicts them."""
    above = np.maximum(log_mels, np.float32(own.log_floor)) - np.float32(own.log_mean)
    return (above / np.float32(own.log_deviation)).astype(np.float16)


def silent_position(own: AudioOutConfig) -> Float16[np.ndarray, " Y"]:
    """The values of a position without sound."""
    return normalised(np.full(own.values_per_position, own.log_floor, np.float32), own)


def magnitudes(mels: Float16[np.ndarray, "T Y"], own: AudioOutConfig) -> Float32[np.ndarray, "F M"]:
    """The mel magnitudes of every frame of some positions; what is at the floor is 0."""
    frames = mels.astype(np.float32).reshape(-1, own.num_mels)
    logs = frames * np.float32(own.log_deviation) + np.float32(own.log_mean)
    # Half a step of float16 above the floor: what was floored comes back as silence.
    floored = logs <= np.float32(own.log_floor + 0.01)
    return np.where(floored, np.float32(0.0), np.power(np.float32(10.0), np.minimum(logs, np.float32(3.0))))


def audible(mels: Float16[np.ndarray, "T Y"], own: AudioOutConfig) -> np.ndarray:
    """Whether each position holds a mel that is loud enough to count as speech (bool [T])."""
    return mels.max(axis=1, initial=-np.inf) >= np.float16((own.audible_log - own.log_mean) / own.log_deviation)
