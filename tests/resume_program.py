"""Trains the made-up experiment in a folder: the program that tests/test_resume.py kills.

python tests/resume_program.py WORKDIR
"""

import dataclasses
import sys
from pathlib import Path

from made_up import made_up_batch, made_up_batches, made_up_experiment

from launch.app import EXIT_INTERRUPTED, prepare_jax
from tml.config import TrainConfig

NUM_STEPS = 60


def main() -> int:
    experiment = dataclasses.replace(
        made_up_experiment(),
        train=TrainConfig(
            num_steps=NUM_STEPS,
            log_every=1,
            eval_every=25,
            eval_batches=1,
            checkpoint_every=7,
            peak_flops_per_s=1e9,
        ),
    )
    prepare_jax()
    from tml.train import train

    result = train(
        experiment,
        Path(sys.argv[1]),
        lambda start_step: made_up_batches(experiment, start_step),
        lambda: [made_up_batch(experiment, 10_000)],
    )
    return EXIT_INTERRUPTED if result.is_interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
