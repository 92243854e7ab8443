"""The request task: spoken requests with one-word answers, pauses inside them, and speech that asks for nothing.

A session of 6 to 12 s holds up to three requests by one voice, in noise or in quiet. The answer is
due in the first micro-turn that ends `delay_s` or more after the last audible sample of the
request; during pauses, and after speech that asks for nothing, silence is due.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines import espeak, mixing
from data_pipelines.request_session import SPLITS, Channel, RequestTaskConfig, Turn, arrange, compose
from data_pipelines.request_vocabulary import FOREIGN, REQUEST_TYPES, STATEMENTS
from data_pipelines.speech import Speaker, utter
from data_pipelines.voices import DEFAULT_CACHE, draw_speaker
from tml.session import Session

_WEIGHTS = np.array([kind.weight for kind in REQUEST_TYPES])
_CUMULATIVE_WEIGHTS = np.cumsum(_WEIGHTS)[:-1] / _WEIGHTS.sum()


@dataclass(frozen=True, kw_only=True)
class RequestTask:
    """Everything that decides a session besides its split and index.

    Attributes:
        seed: of the whole data set.
        config: the shape of the sessions.
        makers: of voices; each session draws one of them (see `voices.draw_speaker`).
        cache: where Debian packages are unpacked, for the makers that come from there.
        channel: what the sound of a session goes through, or None; see `augment.channel`.
    """

    seed: int
    config: RequestTaskConfig = field(default_factory=RequestTaskConfig)
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
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        speaker = draw_speaker(self.makers[int(rng.integers(len(self.makers)))], split, rng, self.cache)
        silent = bool(rng.random() < self.config.silent_fraction)
        # The larger of two draws, so that more sessions have several utterances than one.
        draws = rng.integers(self.config.max_utterances, size=2)
        wanted = int(draws[0]) if silent else 1 + int(draws.max())
        turns, num_samples = arrange(lambda: self._draw_turn(speaker, silent, rng), wanted, self.config, rng)
        return compose(
            f"requests-{split}-{self.seed}-{index:06d}",
            turns,
            num_samples,
            surroundings=mixing.draw_surroundings(rng),
            config=self.config,
            rng=rng,
            meta={"maker": speaker.maker, "voice": speaker.name},
            channel=self.channel,
        )

    def _draw_turn(self, speaker: Speaker, silent: bool, rng: np.random.Generator) -> Turn:
        distracts = rng.random() < self.config.distractor_fraction
        if silent or distracts:
            tag, voice, text = draw_distractor(speaker, rng)
            return Turn(utterance=utter(voice, [text], []), tag=tag)
        kind = REQUEST_TYPES[int(np.searchsorted(_CUMULATIVE_WEIGHTS, rng.random(), side="right"))]
        request, answer = kind.requests[int(rng.integers(len(kind.requests)))]
        words = request.split()
        parts, pauses_s = [request], []
        if len(words) > 1 and rng.random() < self.config.pause_probability:
            wanted = 1 + int(rng.random() < self.config.second_pause_probability)
            cuts = np.sort(rng.choice(np.arange(1, len(words)), min(wanted, len(words) - 1), replace=False))
            edges = [0, *cuts.tolist(), len(words)]
            parts = [" ".join(words[first:last]) for first, last in itertools.pairwise(edges)]
            pauses_s = rng.uniform(*self.config.pause_range_s, size=len(cuts)).tolist()
        return Turn(utterance=utter(speaker, parts, pauses_s), tag=kind.tag, answer=answer)


def draw_distractor(speaker: Speaker, rng: np.random.Generator) -> tuple[str, Speaker, str]:
    """(Tag, voice, text) of something that asks for nothing; espeak voices also speak other languages."""
    foreign = rng.random() < 0.5
    statement = STATEMENTS[int(rng.integers(len(STATEMENTS)))]
    language, sentence = FOREIGN[int(rng.integers(len(FOREIGN)))]
    if foreign and isinstance(speaker, espeak.Voice):
        voice = espeak.Voice(accent=language, variant=speaker.variant, pitch=speaker.pitch, rate=speaker.rate)
        return "foreign", voice, sentence
    return "statement", speaker, statement
