"""What a live session has heard, seen, read, said and done so far; a Session can be made of it at any time."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tml.codec.waveform import PCM16_SCALE, encode_clip
from tml.microturn import Clock
from tml.session import Session, Stream, TextEvent, VideoFrame
from tml.stream.own_voice import OwnVoice

SILENT_TURNS = 2
"""Turns that a Session has behind what was heard: one in which its last output is heard, and one after it."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A session up to a moment. Taking one copies references only, so that it costs a turn nothing.

    Attributes:
        clock: of the session.
        heard: the user's sound, piece by piece, in steps of 16 bits.
        texts: text events.
        frames: pictures shown, ordered by sample.
        voice: what was said aloud; None without a voice.
    """

    clock: Clock
    heard: tuple[np.ndarray, ...]
    texts: tuple[TextEvent, ...]
    frames: tuple[VideoFrame, ...]
    voice: OwnVoice | None

    def session(self, session_id: str, meta: Mapping[str, str] | None = None) -> Session:
        """The Session, and `SILENT_TURNS` of silence.

        With a voice it holds own sound where it was heard, the vocoder's delay included. Any thread may call this.
        """
        rate_hz = self.clock.sample_rate_hz
        silence = np.zeros(SILENT_TURNS * self.clock.turn_samples, np.float32)
        samples = np.concatenate([*self.heard, np.zeros(0, np.int16)]).astype(np.float32) / np.float32(PCM16_SCALE)
        samples = np.concatenate([samples, silence])
        texts = tuple(sorted(self.texts, key=lambda event: event.start))
        sounds = {Stream.USER_AUDIO: encode_clip(samples, rate_hz)}
        if self.voice is not None:
            sounds[Stream.OWN_AUDIO] = encode_clip(self.voice.heard(len(samples)), rate_hz)
        seen = (Stream.VIDEO,) if self.frames else ()
        return Session(
            session_id=session_id,
            sample_rate_hz=rate_hz,
            num_samples=len(samples),
            streams=(*sounds, *seen, *dict.fromkeys(event.stream for event in texts)),
            audio=sounds,
            texts=texts,
            frames=self.frames,
            meta=dict(meta or {}),
        )
