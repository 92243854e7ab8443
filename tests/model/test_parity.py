"""The backbone equals `transformers`' Inkling on CPU: logits and every gradient, on text, sound and pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import tiny_model
from transformers.models.inkling import configuration_inkling, modeling_inkling

from tml.batch import Batch, empty_rows
from tml.codec.video import CLIP_MEAN, CLIP_STD
from tml.config import ModelConfig, VideoConfig
from tml.microturn import Kind
from tml.model import embed, transformer
from tml.params import abstract_params

NUM_SLOTS, NUM_TILES = 40, 3
AUDIO_TOKEN, IMAGE_TOKEN = 38, 39
"""Placeholders, in the padding of the vocabulary, as the logits never name them."""

MODEL = tiny_model(
    unpadded_vocab_size=37,
    video=VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(64, 64), max_tiles_per_turn=2),
)
"""Widths of the folds are those that `plan_out_scales` gives for tiles of 4 pixels."""


def oracle_of(model: ModelConfig) -> modeling_inkling.InklingForConditionalGeneration:
    """The same network by `transformers`, with random values in every parameter and buffer."""
    attention, moe = model.attention, model.moe
    text = configuration_inkling.InklingTextConfig(
        vocab_size=model.vocab_size,
        unpadded_vocab_size=model.unpadded_vocab_size,
        hidden_size=model.d_model,
        num_hidden_layers=model.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        swa_num_attention_heads=attention.num_heads,
        swa_num_key_value_heads=attention.num_kv_heads,
        swa_head_dim=attention.head_dim,
        sliding_window_size=attention.window,
        d_rel=attention.rel_rank,
        rel_extent=attention.global_extent,
        log_scaling_n_floor=attention.log_scaling_floor,
        log_scaling_alpha=attention.log_scaling_rate,
        local_layer_ids=[layer for layer in range(model.num_layers) if layer not in model.global_layers],
        conv_kernel_size=model.conv_taps,
        mlp_layer_types=["dense" if layer < model.num_dense_layers else "sparse" for layer in range(model.num_layers)],
        intermediate_size=model.dense_dim,
        moe_intermediate_size=moe.expert_dim,
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.num_experts_per_token,
        n_shared_experts=moe.num_shared_experts,
        route_scale=moe.route_scale,
        logits_mup_width_multiplier=model.mup_width_multiplier,
    )
    audio = configuration_inkling.InklingAudioConfig(
        n_mel_bins=model.audio.num_mels, mel_vocab_size=model.audio.num_levels
    )
    vision = configuration_inkling.InklingVisionConfig(
        patch_size=model.video.tile_px,
        temporal_patch_size=model.video.frames_per_tile,
        num_hidden_layers=len(model.video.fold_px) + 1,
    )
    config = configuration_inkling.InklingConfig(
        text_config=text,
        audio_config=audio,
        vision_config=vision,
        audio_token_id=AUDIO_TOKEN,
        image_token_id=IMAGE_TOKEN,
    )
    config._attn_implementation = "eager"
    oracle = modeling_inkling.InklingForConditionalGeneration(config).eval()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in oracle.state_dict().items():
            noise = torch.randn(values.shape, generator=drawn)
            width = values.shape[-1] if values.ndim > 1 and "conv1d" not in name and "embed" not in name else 4
            values.copy_(values.clone().fill_(float("norm" in name or "scale" in name)) + noise / width**0.5)
    return oracle


def layer_tree(tensors: dict[str, np.ndarray], layer: int, model: ModelConfig) -> dict:
    """One layer of ours, from tensors named as `transformers` names them."""
    attention, moe = model.attention, model.moe
    heads = {"q": (attention.num_heads, attention.head_dim), "r": (attention.num_heads, attention.rel_rank)}
    heads["k"] = heads["v"] = (attention.num_kv_heads, attention.head_dim)

    def named(name: str) -> np.ndarray:
        return tensors[f"model.language_model.layers.{layer}.{name}"]

    def taps(name: str) -> np.ndarray:
        return named(f"{name}.conv1d.weight")[:, 0].T

    attend = {name: named(f"self_attn.{name}_proj.weight").T.reshape(-1, *shape) for name, shape in heads.items()}
    attend |= {f"{name}_conv": taps(f"self_attn.{name}_sconv").reshape(-1, *heads[name]) for name in "kv"}
    attend |= {f"{name}_norm": named(f"self_attn.{name}_norm.weight") for name in "qk"}
    attend["o"] = named("self_attn.o_proj.weight").T.reshape(*heads["q"], -1)
    attend["profiles"] = named("self_attn.rel_logits_proj.proj")
    if layer < model.num_dense_layers:
        gate_up = np.stack([named("mlp.gate_proj.weight").T, named("mlp.up_proj.weight").T], axis=1)
        mlp = {
            "gate_up": gate_up,
            "down": named("mlp.down_proj.weight").T,
            "scale": named("mlp.global_scale").reshape(()),
        }
    else:
        routed = named("mlp.experts.gate_up_proj").reshape(moe.num_experts, 2, moe.expert_dim, -1)
        shared = np.stack([named("mlp.shared_experts.gate_proj"), named("mlp.shared_experts.up_proj")], axis=1)
        mlp = {
            "router": named("mlp.gate.weight")[: moe.num_experts].T,
            "shared_router": named("mlp.gate.weight")[moe.num_experts :].T,
            "router_bias": named("mlp.gate.e_score_correction_bias"),
            "scale": named("mlp.gate.global_scale").reshape(()),
            "gate_up": routed.transpose(0, 3, 1, 2),
            "down": named("mlp.experts.down_proj").swapaxes(1, 2),
            "shared_gate_up": shared.transpose(0, 3, 1, 2),
            "shared_down": named("mlp.shared_experts.down_proj").swapaxes(1, 2),
        }
    return {
        "attention_norm": named("input_layernorm.weight"),
        "attention": attend,
        "attention_conv": taps("attn_sconv"),
        "mlp_norm": named("post_attention_layernorm.weight"),
        "mlp": mlp,
        "mlp_conv": taps("mlp_sconv"),
    }


def tree_of(tensors: dict[str, np.ndarray], model: ModelConfig) -> dict:
    """All of our parameters; every step is linear, so that it maps gradients as it maps weights."""
    video, layer = {}, 0
    last = len(model.video.fold_px)
    for index in range(last + 1):
        tower = f"model.vision_tower.encoder_layers.{index}"
        norm = "model.vision_tower.final_norm.weight" if index == last else f"{tower}.layer_norm.weight"
        video[f"fold_{index}"] = {"matrix": tensors[f"{tower}.projection.weight"].T, "norm": tensors[norm]}
    stages = []
    for stage in transformer.layer_stages(model):
        groups = []
        for _ in range(stage.repeats):
            groups.append([layer_tree(tensors, layer + place, model) for place in range(len(stage.kinds))])
            layer += len(stage.kinds)
        stages.append(jax.tree.map(lambda *leaves: np.stack(leaves), *groups))
    sound = tensors["model.audio_tower.embed_audio_tokens.embed_audio_tokens.weight"]
    return {
        "embed": {
            "tokens": {
                "table": tensors["model.language_model.embed_tokens.weight"],
                "norm": tensors["model.language_model.embed_tokens.embed_norm.weight"],
            },
            "audio": {
                "table": sound.reshape(model.audio.num_mels, model.audio.num_levels, -1),
                "norm": tensors["model.audio_tower.norm.weight"],
            },
            "video": video,
        },
        "stages": stages,
        "norm": tensors["model.language_model.norm.weight"],
        "unembed": tensors["lm_head.weight"].T,
    }


def inputs_of(kinds: tuple[Kind, ...]) -> Batch:
    """One row of positions of these kinds, mixed."""
    rng = np.random.default_rng(1)
    batch = empty_rows(1, NUM_SLOTS, NUM_TILES, MODEL)
    drawn = rng.choice([Kind.TOKEN, Kind.AUDIO] if Kind.AUDIO in kinds else [Kind.TOKEN], NUM_SLOTS)
    tiles = np.array([5, 17, 30]) if Kind.TILE in kinds else np.array([], int)
    drawn[tiles] = Kind.TILE
    batch.kinds_BS[0] = drawn
    batch.tokens_BS[0] = np.select(
        [drawn == Kind.AUDIO, drawn == Kind.TILE], [AUDIO_TOKEN, IMAGE_TOKEN], rng.integers(0, 37, NUM_SLOTS)
    )
    batch.levels_BSM[:] = rng.integers(0, MODEL.audio.num_levels, batch.levels_BSM.shape)
    batch.tiles_BP[:] = rng.integers(-1, 256, batch.tiles_BP.shape)
    batch.tile_index_BS[0, tiles] = np.arange(len(tiles))
    batch.segment_ids_BS[:] = 1
    batch.positions_BS[:] = np.arange(NUM_SLOTS)
    return batch


def oracle_logits(oracle: modeling_inkling.InklingForConditionalGeneration, batch: Batch) -> torch.Tensor:
    inputs = {"input_ids": torch.from_numpy(batch.tokens_BS.astype(np.int64))}
    audio = batch.kinds_BS == Kind.AUDIO
    if audio.any():
        inputs["audio_input_ids"] = torch.from_numpy(batch.levels_BSM[audio][None].astype(np.int64))
    if (batch.kinds_BS == Kind.TILE).any():
        pixels = (batch.tiles_BP[0] / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
        inputs["pixel_values"] = torch.from_numpy(pixels.astype(np.float32))
    return oracle(**inputs).logits


@functools.cache
def compared() -> tuple[modeling_inkling.InklingForConditionalGeneration, dict]:
    oracle = oracle_of(MODEL)
    params = tree_of({name: values.numpy() for name, values in oracle.state_dict().items()}, MODEL)
    return oracle, jax.tree.map(jnp.array, params)


@functools.cache
def our_logits():
    return jax.jit(lambda params, batch: transformer.apply(params, batch, MODEL).logits_BSV)


def test_the_oracle_has_every_parameter_and_every_kind_of_layer() -> None:
    _, params = compared()
    wanted = jax.tree.map(lambda leaf: leaf.shape, abstract_params(transformer.specs(MODEL)))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == wanted
    assert len(set(transformer.layer_kinds(MODEL))) == 3
    assert MODEL.attention.log_scaling_floor < NUM_SLOTS
    assert max(MODEL.attention.window, MODEL.attention.global_extent) < NUM_SLOTS


@pytest.mark.parametrize(
    "kinds", [(Kind.TOKEN,), (Kind.TOKEN, Kind.AUDIO), (Kind.TOKEN, Kind.AUDIO, Kind.TILE)], ids=len
)
def test_logits_equal(kinds: tuple[Kind, ...]) -> None:
    oracle, params = compared()
    batch = inputs_of(kinds)
    with torch.no_grad():
        wanted = oracle_logits(oracle, batch).numpy()
    ours = np.asarray(our_logits()(params, batch))
    assert ours.shape == wanted.shape == (1, NUM_SLOTS, 37)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def test_every_gradient_equals() -> None:
    oracle, params = compared()
    batch = inputs_of((Kind.TOKEN, Kind.AUDIO, Kind.TILE))
    weights = np.random.default_rng(2).standard_normal((1, NUM_SLOTS, 37)).astype(np.float32) / NUM_SLOTS
    oracle.zero_grad()
    (oracle_logits(oracle, batch) * torch.from_numpy(weights)).sum().backward()
    grads = {name: values.grad for name, values in oracle.named_parameters()}
    buffers = {name: torch.zeros_like(values) for name, values in oracle.named_buffers()}
    wanted = tree_of({name: grad.numpy() for name, grad in {**grads, **buffers}.items()}, MODEL)
    ours = jax.jit(jax.grad(lambda p, b: jnp.sum(transformer.apply(p, b, MODEL).logits_BSV * weights)))(params, batch)
    for (path, our_grad), grad in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(wanted), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        largest = np.abs(grad).max()
        assert largest > 1e-5 or "router_bias" in name, name
        np.testing.assert_allclose(our_grad, grad, rtol=1e-3, atol=1e-4 * max(largest, 1.0), err_msg=name)


def test_rows_of_sound_and_of_pictures_equal() -> None:
    oracle, params = compared()
    batch = inputs_of((Kind.AUDIO, Kind.TILE))
    float32 = jnp.dtype("float32")
    sound = embed.embed_audio(params["embed"]["audio"], jnp.asarray(batch.levels_BSM), MODEL.audio, 1e-6, float32)
    pictures = embed.embed_tiles(params["embed"]["video"], jnp.asarray(batch.tiles_BP), MODEL.video, 1e-6, float32)
    pixels = (batch.tiles_BP[0] / 255.0 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    with torch.no_grad():
        wanted = oracle.model.audio_tower(torch.from_numpy(batch.levels_BSM.astype(np.int64))).last_hidden_state
        seen = oracle.model.vision_tower(torch.from_numpy(pixels.astype(np.float32))).last_hidden_state
    np.testing.assert_allclose(sound, wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(pictures[0], seen.numpy()[:, 0], atol=1e-5)
