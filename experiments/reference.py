"""Reference: the quickstart's task with voices of other makes and through other channels, for human digits.

Question: how far do human digits come when nothing but synthetic speech is trained on, if half of it comes
from espeak, flite and festival, band limited, in rooms and through codecs?

Cost: about 28 minutes of training on one core, and ten on two to synthesise what the quickstart has not.
Expected: human digits above 0.7; see experiments/README.md.

Commands, after the quickstart has prepared its data:

    python -m launch.synthesize --task=requests --pace=brisk --out=data/reference/train --num_sessions=9000 \
        --seed=2 --voices=espeak,flite,festival --augment=channel
    python -m launch.encode --config=experiments/reference.py
    python -m launch.train --config=experiments/reference.py --workdir=runs/reference
    python -m launch.evaluate --model=runs/reference --out=runs/reference/evaluation
    python -m launch.evaluate --model=runs/reference --sessions=data/quickstart/human/digits \
        --out=runs/reference/evaluation-human
"""

from ml_collections import ConfigDict

from experiments import quickstart


def get_config() -> ConfigDict:
    """The quickstart, but for a second source and its length."""
    config = quickstart.get_config()
    config.name = "reference"
    with config.unlocked():
        config.data.sources.channel = config.data.sources.requests.copy_and_resolve_references()
    config.data.sources.channel.path = "data/reference/train"
    config.train.num_steps = 4_000
    config.train.log_every = 50
    config.train.eval_every = 1_000
    config.train.checkpoint_every = 500
    return config
