"""Synthetic conversations of two: the user's voice and the model's own, on two tracks with exact word times.

The user asks, with pauses; the model replies, in one fixed voice, 0.3 s or more after the user has
finished. Either may nod while the other speaks. The user may interrupt: then the model finishes its
word, falls silent, and answers what was said instead.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines import mixing
from data_pipelines.dialogue_script import NODS, Exchange, draw_exchange
from data_pipelines.mixing import seconds
from data_pipelines.request_session import SPLITS, Channel
from data_pipelines.speech import SAMPLE_RATE_HZ, Speaker, Utterance, utter
from data_pipelines.voices import DEFAULT_CACHE, OWN_VOICE, draw_speaker
from tml.codec.waveform import encode_clip
from tml.session import Expectation, ExpectationKind, Session, Stream, TextEvent, Word

OWN_PEAK_DB = -6.0

_FADE_S = 0.01


@dataclass(frozen=True, kw_only=True)
class DialogueConfig:
    """The shape of the conversations.

    Attributes:
        exchanges_range: fewest and most turns of the user.
        pause_probability: for each place where the user may pause.
        pause_range_s: length of a pause.
        reply_range_s: from the user's audible end to the audible start of the reply.
        gap_range_s: from the end of a reply to the user's next turn.
        nod_probability: that the model nods in a pause; and that the user nods during a reply.
        interruption_probability: that the user interrupts a reply.
        stop_s: the model ends with the first word that ends this long after an interruption began, or later.
        tail_range_s: silence at the end.
    """

    exchanges_range: tuple[int, int] = (2, 5)
    pause_probability: float = 0.4
    pause_range_s: tuple[float, float] = (0.5, 1.3)
    reply_range_s: tuple[float, float] = (0.3, 0.6)
    gap_range_s: tuple[float, float] = (0.4, 1.5)
    nod_probability: float = 0.25
    interruption_probability: float = 0.2
    stop_s: float = 0.2
    tail_range_s: tuple[float, float] = (1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class DialogueTask:
    """Everything that decides a session besides its split and index.

    Attributes:
        seed: of the whole data set.
        config: the shape of the conversations.
        makers: of the user's voices; each session draws one.
        cache: where Debian packages are unpacked, for the makers that come from there.
        channel: what the user's sound goes through, or None; see `augment.channel`.
    """

    seed: int
    config: DialogueConfig = field(default_factory=DialogueConfig)
    makers: tuple[str, ...] = ("espeak",)
    cache: Path = DEFAULT_CACHE
    channel: Channel | None = None

    def session(self, split: str, index: int) -> Session:
        """Session `index` of a split: the same bytes in every process.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        rng = np.random.default_rng([self.seed, 5 + SPLITS.index(split), index])
        speaker = draw_speaker(self.makers[int(rng.integers(len(self.makers)))], split, rng, self.cache)
        tracks = _Conversation(speaker, self.config, rng)
        for _ in range(int(rng.integers(self.config.exchanges_range[0], self.config.exchanges_range[1] + 1))):
            tracks.add(draw_exchange(rng))
        tracks.finish()
        num_samples = tracks.place + seconds(rng.uniform(*self.config.tail_range_s))
        surroundings = mixing.draw_surroundings(rng)
        heard = mixing.add_noise(mixing.place(tracks.user_sounds, num_samples), surroundings, rng)
        if self.channel is not None:
            heard = self.channel(heard, rng)
        said = mixing.to_level(mixing.place(tracks.own_sounds, num_samples), OWN_PEAK_DB)
        return Session(
            session_id=f"dialogue-{split}-{self.seed}-{index:06d}",
            sample_rate_hz=SAMPLE_RATE_HZ,
            num_samples=num_samples,
            streams=(Stream.USER_AUDIO, Stream.OWN_TEXT, Stream.OWN_AUDIO),
            audio={
                Stream.USER_AUDIO: encode_clip(mixing.to_level(heard, surroundings.peak_db), SAMPLE_RATE_HZ),
                Stream.OWN_AUDIO: encode_clip(said, SAMPLE_RATE_HZ),
            },
            texts=tuple(
                TextEvent(stream=Stream.OWN_TEXT, start=word.start, end=word.end, text=word.text)
                for word in sorted(tracks.own_words, key=lambda word: word.start)
            ),
            user_words=tuple(sorted(tracks.user_words, key=lambda word: word.start)),
            expectations=tuple(sorted(tracks.expectations, key=lambda item: item.start)),
            meta={
                "maker": speaker.maker,
                "voice": speaker.name,
                "own_voice": OWN_VOICE.name,
                "noise": surroundings.noise_kind or "none",
                "snr_db": f"{surroundings.snr_db:.1f}" if surroundings.noise_kind else "",
                "peak_db": f"{surroundings.peak_db:.1f}",
            },
        )


class _Conversation:
    """Two tracks that grow by one exchange at a time."""

    def __init__(self, speaker: Speaker, config: DialogueConfig, rng: np.random.Generator) -> None:
        self._speaker, self._config, self._rng = speaker, config, rng
        self.user_sounds: list[tuple[int, np.ndarray]] = []
        self.own_sounds: list[tuple[int, np.ndarray]] = []
        self.user_words: list[Word] = []
        self.own_words: list[Word] = []
        self.expectations: list[Expectation] = []
        self.place = seconds(rng.uniform(0.2, 1.0))
        """Where the user's next turn may begin: what comes before is settled, except for a reply to interrupt."""
        self._reply: tuple[int, Utterance, Expectation] | None = None

    def add(self, exchange: Exchange) -> None:
        """The user's turn, then the reply, whole; the next turn may still interrupt it."""
        config, rng = self._config, self._rng
        turn = self._user_turn(exchange)
        begun = None
        if self._reply is not None and self._draws(config.interruption_probability):
            begun = self._cut_reply()
        start = self.place if begun is None else begun
        self._settle_reply(None if begun is None else start + len(turn.samples))
        self.user_sounds.append((start, turn.samples))
        self.user_words += _moved(turn.words, start)
        end = start + len(turn.samples)
        for pause_start, pause_end in turn.pauses:
            self._nod_or_wait(start + pause_start, start + pause_end)
        reply_start = end + seconds(rng.uniform(*config.reply_range_s))
        reply = utter(OWN_VOICE, [exchange.own], [])
        wanted = Expectation(kind=ExpectationKind.ANSWER, start=start, end=end, text=exchange.own, tag=exchange.tag)
        self._reply = (reply_start, reply, wanted)
        self.place = reply_start + len(reply.samples) + seconds(rng.uniform(*config.gap_range_s))

    def finish(self) -> None:
        """Settles the last reply."""
        self._settle_reply(None)

    def _draws(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def _user_turn(self, exchange: Exchange) -> Utterance:
        """The user's turn, with pauses at some of the places where there may be one."""
        config, rng = self._config, self._rng
        parts, pauses_s = [exchange.user[0]], []
        for part in exchange.user[1:]:
            if self._draws(config.pause_probability):
                parts.append(part)
                pauses_s.append(rng.uniform(*config.pause_range_s))
            else:
                parts[-1] += f" {part}"
        return utter(self._speaker, parts, pauses_s)

    def _nod_or_wait(self, start: int, end: int) -> None:
        """In a pause of the user the model nods, if there is room, or is expected to be silent."""
        if self._draws(self._config.nod_probability):
            nod = utter(OWN_VOICE, [NODS[int(self._rng.integers(len(NODS)))]], [])
            if start + seconds(0.2) + len(nod.samples) <= end:
                self._own(start + seconds(0.2), nod)
                return
        self.expectations.append(Expectation(kind=ExpectationKind.SILENCE, start=start, end=end, tag="pause"))

    def _cut_reply(self) -> int | None:
        """Cuts the open reply behind the word during which it stops.

        Returns:
            Where the interruption begins; None if the reply is too short to be cut, and stays whole.
        """
        assert self._reply is not None
        start, reply, wanted = self._reply
        begin = round(len(reply.samples) * self._rng.uniform(0.3, 0.6))
        kept = [word for word in reply.words if word.end < begin + seconds(self._config.stop_s)]
        rest = reply.words[len(kept) :]
        if len(rest) < 2:
            return None
        words = (*kept, rest[0])
        samples = reply.samples[: rest[0].end].copy()
        fade = min(len(samples), seconds(_FADE_S))
        samples[len(samples) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
        text = " ".join(word.text for word in words)
        self._reply = (
            start,
            Utterance(samples=samples, pauses=(), words=words),
            Expectation(kind=wanted.kind, start=wanted.start, end=wanted.end, text=text, tag=wanted.tag),
        )
        return start + begin

    def _settle_reply(self, interrupted_until: int | None) -> None:
        """Writes the open reply to the own track; after an interruption, silence is due until that turn ends."""
        if self._reply is None:
            return
        start, reply, wanted = self._reply
        self._own(start, reply)
        self.expectations.append(wanted)
        end = start + len(reply.samples)
        if interrupted_until is not None and interrupted_until > end:
            self.expectations.append(
                Expectation(kind=ExpectationKind.SILENCE, start=end, end=interrupted_until, tag="interruption")
            )
        elif interrupted_until is None and self._draws(self._config.nod_probability):
            self._user_nod(start, end)
        self._reply = None

    def _user_nod(self, start: int, end: int) -> None:
        """The user nods while the model speaks, which goes on."""
        nod = utter(self._speaker, [NODS[int(self._rng.integers(len(NODS)))]], [])
        room = end - start - len(nod.samples)
        if room > 0:
            place = start + int(self._rng.integers(room))
            self.user_sounds.append((place, nod.samples))
            self.user_words += _moved(nod.words, place)

    def _own(self, start: int, said: Utterance) -> None:
        self.own_sounds.append((start, said.samples))
        self.own_words += _moved(said.words, start)


def _moved(words: tuple[Word, ...], shift: int) -> list[Word]:
    return [Word(text=word.text, start=word.start + shift, end=word.end + shift) for word in words]
