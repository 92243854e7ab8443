"""Two-channel recordings with their words as sessions: the layout that moshi-finetune trains on.

    talks/
      talk-1.wav      one channel is the model's own voice, the other the user's
      talk-1.json     {"alignments": [["hello", [0.52, 0.81], "SPEAKER_MAIN"], …]}
      talks.jsonl     optional: {"path": "talk-1.wav", "duration": 61.3} a line

Words of the main speaker become own text with their times; those of any other speaker are the user's.
"""

import enum
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from data_pipelines.importing import Failure, files_under, sample_at
from data_pipelines.speech import SAMPLE_RATE_HZ
from tml.codec.waveform import encode_clip, read_audio
from tml.session import Session, Stream, TextEvent, Word

MAIN_SPEAKER = "SPEAKER_MAIN"
"""The label of the model's own words."""
TIME_TOLERANCE_S = 0.1
"""A word may end this long after the sound does, where it is cut; a duration may be this wrong."""


class Channel(enum.StrEnum):
    """One channel of a stereo file."""

    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One stereo file.

    Attributes:
        recording_id: its path in the folder, without the suffix.
        path: the sound file; the words lie beside it with the suffix `.json`.
        duration_s: as the manifest states it, else None.
    """

    recording_id: str
    path: Path
    duration_s: float | None = None


def find_recordings(source: Path | str, manifest: Path | str | None = None) -> tuple[list[Recording], list[Failure]]:
    """The recordings of a folder, or those that a manifest lists, and the files that have no partner.

    Args:
        source: the folder with the sound files and their words.
        manifest: a `.jsonl` whose paths start from where it lies. With it, only what it lists is imported.

    Raises:
        ValueError: there is no such folder or manifest, or a line of it cannot be read.
    """
    source = Path(source)
    sounds = files_under(source, (".wav",))
    if manifest is not None:
        listed, failures = _read_manifest(Path(manifest), source)
    else:
        listed, failures = [_recording(path, source) for path in sounds], []
        # The stems, not with_suffix: "a.b.wav" lies beside "a.b.json".
        known = {(path.parent, path.stem) for path in sounds}
        for words in files_under(source, (".json",)):
            if (words.parent, words.stem) not in known:
                failures.append(Failure(file=str(words), reason=f"there is no {words.stem}.wav beside it"))
    found = []
    for recording in listed:
        if _words_path(recording).is_file():
            found.append(recording)
        else:
            reason = f"there is no {_words_path(recording).name} beside it"
            failures.append(Failure(file=str(recording.path), reason=reason))
    return found, failures


def read_recording(
    recording: Recording, *, own_channel: Channel = Channel.LEFT, main_speaker: str = MAIN_SPEAKER, licence: str = ""
) -> Session:
    """The session of one recording, at 16 kHz.

    Raises:
        ValueError: the sound cannot be decoded, is not stereo or not as long as promised, or the words do not
            have the layout above or lie outside the sound.
    """
    channels = read_audio(recording.path, SAMPLE_RATE_HZ)
    if len(channels) != 2:
        raise ValueError(f"{recording.path}: has {len(channels)} channel(s), but two are needed: own and user")
    num_samples = channels.shape[1]
    if recording.duration_s is not None:
        actual_s = num_samples / SAMPLE_RATE_HZ
        if not abs(actual_s - recording.duration_s) <= TIME_TOLERANCE_S:
            raise ValueError(
                f"{recording.path}: lasts {actual_s:.3f} s, the manifest says {recording.duration_s:.3f} s"
            )
    own_words, user_words, speakers = _read_words(_words_path(recording), num_samples, main_speaker)
    own, user = (0, 1) if own_channel is Channel.LEFT else (1, 0)
    texts = tuple(TextEvent(stream=Stream.OWN_TEXT, start=w.start, end=w.end, text=w.text) for w in own_words)
    return Session(
        session_id=recording.recording_id,
        sample_rate_hz=SAMPLE_RATE_HZ,
        num_samples=num_samples,
        streams=(Stream.USER_AUDIO, Stream.OWN_AUDIO, *((Stream.OWN_TEXT,) if texts else ())),
        audio={
            Stream.USER_AUDIO: encode_clip(channels[user], SAMPLE_RATE_HZ),
            Stream.OWN_AUDIO: encode_clip(channels[own], SAMPLE_RATE_HZ),
        },
        texts=texts,
        user_words=tuple(user_words),
        meta={
            "maker": "stereo recording",
            "source_file": recording.path.name,
            "source_rate_hz": str(soundfile.info(recording.path).samplerate),
            "speakers": json.dumps(speakers, ensure_ascii=False),
            **({"licence": licence} if licence else {}),
        },
    )


def _words_path(recording: Recording) -> Path:
    return recording.path.with_name(f"{recording.path.stem}.json")


def _recording(path: Path, source: Path, duration_s: float | None = None) -> Recording:
    name = path.relative_to(source) if path.is_relative_to(source) else path
    return Recording(recording_id=name.with_name(path.stem).as_posix(), path=path, duration_s=duration_s)


def _read_manifest(path: Path, source: Path) -> tuple[list[Recording], list[Failure]]:
    if not path.is_file():
        raise ValueError(f"there is no manifest {path}")
    found: dict[Path, Recording] = {}
    failures = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            body = json.loads(line)
            sound, duration_s = path.parent / body["path"], body.get("duration")
            duration_s = None if duration_s is None else float(duration_s)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f'{path} line {number} is not a JSON object with a "path" (and "duration"): {error!r}'
            ) from error
        if not sound.is_file():
            failures.append(Failure(file=str(sound), reason=f"{path.name} line {number} names it, but it is not there"))
        elif sound in found:
            failures.append(Failure(file=str(sound), reason=f"{path.name} line {number} lists it a second time"))
        else:
            found[sound] = _recording(sound, source, duration_s)
    return list(found.values()), failures


def _read_words(path: Path, num_samples: int, main_speaker: str) -> tuple[list[Word], list[Word], Mapping[str, int]]:
    """Own words and the user's, each ordered by start, and the number of words by speaker."""
    try:
        alignments = json.loads(path.read_text(encoding="utf-8"))["alignments"]
        if not isinstance(alignments, list):
            raise TypeError(f"alignments is {type(alignments).__name__}, not a list")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{path.name} is not a JSON object with a list of "alignments": {error!r}') from error
    own: list[Word] = []
    user: list[Word] = []
    speakers: Counter[str] = Counter()
    for number, entry in enumerate(alignments):
        try:
            word, speaker = _word(entry, num_samples)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path.name}, alignment {number} ({json.dumps(entry)!s:.80}): {error}") from error
        speakers.update([speaker])
        (own if speaker == main_speaker else user).append(word)
    if user and not own:
        raise ValueError(
            f"{path.name} has no word of the main speaker {main_speaker}, only of {', '.join(sorted(speakers))}"
        )

    def start_of(word: Word) -> int:
        return word.start

    return sorted(own, key=start_of), sorted(user, key=start_of), speakers


def _word(entry: Any, num_samples: int) -> tuple[Word, str]:
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError("it is not [word, [start_s, end_s], speaker]")
    text, times, speaker = entry
    if not isinstance(text, str) or not isinstance(speaker, str) or not text.strip():
        raise ValueError("the word and the speaker must be strings, and the word not empty")
    if not isinstance(times, list) or len(times) != 2 or not all(type(time) in (int, float) for time in times):
        raise ValueError("the times must be two numbers, in seconds")
    start, end = (sample_at(time, SAMPLE_RATE_HZ) for time in times)
    slack = round(TIME_TOLERANCE_S * SAMPLE_RATE_HZ)
    if not 0 <= start <= end:
        raise ValueError("it must hold that 0 <= start <= end")
    if start >= num_samples or end > num_samples + slack:
        raise ValueError(f"it lies outside the {num_samples / SAMPLE_RATE_HZ:.3f} s of sound")
    return Word(text=text.strip(), start=start, end=min(end, num_samples)), speaker
