"""From encoded records to batches: one global row position decides everything.

Row g is a pure function of (experiment, g). Step s holds rows s * rows_per_batch up to
(s + 1) * rows_per_batch, and process p of n reads the p-th n-th of them, so any number of
processes sees the same global batches and a run resumes at any step on any number of hosts.
"""

import bisect
import itertools
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from absl import logging

from data_pipelines.encoded import (
    EncodedDocument,
    EncodedSource,
    Quarantined,
    check_fraction,
    codec_header,
    encoded_directory,
)
from data_pipelines.records import RecordError, RecordKind
from data_pipelines.row_index import MixtureSource, RowIndex, RowIndexes, layout_hash, part_table, segment_of
from tml.batch import Batch, concatenate_rows, empty_rows
from tml.codec.audio import silence_frame
from tml.codec.text import Tokenizer
from tml.config import Boundary, Experiment, LossConfig, SourceConfig
from tml.microturn import Clock, EncodedSession, Kind, Layout, Segment, Target
from tml.session import SessionError

# Sessions longer than a row are wanted again by the rows that follow.
_KEPT_SEGMENTS = 32
_KEPT_EPOCHS = 3


def layout_of(experiment: Experiment, tokenizer: Tokenizer) -> Layout:
    """The micro-turn layout of an experiment."""
    return Layout(
        clock=Clock.of(experiment.turn, experiment.model.audio),
        turn=experiment.turn,
        special=tokenizer.special,
        max_tiles_per_turn=experiment.model.video.max_tiles_per_turn,
    )


def max_tiles_per_row(layout: Layout, row_slots: int) -> int:
    """The most tiles that a row can hold: as many turns full of tiles as fit, and one that is partly full."""
    most = layout.max_tiles_per_turn
    least_others = int(layout.turn.boundary is Boundary.TICK) + layout.clock.frames_per_turn + 1
    full, rest = divmod(row_slots, least_others + most)
    return full * most + min(most, max(0, rest - least_others))


def loss_weight_table(loss: LossConfig) -> np.ndarray:
    """The loss weight of each `Target` (float32 [6])."""
    table = np.zeros(len(Target), np.float32)
    table[Target.LISTEN] = loss.listen_weight
    table[Target.SPEAK] = loss.speak_weight
    table[Target.TEXT] = loss.text_weight
    table[Target.ACTION] = loss.action_weight
    table[Target.DOCUMENT] = loss.document_weight
    return table


def open_source(name: str, source: SourceConfig, experiment: Experiment, tokenizer: Tokenizer) -> MixtureSource:
    """Opens the encoded records of one source and cuts them into parts.

    Raises:
        FileNotFoundError: no data set there, or not encoded with these codecs.
        ValueError: too many unreadable records, or no record at all.
    """
    header = codec_header(RecordKind(source.kind.value), experiment.model, tokenizer.fingerprint())
    records = EncodedSource(encoded_directory(source.path, header), header)
    if not len(records):
        raise ValueError(f"data source {name} at {source.path} holds no records")
    parts = part_table(records, layout_of(experiment, tokenizer), experiment.data.row_slots)
    fraction = experiment.data.max_quarantined_fraction
    check_fraction(list(parts.quarantined), len(records), fraction, f"data source {name}")
    return MixtureSource(name=name, weight=source.weight, records=records, parts=parts)


@dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """What the first screen says about one source."""

    name: str
    num_records: int
    share: float
    """Of the records drawn."""
    num_slots: int
    """Positions of one pass."""
    quarantined: tuple[Quarantined, ...]


class RowLoader:
    """Composes rows of a mixture; any number of threads may ask for any row.

    Attributes:
        sources: the mixture, ordered by name.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        experiment: Experiment,
        tokenizer: Tokenizer,
        *,
        shuffle: bool = True,
    ) -> None:
        """Opens the sources; `shuffle=False` reads each in its own order, one pass an epoch.

        Raises:
            FileNotFoundError: a source is absent or not encoded.
            ValueError: no sources, or too many unreadable records.
        """
        if not sources:
            raise ValueError(f"experiment {experiment.name} names no data sources; set data.sources")
        self.sources = [open_source(name, sources[name], experiment, tokenizer) for name in sorted(sources)]
        self._data, self._model = experiment.data, experiment.model
        self._layout = layout_of(experiment, tokenizer)
        self._num_tiles = max_tiles_per_row(self._layout, self._data.row_slots)
        self._loss_weights = loss_weight_table(experiment.loss)
        self._silence_M = silence_frame(experiment.model.audio)
        self._indexes = RowIndexes(
            self.sources,
            seed=experiment.seed if shuffle else None,
            segments_per_epoch=(
                self._data.segments_per_epoch if shuffle else sum(len(source.records) for source in self.sources)
            ),
            row_slots=self._data.row_slots,
            layout_hash=layout_hash(self._layout, self._data.row_slots),
        )
        self._lock = threading.RLock()
        self._epoch_ends: list[int] = []
        self._epochs: OrderedDict[int, RowIndex] = OrderedDict()
        self._segments: OrderedDict[tuple[int, int], tuple[EncodedSession, Segment]] = OrderedDict()
        self._quarantined: list[dict[int, Quarantined]] = [
            {entry.index: entry for entry in source.parts.quarantined} for source in self.sources
        ]

    @property
    def quarantined(self) -> dict[str, list[Quarantined]]:
        """The records of each source that could not be used so far."""
        return {s.name: list(found.values()) for s, found in zip(self.sources, self._quarantined, strict=True)}

    def summary(self) -> list[SourceSummary]:
        """What the mixture holds."""
        total = sum(source.weight for source in self.sources)
        return [
            SourceSummary(
                name=source.name,
                num_records=len(source.records),
                share=source.weight / total,
                num_slots=int(source.parts.slots.sum()),
                quarantined=tuple(found.values()),
            )
            for source, found in zip(self.sources, self._quarantined, strict=True)
        ]

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows of one epoch of the index."""
        return self._epoch(epoch).num_rows

    def padding_fraction(self, epoch: int = 0) -> float:
        """Share of an epoch's positions that hold nothing."""
        index = self._epoch(epoch)
        return 1.0 - float(index.slots.sum()) / (index.num_rows * self._data.row_slots)

    def row(self, position: int) -> Batch:
        """Row `position` of the endless sequence of rows, as a Batch of one row."""
        index, r = self._locate(position)
        row = empty_rows(1, self._data.row_slots, self._num_tiles, self._model)
        place, num_tiles = 0, 0
        start, end = int(index.row_starts[r]), int(index.row_starts[r + 1])
        for number, part in enumerate(range(start, end), start=1):
            source, record, first, last, slots = (
                int(column[part]) for column in (index.source, index.record, index.first, index.last, index.slots)
            )
            if slots:
                num_tiles += self._fill(row, number, place, num_tiles, source, record, first, last, slots)
                place += slots
        return row

    def _epoch(self, epoch: int) -> RowIndex:
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._indexes.epoch(epoch)
                while len(self._epochs) > _KEPT_EPOCHS:
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]

    def _locate(self, position: int) -> tuple[RowIndex, int]:
        """The index that holds a row, and the row's number in it."""
        with self._lock:
            while not self._epoch_ends or self._epoch_ends[-1] <= position:
                rows = self.rows_in_epoch(len(self._epoch_ends))
                self._epoch_ends.append(rows + (self._epoch_ends[-1] if self._epoch_ends else 0))
            epoch = bisect.bisect_right(self._epoch_ends, position)
            return self._epoch(epoch), position - (self._epoch_ends[epoch - 1] if epoch else 0)

    def _fill(
        self,
        row: Batch,
        number: int,
        place: int,
        tile_place: int,
        source: int,
        record: int,
        first: int,
        last: int,
        slots: int,
    ) -> int:
        """Puts one part into a row at `place`, or leaves padding of its length; returns its number of tiles."""
        try:
            encoded, segment = self._segment(source, record, first, last, slots)
        except (RecordError, SessionError) as error:
            self._quarantine(source, record, error)
            return 0
        if isinstance(encoded, EncodedDocument):
            first, last = 0, slots
        kinds = segment.kinds[first:last]
        target_kinds = segment.target_kinds[first:last]
        here = slice(place, place + slots)
        row.tokens_BS[0, here] = segment.tokens[first:last]
        row.kinds_BS[0, here] = kinds
        row.segment_ids_BS[0, here] = number
        row.positions_BS[0, here] = np.arange(slots)
        row.targets_BS[0, here] = segment.targets[first:last]
        row.target_kinds_BS[0, here] = target_kinds
        row.loss_weights_BS[0, here] = self._loss_weights[target_kinds]
        if isinstance(encoded, EncodedDocument):
            return 0
        audio = np.flatnonzero(kinds == Kind.AUDIO)
        if len(audio):
            self._fill_levels(row.levels_BSM[0], place + audio, segment.source[first + audio], encoded.levels_TM)
        tiles = np.flatnonzero(kinds == Kind.TILE)
        if len(tiles):
            which = slice(tile_place, tile_place + len(tiles))
            row.tiles_BP[0, which] = encoded.tiles_P[segment.source[first + tiles]]
            row.tile_index_BS[0, place + tiles] = np.arange(which.start, which.stop)
        return len(tiles)

    def _fill_levels(self, row_SM: np.ndarray, slots: np.ndarray, frames: np.ndarray, levels_TM: np.ndarray) -> None:
        """Copies consecutive frames of a session; frames past its end, in its last turn, are silence."""
        first, last = int(frames[0]), int(frames[-1]) + 1
        held = max(0, min(last, len(levels_TM)) - first)
        row_SM[slots[:held]] = levels_TM[first : first + held]
        row_SM[slots[held:]] = self._silence_M

    def _segment(
        self, source: int, record: int, first: int, last: int, slots: int
    ) -> tuple[EncodedSession | EncodedDocument, Segment]:
        key = (source, record)
        with self._lock:
            kept = self._segments.get(key)
        if kept is not None:
            return kept
        encoded = self.sources[source].records[record]
        segment = segment_of(encoded, first, last, self._layout)
        if isinstance(encoded, EncodedSession) and segment.num_slots > slots:
            with self._lock:
                self._segments[key] = (encoded, segment)
                while len(self._segments) > _KEPT_SEGMENTS:
                    self._segments.popitem(last=False)
        return encoded, segment

    def _quarantine(self, source: int, record: int, error: Exception) -> None:
        with self._lock:
            found, opened = self._quarantined[source], self.sources[source]
            if record in found:
                return
            entry = Quarantined.of(record, opened.records.records, error)
            found[record] = entry
            entries = sorted(found.values(), key=lambda each: each.index)
        logging.warning(
            "data source %s: %s, record %d is quarantined: %s", opened.name, entry.file, entry.record, entry.reason
        )
        fraction = self._data.max_quarantined_fraction
        check_fraction(entries, len(opened.records), fraction, f"data source {opened.name}")


class _ProcessRows(Sequence[Batch]):
    """The rows that one process reads, from one step on, as a source for Grain."""

    def __init__(self, loader: RowLoader, start_step: int, rows_per_batch: int, index: int, count: int) -> None:
        self._loader, self._start_step, self._rows_per_batch = loader, start_step, rows_per_batch
        self._mine = rows_per_batch // count
        self._offset = index * self._mine

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> Batch:  # type: ignore[override]
        step, row = divmod(k, self._mine)
        return self._loader.row((self._start_step + step) * self._rows_per_batch + self._offset + row)


def process_batches(
    loader: RowLoader, experiment: Experiment, *, start_step: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """The endless batches of one process from `start_step` on, composed ahead by Grain's threads.

    Raises:
        ValueError: the rows do not divide among the processes.
    """
    data = experiment.data
    if data.rows_per_batch % process_count:
        raise ValueError(f"data.rows_per_batch = {data.rows_per_batch} does not divide among {process_count} processes")
    rows = _ProcessRows(loader, start_step, data.rows_per_batch, process_index, process_count)
    options = grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch_rows)
    dataset = grain.MapDataset.source(rows).to_iter_dataset(options)
    return iter(dataset.batch(data.rows_per_batch // process_count, batch_fn=concatenate_rows))


def train_batches(
    experiment: Experiment,
    tokenizer: Tokenizer,
    *,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The training batches of one process: one a step, `rows_per_batch / process_count` rows of numpy arrays.

    Example:
        for batch in train_batches(experiment, tokenizer, start_step=state.step): ...
    """
    loader = RowLoader(experiment.data.sources, experiment, tokenizer)
    return process_batches(
        loader, experiment, start_step=start_step, process_index=process_index, process_count=process_count
    )


def eval_batches(
    experiment: Experiment,
    tokenizer: Tokenizer,
    num_batches: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """The first batches of the held-out sources, each read in its own order; none without such sources.

    There are at most `num_batches`, and no more than one pass fills; the last one is filled up from the next pass.
    """
    if not experiment.data.eval_sources:
        return []
    loader = RowLoader(experiment.data.eval_sources, experiment, tokenizer, shuffle=False)
    needed = -(-loader.rows_in_epoch(0) // experiment.data.rows_per_batch)
    batches = process_batches(
        loader, experiment, start_step=0, process_index=process_index, process_count=process_count
    )
    return list(itertools.islice(batches, min(num_batches, needed)))
