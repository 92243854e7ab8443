"""Configuration of the data: sources, mixture, rows."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from tml.config.checks import check_fraction, check_not_negative, check_positive


class SourceKind(enum.StrEnum):
    """What the records of a source are."""

    SESSIONS = "sessions"
    DOCUMENTS = "documents"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data set of the mixture."""

    path: str = ""
    """Directory of session or document shards with a dataset.json."""
    weight: float = 1.0
    """Share of segments (sessions or pieces of documents) drawn from this source, relative to the others."""
    kind: SourceKind = SourceKind.SESSIONS

    def __post_init__(self) -> None:
        check_positive("data.sources[...]", weight=self.weight)
        if not self.path:
            raise ValueError("data.sources[...].path is empty; name the directory that holds dataset.json")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training mixture and how it becomes rows."""

    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    eval_sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    """Held-out sets, read in order, for the loss that is evaluated inside the run."""
    row_slots: int = 512
    """Positions in one row."""
    rows_per_batch: int = 8
    """Rows in the global batch of one step, over all devices and all train.grad_accum_steps parts."""
    segments_per_epoch: int = 4_096
    """Segments of the mixture that one row index packs together."""
    max_quarantined_fraction: float = 0.01
    """Stop when more than this share of the records of a source is unreadable."""
    read_threads: int = 4
    prefetch_rows: int = 64

    def __post_init__(self) -> None:
        check_positive(
            "data",
            row_slots=self.row_slots,
            rows_per_batch=self.rows_per_batch,
            segments_per_epoch=self.segments_per_epoch,
            read_threads=self.read_threads,
        )
        check_not_negative("data", prefetch_rows=self.prefetch_rows)
        check_fraction("data", max_quarantined_fraction=self.max_quarantined_fraction)
