"""The whole main job on this machine: speech, training, evaluation, export, streaming.

    python -m launch.quickstart
    python -m launch.quickstart --num_steps=6000 --workdir=runs/longer

Every step is a command of its own, printed before it runs. Data that is there and training steps that are made are not
made again, so an interrupted quickstart goes on where it stopped; evaluation, export and streaming always run. At the
end the report says what was measured. Its minutes are those of these commands, without the installation.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags

from launch.app import output_folder, run_app
from launch.child import run_child

_DATA = flags.DEFINE_string("data", "data/quickstart", "Folder of the data sets.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Run folder.")
_CONFIG = flags.DEFINE_string("experiment", "experiments/quickstart.py", "The experiment.")
_STEPS = flags.DEFINE_integer("num_steps", 0, "Train so many steps; the experiment's own number by default.")
_SESSIONS = flags.DEFINE_integer("num_sessions", 5_500, "Training sessions to synthesise.", lower_bound=1)
_HUMAN = flags.DEFINE_bool("human", True, "Also test on human digits, from a Debian package of telephone prompts.")


def main(argv: list[str]) -> int:
    """Runs every step, then prints the report."""
    begun = time.monotonic()
    data, workdir = output_folder("data", _DATA.value), output_folder("workdir", _WORKDIR.value)
    config = [
        f"--config={_CONFIG.value}",
        f"--config.text.tokenizer={data}/tokenizer",
        f"--config.data.sources.requests.path={data}/train",
        f"--config.data.eval_sources.requests.path={data}/heldout",
        f"--config.evaluation.sessions={data}/heldout",
    ]
    if _STEPS.value:
        config.append(f"--config.train.num_steps={_STEPS.value}")
    _synthesise(data / "train", "--split=train", "--pace=brisk", "--seed=0", num_sessions=_SESSIONS.value)
    _synthesise(data / "heldout", "--split=heldout", "--seed=1", num_sessions=300)
    human = data / "human"
    if _HUMAN.value and not (human / "digits/dataset.json").exists():
        _run("launch.prompts", f"--out={human}", "--sets=digits", hint="--nohuman does without recordings of people")
    _run("launch.encode", *config)
    _run("launch.train", *config, f"--workdir={workdir}", "--print_config=false")
    _run("launch.evaluate", f"--model={workdir}", f"--out={workdir}/evaluation")
    if _HUMAN.value:
        sessions = (f"--sessions={human}/digits", "--max_control_sessions=20")
        _run("launch.evaluate", f"--model={workdir}", *sessions, f"--out={workdir}/evaluation-human")
    _run("launch.export", f"--workdir={workdir}", f"--out={workdir}/bundle")
    wav = _write_wav(data / "heldout", workdir / "heldout.wav")
    _run("launch.stream", f"--model={workdir}/bundle", f"--wav={wav}", f"--out={workdir}/stream")
    _report(workdir, time.monotonic() - begun)
    return 0


def _synthesise(out: Path, *rest: str, num_sessions: int) -> None:
    """Makes a data set, unless it is there already with as many sessions.

    Raises:
        ValueError: what is there has another number of sessions.
    """
    if (out / "dataset.json").exists():
        there = sum(shard["num_records"] for shard in json.loads((out / "dataset.json").read_text())["shards"])
        if there != num_sessions:
            raise ValueError(
                f"{out} holds {there} sessions, {num_sessions} are wanted; "
                f"name another folder with --data, or delete {out}"
            )
        print(f"\n{out} is there already", flush=True)
        return
    _run("launch.synthesize", "--task=requests", f"--out={out}", f"--num_sessions={num_sessions}", *rest)


def _run(module: str, *arguments: str, hint: str = "") -> None:
    """Runs one command, with its output on this screen.

    Ctrl-C and SIGTERM go on to the command, which may take its time to save; its exit code becomes ours.

    Raises:
        ValueError: it failed; its own error stands above.
    """
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    begun = time.monotonic()
    code, stopped_by = run_child(module, arguments)
    if stopped_by:
        print(f"stopped in {module}; run the same command again to go on from here", file=sys.stderr, flush=True)
        raise SystemExit(code if code > 0 else 128 + stopped_by)
    if code:
        raise ValueError(
            f"{module} ended with code {code}; its error stands above. "
            + (f"{hint}. " if hint else "")
            + "When that is mended, run the same command again to go on from here"
        )
    print(f"[{module}: {time.monotonic() - begun:.0f} s]", flush=True)


def _write_wav(dataset: Path, path: Path) -> Path:
    """Writes the sound of the first session that asks something."""
    import soundfile

    from data_pipelines.records import iter_sessions
    from tml.codec.waveform import decode_clip
    from tml.session import ExpectationKind, Stream

    for session in iter_sessions(dataset):
        if any(expected.kind is ExpectationKind.ANSWER for expected in session.expectations):
            clip = session.audio[Stream.USER_AUDIO]
            soundfile.write(path, decode_clip(clip, session.sample_rate_hz), session.sample_rate_hz)
            return path
    raise ValueError(f"{dataset} has no session that asks anything; synthesise it again with another --seed")


def _report(workdir: Path, seconds: float) -> None:
    """Prints the numbers of the quickstart's bar."""
    print(f"\nquickstart: {seconds / 60:.1f} minutes")
    report = json.loads((workdir / "evaluation/report.json").read_text())
    speech, blank = report["conditions"]["speech"], report["conditions"]["blanked"]
    noise = report["conditions"]["envelope noise"]
    print(f"voices never heard    answer accuracy {_cell(speech['accuracy'])}, responded {_cell(speech['responded'])}")
    print(f"                      pause take-over {_cell(speech['pause_takeover'])}, ", end="")
    print(f"median latency {_number(speech['median_latency_s'], ' s')}")
    print(f"blanked sound         responded {_cell(blank['responded'])}")
    print(
        f"noise like speech     accuracy {_cell(noise['accuracy'])} (commonest answer {report['chance_accuracy']:.3f})"
    )
    human = workdir / "evaluation-human/report.json"
    if _HUMAN.value and human.exists():
        digits = json.loads(human.read_text())["conditions"]["speech"]["accuracy"]
        print(f"human digits          accuracy {_cell(digits)} (one speaker, ten recordings, never trained on)")
    print(f"pictures and reports  {workdir}/evaluation, {workdir}/stream")
    print(f"TensorBoard curves    {workdir}/tensorboard")


def _cell(rate: dict) -> str:
    return f"{rate['value']:.3f} [{rate['interval'][0]:.3f}, {rate['interval'][1]:.3f}]" if rate["cases"] else "-"


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.3f}{unit}"


if __name__ == "__main__":
    run_app(main)
