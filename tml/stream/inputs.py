"""What comes in during a micro-turn, as arrays of fixed shape; the same layout that made the training rows."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import numpy as np

from tml.codec.audio import pad_frames
from tml.config import ModelConfig
from tml.microturn import EncodedSession, Kind, Layout, Segment, TurnContents
from tml.model.cache import Slots
from tml.params import Leaf

NO_OUTPUT = np.zeros((0, 3), np.int32)


@flax.struct.dataclass
class TurnInputs:
    """The input halves of one micro-turn for B sessions; a leading axis of turns may come before B.

    Attributes:
        tokens_BW: token ids, placeholders at audio and tile positions.
        kinds_BW: `microturn.Kind`.
        levels_BWM: dMel levels.
        tiles_BP: image tiles.
        tile_index_BW: which tile stands at a slot.
        counts_B: valid slots; 0 for an idle session, which then does nothing at all.
    """

    tokens_BW: Leaf
    kinds_BW: Leaf
    levels_BWM: Leaf
    tiles_BP: Leaf
    tile_index_BW: Leaf
    counts_B: Leaf

    def slots(self) -> Slots:
        """The inputs as slots to append."""
        return Slots(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


def session_inputs(layout: Layout, encoded: EncodedSession, model: ModelConfig) -> TurnInputs:
    """The inputs of every turn of a recorded session, for one session: arrays [U, 1, ...].

    Raises:
        SessionError: more text or tiles than the turns can hold.
    """
    contents = dataclasses.replace(layout.contents(encoded), out=NO_OUTPUT)
    levels_TM = pad_frames(encoded.levels_TM, contents.num_turns * layout.clock.frames_per_turn, model.audio)
    return turn_inputs(layout, contents, levels_TM, encoded.tiles_P, model)


def turn_inputs(
    layout: Layout, contents: TurnContents, levels_TM: np.ndarray, tiles_P: np.ndarray, model: ModelConfig
) -> TurnInputs:
    """Lays out the input halves of consecutive turns of one session: arrays [U, 1, ...]."""
    segment = layout.lay_out(contents)
    counts_U = np.diff(segment.turn_starts)
    num_turns, width = contents.num_turns, layout.max_slots_in
    place_UW = segment.turn_starts[:-1, None] + np.arange(width)[None]
    valid_UW = np.arange(width)[None] < counts_U[:, None]
    place_UW = np.where(valid_UW, place_UW, 0)
    kinds_UW = np.where(valid_UW, segment.kinds[place_UW], Kind.PAD)
    levels_UWM = np.zeros((num_turns, width, levels_TM.shape[1]), np.uint8)
    audio_UW = kinds_UW == Kind.AUDIO
    levels_UWM[audio_UW] = levels_TM[segment.source[place_UW[audio_UW]]]
    tiles_UP, tile_index_UW = _tiles(segment, contents, kinds_UW, place_UW, tiles_P, layout, model)
    return TurnInputs(
        tokens_BW=np.where(valid_UW, segment.tokens[place_UW], 0).astype(np.int32)[:, None],
        kinds_BW=kinds_UW.astype(np.uint8)[:, None],
        levels_BWM=levels_UWM[:, None],
        tiles_BP=tiles_UP[:, None],
        tile_index_BW=tile_index_UW[:, None],
        counts_B=counts_U.astype(np.int32)[:, None],
    )


def _tiles(
    segment: Segment,
    contents: TurnContents,
    kinds_UW: np.ndarray,
    place_UW: np.ndarray,
    tiles_P: np.ndarray,
    layout: Layout,
    model: ModelConfig,
) -> tuple[np.ndarray, np.ndarray]:
    video = model.video
    shape = (contents.num_turns, layout.max_tiles_per_turn, video.frames_per_tile, video.tile_px, video.tile_px, 3)
    tiles_UP = np.zeros(shape, np.int16)
    tile_index_UW = np.zeros(kinds_UW.shape, np.int32)
    first_tile_U = np.searchsorted(contents.tile_turns, np.arange(contents.num_turns))
    turn, slot = np.nonzero(kinds_UW == Kind.TILE)
    tile = segment.source[place_UW[turn, slot]]
    tile_index_UW[turn, slot] = tile - first_tile_U[turn]
    tiles_UP[turn, tile_index_UW[turn, slot]] = tiles_P[tile]
    return tiles_UP, tile_index_UW


def join_sessions(sessions: Sequence[TurnInputs], num_turns: int) -> TurnInputs:
    """Puts sessions side by side along B; those that end earlier are idle for the rest of the turns."""

    def join(name: str) -> np.ndarray:
        columns = [getattr(session, name) for session in sessions]
        padded = [np.pad(x, [(0, num_turns - len(x))] + [(0, 0)] * (x.ndim - 1)) for x in columns]
        return np.concatenate(padded, axis=1)

    return TurnInputs(**{f.name: join(f.name) for f in dataclasses.fields(TurnInputs)})
