import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from tml.codec.waveform import decode_clip, encode_clip, read_audio, resample
from tml.session import AudioClip, AudioEncoding, SessionError


def noise(num_samples: int) -> np.ndarray:
    return (0.2 * np.random.default_rng(num_samples).standard_normal(num_samples)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.integers(-32_768, 32_767), min_size=1, max_size=300),
    rate=st.sampled_from([8_000, 16_000, 48_000]),
)
def test_flac_and_pcm16_hold_every_16_bit_sample(steps, rate):
    samples = np.array(steps, np.float32) / np.float32(32_768)
    clip = encode_clip(samples, rate)
    assert clip.encoding is AudioEncoding.FILE
    assert clip.data[:4] == b"fLaC"
    np.testing.assert_array_equal(decode_clip(clip, rate), samples)
    raw = AudioClip(encoding=AudioEncoding.PCM16, data=struct.pack(f"<{len(steps)}h", *steps), num_samples=len(steps))
    np.testing.assert_array_equal(decode_clip(raw, rate), samples)


def test_encoding_rounds_to_the_nearest_step_and_clips():
    samples = np.array([0.4 / 32_768, 0.6 / 32_768, 1.5, -1.5], np.float32)
    decoded = decode_clip(encode_clip(samples, 16_000), 16_000)
    np.testing.assert_array_equal(decoded * 32_768, np.array([0, 1, 32_767, -32_768], np.float32))


@pytest.mark.parametrize("samples", [np.zeros(0, np.float32), np.array([np.nan], np.float32)])
def test_what_is_no_sound_is_not_encoded(samples):
    with pytest.raises(ValueError):
        encode_clip(samples, 16_000)


def clip_of(samples: np.ndarray, promised: int, **options: object) -> AudioClip:
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, **{"format": "FLAC", "subtype": "PCM_16", **options})
    return AudioClip(encoding=AudioEncoding.FILE, data=file.getvalue(), num_samples=promised)


def test_other_formats_are_decoded():
    clip = clip_of(noise(4_000), 4_000, format="OGG", subtype="VORBIS")
    assert decode_clip(clip, 16_000).shape == (4_000,)


@pytest.mark.parametrize(
    ("clip", "rate", "message"),
    [
        (clip_of(noise(800), 799), 16_000, "800 samples.*799"),
        (clip_of(noise(800), 800), 8_000, "16000 Hz.*8000 Hz"),
        (clip_of(noise(800).reshape(400, 2), 400), 16_000, "2 channels"),
        (AudioClip(encoding=AudioEncoding.PCM16, data=b"123", num_samples=1), 16_000, "2 bytes, not 3"),
        (AudioClip(encoding=AudioEncoding.FILE, data=b"no sound", num_samples=1), 16_000, "cannot be decoded"),
    ],
)
def test_a_clip_that_breaks_its_promise_is_an_error(clip, rate, message):
    with pytest.raises(SessionError, match=message):
        decode_clip(clip, rate)


def test_a_cut_clip_is_an_error():
    clip = encode_clip(noise(16_000), 16_000)
    with pytest.raises(SessionError, match="cannot be decoded"):
        decode_clip(
            AudioClip(encoding=clip.encoding, data=clip.data[: len(clip.data) // 2], num_samples=clip.num_samples),
            16_000,
        )


def test_read_audio_keeps_channels_and_resamples(tmp_path):
    time = np.arange(44_100) / 44_100
    tones = np.stack([np.sin(2 * np.pi * 440 * time), 0.5 * np.sin(2 * np.pi * 1_000 * time)], axis=1)
    soundfile.write(tmp_path / "tones.wav", tones, 44_100, subtype="FLOAT")
    audio = read_audio(tmp_path / "tones.wav", 16_000)
    assert audio.shape == (2, 16_000)
    time = np.arange(16_000) / 16_000
    expected = np.stack([np.sin(2 * np.pi * 440 * time), 0.5 * np.sin(2 * np.pi * 1_000 * time)])
    np.testing.assert_allclose(audio[:, 500:-500], expected[:, 500:-500], atol=1e-3)


@pytest.mark.parametrize(("name", "subtype"), [("a.flac", "PCM_16"), ("a.ogg", "OPUS"), ("a.mp3", None)])
def test_read_audio_reads_compressed_files(tmp_path, name, subtype):
    soundfile.write(tmp_path / name, noise(16_000), 16_000, subtype=subtype)
    assert read_audio(tmp_path / name, 16_000).shape == (1, 16_000)


def test_bad_files_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.wav: there is no such file"):
        read_audio(tmp_path / "gone.wav", 16_000)
    with pytest.raises(ValueError, match="no such file"):
        read_audio(tmp_path, 16_000)
    (tmp_path / "text.wav").write_text("this is not sound")
    with pytest.raises(ValueError, match=r"text\.wav: cannot be decoded"):
        read_audio(tmp_path / "text.wav", 16_000)
    (tmp_path / "zero.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be decoded"):
        read_audio(tmp_path / "zero.wav", 16_000)
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1), np.float32), 16_000)
    with pytest.raises(ValueError, match="holds no samples"):
        read_audio(tmp_path / "empty.wav", 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([np.nan], np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match="NaN"):
        read_audio(tmp_path / "nan.wav", 16_000)
    soundfile.write(tmp_path / "whole.mp3", noise(32_000), 16_000)
    data = (tmp_path / "whole.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(ValueError, match=r"cut\.mp3: ends after \d+ of 32000 samples"):
        read_audio(tmp_path / "cut.mp3", 16_000)


@pytest.mark.parametrize("rates", [(16_000, 24_000), (44_100, 16_000), (11_025, 16_000), (16_000, 16_000)])
@pytest.mark.parametrize("num_samples", [1, 7, 1_001])
def test_resampled_length_covers_the_same_time(rates, num_samples):
    resampled = resample(noise(num_samples), *rates)
    assert len(resampled) - 1 < num_samples * rates[1] / rates[0] <= len(resampled)
