"""The batch: rows of interleaved micro-turns, every field aligned to positions so that it shards like them."""

import flax.struct
import numpy as np

from tml.config import ModelConfig
from tml.microturn import Layout
from tml.params import Leaf


@flax.struct.dataclass
class OwnAudio:
    """The own audio positions of rows; P of them fit in a row, and those that it has come first, in their order.

    Attributes:
        mels_BPY: their mels (`tml.codec.own_sound`), float16.
        places_BP: the position at which each stands; the one before it predicts it. 0 where there is none.
        seeds_BP: uint32, of the flow head's draws at each of them.
    """

    mels_BPY: Leaf
    places_BP: Leaf
    seeds_BP: Leaf


@flax.struct.dataclass
class Batch:
    """Rows of positions (see `tml.microturn` for what a position is).

    Attributes:
        tokens_BS: token ids, placeholders at audio and tile positions.
        kinds_BS: `microturn.Kind`; 0 is padding.
        levels_BSM: dMel levels, read where the kind is AUDIO.
        tiles_BP: image tiles as pixels 0 to 255, -1 where an edge tile is padded (frames, height, width, colour).
        tile_index_BS: which tile of the row stands at a TILE position.
        segment_ids_BS: 1, 2, … for the segments packed in a row, 0 for padding.
        positions_BS: position within the segment, from 0.
        targets_BS: token to predict.
        target_kinds_BS: `microturn.Target`; 0 where nothing is predicted.
        loss_weights_BS: weight of the target; 0 where nothing is predicted, or a mel.
        own: own audio; None for a model without a voice.
    """

    tokens_BS: Leaf
    kinds_BS: Leaf
    levels_BSM: Leaf
    tiles_BP: Leaf
    tile_index_BS: Leaf
    segment_ids_BS: Leaf
    positions_BS: Leaf
    targets_BS: Leaf
    target_kinds_BS: Leaf
    loss_weights_BS: Leaf
    own: Leaf = None


def max_tiles_per_row(layout: Layout, row_slots: int) -> int:
    """The most tiles that a row can hold: as many turns full of tiles as fit, and one that is partly full."""
    most = layout.max_tiles_per_turn
    least_others = layout.min_slots_in + layout.min_slots_out
    full, rest = divmod(row_slots, least_others + most)
    return full * most + min(most, max(0, rest - least_others))


def max_own_per_row(layout: Layout, row_slots: int) -> int:
    """The most own audio positions that a row can hold: as many speaking turns as fit, and one that is partly there."""
    most = layout.own_positions_per_turn
    # Where slots are fixed, own audio is part of the least.
    least_others = layout.min_slots_in + max(1, layout.min_slots_out - most)
    full, rest = divmod(row_slots, least_others + most)
    return full * most + min(most, max(0, rest - least_others))


def empty_rows(num_rows: int, row_slots: int, num_tiles: int, model: ModelConfig, num_own: int = 0) -> Batch:
    """Rows of padding, as numpy arrays that a loader fills; `num_own` own audio positions fit in a row."""
    video, shape = model.video, (num_rows, row_slots)
    own = None
    if model.has_voice:
        own = OwnAudio(
            mels_BPY=np.zeros((num_rows, num_own, model.audio_out.values_per_position), np.float16),
            places_BP=np.zeros((num_rows, num_own), np.int32),
            seeds_BP=np.zeros((num_rows, num_own), np.uint32),
        )
    return Batch(
        tokens_BS=np.zeros(shape, np.int32),
        kinds_BS=np.zeros(shape, np.uint8),
        levels_BSM=np.zeros((*shape, model.audio.num_mels), np.uint8),
        tiles_BP=np.zeros((num_rows, num_tiles, video.frames_per_tile, video.tile_px, video.tile_px, 3), np.int16),
        tile_index_BS=np.zeros(shape, np.int32),
        segment_ids_BS=np.zeros(shape, np.int32),
        positions_BS=np.zeros(shape, np.int32),
        targets_BS=np.zeros(shape, np.int32),
        target_kinds_BS=np.zeros(shape, np.uint8),
        loss_weights_BS=np.zeros(shape, np.float32),
        own=own,
    )
