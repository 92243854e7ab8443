"""Configuration of the voice: own sound as mel frames, the flow head that makes them, the vocoder that sounds them."""

import enum
from dataclasses import dataclass, field

from tml.config.checks import (
    check_at_most,
    check_below_one,
    check_fraction,
    check_multiple,
    check_not_negative,
    check_positive,
)


class FlowSolver(enum.StrEnum):
    """How the sampler integrates the velocity field over one step."""

    EULER = "euler"
    """One evaluation, at the step's start."""
    MIDPOINT = "midpoint"
    """Two evaluations, the second at the step's middle."""


class Feedback(enum.StrEnum):
    """What the model hears of the sound that it has just made."""

    SOUND = "sound"
    """The mel itself, its frames averaged and quantised."""
    NONE = "none"
    """That it spoke, and nothing of how it sounded: the same input at every own audio position."""


class VocoderKind(enum.StrEnum):
    """What turns mel frames into sound."""

    GRIFFIN_LIM = "griffin_lim"
    """Phases by iteration, block by block (`tml.codec.griffin_lim`)."""
    PROGRAM = "program"
    """A neural vocoder as an exported program (`tml.codec.vocoder_program`)."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The flow-matching head: an MLP under adaptive norms, conditioned on the backbone (Li et al. 2024, MAR)."""

    width: int = 1_024
    num_blocks: int = 6
    num_draws: int = 4
    """Pairs of time and noise for every position in training; they share the backbone's work."""
    loss_share: float = 1.0
    """Share of the own audio positions that fit in a device's rows for which the loss has room. Rows are seldom full of
    speech; where there is more of it, the loss is that of a random part, weighted up."""
    num_steps: int = 8
    """Steps of the sampler from noise to a mel."""
    solver: FlowSolver = FlowSolver.MIDPOINT
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 samples without, other values double the sampler's work."""
    condition_dropout: float = 0.0
    """Share of draws whose condition a learned vector replaces, so that guidance has something to lead away from."""
    noise_scale: float = 1.0
    """Deviation of the noise that a sample starts from; below 1 it is less varied."""

    def __post_init__(self) -> None:
        check_positive(
            "model.audio_out.flow",
            width=self.width,
            num_blocks=self.num_blocks,
            num_draws=self.num_draws,
            num_steps=self.num_steps,
            guidance=self.guidance,
            loss_share=self.loss_share,
        )
        check_multiple("model.audio_out.flow.width", self.width, "2, for sines and cosines of time", 2)
        check_not_negative("model.audio_out.flow", noise_scale=self.noise_scale)
        check_fraction("model.audio_out.flow", condition_dropout=self.condition_dropout, loss_share=self.loss_share)
        check_below_one("model.audio_out.flow", condition_dropout=self.condition_dropout)
        if self.guidance != 1 and not self.condition_dropout:
            raise ValueError(
                f"model.audio_out.flow.guidance = {self.guidance} leads away from the velocity without a condition, "
                f"which condition_dropout = 0 never trains; train with condition_dropout = 0.1, or set guidance to 1"
            )


@dataclass(frozen=True, kw_only=True)
class VocoderConfig:
    """From mel frames to sound, outside the model's loop."""

    kind: VocoderKind = VocoderKind.GRIFFIN_LIM
    num_iterations: int = 32
    momentum: float = 0.99
    """Of the fast Griffin-Lim iteration (Perraudin et al. 2013); 0 is the plain one."""
    look_ahead_frames: int = 0
    """Mel frames that wait for the next block, which then helps to find their phases; each is a hop of delay."""
    program: str = ""
    """Folder of the exported program, for `program`."""

    def __post_init__(self) -> None:
        check_positive("model.audio_out.vocoder", num_iterations=self.num_iterations)
        check_not_negative("model.audio_out.vocoder", look_ahead_frames=self.look_ahead_frames, momentum=self.momentum)
        check_below_one("model.audio_out.vocoder", momentum=self.momentum)
        if (self.kind is VocoderKind.PROGRAM) != bool(self.program):
            raise ValueError(
                f"model.audio_out.vocoder.kind = {str(self.kind)!r} and program = {self.program!r} do not fit; "
                f"name the folder of an exported program with kind = 'program' only"
            )


@dataclass(frozen=True, kw_only=True)
class AudioOutConfig:
    """Own sound: `frames_per_position` mel frames at every audio position of the output half of a speaking turn.

    A position covers one hop of the input (`model.audio.hop_samples`); a frame ends on its own part of it, so
    nothing in a turn's frames comes from later sound.
    """

    frames_per_position: int = 0
    """Mel frames that one position predicts; 0 builds a model without a voice, 4 is a frame every 12.5 ms."""
    num_mels: int = 80
    window_samples: int = 800
    log_floor: float = -4.0
    """What is quieter, in log10 of the mel magnitude, is this quiet; digital silence is -6."""
    log_mean: float = -2.0
    log_deviation: float = 1.0
    """Log-mels minus the mean, over the deviation, are what the head predicts: about standard normal for speech."""
    audible_log: float = -2.0
    """A turn speaks if its own sound holds a mel as loud as this, or if it has own text."""
    feedback: Feedback = Feedback.SOUND
    """How own sound comes back in."""
    feedback_sampled: float = 0.0
    """Scheduled sampling: share of own audio positions at which training feeds back what the model itself says there,
    after a forward pass over the true sound: live it hears nothing else (Mihaylova & Martins 2019). 0: one pass."""
    feedback_levels: int = 16
    """Levels of the own sound that is fed back, evenly from `log_floor` to `feedback_high`; its frames are averaged."""
    feedback_high: float = 1.0
    flow: FlowConfig = field(default_factory=FlowConfig)
    vocoder: VocoderConfig = field(default_factory=VocoderConfig)

    def __post_init__(self) -> None:
        check_not_negative("model.audio_out", frames_per_position=self.frames_per_position)
        check_positive(
            "model.audio_out",
            num_mels=self.num_mels,
            window_samples=self.window_samples,
            log_deviation=self.log_deviation,
        )
        check_at_most("2", 2, "model.audio_out.feedback_levels", self.feedback_levels)
        check_at_most("model.audio_out.feedback_levels", self.feedback_levels, "the uint8 range", 256)
        check_fraction("model.audio_out", feedback_sampled=self.feedback_sampled)
        if self.feedback is Feedback.NONE and self.feedback_sampled:
            raise ValueError(
                f"model.audio_out.feedback_sampled = {self.feedback_sampled} samples what feedback = 'none' does not "
                f"feed back; set feedback_sampled to 0, or feedback to 'sound'"
            )
        if not self.log_floor < min(self.audible_log, self.feedback_high):
            raise ValueError(
                f"model.audio_out.log_floor = {self.log_floor} must be below audible_log = {self.audible_log} "
                f"and feedback_high = {self.feedback_high}"
            )

    @property
    def values_per_position(self) -> int:
        """Values that one position predicts: its frames, one after another; 0 without a voice."""
        return self.frames_per_position * self.num_mels
