"""A session under construction: what is heard, seen, said and done, when, and what is expected of the model.

All times are samples of the session clock. The model begins to speak at borders of micro-turns only, so
that the first word of what it says is emitted exactly when it begins to sound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from data_pipelines import mixing
from data_pipelines.mixing import Surroundings, seconds
from data_pipelines.request_session import Channel
from data_pipelines.speech import SAMPLE_RATE_HZ, Utterance, utter
from data_pipelines.voices import OWN_VOICE
from tml.calls import Call
from tml.codec.waveform import encode_clip
from tml.session import Expectation, ExpectationKind, Session, Stream, TextEvent, VideoFrame, Word

OWN_GAIN = 0.8
"""The model's voice is always equally loud: the same word has the same samples in every session."""

_FADE_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Line:
    """Something the model says, from `start` on."""

    start: int
    samples: Float32[np.ndarray, " n"]
    words: tuple[Word, ...]

    @property
    def end(self) -> int:
        """One past the last audible sample."""
        return self.start + len(self.samples)


class Stage:
    """Collects a session event by event.

    Example:
        stage = Stage(turn_ms=200)
        end = stage.hear(8_000, utter(voice, ["say seven"], []))
        stage.expect(ExpectationKind.ANSWER, 8_000, end, "seven")
        stage.say("seven", end + 4_800)
    """

    def __init__(self, turn_ms: int) -> None:
        self._turn = turn_ms * SAMPLE_RATE_HZ // 1000
        self._sounds: list[tuple[int, np.ndarray]] = []
        self._words: list[Word] = []
        self._events: list[TextEvent] = []
        self.lines: list[Line] = []
        self.frames: list[VideoFrame] = []
        self.expectations: list[Expectation] = []

    def border(self, sample: int) -> int:
        """The first border of micro-turns at `sample` or behind it."""
        return -(-sample // self._turn) * self._turn

    @property
    def own_end(self) -> int:
        """Where the model has said everything so far."""
        return max((line.end for line in self.lines), default=0)

    @property
    def user_end(self) -> int:
        """Where the user has said everything so far."""
        return max((start + len(samples) for start, samples in self._sounds), default=0)

    def hear(self, start: int, utterance: Utterance) -> int:
        """The user says something; returns its end."""
        self._sounds.append((start, utterance.samples))
        self._words += [
            Word(text=word.text, start=start + word.start, end=start + word.end) for word in utterance.words
        ]
        return start + len(utterance.samples)

    def say(self, text: str, after: int) -> Line:
        """The model says something at the first border at or behind `after` at which it is not speaking."""
        spoken = utter(OWN_VOICE, [text], [])
        start = self.border(max(after, self.own_end))
        words = tuple(Word(text=w.text, start=start + w.start, end=start + w.end) for w in spoken.words)
        self.lines.append(Line(start=start, samples=spoken.samples * np.float32(OWN_GAIN), words=words))
        return self.lines[-1]

    def say_slowly(self, words: Sequence[str], after: int, step: int) -> list[Line]:
        """The model says words one by one, each `step` samples after the one before it."""
        first = self.say(words[0], after)
        return [first, *(self.say(word, first.start + i * step) for i, word in enumerate(words) if i)]

    def fall_silent(self, last_start: int, cut: int) -> None:
        """The model begins no word at `last_start` or later, and is silent from `cut` on."""
        kept: list[Line] = []
        for line in self.lines:
            words = tuple(word for word in line.words if word.start < last_start)
            if not words:
                continue
            last = len(words) == len(line.words)
            end = min(line.end if last else max(words[-1].end, line.start + 1), max(cut, line.start + 1))
            samples = line.samples[: end - line.start]
            if end < line.end:
                fade = min(len(samples), seconds(_FADE_S))
                samples = samples.copy()
                samples[len(samples) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
                words = tuple(Word(text=w.text, start=w.start, end=min(w.end, end)) for w in words)
            kept.append(Line(start=line.start, samples=samples, words=words))
        self.lines = kept

    def do(self, name: str, arguments: Mapping[str, str], after: int) -> int:
        """The model calls something at the first border at or behind `after`; returns when."""
        start = self.border(after)
        self._events.append(TextEvent(stream=Stream.ACTION, start=start, end=start, text=call(name, arguments)))
        return start

    def deliver(self, sample: int, text: str) -> None:
        """A chunk of a result comes in from the background."""
        self._events.append(TextEvent(stream=Stream.BACKGROUND, start=sample, end=sample, text=text))

    def expect(self, kind: ExpectationKind, start: int, end: int, text: str = "", tag: str = "") -> None:
        """Adds an expectation; an empty span is left out."""
        if end > start:
            self.expectations.append(Expectation(kind=kind, start=start, end=end, text=text, tag=tag))

    def expect_silence(self, start: int, end: int, tag: str, but_for: Sequence[tuple[int, int]] = ()) -> None:
        """Silence is due in [start, end), except inside the windows (first, last] of `but_for`."""
        place = start
        for first, last in sorted(but_for):
            self.expect(ExpectationKind.SILENCE, place, min(first, end), tag=tag)
            place = max(place, last + 1)
        self.expect(ExpectationKind.SILENCE, place, end, tag=tag)

    def session(
        self,
        session_id: str,
        num_samples: int,
        surroundings: Surroundings,
        rng: np.random.Generator,
        meta: Mapping[str, str],
        channel: Channel | None,
    ) -> Session:
        """The session, `num_samples` long; what is expected behind its end ends with it."""
        heard = mixing.add_noise(mixing.place(self._sounds, num_samples), surroundings, rng)
        if channel is not None:
            heard = channel(heard, rng)
        own = mixing.place([(line.start, line.samples) for line in self.lines], num_samples)
        texts = [
            *self._events,
            *(
                TextEvent(stream=Stream.OWN_TEXT, start=w.start, end=w.end, text=w.text)
                for line in self.lines
                for w in line.words
            ),
        ]
        held = {event.stream for event in texts} | ({Stream.VIDEO} if self.frames else set())
        sounding = {Stream.USER_AUDIO, Stream.OWN_AUDIO}
        return Session(
            session_id=session_id,
            sample_rate_hz=SAMPLE_RATE_HZ,
            num_samples=num_samples,
            streams=tuple(stream for stream in Stream if stream in held | sounding),
            audio={
                Stream.USER_AUDIO: encode_clip(mixing.to_level(heard, surroundings.peak_db), SAMPLE_RATE_HZ),
                Stream.OWN_AUDIO: encode_clip(own, SAMPLE_RATE_HZ),
            },
            texts=tuple(sorted(texts, key=lambda event: event.start)),
            frames=tuple(self.frames),
            user_words=tuple(sorted(self._words, key=lambda word: word.start)),
            expectations=tuple(
                Expectation(kind=e.kind, start=e.start, end=min(e.end, num_samples), text=e.text, tag=e.tag)
                for e in sorted(self.expectations, key=lambda item: (item.start, item.end))
                if e.start < num_samples
            ),
            meta={**meta, **_describe(surroundings)},
        )


def call(name: str, arguments: Mapping[str, str]) -> str:
    """A call as the payload of an action."""
    return Call(name=name, arguments=arguments).spelt()


def _describe(surroundings: Surroundings) -> dict[str, str]:
    return {
        "noise": surroundings.noise_kind or "none",
        "snr_db": f"{surroundings.snr_db:.1f}" if surroundings.noise_kind else "",
        "peak_db": f"{surroundings.peak_db:.1f}",
    }
