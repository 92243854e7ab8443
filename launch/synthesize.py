"""Makes a data set of synthetic speech: spoken requests, or conversations of two.

    python -m launch.synthesize --task=requests --out=data/requests-train --num_sessions=6000

The same flags give the same bytes, whatever --num_workers is.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

from absl import app, flags

from data_pipelines import augment
from data_pipelines.dialogue import DialogueTask
from data_pipelines.generate import GenerateSummary, generate
from data_pipelines.request_session import SPLITS
from data_pipelines.request_task import RequestTask
from data_pipelines.voices import DEFAULT_CACHE, MAKERS, licences

FLAGS = flags.FLAGS
flags.DEFINE_enum("task", "requests", ["requests", "dialogue"], "What the sessions are.")
flags.DEFINE_string("out", None, "Directory of the new data set.")
flags.DEFINE_integer("num_sessions", 6000, "Sessions to make.", lower_bound=1)
flags.DEFINE_enum("split", "train", list(SPLITS), "Voices to use; no voice is in both splits.")
flags.DEFINE_integer("seed", 0, "Everything random follows from it.", lower_bound=0)
flags.DEFINE_integer("num_workers", 2, "Processes.", lower_bound=1)
flags.DEFINE_integer("num_shards", 8, "Files of the data set.", lower_bound=1)
flags.DEFINE_list("voices", ["espeak"], f"Makers of voices, of {', '.join(MAKERS)}; each session draws one.")
flags.DEFINE_enum(
    "augment", "none", ["none", "channel"], "What the user's sound goes through (data_pipelines.augment)."
)
flags.DEFINE_string("cache", str(DEFAULT_CACHE), "Where Debian packages are unpacked, for voices that come from there.")
flags.DEFINE_bool("overwrite", False, "Replace a data set that is at --out.")

LICENCE = "synthetic speech; the programs that made it are named in `makers`, and their licences do not cover it"
_LINE_EVERY_S = 10.0


def _progress(total: int):
    """A line that shows how far it is: redrawn on a terminal, every ten seconds elsewhere."""
    begun = time.monotonic()
    last_line = [begun]

    def show(done: int) -> None:
        now = time.monotonic()
        left = (total - done) * (now - begun) / done if done else 0.0
        text = f"{done}/{total} sessions, {now - begun:.0f} s, {left:.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{text}\033[K", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif now - last_line[0] > _LINE_EVERY_S:
            last_line[0] = now
            print(text, file=sys.stderr, flush=True)

    return show


def _describe(summary: GenerateSummary, out: str) -> str:
    counts = ", ".join(f"{tag} {count}" for tag, count in sorted(summary.tags.items()))
    return (
        f"{out}: {summary.sessions} sessions, {summary.audio_s / 3600:.2f} h, {len(summary.voices)} voices\n"
        f"{summary.answers.total()} answers of {len(summary.answers)} words; expectations: {counts}\n"
        f"{summary.wall_s:.1f} s, {summary.audio_s / summary.wall_s:.0f} s of sound per second"
    )


def _task() -> RequestTask | DialogueTask:
    unknown = [maker for maker in FLAGS.voices if maker not in MAKERS]
    if unknown or not FLAGS.voices:
        raise ValueError(f"--voices={','.join(FLAGS.voices)} must name some of {', '.join(MAKERS)}")
    kind = {"requests": RequestTask, "dialogue": DialogueTask}[FLAGS.task]
    return kind(
        seed=FLAGS.seed,
        makers=tuple(FLAGS.voices),
        cache=Path(FLAGS.cache).expanduser().absolute(),
        channel=augment.channel if FLAGS.augment == "channel" else None,
    )


def main(argv: list[str]) -> int:
    """Makes the data set and prints what is in it."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; every option is a --flag")
    if not FLAGS.out:
        raise app.UsageError("--out names the directory of the new data set")
    task = _task()
    summary = generate(
        FLAGS.out,
        task,
        name=Path(FLAGS.out).name,
        split=FLAGS.split,
        num_sessions=FLAGS.num_sessions,
        num_shards=FLAGS.num_shards,
        num_workers=FLAGS.num_workers,
        meta={
            "task": FLAGS.task,
            "split": FLAGS.split,
            "seed": str(FLAGS.seed),
            "makers": ",".join(FLAGS.voices),
            "augment": FLAGS.augment,
            "settings": json.dumps(dataclasses.asdict(task.config)),
            "licence": LICENCE,
        },
        attachments=licences(task.makers, task.cache),
        overwrite=FLAGS.overwrite,
        progress=_progress(FLAGS.num_sessions),
    )
    print(_describe(summary, FLAGS.out))
    return 0


if __name__ == "__main__":
    app.run(main)
