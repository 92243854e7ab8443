"""Inkling as `transformers` has it: random networks of any of our models, their tensors, inputs and logits."""

import math
import tempfile
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
import torch
from tiny import tiny_model
from transformers.models.inkling import configuration_inkling, modeling_inkling

from tml.batch import Batch, empty_rows
from tml.codec.video import CLIP_MEAN, CLIP_STD
from tml.config import ModelConfig, MtpChain, VideoConfig
from tml.export import inkling_layout
from tml.export.tensor_folder import SINGLE
from tml.microturn import Kind
from tml.model import transformer
from tml.params import map_specs, spec_leaves

NUM_SLOTS, NUM_TILES = 40, 3
AUDIO_TOKEN, IMAGE_TOKEN = 38, 39
"""Placeholders, in the padding of the vocabulary, as the logits never name them."""


def inkling_model(**changes) -> ModelConfig:
    """A tiny model whose image tower has the widths that an Inkling of tiles of 4 pixels has."""
    video = VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(64, 64), max_tiles_per_turn=1)
    return tiny_model(**{"unpadded_vocab_size": 37, "video": video, **changes})


def oracle_config(model: ModelConfig) -> configuration_inkling.InklingConfig:
    """The config of the same network by `transformers`."""
    attention, moe, mtp = model.attention, model.moe, model.mtp
    text = configuration_inkling.InklingTextConfig(
        vocab_size=model.vocab_size,
        unpadded_vocab_size=model.unpadded_vocab_size or None,
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
        log_scaling_n_floor=attention.log_scaling_floor if attention.log_scaling_rate else None,
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
        num_mtp_layers=mtp.num_blocks or None,
        mtp_local_layer_ids=[block for block in range(mtp.num_blocks) if block not in mtp.global_blocks] or None,
        chain_hidden_post_norm=bool(mtp.num_blocks) and mtp.chain is MtpChain.NORMED,
    )
    audio = configuration_inkling.InklingAudioConfig(
        n_mel_bins=model.audio.num_mels, mel_vocab_size=model.audio.num_levels
    )
    vision = configuration_inkling.InklingVisionConfig(
        patch_size=model.video.tile_px,
        temporal_patch_size=model.video.frames_per_tile,
        num_hidden_layers=len(model.video.fold_px) + 1,
    )
    return configuration_inkling.InklingConfig(
        text_config=text,
        audio_config=audio,
        vision_config=vision,
        audio_token_id=AUDIO_TOKEN,
        image_token_id=IMAGE_TOKEN,
    )


def oracle_of(model: ModelConfig) -> modeling_inkling.InklingForConditionalGeneration:
    """The same network by `transformers`, with random values in every parameter and buffer."""
    config = oracle_config(model)
    config._attn_implementation = "eager"
    oracle = modeling_inkling.InklingForConditionalGeneration(config).eval()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in oracle.state_dict().items():
            noise = torch.randn(values.shape, generator=drawn)
            width = values.shape[-1] if values.ndim > 1 and "conv1d" not in name and "embed" not in name else 4
            values.copy_(values.clone().fill_(float("norm" in name or "scale" in name)) + noise / width**0.5)
    return oracle


def drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Around 1 for norms and scales, and such that a matrix keeps lengths."""
    return rng.standard_normal(shape) / math.sqrt(shape[-1]) + (len(shape) == 1)


def drawn_folder(model: ModelConfig, folder: Path, dtypes: dict[str, np.dtype] | None = None) -> Path:
    """A checkpoint with random tensors, without making the network."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {
        tensor.name: drawn(rng, tensor.shape).astype((dtypes or {}).get(tensor.name, np.float32))
        for tensor in inkling_layout.tensors(model)
    }
    safetensors.numpy.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(oracle_config(model).to_json_string())
    return folder


def tensors_of(oracle: modeling_inkling.InklingForConditionalGeneration) -> dict[str, np.ndarray]:
    """Its tensors as `transformers` publishes them."""
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        return safetensors.numpy.load_file(f"{folder}/model.safetensors")


def tree_of(tensors: dict[str, np.ndarray], model: ModelConfig) -> dict:
    """All of our parameters; every step is linear, so that it maps gradients as it maps weights."""
    specs = transformer.specs(model)
    ours = {path: np.full(spec.shape, np.nan, np.float32) for path, spec in spec_leaves(specs)}
    layout = inkling_layout.tensors(model)
    assert {tensor.name: tensor.shape for tensor in layout} == {name: x.shape for name, x in tensors.items()}
    for tensor in layout:
        for part in tensor.parts:
            ours[part.path][part.index] = part.to_ours(tensors[tensor.name][tensor.rows(part)])
    return jax.tree.unflatten(jax.tree.structure(map_specs(lambda spec: 0, specs)), ours.values())


def inputs_of(model: ModelConfig, kinds: tuple[Kind, ...]) -> Batch:
    """One row of positions of these kinds, mixed."""
    rng = np.random.default_rng(1)
    batch = empty_rows(1, NUM_SLOTS, NUM_TILES, model)
    drawn = rng.choice([Kind.TOKEN, Kind.AUDIO] if Kind.AUDIO in kinds else [Kind.TOKEN], NUM_SLOTS)
    tiles = np.array([5, 17, 30]) if Kind.TILE in kinds else np.array([], int)
    drawn[tiles] = Kind.TILE
    batch.kinds_BS[0] = drawn
    batch.tokens_BS[0] = np.select(
        [drawn == Kind.AUDIO, drawn == Kind.TILE],
        [AUDIO_TOKEN, IMAGE_TOKEN],
        rng.integers(0, model.num_logits, NUM_SLOTS),
    )
    batch.levels_BSM[:] = rng.integers(0, model.audio.num_levels, batch.levels_BSM.shape)
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
