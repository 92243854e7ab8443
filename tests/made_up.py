"""A tiny experiment and batches that depend on their step alone; shared by the tests of training."""

import itertools
from collections.abc import Iterator

import numpy as np

from tml.batch import Batch, empty_rows
from tml.config import (
    AttentionConfig,
    AudioConfig,
    DataConfig,
    Experiment,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)
from tml.microturn import Kind, Target

NUM_ROWS = 16
NUM_TOKEN_TARGETS = len([target for target in Target if target is not Target.AUDIO])


def made_up_experiment(**changes) -> Experiment:
    """One layer of experts: programs take long to compile, and tests of training need no depth."""
    model = ModelConfig(
        num_layers=1,
        num_dense_layers=0,
        global_layers=(),
        d_model=16,
        dense_dim=24,
        vocab_size=32,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, window=8, global_extent=16, rel_rank=2),
        moe=MoEConfig(num_experts=4, expert_dim=8, block_rows=8),
        audio=AudioConfig(num_mels=4, num_levels=4),
    )
    defaults = {
        "name": "made-up",
        "model": model,
        "data": DataConfig(row_slots=32, rows_per_batch=NUM_ROWS),
        "optim": OptimConfig(warmup_steps=2, peak_lr=1e-2),
        "train": TrainConfig(
            num_steps=12, log_every=2, eval_every=6, eval_batches=2, checkpoint_every=4, peak_flops_per_s=1e9
        ),
    }
    return Experiment(**{**defaults, **changes})


def made_up_batch(experiment: Experiment, step: int) -> Batch:
    """Two segments a row with every kind of target; the next token is the target, so that it can be learnt."""
    drawn = np.random.default_rng([experiment.seed, step])
    data, model = experiment.data, experiment.model
    batch = empty_rows(
        data.rows_per_batch,
        data.row_slots,
        min(1, model.video.max_tiles_per_turn),
        model,
        data.row_slots // 2 if model.has_voice else 0,
    )
    shape = batch.tokens_BS.shape
    batch.tokens_BS[:] = np.cumsum(drawn.integers(1, 3, shape), axis=1) % model.vocab_size
    batch.kinds_BS[:] = np.where(drawn.random(shape) < 0.3, Kind.AUDIO, Kind.TOKEN)
    batch.levels_BSM[:] = drawn.integers(0, model.audio.num_levels, batch.levels_BSM.shape)
    places = np.arange(data.row_slots)
    split = data.row_slots // 2 + drawn.integers(-4, 5, (shape[0], 1))
    batch.segment_ids_BS[:] = np.where(places < split, 1, 2)
    batch.positions_BS[:] = np.where(places < split, places, places - split)
    batch.targets_BS[:, :-1] = batch.tokens_BS[:, 1:]
    batch.target_kinds_BS[:, :-1] = drawn.integers(0, NUM_TOKEN_TARGETS, (shape[0], shape[1] - 1))
    batch.target_kinds_BS[batch.kinds_BS == Kind.AUDIO] = Target.NONE
    batch.loss_weights_BS[:] = np.where(batch.target_kinds_BS > 0, drawn.uniform(1, 8, shape), 0.0)
    batch.kinds_BS[:, -3:] = Kind.PAD
    batch.segment_ids_BS[:, -3:] = 0
    batch.target_kinds_BS[:, -3:] = Target.NONE
    batch.loss_weights_BS[:, -3:] = 0.0
    return batch


def made_up_batches(experiment: Experiment, start_step: int) -> Iterator[Batch]:
    """The batches from a step on."""
    return (made_up_batch(experiment, step) for step in itertools.count(start_step))
