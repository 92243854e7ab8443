"""The Session: everything that was heard, seen, read, written and said, as typed events on one sample clock.

Nothing here is cut to micro-turns; a session is the canonical record on disk (one ArrayRecord
entry: a msgpack header and packed bytes) and the thing a live conversation grows.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import msgpack

SCHEMA_VERSION = 1


class Stream(enum.StrEnum):
    """The eight streams of a session. The first five go in, the last three come out."""

    SYSTEM = "system"
    USER_AUDIO = "user_audio"
    VIDEO = "video"
    USER_TEXT = "user_text"
    BACKGROUND = "background"
    OWN_TEXT = "own_text"
    OWN_AUDIO = "own_audio"
    ACTION = "action"


TEXT_STREAMS = (Stream.SYSTEM, Stream.USER_TEXT, Stream.BACKGROUND, Stream.OWN_TEXT, Stream.ACTION)


class SessionError(ValueError):
    """A record that cannot be read as a session, or that lacks what it promises."""


class AudioEncoding(enum.StrEnum):
    """How the bytes of a clip hold its samples."""

    PCM16 = "pcm16"
    """Little-endian signed 16-bit samples."""
    FILE = "file"
    """A whole file that libsndfile reads: flac, ogg, mp3, wav."""


@dataclass(frozen=True, kw_only=True)
class AudioClip:
    """Mono sound that starts at sample 0 of the session."""

    encoding: AudioEncoding
    data: bytes
    num_samples: int
    """Length on the session's clock."""


@dataclass(frozen=True, kw_only=True)
class VideoFrame:
    """One encoded picture (PNG or JPEG) and the sample at which it was taken."""

    sample: int
    data: bytes


@dataclass(frozen=True, kw_only=True)
class TextEvent:
    """Text on a stream. For `own_text` one word; for `action` a JSON payload."""

    stream: Stream
    start: int
    """First sample."""
    end: int
    """One past the last sample; equal to `start` for typed text."""
    text: str


class ExpectationKind(enum.StrEnum):
    """What the evaluation expects in a span of a session."""

    ANSWER = "answer"
    """`text` should be said in the window that opens at `end`, where the request ends."""
    SILENCE = "silence"
    """Nothing should be said in [start, end): a pause, or speech that asks for nothing."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the evaluation expects of the model, on the session's clock; never an input of the model."""

    kind: ExpectationKind
    start: int
    end: int
    text: str = ""
    tag: str = ""
    """The task or request type that produced it, for breakdowns."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One recording of an interaction.

    Attributes:
        session_id: unique within its data set.
        sample_rate_hz: the clock of every `sample`, `start`, `end` below.
        num_samples: length of the session.
        streams: the streams this session promises; a promised stream that is missing is an error.
        audio: sound by stream (`user_audio`, `own_audio`).
        texts: text events, ordered by start.
        frames: video frames, ordered by sample.
        expectations: what evaluation checks.
        meta: strings about origin: speaker, licence, generator, seed.
    """

    session_id: str
    sample_rate_hz: int
    num_samples: int
    streams: tuple[Stream, ...]
    audio: Mapping[Stream, AudioClip] = field(default_factory=dict)
    texts: tuple[TextEvent, ...] = ()
    frames: tuple[VideoFrame, ...] = ()
    expectations: tuple[Expectation, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.num_samples / self.sample_rate_hz

    def texts_of(self, stream: Stream) -> tuple[TextEvent, ...]:
        """The events of one text stream, in order."""
        return tuple(event for event in self.texts if event.stream is stream)

    def check(self) -> None:
        """Raises SessionError when a promised stream is absent or an event lies outside the session."""
        present = {*self.audio, *(event.stream for event in self.texts)} | ({Stream.VIDEO} if self.frames else set())
        missing = [stream.value for stream in self.streams if stream not in present]
        if missing:
            raise SessionError(f"session {self.session_id} promises {missing} but holds {sorted(present)}")
        extra = [stream.value for stream in sorted(present) if stream not in self.streams]
        if extra:
            raise SessionError(f"session {self.session_id} holds {extra}, which its streams {self.streams} do not name")
        for stream, clip in self.audio.items():
            if clip.num_samples != self.num_samples:
                raise SessionError(
                    f"session {self.session_id}: {stream.value} has {clip.num_samples} samples, "
                    f"the session {self.num_samples}"
                )
        for event in self.texts:
            if not 0 <= event.start <= event.end <= self.num_samples:
                raise SessionError(
                    f"session {self.session_id}: {event.stream.value} event {event.text!r} at "
                    f"[{event.start}, {event.end}) lies outside [0, {self.num_samples})"
                )


def encode_session(session: Session) -> bytes:
    """One session as bytes: a msgpack map whose long values are raw bytes. Raises SessionError if inconsistent."""
    session.check()
    body = {f.name: _plain(getattr(session, f.name)) for f in fields(session)}
    return msgpack.packb({"schema": SCHEMA_VERSION, **body}, use_bin_type=True)


def decode_session(data: bytes) -> Session:
    """Reads what `encode_session` wrote.

    Raises:
        SessionError: not msgpack, another schema version, or a promise not kept.
    """
    try:
        body = msgpack.unpackb(data, raw=False)
    except (msgpack.UnpackException, ValueError) as error:
        raise SessionError(f"a record of {len(data)} bytes is not msgpack: {error}") from error
    if not isinstance(body, dict) or "schema" not in body:
        raise SessionError(f"a record of {len(data)} bytes is not a session: it has no schema version")
    version = body.pop("schema")
    if version != SCHEMA_VERSION:
        raise SessionError(f"the record has schema {version}, this code reads {SCHEMA_VERSION}; prepare the data again")
    try:
        session = Session(
            session_id=body["session_id"],
            sample_rate_hz=body["sample_rate_hz"],
            num_samples=body["num_samples"],
            streams=tuple(Stream(name) for name in body["streams"]),
            audio={
                Stream(name): AudioClip(**{**clip, "encoding": AudioEncoding(clip["encoding"])})
                for name, clip in body["audio"].items()
            },
            texts=tuple(TextEvent(**{**event, "stream": Stream(event["stream"])}) for event in body["texts"]),
            frames=tuple(VideoFrame(**frame) for frame in body["frames"]),
            expectations=tuple(
                Expectation(**{**item, "kind": ExpectationKind(item["kind"])}) for item in body["expectations"]
            ),
            meta=body["meta"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"the record does not hold a session of schema {SCHEMA_VERSION}: {error!r}") from error
    session.check()
    return session


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return value
