r"""Interaction 276B: the announced size, 276.8 B parameters with its towers, 12.6 B active, on 512 chips of v5p.

Question: how fast does the whole model train on a pod, and what limits it? The batch is the product's: 2,048 rows
of 4,096 positions. A listening turn of a session with video is [tick], 4 audio frames, the tiles of a picture of
120 x 120 pixels (12 every second turn, as 5 frames a second fill a tile's two in 400 ms) and [listen]: half of the
positions are tiles, a third audio. The rows keep places for 12 tiles in every turn.

Cost: 1.2 million steps of 8.4 million positions; `launch.plan` says how long a step takes.
Expected: no loss has been measured; nobody here has such a machine.

Command:

    python -m launch.plan --config=experiments/interaction_276b.py --topology=v5p:8x8x8

16 live sessions on eight chips (one key head each), by `stream.tensor` and not by `mesh`, which is training's:

    python -m launch.plan --config=experiments/interaction_276b.py --step=decode --topology=v5p:2x2x2
    python -m launch.plan --config=experiments/interaction_276b.py --step=decode --topology=h200:1x1x8 \
        --config.stream.backend=gpu
"""

from ml_collections import ConfigDict

from tml.config import (
    AttentionBackend,
    AttentionConfig,
    ComputeDtype,
    DataConfig,
    Experiment,
    ExpertDispatch,
    LossConfig,
    MatmulBackend,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Optimizer,
    Remat,
    SourceConfig,
    StreamConfig,
    TextConfig,
    TrainConfig,
    VideoConfig,
    to_config_dict,
)


def get_config() -> ConfigDict:
    """The experiment, as flags may change it."""
    return to_config_dict(
        Experiment(
            name="interaction_276b",
            model=ModelConfig(
                num_layers=44,
                num_dense_layers=2,
                # Two dense sliding layers, then seven identical groups of five sliding layers and a global one.
                global_layers=(7, 13, 19, 25, 31, 37, 43),
                d_model=4_096,
                dense_dim=16_384,
                vocab_size=201_024,
                unpadded_vocab_size=200_058,
                mup_width_multiplier=16.0,
                compute_dtype=ComputeDtype.BFLOAT16,
                remat=Remat.EXPERTS,
                attention=AttentionConfig(
                    num_heads=32,
                    num_kv_heads=8,
                    head_dim=128,
                    window=512,
                    global_extent=1_024,
                    backend=AttentionBackend.TPU,
                ),
                moe=MoEConfig(
                    num_experts=256,
                    num_experts_per_token=6,
                    num_shared_experts=2,
                    expert_dim=2_048,
                    route_scale=8.0,
                    backend=MatmulBackend.TPU,
                    dispatch=ExpertDispatch.RING,
                ),
                video=VideoConfig(max_tiles_per_turn=12),
            ),
            text=TextConfig(tokenizer="data/interaction/o200k_base.tiktoken"),
            data=DataConfig(
                sources={"sessions": SourceConfig(path="data/interaction/train")},
                row_slots=4_096,
                rows_per_batch=2_048,
            ),
            # All logits of a chip's 16,384 positions would be 13 GB in float32.
            loss=LossConfig(chunk_positions=4_096),
            optim=OptimConfig(optimizer=Optimizer.ADAMW, peak_lr=2e-4, warmup_steps=2_000, weight_decay=0.1),
            mesh=MeshConfig(fsdp=64, expert=8),
            train=TrainConfig(num_steps=1_200_000, checkpoint_every=500, peak_flops_per_s=459e12),
            # One key head a chip; --config.stream.backend=gpu for GPUs.
            stream=StreamConfig(max_positions=32_768, tensor=8, backend=MatmulBackend.TPU),
        )
    )
