"""Streams a sound file through a model tick by tick, as if it were heard live.

    python -m launch.stream --model=runs/quickstart --wav=in.wav --out=runs/quickstart/stream

Prints every tick with something in it, and the compute time of ticks. Writes to --out the transcript
(transcript.json), the session as a picture (timeline.png), the latencies (in transcript.json), and of a model
with a voice what it says (own.wav), on the clock of the sound that it hears.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from launch.app import prepare_jax, run_app

if TYPE_CHECKING:
    import numpy as np

    from tml.stream.live import LiveSession, TurnResult

_MODEL = flags.DEFINE_string("model", "", "Run folder or bundle.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of a run folder; the newest by default.")
_WAV = flags.DEFINE_string("wav", "", "Sound file: wav, flac, ogg, mp3; any rate, first channel.")
_TEXT = flags.DEFINE_string("type_text", "", "Text typed by the user at the start.")
_OUT = flags.DEFINE_string("out", "", "Folder for the transcript and the picture.")
_TAIL_S = flags.DEFINE_float(
    "tail_s", 2.0, "Seconds of silence after the sound, in which it may still be answered.", lower_bound=0.0
)
CHUNK_MS = 20
"""The sound arrives in pieces of this length, as from a sound card."""


def main(argv: list[str]) -> int:
    """Reads the sound, streams it, prints and writes what was said."""
    if not _MODEL.value or not _WAV.value or not _OUT.value:
        raise app.UsageError(
            "--model, --wav and --out are needed, as in --model=runs/quickstart --wav=in.wav --out=out"
        )
    if not Path(_WAV.value).is_file():
        raise FileNotFoundError(f"{_WAV.value}: there is no such file")
    prepare_jax()
    import numpy as np
    import soundfile

    from tml.codec.waveform import decode_clip, read_audio
    from tml.export import bundle
    from tml.session import Stream
    from tml.stream.live import LiveSession
    from tml.timeline import draw_timeline

    model = bundle.open_model(Path(_MODEL.value), _STEP.value)
    config, clock = model.experiment, model.layout.clock
    samples = read_audio(_WAV.value, clock.sample_rate_hz)[0]
    samples = np.pad(samples, (0, round(_TAIL_S.value * clock.sample_rate_hz)))
    samples = np.pad(samples, (0, -len(samples) % clock.turn_samples))
    num_turns = len(samples) // clock.turn_samples
    if not num_turns:
        raise ValueError(f"{_WAV.value} holds no sound, and --tail_s = 0 adds none; name another file")
    # A file's length is known, so the caches can hold whatever may be said to it.
    most = num_turns * (model.layout.max_slots_in + model.layout.max_slots_out)
    stream = replace(config.stream, max_positions=max(config.stream.max_positions, most))
    live = LiveSession(model.params, config.model, model.layout, stream, model.tokenizer)
    if _TEXT.value:
        live.type_text(_TEXT.value)
    turns = _stream(live, samples, CHUNK_MS * clock.sample_rate_hz // 1000)
    latencies = _latencies([turn.compute_s for turn in turns], config.turn.turn_ms, live.num_compilations)
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    said = [
        {"tick": turn.said.turn, "emitted_s": turn.said.emitted_s, "text": turn.said.text, "actions": turn.said.actions}
        for turn in turns
        if turn.said.text or turn.said.actions
    ]
    (out / "transcript.json").write_text(json.dumps({"wav": _WAV.value, "said": said, **latencies}, indent=2) + "\n")
    record = live.record(Path(_WAV.value).name)
    draw_timeline(record, out / "timeline.png", clock)
    wrote = [out / "transcript.json", out / "timeline.png"]
    if Stream.OWN_AUDIO in record.audio:
        wrote.append(out / "own.wav")
        own = decode_clip(record.audio[Stream.OWN_AUDIO], record.sample_rate_hz)
        soundfile.write(wrote[-1], own, record.sample_rate_hz, subtype="PCM_16")
    text = "".join(turn.said.text for turn in turns).strip()
    print(f"said: {text!r} in {len(turns)} ticks of {config.turn.turn_ms} ms")
    print(", ".join(f"{name} {value:.4g}" for name, value in latencies.items()))
    print(f"wrote {', '.join(map(str, wrote))}")
    return 0


def _stream(live: "LiveSession", samples: "np.ndarray", chunk: int) -> "list[TurnResult]":
    """Every turn, printed as it comes if anything was put out in it."""
    turns: list[TurnResult] = []
    for first in range(0, len(samples), chunk):
        for turn in live.push(samples[first : first + chunk]):
            turns.append(turn)
            if turn.said.text or turn.said.actions:
                text = turn.said.text.strip()
                print(f"{turn.said.emitted_s:7.2f} s  tick {turn.said.turn:4d}  {text}", *turn.said.actions)
    return turns


def _latencies(compute_s: list[float], turn_ms: int, num_compilations: int) -> dict[str, float]:
    import numpy as np

    milliseconds = np.array(compute_s) * 1000
    return {
        "tick_p50_ms": float(np.percentile(milliseconds, 50)),
        "tick_p99_ms": float(np.percentile(milliseconds, 99)),
        "tick_max_ms": float(milliseconds.max()),
        "real_time_factor": float(milliseconds.mean() / turn_ms),
        "programs_compiled": num_compilations,
    }


if __name__ == "__main__":
    run_app(main)
