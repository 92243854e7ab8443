"""Synthesised sessions of every behaviour, and a model of random values, with eyes and a voice, to play them."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from small_model import small_model

from data_pipelines.behaviours.task import BehaviourTask
from data_pipelines.behaviours.vocabulary import own_words
from tml.codec.text import train_tokenizer
from tml.config import AudioOutConfig, EvaluationConfig, FlowConfig, MicroTurnConfig, VideoConfig, VocoderConfig
from tml.duplex.player import Player
from tml.export.bundle import Model
from tml.session import Behaviour, Session, Stream

VOICE = AudioOutConfig(
    frames_per_position=4,
    num_mels=20,
    flow=FlowConfig(width=8, num_blocks=1, num_steps=1),
    vocoder=VocoderConfig(num_iterations=2),
)
EYES = VideoConfig(fold_dims=(4, 8, 16), max_tiles_per_turn=1)
NUM_SLOTS = 3


@functools.cache
def sessions_of(behaviour: Behaviour, count: int = 2) -> tuple[Session, ...]:
    task = BehaviourTask(seed=5, shares={behaviour: 1.0})
    return tuple(task.session("heldout", index) for index in range(count))


def delegations() -> tuple[Session, ...]:
    """Sessions of delegation in which a result comes back."""
    found = sessions_of(Behaviour.DELEGATION, 6)
    return tuple(session for session in found if Stream.BACKGROUND in session.streams)


@functools.cache
def random_model() -> Model:
    """Random values; its tokenizer knows the words of the behaviours, and its turns hold what they put out."""
    with tempfile.TemporaryDirectory() as folder:
        model = small_model(Path(folder), VOICE, EYES, vocab_size=512, turn=MicroTurnConfig())
        texts = [" ".join(own_words()), '{"name":"delegate","arguments":{"colour":"red"}}'] * 3
        tokenizer = train_tokenizer(texts, 512, Path(folder) / "words")
    experiment = replace(model.experiment, evaluation=EvaluationConfig(num_slots=NUM_SLOTS))
    return replace(model, experiment=experiment, tokenizer=tokenizer)


@functools.cache
def random_player(num_slots: int = NUM_SLOTS) -> Player:
    model = random_model()
    config = model.experiment
    return Player(model.params, config.model, model.layout, config.stream, model.tokenizer, num_slots=num_slots)
