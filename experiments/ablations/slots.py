"""Slots: whether it helps that every turn takes as many positions, so that a distance in positions is one in time.

Cost: six runs of 400 steps of the quickstart's model; 2 minutes each with variable slots on two cores, about twice
that with fixed ones.

    python -m launch.sweep --grid=experiments/ablations/slots.py

A turn of silence takes 5 positions, and every turn 9 with fixed slots; rows hold as many turns of silence in every
variant. Attention looks back over as many positions in `fixed`, and as far in time as `variable` in `fixed-far`.
"""

from tml.config import Grid


def get_grid() -> Grid:
    """Variable slots, fixed ones, and fixed ones with attention that looks back over as many turns."""
    fixed = {"turn.slots": "fixed", "data.row_slots": 576}
    return Grid(
        question="Does it help that a distance in positions is one in time?",
        base="experiments/quickstart.py",
        common={
            "train.num_steps": 400,
            "train.eval_every": 100,
            "train.eval_batches": 16,
            "turn.max_text_out_per_turn": 1,
        },
        variants={
            "variable": {"turn.slots": "variable", "data.row_slots": 320},
            "fixed": fixed,
            "fixed-far": {**fixed, "model.attention.window": 29, "model.attention.global_extent": 230},
        },
        seeds=(0, 1),
        measures=("eval/loss_text", "eval/accuracy_text", "eval/loss_heard"),
    )
