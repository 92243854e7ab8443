"""The presets, counted from their specs and, exactly, by a formula that shares nothing with the code."""

import dataclasses
import importlib
from typing import NamedTuple

import pytest

from experiments import interaction_276b
from tml.config import ComputeDtype, Experiment, MtpChain, MtpConfig, Optimizer, Remat, from_config_dict
from tml.flops import param_table
from tml.model import transformer
from tml.params import count_params


class Size(NamedTuple):
    """A line of the table of sizes; `published` is the count in billions that the size is known by."""

    layers: int
    global_layers: tuple[int, ...]
    dense_layers: int
    dense_width: int
    width: int
    heads: int
    kv_heads: int
    experts: int
    expert_width: int
    vocabulary: int
    published: float
    published_active: float
    groups: list[tuple[int, int]]


SINGLE = (1, 1)
SIZES = {
    "inkling_small": Size(
        42, (5, 11, 17, 23, 29, 35, 41), 2, 16_384, 4_096, 32, 8, 256, 2_048, 201_024,
        263.72, 12.07, [SINGLE] * 6 + [(6, 6)],
    ),
    "interaction_276b": Size(
        44, (7, 13, 19, 25, 31, 37, 43), 2, 16_384, 4_096, 32, 8, 256, 2_048, 201_024,
        276.8, 12.56, [SINGLE] * 2 + [(6, 7)],
    ),
    "interaction_30b": Size(
        36, (5, 11, 17, 23, 29, 35), 2, 8_192, 2_048, 16, 4, 128, 1_024, 131_072,
        28.9, 2.8, [SINGLE] * 6 + [(6, 5)],
    ),
    "interaction_1b": Size(
        12, (6, 11), 1, 4_096, 1_024, 8, 2, 64, 512, 65_536,
        1.36, 0.355, [SINGLE] * 2 + [(5, 2)],
    ),
}  # fmt: skip


def experiment_of(name: str) -> Experiment:
    return from_config_dict(importlib.import_module(f"experiments.{name}").get_config())


def layer_count(size: Size, layer: int, experts_counted: int) -> int:
    """Parameters of one layer, by the mathematics of the family (heads of 128, bias of rank 16, 4 taps, 2 shared)."""
    d, q, kv = size.width, 128 * size.heads, 128 * size.kv_heads
    extent = 1_024 if layer in size.global_layers else 512
    attention = 2 * d * q + 2 * d * kv + 16 * size.heads * d + 16 * extent + 2 * 128 + 4 * kv + 4 * kv
    around = 2 * d + 2 * 4 * d
    if layer < size.dense_layers:
        return attention + around + 3 * d * size.dense_width + 1
    experts = 3 * d * size.expert_width * (experts_counted + 2)
    return attention + around + experts + d * (size.experts + 2) + size.experts + 1


def tower_count(size: Size) -> int:
    """The hMLP tower: four folds with a norm each."""
    folds = (75 * 128, 512 * 320, 5_120 * 4_800, 9_600 * size.width)
    return sum(folds) + 128 + 320 + 4_800 + size.width


@pytest.mark.parametrize("name", SIZES)
def test_counts_are_exact(name: str):
    size, model = SIZES[name], experiment_of(name).model
    d, tables = size.width, size.width * (size.vocabulary + 80 * 16)
    rest = d * size.vocabulary + d + 2 * d  # unembedding, the last norm, the norms of two embeddings
    total = sum(layer_count(size, layer, size.experts) for layer in range(size.layers)) + rest
    used = sum(layer_count(size, layer, 6) for layer in range(size.layers)) + rest
    whole = param_table(transformer.specs(model), model)[-1]
    assert whole.total == count_params(transformer.specs(model)) == total + tables + tower_count(size)
    assert whole.active == used + tables + tower_count(size)
    assert whole.multiplied == used
    assert whole.total / 1e9 == pytest.approx(size.published, rel=2e-3)
    assert whole.active / 1e9 == pytest.approx(size.published_active, rel=2e-3)


def test_published_blocks_ahead_are_counted():
    """265.96 B with 8 blocks, of which 1 and 3 are global (backbone.md); presets have none."""
    assert all(experiment_of(name).model.mtp.num_blocks == 0 for name in SIZES)
    size, preset = SIZES["inkling_small"], experiment_of("inkling_small").model
    model = dataclasses.replace(preset, mtp=MtpConfig(num_blocks=8, global_blocks=(1, 3), chain=MtpChain.RAW))
    d = size.width
    # A layer of the kind that is dense, with the extent of its attention; two norms, and the projection of both halves.
    as_layers = size._replace(global_layers=(1, 3), dense_layers=8)
    blocks = sum(layer_count(as_layers, block, 0) for block in range(8)) + 8 * (2 * d + 2 * d * d)
    before, after = (param_table(transformer.specs(each), each)[-1] for each in (preset, model))
    assert (after.total - before.total, after.active - before.active) == (blocks, blocks)
    assert after.multiplied - before.multiplied == blocks
    assert after.total == 263_724_526_634 + blocks
    assert after.total / 1e9 == pytest.approx(265.96, abs=5e-3)
    normed = dataclasses.replace(model, mtp=dataclasses.replace(model.mtp, chain=MtpChain.NORMED))
    assert count_params(transformer.specs(normed)) == after.total + d


@pytest.mark.parametrize("name", SIZES)
def test_layers_repeat_in_groups(name: str):
    size, stages = SIZES[name], transformer.layer_stages(experiment_of(name).model)
    assert [(len(stage.kinds), stage.repeats) for stage in stages] == size.groups
    for kinds, _ in stages[size.dense_layers :]:
        assert not any(kind.is_dense for kind in kinds)
    *sliding, last = stages[-1].kinds
    assert last.is_global
    assert not any(kind.is_global for kind in sliding)


def test_the_pod_preset_trains_as_it_is_compared():
    experiment = experiment_of("interaction_276b")
    assert (experiment.data.rows_per_batch, experiment.data.row_slots) == (2_048, 4_096)
    assert experiment.train.grad_accum_steps == 1
    assert experiment.optim.optimizer is Optimizer.ADAMW
    assert experiment.model.compute_dtype is ComputeDtype.BFLOAT16
    assert experiment.model.remat is not Remat.NONE


@pytest.mark.parametrize("pod", interaction_276b.PODS)
def test_every_pod_trains_the_same_model_on_whole_parts(pod: str):
    there, here = from_config_dict(interaction_276b.get_config(pod)), experiment_of("interaction_276b")
    settings = {
        "remat": here.model.remat,
        "attention": dataclasses.replace(there.model.attention, backend=here.model.attention.backend),
        "moe": dataclasses.replace(there.model.moe, backend=here.model.moe.backend),
    }
    assert dataclasses.replace(there.model, **settings) == here.model
    assert there.data.rows_per_batch % (there.mesh.replica * there.mesh.fsdp * there.mesh.expert) == 0
    assert there.optim == here.optim


def test_a_pod_without_settings_is_an_error_that_names_those_with():
    with pytest.raises(ValueError, match="v5p, v5p_long, v5p_slices, v6e, tpu7x, h100"):
        interaction_276b.get_config("v4")


@pytest.mark.parametrize("name", SIZES)
def test_devices_that_serve_a_preset_can_share_it(name: str) -> None:
    experiment = experiment_of(name)
    model, tensor = experiment.model, experiment.stream.tensor
    sizes = (model.attention.num_kv_heads, model.attention.num_heads, model.moe.expert_dim, model.dense_dim)
    assert [size % tensor for size in (*sizes, model.vocab_size)] == [0] * 5
    # One key head a device.
    assert tensor == model.attention.num_kv_heads
