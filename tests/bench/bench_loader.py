"""Sixty-second sessions per second from encoded records to batches, beside this machine's copy and matmul rates.

Run: python -m tests.bench.bench_loader. The bar is 1,000 per second. Reading, decoding, filling rows and
batching are in it. Laying records out and indexing rows happens once for all epochs; its rate is shown too.
The sessions are made up: noise for levels, and 75 words a minute. Pieces are much longer than what is
composed ahead; the fastest is shown beside the mean, because other work on the machine does not count.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_pipelines.encoded import codec_header, encoded_directory, pack_header, pack_session, write_quarantine
from data_pipelines.loader import RowLoader, process_batches
from data_pipelines.record_writer import UNCOMPRESSED, RecordWriter, commit, stage, write_shard
from data_pipelines.records import RecordKind, shard_name
from tml.codec.text import Tokenizer, train_tokenizer
from tml.config import DataConfig, Experiment, ModelConfig, SourceConfig
from tml.microturn import EncodedSession, EncodedText
from tml.session import Stream

BAR_PER_S = 1_000
SESSIONS = 512
SECONDS = 60
WORDS = 75
ROW_SLOTS = 2_048
PIECE_ROWS = 256
PIECES = 12


def made_up_session(number: int, rng: np.random.Generator, model: ModelConfig) -> EncodedSession:
    """A minute of noise with words of one to three tokens."""
    audio = model.audio
    num_samples = SECONDS * audio.sample_rate_hz
    starts = np.sort(rng.integers(0, num_samples - 5 * audio.sample_rate_hz, WORDS))
    texts = tuple(
        EncodedText(stream=Stream.OWN_TEXT, start=int(start), tokens=tuple(rng.integers(20, 250, size).tolist()))
        for start, size in zip(starts, rng.integers(1, 4, WORDS), strict=True)
    )
    tile = (model.video.frames_per_tile, model.video.tile_px, model.video.tile_px, 3)
    return EncodedSession(
        session_id=str(number),
        num_samples=num_samples,
        levels_TM=rng.integers(0, audio.num_levels, (num_samples // audio.hop_samples, audio.num_mels), dtype=np.uint8),
        texts=texts,
        tiles_P=np.zeros((0, *tile), np.int16),
        tile_samples_P=np.zeros(0, np.int64),
    )


def write_set(root: Path, model: ModelConfig, tokenizer: Tokenizer) -> Path:
    """Encoded records of made-up sessions, below a data set that stands for their source."""
    with RecordWriter(root / "set", kind=RecordKind.SESSIONS, name="made up") as writer:
        writer.write(b"")
    header = codec_header(RecordKind.SESSIONS, model, tokenizer.fingerprint())
    directory = encoded_directory(root / "set", header)
    rng = np.random.default_rng(0)
    records = (pack_session(made_up_session(i, rng, model), pack_header(header)) for i in range(SESSIONS))
    with stage(directory) as staging:
        shard = write_shard(staging / shard_name(0, 1), records, options=UNCOMPRESSED)
        write_quarantine(staging, [])
        meta = {"header": json.dumps(header), "num_quarantined": "0"}
        commit(staging, directory, [shard], kind=RecordKind.ENCODED, name="made up", meta=meta)
    return root / "set"


def fastest_s(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def rates(batches: Iterator[object], rows_per_batch: int) -> list[float]:
    """Rows per second of each piece."""
    found = []
    for _ in range(PIECES):
        start = time.perf_counter()
        for _ in range(PIECE_ROWS // rows_per_batch):
            next(batches)
        found.append(PIECE_ROWS / (time.perf_counter() - start))
    return found


def main() -> None:
    """Prints sessions per second and the machine's copy and matmul rates."""
    model = ModelConfig()
    with tempfile.TemporaryDirectory() as root:
        tokenizer = train_tokenizer(["zero one two three"], 300, Path(root) / "tokenizer")
        source = SourceConfig(path=str(write_set(Path(root), model, tokenizer)))
        data = DataConfig(
            sources={"made_up": source},
            row_slots=ROW_SLOTS,
            rows_per_batch=8,
            segments_per_epoch=SESSIONS,
            read_threads=2,
            prefetch_rows=16,
        )
        experiment = Experiment(name="bench", model=model, data=data)
        start = time.perf_counter()
        loader = RowLoader(data.sources, experiment, tokenizer)
        laid_out_per_s = SESSIONS / (time.perf_counter() - start)
        assert loader.rows_in_epoch(0) == SESSIONS, "one session a row"
        batches = process_batches(loader, experiment, start_step=0)
        next(batches)
        per_s = rates(batches, data.rows_per_batch)
    rng = np.random.default_rng(0)
    a = rng.standard_normal((1_024, 1_024)).astype(np.float32)
    big, other = np.zeros(1 << 26, np.uint8), np.ones(1 << 26, np.uint8)
    copy_s = fastest_s(lambda: np.copyto(big, other), 20)
    matmul_s = fastest_s(lambda: a @ a, 20)
    print(
        f"loader: {max(per_s):.0f} sessions of {SECONDS} s per second in the fastest piece, "
        f"{np.mean(per_s):.0f} on average (bar {BAR_PER_S}); "
        f"laid out once, at {laid_out_per_s:.0f} per second; "
        f"numpy copies {len(big) / copy_s / 1e9:.1f} GB/s; "
        f"float32 matmul {2 * 1_024**3 / matmul_s / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
