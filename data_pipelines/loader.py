"""From encoded records to batches: one global row position decides everything.

Row g is a pure function of (experiment, g). Step s holds rows s * rows_per_batch up to
(s + 1) * rows_per_batch, and part p of n is the p-th of n equal blocks of them: joined in
order they are the global batch, so a run resumes at any step on any number of hosts.
"""

import bisect
import itertools
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import grain
import numpy as np

from data_pipelines.encoded import (
    EncodedSource,
    Media,
    Quarantined,
    check_fraction,
    codec_header,
    encoded_directory,
)
from data_pipelines.laid_out import lay_out_source, layout_hash
from data_pipelines.records import RecordError, RecordKind, read_manifest
from data_pipelines.row_index import MixtureSource, RowIndex, RowIndexes
from data_pipelines.rows import RowWriter
from tml.batch import Batch
from tml.codec.text import Tokenizer
from tml.config import Experiment, SourceConfig, SourceKind
from tml.mesh import ALL_ROWS, RowPart
from tml.microturn import Kind, Layout

# Sessions longer than a row are wanted again by the rows that follow.
_KEPT_SESSIONS = 32
_KEPT_EPOCHS = 3
# Records lost while reading that are shown by name; after them, only their number.
_REPORTED_RECORDS = 10


def encoded_place(source: SourceConfig, experiment: Experiment, tokenizer: Tokenizer) -> Path:
    """Where the encoded records of a source lie.

    Raises:
        FileNotFoundError: no data set there.
        ValueError: it holds another kind of records, or the model's vocabulary is smaller than the tokenizer's.
    """
    found = read_manifest(source.path).kind.value
    if found != source.kind.value:
        raise ValueError(f"{source.path} holds {found}, but its kind in data.sources is {source.kind.value}")
    if tokenizer.vocab_size > experiment.model.num_logits:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {experiment.model.num_logits} logits; "
            f"raise model.vocab_size (and model.unpadded_vocab_size) to {tokenizer.vocab_size} or more"
        )
    header = codec_header(RecordKind(found), experiment.model, tokenizer.fingerprint())
    return encoded_directory(source.path, header)


def open_source(name: str, source: SourceConfig, experiment: Experiment, tokenizer: Tokenizer) -> MixtureSource:
    """Opens the encoded records of one source and lays them out.

    Raises:
        FileNotFoundError: no data set there, or not encoded with these codecs.
        ValueError: too many unreadable records, or no record at all.
    """
    place = encoded_place(source, experiment, tokenizer)
    header = codec_header(RecordKind(source.kind.value), experiment.model, tokenizer.fingerprint())
    records = EncodedSource(place, header)
    if not len(records):
        raise ValueError(f"data source {name} at {source.path} holds no records")
    laid_out = lay_out_source(
        records,
        Layout.of(experiment.turn, experiment.model, tokenizer.special),
        experiment.data.row_slots,
        max_quarantined_fraction=experiment.data.max_quarantined_fraction,
        name=f"data source {name}",
    )
    return MixtureSource(name=name, kind=source.kind, weight=source.weight, records=records, laid_out=laid_out)


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
        self._data, self._shuffle = experiment.data, shuffle
        self._frame_s = experiment.model.audio.hop_samples / experiment.model.audio.sample_rate_hz
        layout = Layout.of(experiment.turn, experiment.model, tokenizer.special)
        self._writer = RowWriter(experiment, layout)
        self._segments_per_epoch = (
            self._data.segments_per_epoch if shuffle else sum(len(source.records) for source in self.sources)
        )
        self._indexes = RowIndexes(
            self.sources,
            seed=experiment.seed if shuffle else None,
            segments_per_epoch=self._segments_per_epoch,
            row_slots=self._data.row_slots,
            layout_hash=layout_hash(layout, self._data.row_slots),
        )
        self._lock = threading.RLock()
        # Threads that compose at once would only fight for the interpreter, so one does while others read.
        self._composing = threading.Lock()
        self._epoch_ends: list[int] = []
        self._epochs: OrderedDict[int, RowIndex] = OrderedDict()
        self._kept: dict[tuple[int, int], Media] = {}
        self._quarantined: list[dict[int, Quarantined]] = [
            {entry.index: entry for entry in source.laid_out.quarantined} for source in self.sources
        ]

    @property
    def quarantined(self) -> dict[str, list[Quarantined]]:
        """The records of each source that could not be used so far."""
        return {s.name: list(found.values()) for s, found in zip(self.sources, self._quarantined, strict=True)}

    def summary_lines(self) -> list[str]:
        """What the mixture holds, for the screen: a line a source, one about the rows, and what is quarantined."""
        shares = [source.weight if self._shuffle else len(source.records) for source in self.sources]
        lines = []
        for source, share, found in zip(self.sources, shares, self._quarantined, strict=True):
            laid_out = source.laid_out
            frames = np.count_nonzero(laid_out.kinds == Kind.AUDIO)
            lines.append(
                f"{source.name}: {share / sum(shares):.0%} of segments; {len(source.records)} records, "
                f"{frames * self._frame_s / 3600:.2f} h of sound, {len(laid_out.tokens)} positions, "
                f"{len(found)} quarantined"
            )
            lines += [f"  {entry.file}, record {entry.record}: {entry.reason}" for entry in list(found.values())[:5]]
        rows, row_slots = self.rows_in_epoch(0), self._data.row_slots
        epoch = f"{rows} rows of {row_slots} for the first {self._segments_per_epoch} segments"
        return [*lines, f"{epoch}, {self.padding_fraction():.1%} padding"]

    def rows_in_epoch(self, epoch: int) -> int:
        """Rows of one epoch of the index."""
        return self._epoch(epoch).num_rows

    def padding_fraction(self, epoch: int = 0) -> float:
        """Share of an epoch's positions that hold nothing."""
        index = self._epoch(epoch)
        return 1.0 - float(index.slots.sum()) / (index.num_rows * self._data.row_slots)

    def rows(self, positions: Sequence[int]) -> Batch:
        """These rows of the endless sequence of rows."""
        batch = self._writer.empty(len(positions))
        for row, position in enumerate(positions):
            index, r = self._locate(position)
            parts = slice(int(index.row_starts[r]), int(index.row_starts[r + 1]))
            columns = (index.source, index.record, index.part, index.slots)
            place, num_tiles = 0, 0
            self._writer.put_seeds(batch, row, position)
            for number, (source, record, part, slots) in enumerate(
                zip(*(column[parts].tolist() for column in columns), strict=True), start=1
            ):
                if slots:
                    num_tiles = self._put(batch, row, number, place, num_tiles, source, record, part)
                    place += slots
        return batch

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

    def _put(
        self, batch: Batch, row: int, number: int, place: int, num_tiles: int, source: int, record: int, part: int
    ) -> int:
        """Puts one part into a row, or leaves padding of its length; returns the row's number of tiles."""
        opened = self.sources[source]
        parts = opened.laid_out.parts
        if opened.kind is SourceKind.DOCUMENTS:
            begin, slots = int(parts.begin[part]), int(parts.slots[part])
            if not np.any(opened.laid_out.kinds[begin : begin + slots] == Kind.TILE):
                self._writer.put(batch, row, number, place, opened.laid_out, part)
                return num_tiles
        media = self._kept.get((source, record))
        try:
            data = b"" if media else opened.records.records[record]
            with self._composing:
                if media is None:
                    media = opened.records.media(record, data)
                    if parts.part_starts[record + 1] - parts.part_starts[record] > 1:
                        self._keep((source, record), media)
                self._writer.put(batch, row, number, place, opened.laid_out, part)
                return self._writer.put_media(batch, row, place, num_tiles, media, parts, part)
        except RecordError as error:
            self._quarantine(source, record, error)
            return num_tiles

    def _keep(self, key: tuple[int, int], media: Media) -> None:
        self._kept[key] = media
        while len(self._kept) > _KEPT_SESSIONS:
            self._kept.pop(next(iter(self._kept)))

    def _quarantine(self, source: int, record: int, error: Exception) -> None:
        with self._lock:
            found, opened = self._quarantined[source], self.sources[source]
            if record in found:
                return
            entry = Quarantined.of(record, opened.records.records, error)
            found[record] = entry
            entries = sorted(found.values(), key=lambda each: each.index)
            num_new = sum(map(len, self._quarantined)) - sum(len(each.laid_out.quarantined) for each in self.sources)
        self._report(opened, entry, num_new)
        fraction = self._data.max_quarantined_fraction
        check_fraction(entries, len(opened.records), fraction, f"data source {opened.name}")

    def _report(self, source: MixtureSource, entry: Quarantined, num_new: int) -> None:
        """Shows the first records that are lost while reading, a line each; then their number as it doubles."""
        if num_new <= _REPORTED_RECORDS:
            where = f"{source.records.directory / entry.file}, record {entry.record}"
            print(f"data source {source.name}: {where} is quarantined: {entry.reason}", file=sys.stderr, flush=True)
        elif num_new.bit_count() == 1:
            print(f"{num_new} records were quarantined while reading so far", file=sys.stderr, flush=True)


class _PartBatches(Sequence[Batch]):
    """The same part of every batch, from one step on, as a source for Grain."""

    def __init__(self, loader: RowLoader, start_step: int, rows_per_batch: int, part: RowPart) -> None:
        self._loader, self._start_step, self._rows_per_batch = loader, start_step, rows_per_batch
        size = rows_per_batch // part.count
        self._mine = range(part.index * size, (part.index + 1) * size)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> Batch:  # type: ignore[override]
        first = (self._start_step + k) * self._rows_per_batch
        return self._loader.rows([first + row for row in self._mine])


def process_batches(
    loader: RowLoader, experiment: Experiment, *, start_step: int, part: RowPart = ALL_ROWS
) -> Iterator[Batch]:
    """The endless batches from `start_step` on, of which a process reads a part, composed ahead by Grain's threads.

    Raises:
        ValueError: the rows do not divide into so many parts.
    """
    data = experiment.data
    if data.rows_per_batch % part.count:
        raise ValueError(f"data.rows_per_batch = {data.rows_per_batch} does not divide into {part.count} parts")
    batches = _PartBatches(loader, start_step, data.rows_per_batch, part)
    ahead = -(-data.prefetch_rows * part.count // data.rows_per_batch)
    options = grain.ReadOptions(num_threads=min(data.read_threads, ahead), prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def eval_batches(
    experiment: Experiment,
    tokenizer: Tokenizer,
    num_batches: int,
    *,
    part: RowPart = ALL_ROWS,
) -> list[Batch]:
    """The first batches of the held-out sources, each read in its own order; none without such sources.

    There are at most `num_batches`, and no more than one pass fills; the last one is filled up from the next pass.
    """
    if not experiment.data.eval_sources:
        return []
    loader = RowLoader(experiment.data.eval_sources, experiment, tokenizer, shuffle=False)
    needed = -(-loader.rows_in_epoch(0) // experiment.data.rows_per_batch)
    batches = process_batches(loader, experiment, start_step=0, part=part)
    return list(itertools.islice(batches, min(num_batches, needed)))
