"""espeak-ng through ctypes: many voices, exact word times, the same bytes in every process.

The library (GPL-3, from the `espeakng-loader` package) keeps oscillator phases and random numbers in
static variables, so that saying a thing twice gives two different sounds. Here every utterance
begins with a freshly loaded library and a fixed seed, which costs half a millisecond and makes
`say` a pure function of voice and text.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import re
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.speech import SAMPLE_RATE_HZ, Speech, speech_of, to_clock
from tml.session import Word

ACCENTS = ("en", "en-us", "en-029", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc")
"""The English accents; `en` is British."""

HELD_OUT_VARIANTS = (
    "Alex", "Annie", "Reed", "Storm", "david", "f4", "m5", "paul", "quincy", "sandro", "victor",
)  # fmt: skip
"""Variants that training never hears, in any accent.

None shares a family of parameters with one that it does. Caricatures only train, since no held-out voice
should be unlike all people: none of these moves one of the first three formants, which make the vowels, by
more than 35 % (as `Marco` and `travis` do) or lacks one of the first six (as `antonio` does).
"""

EXCLUDED_VARIANTS = ("Mr serious", "RicishayMax", "RicishayMax2", "RicishayMax3", "fast", "kaukovalta")
"""In neither split: a copy of `Tweaky` with a space in its name; the base voice; and four of whose words
the recogniser Whisper tiny.en mistakes more than 60 % (of the others', 19 % in the median)."""

_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT = 2, 0x0001, 0x8000
_CHARS_UTF8, _POSITION_CHARACTER = 1, 1
_RATE, _PITCH = 1, 3
_WORD_EVENT, _PHONEME_EVENT, _LIST_END = 1, 7, 0
_SEED = 5


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A voice of espeak-ng.

    Attributes:
        accent: a language of espeak-ng by its file name in lower case: `en`, `en-us`, `de`.
        variant: a file of its `voices/!v`, or empty for the base voice.
        pitch: 0 to 99, 50 is the variant's own.
        rate: words a minute.
    """

    accent: str = "en"
    variant: str = ""
    pitch: int = 50
    rate: int = 175

    def __post_init__(self) -> None:
        if self.accent not in languages():
            raise ValueError(f"espeak-ng has no language {self.accent!r}; English ones are {', '.join(ACCENTS)}")
        if self.variant and self.variant not in variants():
            raise ValueError(f"espeak-ng has no variant {self.variant!r}; it has {', '.join(variants())}")
        if not 0 <= self.pitch <= 99 or not 80 <= self.rate <= 450:
            raise ValueError(f"pitch {self.pitch} must lie in 0 to 99 and rate {self.rate} in 80 to 450")

    @property
    def maker(self) -> str:
        """The program the voice comes from."""
        return "espeak"

    @property
    def name(self) -> str:
        """`espeak:accent+variant@pitch/rate`."""
        return f"espeak:{self.accent}+{self.variant or 'base'}@{self.pitch}/{self.rate}"

    def say(self, text: str) -> Speech:
        """The text spoken; see `synthesise`."""
        return synthesise(text, self)


@functools.cache
def data_directory() -> Path:
    """The espeak-ng-data directory of `espeakng-loader`.

    Raises:
        ValueError: the package is not installed.
    """
    return Path(_loader().get_data_path())


@functools.cache
def languages() -> dict[str, Path]:
    """The file of every language, by its name in lower case."""
    files = (path for path in (data_directory() / "lang").rglob("*") if path.is_file())
    return {path.name.lower(): path for path in sorted(files)}


@functools.cache
def variants() -> tuple[str, ...]:
    """Every variant there is, sorted, without the excluded ones."""
    names = (path.name for path in (data_directory() / "voices" / "!v").iterdir())
    return tuple(sorted(name for name in names if name not in EXCLUDED_VARIANTS))


@functools.cache
def split_variants(split: str) -> tuple[str, ...]:
    """The variants of a split, `train` or `heldout`; no variant is in both.

    Raises:
        ValueError: there is no such split.
    """
    if split == "heldout":
        missing = sorted({*HELD_OUT_VARIANTS} - {*variants()})
        if missing:
            raise ValueError(f"this espeak-ng lacks the held-out variants {', '.join(missing)}")
        return HELD_OUT_VARIANTS
    if split == "train":
        return ("", *(name for name in variants() if name not in HELD_OUT_VARIANTS))
    raise ValueError(f"split {split!r} is not one of train, heldout")


@functools.lru_cache(maxsize=1024)
def synthesise(text: str, voice: Voice) -> Speech:
    """Says a text.

    Word times are those of the library's own events: a word begins with its first phoneme and ends
    where the next word or a pause begins. Words that the library runs together ("of the") are one Word.

    Raises:
        ValueError: the text has nothing to say, or the library fails.
    """
    if not text.strip():
        raise ValueError("there is no text to say")
    pcm, rate_hz, events = _run(text, voice)
    samples = to_clock(pcm, rate_hz)
    words = _words(text, events, SAMPLE_RATE_HZ / rate_hz, len(samples))
    speech = speech_of(samples, words)
    speech.samples.flags.writeable = False
    return speech


def phonemes(text: str, voice: Voice) -> tuple[str, ...]:
    """The sounds of a text in espeak-ng's own spelling (`3:`, `oU`, `dZ`), without stress marks and pauses.

    Raises:
        ValueError: the text has nothing to say, or the library fails.
    """
    if not text.strip():
        raise ValueError("there is no text to say")
    _, _, events = _run(text, voice)
    names = [event.phoneme.decode().lstrip("',%=") for event in events if event.kind == _PHONEME_EVENT]
    return tuple(name for name in names if name and not name.startswith("_"))


@dataclass(frozen=True)
class _Event:
    kind: int
    position: int
    sample: int
    phoneme: bytes


class _EventStruct(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_EventStruct))


def _loader():
    try:
        import espeakng_loader
    except ImportError as error:
        raise ValueError(
            "espeakng-loader is not installed, so there are no espeak voices; pip install -e '.[data]'"
        ) from error
    return espeakng_loader


@functools.cache
def _flat_data() -> str:
    """A directory of links to the library's data in which every language lies at the top.

    Given a file name, the library opens that file; given a language, it first reads every voice it
    has, which takes 5 ms a call.
    """
    holder = tempfile.TemporaryDirectory(prefix="tml-espeak-")
    flat = Path(holder.name) / "espeak-ng-data"
    (flat / "lang").mkdir(parents=True)
    for path in data_directory().iterdir():
        if path.name != "lang":
            (flat / path.name).symlink_to(path)
    for name, path in languages().items():
        (flat / "lang" / name).symlink_to(path)
    weakref.finalize(_Callback, holder.cleanup)
    return str(flat)


@functools.cache
def _system() -> ctypes.CDLL:
    """The C library of this process."""
    system = ctypes.CDLL(None)
    system.dlopen.restype, system.dlopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
    system.dlclose.argtypes = (ctypes.c_void_p,)
    return system


@contextlib.contextmanager
def _fresh_library() -> Iterator[ctypes.CDLL]:
    """The library with all its static state as it was born."""
    path, system = str(_loader().get_library_path()), _system()
    loaded = system.dlopen(path.encode(), os.RTLD_NOW | os.RTLD_NOLOAD)
    if loaded:
        system.dlclose(loaded)
        raise ValueError(f"{path} is in use by another part of this process; its sounds would not be reproducible")
    library = ctypes.CDLL(path)
    try:
        system.srand(_SEED)
        yield library
    finally:
        library.espeak_Terminate()
        system.dlclose(library._handle)


def _run(text: str, voice: Voice) -> tuple[np.ndarray, int, list[_Event]]:
    chunks: list[bytes] = []
    events: list[_Event] = []

    @_Callback
    def receive(wave, count, struct):
        if wave and count > 0:
            chunks.append(ctypes.string_at(wave, 2 * count))
        for i in itertools.count():
            item = struct[i]
            if item.type == _LIST_END:
                return 0
            if item.type in (_WORD_EVENT, _PHONEME_EVENT):
                phoneme = bytes(item.id) if item.type == _PHONEME_EVENT else b""
                events.append(_Event(item.type, item.text_position, item.sample, phoneme))

    name = voice.accent + (f"+{voice.variant}" if voice.variant else "")
    data = text.encode() + b"\0"
    with _fresh_library() as library:
        options = _PHONEME_EVENTS | _DONT_EXIT
        rate_hz = library.espeak_Initialize(_SYNCHRONOUS, 0, _flat_data().encode(), options)
        if rate_hz <= 0:
            raise ValueError(f"espeak-ng cannot read its data in {data_directory()}: code {rate_hz}")
        library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        library.espeak_SetSynthCallback(receive)
        status = library.espeak_SetVoiceByName(name.encode())
        status = status or library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        status = status or library.espeak_SetParameter(_RATE, voice.rate, 0)
        status = status or library.espeak_Synth(
            data, ctypes.c_size_t(len(data)), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if status:
            raise ValueError(f"espeak-ng failed with code {status} for voice {name}, text {text!r}")
    return np.frombuffer(b"".join(chunks), np.int16), rate_hz, events


def _words(text: str, events: Sequence[_Event], scale: float, num_samples: int) -> tuple[Word, ...]:
    """Words by character span: a word belongs to the last event at or before its last letter."""
    spans = [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
    starts = [i for i, event in enumerate(events) if event.kind == _WORD_EVENT]
    pieces: list[tuple[list[str], int, int]] = []
    for rank, i in enumerate(starts):
        until = starts[rank + 1] if rank + 1 < len(starts) else len(events)
        inside = events[i + 1 : until]
        sounding = [event.sample for event in inside if not event.phoneme.startswith(b"_")]
        pauses = [event.sample for event in inside if event.phoneme.startswith(b"_") and sounding]
        start = sounding[0] if sounding else events[i].sample
        last = events[until].sample if until < len(events) else num_samples / scale
        if until < len(events) and sounding and last <= sounding[-1]:
            # The event came a sound too early, before the word's last one: the word lasts until the next sound.
            last = next((event.sample for event in events[until:] if event.kind == _PHONEME_EVENT), last)
        end = min([sample for sample in pauses if sample > start] + [last])
        # Positions are characters counted from 1.
        first = events[i].position - 1
        following = events[starts[rank + 1]].position - 1 if rank + 1 < len(starts) else len(text)
        inner = [text[a:b] for a, b in spans if first <= a < following or a < first < b]
        seen = bool(pieces) and any(a < first < b for a, b in spans)
        if seen:
            # A second event inside one word ("twenty-one"): it lengthens the word.
            words, begun, _ = pieces[-1]
            pieces[-1] = ([*words, *inner[1:]], begun, round(end * scale))
        elif inner:
            pieces.append((inner, round(start * scale), round(end * scale)))
    return tuple(
        Word(text=" ".join(words), start=min(start, num_samples), end=min(end, num_samples))
        for words, start, end in pieces
    )


def draw_voice(split: str, rng: np.random.Generator) -> Voice:
    """A voice of a split: any variant in any English accent, at some pitch and rate; a little wider in training."""
    names = split_variants(split)
    wider = int(split == "train")
    return Voice(
        accent=ACCENTS[int(rng.integers(len(ACCENTS)))],
        variant=names[int(rng.integers(len(names)))],
        pitch=int(rng.integers(7 - wider, 14 + wider)) * 5,
        rate=int(rng.integers(13 - wider, 21 + wider)) * 10,
    )
