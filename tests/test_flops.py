"""Counts against independent formulas, and the published sizes."""

import dataclasses

import jax
import pytest

from tml.config import AttentionConfig, AudioConfig, ModelConfig, MoEConfig, MtpConfig
from tml.flops import attention_span, measure_matmul_rate, param_table, param_table_text, row_flops
from tml.model import transformer
from tml.params import count_params

SMALL = ModelConfig(
    num_layers=3,
    num_dense_layers=1,
    global_layers=(2,),
    d_model=32,
    dense_dim=48,
    vocab_size=64,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=16, global_extent=32, rel_rank=4),
    moe=MoEConfig(num_experts=8, num_experts_per_token=2, num_shared_experts=1, expert_dim=16),
    audio=AudioConfig(num_mels=10, num_levels=4),
)


def interaction_276b() -> ModelConfig:
    """The announced size (44 layers; see the sizes of the Inkling family)."""
    return ModelConfig(
        num_layers=44,
        num_dense_layers=2,
        global_layers=(7, 13, 19, 25, 31, 37, 43),
        d_model=4096,
        dense_dim=16_384,
        vocab_size=201_024,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, window=512, global_extent=1024),
        moe=MoEConfig(num_experts=256, num_experts_per_token=6, num_shared_experts=2, expert_dim=2048),
    )


def by_hand(cfg: ModelConfig, experts_counted: int) -> int:
    """Parameters of the layers and the head, written from the mathematics of the backbone."""
    d, a, moe = cfg.d_model, cfg.attention, cfg.moe
    q_width, kv_width = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    total = d * cfg.vocab_size + d
    for layer in range(cfg.num_layers):
        extent = a.global_extent if layer in cfg.global_layers else a.window
        total += d * (2 * q_width + 2 * kv_width + a.num_heads * a.rel_rank) + a.rel_rank * extent
        total += 2 * a.head_dim + cfg.conv_taps * 2 * kv_width  # norms per head, convolutions of k and v
        total += 2 * d + 2 * cfg.conv_taps * d  # two norms, two convolutions after the sub-layers
        if layer < cfg.num_dense_layers:
            total += 3 * d * cfg.dense_dim + 1
        else:
            total += 3 * d * moe.expert_dim * (experts_counted + moe.num_shared_experts)
            total += d * (moe.num_experts + moe.num_shared_experts) + moe.num_experts + 1
    return total


def test_counts_equal_those_by_hand():
    whole = param_table(transformer.specs(SMALL), SMALL)[-1]
    tables = SMALL.d_model * (SMALL.vocab_size + 10 * 4)
    norms = 2 * SMALL.d_model  # of the two embeddings
    assert whole.total == by_hand(SMALL, experts_counted=8) + tables + norms
    assert whole.total == count_params(transformer.specs(SMALL))
    assert whole.active == by_hand(SMALL, experts_counted=2) + tables + norms
    assert whole.multiplied == whole.active - tables


def test_the_announced_size():
    cfg = interaction_276b()
    whole = param_table(transformer.specs(cfg), cfg)[-1]
    assert whole.total == pytest.approx(276.7e9, rel=5e-4)
    assert whole.active == pytest.approx(12.5e9, rel=5e-3)
    assert whole.multiplied == pytest.approx(11.67e9, rel=2e-3)


def test_flops_of_a_row_follow_the_convention():
    slots, heads = 100, SMALL.attention.num_heads * SMALL.attention.head_dim
    spans = 100**2 / 2 + 2 * (100 * 16 - 16**2 / 2)
    multiplied = by_hand(SMALL, experts_counted=2) + 2 * SMALL.d_model
    expected = 6 * multiplied * slots + 12 * heads * spans
    assert row_flops(transformer.specs(SMALL), SMALL, slots) == pytest.approx(expected, rel=1e-9)


def test_blocks_ahead_are_layers_with_the_head_once_more_each():
    cfg = dataclasses.replace(SMALL, mtp=MtpConfig(num_blocks=3, global_blocks=(1,)))
    slots, d, heads = 100, cfg.d_model, 4 * 8
    plain, with_blocks = (row_flops(transformer.specs(each), each, slots) for each in (SMALL, cfg))
    # Three dense layers on top of the three of SMALL differ from none by what they multiply and see.
    layers = dataclasses.replace(SMALL, num_layers=3, num_dense_layers=3, global_layers=(1,))
    multiplied = by_hand(layers, 0) - (d * cfg.vocab_size + d)  # without head and last norm
    multiplied += 3 * (2 * d + 2 * d * d + d * cfg.vocab_size) + d
    spans = 100**2 / 2 + 2 * (100 * 16 - 16**2 / 2)
    assert with_blocks - plain == pytest.approx(6 * multiplied * slots + 12 * heads * spans, rel=1e-9)


def test_span_counts_pairs():
    window, slots = 5, 40
    pairs = sum(min(t + 1, window) for t in range(slots))
    # The formula is the continuous limit: half a pair a query off on the diagonal.
    assert abs(attention_span(slots, window) - pairs) <= slots / 2 + window
    assert attention_span(slots, 64) == attention_span(slots, None) == slots**2 / 2


def test_table_has_a_line_a_place_and_their_sum():
    groups = param_table(transformer.specs(SMALL), SMALL)
    names = [group.name for group in groups]
    assert names[-1] == "all"
    assert {"embed/audio", "embed/tokens", "stages/attention", "stages/mlp", "unembed"} <= set(names)
    assert groups[-1].total == sum(group.total for group in groups[:-1])
    text = param_table_text(groups)
    assert len(text.splitlines()) == len(groups) + 1
    assert f"{groups[-1].total:,}" in text


def test_the_measured_rate_is_that_of_one_device():
    one = measure_matmul_rate(jax.devices()[:1], size=256, seconds=0.1)
    shared = measure_matmul_rate(jax.devices(), size=256, seconds=0.1)
    assert 1e8 < one < 1e14
    # Eight virtual devices share two cores, so each has less than one alone.
    assert shared < one
