"""The request task: spoken requests with one-word answers, pauses inside them, and speech that asks for nothing.

A session of 6 to 12 s holds up to three requests by one voice, in noise or in quiet. The answer is
due in the first micro-turn that ends `delay_s` or more after the last audible sample of the
request; during pauses, and after speech that asks for nothing, silence is due.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32

from data_pipelines import espeak, mixing
from data_pipelines.mixing import seconds
from data_pipelines.request_vocabulary import FOREIGN, REQUEST_TYPES, STATEMENTS
from data_pipelines.speech import SAMPLE_RATE_HZ, Speaker, Utterance, Word, utter
from data_pipelines.voices import draw_speaker
from tml.codec.waveform import encode_clip
from tml.session import Expectation, ExpectationKind, Session, Stream, TextEvent

SPLITS = ("train", "heldout")

Channel = Callable[[Float32[np.ndarray, "T"], np.random.Generator], Float32[np.ndarray, "T"]]


@dataclass(frozen=True, kw_only=True)
class RequestTaskConfig:
    """The shape of the sessions.

    Attributes:
        delay_s: the answer is emitted at the first multiple of `turn_ms` this long after the request, or later.
        turn_ms: the micro-turn for which answers are placed.
        pause_probability: that a request of several words has a pause in it.
        pause_range_s: length of a pause, from audible end to audible start.
        silent_fraction: sessions that ask for nothing at all.
        distractor_fraction: utterances, in the other sessions, that ask for nothing.
        gap_range_s: from the end of an utterance to the start of the next.
        response_window_s: how long after a request its answer counts; no other answer is due in it.
        length_range_s: of a session.
        max_utterances: in one session.
    """

    delay_s: float = 0.3
    turn_ms: int = 200
    pause_probability: float = 0.5
    pause_range_s: tuple[float, float] = (0.4, 1.2)
    silent_fraction: float = 0.08
    distractor_fraction: float = 0.08
    gap_range_s: tuple[float, float] = (1.2, 2.4)
    response_window_s: float = 2.0
    length_range_s: tuple[float, float] = (6.0, 12.0)
    max_utterances: int = 3


@dataclass(frozen=True, kw_only=True)
class RequestTask:
    """Everything that decides a session besides its split and index.

    Attributes:
        seed: of the whole data set.
        makers: of voices; each session draws one of them (see `voices.draw_speaker`).
        channel: what the sound of a session goes through, or None; see `augment.channel`.
    """

    seed: int
    config: RequestTaskConfig = field(default_factory=RequestTaskConfig)
    makers: tuple[str, ...] = ("espeak",)
    channel: Channel | None = None

    def session(self, split: str, index: int) -> Session:
        """Session `index` of a split: the same bytes in every process.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        speaker = draw_speaker(self.makers[int(rng.integers(len(self.makers)))], split, rng)
        turns, num_samples = self._plan(speaker, rng)
        surroundings = mixing.draw_surroundings(rng)
        track = mixing.place([(turn.start, turn.utterance.samples) for turn in turns], num_samples)
        track = mixing.add_noise(track, surroundings, rng)
        if self.channel is not None:
            track = self.channel(track, rng)
        track = mixing.to_level(track, surroundings.peak_db)
        answers = self._answers(turns)
        return Session(
            session_id=f"requests-{split}-{self.seed}-{index:06d}",
            sample_rate_hz=SAMPLE_RATE_HZ,
            num_samples=num_samples,
            streams=(Stream.USER_AUDIO, Stream.OWN_TEXT) if answers else (Stream.USER_AUDIO,),
            audio={Stream.USER_AUDIO: encode_clip(track, SAMPLE_RATE_HZ)},
            texts=answers,
            expectations=self._expectations(turns, num_samples),
            meta={
                "maker": speaker.maker,
                "voice": speaker.name,
                "noise": surroundings.noise_kind or "none",
                "snr_db": f"{surroundings.snr_db:.1f}" if surroundings.noise_kind else "",
                "peak_db": f"{surroundings.peak_db:.1f}",
                "user_words": words_json([word for turn in turns for word in turn.words]),
            },
        )

    def _plan(self, speaker: Speaker, rng: np.random.Generator) -> tuple[list["_Turn"], int]:
        """The utterances of a session with their places, and its length in samples."""
        config = self.config
        silent = rng.random() < config.silent_fraction
        # The larger of two draws, so that more sessions have several utterances than one.
        draws = rng.integers(config.max_utterances, size=2)
        wanted = int(draws[0]) if silent else 1 + int(draws.max())
        window = seconds(config.response_window_s)
        shortest, longest = (seconds(value) for value in config.length_range_s)
        turns: list[_Turn] = []
        place = seconds(rng.uniform(0.2, 1.2))
        for _ in range(wanted):
            turn = self._draw_turn(speaker, silent, rng)
            gap = seconds(rng.uniform(*config.gap_range_s))
            if turns:
                earliest = turns[-1].end + window - len(turn.utterance.samples)
                place = max(turns[-1].end + gap, earliest)
            turn = turn.at(place)
            if turns and turn.end + window > longest:
                break
            turns.append(turn)
        needed = turns[-1].end + window if turns else 0
        tail = seconds(rng.uniform(0.0, 0.6))
        length = max(needed + tail, seconds(rng.uniform(config.length_range_s[0], config.length_range_s[0] + 1.5)))
        return turns, max(shortest, min(length, max(longest, needed)))

    def _draw_turn(self, speaker: Speaker, silent: bool, rng: np.random.Generator) -> "_Turn":
        distracts = rng.random() < self.config.distractor_fraction
        if silent or distracts:
            tag, voice, text = _draw_distractor(speaker, rng)
            return _Turn(utterance=utter(voice, [text], []), tag=tag, answer="")
        kind = REQUEST_TYPES[int(np.searchsorted(_CUMULATIVE_WEIGHTS, rng.random(), side="right"))]
        request, answer = kind.requests[int(rng.integers(len(kind.requests)))]
        words = request.split()
        parts, pauses_s = [request], []
        if len(words) > 1 and rng.random() < self.config.pause_probability:
            cut = int(rng.integers(1, len(words)))
            parts = [" ".join(words[:cut]), " ".join(words[cut:])]
            pauses_s = [rng.uniform(*self.config.pause_range_s)]
        return _Turn(utterance=utter(speaker, parts, pauses_s), tag=kind.tag, answer=answer)

    def _answers(self, turns: Sequence["_Turn"]) -> tuple[TextEvent, ...]:
        return tuple(
            answer_event(turn.answer, turn.end, delay_s=self.config.delay_s, turn_ms=self.config.turn_ms)
            for turn in turns
            if turn.answer
        )

    def _expectations(self, turns: Sequence["_Turn"], num_samples: int) -> tuple[Expectation, ...]:
        """Answers after requests; silence in their pauses, during and after other speech, and in noise alone."""
        silence = ExpectationKind.SILENCE
        if not turns:
            return (Expectation(kind=silence, start=0, end=num_samples, tag="noise"),)
        found: list[Expectation] = []
        for i, turn in enumerate(turns):
            if not turn.answer:
                until = turns[i + 1].start if i + 1 < len(turns) else num_samples
                until = min(until, turn.end + seconds(self.config.response_window_s))
                found.append(Expectation(kind=silence, start=turn.start, end=until, tag=turn.tag))
                continue
            found += [
                Expectation(kind=silence, start=turn.start + start, end=turn.start + end, tag="pause")
                for start, end in turn.utterance.pauses
            ]
            found.append(
                Expectation(kind=ExpectationKind.ANSWER, start=turn.start, end=turn.end, text=turn.answer, tag=turn.tag)
            )
        return tuple(found)


def answer_event(answer: str, request_end: int, *, delay_s: float = 0.3, turn_ms: int = 200) -> TextEvent:
    """The own word that answers a request which ends at sample `request_end`.

    It starts at the first multiple of the micro-turn that lies `delay_s` or more behind the request, which
    is when it is emitted (`tml.microturn`), and takes one micro-turn.
    """
    turn_samples = turn_ms * SAMPLE_RATE_HZ // 1000
    start = -(-(request_end + seconds(delay_s)) // turn_samples) * turn_samples
    return TextEvent(stream=Stream.OWN_TEXT, start=start, end=start + turn_samples, text=answer)


def words_json(words: Sequence[Word]) -> str:
    """Words with their times as JSON, for a session's meta: [[text, start, end], …]."""
    return json.dumps([[word.text, word.start, word.end] for word in words], ensure_ascii=False)


_WEIGHTS = np.array([kind.weight for kind in REQUEST_TYPES])
_CUMULATIVE_WEIGHTS = np.cumsum(_WEIGHTS)[:-1] / _WEIGHTS.sum()


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One utterance of the user, at `start` on the session clock; it asks for nothing if `answer` is empty."""

    utterance: Utterance
    tag: str
    answer: str
    start: int = 0

    def at(self, start: int) -> "_Turn":
        return _Turn(utterance=self.utterance, tag=self.tag, answer=self.answer, start=start)

    @property
    def end(self) -> int:
        return self.start + len(self.utterance.samples)

    @property
    def words(self) -> list[Word]:
        return [
            Word(text=word.text, start=word.start + self.start, end=word.end + self.start)
            for word in self.utterance.words
        ]


def _draw_distractor(speaker: Speaker, rng: np.random.Generator) -> tuple[str, Speaker, str]:
    """(Tag, voice, text) of something that asks for nothing; espeak voices also speak other languages."""
    foreign = rng.random() < 0.5
    statement = STATEMENTS[int(rng.integers(len(STATEMENTS)))]
    language, sentence = FOREIGN[int(rng.integers(len(FOREIGN)))]
    if foreign and isinstance(speaker, espeak.Voice):
        voice = espeak.Voice(accent=language, variant=speaker.variant, pitch=speaker.pitch, rate=speaker.rate)
        return "foreign", voice, sentence
    return "statement", speaker, statement
