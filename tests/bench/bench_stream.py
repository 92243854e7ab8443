"""Time of one streamed tick of the quickstart model, from its last sample to its output, over a minute of sound.

Run: python -m tests.bench.bench_stream [--model=DIR] [--voice] (a run folder or a bundle; random weights by default).
The bar is 20 ms at the 99th percentile, on an idle machine, and 60 ms with a voice: then half of the ticks hold as
many words as a tick may, and own audio of default size, sampled and vocoded. Printed beside this machine's float32
matmul rate and the tokens that went out: every token is one more pass through the network. The random model has a
head of zeros, so that it listens all the time, as a trained one mostly does.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np

from experiments import quickstart
from launch.app import prepare_jax
from tml.codec.text import train_tokenizer
from tml.config import AudioOutConfig, FlowConfig, from_config_dict
from tml.export.bundle import Model, open_model
from tml.flops import measure_matmul_rate
from tml.model import transformer
from tml.params import init_params
from tml.stream.live import LiveSession, TurnResult

BAR_MS, VOICE_BAR_MS = 20.0, 60.0
VOICE = AudioOutConfig(frames_per_position=4, flow=FlowConfig(width=256, num_blocks=3))
SOUND_S, EDGE_S = 60, 10
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


def stream(model: Model) -> tuple[list[TurnResult], int]:
    """Every tick of a minute of noise that comes and goes, and the programs compiled for it."""
    clock, config = model.layout.clock, model.experiment
    rng = np.random.default_rng(0)
    num_samples = SOUND_S * clock.sample_rate_hz
    loudness = np.maximum(np.sin(np.arange(num_samples) * (2 * np.pi / clock.sample_rate_hz)), 0)
    sound = (0.1 * loudness * rng.standard_normal(num_samples)).astype(np.float32)
    live = LiveSession(model.params, config.model, model.layout, config.stream, model.tokenizer)
    chunk = CHUNK_MS * clock.sample_rate_hz // 1000
    turns = [turn for first in range(0, num_samples, chunk) for turn in live.push(sound[first : first + chunk])]
    return turns, live.num_compilations


def main() -> None:
    """Prints latencies per tick, the real-time factor, whether ticks grow slower, and the matmul rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="run folder or bundle; random weights by default")
    parser.add_argument("--voice", action="store_true", help="a random model that speaks in half of its ticks")
    folder, voice = parser.parse_args().model, parser.parse_args().voice
    prepare_jax()
    with tempfile.TemporaryDirectory() as scratch:
        model = open_model(folder) if folder else random_model(Path(scratch), voice)
        turns, num_compilations = stream(model)
    turn_ms = model.experiment.turn.turn_ms
    tick_ms = np.array([turn.compute_s for turn in turns]) * 1000
    edge = EDGE_S * 1000 // turn_ms
    words = np.array([len(turn.said.tokens) for turn in turns])
    bar_ms = VOICE_BAR_MS if model.experiment.model.has_voice else BAR_MS
    p50, p99 = np.percentile(tick_ms, [50, 99])
    print(
        f"streaming: {len(turns)} ticks of {turn_ms} ms, p50 {p50:.1f} ms, p99 {p99:.1f} ms (bar {bar_ms:g}), "
        f"fastest {tick_ms.min():.1f}, slowest {tick_ms.max():.1f}, real-time factor {tick_ms.mean() / turn_ms:.3f}; "
        f"last {EDGE_S} s over first {EDGE_S} s {np.median(tick_ms[-edge:]) / np.median(tick_ms[:edge]):.2f}; "
        f"speaking {np.mean([turn.mels is not None for turn in turns]):.0%} of ticks; "
        f"own tokens a tick: mean {words.mean():.1f}, most {words.max()}; programs compiled {num_compilations}; "
        f"jax float32 matmul {measure_matmul_rate(jax.devices()) / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
