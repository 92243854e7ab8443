"""The Session: everything that was heard, seen, read, written and said, as typed events on one sample clock.

Nothing here is cut to micro-turns; a session is the canonical record on disk (one ArrayRecord
entry: a msgpack header and packed bytes) and the thing a live conversation grows.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import msgpack

SCHEMA_VERSION = 2


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


AUDIO_STREAMS = (Stream.USER_AUDIO, Stream.OWN_AUDIO)
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


@dataclass(frozen=True, kw_only=True)
class Word:
    """A word that is heard (or several that run together), and the samples it takes, [start, end)."""

    text: str
    start: int
    end: int


class Behaviour(enum.StrEnum):
    """What a session teaches and tests; `meta["behaviour"]` of a session that was made for one."""

    TURN_TAKING = "turn_taking"
    PAUSE_HANDLING = "pause_handling"
    INTERRUPTION = "interruption"
    BACKCHANNEL = "backchannel"
    TIMED = "timed"
    CUED = "cued"
    COUNTING = "counting"
    PROACTIVE = "proactive"
    SIMULTANEOUS = "simultaneous"
    TONE = "tone"
    DELEGATION = "delegation"
    TOOLS = "tools"


class ExpectationKind(enum.StrEnum):
    """What the evaluation expects in a span of a session.

    Times are those at which the model emits (`tml.microturn`), words and actions alike.
    """

    ANSWER = "answer"
    """`text` should be said in the window that opens at `end`, where the request ends."""
    SILENCE = "silence"
    """Nothing should be said in [start, end): a pause, or speech that asks for nothing."""
    SAY = "say"
    """`text` should be said in (start, end], where `start` is what it is due after: a time, a cue, an event."""
    COUNT = "count"
    """The last number said in (start, end] should be `text`, a word, or next to it."""
    NOD = "nod"
    """One of the words of `text`, and no more than two words in all, should be said in (start, end]."""
    STOP = "stop"
    """The model, which speaks at `start`, should fall silent soon after it and stay so until `end`."""
    GO_ON = "go_on"
    """Own speech should go on through [start, end) without a gap."""
    ACTION = "action"
    """`text`, a call in JSON with `name` and `arguments`, should be made in (start, end]."""
    NO_ACTION = "no_action"
    """Nothing should be called in [start, end)."""


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
        user_words: what is said on `user_audio`, as far as it is known, ordered by start; never an input.
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
    user_words: tuple[Word, ...] = ()
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
        """Raises SessionError when a promised stream is absent, or something lies outside the session or unordered."""
        name, length = f"session {self.session_id}", self.num_samples
        if self.sample_rate_hz <= 0 or length <= 0:
            raise SessionError(f"{name} has {length} samples at {self.sample_rate_hz} Hz; both must be greater than 0")
        for stream in self.audio:
            if stream not in AUDIO_STREAMS:
                raise SessionError(f"{name}: {stream.value} is not a stream of sound")
        for event in self.texts:
            if event.stream not in TEXT_STREAMS:
                raise SessionError(f"{name}: {event.stream.value} is not a stream of text, but holds {event.text!r}")
        present = {*self.audio, *(event.stream for event in self.texts)} | ({Stream.VIDEO} if self.frames else set())
        missing = [stream.value for stream in self.streams if stream not in present]
        if missing:
            raise SessionError(f"{name} promises {missing} but holds {_names(present)}")
        extra = [stream for stream in present if stream not in self.streams]
        if extra:
            raise SessionError(f"{name} holds {_names(extra)}, but promises only {_names(self.streams)}")
        for stream, clip in self.audio.items():
            if clip.num_samples != length:
                raise SessionError(f"{name}: {stream.value} has {clip.num_samples} samples, the session {length}")
        self._check_times(name, length)

    def _check_times(self, name: str, length: int) -> None:
        for event in self.texts:
            if not 0 <= event.start <= event.end <= length or event.start == length:
                raise SessionError(
                    f"{name}: {event.stream.value} event {event.text!r} at [{event.start}, {event.end}) "
                    f"lies outside [0, {length})"
                )
        for frame in self.frames:
            if not 0 <= frame.sample < length:
                raise SessionError(f"{name}: a video frame at sample {frame.sample} lies outside [0, {length})")
        if self.user_words and Stream.USER_AUDIO not in self.audio:
            raise SessionError(f"{name} has words of the user, but no {Stream.USER_AUDIO.value} in which to hear them")
        for word in self.user_words:
            if not word.text.strip():
                raise SessionError(f"{name}: the user's word at [{word.start}, {word.end}) is blank")
            if not 0 <= word.start <= word.end <= length:
                raise SessionError(
                    f"{name}: the user's {word.text!r} at [{word.start}, {word.end}) lies outside [0, {length})"
                )
        for item in self.expectations:
            if not 0 <= item.start <= item.end <= length:
                raise SessionError(f"{name}: an expectation at [{item.start}, {item.end}) lies outside [0, {length})")
        for what, times in (
            ("texts", [event.start for event in self.texts]),
            ("frames", [frame.sample for frame in self.frames]),
            ("words of the user", [word.start for word in self.user_words]),
        ):
            if times != sorted(times):
                raise SessionError(f"{name}: its {what} are not ordered by time")


def session_to_bytes(session: Session) -> bytes:
    """One session as bytes: a msgpack map whose long values are raw bytes. Raises SessionError if inconsistent."""
    session.check()
    body = {f.name: _plain(getattr(session, f.name)) for f in fields(session)}
    return msgpack.packb({"schema": SCHEMA_VERSION, **body}, use_bin_type=True)


def session_from_bytes(data: bytes) -> Session:
    """Reads what `session_to_bytes` wrote.

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
            session_id=_checked(body["session_id"], str),
            sample_rate_hz=_checked(body["sample_rate_hz"], int),
            num_samples=_checked(body["num_samples"], int),
            streams=tuple(Stream(name) for name in body["streams"]),
            audio={Stream(name): _build(AudioClip, clip) for name, clip in body["audio"].items()},
            texts=tuple(_build(TextEvent, event) for event in body["texts"]),
            frames=tuple(_build(VideoFrame, frame) for frame in body["frames"]),
            user_words=tuple(_build(Word, word) for word in body["user_words"]),
            expectations=tuple(_build(Expectation, item) for item in body["expectations"]),
            meta={_checked(key, str): _checked(value, str) for key, value in body["meta"].items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SessionError(f"the record does not hold a session of schema {SCHEMA_VERSION}: {error!r}") from error
    session.check()
    return session


_FIELD_TYPES: dict[type, dict[str, Any]] = {
    kind: {f.name: f.type for f in fields(kind)} for kind in (AudioClip, TextEvent, Word, VideoFrame, Expectation)
}


Part = TypeVar("Part", AudioClip, TextEvent, Word, VideoFrame, Expectation)


def _build(kind: type[Part], values: Mapping[str, Any]) -> Part:
    """One part of a session from the plain values of its fields, each of which must have the right type."""
    types = _FIELD_TYPES[kind]
    if values.keys() != types.keys():
        raise ValueError(f"{kind.__name__} needs {sorted(types)}, not {sorted(values)}")
    return kind(
        **{
            name: of(values[name]) if issubclass(of, enum.Enum) else _checked(values[name], of)
            for name, of in types.items()
        }
    )


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.80} is {type(value).__name__}, not {kind.__name__}")
    return value


def _names(streams: Iterable[Stream]) -> list[str]:
    return sorted(stream.value for stream in streams)


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
