"""A Session as messages of a chat: what happened when, as text, and the sound and the pictures themselves.

Content parts as in the OpenAI API reference, chat completions: `text`, `input_audio` (wav), `image_url` (data URL).
"""

import base64
import enum
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import soundfile

from tml.codec.waveform import decode_clip
from tml.microturn import Clock
from tml.session import AudioClip, Session, Stream, VideoFrame
from tml.timeline import timeline_text

Part = dict[str, Any]


class Media(enum.StrEnum):
    """What of a session an endpoint can take beside text."""

    SOUND = "sound"
    FRAMES = "frames"


_SPEAKERS = {
    Stream.USER_AUDIO: "What the user said, from 0.0 s on:",
    Stream.OWN_AUDIO: "What the assistant said, on the same clock:",
}
_PNG = b"\x89PNG"


def content_of(session: Session, clock: Clock, media: Sequence[Media], max_frames: int) -> list[Part]:
    """The whole conversation as the content of one message.

    Args:
        session: the conversation.
        clock: of its micro-turns, by which the transcript is cut.
        media: what beside text goes with it.
        max_frames: pictures at most, spread evenly; the last one is always among them.
    """
    happened = timeline_text(replace(session, expectations=()), clock)
    parts: list[Part] = [_text(f"The conversation so far:\n{happened}")]
    if Media.SOUND in media:
        for stream, clip in session.audio.items():
            parts += [_text(_SPEAKERS[stream]), _sound(clip, session.sample_rate_hz)]
    if Media.FRAMES in media:
        if len(session.frames) > max_frames:
            parts.append(_text(f"Of {len(session.frames)} pictures these are {max_frames}, spread evenly."))
        for frame in _spread(session.frames, max_frames):
            parts += [_text(f"What was seen at {frame.sample / session.sample_rate_hz:.1f} s:"), _picture(frame)]
    return parts


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _sound(clip: AudioClip, sample_rate_hz: int) -> Part:
    file = io.BytesIO()
    soundfile.write(file, decode_clip(clip, sample_rate_hz), sample_rate_hz, format="WAV", subtype="PCM_16")
    return {"type": "input_audio", "input_audio": {"data": _base64(file.getvalue()), "format": "wav"}}


def _picture(frame: VideoFrame) -> Part:
    kind = "png" if frame.data.startswith(_PNG) else "jpeg"
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{_base64(frame.data)}"}}


def _spread(frames: Sequence[VideoFrame], most: int) -> Iterator[VideoFrame]:
    count = min(most, len(frames))
    places = np.linspace(len(frames) - 1, 0, count).round().astype(int)[::-1].tolist()
    return (frames[place] for place in places)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
