"""Voices of every make behind one interface."""

import numpy as np

from data_pipelines import espeak
from data_pipelines.speech import Speaker

MAKERS = ("espeak",)


def draw_speaker(maker: str, split: str, rng: np.random.Generator) -> Speaker:
    """A voice of a maker and split.

    Raises:
        ValueError: there is no such maker.
    """
    if maker == "espeak":
        return espeak.draw_voice(split, rng)
    raise ValueError(f"maker {maker!r} is not one of {', '.join(MAKERS)}")
