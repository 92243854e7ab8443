"""Tick length: what a micro-turn's length changes in what is learnt in as many steps.

Cost: six runs of 400 steps of the quickstart's model, 2 to 4 minutes each on two cores.

    python -m launch.synthesize --task=requests --out=data/ticks/train --pace=brisk --num_sessions=5500 --turn_ms=400
    python -m launch.synthesize --task=requests --out=data/ticks/heldout --split=heldout --seed=1 --num_sessions=300 \
        --turn_ms=400
    python -m launch.sweep --grid=experiments/ablations/tick_length.py

All three hear the same sessions, whose answers begin at borders of 400 ms: in others they would be due too soon. Rows
hold as many positions in every variant, so shorter ticks, which take more positions a second, see less sound.
"""

from tml.config import Grid


def get_grid() -> Grid:
    """Ticks of 100, 200 and 400 ms."""
    return Grid(
        question="How long should a micro-turn be?",
        base="experiments/quickstart.py",
        common={
            "train.num_steps": 400,
            "train.eval_every": 100,
            "train.eval_batches": 16,
            "data.row_slots": 448,
            "data.sources.requests.path": "data/ticks/train",
            "data.eval_sources.requests.path": "data/ticks/heldout",
            "text.tokenizer": "data/ticks/tokenizer",
        },
        variants={f"{length}ms": {"turn.turn_ms": length} for length in (100, 200, 400)},
        seeds=(0, 1),
        measures=("eval/loss_text", "eval/accuracy_text", "eval/loss_heard"),
    )
