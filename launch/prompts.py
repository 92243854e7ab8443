"""Prepares human speech from Debian packages: the human test (digits), and other languages to stay silent at.

    python -m launch.prompts --out=data/human

writes three data sets, `digits` (English, zero to nine, never for training), `silence-train` and
`silence-heldout` (French, Italian and Russian), each with its licence files.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from absl import app, flags

from data_pipelines import prompts
from data_pipelines.generate import SessionTask, generate
from launch.app import output_folder, run_app
from launch.progress import Progress

FLAGS = flags.FLAGS
flags.DEFINE_string("out", None, "Directory for the data sets.")
flags.DEFINE_string("cache", "~/.cache/tml", "Where downloaded packages are unpacked.")
flags.DEFINE_multi_enum(
    "sets", ["digits", "silence"], ["digits", "silence"], "What to write; repeat the flag for both."
)
flags.DEFINE_integer("num_digits", 200, "Sessions of digits, ten recordings in turn.", lower_bound=1)
flags.DEFINE_integer("num_silence", 600, "Training sessions to stay silent at.", lower_bound=1)
flags.DEFINE_integer("num_silence_heldout", 60, "Held-out sessions to stay silent at.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Everything random follows from it.", lower_bound=0)
flags.DEFINE_integer("num_workers", 2, "Processes.", lower_bound=1)
flags.DEFINE_bool("overwrite", False, "Replace data sets that are there.")


def _write(name: str, task: SessionTask, split: str, count: int, meta: Mapping[str, str], licences: dict) -> None:
    progress = Progress(name, "sessions")
    summary = generate(
        Path(FLAGS.out) / name,
        task,
        name=name,
        split=split,
        num_sessions=count,
        num_shards=1 if count < 400 else 4,
        num_workers=FLAGS.num_workers,
        meta={"split": split, "seed": str(FLAGS.seed), **meta},
        attachments=licences,
        overwrite=FLAGS.overwrite,
        progress=lambda done: progress(done, count),
    )
    counts = ", ".join(f"{tag} {number}" for tag, number in sorted(summary.tags.items()))
    print(f"{name}: {summary.sessions} sessions, {summary.audio_s / 60:.1f} min, {counts}, {summary.wall_s:.1f} s")


def main(_: list[str]) -> int:
    """Fetches the packages, writes the data sets and prints what is in them."""
    if not FLAGS.out:
        raise app.UsageError("--out names the directory for the data sets")
    output_folder("out", FLAGS.out)
    cache = Path(FLAGS.cache).expanduser().absolute()
    for name in FLAGS.sets:
        {"digits": _write_digits, "silence": _write_silence}[name](cache)
    return 0


def _write_digits(cache: Path) -> None:
    digits = prompts.HumanDigitTask(seed=FLAGS.seed, cache=cache)
    meta = {
        "task": "human digits",
        "recordings": str(len(prompts.digit_prompts(cache))),
        "settings": _settings(digits),
        "licence": prompts.LICENCES["en"],
    }
    _write("digits", digits, "heldout", FLAGS.num_digits, meta, prompts.licences("en", cache))


def _write_silence(cache: Path) -> None:
    silence = prompts.HumanSilenceTask(seed=FLAGS.seed, cache=cache)
    licences = {
        name: data for language in silence.languages for name, data in prompts.licences(language, cache).items()
    }
    for split, count in (("train", FLAGS.num_silence), ("heldout", FLAGS.num_silence_heldout)):
        meta = {
            "task": "human silence",
            "recordings": str(sum(len(prompts.silence_prompts(name, split, cache)) for name in silence.languages)),
            "settings": _settings(silence),
            "licence": "; ".join(f"{language}: {prompts.LICENCES[language]}" for language in silence.languages),
        }
        _write(f"silence-{split}", silence, split, count, meta, licences)


def _settings(task: prompts.HumanDigitTask | prompts.HumanSilenceTask) -> str:
    return json.dumps(dataclasses.asdict(task.config))


if __name__ == "__main__":
    run_app(main)
