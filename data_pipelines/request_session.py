"""Puts utterances of a user into a session, with the answers that are due and where silence is due."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32

from data_pipelines import mixing
from data_pipelines.mixing import Surroundings, seconds
from data_pipelines.speech import SAMPLE_RATE_HZ, Utterance
from tml.codec.waveform import encode_clip
from tml.session import Expectation, ExpectationKind, Session, Stream, TextEvent, Word

SPLITS = ("train", "heldout")

Channel = Callable[[Float32[np.ndarray, " n"], np.random.Generator], Float32[np.ndarray, " n"]]
"""What sound goes through; see `augment.channel`."""


@dataclass(frozen=True, kw_only=True)
class RequestTaskConfig:
    """The shape of the sessions.

    Attributes:
        delay_s: the answer is emitted at the first multiple of `turn_ms` this long after the request, or later.
        turn_ms: the micro-turn for which answers are placed.
        pause_probability: that a request of several words has a pause in it.
        second_pause_probability: that a request with a pause has another one, if it has words enough.
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
    second_pause_probability: float = 0.0
    pause_range_s: tuple[float, float] = (0.4, 1.2)
    silent_fraction: float = 0.08
    distractor_fraction: float = 0.08
    gap_range_s: tuple[float, float] = (1.2, 2.4)
    response_window_s: float = 2.0
    length_range_s: tuple[float, float] = (6.0, 12.0)
    max_utterances: int = 3


PACES = {
    "calm": RequestTaskConfig(),
    "brisk": RequestTaskConfig(
        pause_probability=0.9,
        second_pause_probability=0.35,
        pause_range_s=(0.4, 0.8),
        silent_fraction=0.04,
        gap_range_s=(0.5, 1.0),
        response_window_s=1.0,
        length_range_s=(11.0, 12.0),
        max_utterances=12,
    ),
}
"""Brisk sessions hold nearly twice as many requests in the same time, most with a pause or two, and are equally long,
so that rows hold little padding: more to learn from in a training step. Their pauses last just long enough for an
answer to be due: whether a pause is an end is decided in the turn where it would be; what follows teaches little."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One utterance of the user, at `start` on the session clock.

    Attributes:
        utterance: the sound.
        tag: the request type, or what kind of speech it is.
        answer: one word, or empty if the utterance asks for nothing.
        start: first sample.
    """

    utterance: Utterance
    tag: str
    answer: str = ""
    start: int = 0

    @property
    def end(self) -> int:
        """One past the last audible sample."""
        return self.start + len(self.utterance.samples)

    @property
    def words(self) -> list[Word]:
        """The words on the session clock."""
        shift = self.start
        return [Word(text=w.text, start=w.start + shift, end=w.end + shift) for w in self.utterance.words]


def arrange(
    draw_turn: Callable[[], Turn], wanted: int, config: RequestTaskConfig, rng: np.random.Generator
) -> tuple[list[Turn], int]:
    """Places up to `wanted` utterances, as many as fit; returns them and the length of the session in samples.

    An utterance ends at least `response_window_s` after the one before it, and before the session does.
    """
    window = seconds(config.response_window_s)
    shortest, longest = (seconds(value) for value in config.length_range_s)
    turns: list[Turn] = []
    place = seconds(rng.uniform(0.2, 1.2))
    for _ in range(wanted):
        turn = draw_turn()
        gap = seconds(rng.uniform(*config.gap_range_s))
        if turns:
            place = max(turns[-1].end + gap, turns[-1].end + window - len(turn.utterance.samples))
        turn = replace(turn, start=place)
        if turn.end + window > longest:
            break
        turns.append(turn)
    needed = turns[-1].end + window + seconds(rng.uniform(0.0, 0.6)) if turns else 0
    length = max(needed, seconds(rng.uniform(config.length_range_s[0], config.length_range_s[0] + 1.5)))
    return turns, min(max(length, shortest), longest)


def compose(
    session_id: str,
    turns: Sequence[Turn],
    num_samples: int,
    *,
    surroundings: Surroundings,
    config: RequestTaskConfig,
    rng: np.random.Generator,
    meta: Mapping[str, str],
    channel: Channel | None = None,
) -> Session:
    """The session: speech in noise, through the channel, at its level; answers and expectations."""
    track = mixing.place([(turn.start, turn.utterance.samples) for turn in turns], num_samples)
    track = mixing.add_noise(track, surroundings, rng)
    if channel is not None:
        track = channel(track, rng)
    track = mixing.to_level(track, surroundings.peak_db)
    answers = tuple(
        answer_event(turn.answer, turn.end, delay_s=config.delay_s, turn_ms=config.turn_ms)
        for turn in turns
        if turn.answer
    )
    return Session(
        session_id=session_id,
        sample_rate_hz=SAMPLE_RATE_HZ,
        num_samples=num_samples,
        streams=(Stream.USER_AUDIO, Stream.OWN_TEXT) if answers else (Stream.USER_AUDIO,),
        audio={Stream.USER_AUDIO: encode_clip(track, SAMPLE_RATE_HZ)},
        texts=answers,
        user_words=tuple(word for turn in turns for word in turn.words),
        expectations=expectations(turns, num_samples, config.response_window_s),
        meta={
            **meta,
            "noise": surroundings.noise_kind or "none",
            "snr_db": f"{surroundings.snr_db:.1f}" if surroundings.noise_kind else "",
            "peak_db": f"{surroundings.peak_db:.1f}",
        },
    )


def answer_event(answer: str, request_end: int, *, delay_s: float = 0.3, turn_ms: int = 200) -> TextEvent:
    """The own word that answers a request which ends at sample `request_end`.

    It starts at the first multiple of the micro-turn that lies `delay_s` or more behind the request, which
    is when it is emitted (`tml.microturn`), and takes one micro-turn.
    """
    turn_samples = turn_ms * SAMPLE_RATE_HZ // 1000
    start = -(-(request_end + seconds(delay_s)) // turn_samples) * turn_samples
    return TextEvent(stream=Stream.OWN_TEXT, start=start, end=start + turn_samples, text=answer)


def expectations(turns: Sequence[Turn], num_samples: int, response_window_s: float) -> tuple[Expectation, ...]:
    """Answers after requests; silence in their pauses, during and after other speech, and in noise alone."""
    silence = ExpectationKind.SILENCE
    if not turns:
        return (Expectation(kind=silence, start=0, end=num_samples, tag="noise"),)
    found: list[Expectation] = []
    for i, turn in enumerate(turns):
        if not turn.answer:
            until = turns[i + 1].start if i + 1 < len(turns) else num_samples
            until = min(until, turn.end + seconds(response_window_s))
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
