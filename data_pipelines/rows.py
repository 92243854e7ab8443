"""Rows: laid-out parts of records put into the arrays of a batch."""

import numpy as np

from data_pipelines.encoded import Media
from data_pipelines.laid_out import LaidOut, PartTable
from tml.batch import Batch, empty_rows, max_own_per_row, max_tiles_per_row
from tml.codec.audio import silence_frame
from tml.codec.own_sound import silent_position
from tml.config import Experiment, LossConfig
from tml.microturn import Kind, Layout, Target


def loss_weight_table(loss: LossConfig) -> np.ndarray:
    """The weight of the cross entropy of each `Target` (float32 [8]); a mel has none."""
    table = np.zeros(len(Target), np.float32)
    table[Target.LISTEN] = loss.listen_weight
    table[Target.SPEAK] = loss.speak_weight
    table[Target.TEXT] = loss.text_weight
    table[Target.ACTION] = loss.action_weight
    table[Target.DOCUMENT] = loss.document_weight
    table[Target.HEARD] = loss.heard_weight
    return table


class RowWriter:
    """Puts parts into rows, one beside the other."""

    def __init__(self, experiment: Experiment, layout: Layout) -> None:
        self._row_slots, self._model = experiment.data.row_slots, experiment.model
        self._num_tiles = max_tiles_per_row(layout, self._row_slots)
        self._num_own = max_own_per_row(layout, self._row_slots) if self._model.has_voice else 0
        self._own_per_turn = layout.own_positions_per_turn
        self._silent_Y = silent_position(self._model.audio_out)
        self._seed = experiment.seed
        self._loss_weights = loss_weight_table(experiment.loss)
        self._silence_M = silence_frame(experiment.model.audio)
        self._order_S = np.arange(self._row_slots, dtype=np.int32)

    def empty(self, num_rows: int) -> Batch:
        """Rows of padding."""
        return empty_rows(num_rows, self._row_slots, self._num_tiles, self._model, self._num_own)

    def put_seeds(self, batch: Batch, row: int, position: int) -> None:
        """Seeds the draws of a row of own audio by its place in the endless sequence of rows."""
        if batch.own is not None:
            drawn = np.random.default_rng([self._seed, position])
            batch.own.seeds_BP[row] = drawn.integers(0, 2**32, self._num_own, np.uint32)

    def put(self, batch: Batch, row: int, number: int, place: int, laid_out: LaidOut, part: int) -> None:
        """Puts a part at `place` of a row, as the row's segment `number`, without its sound and pictures."""
        begin, slots = int(laid_out.parts.begin[part]), int(laid_out.parts.slots[part])
        here, there = slice(place, place + slots), slice(begin, begin + slots)
        target_kinds = laid_out.target_kinds[there]
        batch.tokens_BS[row, here] = laid_out.tokens[there]
        batch.kinds_BS[row, here] = laid_out.kinds[there]
        batch.segment_ids_BS[row, here] = number
        batch.positions_BS[row, here] = self._order_S[:slots]
        batch.targets_BS[row, here] = laid_out.targets[there]
        batch.target_kinds_BS[row, here] = target_kinds
        batch.loss_weights_BS[row, here] = self._loss_weights[target_kinds]

    def put_media(
        self, batch: Batch, row: int, place: int, num_tiles: int, media: Media, parts: PartTable, part: int
    ) -> int:
        """Copies the sound and the tiles of a part of a session; returns the row's number of tiles with them.

        Raises:
            ValueError: the model has a voice, and the session was encoded without own audio.
        """
        kinds = batch.kinds_BS[row, place : place + int(parts.slots[part])]
        audio = np.flatnonzero(kinds == Kind.AUDIO.value)
        if len(audio):
            # Frames are consecutive; those past the session's end, in its last turn, are silence.
            first_frame = int(parts.first_frame[part])
            frames = media.levels_TM[first_frame : first_frame + len(audio)]
            row_SM = batch.levels_BSM[row]
            audio += place
            row_SM[audio[: len(frames)]] = frames
            if len(frames) < len(audio):
                row_SM[audio[len(frames) :]] = self._silence_M
        if batch.own is not None:
            self._put_own(batch, row, place, kinds, media, int(parts.first_frame[part]))
        if not len(media.tiles_P):
            return num_tiles
        tiles, first_tile = np.flatnonzero(kinds == Kind.TILE.value), int(parts.first_tile[part])
        end = num_tiles + len(tiles)
        batch.tiles_BP[row, num_tiles:end] = media.tiles_P[first_tile : first_tile + len(tiles)]
        batch.tile_index_BS[row, place + tiles] = np.arange(num_tiles, end)
        return end

    def _put_own(self, batch: Batch, row: int, place: int, kinds: np.ndarray, media: Media, first_frame: int) -> None:
        """Adds the own audio of a part behind what the row has already."""
        own = batch.own
        assert own is not None
        here = np.flatnonzero(kinds == Kind.OWN_AUDIO.value)
        if not len(here):
            return
        if media.own_mels_TY is None:
            raise ValueError("a model with a voice needs sessions encoded with own audio; run launch.encode")
        # A turn's own audio is that of the hops of the next one, and its own hops have all come in before it.
        heard = first_frame + np.cumsum(kinds == Kind.AUDIO.value)[here]
        source = heard + np.arange(len(here)) % self._own_per_turn
        first = int(np.count_nonzero(own.places_BP[row]))
        there = slice(first, first + len(here))
        own.places_BP[row, there] = place + here
        known = source < len(media.own_mels_TY)
        mels = own.mels_BPY[row, there]
        mels[known] = media.own_mels_TY[source[known]]
        mels[~known] = self._silent_Y
