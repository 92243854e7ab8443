"""The experiment: every config of one run, and the checks that hold between them."""

from dataclasses import dataclass, field

from tml.config.data import DataConfig
from tml.config.mesh import ROW_AXES, SHARD_AXES, MeshConfig, Split, check_splits
from tml.config.model import ModelConfig
from tml.config.stream import StreamConfig
from tml.config.training import EvaluationConfig, LossConfig, OptimConfig, TrainConfig
from tml.config.turn import MicroTurnConfig, TextConfig


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run, whole. `experiments/*.py` build it; `launch` rebuilds and checks it before any array exists."""

    name: str
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    turn: MicroTurnConfig = field(default_factory=MicroTurnConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        audio = self.model.audio
        hop_ms = audio.hop_samples * 1000 / audio.sample_rate_hz
        if self.turn.turn_ms % hop_ms:
            nearest = max(1, round(self.turn.turn_ms / hop_ms)) * hop_ms
            raise ValueError(
                f"turn.turn_ms = {self.turn.turn_ms} is not a multiple of the audio hop, {hop_ms:g} ms "
                f"(model.audio.hop_samples = {audio.hop_samples} at {audio.sample_rate_hz} Hz); "
                f"the nearest valid value is {nearest:g}"
            )
        if self.loss.heard_weight and self.turn.turn_ms == hop_ms:
            raise ValueError(
                f"loss.heard_weight = {self.loss.heard_weight} needs an audio position without an output, but "
                f"turn.turn_ms = {self.turn.turn_ms} is one hop of {hop_ms:g} ms; set it to 0, or take longer turns"
            )
        check_splits(self.mesh, self.splits)
        if self.model.audio_out.feedback_sampled and self.mesh.context > 1:
            raise ValueError(
                f"model.audio_out.feedback_sampled = {self.model.audio_out.feedback_sampled} samples sound from whole "
                f"rows, but mesh.context = {self.mesh.context} splits them; set one of them to 0 or 1"
            )
        if self.optim.warmup_steps >= self.train.num_steps:
            raise ValueError(
                f"optim.warmup_steps = {self.optim.warmup_steps} leaves nothing of "
                f"train.num_steps = {self.train.num_steps}; warm up for fewer steps"
            )

    @property
    def splits(self) -> tuple[Split, ...]:
        """Every dimension that the mesh splits; each must be a multiple of its axes."""
        model, attention, moe = self.model, self.model.attention, self.model.moe
        parts = (("train.grad_accum_steps", self.train.grad_accum_steps), ("model.row_parts", model.row_parts))
        return (
            Split("data.rows_per_batch", self.data.rows_per_batch, ROW_AXES, parts),
            Split("data.row_slots", self.data.row_slots, ("context",)),
            Split("model.moe.num_experts", moe.num_experts, ("expert",)),
            Split("model.d_model", model.d_model, SHARD_AXES),
            # Global attention exchanges the split of the sequence for one of the heads.
            Split("model.attention.num_heads", attention.num_heads, ("context", "tensor")),
            Split("model.attention.num_kv_heads", attention.num_kv_heads, ("tensor",)),
            Split("model.dense_dim", model.dense_dim, ("tensor",)),
            Split("model.moe.expert_dim", moe.expert_dim, ("tensor",)),
            Split("model.vocab_size", model.vocab_size, ("tensor",)),
        )
