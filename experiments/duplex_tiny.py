"""Full duplex, tiny: twelve behaviours and a voice, learnt from scratch on two cores.

Question: does one tiny model learn to take turns, wait, stop, keep time, count what it sees, watch for a change,
hear tone, delegate and act, and to speak with its own voice meanwhile, from synthetic sessions alone?

Cost: at most 75 minutes of training on two cores, and five to eight to make and encode the data. What is learnt soon
(turns, pauses, nods, repeating) gives its share of the training sessions to what is learnt late (watching, cues).
Expected: see experiments/README.md.

Commands:

    python -m launch.synthesize --task=duplex --num_sessions=24000 --out=data/duplex_tiny/train \
        --shares=turn_taking:1,pause_handling:1,backchannel:0.6,simultaneous:0.6,counting:1.5,cued:2.5,proactive:4.5,tone:1.8
    python -m launch.synthesize --task=duplex --split=heldout --seed=1 --num_sessions=300 --out=data/duplex_tiny/heldout
    python -m launch.encode --config=experiments/duplex_tiny.py
    python -m launch.train --config=experiments/duplex_tiny.py --workdir=runs/duplex_tiny
    python -m launch.synthesize --task=duplex --split=heldout --seed=2 --num_sessions=1200 --out=data/duplex_tiny/test
    python -m launch.evaluate --model=runs/duplex_tiny --suite=duplex --data=data/duplex_tiny/test \
        --out=runs/duplex_tiny/duplex --limit=70 --max_control_sessions=40
"""

from ml_collections import ConfigDict

from tml.config import (
    AttentionConfig,
    AudioOutConfig,
    Boundary,
    DataConfig,
    Experiment,
    Feedback,
    FlowConfig,
    LossConfig,
    MicroTurnConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
    VideoConfig,
    to_config_dict,
)


def get_config() -> ConfigDict:
    """The experiment, as flags may change it."""
    return to_config_dict(
        Experiment(
            name="duplex_tiny",
            model=ModelConfig(
                num_layers=5,
                num_dense_layers=1,
                global_layers=(2, 4),
                d_model=128,
                dense_dim=256,
                vocab_size=768,
                row_parts=2,
                attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, window=32, global_extent=256),
                moe=MoEConfig(
                    num_experts=8,
                    num_experts_per_token=2,
                    num_shared_experts=1,
                    expert_dim=64,
                    balance_rate=0.02,
                    block_rows=32,
                ),
                video=VideoConfig(fold_dims=(32, 64, 256), max_tiles_per_turn=1),
                audio_out=AudioOutConfig(
                    frames_per_position=4,
                    # What it says it knows from its words; its own first mumbles would lead it away from them.
                    feedback=Feedback.NONE,
                    flow=FlowConfig(width=256, num_blocks=3, num_draws=2, loss_share=0.2, num_steps=4),
                ),
            ),
            turn=MicroTurnConfig(boundary=Boundary.NONE, max_text_in_per_turn=4, max_action_per_turn=16),
            text=TextConfig(tokenizer="data/duplex_tiny/tokenizer", train_vocab_size=768),
            data=DataConfig(
                sources={"duplex": SourceConfig(path="data/duplex_tiny/train")},
                eval_sources={"duplex": SourceConfig(path="data/duplex_tiny/heldout")},
                row_slots=448,
                rows_per_batch=6,
            ),
            loss=LossConfig(speak_weight=5.0, heard_weight=3.0),
            optim=OptimConfig(peak_lr=6e-3, muon_momentum=0.8, warmup_steps=50, decay_fraction=0.5),
            train=TrainConfig(num_steps=6_000, log_every=100, eval_every=1_200, eval_batches=16, checkpoint_every=500),
        )
    )
