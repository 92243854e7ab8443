"""The layout: names and shapes as published, values where the published layout says, and the way back bit for bit."""

import numpy as np
from inkling_oracle import inkling_model
from tiny import tiny_model

from tml.config import AttentionConfig, ModelConfig, MoEConfig, VideoConfig
from tml.export import inkling_layout
from tml.export.inkling_layout import Part

MODEL = inkling_model()
LAYOUT = {tensor.name: tensor for tensor in inkling_layout.tensors(MODEL)}


def drawn(part: Part) -> np.ndarray:
    return np.random.default_rng(len(part.path)).standard_normal(part.spec.shape).astype(np.float32)


def test_every_tensor_comes_back_bit_for_bit() -> None:
    for tensor in LAYOUT.values():
        for part in tensor.parts:
            ours = drawn(part)
            theirs = part.to_theirs(ours)
            assert theirs.shape == part.shape
            np.testing.assert_array_equal(part.to_ours(theirs), ours)


def test_rows_can_be_rearranged_alone_where_both_lead_alike() -> None:
    alike = [part for tensor in LAYOUT.values() for part in tensor.parts if part.leads_alike]
    assert {"stages/1/0/mlp/gate_up", "stages/1/0/mlp/down"} <= {part.path for part in alike}
    for part in alike:
        ours = drawn(part)
        theirs = part.to_theirs(ours)
        for row in range(len(ours)):
            np.testing.assert_array_equal(part.to_ours(theirs[row : row + 1]), ours[row : row + 1])
            np.testing.assert_array_equal(part.to_theirs(ours[row : row + 1]), theirs[row : row + 1])


def part_of(name: str, place: int = 0) -> tuple[Part, np.ndarray]:
    part = LAYOUT[f"model.llm.layers.3.{name}"].parts[place]
    return part, drawn(part)


def test_gate_and_up_alternate() -> None:
    part, ours = part_of("mlp.experts.w13_weight")
    theirs = part.to_theirs(ours)
    for half in range(2):
        for hidden in (0, 5):
            np.testing.assert_array_equal(theirs[1, 2 * hidden + half], ours[1, :, half, hidden])


def test_heads_are_blocks_of_rows() -> None:
    part, ours = part_of("attn.wq_du.weight")
    np.testing.assert_array_equal(part.to_theirs(ours)[1 * 8 + 3], ours[:, 1, 3])
    part, ours = part_of("attn.k_sconv.weight")
    np.testing.assert_array_equal(part.to_theirs(ours)[1 * 8 + 3, 0], ours[:, 1, 3])


def test_routed_experts_come_first_in_the_router() -> None:
    tensor = LAYOUT["model.llm.layers.3.mlp.gate.weight"]
    routed, shared = tensor.parts
    assert (routed.path, shared.path) == ("stages/1/0/mlp/router", "stages/1/0/mlp/shared_router")
    assert (tensor.rows(routed), tensor.rows(shared), tensor.shape) == (slice(0, 4), slice(4, 6), (6, 16))


def test_layers_count_through_the_stages() -> None:
    # Layer 0 is dense; then sliding and global in turn, the first of them numbered 1.
    places = {name: LAYOUT[f"model.llm.layers.{name}.attn_norm.weight"].parts[0] for name in range(5)}
    assert [(part.path.split("/")[1:3], part.index) for part in places.values()] == [
        (["0", "0"], 0),
        (["1", "0"], 0),
        (["1", "1"], 0),
        (["1", "0"], 1),
        (["1", "1"], 1),
    ]
    assert LAYOUT["model.llm.layers.3.attn.rel_logits_proj.proj"].shape == (4, 9)
    assert LAYOUT["model.llm.layers.4.attn.rel_logits_proj.proj"].shape == (4, 11)


def test_a_model_without_eyes_has_no_tower() -> None:
    blind = inkling_layout.names(inkling_model(video=VideoConfig()))
    assert [name for name in LAYOUT if name not in blind] == [name for name in LAYOUT if ".visual." in name]


def published_small() -> ModelConfig:
    """The shape of Inkling-Small, but for the number of its layers."""
    return tiny_model(
        num_layers=6,
        num_dense_layers=2,
        global_layers=(5,),
        d_model=4096,
        dense_dim=16_384,
        vocab_size=201_024,
        attention=AttentionConfig(
            num_heads=32, num_kv_heads=8, head_dim=128, window=512, global_extent=1024, rel_rank=16
        ),
        moe=MoEConfig(num_experts=256, num_experts_per_token=6, num_shared_experts=2, expert_dim=2048),
        video=VideoConfig(),
    )


def test_the_published_shapes() -> None:
    found = {tensor.name: tensor.shape for tensor in inkling_layout.tensors(published_small())}
    wanted = {
        "model.llm.embed.weight": (201_024, 4096),
        "model.llm.unembed.weight": (201_024, 4096),
        "model.llm.layers.1.mlp.w13_dn.weight": (32_768, 4096),
        "model.llm.layers.1.mlp.w2_md.weight": (4096, 16_384),
        "model.llm.layers.1.mlp.global_scale": (1,),
        "model.llm.layers.5.attn.wk_dv.weight": (1024, 4096),
        "model.llm.layers.5.attn.wr_du.weight": (512, 4096),
        "model.llm.layers.5.attn.rel_logits_proj.proj": (16, 1024),
        "model.llm.layers.4.attn.rel_logits_proj.proj": (16, 512),
        "model.llm.layers.4.attn.v_sconv.weight": (1024, 1, 4),
        "model.llm.layers.4.mlp.experts.w13_weight": (256, 4096, 4096),
        "model.llm.layers.4.mlp.experts.w2_weight": (256, 4096, 2048),
        "model.llm.layers.4.mlp.gate.weight": (258, 4096),
        "model.llm.layers.4.mlp.shared_experts.shared_w13_weight": (2, 4096, 4096),
    }
    assert {name: found[name] for name in wanted} == wanted
