"""A grid of ablations: one experiment, and variants that differ from it in a few values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Runs that answer one question; `launch.sweep` makes them.

    Attributes:
        question: what the runs shall tell.
        base: the experiment's file.
        variants: by name, the dotted keys of the config in which it differs from the rest, and their values.
        common: the same of every run, such as a smaller number of steps.
        seeds: every variant is trained once with each.
        measures: metrics of the held-out data that the report draws, as metrics.jsonl names them.

    Example:
        Grid(
            question="Does a boundary token help?",
            base="experiments/quickstart.py",
            variants={"none": {"turn.boundary": "none"}, "tick": {"turn.boundary": "tick"}},
            seeds=(0, 1),
        )
    """

    question: str
    base: str
    variants: Mapping[str, Mapping[str, Any]]
    common: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    measures: tuple[str, ...] = ("eval/loss_speak", "eval/loss_text", "eval/accuracy_text")

    def __post_init__(self) -> None:
        for name, items in (("variants", self.variants), ("seeds", self.seeds), ("measures", self.measures)):
            if not items:
                raise ValueError(f"a grid needs at least one of {name}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} repeat")
        if wrong := [name for name in self.variants if not name.replace("-", "").replace("_", "").isalnum()]:
            raise ValueError(f"variants {wrong} name folders; use letters, digits, - and _")
