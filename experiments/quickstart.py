"""Quickstart: spoken requests with one-word answers, learnt from scratch on two cores.

Question: does a tiny interaction model learn, from synthetic speech alone, to answer a spoken
request at the right moment, in micro-turns of 200 ms?

Cost: 1,600 steps of 0.2 to 0.3 s on two cores, and about five minutes of installation, preparation, compiling and
evaluation.
Expected: see experiments/README.md.

Command, after `data/quickstart` has been prepared (see the README):

    python -m launch.train --config=experiments/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from tml.config import (
    AttentionConfig,
    Boundary,
    DataConfig,
    EvaluationConfig,
    Experiment,
    LossConfig,
    MicroTurnConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
    to_config_dict,
)


def get_config() -> ConfigDict:
    """The experiment, as flags may change it."""
    return to_config_dict(
        Experiment(
            name="quickstart",
            model=ModelConfig(
                num_layers=4,
                num_dense_layers=1,
                global_layers=(3,),
                d_model=128,
                dense_dim=256,
                vocab_size=768,
                row_parts=2,
                attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, window=16, global_extent=128),
                moe=MoEConfig(
                    num_experts=8,
                    num_experts_per_token=2,
                    num_shared_experts=1,
                    expert_dim=64,
                    balance_rate=0.02,
                    block_rows=32,
                ),
            ),
            turn=MicroTurnConfig(boundary=Boundary.NONE, max_text_in_per_turn=2, max_action_per_turn=2),
            text=TextConfig(tokenizer="data/quickstart/tokenizer", train_vocab_size=768),
            data=DataConfig(
                sources={"requests": SourceConfig(path="data/quickstart/train")},
                eval_sources={"requests": SourceConfig(path="data/quickstart/heldout")},
                row_slots=320,
                rows_per_batch=6,
            ),
            loss=LossConfig(speak_weight=5.0, heard_weight=3.0),
            optim=OptimConfig(peak_lr=6e-3, muon_momentum=0.8, warmup_steps=50, decay_fraction=0.5),
            train=TrainConfig(num_steps=1_600, log_every=50, eval_every=800, eval_batches=32, checkpoint_every=400),
            evaluation=EvaluationConfig(sessions="data/quickstart/heldout"),
        )
    )
