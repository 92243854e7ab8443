"""A session through its codecs. Data preparation and evaluation both go through here, so both hear the same."""

import numpy as np

from tml.codec import audio, own_sound, video, waveform
from tml.codec.text import Tokenizer
from tml.config import AudioConfig, ModelConfig, VideoConfig
from tml.microturn import EncodedSession, EncodedText
from tml.session import Session, SessionError, Stream, TextEvent


def encode_session(session: Session, model: ModelConfig, tokenizer: Tokenizer) -> EncodedSession:
    """Levels, tiles and tokens of a session, on the clock of `model.audio.sample_rate_hz`.

    A session at another rate is resampled, and its events move with it. A session that does not promise
    `user_audio` gets digital silence. A model without eyes (`video.max_tiles_per_turn` is 0) gets no tiles.
    A model without a voice leaves `own_audio` alone; with one, a session that says nothing is silent.

    Raises:
        SessionError: a promise is not kept, a stream cannot be decoded, or own text has no sound for a model with a
            voice.
    """
    session.check()
    rate_hz = model.audio.sample_rate_hz
    num_samples = waveform.resampled_length(session.num_samples, session.sample_rate_hz, rate_hz)
    try:
        levels_TM = _levels(session, num_samples, model.audio)
        tiles_P, tile_samples_P = _tiles(session, num_samples, rate_hz, model.video)
        own_mels_TY = _own_mels(session, num_samples, model) if model.has_voice else None
        texts = _user_words(session, rate_hz, tokenizer) + tuple(
            EncodedText(
                stream=event.stream,
                start=_moved(event.start, session, rate_hz),
                tokens=tuple(_tokens(event, tokenizer)),
            )
            for event in session.texts
        )
    except ValueError as error:
        raise SessionError(f"session {session.session_id}: {error}") from error
    return EncodedSession(
        session_id=session.session_id,
        num_samples=num_samples,
        levels_TM=levels_TM,
        texts=texts,
        tiles_P=tiles_P,
        tile_samples_P=tile_samples_P,
        own_mels_TY=own_mels_TY,
        own_audible_T=None if own_mels_TY is None else own_sound.audible(own_mels_TY, model.audio_out),
    )


def _user_words(session: Session, rate_hz: int, tokenizer: Tokenizer) -> tuple[EncodedText, ...]:
    """The words of `user_audio`, each at the sample where it ends, as it would be said: in lower case."""
    return tuple(
        EncodedText(
            stream=Stream.USER_AUDIO,
            start=_moved(word.end, session, rate_hz),
            tokens=tuple(tokenizer.encode_word(word.text.lower())),
        )
        for word in session.user_words
    )


def _moved(sample: int, session: Session, rate_hz: int) -> int:
    return sample * rate_hz // session.sample_rate_hz


def _tokens(event: TextEvent, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_word(event.text) if event.stream is Stream.OWN_TEXT else tokenizer.encode(event.text)


def _levels(session: Session, num_samples: int, cfg: AudioConfig) -> np.ndarray:
    clip = session.audio.get(Stream.USER_AUDIO)
    if clip is None:
        return audio.pad_frames(np.zeros((0, cfg.num_mels), np.uint8), -(-num_samples // cfg.hop_samples), cfg)
    samples = waveform.decode_clip(clip, session.sample_rate_hz)
    return audio.session_frames(waveform.resample(samples, session.sample_rate_hz, cfg.sample_rate_hz), cfg)


def _own_mels(session: Session, num_samples: int, model: ModelConfig) -> np.ndarray:
    clip, rate_hz = session.audio.get(Stream.OWN_AUDIO), model.audio.sample_rate_hz
    if clip is None:
        if session.texts_of(Stream.OWN_TEXT):
            raise ValueError(
                "it has own_text but no own_audio, which this model's voice (model.audio_out) needs; prepare the data "
                "with own_audio, or set model.audio_out.frames_per_position = 0"
            )
        num_positions = -(-num_samples // model.audio.hop_samples)
        return np.tile(own_sound.silent_position(model.audio_out), (num_positions, 1))
    samples = waveform.decode_clip(clip, session.sample_rate_hz)
    return own_sound.own_mels(waveform.resample(samples, session.sample_rate_hz, rate_hz), model)


def _tiles(session: Session, num_samples: int, rate_hz: int, cfg: VideoConfig) -> tuple[np.ndarray, np.ndarray]:
    shape = (cfg.frames_per_tile, cfg.tile_px, cfg.tile_px, 3)
    tiles, complete = [np.zeros((0, *shape), np.int16)], [np.zeros(0, np.int64)]
    if session.frames and cfg.max_tiles_per_turn:
        pictures = video.decode_frames(session.frames)
        samples = [_moved(frame.sample, session, rate_hz) for frame in session.frames]
        sizes = [picture.shape[:2] for picture in pictures]
        for group in video.group_frames(samples, sizes, num_samples, rate_hz, cfg):
            tiles.append(video.tiles_of_frames(np.stack(pictures[group.first : group.last]), cfg))
            complete.append(np.full(len(tiles[-1]), group.complete_sample))
    return np.concatenate(tiles), np.concatenate(complete)
