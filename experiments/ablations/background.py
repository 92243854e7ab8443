"""Background: whether a model that never read background results in training uses them.

Cost: four runs of 1,000 steps of the tiny full-duplex model, 9 minutes each on two cores.

    python -m launch.synthesize --task=duplex --num_sessions=16000 --out=data/ablations/background/trained
    python -m launch.synthesize --task=duplex --num_sessions=16000 --shares=delegation:0 \
        --out=data/ablations/background/never
    python -m launch.synthesize --task=delegation --split=heldout --seed=3 --num_sessions=100 \
        --out=data/ablations/background/heldout
    python -m launch.sweep --grid=experiments/ablations/background.py

Held out are delegations alone.
"""

from tml.config import Grid


def get_grid() -> Grid:
    """With delegations among the training sessions, and without."""
    return Grid(
        question="Does a model that never read background results use them?",
        base="experiments/duplex_tiny.py",
        common={
            "train.num_steps": 1_000,
            "train.eval_every": 250,
            "data.eval_sources.duplex.path": "data/ablations/background/heldout",
            "text.tokenizer": "data/ablations/background/tokenizer",
        },
        variants={
            "trained": {"data.sources.duplex.path": "data/ablations/background/trained"},
            "never": {"data.sources.duplex.path": "data/ablations/background/never"},
        },
        seeds=(0, 1),
        measures=("eval/loss_text", "eval/accuracy_text", "eval/loss_action"),
    )
