"""Recordings as other people keep them, spoken by espeak: clips with transcripts, stereo talks with word times."""

import json
from pathlib import Path

import numpy as np
import soundfile

from data_pipelines import espeak
from data_pipelines.speech import SAMPLE_RATE_HZ, Speech

SENTENCES = (
    "please open the window and turn on the light",
    "the quick brown fox jumps over the lazy dog",
    "what is the weather in london tomorrow morning",
    "seven green bottles are standing on the wall",
    "my friend told me a very long story about ships",
)
VARIANTS = ("", "m3", "f2", "m7", "f4")


def speech(index: int) -> Speech:
    return espeak.synthesise(SENTENCES[index], espeak.Voice(accent="en-us", variant=VARIANTS[index]))


def write_clip(path: Path, samples: np.ndarray, transcript: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, SAMPLE_RATE_HZ)
    if transcript is not None:
        path.with_suffix(".txt").write_text(transcript + "\n")


def write_talk(path: Path, rate_hz: int = SAMPLE_RATE_HZ) -> tuple[Speech, Speech]:
    """A stereo file in which the model (left) speaks, and then the user (right); and its words."""
    own, user = speech(0), speech(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = np.zeros((len(own.samples) + len(user.samples), 2), np.float32)
    channels[: len(own.samples), 0] = own.samples
    channels[len(own.samples) :, 1] = user.samples
    soundfile.write(path, channels, rate_hz, subtype="PCM_16")
    write_words(path, alignments(own, user))
    return own, user


def alignments(own: Speech, user: Speech) -> list:
    def timed(word, shift: int, speaker: str) -> list:
        times = [(word.start + shift) / SAMPLE_RATE_HZ, (word.end + shift) / SAMPLE_RATE_HZ]
        return [word.text, times, speaker]

    shift = len(own.samples)
    return [timed(word, 0, "SPEAKER_MAIN") for word in own.words] + [
        timed(word, shift, "SPEAKER_1") for word in user.words
    ]


def write_words(path: Path, entries: object) -> None:
    path.with_suffix(".json").write_text(json.dumps({"alignments": entries}))
