"""Interaction 1B: 1.3 B parameters, 0.4 B active, for eight chips.

Question: which choices of the recipe survive a hundred times the quickstart's size, at a price that allows sweeps?

Cost: 100,000 steps of 0.5 million positions; `launch.plan` says how long a step takes.
Expected: no loss has been measured yet.

Command:

    python -m launch.plan --config=experiments/interaction_1b.py --topology=v5p:2x2x2
"""

from ml_collections import ConfigDict

from experiments import interaction_276b


def get_config() -> ConfigDict:
    """The recipe of the 276B model; a dense and a sliding layer, then two groups of four sliding and a global one."""
    config = interaction_276b.get_config()
    config.name = "interaction_1b"
    model = config.model
    model.num_layers, model.num_dense_layers, model.global_layers = 12, 1, (6, 11)
    model.d_model, model.dense_dim = 1_024, 4_096
    model.vocab_size, model.unpadded_vocab_size = 65_536, 0
    model.mup_width_multiplier = 4.0
    model.attention.num_heads, model.attention.num_kv_heads = 8, 2
    model.moe.num_experts, model.moe.expert_dim = 64, 512
    config.text.tokenizer = "data/interaction/tokenizer_65k"
    config.data.rows_per_batch = 128
    config.optim.peak_lr, config.optim.warmup_steps = 1e-3, 1_000
    config.mesh.fsdp, config.mesh.expert = 8, 1
    config.stream.tensor = 2
    config.train.num_steps = 100_000
    return config
