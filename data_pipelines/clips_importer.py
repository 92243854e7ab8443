"""Clips of English speech with transcripts as sessions, their word times found by forced alignment.

    clips/
      one.wav  one.txt          a transcript beside each clip (wav, flac, ogg, opus, mp3)

or a list of transcripts: a `.tsv` or `.csv` whose first line names its columns, or a `.jsonl`, with the
path of the clip in a column `path`, `file`, `file_name`, `audio`, `audio_filepath` or `image`, and its words in
`text`, `transcript`, `transcription`, `sentence` or `caption` (so Common Voice, NeMo and audiofolder lists do).

A clip is the user's speech, or the model's own. One that cannot be aligned gets evenly spread word
times: its meta says so (`alignment` is `forced` or `spread`), and so does the summary.
"""

import csv
import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from data_pipelines.forced_alignment import AlignmentError, ForcedAligner, spread, tokens
from data_pipelines.importing import Failure, files_under
from data_pipelines.speech import SAMPLE_RATE_HZ
from tml.codec.waveform import encode_clip, read_audio
from tml.session import Session, Stream, TextEvent

SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
PATH_COLUMNS = ("path", "file", "file_name", "audio", "audio_filepath", "image")
TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "caption")


class Role(enum.StrEnum):
    """Who speaks in the clips."""

    USER = "user"
    OWN = "own"


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One sound file and what is said in it.

    Attributes:
        clip_id: its path in the folder, without the suffix.
        path: the sound file.
        transcript: as written.
    """

    clip_id: str
    path: Path
    transcript: str


@dataclass(frozen=True, kw_only=True)
class FoundClips:
    """What a folder holds.

    Attributes:
        clips: with their transcripts.
        failures: files without a partner, or named twice.
        unlisted: sound files that the list of transcripts does not name; 0 without a list.
    """

    clips: list[Clip]
    failures: list[Failure]
    unlisted: int = 0


def find_clips(
    source: Path | str, transcripts: Path | str | None = None, suffixes: Sequence[str] = SOUND_SUFFIXES
) -> FoundClips:
    """The clips of a folder with their transcripts, or pictures with their captions.

    Args:
        source: the folder with the sound files.
        transcripts: a list of transcripts, whose paths start from the folder or from where the list lies;
            without it each clip's transcript lies beside it as `.txt`.
        suffixes: of the files that are clips.

    Raises:
        ValueError: there is no such folder or list, or the list cannot be read.
    """
    source = Path(source)
    sounds = files_under(source, suffixes)
    pairs, failures = _beside(source, sounds) if transcripts is None else _listed(Path(transcripts), source)
    clips: dict[str, Clip] = {}
    for path, transcript in pairs:
        name = path.relative_to(source) if path.is_relative_to(source) else path
        clip_id = name.with_name(path.stem).as_posix()
        if clip_id in clips:
            failures.append(Failure(file=str(path), reason=f"{clips[clip_id].path} is a clip of the same name"))
        elif not transcript.strip():
            failures.append(Failure(file=str(path), reason="its transcript is empty"))
        else:
            clips[clip_id] = Clip(clip_id=clip_id, path=path, transcript=" ".join(transcript.split()))
    named = {path.resolve() for path, _ in pairs}
    unlisted = sum(path.resolve() not in named for path in sounds) if transcripts is not None else 0
    return FoundClips(clips=list(clips.values()), failures=failures, unlisted=unlisted)


def read_clip(clip: Clip, aligner: ForcedAligner, *, role: Role = Role.USER, licence: str = "") -> Session:
    """The session of one clip, at 16 kHz; channels are averaged.

    Raises:
        ValueError: the sound cannot be decoded or is silent, or the transcript has no word.
    """
    channels = read_audio(clip.path, SAMPLE_RATE_HZ)
    samples = channels.mean(axis=0, dtype=np.float32)
    wanted = tokens(clip.transcript)
    # Also refuses a clip in which there is nothing to hear, which an aligner would fill with words.
    words, alignment, reason = spread(samples, wanted), "spread", ""
    try:
        words, alignment = aligner.align(samples, wanted), "forced"
    except AlignmentError as error:
        reason = str(error)
    sound = Stream.USER_AUDIO if role is Role.USER else Stream.OWN_AUDIO
    own = [] if role is Role.USER else words
    meta = {
        "maker": "clip",
        "source_file": clip.path.name,
        "source_rate_hz": str(soundfile.info(clip.path).samplerate),
        "source_channels": str(len(channels)),
        "transcript": clip.transcript,
        "alignment": alignment,
        "alignment_fault": reason,
        "licence": licence,
    }
    return Session(
        session_id=clip.clip_id,
        sample_rate_hz=SAMPLE_RATE_HZ,
        num_samples=len(samples),
        streams=(sound, *((Stream.OWN_TEXT,) if own else ())),
        audio={sound: encode_clip(samples, SAMPLE_RATE_HZ)},
        texts=tuple(TextEvent(stream=Stream.OWN_TEXT, start=w.start, end=w.end, text=w.text) for w in own),
        user_words=() if role is Role.OWN else tuple(words),
        meta={key: value for key, value in meta.items() if value},
    )


def _beside(source: Path, sounds: list[Path]) -> tuple[list[tuple[Path, str]], list[Failure]]:
    """Clips with the text beside them, and the files of either kind that are alone."""
    pairs, failures = [], []
    texts = {(path.parent, path.stem): path for path in files_under(source, (".txt",))}
    known = {(path.parent, path.stem) for path in sounds}
    for path in sounds:
        text = texts.get((path.parent, path.stem))
        if text is None:
            failures.append(Failure(file=str(path), reason=f"there is no {path.stem}.txt beside it"))
            continue
        try:
            pairs.append((path, text.read_text(encoding="utf-8-sig")))
        except UnicodeDecodeError as error:
            failures.append(Failure(file=str(text), reason=f"not UTF-8 text: byte {error.start} is {error.reason}"))
    for key, text in texts.items():
        if key not in known:
            failures.append(Failure(file=str(text), reason="there is no clip of its name beside it"))
    return pairs, failures


def _listed(path: Path, source: Path) -> tuple[list[tuple[Path, str]], list[Failure]]:
    """What a list of transcripts names, and the clips of it that are not there."""
    if not path.is_file():
        raise ValueError(f"there is no list of transcripts {path}")
    pairs, failures = [], []
    for number, row in _rows(path):
        name, transcript = (_column(row, columns, f"{path} line {number}") for columns in (PATH_COLUMNS, TEXT_COLUMNS))
        found = next((place / name for place in (source, path.parent) if (place / name).is_file()), None)
        if found is None:
            reason = f"{path.name} line {number} names it, but it is not there"
            failures.append(Failure(file=str(source / name), reason=reason))
        else:
            pairs.append((found, transcript))
    return pairs, failures


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(Line, values by column) of a list."""
    suffix = path.suffix.lower()
    if suffix not in (".tsv", ".csv", ".jsonl"):
        raise ValueError(f"{path} must be a .tsv, .csv or .jsonl")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix == ".csv":
                reader = csv.DictReader(file)
                yield from ((reader.line_num, row) for row in reader)
            elif suffix == ".tsv":
                # A quotation mark in a .tsv is a quotation mark.
                reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
                yield from ((reader.line_num, row) for row in reader)
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        row = json.loads(line)
                        yield number, row if isinstance(row, dict) else {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.reason}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} is not JSON: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} cannot be read: {error}") from error


def _column(row: Mapping[str, object], names: tuple[str, ...], place: str) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(value, str):
        columns = ", ".join(str(name) for name in row if name is not None)
        raise ValueError(f"{place} has no text in a column {', '.join(names)}; its columns are {columns or 'none'}")
    return value
