"""Tone and pauses: the same words, said in two ways, ask for two different answers.

Pitch: a last word that rises asks ("yes"), one that falls tells ("okay"). Rate: "fast" or "slow". Emphasis: which of
two words is stressed. Pause: behind which of two words there is one. For every sentence both ways are equally
likely, so that the words alone leave a chance of one half.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_pipelines import espeak
from data_pipelines.behaviours import requests
from data_pipelines.behaviours.cast import Axis, Cast
from data_pipelines.behaviours.requests import Request
from data_pipelines.behaviours.stage import Stage
from data_pipelines.behaviours.vocabulary import (
    COLOURS,
    DIGITS,
    NEW_PITCH_PHRASES,
    NEW_RATE_PHRASES,
    PITCH_PHRASES,
    RATE_PHRASES,
)
from data_pipelines.mixing import seconds
from data_pipelines.speech import Utterance, utter
from tml.session import ExpectationKind, Word

RISE, FALL = 35, -25
"""Of the last word, in steps of espeak's pitch, whose range is 0 to 99."""
FAST_RATE, SLOW_RATE = (250, 290), (90, 115)
"""Words a minute; voices otherwise speak at 120 to 200."""
STRESS_PITCH, STRESS_RATE, STRESS_GAIN = 18, 0.75, 1.6
"""A stressed word is higher, slower and louder; the other one is softer by the same factor."""

KINDS = ("pitch", "rate", "emphasis", "pause")
_JOINT_S = 0.04
_LONGEST_S = 7.0
"""A slow sentence, its answer, and the gap behind it."""


def tone(stage: Stage, cast: Cast) -> int:
    """Two or three sentences, each answered by how it was said. Returns the session's length."""
    place = cast.samples(0.2, 0.8)
    if cast.chance(cast.config.negative_fraction / 2):
        for _ in range(2):
            place = requests.distract(stage, cast, place) + seconds(2.0) + cast.samples(0.1, 0.5)
        return place
    voice = cast.speaker
    assert isinstance(voice, espeak.Voice), "only espeak's voices have a pitch and a rate"
    for _ in range(cast.number(2, 3)):
        if place > seconds(cast.config.max_session_s - _LONGEST_S):
            break
        kind = cast.one(KINDS)
        spoken, answer = {"pitch": _pitch, "rate": _rate, "emphasis": _emphasis, "pause": _pause}[kind](cast, voice)
        end = stage.hear(place, spoken)
        for first, last in spoken.pauses:
            stage.expect(ExpectationKind.SILENCE, place + first, place + last, tag="pause")
        request = Request(tag=kind, parts=(), answer=(answer,))
        requests.answer(stage, cast, request, place, end)
        place = end + seconds(2.0) + cast.samples(0.1, 0.6)
    return place


def _pitch(cast: Cast, voice: espeak.Voice) -> tuple[Utterance, str]:
    *words, last = cast.one(NEW_PITCH_PHRASES if Axis.WORDING in cast.novel else PITCH_PHRASES).split()
    asks = cast.chance(0.5)
    base = replace(voice, pitch=min(max(voice.pitch, 30), 60))
    end = replace(base, pitch=base.pitch + (RISE if asks else FALL))
    return joined([utter(base, [" ".join(words)], []), utter(end, [last], [])], [_JOINT_S]), "yes" if asks else "okay"


def _rate(cast: Cast, voice: espeak.Voice) -> tuple[Utterance, str]:
    phrase = cast.one(NEW_RATE_PHRASES if Axis.WORDING in cast.novel else RATE_PHRASES)
    fast = cast.chance(0.5)
    rate = cast.number(*(FAST_RATE if fast else SLOW_RATE))
    return utter(replace(voice, rate=rate // 5 * 5), [phrase], []), "fast" if fast else "slow"


def _emphasis(cast: Cast, voice: espeak.Voice) -> tuple[Utterance, str]:
    words = cast.pair(COLOURS, DIGITS[1:], Axis.OBJECT)
    chosen = cast.number(0, 1)
    pieces = [utter(voice, ["I want"], [])]
    for i, word in enumerate(words):
        stressed = i == chosen
        pitch = min(voice.pitch + STRESS_PITCH, 99) if stressed else voice.pitch
        rate = max(round(voice.rate * STRESS_RATE), 80) if stressed else voice.rate
        piece = utter(replace(voice, pitch=pitch, rate=rate), [word], [])
        gain = np.float32(STRESS_GAIN if stressed else 1 / STRESS_GAIN)
        pieces.append(Utterance(samples=piece.samples * gain, pauses=(), words=piece.words))
    return joined(pieces, [_JOINT_S, _JOINT_S]), words[chosen]


def _pause(cast: Cast, voice: espeak.Voice) -> tuple[Utterance, str]:
    digits = [DIGITS[i] for i in cast.rng.choice(len(DIGITS), 3, replace=False)]
    behind = cast.number(0, 1)
    pieces = [utter(voice, ["my code is"], []), *(utter(voice, [digit], []) for digit in digits)]
    gaps_s = [_JOINT_S, _JOINT_S, _JOINT_S]
    gaps_s[behind + 1] = float(cast.rng.uniform(0.4, 0.7))
    spoken = joined(pieces, gaps_s)
    end = sum(len(piece.samples) for piece in pieces[: behind + 2]) + (behind + 1) * seconds(_JOINT_S)
    pause = (end, end + seconds(gaps_s[behind + 1]))
    return Utterance(samples=spoken.samples, pauses=(pause,), words=spoken.words), digits[behind]


def joined(pieces: Sequence[Utterance], gaps_s: Sequence[float]) -> Utterance:
    """Utterances one behind the other, with so many seconds of silence between them."""
    sounds: list[np.ndarray] = []
    words: list[Word] = []
    place = 0
    for piece, gap_s in zip(pieces, [*gaps_s, 0.0], strict=True):
        silence = np.zeros(seconds(gap_s), np.float32)
        sounds += [piece.samples, silence]
        words += [Word(text=w.text, start=w.start + place, end=w.end + place) for w in piece.words]
        place += len(piece.samples) + len(silence)
    return Utterance(samples=np.concatenate(sounds), pauses=(), words=tuple(words))
