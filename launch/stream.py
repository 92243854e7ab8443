"""Streams a sound file through a model tick by tick, as if it were heard live.

    python -m launch.stream --model=runs/quickstart --wav=in.wav --out=runs/quickstart/stream

Prints every tick with something in it, and the compute time of ticks. Writes to --out the transcript
(transcript.json), the session as a picture (timeline.png), and the latencies (in transcript.json).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from launch.app import prepare_jax, run_app

if TYPE_CHECKING:
    import numpy as np

    from tml.stream.live import LiveSession, SessionFullError, TurnResult

_MODEL = flags.DEFINE_string("model", "", "Run folder or bundle.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of a run folder; the newest by default.")
_WAV = flags.DEFINE_string("wav", "", "Sound file: wav, flac, ogg, mp3; any rate, first channel.")
_TEXT = flags.DEFINE_string("type_text", "", "Text typed by the user at the start.")
_OUT = flags.DEFINE_string("out", "", "Folder for the transcript and the picture.")
CHUNK_MS = 20
"""The sound arrives in pieces of this length, as from a sound card."""


def main(argv: list[str]) -> int:
    """Reads the sound, streams it, prints and writes what was said."""
    if not _MODEL.value or not _WAV.value or not _OUT.value:
        raise app.UsageError(
            "--model, --wav and --out are needed, as in --model=runs/quickstart --wav=in.wav --out=out"
        )
    prepare_jax()
    import numpy as np

    from tml.codec.waveform import read_audio
    from tml.export import bundle
    from tml.stream.live import LiveSession
    from tml.timeline import draw_timeline

    model = bundle.open_model(Path(_MODEL.value), _STEP.value)
    config, clock = model.experiment, model.layout.clock
    samples = read_audio(_WAV.value, clock.sample_rate_hz)[0]
    live = LiveSession(model.params, config.model, model.layout, config.stream, model.tokenizer)
    if _TEXT.value:
        live.type_text(_TEXT.value)
    padded = np.pad(samples, (0, -len(samples) % clock.turn_samples))
    turns, full = _stream(live, padded, CHUNK_MS * clock.sample_rate_hz // 1000)
    latencies = _latencies([turn.compute_s for turn in turns], config.turn.turn_ms, live.num_compilations)
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    said = [
        {"tick": turn.said.turn, "emitted_s": turn.said.emitted_s, "text": turn.said.text, "actions": turn.said.actions}
        for turn in turns
        if turn.said.text or turn.said.actions
    ]
    (out / "transcript.json").write_text(json.dumps({"wav": _WAV.value, "said": said, **latencies}, indent=2) + "\n")
    draw_timeline(live.record(Path(_WAV.value).name), out / "timeline.png", clock)
    text = "".join(turn.said.text for turn in turns).strip()
    print(f"said: {text!r} in {len(turns)} ticks of {config.turn.turn_ms} ms")
    print(", ".join(f"{name} {value:.4g}" for name, value in latencies.items()))
    print(f"wrote {out / 'transcript.json'} and {out / 'timeline.png'}")
    if full is not None:
        raise full  # after what was said before has been written
    return 0


def _stream(
    live: "LiveSession", samples: "np.ndarray", chunk: int
) -> "tuple[list[TurnResult], SessionFullError | None]":
    """Every turn, printed as it comes, and the error that ended the session early, if one did."""
    from tml.stream.live import SessionFullError

    turns: list[TurnResult] = []
    full: SessionFullError | None = None
    for first in range(0, len(samples), chunk):
        try:
            done = live.push(samples[first : first + chunk])
        except SessionFullError as error:
            done, full = error.results, error
        turns += done
        for turn in done:
            if turn.said.text or turn.said.actions:
                text = turn.said.text.strip()
                print(f"{turn.said.emitted_s:7.2f} s  tick {turn.said.turn:4d}  {text}", *turn.said.actions)
        if full is not None:
            break
    return turns, full


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
