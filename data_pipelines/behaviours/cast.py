"""Who takes part in a session, what is drawn at random, and from which side of each split it comes."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_pipelines import prompts
from data_pipelines.behaviours.vocabulary import AFFIXES, NEW_AFFIXES
from data_pipelines.mixing import seconds
from data_pipelines.request_task import draw_distractor
from data_pipelines.speech import Speaker, Utterance, utter

Item = TypeVar("Item")
Other = TypeVar("Other")

PROMPT_LANGUAGES = ("fr", "it", "ru")
"""Of the human speech that distracts; the English and Spanish speaker is the human test."""

_MAX_PROMPT_S = 3.0

MAX_TURN_MS = 200
"""In longer micro-turns what is due at a border comes so late that windows (1.2 s, half a second around a time) and
the longest silence of who goes on would miss it."""


class Axis(enum.StrEnum):
    """What can be held out: none of it is said or asked for in training sessions."""

    VOICE = "voice"
    """Voices of the user."""
    WORDING = "wording"
    """Combinations of words around a request; phrases whose tone matters."""
    OBJECT = "object"
    """Pairs of shape and colour, cue and reply, tool and argument, subject and thing."""
    TIME = "time"
    """Pairs of a delay and the word that is due after it."""


@dataclass(frozen=True, kw_only=True)
class BehaviourConfig:
    """The shape of the sessions.

    Attributes:
        turn_ms: the micro-turn at whose borders the model begins to speak; at most 200, see `MAX_TURN_MS`.
        delay_s: the model answers at the first border that lies so long behind what it answers, or later.
        window_s: how long after a cue, an event or a word its reply counts.
        time_tolerance_s: how much earlier or later than its time a timed word counts.
        pause_range_s: length of a pause inside a request.
        gap_range_s: from the end of an answer to the user's next request.
        react_s: the model begins no word this long after an interruption began.
        cut_s: the model is silent this long after an interruption began.
        word_s: from one word to the next when the model counts up.
        result_range_s: from a delegation to the first chunk of its result.
        negative_fraction: sessions in which nothing is asked, or what is waited for never comes.
        human_fraction: distracting utterances that are human speech (Asterisk's prompts; downloaded once).
        max_session_s: no session is longer.
        held_out: the axes whose held-out side the split `heldout` shows; in the others it is like training.
    """

    turn_ms: int = 200
    delay_s: float = 0.25
    window_s: float = 1.2
    time_tolerance_s: float = 0.5
    pause_range_s: tuple[float, float] = (0.4, 1.2)
    gap_range_s: tuple[float, float] = (0.6, 1.2)
    react_s: float = 0.4
    cut_s: float = 0.6
    word_s: float = 0.6
    result_range_s: tuple[float, float] = (1.0, 3.0)
    negative_fraction: float = 0.15
    human_fraction: float = 0.0
    max_session_s: float = 15.0
    held_out: tuple[Axis, ...] = tuple(Axis)

    def __post_init__(self) -> None:
        if self.turn_ms > MAX_TURN_MS:
            raise ValueError(
                f"turn_ms = {self.turn_ms} must be at most {MAX_TURN_MS} for behaviours, whose windows would miss what "
                f"is said in longer micro-turns; of requests they may be longer"
            )
        for name in ("negative_fraction", "human_fraction"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} = {value} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Cast:
    """The user's voice, the source of chance, and the sides of the splits.

    Attributes:
        rng: everything random in the session comes from it.
        speaker: the user's voice.
        novel: the axes that show their held-out side.
        config: the shape of the session.
        split: of the session; human prompts are divided by it.
        cache: where Debian packages are unpacked.
    """

    rng: np.random.Generator
    speaker: Speaker
    novel: frozenset[Axis]
    config: BehaviourConfig
    split: str
    cache: Path
    prompts_used: list[str] = field(default_factory=list)

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return bool(self.rng.random() < probability)

    def one(self, items: Sequence[Item]) -> Item:
        """Any of some things, equally likely."""
        return items[int(self.rng.integers(len(items)))]

    def number(self, low: int, high: int) -> int:
        """A whole number of [low, high]."""
        return int(self.rng.integers(low, high + 1))

    def samples(self, low_s: float, high_s: float) -> int:
        """A length of time between two, in samples."""
        return seconds(float(self.rng.uniform(low_s, high_s)))

    def pair(self, firsts: Sequence[Item], others: Sequence[Other], axis: Axis) -> tuple[Item, Other]:
        """One of each, from the pairs of the side of the axis that this session shows.

        A quarter of the pairs is held out; each thing occurs on both sides when there are four or more of either.
        """
        sides = held_out_pairs(len(firsts), len(others))
        pairs = [
            (i, j) for i in range(len(firsts)) for j in range(len(others)) if ((i, j) in sides) == (axis in self.novel)
        ]
        i, j = self.one(pairs)
        return firsts[i], others[j]

    def wording(self) -> tuple[str, str]:
        """What goes before and behind a request."""
        return self.one(NEW_AFFIXES if Axis.WORDING in self.novel else AFFIXES)

    def worded(self, request: str) -> str:
        """A request in one of its wordings."""
        before, behind = self.wording()
        return " ".join(filter(None, (before, request, behind)))

    def says(self, text: str) -> Utterance:
        """The user says it, without pauses."""
        return utter(self.speaker, [text], [])

    def distraction(self) -> tuple[str, Utterance]:
        """(Tag, sound) of something that asks for nothing: a statement, another language, a human prompt."""
        if self.chance(self.config.human_fraction):
            language = self.one(PROMPT_LANGUAGES)
            prompt = self.one(prompts.silence_prompts(language, self.split, self.cache))
            self.prompts_used.append(f"{language}/{prompt.key}")
            return "human", prompts.utterance(prompt, _MAX_PROMPT_S)
        tag, voice, text = draw_distractor(self.speaker, self.rng)
        return tag, utter(voice, [text], [])


def held_out_pairs(num_firsts: int, num_others: int) -> frozenset[tuple[int, int]]:
    """The pairs (i, j) that training never sees: every fourth diagonal."""
    return frozenset((i, j) for i in range(num_firsts) for j in range(num_others) if (i + j) % 4 == 3)
