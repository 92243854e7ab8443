"""The clock of micro-turns: which samples a turn hears, and when its output is heard."""

from dataclasses import dataclass

from tml.config import AudioConfig, MicroTurnConfig


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The clock of micro-turns over samples."""

    turn_samples: int
    hop_samples: int
    sample_rate_hz: int

    @classmethod
    def of(cls, turn: MicroTurnConfig, audio: AudioConfig) -> "Clock":
        """The clock of a layout; `Experiment` has checked that the turn is a multiple of the hop."""
        turn_samples = turn.turn_ms * audio.sample_rate_hz // 1000
        assert turn_samples % audio.hop_samples == 0
        return cls(turn_samples=turn_samples, hop_samples=audio.hop_samples, sample_rate_hz=audio.sample_rate_hz)

    @property
    def frames_per_turn(self) -> int:
        """Audio positions in one turn."""
        return self.turn_samples // self.hop_samples

    def num_turns(self, num_samples: int) -> int:
        """Turns that cover `num_samples`; the last one is padded with silence."""
        return -(-num_samples // self.turn_samples)

    def turn_of(self, sample: int) -> int:
        """The turn during which `sample` comes in."""
        return sample // self.turn_samples

    def output_turn_of(self, sample: int) -> int:
        """The turn whose output is heard at `sample`; the first output is turn 0's."""
        return max(0, sample // self.turn_samples - 1)

    def emission_s(self, turn: int) -> float:
        """When the output of `turn` is emitted, in seconds."""
        return (turn + 1) * self.turn_samples / self.sample_rate_hz
