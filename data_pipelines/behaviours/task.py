"""The behaviours as one task: each session shows one of them, drawn by shares; any share may be 0."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines import mixing
from data_pipelines.behaviours import calls, sights, times, tone, turns
from data_pipelines.behaviours.cast import Axis, BehaviourConfig, Cast
from data_pipelines.behaviours.stage import Stage
from data_pipelines.mixing import seconds
from data_pipelines.request_session import SPLITS, Channel
from data_pipelines.voices import DEFAULT_CACHE, OWN_VOICE, draw_speaker
from tml.session import Behaviour, Session

PERFORM: dict[Behaviour, Callable[[Stage, Cast], int]] = {
    Behaviour.TURN_TAKING: turns.turn_taking,
    Behaviour.PAUSE_HANDLING: turns.pause_handling,
    Behaviour.INTERRUPTION: turns.interruption,
    Behaviour.BACKCHANNEL: turns.backchannel,
    Behaviour.TIMED: times.timed,
    Behaviour.CUED: times.cued,
    Behaviour.COUNTING: sights.counting,
    Behaviour.PROACTIVE: sights.proactive,
    Behaviour.SIMULTANEOUS: times.simultaneous,
    Behaviour.TONE: tone.tone,
    Behaviour.DELEGATION: calls.delegation,
    Behaviour.TOOLS: calls.tools,
}
"""What puts a behaviour on a stage and returns the length of the session."""

DEFAULT_SHARES: dict[Behaviour, float] = {
    Behaviour.TURN_TAKING: 2.0,
    Behaviour.PAUSE_HANDLING: 2.0,
    Behaviour.INTERRUPTION: 1.0,
    Behaviour.BACKCHANNEL: 1.0,
    Behaviour.TIMED: 1.5,
    Behaviour.CUED: 1.5,
    Behaviour.COUNTING: 2.0,
    Behaviour.PROACTIVE: 2.0,
    Behaviour.SIMULTANEOUS: 1.0,
    Behaviour.TONE: 1.5,
    Behaviour.DELEGATION: 1.0,
    Behaviour.TOOLS: 1.0,
}
"""Of the sessions of a mixture, relative to each other: more of what has to be learnt from pictures or from time."""


@dataclass(frozen=True, kw_only=True)
class BehaviourTask:
    """Everything that decides a session besides its split and index.

    Attributes:
        seed: of the whole data set.
        shares: of the sessions, by behaviour, relative to each other.
        config: the shape of the sessions.
        makers: of the user's voices; each session draws one. Tone is always spoken by espeak, which obeys.
        cache: where Debian packages are unpacked, for voices and prompts that come from there.
        channel: what the user's sound goes through, or None; see `augment.channel`.

    Example:
        BehaviourTask(seed=0, shares={Behaviour.COUNTING: 1.0}).session("heldout", 7)
    """

    seed: int
    shares: Mapping[Behaviour, float] = field(default_factory=lambda: dict(DEFAULT_SHARES))
    config: BehaviourConfig = field(default_factory=BehaviourConfig)
    makers: tuple[str, ...] = ("espeak",)
    cache: Path = DEFAULT_CACHE
    channel: Channel | None = None

    def __post_init__(self) -> None:
        wrong = [f"{name}:{share:g}" for name, share in self.shares.items() if not 0.0 <= share < float("inf")]
        if wrong or not sum(self.shares.values()):
            raise ValueError(f"shares {wrong or dict(self.shares)} must be 0 or more, and one of them more than 0")

    def session(self, split: str, index: int) -> Session:
        """Session `index` of a split: the same bytes in every process.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
        rng = np.random.default_rng([self.seed, 7 + SPLITS.index(split), index])
        behaviour = self._draw_behaviour(rng)
        novel = frozenset(self.config.held_out if split == "heldout" else ())
        maker = self.makers[int(rng.integers(len(self.makers)))]
        if behaviour is Behaviour.TONE:
            maker = "espeak"
        speaker = draw_speaker(maker, "heldout" if Axis.VOICE in novel else "train", rng, self.cache)
        cast = Cast(rng=rng, speaker=speaker, novel=novel, config=self.config, split=split, cache=self.cache)
        stage = Stage(self.config.turn_ms)
        length = PERFORM[behaviour](stage, cast)
        length = max(length, stage.own_end + 1, stage.user_end + 1)
        assert length <= seconds(self.config.max_session_s), (behaviour, index, length)
        return stage.session(
            f"{behaviour.value}-{split}-{self.seed}-{index:06d}",
            length,
            mixing.draw_surroundings(rng),
            rng,
            {
                "behaviour": behaviour.value,
                "maker": speaker.maker,
                "voice": speaker.name,
                "own_voice": OWN_VOICE.name,
                "held_out": " ".join(sorted(novel)),
                "recordings": " ".join(cast.prompts_used),
            },
            self.channel,
        )

    def settings(self) -> dict:
        """What decides the sessions, as plain values for a manifest."""
        return {"shares": {name.value: share for name, share in self.shares.items()}, **asdict(self.config)}

    def _draw_behaviour(self, rng: np.random.Generator) -> Behaviour:
        names = [name for name in Behaviour if self.shares.get(name, 0.0) > 0]
        ends = np.cumsum([self.shares[name] for name in names])
        return names[int(np.searchsorted(ends[:-1] / ends[-1], rng.random(), side="right"))]
