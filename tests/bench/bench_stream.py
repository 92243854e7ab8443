"""Time of one streamed tick, from its last sample to its output: the quickstart's model over a minute of sound.

Run: python -m tests.bench.bench_stream [--model=DIR] [--voice] [--data=DIR] [--seconds=600 --max_positions=32768]

DIR of --model is a run folder or a bundle (random weights by default), DIR of --data a data set whose sessions it hears
and sees one after another, in one session of the model (noise that comes and goes by default). The bar is 20 ms at the
99th percentile, on an idle machine, and 60 ms with a voice, flat from the first seconds to the last. With --voice a
random model has one: then half of the ticks hold as many words as a tick may, and own audio of default size, sampled
and vocoded. Printed beside this machine's float32 matmul rate, the tokens that went out (every token is one more pass
through the network) and the memory of the process. The random model has a head of zeros, so that it listens all the
time, as a trained one mostly does.
"""

import argparse
import dataclasses
import itertools
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from data_pipelines.records import iter_sessions
from experiments import quickstart
from launch.app import prepare_jax
from tml.codec.text import train_tokenizer
from tml.codec.waveform import resample
from tml.config import AudioOutConfig, FlowConfig, from_config_dict
from tml.evaluate import heard
from tml.export.bundle import Model, open_model
from tml.flops import measure_matmul_rate
from tml.model import transformer
from tml.params import init_params
from tml.stream.live import LiveSession, TurnResult

BAR_MS, VOICE_BAR_MS = 20.0, 60.0
VOICE = AudioOutConfig(frames_per_position=4, flow=FlowConfig(width=256, num_blocks=3))
SOUND_S = 60
CHUNK_MS = 20


def random_model(folder: Path, voice: bool) -> Model:
    """The quickstart model before its first step, with a head of zeros; with a voice it draws its words."""
    experiment = from_config_dict(quickstart.get_config())
    if voice:
        talkative = dataclasses.replace(experiment.stream, temperature=1.0, max_positions=8_192)
        model = dataclasses.replace(experiment.model, audio_out=VOICE)
        experiment = dataclasses.replace(experiment, model=model, stream=talkative)
    tokenizer = train_tokenizer(["one two three four five six seven"], experiment.model.vocab_size, folder)
    params = init_params(transformer.specs(experiment.model), jax.random.key(experiment.seed))
    params["unembed"] = params["unembed"] * 0.0
    return Model(experiment=experiment, params=params, tokenizer=tokenizer)


def noise(seconds: int, rate_hz: int) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    """Noise that comes and goes, in chunks of 20 ms, with no picture."""
    rng = np.random.default_rng(0)
    loudness = np.maximum(np.sin(np.arange(seconds * rate_hz) * (2 * np.pi / rate_hz)), 0)
    sound = (0.1 * loudness * rng.standard_normal(len(loudness))).astype(np.float32)
    size = CHUNK_MS * rate_hz // 1000
    for first in range(0, len(sound), size):
        yield sound[first : first + size], []


def recordings(folder: Path, seconds: int, rate_hz: int) -> Iterator[tuple[np.ndarray, list[bytes]]]:
    """What is heard in the sessions of a data set, in chunks of 20 ms, and the pictures that come in each."""
    left = seconds * 1000 // CHUNK_MS
    # Read anew each time round: `cycle` would keep all of them, in the memory that is measured.
    for session in itertools.chain.from_iterable(iter_sessions(folder) for _ in itertools.count()):
        sound = resample(heard(session), session.sample_rate_hz, rate_hz)
        shown = [(frame.sample * rate_hz // session.sample_rate_hz, frame.data) for frame in session.frames]
        size = CHUNK_MS * rate_hz // 1000
        for first in range(0, len(sound) - size + 1, size):
            if not left:
                return
            left -= 1
            yield sound[first : first + size], [data for at, data in shown if first <= at < first + size]


def resident_mb() -> int:
    """What the process holds in memory now; its peak is that of compiling, and would hide all growth below it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE // 2**20


def stream(model: Model, chunks: Iterator[tuple[np.ndarray, list[bytes]]]) -> tuple[list[TurnResult], list[int], int]:
    """Every tick, the memory of the process after it in MB, and the programs compiled for the step."""
    config = model.experiment
    live = LiveSession(model.params, config.model, model.layout, config.stream, model.tokenizer)
    turns: list[TurnResult] = []
    memory_mb: list[int] = []
    for sound, pictures in chunks:
        for picture in pictures:
            live.show(picture)
        found = live.push(sound)
        # Without their sound: what is kept here would be taken for what the session remembers.
        turns += [dataclasses.replace(turn, sound=None) for turn in found]
        memory_mb += [resident_mb()] * len(found)
    return turns, memory_mb, live.num_compilations


def main() -> None:
    """Prints latencies per tick, the real-time factor, whether ticks grow slower, and the matmul rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="run folder or bundle; random weights by default")
    parser.add_argument("--voice", action="store_true", help="a random model that speaks in half of its ticks")
    parser.add_argument("--data", type=Path, help="a data set that is heard and seen; noise by default")
    parser.add_argument("--seconds", type=int, default=SOUND_S, help="length of the session")
    parser.add_argument("--max_positions", type=int, help="size of the global layers' cache; the model's by default")
    flags = parser.parse_args()
    prepare_jax()
    with tempfile.TemporaryDirectory() as scratch:
        model = open_model(flags.model) if flags.model else random_model(Path(scratch), flags.voice)
        if flags.max_positions:
            config = dataclasses.replace(model.experiment.stream, max_positions=flags.max_positions)
            model = dataclasses.replace(model, experiment=dataclasses.replace(model.experiment, stream=config))
        rate_hz = model.layout.clock.sample_rate_hz
        seconds = flags.seconds
        chunks = recordings(flags.data, seconds, rate_hz) if flags.data else noise(seconds, rate_hz)
        turns, memory_mb, num_compilations = stream(model, chunks)
    turn_ms, edge_s = model.experiment.turn.turn_ms, 30 if seconds >= 300 else 10
    tick_ms = np.array([turn.compute_s for turn in turns]) * 1000
    edge = edge_s * 1000 // turn_ms
    words = np.array([len(turn.said.tokens) for turn in turns])
    bar_ms = VOICE_BAR_MS if model.experiment.model.has_voice else BAR_MS
    p50, p99 = np.percentile(tick_ms, [50, 99])
    print(
        f"streaming: {len(turns)} ticks of {turn_ms} ms, p50 {p50:.1f} ms, p99 {p99:.1f} ms (bar {bar_ms:g}), "
        f"fastest {tick_ms.min():.1f}, slowest {tick_ms.max():.1f}, real-time factor {tick_ms.mean() / turn_ms:.3f}; "
        f"last {edge_s} s over first {edge_s} s {np.median(tick_ms[-edge:]) / np.median(tick_ms[:edge]):.2f}; "
        f"speaking {np.mean([turn.mels is not None for turn in turns]):.0%} of ticks; "
        f"memory {memory_mb[edge]} MB after the first {edge_s} s, {memory_mb[-1]} MB at the end; "
        f"own tokens a tick: mean {words.mean():.1f}, most {words.max()}; programs compiled {num_compilations}; "
        f"jax float32 matmul {measure_matmul_rate(jax.devices()) / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
