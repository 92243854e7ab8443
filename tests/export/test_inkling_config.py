"""config.json both ways: what `transformers` writes and what is published; what we cannot be is refused."""

import copy
import json

import pytest
from inkling_oracle import inkling_model, oracle_config
from transformers.models.inkling.configuration_inkling import InklingConfig

from tml.config import AttentionConfig, ModelConfig, MoEConfig, MtpChain, MtpConfig, VideoConfig
from tml.export import inkling_config

MODEL = inkling_model()

PUBLISHED = {
    "architectures": ["InklingForConditionalGeneration"],
    "model_type": "inkling_mm_model",
    "eos_token_id": 200_006,
    "text_config": {
        "model_max_length": 1_048_576,
        "torch_dtype": "bfloat16",
        "hidden_size": 4096,
        "num_hidden_layers": 42,
        "vocab_size": 201_024,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "d_rel": 16,
        "rel_extent": 1024,
        "q_bias": False,
        "o_bias": False,
        "log_scaling_n_floor": 128_000,
        "log_scaling_alpha": 0.1,
        "rms_norm_eps": 1e-6,
        "use_embed_norm": True,
        "local_layer_ids": [layer for layer in range(42) if layer % 6 != 5],
        "dense_mlp_idx": 2,
        "use_sconv": True,
        "sconv_kernel_size": 4,
        "unpadded_vocab_size": 200_058,
        "logits_mup_width_multiplier": 16.0,
        "final_logit_softcapping": None,
        "swa_head_dim": 128,
        "swa_num_attention_heads": 32,
        "swa_num_key_value_heads": 8,
        "sliding_window_size": 512,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "shared_expert_sink": True,
        "dense_intermediate_size": 16_384,
        "intermediate_size": 2048,
        "route_scale": 8.0,
        "use_gate_bias": True,
        "gate_activation": "sigmoid",
        "norm_after_topk": True,
        "use_global_scale": True,
    },
    "audio_config": {
        "decoder_dmodel": 4096,
        "n_mel_bins": 80,
        "mel_vocab_size": 16,
        "bias": False,
        "dmel_min_value": -7.0,
        "dmel_max_value": 2.0,
        "use_audio_norm": True,
        "audio_mode": "dmel",
    },
    "vision_config": {
        "vision_encoder_type": "hmlp",
        "decoder_dmodel": 4096,
        "patch_size": 40,
        "temporal_patch_size": 2,
        "n_channels": 3,
        "n_layers": 4,
        "use_vision_norm": True,
    },
    "mtp_config": {
        "num_nextn_predict_layers": 8,
        "local_layer_ids": [0, 2, 4, 5, 6, 7],
        "chain_hidden_post_norm": False,
    },
}
"""Inkling-Small's, as published."""


def saved(model: ModelConfig) -> dict:
    """What transformers writes for a model."""
    return json.loads(oracle_config(model).to_json_string())


def changed(config: dict, path: str, value: object) -> dict:
    config = copy.deepcopy(config)
    *groups, key = path.split(".")
    place = config
    for group in groups:
        place = place[group]
    if value is KeyError:
        del place[key]
    else:
        place[key] = value
    return config


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        inkling_model(num_dense_layers=0, global_layers=()),
        inkling_model(num_dense_layers=5, global_layers=tuple(range(5))),
        inkling_model(unpadded_vocab_size=0),
        inkling_model(attention=AttentionConfig(log_scaling_rate=0.0)),
        inkling_model(video=VideoConfig(tile_px=40, fold_px=(5, 2, 4), fold_dims=(128, 320, 4_800))),
        inkling_model(mtp=MtpConfig(num_blocks=3, global_blocks=(1,))),
        inkling_model(mtp=MtpConfig(num_blocks=2, global_blocks=(0, 1), chain=MtpChain.RAW)),
    ],
    ids=["all", "sparse", "dense", "no padding", "no log-length scaling", "no eyes", "blocks ahead", "global ahead"],
)
def test_transformers_config_comes_back(model: ModelConfig) -> None:
    has_tower = bool(model.video.max_tiles_per_turn)
    # What is not the network's (sizes of blocks, the layout of a turn) is not in config.json.
    network = ModelConfig.__dataclass_fields__.keys() - {"moe"}
    for config in (saved(model), inkling_config.from_model(model, {}), inkling_config.from_model(model, saved(model))):
        found = inkling_config.to_model(config, has_tower)
        assert {name: getattr(found, name) for name in network} == {name: getattr(model, name) for name in network}
        assert found.moe.expert_dim == model.moe.expert_dim
        assert found.moe.route_scale == model.moe.route_scale


def test_transformers_reads_ours_as_its_own() -> None:
    ours = InklingConfig(**inkling_config.from_model(MODEL, saved(MODEL)))
    for section in ("text_config", "audio_config", "vision_config"):
        wanted = getattr(oracle_config(MODEL), section).to_dict()
        found = getattr(ours, section).to_dict()
        assert {key: found[key] for key in wanted if key != "dtype"} == {
            key: value for key, value in wanted.items() if key != "dtype"
        }
    assert ours.audio_token_id == oracle_config(MODEL).audio_token_id


def test_the_published_small() -> None:
    model = inkling_config.to_model(PUBLISHED, has_tower=True)
    assert (model.d_model, model.dense_dim, model.moe.expert_dim, model.num_dense_layers) == (4096, 16_384, 2048, 2)
    assert model.global_layers == (5, 11, 17, 23, 29, 35, 41)
    assert (model.video.fold_px, model.video.fold_dims) == ((5, 2, 4), (128, 320, 4_800))
    assert model.mtp == MtpConfig(num_blocks=8, global_blocks=(1, 3), chain=MtpChain.RAW)
    back = inkling_config.from_model(model, PUBLISHED)
    assert back["eos_token_id"] == 200_006
    assert back["mtp_config"] == PUBLISHED["mtp_config"]
    for section in ("text_config", "audio_config", "vision_config"):
        assert {key: back[section][key] for key in PUBLISHED[section]} == PUBLISHED[section]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "inkling2", "model_type 'inkling2', only 'inkling_mm_model'"),
        ("auto_map", {"AutoModel": "x.py"}, "has auto_map = .* does not know"),
        ("quantization_config", {"bits": 4}, "has quantization_config = .* does not know"),
        ("text_config.hidden_act", "gelu", "hidden_act = 'gelu', but this backbone has 'silu' only"),
        ("text_config.use_sconv", False, "use_sconv = False, but this backbone has True only"),
        ("text_config.swa_num_key_value_heads", 4, "swa_num_key_value_heads = 4.*text_config.num_key_value_heads = 2"),
        ("text_config.rms_norm_eps", 1e-5, "rms_norm_eps = 1e-05, but this backbone has 1e-06 only"),
        ("text_config.rope_theta", 1e4, "text_config.rope_theta = 10000.0, which this import does not know"),
        ("text_config.route_scale", KeyError, "lacks text_config.route_scale, from which model.moe.route_scale"),
        ("text_config.local_layer_ids", [0, 1], r"local_layer_ids = \[0, 1\], but .* gives \[0, 1, 3\]"),
        ("text_config.mlp_layer_types", ["sparse", "dense"], "dense layers can only be the first ones"),
        ("text_config.layer_types", ["full"], "layer_types names 'full'"),
        ("text_config.layer_types", ["hybrid"], "layer_types names 1 kinds, but num_hidden_layers = 5"),
        ("vision_config.patch_size", 0, "a tile of 0 px and .* is none: vision_config must have whole numbers"),
        ("text_config.route_scale", "16", "model.moe.route_scale = '16' is str"),
        ("vision_config", 3, "vision_config = 3 must be a group of keys"),
        ("vision_config.n_layers", KeyError, "lacks vision_config.n_layers"),
        ("vision_config.n_layers", 1, "an image tower of 1 layers over 2 frames of 4 pixels"),
    ],
)
def test_what_is_not_ours_is_refused_with_both_values(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inkling_config.to_model(changed(saved(MODEL), path, value), has_tower=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_nextn_predict_layers", 5, r"local_layer_ids = \[0, 2, 4, 5, 6, 7\], but .* = 5: there is no block 5"),
        ("num_nextn_predict_layers", 0, r"local_layer_ids = .* = 0: there is no block 0"),
        ("num_nextn_predict_layers", "8", "num_nextn_predict_layers = '8' must be a whole number"),
        ("chain_hidden_post_norm", None, "chain_hidden_post_norm = None, but it must be a bool"),
        ("hidden_states_first", True, "mtp_config.hidden_states_first = True, which this import does not know"),
    ],
)
def test_what_no_blocks_ahead_are_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inkling_config.to_model(changed(PUBLISHED, f"mtp_config.{key}", value), has_tower=True)


def test_sliding_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"local_layer_ids = \[0, 99\], but num_hidden_layers = \d+: there is no layer 99"
    ):
        inkling_config.to_model(changed(PUBLISHED, "text_config.local_layer_ids", [0, 99]), has_tower=True)


def test_both_spellings_of_blocks_ahead_must_agree() -> None:
    same = {"num_mtp_layers": 8, "mtp_local_layer_ids": [0, 2, 4, 5, 6, 7], "chain_hidden_post_norm": False}
    both = {**PUBLISHED, "text_config": {**PUBLISHED["text_config"], **same}}
    assert inkling_config.to_model(both, True) == inkling_config.to_model(PUBLISHED, True)
    with pytest.raises(
        ValueError, match=r"mtp_config.num_nextn_predict_layers = 8, but text_config.num_mtp_layers = 7"
    ):
        inkling_config.to_model(changed(both, "text_config.num_mtp_layers", 7), True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": MoEConfig(num_shared_experts=0)}, "model.moe.num_shared_experts = 0 is no Inkling"),
        ({"norm_eps": 1e-5}, "model.norm_eps = 1e-05 cannot be exported"),
        (
            {"video": VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(6, 10), max_tiles_per_turn=2)},
            r"fold_dims = \(6, 10\) cannot be exported: an Inkling tower of as many layers has .* \(64, 64\)",
        ),
    ],
    ids=["shared", "eps", "folds"],
)
def test_what_no_inkling_is_cannot_be_exported(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inkling_config.from_model(inkling_model(**changes), {})
