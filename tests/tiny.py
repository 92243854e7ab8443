"""The smallest model, layout and sessions that have every part; shared by tests of the model and of streaming."""

import dataclasses

import numpy as np

from tml.batch import Batch, empty_rows
from tml.config import (
    AttentionConfig,
    AudioConfig,
    AudioOutConfig,
    FlowConfig,
    MicroTurnConfig,
    ModelConfig,
    MoEConfig,
    VideoConfig,
)
from tml.microturn import EncodedSession, EncodedText, Kind, Layout, SpecialTokens, Target
from tml.session import Stream

NUM_SPECIAL = len(dataclasses.fields(SpecialTokens))
VOCABULARY = 40
VOICE = AudioOutConfig(
    frames_per_position=2,
    num_mels=3,
    feedback_levels=5,
    flow=FlowConfig(width=8, num_blocks=2, num_draws=3, num_steps=2, guidance=1.5, condition_dropout=0.2),
)


def tiny_model(**changes) -> ModelConfig:
    defaults = {
        "num_layers": 5,
        "num_dense_layers": 1,
        "global_layers": (2, 4),
        "d_model": 16,
        "dense_dim": 24,
        "vocab_size": VOCABULARY,
        "mup_width_multiplier": 2.0,
        "attention": AttentionConfig(
            num_heads=4, num_kv_heads=2, head_dim=8, window=9, global_extent=11, rel_rank=4, log_scaling_floor=10
        ),
        "moe": MoEConfig(
            num_experts=4, num_experts_per_token=2, num_shared_experts=2, expert_dim=8, route_scale=2.0, block_rows=4
        ),
        "audio": AudioConfig(num_mels=6, num_levels=4),
        "video": VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(6, 10), max_tiles_per_turn=2),
    }
    return ModelConfig(**{**defaults, **changes})


def tiny_layout(model: ModelConfig, **turn) -> Layout:
    limits = {"max_text_in_per_turn": 4, "max_text_out_per_turn": 3, "max_action_per_turn": 4}
    turn_config = MicroTurnConfig(**{**limits, **turn})
    names = [f.name for f in dataclasses.fields(SpecialTokens)]
    special = SpecialTokens(**{name: index for index, name in enumerate(names)})
    return Layout.of(turn_config, model, special)


def tiny_session(model: ModelConfig, num_turns: int, seed: int = 0) -> EncodedSession:
    """A session with something on every stream."""
    rng = np.random.default_rng(seed)
    turn_samples = 3200

    def text(stream: Stream, turn: int, count: int) -> EncodedText:
        tokens = tuple(int(token) for token in rng.integers(NUM_SPECIAL, VOCABULARY, count))
        return EncodedText(stream=stream, start=turn * turn_samples + 5, tokens=tokens)

    texts = [
        text(Stream.SYSTEM, 0, 5),
        text(Stream.USER_TEXT, num_turns // 3, 2),
        text(Stream.OWN_TEXT, num_turns // 2, 4),
        text(Stream.ACTION, num_turns // 2, 2),
        text(Stream.BACKGROUND, num_turns // 2 + 1, 3),
    ]
    video = model.video
    at_once = min(2, video.max_tiles_per_turn)
    tile_turns = np.array([*[1] * at_once, *[num_turns // 2] * (at_once > 0)], int)
    shape = (len(tile_turns), video.frames_per_tile, video.tile_px, video.tile_px, 3)
    own_mels_TY, own_audible_T = None, None
    if model.has_voice:
        own_mels_TY = rng.standard_normal((num_turns * 4, model.audio_out.values_per_position)).astype(np.float16)
        own_audible_T = np.repeat(rng.random(num_turns) < 0.4, 4)
    return EncodedSession(
        session_id=f"tiny-{seed}",
        num_samples=num_turns * turn_samples,
        levels_TM=rng.integers(0, model.audio.num_levels, (num_turns * 4, model.audio.num_mels)).astype(np.uint8),
        texts=tuple(sorted(texts, key=lambda event: event.start)),
        tiles_P=rng.integers(-1, 256, shape).astype(np.int16),
        tile_samples_P=(tile_turns * turn_samples + 7).astype(np.int64),
        own_mels_TY=own_mels_TY,
        own_audible_T=own_audible_T,
    )


def rows_of(model: ModelConfig, layout: Layout, rows: list[list[EncodedSession]], row_slots: int) -> Batch:
    """Packs sessions into rows by hand, so that the loader is not part of what these tests trust."""
    num_tiles = 9 if model.video.max_tiles_per_turn else 0
    batch = empty_rows(len(rows), row_slots, num_tiles, model, row_slots // 2 if model.has_voice else 0)
    for row, sessions in enumerate(rows):
        first, tile, own_first = 0, 0, 0
        for index, encoded in enumerate(sessions):
            segment = layout.lay_out(layout.contents(encoded))
            place = slice(first, first + segment.num_slots)
            batch.tokens_BS[row, place] = segment.tokens
            batch.kinds_BS[row, place] = segment.kinds
            audio = np.flatnonzero(segment.kinds == Kind.AUDIO)
            batch.levels_BSM[row, first + audio] = encoded.levels_TM[segment.source[audio]]
            tiles = np.flatnonzero(segment.kinds == Kind.TILE)
            batch.tile_index_BS[row, first + tiles] = tile + segment.source[tiles]
            batch.tiles_BP[row, tile : tile + len(tiles)] = encoded.tiles_P
            own = np.flatnonzero(segment.kinds == Kind.OWN_AUDIO)
            if batch.own is not None:
                there = slice(own_first, own_first + len(own))
                batch.own.places_BP[row, there] = first + own
                batch.own.mels_BPY[row, there] = encoded.own_mels_TY[segment.source[own]]
                batch.own.seeds_BP[row, there] = np.arange(1, len(own) + 1) * (row + 1)
            batch.segment_ids_BS[row, place] = index + 1
            batch.positions_BS[row, place] = np.arange(segment.num_slots)
            batch.targets_BS[row, place] = segment.targets
            batch.target_kinds_BS[row, place] = segment.target_kinds
            batch.loss_weights_BS[row, place] = (segment.target_kinds > 0) & (segment.target_kinds != Target.AUDIO)
            first, tile, own_first = place.stop, tile + len(tiles), own_first + len(own)
    return batch


def randomised(params, seed: int = 0):
    """Every parameter random, also those that start at zero or one: a dead path cannot pass a comparison."""
    import jax
    import jax.numpy as jnp

    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    noise = [rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    moved = [jnp.asarray(np.asarray(leaf) + 0.3 * n) for leaf, n in zip(leaves, noise, strict=True)]
    return jax.tree.unflatten(tree, moved)
