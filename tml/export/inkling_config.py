"""Inkling's config.json and our ModelConfig, both ways; what a config.json says that we cannot be is refused.

Two spellings are read: that of the published checkpoints (`dense_intermediate_size`, `dense_mlp_idx`,
`sconv_kernel_size`, `mtp_config`) and that which transformers writes (`moe_intermediate_size`,
`mlp_layer_types`, `conv_kernel_size`, `num_mtp_layers`). The published one is written.
"""

from collections.abc import Mapping
from typing import Any

from tml.config import ModelConfig, MtpChain, to_mapping
from tml.config.tree import from_mapping
from tml.export import tile_folds

Json = Mapping[str, Any]

SECTIONS = ("text_config", "audio_config", "vision_config", "mtp_config")
ARCHITECTURE, MODEL_TYPE = "InklingForConditionalGeneration", "inkling_mm_model"

DIRECT: dict[str, dict[str, str]] = {
    "text_config": {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "vocab_size": "vocab_size",
        "num_attention_heads": "attention.num_heads",
        "num_key_value_heads": "attention.num_kv_heads",
        "head_dim": "attention.head_dim",
        "sliding_window_size": "attention.window",
        "rel_extent": "attention.global_extent",
        "d_rel": "attention.rel_rank",
        "log_scaling_n_floor": "attention.log_scaling_floor",
        "log_scaling_alpha": "attention.log_scaling_rate",
        "sconv_kernel_size": "conv_taps",
        "logits_mup_width_multiplier": "mup_width_multiplier",
        "dense_mlp_idx": "num_dense_layers",
        "dense_intermediate_size": "dense_dim",
        "intermediate_size": "moe.expert_dim",
        "n_routed_experts": "moe.num_experts",
        "num_experts_per_tok": "moe.num_experts_per_token",
        "n_shared_experts": "moe.num_shared_experts",
        "route_scale": "moe.route_scale",
        "rms_norm_eps": "norm_eps",
    },
    "audio_config": {"n_mel_bins": "audio.num_mels", "mel_vocab_size": "audio.num_levels"},
    "vision_config": {"patch_size": "video.tile_px", "temporal_patch_size": "video.frames_per_tile"},
}
"""Keys whose value is one of our fields."""

NORM_EPS = 1e-6
"""The towers' norms have this whatever config.json says, so we can have no other in the layers."""

FIXED: dict[str, dict[str, Any]] = {
    "": {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "tie_word_embeddings": False},
    "text_config": {
        "rms_norm_eps": NORM_EPS,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "shared_expert_sink": True,
        "mtp_hidden_states_first": True,
        "tie_word_embeddings": False,
        "use_embed_norm": True,
        "q_bias": False,
        "o_bias": False,
        "use_sconv": True,
        "final_logit_softcapping": None,
        "use_gate_bias": True,
        "gate_activation": "sigmoid",
        "norm_after_topk": True,
        "use_global_scale": True,
        "inference_moe_w13_interleaved": True,
    },
    "audio_config": {"rms_norm_eps": NORM_EPS, "bias": False, "use_audio_norm": True, "audio_mode": "dmel"},
    "vision_config": {
        "rms_norm_eps": NORM_EPS,
        "vision_encoder_type": "hmlp",
        "use_vision_norm": True,
        "n_channels": tile_folds.COLOURS,
    },
    "mtp_config": {},
}
"""Keys that may be there, but only with this value: what it turns on or off is not a choice of ours."""

EQUAL: dict[str, dict[str, str]] = {
    "text_config": {
        "swa_num_attention_heads": "num_attention_heads",
        "swa_num_key_value_heads": "num_key_value_heads",
        "swa_head_dim": "head_dim",
        "v_head_dim": "head_dim",
        "padded_vocab_size": "vocab_size",
    },
    "audio_config": {"decoder_dmodel": "hidden_size"},
    "vision_config": {"decoder_dmodel": "hidden_size"},
}
"""Keys that must have the value of a key of the text config."""

SPECIAL: dict[str, tuple[str, ...]] = {
    "": SECTIONS,
    "text_config": ("unpadded_vocab_size", "local_layer_ids"),
    "audio_config": ("dmel_min_value", "dmel_max_value"),
    "vision_config": ("n_layers",),
    "mtp_config": ("num_nextn_predict_layers", "local_layer_ids", "chain_hidden_post_norm"),
}
"""Keys that are read by a rule of their own."""

FREE: dict[str, tuple[str, ...]] = {
    "": (
        "audio_bos_token_id",
        "audio_token_id",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "image_bos_token_id",
        "image_token_id",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
    ),
    "text_config": (
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "model_max_length",
        "model_type",
        "number_of_conv_states",
        "pad_token_id",
        "rms_norm_eps_moe_gate",
        "torch_dtype",
    ),
    "audio_config": ("dtype", "initializer_range", "model_type", "torch_dtype"),
    "vision_config": ("dtype", "hidden_size", "initializer_range", "model_type", "num_attention_heads", "torch_dtype"),
    "mtp_config": (),
}
"""Keys that say nothing about the network; they are kept for the way back."""

RENAMED: dict[str, dict[str, str]] = {
    "text_config": {"conv_kernel_size": "sconv_kernel_size", "max_position_embeddings": "model_max_length"},
    "audio_config": {"text_hidden_size": "decoder_dmodel"},
    "vision_config": {
        "text_hidden_size": "decoder_dmodel",
        "num_channels": "n_channels",
        "num_hidden_layers": "n_layers",
    },
}
"""What transformers calls otherwise than the published config.json."""

MOVED_TO_MTP = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "mtp_local_layer_ids": "local_layer_ids",
    "chain_hidden_post_norm": "chain_hidden_post_norm",
}
"""What transformers writes into the text config, and the published config.json into `mtp_config`."""


def published(config: Json) -> dict[str, dict[str, Any]]:
    """A config.json by section ("" for its top), in the published spelling.

    Raises:
        ValueError: a section is no group of keys, or two spellings of one thing disagree.
    """
    sections: dict[str, dict[str, Any]] = {"": {key: value for key, value in config.items() if key not in SECTIONS}}
    for name in SECTIONS:
        section = config.get(name) or {}
        if not isinstance(section, Mapping):
            raise ValueError(f"{name} = {section!r} must be a group of keys")
        renamed = RENAMED.get(name, {})
        sections[name] = {renamed.get(str(key), str(key)): value for key, value in section.items()}
    text = sections["text_config"]
    if "moe_intermediate_size" in text and "dense_intermediate_size" not in text:
        text["dense_intermediate_size"] = text.get("intermediate_size")
        text["intermediate_size"] = text.pop("moe_intermediate_size")
    for other, key in MOVED_TO_MTP.items():
        _merge_mtp(sections["mtp_config"], key, other, text.pop(other, None))
    _merge(text, "local_layer_ids", "layer_types", _sliding_layers)
    _merge(text, "dense_mlp_idx", "mlp_layer_types", _dense_layers)
    return sections


def _merge_mtp(mtp: dict[str, Any], key: str, other: str, value: Any) -> None:
    """Adds to the section what the text config has under `other`, if it has anything."""
    if value is None:
        return
    stated = mtp.get(key)
    if stated is not None and stated != value:
        raise ValueError(f"mtp_config.{key} = {stated}, but text_config.{other} = {value}; make them agree")
    mtp[key] = value


def _merge(text: dict[str, Any], key: str, other: str, read: Any) -> None:
    """Replaces the list of kinds `other` by the published `key`."""
    kinds = text.pop(other, None)
    if kinds is None:
        return
    stated, found, num_layers = text.get(key), read(kinds), text.get("num_hidden_layers")
    if len(kinds) != num_layers:
        raise ValueError(f"text_config.{other} names {len(kinds)} kinds, but num_hidden_layers = {num_layers}")
    if stated is not None and stated != found:
        raise ValueError(f"text_config.{key} = {stated}, but text_config.{other} gives {found}; make them agree")
    text[key] = found


def _sliding_layers(kinds: list[str]) -> list[int]:
    unknown = [kind for kind in kinds if kind not in ("hybrid_sliding", "hybrid")]
    if unknown:
        raise ValueError(f"text_config.layer_types names {unknown[0]!r}, known are 'hybrid_sliding' and 'hybrid'")
    return [layer for layer, kind in enumerate(kinds) if kind == "hybrid_sliding"]


def _dense_layers(kinds: list[str]) -> int:
    first = next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    if any(kind != "sparse" for kind in kinds[first:]):
        raise ValueError(
            f"text_config.mlp_layer_types = {kinds}, but dense layers can only be the first ones, followed by 'sparse'"
        )
    return first


def to_model(config: Json, has_tower: bool, max_tiles_per_turn: int = 1) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        config: config.json.
        has_tower: whether the checkpoint has an image tower.
        max_tiles_per_turn: tiles that one micro-turn may hold, if it has.

    Raises:
        ValueError: a key is missing, is not known, or has a value that this backbone cannot have.
    """
    sections = published(config)
    _refuse_unknown(sections)
    text, audio, vision = (sections[name] for name in SECTIONS[:3])
    model: dict[str, Any] = to_mapping(ModelConfig(global_layers=()))
    has_scaling = text.get("log_scaling_n_floor") is not None
    for section, keys in DIRECT.items():
        if section == "vision_config" and not has_tower:
            continue
        for key, path in keys.items():
            if key == "log_scaling_n_floor" and not has_scaling:
                continue
            if sections[section].get(key) is None:
                raise ValueError(f"config.json lacks {section}.{key}, from which model.{path} follows")
            _set(model, path, sections[section][key])
    if not has_scaling:
        model["attention"]["log_scaling_rate"] = 0.0
    model["unpadded_vocab_size"] = text.get("unpadded_vocab_size") or 0
    model["global_layers"] = _global_layers(text)
    model["mtp"] |= _blocks_ahead(sections["mtp_config"])
    for key, field in (("dmel_min_value", "level_low"), ("dmel_max_value", "level_high")):
        model["audio"][field] = audio.get(key, model["audio"][field])
    if has_tower:
        if vision.get("n_layers") is None:
            raise ValueError("config.json lacks vision_config.n_layers, from which model.video.fold_px follows")
        video = model["video"]
        sizes = video["tile_px"], video["frames_per_tile"], vision["n_layers"]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"config.json: a tile of {sizes[0]!r} px and {sizes[1]!r} frames, folded in {sizes[2]!r} "
                             "layers, is none: vision_config must have whole numbers above 0")  # fmt: skip
        folds = tile_folds.plan(*sizes)
        video["fold_px"], video["fold_dims"] = folds
        video["max_tiles_per_turn"] = max_tiles_per_turn
    found = from_mapping(ModelConfig, model, "model")
    _refuse_foreign(found)
    return found


def from_model(model: ModelConfig, kept: Json) -> dict[str, Any]:
    """The config.json of a model, in the published spelling.

    Args:
        model: the model.
        kept: the config.json it was imported from, whose keys that say nothing about the network
            are taken over; may be empty.

    Raises:
        ValueError: the model is no Inkling: no shared expert, another eps, or folds that no Inkling tower has.
    """
    _refuse_foreign(model)
    ours = to_mapping(model)
    before = published(kept)
    sections: dict[str, dict[str, Any]] = {}
    for name in ("", *SECTIONS):
        free = {key: value for key, value in before[name].items() if key in FREE[name]}
        direct = {key: _get(ours, path) for key, path in DIRECT.get(name, {}).items()}
        sections[name] = {**free, **FIXED[name], **direct}
    text = sections["text_config"]
    for name, keys in EQUAL.items():
        sections[name] |= {key: text[other] for key, other in keys.items() if key != "padded_vocab_size"}
    text["unpadded_vocab_size"] = model.unpadded_vocab_size or None
    text["local_layer_ids"] = [layer for layer in range(model.num_layers) if layer not in model.global_layers]
    if not model.attention.log_scaling_rate:
        text["log_scaling_n_floor"] = None
    sections["audio_config"] |= {"dmel_min_value": model.audio.level_low, "dmel_max_value": model.audio.level_high}
    sections["vision_config"]["n_layers"] = len(model.video.fold_px) + 1
    if model.mtp.num_blocks:
        sections["mtp_config"] |= {
            "num_nextn_predict_layers": model.mtp.num_blocks,
            "local_layer_ids": [block for block in range(model.mtp.num_blocks) if block not in model.mtp.global_blocks],
            "chain_hidden_post_norm": model.mtp.chain is MtpChain.NORMED,
        }
    top = sections.pop("")
    return {**top, **{name: section for name, section in sections.items() if section}}


def _refuse_unknown(sections: Mapping[str, Json]) -> None:
    """Raises ValueError at the first key that is not known, or has a value that this backbone cannot have."""
    if sections[""].get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"config.json has model_type {sections[''].get('model_type')!r}, only {MODEL_TYPE!r} can be imported"
        )
    for name, section in sections.items():
        dotted = f"{name}." if name else ""
        known = (*DIRECT.get(name, ()), *FIXED[name], *EQUAL.get(name, ()), *SPECIAL[name], *FREE[name])
        for key, value in section.items():
            if key not in known:
                raise ValueError(
                    f"config.json has {dotted}{key} = {value!r}, which this import does not know; "
                    f"if it says nothing about the network, remove it from config.json"
                )
            if key in FIXED[name] and value != FIXED[name][key]:
                raise ValueError(
                    f"config.json has {dotted}{key} = {value!r}, but this backbone has {FIXED[name][key]!r} only"
                )
            other = EQUAL.get(name, {}).get(key)
            if other and value != sections["text_config"].get(other):
                raise ValueError(
                    f"config.json has {dotted}{key} = {value!r}, but this backbone has one value for it and for "
                    f"text_config.{other} = {sections['text_config'].get(other)!r}"
                )


def _refuse_foreign(model: ModelConfig) -> None:
    """Raises ValueError if no config.json can describe the model."""
    if not model.moe.num_shared_experts:
        raise ValueError("model.moe.num_shared_experts = 0 is no Inkling: its mixtures have at least 1 shared expert")
    if model.norm_eps != NORM_EPS:
        raise ValueError(f"model.norm_eps = {model.norm_eps} cannot be exported: Inkling's towers have {NORM_EPS} only")
    video = model.video
    if video.max_tiles_per_turn:
        folds = tile_folds.plan(video.tile_px, video.frames_per_tile, len(video.fold_px) + 1)
        if (video.fold_px, video.fold_dims) != folds:
            raise ValueError(
                f"model.video.fold_px = {video.fold_px} and fold_dims = {video.fold_dims} cannot be exported: an "
                f"Inkling tower of as many layers has {folds[0]} and {folds[1]}"
            )


def _global_layers(text: Json) -> tuple[int, ...]:
    """Layers that are not sliding; by default every sixth (transformers `InklingTextConfig`)."""
    num_layers, sliding = text["num_hidden_layers"], text.get("local_layer_ids")
    if sliding is None:
        return tuple(range(5, num_layers, 6))
    outside = [layer for layer in sliding if layer not in range(num_layers)]
    if outside:
        raise ValueError(
            f"config.json has text_config.local_layer_ids = {sliding}, but num_hidden_layers = {num_layers}: there is "
            f"no layer {outside[0]}"
        )
    return tuple(layer for layer in range(num_layers) if layer not in sliding)


def _blocks_ahead(mtp: Json) -> dict[str, Any]:
    """The fields of `model.mtp` that config.json states; by default every block is global (transformers)."""
    num_blocks, sliding = mtp.get("num_nextn_predict_layers") or 0, mtp.get("local_layer_ids") or []
    is_normed = mtp.get("chain_hidden_post_norm", False)
    if not isinstance(num_blocks, int):
        raise ValueError(f"config.json: mtp_config.num_nextn_predict_layers = {num_blocks!r} must be a whole number")
    if not isinstance(is_normed, bool):
        raise ValueError(f"config.json has mtp_config.chain_hidden_post_norm = {is_normed!r}, but it must be a bool")
    outside = [block for block in sliding if block not in range(num_blocks)]
    if outside:
        raise ValueError(
            f"config.json has mtp_config.local_layer_ids = {sliding}, but num_nextn_predict_layers = {num_blocks}: "
            f"there is no block {outside[0]}"
        )
    if not num_blocks:
        return {}
    return {
        "num_blocks": num_blocks,
        "global_blocks": tuple(block for block in range(num_blocks) if block not in sliding),
        "chain": (MtpChain.NORMED if is_normed else MtpChain.RAW).value,
    }


def _set(model: dict[str, Any], path: str, value: Any) -> None:
    *groups, name = path.split(".")
    for group in groups:
        model = model[group]
    model[name] = value


def _get(model: Json, path: str) -> Any:
    for name in path.split("."):
        model = model[name]
    return model
