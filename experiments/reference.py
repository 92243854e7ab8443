"""Reference: the quickstart's task with voices of other makes and through other channels, for human digits.

Question: how far do human digits come when nothing but synthetic speech is trained on, if it comes from
espeak, flite and festival, band limited, in rooms and through codecs?

Cost: 75 minutes of training on two cores, and about ten of preparation.
Expected: not run to its end yet; see experiments/README.md.

Commands:

    python -m launch.synthesize --task=requests --pace=brisk --out=data/reference/train --num_sessions=20000 \
        --seed=2 --voices=espeak,flite,festival --augment=channel
    python -m launch.encode --config=experiments/reference.py
    python -m launch.train --config=experiments/reference.py --workdir=runs/reference
    python -m launch.evaluate --model=runs/reference --out=runs/reference/evaluation
    python -m launch.evaluate --model=runs/reference --sessions=data/quickstart/human/digits
"""

from ml_collections import ConfigDict

from tml.config import (
    AttentionConfig,
    Boundary,
    DataConfig,
    EvaluationConfig,
    Experiment,
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
            name="reference",
            model=ModelConfig(
                num_layers=4,
                num_dense_layers=1,
                global_layers=(3,),
                d_model=128,
                dense_dim=256,
                vocab_size=512,
                attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, window=64, global_extent=128),
                moe=MoEConfig(num_experts=8, num_experts_per_token=2, num_shared_experts=1, expert_dim=64),
            ),
            turn=MicroTurnConfig(boundary=Boundary.NONE, max_text_in_per_turn=2, max_action_per_turn=2),
            text=TextConfig(tokenizer="data/quickstart/tokenizer", train_vocab_size=512),
            data=DataConfig(
                sources={"requests": SourceConfig(path="data/reference/train")},
                eval_sources={"requests": SourceConfig(path="data/quickstart/heldout")},
                row_slots=1024,
                rows_per_batch=4,
            ),
            optim=OptimConfig(peak_lr=3e-3, warmup_steps=50, decay_fraction=0.5),
            train=TrainConfig(num_steps=7_000, log_every=50, eval_every=1_000, checkpoint_every=500),
            evaluation=EvaluationConfig(sessions="data/quickstart/heldout"),
        )
    )
