"""Control: whether a tick token helps, and a [listen]/[speak] token.

Cost: eight runs of 300 steps of the quickstart's model, two minutes each on two cores.

    python -m launch.sweep --grid=experiments/ablations/control.py

The losses of text and of heard words have the same targets in every variant; that of control has not.
"""

from tml.config import Grid


def get_grid() -> Grid:
    """Boundary by control."""
    return Grid(
        question="Does a tick token help, and does a token that says listen or speak?",
        base="experiments/quickstart.py",
        common={"train.num_steps": 300, "train.eval_every": 100, "train.eval_batches": 16},
        variants={
            "explicit": {"turn.control": "explicit", "turn.boundary": "none"},
            "explicit-tick": {"turn.control": "explicit", "turn.boundary": "tick"},
            "implicit": {"turn.control": "implicit", "turn.boundary": "none"},
            "implicit-tick": {"turn.control": "implicit", "turn.boundary": "tick"},
        },
        seeds=(0, 1),
        measures=("eval/loss_text", "eval/accuracy_text", "eval/loss_heard"),
    )
