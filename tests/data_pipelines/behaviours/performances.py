"""Sessions of every behaviour, made once for all tests of this folder."""

import functools

import numpy as np

from data_pipelines.behaviours.task import BehaviourTask
from tml.codec.waveform import decode_clip
from tml.config import AudioConfig, MicroTurnConfig
from tml.microturn import Clock
from tml.session import Behaviour, Session, Stream

RATE = 16_000
NUM_PER_SPLIT = 10
CLOCK = Clock.of(MicroTurnConfig(), AudioConfig())


def task_of(behaviour: Behaviour, **options) -> BehaviourTask:
    return BehaviourTask(seed=11, shares={behaviour: 1.0}, **options)


@functools.cache
def sessions_of(behaviour: Behaviour, split: str = "train") -> tuple[Session, ...]:
    return tuple(task_of(behaviour).session(split, index) for index in range(NUM_PER_SPLIT))


def both_splits(behaviour: Behaviour) -> tuple[Session, ...]:
    return sessions_of(behaviour, "train") + sessions_of(behaviour, "heldout")


def sound(session: Session, stream: Stream) -> np.ndarray:
    return decode_clip(session.audio[stream], RATE)
