"""Configuration of the streaming engine."""

from dataclasses import dataclass

from tml.config.checks import check_not_negative, check_positive
from tml.config.model import MatmulBackend


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """The streaming engine: how long a session may grow, how its words are chosen, and what it runs on."""

    max_positions: int = 4_096
    """Positions that the global layers' cache holds for one session."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    tensor: int = 1
    """Devices that share one model: heads, hidden units and vocabulary are split over them, caches by heads."""
    backend: MatmulBackend = MatmulBackend.BLOCKED
    """TPU, GPU: kernels that read every chosen expert once. BLOCKED: XLA, one chosen expert after another, and a cache
    for every layer apart. DENSE: all experts."""

    def __post_init__(self) -> None:
        check_positive("stream", max_positions=self.max_positions, tensor=self.tensor)
        check_not_negative("stream", temperature=self.temperature)
