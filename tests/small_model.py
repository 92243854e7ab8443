"""A small model with a real tokenizer, which speaks at random; shared by tests of streaming, evaluation and apps."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tml.codec.text import train_tokenizer
from tml.codec.waveform import encode_clip
from tml.config import (
    AttentionConfig,
    AudioConfig,
    AudioOutConfig,
    EvaluationConfig,
    Experiment,
    MicroTurnConfig,
    ModelConfig,
    MoEConfig,
    StreamConfig,
    VideoConfig,
)
from tml.export.bundle import Model
from tml.model import transformer
from tml.params import Init, ParamSpec, map_specs
from tml.session import Expectation, ExpectationKind, Session, Stream

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE_HZ = 16_000


SMALL_TURN = MicroTurnConfig(max_text_in_per_turn=4, max_text_out_per_turn=3, max_action_per_turn=4)


def small_experiment(
    voice: AudioOutConfig | None = None,
    video: VideoConfig | None = None,
    vocab_size: int = 288,
    turn: MicroTurnConfig = SMALL_TURN,
    **stream,
) -> Experiment:
    """A sliding and a global layer: programs take long to compile."""
    attention = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=8, global_extent=16, rel_rank=2)
    return Experiment(
        name="small",
        model=ModelConfig(
            num_layers=2,
            num_dense_layers=1,
            global_layers=(1,),
            d_model=16,
            dense_dim=24,
            vocab_size=vocab_size,
            attention=attention,
            moe=MoEConfig(num_experts=4, expert_dim=8, block_rows=8),
            audio=AudioConfig(num_mels=8, num_levels=4),
            audio_out=voice or AudioOutConfig(),
            video=video or VideoConfig(),
        ),
        turn=turn,
        stream=StreamConfig(**{"max_positions": 512, "temperature": 1.0, **stream}),
        evaluation=EvaluationConfig(num_slots=2, answer_window_s=1.0),
    )


def small_model(
    folder: Path, voice: AudioOutConfig | None = None, video: VideoConfig | None = None, **changes
) -> Model:
    """Random values in every parameter; the tokenizer is trained into `folder`."""
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 288, folder / "tokenizer")
    experiment = small_experiment(voice, video, **changes)
    rng = np.random.default_rng(0)

    def drawn(spec: ParamSpec) -> jax.Array:
        deviation = 1 / math.sqrt(spec.fan_in) if spec.init is Init.NORMAL else 0.3
        values = deviation * rng.standard_normal(spec.shape) + (spec.init is Init.ONES)
        return jnp.asarray(values, jnp.float32)

    params = map_specs(drawn, transformer.specs(experiment.model))
    return Model(experiment=experiment, params=params, tokenizer=tokenizer)


def small_sound(num_samples: int, seed: int = 0) -> np.ndarray:
    """Noise that swells, in whole steps of 16 bits, so that a clip holds it exactly."""
    noise = np.random.default_rng(seed).standard_normal(num_samples)
    swelling = np.abs(np.sin(np.arange(num_samples) / 2_000)) ** 3
    return (np.rint(noise * swelling * 4_000) / 32_768).astype(np.float32)


def small_session(number: int, seconds: float = 2.0) -> Session:
    """A session with a request, a pause in it, and silence expected at its start."""
    size = int(seconds * RATE_HZ)
    expected = [
        Expectation(kind=ExpectationKind.SILENCE, start=0, end=RATE_HZ // 4),
        Expectation(kind=ExpectationKind.SILENCE, start=RATE_HZ // 2, end=RATE_HZ, tag="pause"),
        Expectation(kind=ExpectationKind.ANSWER, start=RATE_HZ // 2, end=RATE_HZ, text=WORDS[number], tag="say"),
    ]
    return Session(
        session_id=f"small-{number}",
        sample_rate_hz=RATE_HZ,
        num_samples=size,
        streams=(Stream.USER_AUDIO,),
        audio={Stream.USER_AUDIO: encode_clip(small_sound(size, number), RATE_HZ)},
        expectations=tuple(expected),
    )


def without_sound(session: Session) -> Session:
    """The same session with nothing to hear."""
    return dataclasses.replace(session, audio={}, streams=())
