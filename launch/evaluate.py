"""Evaluates behaviour: streams held-out sessions through the engine, beside their controls.

    python -m launch.evaluate --model=runs/quickstart --out=runs/quickstart/evaluation
    python -m launch.evaluate --model=exports/quickstart --sessions=data/human_digits --out=reports/human
    python -m launch.evaluate --model=runs/duplex_tiny --suite=duplex --data=data/duplex_tiny/test --out=reports/duplex

--suite=requests prints a table with 95 % intervals: the speech itself, and the same sessions blanked, swapped and as
noise with the envelope of the speech. It writes report.json, sessions.jsonl (what was expected and what was said in
every session) and a picture of some sessions to --out.

--suite=duplex takes sessions that were made for behaviours (launch.synthesize --task=duplex, or one of them), in which
results of delegations come back only if they are asked for. It prints a line a behaviour, every number between its
controls (tml/duplex/controls.py) and its ceiling, and writes report.json, sessions.jsonl, report.html (tables,
timelines, sound to play) and full_duplex_bench/ (the folders that the public scorer reads) to --out.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from launch.app import prepare_jax, run_app, writable_folder
from launch.progress import Progress
from tml.whole_folder import write_whole

if TYPE_CHECKING:
    from tml.duplex.controls import Control
    from tml.duplex.player import Player
    from tml.duplex.suite import SuiteReport
    from tml.evaluate import Report
    from tml.export.bundle import Model
    from tml.session import Session

FLAGS = flags.FLAGS
_MODEL = flags.DEFINE_string("model", "", "Run folder or bundle.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of a run folder; the newest by default.")
_SUITE = flags.DEFINE_enum("suite", "requests", ["requests", "duplex"], "What is measured, and in which sessions.")
_SESSIONS = flags.DEFINE_string("sessions", "", "Data set of sessions; evaluation.sessions of the config by default.")
flags.DEFINE_alias("data", "sessions")
_MAX_SESSIONS = flags.DEFINE_integer("max_sessions", 0, "Stream at most so many; evaluation.max_sessions by default.")
_LIMIT = flags.DEFINE_integer(
    "limit", 0, "--suite=duplex: stream at most so many sessions of each behaviour; all by default.", lower_bound=0
)
_CONTROLS = flags.DEFINE_list("controls", None, "--suite=duplex: which controls, by name; all by default.")
_MAX_CONTROLS = flags.DEFINE_integer(
    "max_control_sessions",
    0,
    "Under each control that streams again at most so many, of each behaviour with --suite=duplex; "
    "evaluation.max_control_sessions by default. Silence and swapped inputs need no streaming: they take all.",
    lower_bound=0,
)
_OUT = flags.DEFINE_string("out", "", "Folder for what is written; none by default.")
_PICTURES = flags.DEFINE_integer(
    "pictures", 2, "Sessions drawn into --out, of each behaviour with --suite=duplex.", lower_bound=0
)
SAMPLES = "full_duplex_bench"
"""Folder in --out with what the public scorer reads."""
_SUITE_OF = {"max_sessions": "requests", "limit": "duplex", "controls": "duplex"}
"""Flags that go with one suite only."""


def main(argv: list[str]) -> int:
    """Streams, scores, prints, writes."""
    if not _MODEL.value:
        raise app.UsageError("--model is missing; name a run folder or a bundle, as in --model=runs/quickstart")
    if _OUT.value:
        writable_folder("out", _OUT.value)
    _refuse_flags(_SUITE.value)
    controls = _read_controls() if _SUITE.value == "duplex" else ()
    prepare_jax()
    from tml.duplex.full_duplex_bench import check_place
    from tml.export import bundle

    if _OUT.value and _SUITE.value == "duplex":
        check_place(Path(_OUT.value) / SAMPLES)
    begun = time.monotonic()
    model = bundle.open_model(Path(_MODEL.value), _STEP.value)
    directory = _SESSIONS.value or model.experiment.evaluation.sessions
    if not directory:
        raise app.UsageError("--sessions is missing, and the model's config names none in evaluation.sessions")
    if _SUITE.value == "duplex":
        _duplex(model, directory, controls)
    else:
        _requests(model, directory)
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


def _refuse_flags(suite: str) -> None:
    """Raises UsageError for a flag that goes with another suite."""
    for name, other in _SUITE_OF.items():
        if other != suite and FLAGS[name].present:
            raise app.UsageError(f"--{name} goes with --suite={other}; leave it out for --suite={suite}")


def _read_controls() -> "tuple[Control, ...]":
    from tml.duplex.controls import Control

    if _CONTROLS.value is None:
        return tuple(Control)
    known = [control.value for control in Control]
    unknown = [name for name in _CONTROLS.value if name not in known]
    if unknown:
        raise app.UsageError(f"--controls={','.join(unknown)} must name some of {', '.join(known)}")
    return tuple(control for control in Control if control.value in _CONTROLS.value)


def _requests(model: "Model", directory: str) -> None:
    """Spoken requests: `tml.evaluate`."""
    from data_pipelines.records import RecordSource, read_session
    from tml import evaluate

    config = model.experiment.evaluation
    source = RecordSource(directory)
    config = replace(config, max_control_sessions=_MAX_CONTROLS.value or config.max_control_sessions)
    count = min(len(source), _MAX_SESSIONS.value or config.max_sessions)
    sessions = [read_session(source, index) for index in range(count)]
    print(f"streaming {count} of {len(source)} sessions of {directory}, and their controls", flush=True)
    report = evaluate.evaluate(_player(model, count), sessions, config, progress=Progress("requests", "micro-turns"))
    print(evaluate.report_table(report))
    if _OUT.value:
        _write(report, sessions, model, Path(_OUT.value), directory)


def _write(report: "Report", sessions: list["Session"], model: "Model", out: Path, directory: str) -> None:
    from tml import evaluate
    from tml.timeline import draw_timeline

    out.mkdir(parents=True, exist_ok=True)
    plain = {"model": _MODEL.value, "sessions": directory, **evaluate.report_json(report)}
    pairs = list(zip(sessions, report.said, strict=True))
    lines = [json.dumps(evaluate.said_json(session, said)) + "\n" for session, said in pairs]
    write_whole(out / "sessions.jsonl", "".join(lines))
    clock = model.layout.clock
    for session, said in pairs[: _PICTURES.value]:
        spoken = evaluate.with_said(session, said, clock)
        titled = replace(spoken, session_id=f"{session.session_id} (answers by the model)")
        draw_timeline(titled, out / f"{session.session_id.replace('/', '_')}.png", clock)
    write_whole(out / "report.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")
    print(f"report: {out / 'report.json'}")


def _duplex(model: "Model", directory: str, controls: "tuple[Control, ...]") -> None:
    """The behaviours of duplex speech: `tml.duplex.suite`."""
    from tml.duplex.suite import bars_table, run_suite, suite_table

    config = model.experiment
    sessions, total = _limited(directory)
    print(f"streaming {len(sessions)} of {total} sessions of {directory}, and their controls", flush=True)
    player = _player(model, len(sessions))
    most = _MAX_CONTROLS.value or config.evaluation.max_control_sessions
    report = run_suite(player, sessions, controls, most, Progress("duplex", "micro-turns"))
    print(suite_table(report))
    print(f"\nbars beside controls\n{bars_table(report)}")
    learnt = [behaviour.value for behaviour in report.scores if report.is_learnt(behaviour)]
    print(f"learnt: {len(learnt)} of {len(report.scores)} behaviours{': ' if learnt else ''}{', '.join(learnt)}")
    if _OUT.value:
        _write_duplex(report, player, Path(_OUT.value), directory)


def _player(model: "Model", num_sessions: int) -> "Player":
    from tml.duplex.player import Player

    config = model.experiment
    num_slots = max(1, min(config.evaluation.num_slots, num_sessions))
    return Player(model.params, config.model, model.layout, config.stream, model.tokenizer, num_slots)


def _limited(directory: str) -> "tuple[list[Session], int]":
    """The sessions of a data set, at most --limit of each behaviour, and how many it holds."""
    from data_pipelines.records import RecordSource, iter_sessions
    from tml.duplex.scores import behaviour_of

    counts: dict[str, int] = {}
    sessions = []
    for session in iter_sessions(directory):
        name = behaviour_of(session)
        counts[name] = counts.get(name, 0) + 1
        if not _LIMIT.value or counts[name] <= _LIMIT.value:
            sessions.append(session)
    return sessions, len(RecordSource(directory))


def _write_duplex(report: "SuiteReport", player: "Player", out: Path, directory: str) -> None:
    from tml.duplex.full_duplex_bench import samples_of, write_samples
    from tml.duplex.html_report import html_report
    from tml.duplex.suite import session_json, suite_json

    out.mkdir(parents=True, exist_ok=True)
    facts = {"model": _MODEL.value, "sessions": directory}
    plain = {**facts, **suite_json(report)}
    lines = []
    for number, session in enumerate(report.sessions):
        under = {c.value: traced[number] for c, traced in report.control_traces.items() if number in traced}
        line = session_json(session, report.traces[number], report.played[number], under)
        lines.append(json.dumps(line) + "\n")
    write_whole(out / "sessions.jsonl", "".join(lines))
    write_whole(out / "report.html", html_report(report, player, facts, _PICTURES.value))
    held = [len(list(samples_of(session))) for session in report.sessions]
    sampled = [number for number, count in enumerate(held) if count]
    counts = write_samples(
        out / SAMPLES,
        [report.sessions[number] for number in sampled],
        [report.traces[number] for number in sampled],
        [player.own_sound(report.sessions[number], report.played[number]) for number in sampled],
    )
    # Last: where it is, everything is.
    write_whole(out / "report.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")
    samples = ", ".join(f"{task} {count}" for task, count in counts.items()) or "no sample of its four tasks"
    if left_out := sum(held) - sum(counts.values()):
        samples += f", {left_out} left out, which its scorer does not know"
    print(f"report: {out / 'report.html'}, {out / 'report.json'}; Full-Duplex-Bench: {samples}")


if __name__ == "__main__":
    run_app(main)
