"""Makes a data set of synthetic speech: spoken requests, or conversations of two.

    python -m launch.synthesize --task=requests --out=data/requests-train --num_sessions=6000

The same flags give the same bytes, whatever --num_workers is.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from absl import app, flags

from data_pipelines import augment
from data_pipelines.dialogue import DialogueTask
from data_pipelines.generate import GenerateSummary, generate
from data_pipelines.request_session import PACES, SPLITS
from data_pipelines.request_task import RequestTask
from data_pipelines.voices import MAKERS, draw_speaker, licences
from launch.app import run_app
from launch.progress import Progress

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
flags.DEFINE_enum(
    "pace",
    "calm",
    list(PACES),
    "How requests follow each other: calm leaves every answer two quiet seconds; brisk, for training, has more of them "
    "and more pauses.",
)
flags.DEFINE_string("cache", "~/.cache/tml", "Where Debian packages are unpacked, for voices that come from there.")
flags.DEFINE_bool("overwrite", False, "Replace a data set that is at --out.")

LICENCE = "synthetic speech; the programs that made it are named in `makers`, and their licences do not cover it"


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
        raise app.UsageError(f"--voices={','.join(FLAGS.voices)} must name some of {', '.join(MAKERS)}")
    for maker in FLAGS.voices:
        # Refuses a split in which the maker has no voice, before anything is downloaded.
        draw_speaker(maker, FLAGS.split, np.random.default_rng(0))
    common = {
        "seed": FLAGS.seed,
        "makers": tuple(FLAGS.voices),
        "cache": Path(FLAGS.cache).expanduser().absolute(),
        "channel": augment.channel if FLAGS.augment == "channel" else None,
    }
    if FLAGS.task == "requests":
        return RequestTask(config=PACES[FLAGS.pace], **common)
    if FLAGS.pace != "calm":
        raise app.UsageError(f"--pace={FLAGS.pace} goes with --task=requests; leave it out for --task={FLAGS.task}")
    return DialogueTask(**common)


def main(_: list[str]) -> int:
    """Makes the data set and prints what is in it."""
    if not FLAGS.out:
        raise app.UsageError("--out names the directory of the new data set")
    task, name = _task(), Path(FLAGS.out).absolute().name
    progress = Progress(name, "sessions")
    summary = generate(
        FLAGS.out,
        task,
        name=name,
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
        progress=lambda done: progress(done, FLAGS.num_sessions),
    )
    print(_describe(summary, FLAGS.out))
    return 0


if __name__ == "__main__":
    run_app(main)
