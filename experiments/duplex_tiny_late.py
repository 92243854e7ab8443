"""Full duplex, tiny, second stage: a little more of what is learnt late, from the end of `duplex_tiny`.

Question: does the model learn to compare what it sees with what it was asked to wait for, if half of its sessions
show it, and keep the rest?

Cost: 8 minutes of training on two cores, and three to make and encode the data; with the first stage 75 at most.
Expected: see experiments/README.md.

Commands, behind those of `duplex_tiny`:

    python -m launch.synthesize --task=duplex --seed=3 --num_sessions=6000 --out=data/duplex_tiny/late \
        --shares=proactive:24,cued:3,timed:1,counting:1.5,turn_taking:1,pause_handling:1,interruption:0.7,backchannel:0.4,simultaneous:0.4,delegation:0.7,tools:0.7
    python -m launch.encode --config=experiments/duplex_tiny_late.py
    python -m launch.train --config=experiments/duplex_tiny_late.py --workdir=runs/duplex_tiny_late
    python -m launch.evaluate --model=runs/duplex_tiny_late --suite=duplex --data=data/duplex_tiny/test \
        --out=runs/duplex_tiny_late/duplex --limit=70 --max_control_sessions=40
"""

from ml_collections import ConfigDict

from experiments import duplex_tiny


def get_config() -> ConfigDict:
    """The first stage's model, for 700 steps more at a third of its rate."""
    config = duplex_tiny.get_config()
    config.name = "duplex_tiny_late"
    config.data.sources.duplex.path = "data/duplex_tiny/late"
    config.optim.peak_lr, config.optim.decay_fraction = 2e-3, 0.8
    config.train.init_from = "runs/duplex_tiny"
    config.train.num_steps, config.train.eval_every = 700, 350
    return config
