r"""Interaction 276B: the announced size, 276.8 B parameters with its towers, 12.6 B active, on pods of four kinds.

Question: how fast does the whole model train on a pod, and what limits it? The batch is the product's: 2,048 rows
of 4,096 positions. A listening turn of a session with video is [tick], 4 audio frames, the tiles of a picture of
120 x 120 pixels (12 every second turn, as 5 frames a second fill a tile's two in 400 ms) and [listen]: half of the
positions are tiles, a third audio. The rows keep places for 12 tiles in every turn.

Cost: 1.2 million steps of 8.4 million positions; `launch.plan` says how long a step takes.
Expected: no loss has been measured; nobody here has such a machine.

Command:

    python -m launch.plan --config=experiments/interaction_276b.py --topology=v5p:8x8x8

The model is the same on every pod; how it is split, what is recomputed, and whose kernels run is not. A name behind the
file chooses (`PODS`): `--config=experiments/interaction_276b.py:h100 --topology=h100:1x64x8`.

16 live sessions on eight chips (one key head each), by `stream.tensor` and not by `mesh`, which is training's:

    python -m launch.plan --config=experiments/interaction_276b.py --step=decode --topology=v5p:2x2x2
    python -m launch.plan --config=experiments/interaction_276b.py:h100 --step=decode --topology=h200:1x1x8
"""

from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Pod:
    """What the experiment takes from the machine that it runs on.

    Attributes:
        mesh: how devices are arranged.
        peak_flops_per_s: of one device.
        rows: of a batch.
        row_slots: positions of a row.
        remat: what the way back recomputes.
        attention: whose attention kernel.
        matmul: whose grouped matmul.
    """

    mesh: MeshConfig
    peak_flops_per_s: float
    rows: int = 2_048
    row_slots: int = 4_096
    remat: Remat = Remat.EXPERTS
    attention: AttentionBackend = AttentionBackend.TPU
    matmul: MatmulBackend = MatmulBackend.TPU


PODS = {
    # --topology=v5p:8x8x8
    "v5p": Pod(mesh=MeshConfig(fsdp=64, expert=8), peak_flops_per_s=459e12),
    # The same chips, rows of 32,768 positions: nine minutes of a session with video instead of one.
    "v5p_long": Pod(mesh=MeshConfig(fsdp=8, expert=8, context=8), peak_flops_per_s=459e12, rows=256, row_slots=32_768),
    # --topology=v5p:8x8x8 --num_slices=2
    "v5p_slices": Pod(mesh=MeshConfig(replica=2, fsdp=64, expert=8), peak_flops_per_s=459e12, rows=4_096),
    # --topology=v6e:16x16; 32 GB a chip hold two rows, recomputed whole.
    "v6e": Pod(
        mesh=MeshConfig(fsdp=16, expert=16),
        peak_flops_per_s=918e12,
        rows=512,
        remat=Remat.LAYER,
    ),
    # --topology=tpu7x:4x8x8, two devices a chip; experts over the short axis, which is a ring of four chips.
    "tpu7x": Pod(mesh=MeshConfig(fsdp=128, expert=4), peak_flops_per_s=2_307e12 / 2, rows=4_096, remat=Remat.LAYER),
    # --topology=h100:1x64x8; experts over the NVLinks of a host, eight rows a GPU against the slow network.
    "h100": Pod(
        mesh=MeshConfig(fsdp=64, expert=8),
        peak_flops_per_s=989e12,
        rows=4_096,
        remat=Remat.LAYER,
        attention=AttentionBackend.GPU,
        matmul=MatmulBackend.GPU,
    ),
}
"""Settings by pod: `--config=experiments/interaction_276b.py:NAME`."""


def get_config(pod: str = "v5p") -> ConfigDict:
    """The experiment on a pod of `PODS`, as flags may change it.

    Raises:
        ValueError: a pod that is not there.
    """
    if pod not in PODS:
        raise ValueError(f"interaction_276b has no settings for pod {pod!r}; choose of {', '.join(PODS)}")
    on = PODS[pod]
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
                remat=on.remat,
                attention=AttentionConfig(
                    num_heads=32,
                    num_kv_heads=8,
                    head_dim=128,
                    window=512,
                    global_extent=1_024,
                    backend=on.attention,
                ),
                moe=MoEConfig(
                    num_experts=256,
                    num_experts_per_token=6,
                    num_shared_experts=2,
                    expert_dim=2_048,
                    route_scale=8.0,
                    backend=on.matmul,
                    dispatch=ExpertDispatch.RING,
                ),
                video=VideoConfig(max_tiles_per_turn=12),
            ),
            text=TextConfig(tokenizer="data/interaction/o200k_base.tiktoken"),
            data=DataConfig(
                sources={"sessions": SourceConfig(path="data/interaction/train")},
                row_slots=on.row_slots,
                rows_per_batch=on.rows,
            ),
            # All logits of a chip's 16,384 positions would be 13 GB in float32; 25 blocks hold 2 % more than there is.
            loss=LossConfig(vocab_block=8_192),
            optim=OptimConfig(optimizer=Optimizer.ADAMW, peak_lr=2e-4, warmup_steps=2_000, weight_decay=0.1),
            mesh=on.mesh,
            train=TrainConfig(num_steps=1_200_000, checkpoint_every=500, peak_flops_per_s=on.peak_flops_per_s),
            # One key head a chip.
            stream=StreamConfig(max_positions=32_768, tensor=8, backend=on.matmul),
        )
    )
