"""Configuration of the network: the Inkling backbone and its audio and video inputs."""

import enum
import re
from dataclasses import dataclass, field, replace

from tml.config.audio_out import AudioOutConfig
from tml.config.checks import check_at_most, check_multiple, check_not_negative, check_positive

FREE_MODEL_KEYS = re.compile(
    r"model\.(remat|scan_layers|row_parts|attention\.backend|moe\.(backend|block_rows|dispatch|capacity_factor))"
)
"""What of a model may change when a run goes on: no parameter follows from it."""


class ComputeDtype(enum.StrEnum):
    """The dtype of activations and of the matmuls' operands; parameters are always stored in float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.StrEnum):
    """What the backward pass recomputes. Where it recomputes anything, equal layers in a row run as one loop."""

    NONE = "none"
    """Nothing."""
    EXPERTS = "experts"
    """Routed experts, and what is no matmul: results of attention and of all other matmuls are kept."""
    LAYER = "layer"
    """Every layer from its input."""


class AttentionBackend(enum.StrEnum):
    """Who computes attention over rows: XLA in blocks or by the definition, or a Pallas kernel of the platform."""

    BLOCKED = "blocked"
    REFERENCE = "reference"
    TPU = "tpu"
    GPU = "gpu"


class MatmulBackend(enum.StrEnum):
    """How the expert matmuls run: as padded blocks or as every expert on every token (XLA), or in a Pallas kernel."""

    BLOCKED = "blocked"
    DENSE = "dense"
    TPU = "tpu"
    GPU = "gpu"


class ExpertDispatch(enum.StrEnum):
    """How token copies and experts come together when experts are split over devices (`mesh.expert` > 1)."""

    GATHERED_WEIGHTS = "gathered_weights"
    """Experts come to the tokens: every device gathers a layer's experts. Nothing is ever dropped."""
    RING = "ring"
    """Tokens of the expert group come to every device, which runs its own experts; the sums are scattered back."""
    RAGGED_ALL_TO_ALL = "ragged_all_to_all"
    """Each copy goes to the device of its expert and comes back."""


class MtpChain(enum.StrEnum):
    """What a block of multi-token prediction hands to the head and to the next block."""

    NORMED = "normed"
    """Its output through a norm that all blocks share (`chain_hidden_post_norm`)."""
    RAW = "raw"
    """Its output as it is."""


class MtpEmbedding(enum.StrEnum):
    """What a block of multi-token prediction is told of the position that lies ahead."""

    RAW = "raw"
    """The token's row of the table, not normed; a placeholder's where sound or a picture stands (transformers)."""
    INPUT = "input"
    """The network's own input there: the normed row, or the vector of the sound or picture (vLLM)."""


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The dMel front end; defaults are Inkling's (transformers `feature_extraction_inkling.py`)."""

    sample_rate_hz: int = 16_000
    hop_samples: int = 800
    window_samples: int = 1_600
    num_mels: int = 80
    max_hz: float = 8_000.0
    power_floor: float = 1e-10
    num_levels: int = 16
    level_low: float = -7.0
    level_high: float = 2.0

    def __post_init__(self) -> None:
        check_positive(
            "audio",
            sample_rate_hz=self.sample_rate_hz,
            hop_samples=self.hop_samples,
            num_mels=self.num_mels,
            power_floor=self.power_floor,
        )
        check_at_most("audio.hop_samples", self.hop_samples, "audio.window_samples", self.window_samples)
        check_at_most("audio.max_hz", self.max_hz, "audio.sample_rate_hz / 2", self.sample_rate_hz / 2)
        check_at_most("audio.num_levels", self.num_levels, "the uint8 range", 256)
        check_at_most("2", 2, "audio.num_levels", self.num_levels)
        if self.level_low >= self.level_high:
            raise ValueError(f"audio.level_low = {self.level_low} must be below audio.level_high = {self.level_high}")


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The hMLP tile stack: folds of space, then one fold of time (Touvron et al. 2022, as in Inkling)."""

    tile_px: int = 40
    frames_per_tile: int = 2
    frames_per_second: float = 5.0
    fold_px: tuple[int, ...] = (5, 2, 4)
    fold_dims: tuple[int, ...] = (128, 320, 4_800)
    max_tiles_per_turn: int = 0
    """Image tiles one micro-turn may hold; 0 builds a model without eyes."""

    def __post_init__(self) -> None:
        check_positive(
            "video",
            tile_px=self.tile_px,
            frames_per_tile=self.frames_per_tile,
            frames_per_second=self.frames_per_second,
        )
        check_not_negative("video", max_tiles_per_turn=self.max_tiles_per_turn)
        if len(self.fold_px) != len(self.fold_dims):
            raise ValueError(f"video.fold_px = {self.fold_px} and video.fold_dims = {self.fold_dims} differ in length")
        product = 1
        for fold in self.fold_px:
            product *= fold
        if product != self.tile_px:
            raise ValueError(f"video.fold_px = {self.fold_px} multiply to {product}, not to tile_px = {self.tile_px}")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Heads, the two spans, and the relative bias."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    window: int = 128
    """Sliding layers: a key is seen when its distance is in [0, window)."""
    global_extent: int = 256
    """Global layers: distances the relative bias covers; beyond it the bias is 0."""
    rel_rank: int = 16
    log_scaling_floor: int = 128_000
    log_scaling_rate: float = 0.1
    backend: AttentionBackend = AttentionBackend.BLOCKED

    def __post_init__(self) -> None:
        check_positive(
            "model.attention",
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=self.window,
            global_extent=self.global_extent,
            rel_rank=self.rel_rank,
            log_scaling_floor=self.log_scaling_floor,
        )
        check_multiple("model.attention.num_heads", self.num_heads, "model.attention.num_kv_heads", self.num_kv_heads)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed and shared experts, and the balance rule of the router's selection bias."""

    num_experts: int = 8
    num_experts_per_token: int = 2
    num_shared_experts: int = 1
    expert_dim: int = 64
    route_scale: float = 1.0
    balance_rate: float = 1e-3
    """Step of the selection bias towards under-loaded experts (Wang et al. 2024, aux-loss-free)."""
    backend: MatmulBackend = MatmulBackend.BLOCKED
    block_rows: int = 128
    """Rows of one block of the padded expert buffer. `BLOCKED` multiplies four of them as one where an expert has as
    many, so small blocks cost little and waste less: 64 was best on CPU where experts get hundreds of rows."""
    dispatch: ExpertDispatch = ExpertDispatch.GATHERED_WEIGHTS
    capacity_factor: float = 1.25
    """Copies that a device's experts take at most, over its share at balanced load, where copies travel (`RING`,
    `RAGGED_ALL_TO_ALL`). What is over is dropped, counted, and logged as `moe/dropped_fraction`."""

    def __post_init__(self) -> None:
        check_positive(
            "model.moe",
            num_experts=self.num_experts,
            num_experts_per_token=self.num_experts_per_token,
            expert_dim=self.expert_dim,
            block_rows=self.block_rows,
        )
        check_not_negative("model.moe", balance_rate=self.balance_rate, num_shared_experts=self.num_shared_experts)
        check_at_most("1", 1, "model.moe.capacity_factor", self.capacity_factor)
        if self.backend == MatmulBackend.DENSE and self.dispatch != ExpertDispatch.GATHERED_WEIGHTS:
            raise ValueError(
                f"model.moe.backend = {self.backend} runs every expert on every token, which model.moe.dispatch = "
                f"{self.dispatch} does not bring together; choose backend = blocked or dispatch = gathered_weights"
            )
        check_at_most(
            "model.moe.num_experts_per_token",
            self.num_experts_per_token,
            "model.moe.num_experts",
            self.num_experts,
        )


@dataclass(frozen=True, kw_only=True)
class MtpConfig:
    """Multi-token prediction: blocks after the last layer, of which block k predicts k + 1 targets further ahead.

    They are layers with a dense MLP, share tables and head with the network, and run in training only.
    """

    num_blocks: int = 0
    global_blocks: tuple[int, ...] = ()
    """Blocks, counted from 0, whose attention is global; the others slide."""
    chain: MtpChain = MtpChain.NORMED
    embedding: MtpEmbedding = MtpEmbedding.RAW

    def __post_init__(self) -> None:
        check_not_negative("model.mtp", num_blocks=self.num_blocks)
        if len(set(self.global_blocks)) < len(self.global_blocks):
            raise ValueError(f"model.mtp.global_blocks = {self.global_blocks} names a block twice; name each once")
        outside = [block for block in self.global_blocks if not 0 <= block < self.num_blocks]
        if outside:
            raise ValueError(
                f"model.mtp.global_blocks names blocks {outside}, but model.mtp.num_blocks = {self.num_blocks}; "
                f"blocks are counted from 0"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole network. Layers are counted from 0; a layer is sliding unless listed in `global_layers`."""

    num_layers: int = 4
    num_dense_layers: int = 1
    """The first layers, which use a dense MLP of `dense_dim` instead of experts."""
    global_layers: tuple[int, ...] = (3,)
    d_model: int = 128
    dense_dim: int = 256
    vocab_size: int = 512
    unpadded_vocab_size: int = 0
    """Logits are cut to this many entries; 0 means `vocab_size`."""
    conv_taps: int = 4
    norm_eps: float = 1e-6
    mup_width_multiplier: float = 1.0
    compute_dtype: ComputeDtype = ComputeDtype.FLOAT32
    remat: Remat = Remat.NONE
    scan_layers: bool = True
    """Run equal groups of layers as a loop in training, which compiles in a time that does not grow with them. Written
    out instead, with `remat = none`, the step of a small model of four equal layers takes a seventh less on CPU: what
    the backward pass reads is then not copied into a stack of all layers and out again. Where no group repeats, as in
    the quickstart, there is no loop either way."""
    row_parts: int = 1
    """Parts of a device's rows that every layer takes side by side in training: while the tokens of one travel to
    experts and back, another is computed, and small operations of both keep the cores of a CPU busy. Each part has its
    own buffer of `moe.capacity_factor`."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    audio_out: AudioOutConfig = field(default_factory=AudioOutConfig)

    def __post_init__(self) -> None:
        check_positive(
            "model",
            num_layers=self.num_layers,
            d_model=self.d_model,
            dense_dim=self.dense_dim,
            vocab_size=self.vocab_size,
            conv_taps=self.conv_taps,
            row_parts=self.row_parts,
            norm_eps=self.norm_eps,
            mup_width_multiplier=self.mup_width_multiplier,
        )
        check_not_negative(
            "model", num_dense_layers=self.num_dense_layers, unpadded_vocab_size=self.unpadded_vocab_size
        )
        check_at_most("model.num_dense_layers", self.num_dense_layers, "model.num_layers", self.num_layers)
        check_at_most("model.unpadded_vocab_size", self.unpadded_vocab_size, "model.vocab_size", self.vocab_size)
        outside = [layer for layer in self.global_layers if not 0 <= layer < self.num_layers]
        if outside:
            raise ValueError(
                f"model.global_layers names layers {outside}, but model.num_layers = {self.num_layers} "
                f"gives layers 0 to {self.num_layers - 1}"
            )
        if self.has_voice:
            parts = "model.audio_out.frames_per_position", self.audio_out.frames_per_position
            check_multiple("model.audio.hop_samples", self.audio.hop_samples, *parts)
            hop = self.audio.hop_samples // self.audio_out.frames_per_position
            check_multiple("model.audio_out.window_samples", self.audio_out.window_samples, "a frame's hop", hop)
            # Windows are zero at their start: where one ends, the next must have begun.
            check_at_most("2 frames' hops", 2 * hop, "model.audio_out.window_samples", self.audio_out.window_samples)

    @property
    def has_voice(self) -> bool:
        """Whether the model speaks: whether it has a flow head."""
        return self.audio_out.frames_per_position > 0

    @property
    def num_logits(self) -> int:
        """Entries of the logits: the vocabulary without its padding."""
        return self.unpadded_vocab_size or self.vocab_size

    @property
    def streamed(self) -> "ModelConfig":
        """The network of live sessions: without blocks of multi-token prediction."""
        return replace(self, mtp=MtpConfig())


def check_platform(model: ModelConfig, platform: str) -> None:
    """Checks that the chosen kernels exist on the platform, by jax's name, that will run them.

    Raises:
        ValueError: a kernel is written for another platform.
    """
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    for name, backend in (("attention", model.attention.backend), ("moe", model.moe.backend)):
        if backend in ("gpu", "tpu") and backend != platform:
            raise ValueError(
                f"model.{name}.backend = {str(backend)!r} runs on {backend}, but the devices are {platform}; "
                f"set it to {str('blocked' if platform == 'cpu' else platform)!r}"
            )
