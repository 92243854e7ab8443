import dataclasses

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tml.session import (
    AUDIO_STREAMS,
    TEXT_STREAMS,
    AudioClip,
    AudioEncoding,
    Expectation,
    ExpectationKind,
    Session,
    SessionError,
    Stream,
    TextEvent,
    VideoFrame,
    Word,
    session_from_bytes,
    session_to_bytes,
)

NUM_SAMPLES = 16_000


def clip(length: int = NUM_SAMPLES) -> AudioClip:
    return AudioClip(encoding=AudioEncoding.PCM16, data=bytes(range(256)) * (length // 128), num_samples=length)


def event(stream: Stream, start: int, end: int, text: str = "seven") -> TextEvent:
    return TextEvent(stream=stream, start=start, end=end, text=text)


WHOLE = Session(
    session_id="a/1",
    sample_rate_hz=16_000,
    num_samples=NUM_SAMPLES,
    streams=tuple(Stream),
    audio={Stream.USER_AUDIO: clip(), Stream.OWN_AUDIO: clip()},
    texts=(
        event(Stream.SYSTEM, 0, 0, "be brief"),
        event(Stream.USER_TEXT, 10, 10, "naïve \U0001f680"),
        event(Stream.BACKGROUND, 4_000, 4_000, ""),
        event(Stream.OWN_TEXT, 5_000, 9_000),
        event(Stream.ACTION, 6_000, 6_000, '{"tool": "look up"}'),
        event(Stream.OWN_TEXT, NUM_SAMPLES - 1, NUM_SAMPLES),
    ),
    frames=(VideoFrame(sample=0, data=b"\x89PNG"), VideoFrame(sample=NUM_SAMPLES - 1, data=b"")),
    user_words=(Word(text="say", start=0, end=9), Word(text="sept", start=9, end=NUM_SAMPLES)),
    expectations=(
        Expectation(kind=ExpectationKind.ANSWER, start=0, end=NUM_SAMPLES, text="seven", tag="digit"),
        Expectation(kind=ExpectationKind.SILENCE, start=3, end=3),
    ),
    meta={"speaker": "en+f3", "licence": "CC0"},
)


def test_all_eight_streams_come_back():
    assert len(set(WHOLE.streams)) == 8
    assert session_from_bytes(session_to_bytes(WHOLE)) == WHOLE


def sessions():
    length = st.integers(1, 2**40)

    @st.composite
    def build(draw):
        num_samples = draw(length)
        inside = st.integers(0, num_samples - 1)

        def text_event(stream):
            start = draw(inside)
            return event(stream, start, draw(st.integers(start, num_samples)), draw(st.text(max_size=5)))

        streams = draw(st.lists(st.sampled_from(list(Stream)), unique=True))
        texts = [
            text_event(stream) for stream in streams if stream in TEXT_STREAMS for _ in range(draw(st.integers(1, 3)))
        ]
        frames = [
            VideoFrame(sample=sample, data=draw(st.binary(max_size=4)))
            for sample in (sorted(draw(st.lists(inside, min_size=1, max_size=3))) if Stream.VIDEO in streams else [])
        ]
        return {
            "session_id": draw(st.text(max_size=5)),
            "sample_rate_hz": draw(st.integers(1, 192_000)),
            "num_samples": num_samples,
            "streams": tuple(streams),
            "audio": {
                stream: AudioClip(
                    encoding=draw(st.sampled_from(list(AudioEncoding))),
                    data=draw(st.binary(max_size=9)),
                    num_samples=num_samples,
                )
                for stream in streams
                if stream in AUDIO_STREAMS
            },
            "texts": tuple(sorted(texts, key=lambda item: item.start)),
            "frames": tuple(frames),
            "user_words": tuple(
                Word(
                    text=draw(st.text("abc", min_size=1, max_size=3)),
                    start=start,
                    end=draw(st.integers(start, num_samples)),
                )
                for start in (sorted(draw(st.lists(inside, max_size=3))) if Stream.USER_AUDIO in streams else [])
            ),
            "meta": draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2)),
        }

    return build()


@settings(deadline=None, max_examples=80)
@given(values=sessions())
def test_every_consistent_session_comes_back(values):
    session = Session(**values)
    assert session_from_bytes(session_to_bytes(session)) == session


@pytest.mark.parametrize("stream", list(Stream))
def test_a_promise_that_is_not_kept_is_an_error_both_ways(stream):
    lacking = dataclasses.replace(
        WHOLE,
        audio={key: value for key, value in WHOLE.audio.items() if key is not stream},
        texts=tuple(item for item in WHOLE.texts if item.stream is not stream),
        frames=() if stream is Stream.VIDEO else WHOLE.frames,
        user_words=() if stream is Stream.USER_AUDIO else WHOLE.user_words,
    )
    with pytest.raises(SessionError, match=rf"session a/1 promises \['{stream.value}'\]"):
        session_to_bytes(lacking)
    body = msgpack.unpackb(session_to_bytes(dataclasses.replace(lacking, streams=tuple({*Stream} - {stream}))))
    body["streams"].append(stream.value)
    with pytest.raises(SessionError, match=f"promises .*{stream.value}"):
        session_from_bytes(msgpack.packb(body))


@pytest.mark.parametrize("stream", list(Stream))
def test_a_stream_that_is_not_promised_is_an_error(stream):
    with pytest.raises(SessionError, match=f"holds .*{stream.value}.*promises only"):
        session_to_bytes(dataclasses.replace(WHOLE, streams=tuple({*Stream} - {stream})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": {Stream.USER_AUDIO: clip(8_000), Stream.OWN_AUDIO: clip()}}, "user_audio has 8000.*16000"),
        ({"texts": (event(Stream.USER_TEXT, 5, 4),)}, r"\[5, 4\) lies outside"),
        ({"texts": (event(Stream.USER_TEXT, -1, 4),)}, r"\[-1, 4\) lies outside"),
        ({"texts": (event(Stream.USER_TEXT, 4, NUM_SAMPLES + 1),)}, "lies outside"),
        ({"texts": (event(Stream.USER_TEXT, NUM_SAMPLES, NUM_SAMPLES),)}, "lies outside"),
        ({"texts": (event(Stream.USER_TEXT, 9, 9), event(Stream.USER_TEXT, 8, 8))}, "texts are not ordered"),
        ({"frames": (VideoFrame(sample=NUM_SAMPLES, data=b""),)}, "video frame at sample 16000"),
        ({"frames": (VideoFrame(sample=2, data=b""), VideoFrame(sample=1, data=b""))}, "frames are not ordered"),
        ({"texts": (event(Stream.VIDEO, 0, 0),)}, "video is not a stream of text"),
        ({"user_words": (Word(text="a", start=5, end=4),)}, r"the user's 'a' at \[5, 4\) lies outside"),
        (
            {"user_words": (Word(text="a", start=5, end=6), Word(text="b", start=4, end=6))},
            "words of the user are not o",
        ),
        ({"user_words": (Word(text=" ", start=5, end=6),)}, r"the user's word at \[5, 6\) is blank"),
        ({"audio": {Stream.OWN_AUDIO: clip()}}, "has words of the user, but no user_audio"),
        ({"audio": {Stream.SYSTEM: clip()}}, "system is not a stream of sound"),
        ({"expectations": (Expectation(kind=ExpectationKind.SILENCE, start=0, end=NUM_SAMPLES + 1),)}, "expectation"),
        ({"num_samples": 0}, "0 samples at 16000 Hz"),
        ({"sample_rate_hz": 0}, "16000 samples at 0 Hz"),
    ],
)
def test_what_does_not_fit_together_is_an_error(change, message):
    session = dataclasses.replace(WHOLE, **change)
    session = dataclasses.replace(
        session,
        streams=tuple(
            {*session.audio, *(item.stream for item in session.texts), *([Stream.VIDEO] * bool(session.frames))}
        ),
    )
    with pytest.raises(SessionError, match=message):
        session_to_bytes(session)


def test_another_version_says_so():
    body = msgpack.unpackb(session_to_bytes(WHOLE))
    with pytest.raises(SessionError, match="schema 7, this code reads 2; prepare the data again"):
        session_from_bytes(msgpack.packb({**body, "schema": 7}))
    with pytest.raises(SessionError, match="no schema version"):
        session_from_bytes(msgpack.packb({"session_id": "x"}))
    with pytest.raises(SessionError, match="no schema version"):
        session_from_bytes(msgpack.packb([1, 2]))


@pytest.mark.parametrize("cut", [0, 1, 10, 1_000, -1])
def test_a_cut_record_is_an_error(cut):
    with pytest.raises(SessionError):
        session_from_bytes(session_to_bytes(WHOLE)[:cut])


def test_bytes_after_the_record_are_an_error():
    with pytest.raises(SessionError, match="not msgpack"):
        session_from_bytes(session_to_bytes(WHOLE) + b"\x00")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("session_id",), 3),
        (("num_samples",), "many"),
        (("num_samples",), None),
        (("sample_rate_hz",), 16_000.5),
        (("streams",), 4),
        (("streams", 0), "smell"),
        (("audio",), [1]),
        (("audio", "user_audio"), b"raw"),
        (("audio", "user_audio", "encoding"), "pcm17"),
        (("audio", "user_audio", "data"), "text"),
        (("audio", "user_audio", "num_samples"), True),
        (("texts",), None),
        (("texts", 0), {}),
        (("texts", 0, "start"), "0"),
        (("texts", 0, "extra"), 1),
        (("texts", 0, "text"), b"bytes"),
        (("frames", 0, "sample"), [0]),
        (("expectations", 0, "kind"), 1),
        (("user_words", 0, "start"), "0"),
        (("meta",), ["speaker"]),
        (("meta", "speaker"), 1),
    ],
)
def test_a_value_of_the_wrong_kind_is_an_error(path, value):
    body = msgpack.unpackb(session_to_bytes(WHOLE))
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(SessionError, match="does not hold a session of schema 2"):
        session_from_bytes(msgpack.packb(body))


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Session)])
def test_a_missing_field_is_an_error(key):
    body = msgpack.unpackb(session_to_bytes(WHOLE))
    del body[key]
    with pytest.raises(SessionError, match=key):
        session_from_bytes(msgpack.packb(body))


SMALL = session_to_bytes(
    dataclasses.replace(
        WHOLE,
        num_samples=4,
        audio={stream: clip(4) for stream in AUDIO_STREAMS},
        texts=(*(event(stream, 0, 4) for stream in TEXT_STREAMS),),
        frames=(VideoFrame(sample=1, data=b"\x89PNG"),),
        user_words=(Word(text="say", start=0, end=4),),
        expectations=(),
    )
)


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_damaged_bytes_are_a_session_or_a_session_error(data):
    damaged = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        session = session_from_bytes(bytes(damaged))
    except SessionError:
        return
    session.check()


@given(data=st.binary(max_size=80))
def test_any_bytes_are_a_session_error(data):
    with pytest.raises(SessionError):
        session_from_bytes(data)


def test_texts_of_keeps_the_order():
    assert [item.start for item in WHOLE.texts_of(Stream.OWN_TEXT)] == [5_000, NUM_SAMPLES - 1]
    assert WHOLE.duration_s == 1.0
