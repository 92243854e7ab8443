r"""Streams a sound file through a model tick by tick, as if it were heard live.

    python -m launch.stream --model=runs/quickstart --wav=in.wav --out=runs/quickstart/stream

Prints every tick with something in it, and the compute time of ticks. Writes to --out the transcript
(transcript.json), the session as a picture (timeline.png), the latencies (in transcript.json), and of a model
with a voice what it says (own.wav), on the clock of the sound that it hears.

What the model calls is carried out by a background (extra `delegate`), while it goes on hearing:

    python -m launch.stream --model=RUN --wav=in.wav --out=OUT --worker=http://127.0.0.1:8000/v1 --worker_model=NAME \
        --tools="python -m launch.tool_server --documents=texts --canvas=canvas.svg"

`delegate` hands the whole session to the worker, an OpenAI-compatible endpoint (its key is OPENAI_API_KEY, if it wants
one), `cancel` calls it off, anything else is a tool of the MCP servers. The sound then goes in in real time.
"""

import contextlib
import functools
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags

from launch.app import EXIT_INTERRUPTED, FLAGS, prepare_jax, run_app, writable_folder

if TYPE_CHECKING:
    import numpy as np

    from tml.export.bundle import Model
    from tml.microturn import Clock
    from tml.serve.background import Background
    from tml.serve.live_loop import Pace, Tick
    from tml.session import Session
    from tml.stream.live import LiveSession

_MODEL = flags.DEFINE_string("model", "", "Run folder or bundle.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of a run folder; the newest by default.")
_WAV = flags.DEFINE_string("wav", "", "Sound file: wav, flac, ogg, mp3; any rate, first channel.")
_SYSTEM = flags.DEFINE_string("system", "", "Text of the stream `system` at the start.")
_TEXT = flags.DEFINE_string("type_text", "", "Text typed by the user at the start.")
_PICTURES = flags.DEFINE_string(
    "pictures", "", "Folder of pictures (png, jpg), shown in the order of their names, video.frames_per_second of them."
)
_OUT = flags.DEFINE_string("out", "", "Folder for the transcript and the picture.")
_TAIL_S = flags.DEFINE_float(
    "tail_s", 2.0, "Seconds of silence after the sound, in which it may still be answered.", lower_bound=0.0
)
_MAX_POSITIONS = flags.DEFINE_integer(
    "max_positions",
    None,
    "Positions that the session may grow to; by default as many as may be said to the sound. Fewer make ticks faster.",
    lower_bound=1,
)
_PACE = flags.DEFINE_enum(
    "pace", "", ["", "real_time", "at_once"], "When sound goes in; by default in real time if there is a background."
)
_WORKER = flags.DEFINE_string("worker", "", "Base address of an OpenAI-compatible endpoint, as in http://host/v1.")
_WORKER_MODEL = flags.DEFINE_string("worker_model", "", "Name of the model there.")
_WORKER_SENDS = flags.DEFINE_list("worker_sends", "sound,frames", "What it gets beside the transcript: sound, frames.")
_WORKER_FRAMES = flags.DEFINE_integer(
    "worker_frames", 32, "Pictures at most that it gets with a request, spread evenly over the session.", lower_bound=1
)
_TOOLS = flags.DEFINE_multi_string("tools", [], "Command or http address of an MCP server; may be given repeatedly.")
_TIMEOUT_S = flags.DEFINE_float(
    "background_timeout_s",
    60.0,
    "Seconds until a delegation, a call or the start of a tool server has failed.",
    lower_bound=0.01,
)
WRITTEN = ("transcript.json", "timeline.png", "own.wav")
"""What is written to --out; the last where the model has a voice."""
CHUNK_MS = 20
"""The sound arrives in pieces of this length, as from a sound card."""


def main(argv: list[str]) -> int:
    """Reads the sound, streams it, prints and writes what was said."""
    if not _MODEL.value or not _WAV.value or not _OUT.value:
        raise app.UsageError(
            "--model, --wav and --out are needed, as in --model=runs/quickstart --wav=in.wav --out=out"
        )
    if not Path(_WAV.value).is_file():
        raise FileNotFoundError(f"--wav={_WAV.value}: there is no such file")
    out = writable_folder("out", _OUT.value)
    for name in WRITTEN:
        if (out / name).exists() and (out / name).samefile(_WAV.value):
            raise app.UsageError(f"--wav={_WAV.value} would be written over; name another --out")
    of_worker = [name for name in ("worker_model", "worker_sends", "worker_frames") if FLAGS[name].present]
    if of_worker and not _WORKER.value:
        raise app.UsageError(f"--{of_worker[0]} is of a worker; name one by --worker")
    signal.signal(signal.SIGTERM, _terminate)
    prepare_jax()

    from tml.export import bundle
    from tml.serve.live_loop import Pace
    from tml.session import Stream
    from tml.stream.live import LiveSession

    model = bundle.open_model(Path(_MODEL.value), _STEP.value)
    config, clock = model.experiment, model.layout.clock
    samples = _sound(clock)
    # A file's length is known, so the caches can hold whatever may be said to it.
    most = len(samples) // clock.turn_samples * (model.layout.max_slots_in + model.layout.max_slots_out)
    most = _MAX_POSITIONS.value or max(config.stream.max_positions, most)
    stream = replace(config.stream, max_positions=most)
    live = LiveSession(model.params, config.model, model.layout, stream, model.tokenizer)
    pictures = _pictures(model)
    for text, stream_in in ((_SYSTEM.value, Stream.SYSTEM), (_TEXT.value, Stream.USER_TEXT)):
        if text:
            live.type_text(text, stream_in)
    pace = Pace(_PACE.value or (Pace.REAL_TIME if _WORKER.value or _TOOLS.value else Pace.AT_ONCE))
    ticks: list[Tick] = []
    background = None
    try:
        with contextlib.ExitStack() as stack:
            background = _open_background(clock, stack)
            _stream(live, samples, pictures, background, pace, ticks)
    finally:
        # Whatever ended it, what was said until then is written.
        if ticks:
            _finish(live, ticks, background.notices if background else [], len(pictures), pace)
    return 0


def _terminate(*_: object) -> None:
    """What a supervisor asks for ends the session as Ctrl-C does: with what was said written."""
    sys.exit(EXIT_INTERRUPTED)


def _finish(live: "LiveSession", ticks: "list[Tick]", notices: list[str], num_unseen: int, pace: "Pace") -> None:
    """Writes everything, of as many ticks as there were, and prints a summary."""
    turn_ms = live.clock.turn_samples * 1000 // live.clock.sample_rate_hz
    latencies = _latencies(ticks, turn_ms, live.num_compilations, pace)
    record = live.record(Path(_WAV.value).name)
    notices = [*notices, *_left_over(live, num_unseen)]
    wrote = _write(record, _transcript(ticks, notices, latencies), live.clock)
    for notice in notices:
        print(f"notice: {notice}")
    text = "".join(tick.result.said.text for tick in ticks).strip()
    print(f"said: {text!r} in {len(ticks)} ticks of {turn_ms} ms")
    print(", ".join(f"{name} {value:.4g}" for name, value in latencies.items()))
    print(f"wrote {', '.join(map(str, wrote))}")


def _left_over(live: "LiveSession", num_unseen: int) -> list[str]:
    """What was to go in, and has not before the end."""
    from tml.session import Stream

    found = [f"{num_unseen} pictures were due after the end of the sound; give it a longer --tail_s"] * (num_unseen > 0)
    for stream in (Stream.SYSTEM, Stream.USER_TEXT, Stream.BACKGROUND):
        if text := live.drop_waiting(stream):
            found.append(f"the session ended before all of its {stream} went in; what is missing: {text!r}")
    return found


def _sound(clock: "Clock") -> "np.ndarray":
    """The sound and the silence after it, whole micro-turns of it."""
    import numpy as np

    from tml.codec.waveform import read_audio

    samples = read_audio(_WAV.value, clock.sample_rate_hz)[0]
    samples = np.pad(samples, (0, round(_TAIL_S.value * clock.sample_rate_hz)))
    samples = np.pad(samples, (0, -len(samples) % clock.turn_samples))
    if not len(samples):
        raise ValueError(f"{_WAV.value} holds no sound, and --tail_s = 0 adds none; name another file")
    return samples


def _pictures(model: "Model") -> list[tuple[int, bytes]]:
    """Pictures and the samples from which on they are shown."""
    if not _PICTURES.value:
        return []
    files = sorted(path for path in Path(_PICTURES.value).glob("*") if path.suffix in (".png", ".jpg", ".jpeg"))
    if not files:
        raise ValueError(f"{_PICTURES.value}: there is no such folder, or no picture in it (png, jpg)")
    step = model.layout.clock.sample_rate_hz / model.experiment.model.video.frames_per_second
    return [(round(index * step), file.read_bytes()) for index, file in enumerate(files)]


def _open_background(clock: "Clock", stack: contextlib.ExitStack) -> "Background | None":
    """What carries calls out, if any was asked for."""
    if not _WORKER.value and not _TOOLS.value:
        return None
    from tml.serve.background import Background, Limits
    from tml.serve.conversation import Media
    from tml.serve.endpoint import Endpoint, open_endpoint

    open_worker = None
    if _WORKER.value:
        unknown = set(_WORKER_SENDS.value) - set(Media)
        if unknown:
            raise app.UsageError(f"--worker_sends = {sorted(unknown)} is not of {', '.join(Media)}")
        media = tuple(Media(name) for name in _WORKER_SENDS.value)
        try:
            endpoint = Endpoint(
                url=_WORKER.value, model=_WORKER_MODEL.value, media=media, max_frames=_WORKER_FRAMES.value
            )
        except ValueError as error:
            raise app.UsageError(f"--worker, --worker_model: {error}") from error
        open_worker = functools.partial(open_endpoint, endpoint, clock)
    limits = Limits(timeout_s=_TIMEOUT_S.value, start_timeout_s=_TIMEOUT_S.value)
    background = stack.enter_context(Background(_TOOLS.value, open_worker, limits))
    if _TOOLS.value:
        print(f"tools: {', '.join(background.tool_names)}", flush=True)
    return background


def _stream(
    live: "LiveSession",
    samples: "np.ndarray",
    pictures: list[tuple[int, bytes]],
    background: "Background | None",
    pace: "Pace",
    ticks: "list[Tick]",
) -> None:
    """Runs the session: adds every turn to `ticks`, and prints those in which something was said or came back."""
    from tml.serve.live_loop import run_session

    def show(sample: int) -> None:
        while pictures and pictures[0][0] <= sample:
            live.show(pictures.pop(0)[1])

    chunk = CHUNK_MS * live.clock.sample_rate_hz // 1000
    for tick in run_session(live, samples, chunk, background, pace, show):
        ticks.append(tick)
        said = tick.result.said
        came_back = [f"<- {text}" for text in tick.came_back]
        if said.text or said.actions or came_back:
            when = f"{said.emitted_s:7.2f} s  end of tick {said.turn:4d}"
            print(f"{when}  {said.text.strip()}", *said.actions, *came_back)


def _transcript(ticks: "list[Tick]", notices: list[str], latencies: dict[str, float]) -> dict[str, Any]:
    said = [tick.result.said for tick in ticks]
    return {
        "wav": _WAV.value,
        "said": [
            {"tick": turn.turn, "emitted_s": turn.emitted_s, "text": turn.text, "actions": turn.actions}
            for turn in said
            if turn.text or turn.actions
        ],
        "ticks": [
            {
                "tick": tick.result.said.turn,
                "due_s": tick.due_s,
                "done_s": round(tick.done_s, 4),
                "in_flight": tick.num_in_flight,
                "came_back": tick.came_back,
            }
            for tick in ticks
        ],
        "notices": notices,
        **latencies,
    }


def _write(record: "Session", transcript: dict[str, Any], clock: "Clock") -> list[Path]:
    """Writes transcript, picture and own sound; returns the files."""
    import soundfile

    from tml.codec.waveform import decode_clip
    from tml.session import Stream
    from tml.timeline import draw_timeline

    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    *wrote, own_wav = [out / name for name in WRITTEN]
    wrote[0].write_text(json.dumps(transcript, indent=2) + "\n")
    draw_timeline(record, wrote[1], clock)
    if Stream.OWN_AUDIO in record.audio:
        wrote.append(own_wav)
        own = decode_clip(record.audio[Stream.OWN_AUDIO], record.sample_rate_hz)
        soundfile.write(wrote[-1], own, record.sample_rate_hz, subtype="PCM_16")
    return wrote


def _latencies(ticks: "list[Tick]", turn_ms: int, num_compilations: int, pace: "Pace") -> dict[str, float]:
    """Compute time of ticks; in real time also how far they were behind their last sample, all from first to last."""
    import numpy as np

    from tml.serve.live_loop import Pace

    def percentiles(name: str, seconds: list[float]) -> dict[str, float]:
        milliseconds = np.array(seconds) * 1000
        return {
            f"{name}_p50_ms": float(np.percentile(milliseconds, 50)),
            f"{name}_p99_ms": float(np.percentile(milliseconds, 99)),
            f"{name}_max_ms": float(milliseconds.max()),
        }

    compute_s = [tick.result.compute_s for tick in ticks]
    return {
        **percentiles("tick", compute_s),
        **(percentiles("behind", [tick.behind_s for tick in ticks]) if pace is Pace.REAL_TIME else {}),
        "real_time_factor": float(np.mean(compute_s)) * 1000 / turn_ms,
        "programs_compiled": num_compilations,
    }


if __name__ == "__main__":
    run_app(main)
