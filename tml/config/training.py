"""Configuration of the objective, the optimizer, the loop and evaluation."""

import enum
from dataclasses import dataclass

from tml.config.checks import check_at_most, check_below_one, check_fraction, check_not_negative, check_positive


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the streams in the loss. Every stream is also logged by itself, unweighted."""

    listen_weight: float = 1.0
    speak_weight: float = 8.0
    text_weight: float = 8.0
    action_weight: float = 8.0
    document_weight: float = 1.0
    heard_weight: float = 0.0
    """Of the words of the user, predicted where they end, in sessions that know them."""
    audio_weight: float = 1.0
    """Of own audio: the flow head's squared error, averaged over positions, draws and values, beside the rest."""
    mtp_weight: float = 0.1
    """Weight of multi-token prediction, the mean over its blocks, beside the rest (DeepSeek-V3, equation 25)."""
    z_loss_weight: float = 0.0
    """Weight of logsumexp(logits)^2 (PaLM, section 5)."""
    vocab_block: int = 0
    """Entries of the vocabulary whose logits exist at a time, on one device; 0 makes all of them at once."""

    def __post_init__(self) -> None:
        check_not_negative("loss", **vars(self))


class Optimizer(enum.StrEnum):
    """AdamW for everything, or Muon for the layers' matrices with Adam for the rest."""

    ADAMW = "adamw"
    MUON = "muon"


class Schedule(enum.StrEnum):
    """Learning rate after warm-up: cosine to the end, or constant and then a linear decay (WSD)."""

    WARMUP_COSINE = "warmup_cosine"
    WSD = "wsd"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and schedule. With Muon, `peak_lr` is Muon's and the rest learns at `peak_lr * adam_lr_ratio`."""

    optimizer: Optimizer = Optimizer.MUON
    schedule: Schedule = Schedule.WSD
    peak_lr: float = 3e-3
    adam_lr_ratio: float = 1.0
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    """WSD: share of the steps, at the end, in which the rate falls to `final_lr_ratio`."""
    final_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_positive(
            "optim",
            peak_lr=self.peak_lr,
            adam_lr_ratio=self.adam_lr_ratio,
            eps=self.eps,
            max_grad_norm=self.max_grad_norm,
        )
        check_not_negative("optim", warmup_steps=self.warmup_steps, weight_decay=self.weight_decay)
        check_fraction(
            "optim",
            decay_fraction=self.decay_fraction,
            final_lr_ratio=self.final_lr_ratio,
            b1=self.b1,
            b2=self.b2,
            muon_momentum=self.muon_momentum,
        )
        check_below_one("optim", b1=self.b1, b2=self.b2, muon_momentum=self.muon_momentum)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how often it logs, evaluates and saves."""

    num_steps: int = 1_000
    init_from: str = ""
    """Run folder, trained or imported, whose newest parameters a new run begins with; empty draws them."""
    grad_accum_steps: int = 1
    """Parts of a batch that are taken one after another, for less memory."""
    log_every: int = 10
    eval_every: int = 200
    eval_batches: int = 8
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    peak_flops_per_s: float = 0.0
    """Peak of one device, against which MFU is stated; 0 measures this machine's matmul rate at start."""

    def __post_init__(self) -> None:
        check_positive(
            "train",
            num_steps=self.num_steps,
            grad_accum_steps=self.grad_accum_steps,
            log_every=self.log_every,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        check_not_negative("train", eval_batches=self.eval_batches, peak_flops_per_s=self.peak_flops_per_s)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The behavioural evaluation: which sessions it streams, and the windows it scores."""

    sessions: str = ""
    """Directory of held-out sessions with expectations."""
    max_sessions: int = 400
    max_control_sessions: int = 100
    """Sessions streamed under each control: blanked, swapped, and as noise."""
    num_slots: int = 32
    """Sessions streamed side by side."""
    answer_window_s: float = 2.0

    def __post_init__(self) -> None:
        check_positive(
            "evaluation",
            max_sessions=self.max_sessions,
            max_control_sessions=self.max_control_sessions,
            num_slots=self.num_slots,
            answer_window_s=self.answer_window_s,
        )
        check_at_most("evaluation.num_slots", self.num_slots, "1024", 1024)
