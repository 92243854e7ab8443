"""Interaction 30B: 29.0 B parameters, 2.9 B active, for one slice of 64 chips.

Question: what does the recipe of the 276B model give at a tenth of its size?

Cost: 250,000 steps of 2.1 million positions; `launch.plan` says how long a step takes.
Expected: no loss has been measured yet.

Command:

    python -m launch.plan --config=experiments/interaction_30b.py --topology=v5p:4x4x4
"""

from ml_collections import ConfigDict

from experiments import interaction_276b


def get_config() -> ConfigDict:
    """The recipe of the 276B model; six single layers (two of them dense), then five groups of six."""
    config = interaction_276b.get_config()
    config.name = "interaction_30b"
    model = config.model
    model.num_layers, model.global_layers = 36, (5, 11, 17, 23, 29, 35)
    model.d_model, model.dense_dim = 2_048, 8_192
    model.vocab_size, model.unpadded_vocab_size = 131_072, 0
    model.mup_width_multiplier = 8.0
    model.attention.num_heads, model.attention.num_kv_heads = 16, 4
    model.moe.num_experts, model.moe.expert_dim = 128, 1_024
    config.text.tokenizer = "data/interaction/tokenizer_131k"
    config.data.rows_per_batch = 512
    config.optim.peak_lr = 4e-4
    config.mesh.fsdp, config.mesh.expert = 16, 4
    config.stream.tensor = 4
    config.train.num_steps = 250_000
    return config
