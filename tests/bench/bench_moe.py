"""Training tokens per second of a small mixture on CPU, shaped like Mixtral, with 8 to 128 experts.

Run: GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1 python -m tests.bench.bench_moe [8 32 128], twice:
with one arena no freed array goes back to the kernel, which would cost every second step half a second; but what
compiling leaves in that arena makes threads wait for each other, so the program must come from the compile cache.

Four layers of width 256, 4/2 heads of 64, top-2 of 8 experts of width 512, vocabulary 8192, 8 rows of 512, float32,
AdamW, nothing dropped; relative bias and short convolutions on, a front end for sound of next to no size (the peers
have none).

On this kind of machine, idle, torchtitan 0.3 (eager) trained the same shape with 3,400 to 4,700 tokens/s, MaxText
0.2.5 with 900 to 1,100 when dropless: the bar is 1.2 times the former and 5 times the latter, which is over 40 % of the
matmul rate. The peers' matmuls are the same 40 MFLOP a token. The tokens per second should hardly fall from 8 experts
to 128: two experts work on a token in either, but the update reads and writes all of them.
"""

import sys

from launch.app import prepare_jax
from tests.bench.bench_train import measure
from tml.config import (
    AttentionConfig,
    AudioConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Optimizer,
)


def mixtral_like(num_experts: int) -> Experiment:
    """The shape that the peers were measured with, and any number of experts."""
    return Experiment(
        name=f"moe-{num_experts}",
        model=ModelConfig(
            num_layers=4,
            num_dense_layers=0,
            global_layers=(0, 1, 2, 3),
            d_model=256,
            vocab_size=8_192,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, window=512, global_extent=512),
            moe=MoEConfig(
                num_experts=num_experts,
                num_experts_per_token=2,
                num_shared_experts=0,
                expert_dim=512,
                # Half of the copies that an expert gets, or fewer: the last block of every expert is partly padding.
                block_rows=min(64, 4_096 // num_experts),
            ),
            audio=AudioConfig(num_mels=1, num_levels=2),
            scan_layers=False,
        ),
        data=DataConfig(row_slots=512, rows_per_batch=8),
        optim=OptimConfig(optimizer=Optimizer.ADAMW),
    )


def main() -> None:
    """Measures the step with each number of experts."""
    prepare_jax()
    for num_experts in map(int, sys.argv[1:] or ("8", "32", "128")):
        measure(mixtral_like(num_experts))


if __name__ == "__main__":
    main()
