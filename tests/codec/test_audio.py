import functools

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.inkling.feature_extraction_inkling import InklingFeatureExtractor
from transformers.models.inkling.processing_inkling import InklingProcessor

from tml.codec.audio import (
    BLOCK_FRAMES,
    init_state,
    levels,
    log_mels,
    mel_basis,
    pad_frames,
    push,
    session_frames,
    silence_frame,
)
from tml.config import AudioConfig

INKLING = AudioConfig()
TOLERANCE = 1e-4  # both float32 results lie within 6e-5 of the same mathematics in float64
CONFIGS = {
    "inkling": INKLING,
    "apple rates": AudioConfig(hop_samples=400, window_samples=800, num_mels=40, max_hz=7_600.0, num_levels=8),
    "24 kHz, no overlap": AudioConfig(
        sample_rate_hz=24_000, hop_samples=1_200, window_samples=1_200, num_mels=64, level_low=-6.5, level_high=1.0
    ),
    "odd sizes": AudioConfig(hop_samples=301, window_samples=1_003, num_mels=33, num_levels=13),
}


@functools.cache
def speech_like(seconds: float, sample_rate_hz: int = 16_000) -> np.ndarray:
    """Syllables of a gliding voice, swelling hiss, a chirp, and exact silence in the middle."""
    rng = np.random.default_rng(7)
    time = np.arange(int(seconds * sample_rate_hz)) / sample_rate_hz
    pitch_hz = 120 + 40 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / sample_rate_hz
    voice = sum(np.sin(k * phase) / k for k in range(1, 30)) * np.maximum(np.sin(2 * np.pi * 2.3 * time), 0)
    chirp = np.sin(2 * np.pi * (100 * time + 400 * time**2))
    hiss = 10 ** (-2.5 + 1.5 * np.sin(2 * np.pi * 0.4 * time)) * rng.standard_normal(len(time))
    sound = 0.2 * voice + hiss + 0.05 * chirp * (time < 2)
    sound[len(sound) // 2 : len(sound) * 5 // 8] = 0
    return sound.astype(np.float32)


def reference_log_mels(samples: np.ndarray, cfg: AudioConfig) -> np.ndarray:
    extractor = InklingFeatureExtractor(
        feature_size=cfg.num_mels,
        sampling_rate=cfg.sample_rate_hz,
        audio_token_duration_s=cfg.hop_samples / cfg.sample_rate_hz,
        window_size_multiplier=cfg.window_samples / cfg.hop_samples,
    )
    return extractor(samples, sampling_rate=cfg.sample_rate_hz)["input_features"][0].numpy()


def reference_levels(frames: np.ndarray, cfg: AudioConfig) -> np.ndarray:
    processor = InklingProcessor.__new__(InklingProcessor)
    processor.dmel_min_value, processor.dmel_max_value = cfg.level_low, cfg.level_high
    processor.bin_centers = torch.linspace(cfg.level_low, cfg.level_high, cfg.num_levels, dtype=torch.float64).float()
    return processor._extract_dmel_bins(torch.from_numpy(frames)).numpy()


@pytest.mark.parametrize("cut", [0, 1, 799])
def test_log_mels_equal_the_feature_extractor(cut):
    samples = speech_like(6.0)[cut:]
    expected = reference_log_mels(samples, INKLING)
    actual = log_mels(samples, INKLING)
    assert actual.shape == expected.shape == (-(-len(samples) // 800), 80)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)


def test_log_mels_of_another_rate_equal_the_feature_extractor():
    cfg = AudioConfig(sample_rate_hz=24_000, hop_samples=600, window_samples=1_200, num_mels=64, max_hz=12_000.0)
    samples = speech_like(2.0, 24_000)
    np.testing.assert_allclose(log_mels(samples, cfg), reference_log_mels(samples, cfg), atol=TOLERANCE, rtol=0)


def test_levels_equal_the_processor_in_every_bit():
    centres = np.linspace(-7, 2, 16)
    near = ((centres[:-1] + centres[1:]) / 2).astype(np.float32)
    for _ in range(40):
        near = np.concatenate([np.nextafter(near[:15], np.float32(-9)), near, np.nextafter(near[-15:], np.float32(9))])
    anywhere = np.random.default_rng(0).uniform(-9, 4, 80 * 2_000).astype(np.float32)
    values = np.concatenate([near, anywhere])
    values = values[: len(values) // 80 * 80].reshape(-1, 80)
    np.testing.assert_array_equal(levels(values, INKLING), reference_levels(values, INKLING))


def test_levels_of_sound_equal_the_processor():
    samples = speech_like(6.0)
    expected_mels = reference_log_mels(samples, INKLING)
    expected, actual = reference_levels(expected_mels, INKLING), levels(log_mels(samples, INKLING), INKLING)
    on_the_edge = np.abs((expected_mels + 7) / 0.6 % 1 - 0.5) < 2 * TOLERANCE
    assert on_the_edge.mean() < 1e-3
    np.testing.assert_array_equal(actual[~on_the_edge], expected[~on_the_edge])
    assert len(np.unique(actual)) >= 10


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_mel_basis_equals_librosa(cfg):
    expected = librosa.filters.mel(
        sr=cfg.sample_rate_hz, n_fft=cfg.window_samples, n_mels=cfg.num_mels, fmin=0, fmax=cfg.max_hz
    )
    np.testing.assert_allclose(mel_basis(cfg), expected, atol=1e-8, rtol=1e-5)


def test_digital_silence():
    np.testing.assert_allclose(log_mels(np.zeros(4_000, np.float32), INKLING), -6.0, atol=0.006)
    np.testing.assert_array_equal(silence_frame(INKLING), np.full(80, 2))


def test_full_scale_and_beyond_stay_in_range():
    loud = np.full(8_000, 100.0, np.float32) * np.sin(np.arange(8_000)).astype(np.float32)
    assert levels(log_mels(loud, INKLING), INKLING).max() == 15


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(list(CONFIGS)))
def test_streaming_in_any_chunks_equals_offline_bitwise(data, name):
    cfg = CONFIGS[name]
    start = data.draw(st.integers(0, 5_000))
    sound = speech_like(6.0)[start:][: data.draw(st.integers(0, (2 * BLOCK_FRAMES + 3) * cfg.hop_samples))]
    offline = levels(log_mels(sound, cfg), cfg)
    filled = np.concatenate([sound, np.zeros(-len(sound) % cfg.hop_samples, np.float32)])
    chunk = st.one_of(st.integers(0, 50), st.integers(51, 4_000), st.just(len(filled)))
    state, frames, at = init_state(cfg), [], 0
    while at < len(filled):
        size = data.draw(chunk) if len(frames) < 30 else len(filled)
        state, complete = push(state, filled[at : at + size], cfg)
        at += size
        frames.append(complete)
        assert sum(map(len, frames)) == min(at, len(filled)) // cfg.hop_samples
    streamed = np.concatenate([*frames, np.zeros((0, cfg.num_mels), np.uint8)])
    np.testing.assert_array_equal(streamed, offline)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), name=st.sampled_from(list(CONFIGS)))
def test_log_mels_of_a_frame_do_not_depend_on_its_company(data, name):
    cfg = CONFIGS[name]
    sound, whole = speech_like(6.0), log_mels(speech_like(6.0), cfg)
    overlap = -(-cfg.window_samples // cfg.hop_samples) - 1
    skip = data.draw(st.integers(0, len(whole) - overlap - 2))
    alone = log_mels(sound[skip * cfg.hop_samples :], cfg)[overlap:]
    np.testing.assert_array_equal(alone.view(np.uint32), whole[skip + overlap :].view(np.uint32))


@settings(deadline=None, max_examples=40)
@given(data=st.data(), name=st.sampled_from(list(CONFIGS)))
def test_no_frame_looks_past_its_own_end(data, name):
    cfg = CONFIGS[name]
    sound = speech_like(6.0)
    before = log_mels(sound, cfg)
    frame = data.draw(st.integers(0, len(before) - 2))
    first = (frame + 1) * cfg.hop_samples
    first = data.draw(st.integers(first, min(first + 3 * cfg.hop_samples, len(sound) - 1)))
    changed = sound.copy()
    changed[first:] = np.random.default_rng(first).standard_normal(len(sound) - first)
    after = log_mels(changed, cfg)
    np.testing.assert_array_equal(after[: frame + 1], before[: frame + 1])
    assert (after[frame + 1 :] != before[frame + 1 :]).any()


def test_push_keeps_its_arguments():
    samples = speech_like(1.0)
    kept = samples.copy()
    state = init_state(INKLING)
    first, frames = push(state, samples[:1_000], INKLING)
    again, same = push(state, samples[:1_000], INKLING)
    np.testing.assert_array_equal(frames, same)
    np.testing.assert_array_equal(first.recent, again.recent)
    np.testing.assert_array_equal(state.recent, np.zeros(800, np.float32))
    np.testing.assert_array_equal(samples, kept)


def test_pad_frames_appends_silence_or_cuts():
    frames = np.full((3, 80), 9, np.uint8)
    padded = pad_frames(frames, 8, INKLING)
    np.testing.assert_array_equal(padded[:3], frames)
    np.testing.assert_array_equal(padded[3:], np.full((5, 80), 2))
    np.testing.assert_array_equal(pad_frames(frames, 3, INKLING), frames)
    np.testing.assert_array_equal(pad_frames(frames, 2, INKLING), frames[:2])


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("num_samples", [0, 1, 800, 12_345])
def test_a_padded_session_equals_a_stream_that_goes_on_with_zeros(cfg, num_samples):
    sound = speech_like(6.0)[1_000 : 1_000 + num_samples]
    num_frames = -(-num_samples // cfg.hop_samples) + 7
    endless = np.concatenate([sound, np.zeros(num_frames * cfg.hop_samples - num_samples, np.float32)])
    _, streamed = push(init_state(cfg), endless, cfg)
    np.testing.assert_array_equal(pad_frames(session_frames(sound, cfg), num_frames, cfg), streamed)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(bad):
    samples = np.zeros(1_600, np.float32)
    samples[7] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        log_mels(samples, INKLING)


def test_an_empty_mel_filter_is_refused():
    with pytest.raises(ValueError, match="num_mels = 200"):
        log_mels(np.zeros(400, np.float32), AudioConfig(hop_samples=100, window_samples=200, num_mels=200))
