"""Where the words of an English transcript stand in its sound: forced alignment with pocketsphinx.

Words that its dictionary lacks (names, numbers, "e-mail") get the pronunciation that espeak-ng gives
them. Where a transcript cannot be aligned, `spread` lays its words evenly over what is audible, and
the caller says which of the two it was.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from data_pipelines import espeak
from data_pipelines.speech import SAMPLE_RATE_HZ, audible_span
from tml.session import Word

_FRAME_SAMPLES = SAMPLE_RATE_HZ // 100
# Wider than the library's own beams. Of 60 espeak voices 15 fail with those, 9 with these and none without;
# but of 49 wrong transcripts of human speech 25, 14 and 0 are refused. 80 of 80 right ones pass with any.
_BEAM, _WORD_BEAM = 1e-100, 1e-80
_PHONE_OF_ESPEAK = {
    "p": "P", "b": "B", "t": "T", "t#": "T", "t2": "T", "?": "T", "d": "D", "k": "K", "x": "K", "g": "G",
    "f": "F", "v": "V", "T": "TH", "D": "DH", "s": "S", "z": "Z", "S": "SH", "Z": "ZH", "h": "HH",
    "tS": "CH", "dZ": "JH", "m": "M", "n": "N", "n-": "AH N", "N": "NG", "l": "L", "@L": "AH L",
    "r": "R", "r-": "R", "w": "W", "j": "Y", ";": "",
    "a": "AE", "aa": "AE", "a#": "AH", "A:": "AA", "A@": "AA R", "0": "AA", "V": "AH",
    "@": "AH", "@-": "AH", "@2": "AH", "3": "ER", "3:": "ER", "E": "EH", "e@": "EH R",
    "I": "IH", "I2": "IH", "I#": "IH", "i": "IY", "i:": "IY", "i@": "IY AH", "i@3": "IH R",
    "O": "AO", "O:": "AO", "O2": "AO", "O@": "AO R", "o": "OW", "o@": "AO R", "oU": "OW",
    "U": "UH", "U@": "UH R", "u": "UW", "u:": "UW",
    "aI": "AY", "aI3": "AY ER", "aI@": "AY AH", "aU": "AW", "eI": "EY", "OI": "OY",
}  # fmt: skip
"""Sounds of espeak-ng's American English as phones of the CMU dictionary; what is not here cannot be aligned."""


_MARKS_AROUND = re.compile(r"^[^\w$€£]*_*|_*[^\w%°+]*$")
"""What is not spoken before and behind a word; "$5" and "5%" keep their signs."""


class AlignmentError(ValueError):
    """A transcript that cannot be aligned with its sound, and why."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """One word of a transcript: as written, and without the marks around it, which is what is spoken."""

    text: str
    spoken: str


def tokens(transcript: str) -> list[Token]:
    """The words of a transcript; a sign by itself ("-", "…") stays with the word before it, or else the one behind.

    Raises:
        ValueError: there is no word.
    """
    found: list[Token] = []
    before = ""
    for text in transcript.split():
        spoken = _MARKS_AROUND.sub("", unicodedata.normalize("NFC", text).replace("’", "'"))
        if any(letter.isalnum() for letter in spoken):
            found.append(Token(text=f"{before} {text}".strip(), spoken=spoken))
            before = ""
        elif found:
            found[-1] = Token(text=f"{found[-1].text} {text}", spoken=found[-1].spoken)
        else:
            before = f"{before} {text}".strip()
    if not found:
        raise ValueError(f"the transcript {transcript.strip()!r:.60} has no word in it")
    return found


@functools.lru_cache(maxsize=65_536)
def pronunciation(text: str) -> str:
    """The phones of a word as espeak-ng's American English reads it, such as `T W EH N T IY W AH N` for `21`.

    Raises:
        AlignmentError: a letter is not Latin, or a sound has no phone.
    """
    strange = [letter for letter in text if letter.isalpha() and "LATIN" not in unicodedata.name(letter, "")]
    if strange:
        raise AlignmentError(f"{text!r} is not English: {strange[0]!r} is no Latin letter")
    sounds = espeak.phonemes(text, espeak.Voice(accent="en-us"))
    unknown = [sound for sound in sounds if sound not in _PHONE_OF_ESPEAK]
    if unknown or not sounds:
        raise AlignmentError(f"{text!r} has no pronunciation in the dictionary, nor with sounds {list(sounds)}")
    return " ".join(_PHONE_OF_ESPEAK[sound] for sound in sounds if _PHONE_OF_ESPEAK[sound])


class ForcedAligner:
    """Aligns English transcripts; each result depends on its own sound and words only.

    Example:
        words = ForcedAligner().align(samples, tokens("please open the window"))

    Raises:
        ValueError: pocketsphinx or espeakng-loader is not installed.
    """

    def __init__(self) -> None:
        try:
            import pocketsphinx
        except ImportError as error:
            raise ValueError(
                "pocketsphinx is not installed, so words cannot be aligned; pip install -e '.[data]'"
            ) from error
        espeak.data_directory()
        self._decoder = pocketsphinx.Decoder(
            lm=None,
            samprate=SAMPLE_RATE_HZ,
            beam=_BEAM,
            pbeam=_BEAM,
            wbeam=_WORD_BEAM,
            bestpath=False,
            cmn="batch",
            loglevel="FATAL",
        )
        self._added: dict[str, str] = {}

    def align(self, samples: Float32[np.ndarray, " n"], words: Sequence[Token]) -> list[Word]:
        """The words with their times, in steps of 10 ms.

        Args:
            samples: speech at 16 kHz.
            words: all that is said, in order.

        Raises:
            AlignmentError: a word cannot be pronounced, or the words do not fit the sound.
        """
        names = [self._name(word.spoken) for word in words]
        pcm = np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
        try:
            self._decoder.set_align_text(" ".join(names))
            self._decoder.start_utt()
            self._decoder.process_raw(pcm, full_utt=True)
            self._decoder.end_utt()
        except RuntimeError as error:  # pocketsphinx raises nothing narrower
            raise AlignmentError(f"pocketsphinx failed: {error}") from error
        if self._decoder.hyp() is None:
            raise AlignmentError(f"{len(words)} words do not fit {len(samples) / SAMPLE_RATE_HZ:.2f} s of sound")
        segments = [segment for segment in self._decoder.seg() if segment.word[0] not in "<[+"]
        heard = [re.sub(r"\(\d+\)$", "", segment.word) for segment in segments]
        if heard != names:
            raise AlignmentError(f"{len(words)} words were aligned as {len(heard)}")
        return [
            Word(
                text=word.text,
                start=segment.start_frame * _FRAME_SAMPLES,
                end=min((segment.end_frame + 1) * _FRAME_SAMPLES, len(samples)),
            )
            for word, segment in zip(words, segments, strict=True)
        ]

    def _name(self, spoken: str) -> str:
        """The dictionary's name of a word; a word that it lacks is added under a name of our own."""
        if self._decoder.lookup_word(spoken.lower()) is not None:
            return spoken.lower()
        if spoken not in self._added:
            name = f"added-{len(self._added)}"
            self._decoder.add_word(name, pronunciation(spoken), False)
            self._added[spoken] = name
        return self._added[spoken]


def spread(samples: Float32[np.ndarray, " n"], words: Sequence[Token]) -> list[Word]:
    """The words laid over the audible span without gaps, each as long as its letters' share of all letters.

    Raises:
        ValueError: there is nothing to hear, or less than a sample for a word.
    """
    start, end = audible_span(samples)
    if end - start < len(words):
        raise ValueError(f"{end - start} audible samples of {len(samples)} do not hold {len(words)} words")
    shares = np.cumsum([0, *(len(word.spoken) for word in words)])
    bounds = [start + (end - start) * int(share) // int(shares[-1]) for share in shares]
    return [
        Word(text=word.text, start=first, end=last)
        for word, first, last in zip(words, bounds[:-1], bounds[1:], strict=True)
    ]
