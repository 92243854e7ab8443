"""Reference: the quickstart's task with voices of other makes and through other channels, for human digits.

Question: how far do human digits come when nothing but synthetic speech is trained on, if it comes from
espeak, flite and festival, band limited, in rooms and through codecs?

Cost: 70 minutes of training on two cores, and about fifteen of preparation.
Expected: see experiments/README.md.

Commands:

    python -m launch.synthesize --task=requests --pace=brisk --out=data/reference/train --num_sessions=20000 \
        --seed=2 --voices=espeak,flite,festival --augment=channel
    python -m launch.encode --config=experiments/reference.py
    python -m launch.train --config=experiments/reference.py --workdir=runs/reference
    python -m launch.evaluate --model=runs/reference --out=runs/reference/evaluation
    python -m launch.evaluate --model=runs/reference --sessions=data/quickstart/human/digits
"""

from ml_collections import ConfigDict

from experiments import quickstart


def get_config() -> ConfigDict:
    """The quickstart, but for its training data and its length."""
    config = quickstart.get_config()
    config.name = "reference"
    config.data.sources.requests.path = "data/reference/train"
    config.train.num_steps = 13_000
    config.train.log_every = 100
    config.train.eval_every = 2_000
    config.train.checkpoint_every = 1_000
    return config
