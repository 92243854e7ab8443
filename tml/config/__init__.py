"""The configuration of a run: a tree of frozen dataclasses that check themselves. No jax here."""

from tml.config.data import DataConfig, SourceConfig, SourceKind
from tml.config.experiment import Experiment
from tml.config.model import (
    AttentionConfig,
    AudioConfig,
    ChainNorm,
    ComputeDtype,
    MatmulBackend,
    ModelConfig,
    MoEConfig,
    MtpConfig,
    Remat,
    VideoConfig,
)
from tml.config.stream import Boundary, Control, MicroTurnConfig, TextConfig
from tml.config.training import (
    EvaluationConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    Optimizer,
    Schedule,
    StreamConfig,
    TrainConfig,
)
from tml.config.tree import (
    config_hash,
    difference,
    from_config_dict,
    from_json,
    to_config_dict,
    to_json,
    to_mapping,
)

__all__ = [
    "AttentionConfig",
    "AudioConfig",
    "Boundary",
    "ChainNorm",
    "ComputeDtype",
    "Control",
    "DataConfig",
    "EvaluationConfig",
    "Experiment",
    "LossConfig",
    "MatmulBackend",
    "MeshConfig",
    "MicroTurnConfig",
    "MoEConfig",
    "ModelConfig",
    "MtpConfig",
    "OptimConfig",
    "Optimizer",
    "Remat",
    "Schedule",
    "SourceConfig",
    "SourceKind",
    "StreamConfig",
    "TextConfig",
    "TrainConfig",
    "VideoConfig",
    "config_hash",
    "difference",
    "from_config_dict",
    "from_json",
    "to_config_dict",
    "to_json",
    "to_mapping",
]
