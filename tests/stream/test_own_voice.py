"""A live session with a voice: the same sound however it hears, as its mels vocoded at once, and kept in its record."""

import dataclasses

import numpy as np
import pytest
from small_model import small_model, small_sound

from tml.codec.griffin_lim import GriffinLim
from tml.codec.own_sound import silent_position
from tml.codec.vocoder import vocode
from tml.codec.waveform import decode_clip
from tml.config import AudioOutConfig, FlowConfig, VocoderConfig
from tml.export import bundle
from tml.export.bundle import Model
from tml.session import Stream, session_from_bytes, session_to_bytes
from tml.stream.live import LiveSession, TurnResult

NUM_TURNS, TURN_SAMPLES = 8, 3_200
VOICE = AudioOutConfig(
    frames_per_position=4,
    num_mels=20,
    flow=FlowConfig(width=8, num_blocks=1, num_steps=1),
    vocoder=VocoderConfig(num_iterations=2),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("voice"), VOICE)


def streamed(model: Model, chunk: int, number: int = 0) -> tuple[LiveSession, list[TurnResult]]:
    experiment = model.experiment
    live = LiveSession(model.params, experiment.model, model.layout, experiment.stream, model.tokenizer, number)
    sound = small_sound(NUM_TURNS * TURN_SAMPLES)
    turns = [turn for first in range(0, len(sound), chunk) for turn in live.push(sound[first : first + chunk])]
    return live, turns


@pytest.fixture(scope="module")
def whole(model: Model) -> tuple[LiveSession, list[TurnResult]]:
    return streamed(model, NUM_TURNS * TURN_SAMPLES)


def sound_of(turns: list[TurnResult]) -> np.ndarray:
    return np.concatenate([turn.sound for turn in turns])


def test_sound_comes_turn_by_turn_and_equals_its_mels_vocoded_at_once(model: Model, whole) -> None:
    _, turns = whole
    speaks = [turn.mels is not None for turn in turns]
    assert 1 < sum(speaks) < NUM_TURNS
    assert all(len(turn.sound) == TURN_SAMPLES for turn in turns)
    silence = np.tile(silent_position(VOICE), (4, 1))
    mels = np.concatenate([silence if turn.mels is None else turn.mels for turn in turns])
    np.testing.assert_array_equal(sound_of(turns), vocode(GriffinLim(model.experiment.model), mels, 4))
    assert np.abs(sound_of(turns)).max() > 1e-3


def test_any_chunks_give_the_same_sound_and_other_numbers_another(model: Model, whole) -> None:
    live, turns = whole
    other, again = streamed(model, 1_000)
    np.testing.assert_array_equal(sound_of(again), sound_of(turns))
    assert other.record("same") == live.record("same")
    assert live.num_compilations == 1
    _, another = streamed(model, NUM_TURNS * TURN_SAMPLES, number=1)
    assert not np.array_equal(sound_of(another), sound_of(turns))


def test_the_record_holds_own_sound_where_it_was_heard(whole) -> None:
    live, turns = whole
    record = live.record("spoken")
    assert session_from_bytes(session_to_bytes(record)) == record
    assert Stream.OWN_AUDIO in record.streams
    own = decode_clip(record.audio[Stream.OWN_AUDIO], record.sample_rate_hz)
    assert len(own) == (NUM_TURNS + 2) * TURN_SAMPLES
    assert not own[:TURN_SAMPLES].any()
    heard = np.clip(sound_of(turns), -1, 1 - 1 / 32_768)
    np.testing.assert_allclose(own[TURN_SAMPLES:-TURN_SAMPLES], heard, atol=1 / 32_768)


def test_a_bundle_carries_the_voice(model: Model, whole, tmp_path) -> None:
    bundle.save(model, tmp_path / "bundle")
    loaded = bundle.open_model(tmp_path / "bundle")
    assert loaded.experiment == model.experiment
    _, turns = streamed(dataclasses.replace(model, params=loaded.params), NUM_TURNS * TURN_SAMPLES)
    np.testing.assert_array_equal(sound_of(turns), sound_of(whole[1]))
