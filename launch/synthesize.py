"""Makes a data set of synthetic sessions: spoken requests, conversations of two, or the behaviours of duplex speech.

    python -m launch.synthesize --task=requests --out=data/requests-train --num_sessions=6000
    python -m launch.synthesize --task=counting --out=data/counting-heldout --split=heldout --num_sessions=200
    python -m launch.synthesize --task=duplex --out=data/duplex-train --hours=20 --shares=counting:3,tools:0

--task=duplex mixes all behaviours; each of them is a task of its own. The same flags give the same bytes, whatever
--num_workers and --runner are. --runner=beam writes the shards with Apache Beam, on whatever --beam_options names.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from data_pipelines import augment, prompts
from data_pipelines.beam_runner import LOCAL_OPTIONS, generate_with_beam
from data_pipelines.behaviours.cast import PROMPT_LANGUAGES, Axis, BehaviourConfig
from data_pipelines.behaviours.task import DEFAULT_SHARES, BehaviourTask
from data_pipelines.dialogue import DialogueTask
from data_pipelines.generate import GenerateSummary, generate, sessions_for, shards_for
from data_pipelines.request_session import PACES, SPLITS
from data_pipelines.request_task import RequestTask
from data_pipelines.voices import MAKERS, draw_speaker, licences
from launch.app import output_folder, run_app
from launch.progress import Progress
from tml.session import Behaviour

FLAGS = flags.FLAGS
flags.DEFINE_enum(
    "task", "requests", ["requests", "dialogue", "duplex", *(b.value for b in Behaviour)], "What the sessions are."
)
flags.DEFINE_string("out", None, "Directory of the new data set.")
flags.DEFINE_integer("num_sessions", 6000, "Sessions to make.", lower_bound=1)
flags.DEFINE_float("hours", None, "Hours of sessions to make, about, in place of --num_sessions.", lower_bound=0.001)
flags.DEFINE_enum("split", "train", list(SPLITS), "Voices to use; no voice is in both splits.")
flags.DEFINE_integer("seed", 0, "Everything random follows from it.", lower_bound=0)
flags.DEFINE_integer("num_workers", 2, "Processes.", lower_bound=1)
flags.DEFINE_integer(
    "num_shards", None, "Files of the data set; 8 by default, and more from 32,000 sessions on.", lower_bound=1
)
flags.DEFINE_enum("runner", "processes", ["processes", "beam"], "What writes the shards.")
flags.DEFINE_string("beam_options", " ".join(LOCAL_OPTIONS), "Options of Apache Beam, for --runner=beam.")
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
flags.DEFINE_integer(
    "turn_ms",
    200,
    "The micro-turn (turn.turn_ms of the model) at whose borders answers begin: with a longer one in training they "
    "would be due before what they answer. At most 200 for behaviours.",
    lower_bound=50,
    upper_bound=1000,
)
flags.DEFINE_list(
    "shares",
    [],
    "Behaviours of --task=duplex whose share of the sessions is not as usual, as counting:3,tools:0; usual are "
    + ", ".join(f"{name.value}:{share:g}" for name, share in DEFAULT_SHARES.items()),
)
flags.DEFINE_list(
    "held_out",
    [axis.value for axis in Axis],
    "Of what --split=heldout shows what never trains, in the behaviours; the rest is as in training.",
)
flags.DEFINE_float(
    "human", 0.0, "Share of human speech (prompts from Debian) in what distracts, in the behaviours.", 0.0, 1.0
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


def _task() -> RequestTask | DialogueTask | BehaviourTask:
    unknown = [maker for maker in FLAGS.voices if maker not in MAKERS]
    if unknown or not FLAGS.voices:
        raise app.UsageError(f"--voices={','.join(FLAGS.voices)} must name some of {', '.join(MAKERS)}")
    cache = Path(FLAGS.cache).expanduser().absolute()
    common = {
        "seed": FLAGS.seed,
        "makers": tuple(FLAGS.voices),
        "cache": cache,
        "channel": augment.channel if FLAGS.augment == "channel" else None,
    }
    if FLAGS.pace != "calm" and FLAGS.task != "requests":
        raise app.UsageError(f"--pace={FLAGS.pace} goes with --task=requests; leave it out for --task={FLAGS.task}")
    if FLAGS.shares and FLAGS.task != "duplex":
        raise app.UsageError(f"--shares goes with --task=duplex; leave it out for --task={FLAGS.task}")
    if FLAGS.task not in ("requests", "dialogue"):
        try:
            config = BehaviourConfig(held_out=_held_out(), human_fraction=FLAGS.human, turn_ms=FLAGS.turn_ms)
        except ValueError as error:
            raise app.UsageError(f"--{error}") from error
        if FLAGS.split != "heldout" and FLAGS["held_out"].present:
            raise app.UsageError(f"--held_out goes with --split=heldout; leave it out for --split={FLAGS.split}")
        _refuse_voices(FLAGS.split if Axis.VOICE in config.held_out else "train")
        return BehaviourTask(shares=_shares(), config=config, **common)
    if FLAGS.human or _held_out() != tuple(Axis):
        raise app.UsageError(f"--human and --held_out go with the behaviours; leave them out for --task={FLAGS.task}")
    _refuse_voices(FLAGS.split)
    if FLAGS.task == "requests":
        return RequestTask(config=dataclasses.replace(PACES[FLAGS.pace], turn_ms=FLAGS.turn_ms), **common)
    if FLAGS["turn_ms"].present:
        raise app.UsageError("--turn_ms goes with other tasks; leave it out for --task=dialogue")
    return DialogueTask(**common)


def _refuse_voices(split: str) -> None:
    """Raises ValueError if a maker has no voice in a split, before anything is downloaded."""
    for maker in FLAGS.voices:
        draw_speaker(maker, split, np.random.default_rng(0))


def _held_out() -> tuple[Axis, ...]:
    unknown = sorted({*FLAGS.held_out} - {axis.value for axis in Axis})
    if unknown:
        raise app.UsageError(
            f"--held_out={','.join(unknown)} must name some of {', '.join(axis.value for axis in Axis)}"
        )
    return tuple(axis for axis in Axis if axis.value in FLAGS.held_out)


def _shares() -> dict[Behaviour, float]:
    """The shares of the behaviours: one alone, or the usual mixture with the changes of --shares."""
    if FLAGS.task != "duplex":
        return {Behaviour(FLAGS.task): 1.0}
    shares = dict(DEFAULT_SHARES)
    for item in FLAGS.shares:
        name, _, share = item.partition(":")
        try:
            shares[Behaviour(name)] = float(share)
        except ValueError as error:
            raise app.UsageError(
                f"--shares has {item!r}; write NAME:NUMBER with a name of {', '.join(b.value for b in Behaviour)}"
            ) from error
    return shares


def main(_: list[str]) -> int:
    """Makes the data set and prints what is in it."""
    if not FLAGS.out:
        raise app.UsageError("--out names the directory of the new data set")
    output_folder("out", FLAGS.out)
    if FLAGS.hours is not None and FLAGS["num_sessions"].present:
        raise app.UsageError("--hours and --num_sessions both say how much to make; leave one out")
    task, name = _task(), Path(FLAGS.out).absolute().name
    num_sessions = FLAGS.num_sessions if FLAGS.hours is None else sessions_for(task, FLAGS.split, FLAGS.hours)
    settings = task.settings() if isinstance(task, BehaviourTask) else dataclasses.asdict(task.config)
    common: dict[str, Any] = {
        "name": name,
        "split": FLAGS.split,
        "num_sessions": num_sessions,
        "num_shards": FLAGS.num_shards or shards_for(num_sessions),
        "meta": {
            "task": FLAGS.task,
            "split": FLAGS.split,
            "seed": str(FLAGS.seed),
            "makers": ",".join(FLAGS.voices),
            "augment": FLAGS.augment,
            "settings": json.dumps(settings),
            "licence": LICENCE,
        },
        "attachments": _licences(task),
        "overwrite": FLAGS.overwrite,
    }
    if FLAGS.runner == "beam":
        summary = generate_with_beam(FLAGS.out, task, options=FLAGS.beam_options.split(), **common)
    else:
        progress = Progress(name, "sessions")
        summary = generate(
            FLAGS.out,
            task,
            num_workers=FLAGS.num_workers,
            progress=lambda done: progress(done, num_sessions),
            **common,
        )
    print(_describe(summary, FLAGS.out))
    return 0


def _licences(task: RequestTask | DialogueTask | BehaviourTask) -> dict[str, bytes]:
    found = licences(task.makers, task.cache)
    if FLAGS.human:
        for language in PROMPT_LANGUAGES:
            found |= prompts.licences(language, task.cache)
    return found


if __name__ == "__main__":
    run_app(main)
