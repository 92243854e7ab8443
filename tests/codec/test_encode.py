import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from tml.codec.audio import init_state, levels, log_mels, pad_frames, push
from tml.codec.encode import encode_session
from tml.codec.text import Tokenizer, train_tokenizer
from tml.codec.video import tiles_of_frames
from tml.codec.waveform import encode_clip, resample
from tml.config import AudioConfig, MicroTurnConfig, ModelConfig, VideoConfig
from tml.microturn import Clock, Layout
from tml.session import AudioClip, AudioEncoding, Session, SessionError, Stream, TextEvent, VideoFrame

MODEL = ModelConfig(video=VideoConfig(max_tiles_per_turn=8))
RATE_HZ = 16_000
NUM_SAMPLES = 17_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(["say seven and eight"], 300, tmp_path_factory.mktemp("tokenizer"))


def sound(num_samples: int = NUM_SAMPLES) -> np.ndarray:
    """Noise in whole 16-bit steps, so that a clip holds it exactly."""
    steps = np.random.default_rng(3).integers(-4_000, 4_000, num_samples)
    return steps.astype(np.float32) / np.float32(32_768)


def frame(sample: int, shade: int) -> VideoFrame:
    file = io.BytesIO()
    Image.fromarray(np.full((50, 39, 3), shade, np.uint8)).save(file, "PNG")
    return VideoFrame(sample=sample, data=file.getvalue())


def text(stream: Stream, start: int, content: str) -> TextEvent:
    return TextEvent(stream=stream, start=start, end=start, text=content)


def session(**changes: object) -> Session:
    base = Session(
        session_id="s",
        sample_rate_hz=RATE_HZ,
        num_samples=NUM_SAMPLES,
        streams=(
            *(Stream.SYSTEM, Stream.USER_AUDIO, Stream.VIDEO, Stream.USER_TEXT),
            *(Stream.BACKGROUND, Stream.OWN_TEXT, Stream.OWN_AUDIO, Stream.ACTION),
        ),
        audio={
            Stream.USER_AUDIO: encode_clip(sound(), RATE_HZ),
            # Its own sound is no input: that these bytes are no file must not matter.
            Stream.OWN_AUDIO: AudioClip(encoding=AudioEncoding.FILE, data=b"?", num_samples=NUM_SAMPLES),
        },
        texts=(
            text(Stream.SYSTEM, 0, "be brief"),
            text(Stream.USER_TEXT, 5, "<|tick|>"),
            text(Stream.BACKGROUND, 4_001, "eight"),
            text(Stream.OWN_TEXT, 8_003, "seven"),
            text(Stream.ACTION, 8_004, '{"say": 1}'),
            text(Stream.OWN_TEXT, 16_999, "eight"),
        ),
        frames=(frame(0, 10), frame(3_200, 20), frame(6_401, 30)),
    )
    return dataclasses.replace(base, **changes)


def test_everything_is_encoded_on_the_clock(tokenizer):
    encoded = encode_session(session(), MODEL, tokenizer)
    assert encoded.num_samples == NUM_SAMPLES
    assert [(item.stream, item.start) for item in encoded.texts] == [
        (Stream.SYSTEM, 0),
        (Stream.USER_TEXT, 5),
        (Stream.BACKGROUND, 4_001),
        (Stream.OWN_TEXT, 8_003),
        (Stream.ACTION, 8_004),
        (Stream.OWN_TEXT, 16_999),
    ]
    decoded = [tokenizer.decode(item.tokens) for item in encoded.texts]
    assert decoded == ["be brief", "<|tick|>", "eight", " seven", '{"say": 1}', " eight"]
    assert tokenizer.special.tick not in encoded.texts[1].tokens


def test_levels_are_those_of_the_samples_and_of_the_stream(tokenizer):
    encoded = encode_session(session(), MODEL, tokenizer)
    offline = levels(log_mels(sound(), MODEL.audio), MODEL.audio)
    assert len(offline) == 22
    np.testing.assert_array_equal(encoded.levels_TM[:22], offline)
    num_frames = 6 * 4
    filled = np.concatenate([sound(), np.zeros(num_frames * 800 - NUM_SAMPLES, np.float32)])
    _, streamed = push(init_state(MODEL.audio), filled, MODEL.audio)
    np.testing.assert_array_equal(pad_frames(encoded.levels_TM, num_frames, MODEL.audio), streamed)


def test_tiles_are_complete_when_their_frames_are(tokenizer):
    encoded = encode_session(session(), MODEL, tokenizer)
    frames = np.stack([np.full((50, 39, 3), shade, np.uint8) for shade in (10, 20, 30)])
    np.testing.assert_array_equal(encoded.tiles_P, tiles_of_frames(frames, MODEL.video))
    assert encoded.tile_samples_P.tolist() == [3_200, 3_200, 12_801, 12_801]


def test_a_model_without_eyes_gets_no_tiles(tokenizer):
    encoded = encode_session(session(frames=(VideoFrame(sample=0, data=b"?"),)), ModelConfig(), tokenizer)
    assert encoded.tiles_P.shape == (0, 2, 40, 40, 3)
    assert encoded.tile_samples_P.shape == (0,)


def test_another_rate_moves_everything(tokenizer):
    model = dataclasses.replace(
        MODEL, audio=AudioConfig(sample_rate_hz=24_000, hop_samples=600, window_samples=1_200, max_hz=12_000.0)
    )
    encoded = encode_session(session(), model, tokenizer)
    assert encoded.num_samples == NUM_SAMPLES * 3 // 2
    assert [item.start for item in encoded.texts] == [0, 7, 6_001, 12_004, 12_006, 25_498]
    assert encoded.tile_samples_P.tolist() == [4_800, 4_800, 19_201, 19_201]
    resampled = resample(sound(), RATE_HZ, 24_000)
    expected = levels(log_mels(resampled, model.audio), model.audio)
    np.testing.assert_array_equal(encoded.levels_TM[: len(expected)], expected)


def test_a_session_without_user_audio_is_silent_and_a_broken_promise_is_an_error(tokenizer):
    quiet = session(streams=(Stream.USER_TEXT,), audio={}, texts=(text(Stream.USER_TEXT, 0, "hello"),), frames=())
    encoded = encode_session(quiet, MODEL, tokenizer)
    np.testing.assert_array_equal(encoded.levels_TM, np.full((22, 80), 2))
    with pytest.raises(SessionError, match=r"session s promises .*user_audio"):
        encode_session(dataclasses.replace(quiet, streams=(Stream.USER_TEXT, Stream.USER_AUDIO)), MODEL, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": (VideoFrame(sample=9, data=b"?"),)}, "session s: video frame 0, at sample 9"),
        (
            {
                "audio": {
                    Stream.USER_AUDIO: AudioClip(encoding=AudioEncoding.FILE, data=b"?", num_samples=NUM_SAMPLES),
                    Stream.OWN_AUDIO: AudioClip(encoding=AudioEncoding.FILE, data=b"?", num_samples=NUM_SAMPLES),
                }
            },
            "session s: a clip of 1 bytes cannot be decoded",
        ),
        ({"sample_rate_hz": 8_000}, "session s: a clip holds 17000 samples x 1 channels at 16000 Hz.*8000 Hz"),
    ],
)
def test_what_cannot_be_decoded_names_the_session(tokenizer, change, message):
    with pytest.raises(SessionError, match=message):
        encode_session(session(**change), MODEL, tokenizer)


def test_an_encoded_session_can_be_laid_out(tokenizer):
    turn = MicroTurnConfig()
    layout = Layout(clock=Clock.of(turn, MODEL.audio), turn=turn, special=tokenizer.special, max_tiles_per_turn=8)
    encoded = encode_session(session(), MODEL, tokenizer)
    contents = layout.contents(encoded)
    assert contents.num_turns == 6
    assert contents.tile_turns.tolist() == [1, 1, 4, 4]
    assert layout.lay_out(contents).turn_starts[-1] > 6 * 6
