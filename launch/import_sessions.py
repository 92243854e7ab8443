"""Imports recordings, texts or pictures as a data set: stereo talks with word times, clips with transcripts, documents.

    python -m launch.import_sessions --format=stereo --source=talks --out=data/talks
    python -m launch.import_sessions --format=clips --source=clips --out=data/clips --transcripts=clips/train.tsv
    python -m launch.import_sessions --format=documents --source=books --out=data/books
    python -m launch.import_sessions --format=pictures --source=pictures --out=data/pictures

Documents and pictures with captions are sources of `kind` documents. Of a clip of the user's the model learns the words
that it hears, with loss.heard_weight above 0.

Files that cannot be used are listed with the reason; too many of them (--max_failed_fraction) fail the import.
"""

from pathlib import Path

from absl import app, flags

from data_pipelines import importing
from data_pipelines.clips_importer import Clip, Role, find_clips, read_clip
from data_pipelines.documents import DEFAULT_PIECE_CHARS
from data_pipelines.forced_alignment import ForcedAligner
from data_pipelines.importing import FailedFilesError, ImportSummary
from data_pipelines.stereo_importer import MAIN_SPEAKER, Channel, Recording, find_recordings, read_recording
from launch.app import output_folder, run_app
from launch.progress import Progress

FLAGS = flags.FLAGS
flags.DEFINE_enum("format", None, ["stereo", "clips", "documents", "pictures"], "What is in the folder.")
flags.DEFINE_string("source", None, "Folder with the files.")
flags.DEFINE_string("out", None, "Directory of the new data set.")
flags.DEFINE_string("name", None, "Name of the data set; that of --out if not given.")
flags.DEFINE_string("licence", "", "Under what licence the files are, for the records and the manifest.")
flags.DEFINE_float("max_failed_fraction", importing.DEFAULT_MAX_FAILED_FRACTION, "Files that may fail, of all.")
flags.DEFINE_integer("num_shards", 1, "Files of the data set.", lower_bound=1)
flags.DEFINE_bool("overwrite", False, "Replace a data set that is at --out.")
flags.DEFINE_string("manifest", None, "stereo: a .jsonl of the recordings to import, {path, duration} a line.")
flags.DEFINE_enum("own_channel", "left", [str(channel) for channel in Channel], "stereo: the model's own channel.")
flags.DEFINE_string("main_speaker", MAIN_SPEAKER, "stereo: the label of the model's own words.")
flags.DEFINE_string(
    "transcripts",
    None,
    "clips, pictures: a .tsv, .csv or .jsonl of their words, in place of NAME.txt files.",
)
flags.DEFINE_enum("role", "user", [str(role) for role in Role], "clips: who speaks.")
flags.DEFINE_integer("max_chars", DEFAULT_PIECE_CHARS, "documents: longer ones are cut.", lower_bound=1)

_OWN_FLAGS = {
    "stereo": ("manifest", "own_channel", "main_speaker"),
    "clips": ("transcripts", "role"),
    "documents": ("max_chars",),
    "pictures": ("transcripts",),
}


def _origin() -> dict[str, str]:
    """What the manifest says of the data set."""
    settings = {name: str(FLAGS[name].value) for name in _OWN_FLAGS[FLAGS.format] if FLAGS[name].value is not None}
    licence = {"licence": FLAGS.licence} if FLAGS.licence else {}
    return {"task": f"imported {FLAGS.format}", **settings, **licence}


def _import(name: str) -> tuple[ImportSummary, int]:
    """The summary, and how many files were there that nothing asked for."""
    progress = Progress(name, "files")
    shared = {
        "name": name,
        "num_shards": FLAGS.num_shards,
        "max_failed_fraction": FLAGS.max_failed_fraction,
        "meta": _origin(),
        "overwrite": FLAGS.overwrite,
    }
    if FLAGS.format == "documents":
        summary = importing.import_documents(
            FLAGS.source, FLAGS.out, max_chars=FLAGS.max_chars, progress=progress, **shared
        )
        return summary, 0
    if FLAGS.format == "pictures":
        from data_pipelines.pictures_importer import PICTURE_SUFFIXES, read_picture  # imports jax

        pictures = find_clips(FLAGS.source, FLAGS.transcripts, PICTURE_SUFFIXES)
        summary = importing.import_as_documents(
            pictures.clips,
            read_picture,
            FLAGS.out,
            file_of=lambda picture: str(picture.path),
            failures=pictures.failures,
            progress=progress,
            **shared,
        )
        return summary, pictures.unlisted
    if FLAGS.format == "stereo":
        recordings, failures = find_recordings(FLAGS.source, FLAGS.manifest)

        def read_one(recording: Recording):
            return read_recording(
                recording,
                own_channel=Channel(FLAGS.own_channel),
                main_speaker=FLAGS.main_speaker,
                licence=FLAGS.licence,
            )

        summary = importing.write_sessions(
            FLAGS.out,
            recordings,
            read_one,
            file_of=lambda recording: str(recording.path),
            failures=failures,
            progress=lambda done: progress(done, len(recordings)),
            **shared,
        )
        return summary, 0
    found, aligner = find_clips(FLAGS.source, FLAGS.transcripts), ForcedAligner()

    def read_clip_of(clip: Clip):
        return read_clip(clip, aligner, role=Role(FLAGS.role), licence=FLAGS.licence)

    summary = importing.write_sessions(
        FLAGS.out,
        found.clips,
        read_clip_of,
        file_of=lambda clip: str(clip.path),
        failures=found.failures,
        progress=lambda done: progress(done, len(found.clips)),
        **shared,
    )
    return summary, found.unlisted


def _describe(summary: ImportSummary, unlisted: int) -> str:
    if FLAGS.format in ("documents", "pictures"):
        lines = [f"{FLAGS.out}: {summary.records} records, {summary.wall_s:.1f} s"]
    else:
        lines = [
            f"{FLAGS.out}: {summary.records} sessions, {summary.audio_s / 3600:.3f} h, {summary.own_words} own words, "
            f"{summary.user_words} user words, {summary.wall_s:.1f} s"
        ]
    if summary.alignments:
        forced, spread = summary.alignments["forced"], summary.alignments["spread"]
        lines.append(f"word times: forced alignment in {forced} sessions, evenly spread in {spread}")
    if summary.user_words:
        lines.append("the user's words are learnt, where they end, if loss.heard_weight is above 0 (its default)")
    if unlisted:
        lines.append(f"{unlisted} files are not in {FLAGS.transcripts} and were left alone")
    lines.append(f"{len(summary.failures)} files failed")
    return "\n".join([*lines, *_listed(summary.failures)])


def _listed(failures) -> list[str]:
    return [f"  {failure.file}: {failure.reason}" for failure in failures]


def main(_: list[str]) -> int:
    """Imports and prints what was written and what failed."""
    if not FLAGS.format or not FLAGS.source or not FLAGS.out:
        raise app.UsageError("--format says what is in the folder --source, and --out names the new data set")
    output_folder("out", FLAGS.out)
    for other, names in _OWN_FLAGS.items():
        own = _OWN_FLAGS[FLAGS.format]
        foreign = [f"--{name}" for name in names if name not in own and FLAGS[name].present]
        if foreign:
            raise app.UsageError(f"{', '.join(foreign)} belongs to --format={other}, not {FLAGS.format}")
    try:
        summary, unlisted = _import(FLAGS.name or Path(FLAGS.out).absolute().name)
    except FailedFilesError as error:
        if error.failures:
            print("\n".join(_listed(error.failures)))
        raise
    print(_describe(summary, unlisted))
    return 0


if __name__ == "__main__":
    run_app(main)
