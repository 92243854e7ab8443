"""Inkling-Small: the published shape of the family, 263.7 B parameters with its towers, 12.1 B active.

Question: none of its own. It is the shape that published weights have, for importing them, continuing from them,
and comparing with the engines that serve them. Its stack begins with six single layers (two of them dense), then
six groups of five sliding layers and a global one. Published weights have 8 blocks of multi-token prediction besides,
265.96 B in all; a run that begins with them needs these values too:

    --config.model.mtp.num_blocks=8 --config.model.mtp.global_blocks='(1, 3)' --config.model.mtp.chain=raw

Cost: 1.2 million steps of 8.4 million positions; `launch.plan` says how long a step takes.
Expected: no loss has been measured yet.

Command:

    python -m launch.plan --config=experiments/inkling_small.py --topology=v5p:8x8x8
"""

from ml_collections import ConfigDict

from experiments import interaction_276b


def get_config() -> ConfigDict:
    """The announced size, with the published number of layers and their order."""
    config = interaction_276b.get_config()
    config.name = "inkling_small"
    config.model.num_layers = 42
    config.model.global_layers = (5, 11, 17, 23, 29, 35, 41)
    return config
