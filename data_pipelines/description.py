"""What is in a data set: hours, streams, speakers, tokens, and what cannot be read."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines.documents import read_document
from data_pipelines.encoded import QUARANTINE_NAME, Quarantined, read_quarantine
from data_pipelines.records import Manifest, RecordError, RecordKind, RecordSource, read_session
from tml.codec.text import Tokenizer
from tml.config import AudioConfig
from tml.session import Session, Stream

SPEAKER_KEYS = ("speaker", "voice")
"""Keys of `Session.meta` that name who speaks, best first."""
_SHOWN = 5


@dataclass(kw_only=True)
class Description:
    """Counts over one data set, filled record by record.

    Attributes:
        manifest: what the data set says of itself.
        duration_s: length of all sessions.
        in_stream: sessions that hold each stream.
        sound_s: seconds of sound by stream.
        events: text events, or video frames, by stream; documents under "document".
        tokens: tokens of text, and frames of sound, by stream; empty without a tokenizer.
        speakers: sessions by speaker.
        unreadable: records that cannot be read.
        quarantined: what each set of encoded records could not encode, by directory name.
    """

    manifest: Manifest
    duration_s: float = 0.0
    in_stream: Counter[str] = field(default_factory=Counter)
    sound_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    events: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    speakers: Counter[str] = field(default_factory=Counter)
    unreadable: list[Quarantined] = field(default_factory=list)
    quarantined: dict[str, list[Quarantined]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The description for the screen."""
        manifest = self.manifest
        lines = [f"{manifest.name}: {manifest.num_records} {manifest.kind.value} in {len(manifest.shards)} shards"]
        lines += [f"  {key}: {value}" for key, value in manifest.meta.items()]
        if manifest.kind is RecordKind.SESSIONS:
            lines.append(f"length: {self.duration_s / 3600:.2f} h")
            lines += [self._stream_line(stream) for stream in Stream if self.in_stream[stream.value]]
            lines.append(self._speakers_line())
        else:
            lines.append(f"documents: {self.events['document']} characters{self._tokens('document')}")
        lines.append(f"unreadable: {len(self.unreadable)} records")
        lines += _listed(self.unreadable)
        for name, entries in self.quarantined.items():
            lines.append(f"quarantined in {name}: {len(entries)} records")
            lines += _listed(entries)
        return lines

    def _stream_line(self, stream: Stream) -> str:
        name = stream.value
        facts = [f"{self.in_stream[name]} sessions"]
        if self.sound_s[name]:
            facts.append(f"{self.sound_s[name] / 3600:.2f} h of sound")
        if self.events[name]:
            facts.append(f"{self.events[name]} {'frames' if stream is Stream.VIDEO else 'events'}")
        return f"stream {name}: {', '.join(facts)}{self._tokens(name)}"

    def _tokens(self, name: str) -> str:
        return f", {self.tokens[name]} tokens" if name in self.tokens else ""

    def _speakers_line(self) -> str:
        if not self.speakers:
            return f"speakers: unknown (no meta {' or '.join(SPEAKER_KEYS)})"
        most = ", ".join(f"{name} ({count})" for name, count in self.speakers.most_common(_SHOWN))
        return f"speakers: {len(self.speakers)}; most sessions: {most}"


def _listed(entries: list[Quarantined]) -> list[str]:
    lines = [f"  {entry.file}, record {entry.record}: {entry.reason}" for entry in entries[:_SHOWN]]
    return lines + ([f"  and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else [])


def describe(
    directory: Path | str,
    tokenizer: Tokenizer | None = None,
    audio: AudioConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Description:
    """Reads a whole data set of sessions or documents and counts what is in it.

    Args:
        tokenizer: counts tokens of text too.
        audio: counts frames of the user's sound as tokens too.
        progress: called with the records read and their number, now and then.

    Raises:
        FileNotFoundError: no data set there.
        ValueError: it holds encoded records.
    """
    source = RecordSource(directory)
    if source.manifest.kind is RecordKind.ENCODED:
        raise ValueError(f"{directory} holds encoded records; name the data set that they were made from")
    found = Description(manifest=source.manifest)
    for index in range(len(source)):
        try:
            if source.manifest.kind is RecordKind.SESSIONS:
                _count_session(found, read_session(source, index), tokenizer, audio)
            else:
                _count_text(found, "document", read_document(source, index).text, tokenizer)
        except RecordError as error:
            found.unreadable.append(Quarantined.of(index, source, error))
        if progress is not None and (index % 100 == 99 or index + 1 == len(source)):
            progress(index + 1, len(source))
    for path in sorted(Path(directory).glob(f"encoded-*/{QUARANTINE_NAME}")):
        found.quarantined[path.parent.name] = read_quarantine(path.parent)
    return found


def _count_session(
    found: Description, session: Session, tokenizer: Tokenizer | None, audio: AudioConfig | None
) -> None:
    found.duration_s += session.duration_s
    found.in_stream.update(stream.value for stream in session.streams)
    for stream in session.audio:
        found.sound_s[stream.value] += session.duration_s
    if audio is not None and Stream.USER_AUDIO in session.audio:
        frames = math.ceil(session.duration_s * audio.sample_rate_hz / audio.hop_samples)
        found.tokens[Stream.USER_AUDIO.value] += frames
    for event in session.texts:
        found.events[event.stream.value] += 1
        if tokenizer is not None:
            tokens = tokenizer.encode_word if event.stream is Stream.OWN_TEXT else tokenizer.encode
            found.tokens[event.stream.value] += len(tokens(event.text))
    if session.frames:
        found.events[Stream.VIDEO.value] += len(session.frames)
    speaker = next((session.meta[key] for key in SPEAKER_KEYS if session.meta.get(key)), None)
    if speaker is not None:
        found.speakers[speaker] += 1


def _count_text(found: Description, name: str, text: str, tokenizer: Tokenizer | None) -> None:
    found.events[name] += len(text)
    if tokenizer is not None:
        found.tokens[name] += len(tokenizer.encode(text))
