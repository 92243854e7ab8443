"""flite through ctypes: five American and Scottish voices, three of them built from hours of a human's speech.

The library comes from Debian and is unpacked, not installed. Its statistical voices excite their
filters with the C library's random numbers, which are seeded anew for every utterance.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int16

from data_pipelines import debian
from data_pipelines.speech import Speech, speech_of, to_clock, warp

VOICES = ("kal", "kal16", "awb", "rms", "slt")
"""Two diphone voices of one man, at 8 and 16 kHz; a Scottish man, an American man, an American woman."""

PACKAGE = "libflite1"
_SEED = 5


@dataclass(frozen=True, kw_only=True)
class FliteVoice:
    """A voice of flite.

    Attributes:
        voice: one of `VOICES`.
        stretch: how much longer than usual sounds last.
        warp: by what factor pitch and formants are higher, and sounds shorter.
        cache: where Debian packages are unpacked.
    """

    voice: str
    cache: Path
    stretch: float = 1.0
    warp: float = 1.0

    def __post_init__(self) -> None:
        if self.voice not in VOICES:
            raise ValueError(f"flite has no voice {self.voice!r}; it has {', '.join(VOICES)}")

    @property
    def maker(self) -> str:
        """The program the voice comes from."""
        return "flite"

    @property
    def name(self) -> str:
        """`flite:voice@stretch/warp`."""
        return f"flite:{self.voice}@{self.stretch:g}/{self.warp:g}"

    def say(self, text: str) -> Speech:
        """The text spoken; flite's word times are not read.

        Raises:
            ValueError: flite cannot be had, or there is nothing to say.
        """
        if not text.strip():
            raise ValueError("there is no text to say")
        samples, rate_hz = _run(self.cache, self.voice, self.stretch, text)
        return speech_of(warp(to_clock(samples, rate_hz), self.warp))


class _Wave(ctypes.Structure):
    """cst_wave of cst_wave.h."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class _Voice(ctypes.Structure):
    """The beginning of cst_voice of cst_voice.h."""

    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


@functools.cache
def _library(cache: Path) -> tuple[ctypes.CDLL, dict[str, int]]:
    """The library and its voices."""
    tree = debian.unpack(PACKAGE, cache)
    (first,) = tree.glob("usr/lib/*/libflite.so.1")
    for folder in reversed(debian.library_directories([first], cache)[1:]):
        # What is loaded already is found by the libraries that need it.
        for path in folder.glob("libasound.so.*"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    flite = ctypes.CDLL(str(first), mode=ctypes.RTLD_GLOBAL)
    for name in ("libflite_usenglish", "libflite_cmulex"):
        ctypes.CDLL(str(first.parent / f"{name}.so.1"), mode=ctypes.RTLD_GLOBAL)
    flite.flite_init()
    flite.flite_text_to_wave.restype = ctypes.POINTER(_Wave)
    flite.flite_text_to_wave.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    flite.flite_feat_set_float.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float)
    flite.delete_wave.argtypes = (ctypes.c_void_p,)
    voices: dict[str, int] = {}
    for name in VOICES:
        library = ctypes.CDLL(str(first.parent / f"libflite_cmu_us_{name}.so.1"), mode=ctypes.RTLD_GLOBAL)
        register = getattr(library, f"register_cmu_us_{name}")
        register.restype, register.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
        voices[name] = register(None)
    return flite, voices


@functools.lru_cache(maxsize=8192)
def _run(cache: Path, voice: str, stretch: float, text: str) -> tuple[Int16[np.ndarray, " n"], int]:
    """Samples and their rate."""
    flite, voices = _library(cache)
    features = ctypes.cast(voices[voice], ctypes.POINTER(_Voice)).contents.features
    flite.flite_feat_set_float(features, b"duration_stretch", stretch)
    ctypes.CDLL(None).srand(_SEED)
    wave = flite.flite_text_to_wave(text.encode(), voices[voice])
    if not wave:
        raise ValueError(f"flite's voice {voice} failed to say {text!r}")
    try:
        samples = np.ctypeslib.as_array(wave.contents.samples, (wave.contents.num_samples,)).copy()
        return samples, int(wave.contents.sample_rate)
    finally:
        flite.delete_wave(wave)
