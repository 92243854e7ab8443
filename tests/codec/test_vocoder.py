"""Vocoders: a stream equals the whole, has no clicks, sounds in its place, and loses little against librosa."""

import dataclasses

import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.signal

from data_pipelines.espeak import Voice
from tml.codec import audio, own_sound
from tml.codec.griffin_lim import GriffinLim
from tml.codec.vocoder import vocode
from tml.codec.vocoder_program import VocoderProgram, save_program
from tml.config import AudioOutConfig, ModelConfig, VocoderConfig, VocoderKind

RATE_HZ, HOP = 16_000, 800


def voiced(**vocoder) -> ModelConfig:
    return ModelConfig(audio_out=AudioOutConfig(frames_per_position=4, vocoder=VocoderConfig(**vocoder)))


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    said = Voice(accent="en-us", rate=160).say("please open the window before the train leaves").samples
    return np.pad(said, (1_600, 1_600 - len(said) % 3_200 + 3_200)).astype(np.float32)


def distance_db(sound: np.ndarray, reference: np.ndarray, model: ModelConfig) -> float:
    """Mean distance of log-mels, in decibels, where the reference is not silent."""
    size, cfg = min(len(sound), len(reference)), own_sound.frame_config(model)
    ours, theirs = (np.maximum(audio.log_mels(x[:size], cfg), -3.0) for x in (sound, reference))
    return 20 * float(np.abs(ours - theirs)[theirs.max(axis=1) > -1.5].mean())


def test_own_mels_hold_nothing_of_later_sound(speech: np.ndarray) -> None:
    model, cut = voiced(), 11 * HOP
    changed = speech.copy()
    changed[cut:] = 0.5
    before, after = own_sound.own_mels(speech, model), own_sound.own_mels(changed, model)
    np.testing.assert_array_equal(before[:11], after[:11])
    assert (before[11] != after[11]).any()
    assert before.dtype == np.float16
    assert before.shape == (len(speech) // HOP, 320)


def test_silence_is_silent_and_speech_is_audible(speech: np.ndarray) -> None:
    model = voiced()
    mels = own_sound.own_mels(np.concatenate([np.zeros(8_000, np.float32), speech]), model)
    audible = own_sound.audible(mels, model.audio_out)
    assert not audible[:10].any()
    assert audible[15:30].mean() > 0.8
    np.testing.assert_array_equal(mels[3], own_sound.silent_position(model.audio_out))
    sound = vocode(GriffinLim(model), np.tile(own_sound.silent_position(model.audio_out), (12, 1)), 4)
    np.testing.assert_array_equal(sound, np.zeros(12 * HOP, np.float32))


@pytest.mark.parametrize("look_ahead_frames", [0, 3])
def test_a_stream_equals_the_whole_and_is_as_long_as_its_mels(speech: np.ndarray, look_ahead_frames: int) -> None:
    model = voiced(num_iterations=4, look_ahead_frames=look_ahead_frames)
    mels, vocoder = own_sound.own_mels(speech, model), GriffinLim(model)
    whole = vocode(vocoder, mels, 4)
    assert len(whole) == len(mels) * HOP
    assert vocoder.delay_samples == 600 + 200 * look_ahead_frames
    state, pieces = GriffinLim(model).init_state(), []
    for first in range(0, len(mels), 4):
        state, piece = GriffinLim(model).step(state, mels[first : first + 4].copy())
        assert len(piece) == 4 * HOP
        pieces.append(piece)
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_a_steady_tone_has_no_clicks_where_blocks_meet() -> None:
    model = voiced()
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(3 * RATE_HZ) / RATE_HZ)).astype(np.float32)
    vocoder = GriffinLim(model)
    sound = vocode(vocoder, own_sound.own_mels(tone, model), 4)
    # A click is energy where the tone has none: above 2 kHz, over stretches of 5 ms.
    high = scipy.signal.sosfilt(scipy.signal.butter(6, 2_000, "highpass", fs=RATE_HZ, output="sos"), sound)[RATE_HZ:]
    power = np.square(high).reshape(-1, 80).mean(axis=1)
    seams = np.arange(len(power)) % 40 < 2
    assert power[seams].mean() < 2 * power[~seams].mean()
    assert power[seams].max() < 2 * power[~seams].max()


def test_speech_sounds_in_its_place_and_nearly_as_librosa_makes_it(speech: np.ndarray) -> None:
    model = voiced()
    vocoder, mels = GriffinLim(model), own_sound.own_mels(speech, model)
    sound = vocode(vocoder, mels, 4)[vocoder.delay_samples :]
    found = distance_db(sound, speech, model)
    for shift in (-400, 400):
        assert found < distance_db(np.roll(sound, shift), speech, model)
    frames = librosa.griffinlim(
        vocoder.bin_magnitudes(mels).T, n_iter=60, hop_length=200, n_fft=800, center=False, random_state=0
    )
    reference = distance_db(frames[600:].astype(np.float32), speech, model)
    assert found < reference + 0.3
    assert found < 1.2


def test_magnitudes_come_back_from_mels(speech: np.ndarray) -> None:
    model = voiced()
    mels = own_sound.own_mels(speech, model)
    basis = audio.mel_basis(own_sound.frame_config(model))
    wanted = own_sound.magnitudes(mels, model.audio_out)
    found = GriffinLim(model).bin_magnitudes(mels) @ basis.T
    loud = wanted > 0.01
    assert np.abs(np.log10(found[loud] / wanted[loud])).mean() < 0.05


def test_a_program_of_another_s_network_is_a_vocoder(tmp_path, speech: np.ndarray) -> None:
    model = voiced()

    def init() -> list:
        return [jnp.zeros(16, jnp.float32), jnp.int32(0)]

    def step(state: list, mels: jnp.ndarray) -> tuple[list, jnp.ndarray]:
        frames = jnp.concatenate([state[0], jnp.mean(mels, axis=1)])
        return [frames[-16:], state[1] + 1], jnp.repeat(frames[:16], 200)

    save_program(tmp_path / "vocoder", init, step, frames_per_turn=16, delay_samples=3_200, model=model)
    named = VocoderConfig(kind=VocoderKind.PROGRAM, program=str(tmp_path / "vocoder"))
    with_program = dataclasses.replace(model, audio_out=dataclasses.replace(model.audio_out, vocoder=named))
    vocoder, mels = VocoderProgram(with_program), own_sound.own_mels(speech, model)
    sound = vocode(vocoder, mels, 4)
    logs = mels.astype(np.float32).reshape(-1, 80) * 1.0 - 2.0
    expected = np.repeat(np.concatenate([np.zeros(16), logs.mean(axis=1)])[: len(logs)], 200)
    np.testing.assert_allclose(sound, expected, atol=1e-4)
    other = dataclasses.replace(with_program.audio_out, num_mels=40)
    with pytest.raises(ValueError, match=r"for mels .*'num_mels': 80.*the model makes .*'num_mels': 40"):
        VocoderProgram(dataclasses.replace(with_program, audio_out=other))
    absent = dataclasses.replace(named, program=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="is no vocoder"):
        VocoderProgram(
            dataclasses.replace(with_program, audio_out=dataclasses.replace(with_program.audio_out, vocoder=absent))
        )
