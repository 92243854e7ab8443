"""Voices of every make behind one interface, each in a split."""

from pathlib import Path

import numpy as np

from data_pipelines import debian, espeak
from data_pipelines.festival import PACKAGES as FESTIVAL_PACKAGES
from data_pipelines.festival import VOICES as FESTIVAL_VOICES
from data_pipelines.festival import FestivalVoice
from data_pipelines.flite import PACKAGE as FLITE_PACKAGE
from data_pipelines.flite import VOICES as FLITE_VOICES
from data_pipelines.flite import FliteVoice
from data_pipelines.speech import Speaker

MAKERS = ("espeak", "flite", "festival")
DEFAULT_CACHE = Path("~/.cache/tml").expanduser()
"""Where Debian packages are unpacked unless another place is named."""

OWN_VOICE = espeak.Voice(accent="en-us", variant="f3", pitch=50, rate=175)
"""The model's own voice."""

_STRETCHES = (0.85, 1.0, 1.2)
_WARPS = (0.86, 0.9, 0.95, 1.0, 1.05, 1.1, 1.16)
"""Vocal tracts of adults differ by about this much."""


def draw_speaker(maker: str, split: str, rng: np.random.Generator, cache: Path = DEFAULT_CACHE) -> Speaker:
    """A voice of a maker and split. The few voices of flite and festival all train, so none of them is held out.

    Raises:
        ValueError: there is no such maker, or it has no voice in that split.
    """
    if maker not in MAKERS:
        raise ValueError(f"maker {maker!r} is not one of {', '.join(MAKERS)}")
    if maker == "espeak":
        return espeak.draw_voice(split, rng)
    if split != "train":
        raise ValueError(f"all voices of {maker} are for training, so there is none in split {split}; use espeak")
    stretch = _STRETCHES[int(rng.integers(len(_STRETCHES)))]
    warp = _WARPS[int(rng.integers(len(_WARPS)))]
    names = FLITE_VOICES if maker == "flite" else tuple(FESTIVAL_VOICES)
    voice = names[int(rng.integers(len(names)))]
    make = FliteVoice if maker == "flite" else FestivalVoice
    return make(voice=voice, cache=cache, stretch=stretch, warp=warp)


def licences(makers: tuple[str, ...], cache: Path = DEFAULT_CACHE) -> dict[str, bytes]:
    """Licence files of the voices that come from Debian, to keep beside what they said."""
    packages = {"espeak": (), "flite": (FLITE_PACKAGE,), "festival": FESTIVAL_PACKAGES}
    found: dict[str, bytes] = {}
    for maker in makers:
        for package in packages[maker]:
            found |= debian.licence_files(package, debian.unpack(package, cache))
    return found
