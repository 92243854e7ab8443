"""Evaluates behaviour: streams held-out sessions through the engine, beside their controls.

    python -m launch.evaluate --model=runs/quickstart --out=runs/quickstart/evaluation
    python -m launch.evaluate --model=exports/quickstart --sessions=data/human_digits --out=reports/human

Prints a table with 95 % intervals: the speech itself, and the same sessions blanked, swapped and as
noise with the envelope of the speech. Writes report.json, sessions.jsonl (what was expected and what
was said in every session) and a picture of some sessions to --out.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from absl import app, flags

from launch.app import prepare_jax, run_app

if TYPE_CHECKING:
    from tml.evaluate import Report
    from tml.export.bundle import Model
    from tml.session import Session

_MODEL = flags.DEFINE_string("model", "", "Run folder or bundle.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint of a run folder; the newest by default.")
_SESSIONS = flags.DEFINE_string("sessions", "", "Data set of sessions; evaluation.sessions of the config by default.")
_MAX_SESSIONS = flags.DEFINE_integer("max_sessions", 0, "Stream at most so many; evaluation.max_sessions by default.")
_MAX_CONTROLS = flags.DEFINE_integer(
    "max_control_sessions", 0, "Under each control at most so many; evaluation.max_control_sessions by default."
)
_OUT = flags.DEFINE_string("out", "", "Folder for report.json, sessions.jsonl and pictures; none by default.")
_PICTURES = flags.DEFINE_integer("pictures", 2, "Sessions drawn into --out.")


def main(argv: list[str]) -> int:
    """Streams, scores, prints, writes."""
    if not _MODEL.value:
        raise app.UsageError("--model is missing; name a run folder or a bundle, as in --model=runs/quickstart")
    prepare_jax()
    from data_pipelines.records import RecordSource, read_session
    from tml import evaluate
    from tml.export import bundle

    begun = time.monotonic()
    model = bundle.open_model(Path(_MODEL.value), _STEP.value)
    config = model.experiment.evaluation
    directory = _SESSIONS.value or config.sessions
    if not directory:
        raise app.UsageError("--sessions is missing, and the model's config names none in evaluation.sessions")
    source = RecordSource(directory)
    config = replace(config, max_control_sessions=_MAX_CONTROLS.value or config.max_control_sessions)
    count = min(len(source), _MAX_SESSIONS.value or config.max_sessions)
    sessions = [read_session(source, index) for index in range(count)]
    print(f"streaming {count} of {len(source)} sessions of {directory}, and their controls", flush=True)
    report = evaluate.evaluate(
        model.params,
        sessions,
        model.experiment.model,
        model.layout,
        model.experiment.stream,
        config,
        model.tokenizer,
    )
    print(evaluate.report_table(report))
    if _OUT.value:
        _write(report, sessions, model, Path(_OUT.value), directory)
    print(f"{time.monotonic() - begun:.0f} s")
    return 0


def _write(report: "Report", sessions: list["Session"], model: "Model", out: Path, directory: str) -> None:
    from tml import evaluate
    from tml.timeline import draw_timeline

    out.mkdir(parents=True, exist_ok=True)
    plain = {"model": _MODEL.value, "sessions": directory, **evaluate.report_json(report)}
    (out / "report.json").write_text(json.dumps(plain, indent=2, allow_nan=False) + "\n")
    with (out / "sessions.jsonl").open("w") as lines:
        lines.writelines(
            json.dumps(evaluate.said_json(session, said)) + "\n"
            for session, said in zip(sessions, report.said, strict=True)
        )
    clock = model.layout.clock
    for session, said in list(zip(sessions, report.said, strict=True))[: _PICTURES.value]:
        spoken = evaluate.with_said(session, said, clock)
        titled = replace(spoken, session_id=f"{session.session_id} (answers by the model)")
        draw_timeline(titled, out / f"{session.session_id.replace('/', '_')}.png", clock)
    print(f"report: {out / 'report.json'}")


if __name__ == "__main__":
    run_app(main)
