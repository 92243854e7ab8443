"""The configuration of a run: a tree of frozen dataclasses that check themselves. No jax here."""

from tml.config.data import DataConfig, SourceConfig, SourceKind
from tml.config.experiment import Experiment
from tml.config.mesh import DATA_AXES, ROW_AXES, SHARD_AXES, MeshConfig, Split
from tml.config.model import (
    AttentionConfig,
    AudioConfig,
    ComputeDtype,
    ExpertDispatch,
    MatmulBackend,
    ModelConfig,
    MoEConfig,
    Remat,
    VideoConfig,
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
    "config_hash",
    "difference",
    "from_config_dict",
    "from_json",
    "to_config_dict",
    "to_json",
    "to_mapping",
]
