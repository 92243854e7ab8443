"""The configuration of a run: a tree of frozen dataclasses that check themselves. No jax here."""

from tml.config.data import DataConfig, SourceConfig, SourceKind
from tml.config.experiment import Experiment
from tml.config.mesh import DATA_AXES, ROW_AXES, SHARD_AXES, MeshConfig, Split
from tml.config.model import (
    AttentionBackend,
    AttentionConfig,
    AudioConfig,
    ComputeDtype,
    ExpertDispatch,
    MatmulBackend,
    ModelConfig,
    MoEConfig,
    Remat,
    VideoConfig,
    check_platform,
)
from tml.config.stream import Boundary, Control, MicroTurnConfig, TextConfig
from tml.config.training import (
    EvaluationConfig,
    LossConfig,
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
    "DATA_AXES",
    "ROW_AXES",
    "SHARD_AXES",
    "AttentionBackend",
    "AttentionConfig",
    "AudioConfig",
    "Boundary",
    "ComputeDtype",
    "Control",
    "DataConfig",
    "EvaluationConfig",
    "Experiment",
    "ExpertDispatch",
    "LossConfig",
    "MatmulBackend",
    "MeshConfig",
    "MicroTurnConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "Optimizer",
    "Remat",
    "Schedule",
    "SourceConfig",
    "SourceKind",
    "Split",
    "StreamConfig",
    "TextConfig",
    "TrainConfig",
    "VideoConfig",
    "check_platform",
    "config_hash",
    "difference",
    "from_config_dict",
    "from_json",
    "to_config_dict",
    "to_json",
    "to_mapping",
]
