"""What a live session sees is what its recording shows: the same tiles in the same turns, and the same outputs."""

import io
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image
from small_model import RATE_HZ, SMALL_TURN, small_model, small_sound

from tml.codec.encode import encode_session
from tml.config import AudioConfig, MicroTurnConfig, SlotScheme, VideoConfig
from tml.microturn import Clock
from tml.session import Session, SessionError, Stream, VideoFrame
from tml.stream import engine
from tml.stream.inputs import session_inputs
from tml.stream.live import LiveSession
from tml.stream.outputs import read_session
from tml.stream.sight import Sight

VIDEO = VideoConfig(tile_px=4, fold_px=(2, 2), fold_dims=(6, 10), max_tiles_per_turn=2)
CLOCK = Clock.of(MicroTurnConfig(), AudioConfig())
NUM_TURNS, TURN_SAMPLES = 8, 3_200


def picture(number: int, height: int = 4, width: int = 3) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("seed", range(8))
def test_tiles_come_in_the_turns_in_which_a_recording_has_them(seed: int, tmp_path) -> None:
    rng = np.random.default_rng(seed)
    samples = np.cumsum(rng.integers(200, 7_000, 9)).tolist()
    frames = [VideoFrame(sample=s, data=picture(i, 4 - 2 * (i % 5 == 4))) for i, s in enumerate(samples)]
    num_turns = samples[-1] // TURN_SAMPLES + 6
    model = small_model(tmp_path, video=VideoConfig(**{**vars(VIDEO), "max_tiles_per_turn": 9}))
    sight, live, last = Sight(model.experiment.model.video, CLOCK), [], 0
    for turn in range(num_turns):
        while last < len(frames) and frames[last].sample < (turn + 1) * TURN_SAMPLES:
            sight.show(frames[last])
            last += 1
        tiles = sight.take((turn + 1) * TURN_SAMPLES)
        live += [(turn, tile) for tile in tiles]
    session = Session(
        session_id="seen",
        sample_rate_hz=RATE_HZ,
        num_samples=num_turns * TURN_SAMPLES,
        streams=(Stream.VIDEO,),
        frames=tuple(frames),
    )
    encoded = encode_session(session, model.experiment.model, model.tokenizer)
    assert [turn for turn, _ in live] == (encoded.tile_samples_P // TURN_SAMPLES).tolist()
    np.testing.assert_array_equal(np.stack([tile for _, tile in live]), encoded.tiles_P)
    assert sight.frames == frames


@pytest.mark.parametrize("slots", SlotScheme)
def test_a_live_session_with_pictures_equals_its_recording(slots: SlotScheme, tmp_path) -> None:
    model = small_model(tmp_path, video=VIDEO, turn=replace(SMALL_TURN, slots=slots))
    config, sound = model.experiment, small_sound(NUM_TURNS * TURN_SAMPLES)
    live = LiveSession(model.params, config.model, model.layout, config.stream, model.tokenizer)
    said = []
    for first in range(0, len(sound), 1_600):
        if first % 4_800 == 0:
            live.show(picture(first))
        said += [turn.said for turn in live.push(sound[first : first + 1_600])]
    assert live.num_compilations == 1
    record = live.record("seen")
    assert [frame.sample for frame in record.frames] == list(range(0, len(sound), 4_800))
    heard = Session(
        session_id="again",
        sample_rate_hz=RATE_HZ,
        num_samples=record.num_samples,
        streams=(Stream.USER_AUDIO, Stream.VIDEO),
        audio={Stream.USER_AUDIO: record.audio[Stream.USER_AUDIO]},
        frames=record.frames,
    )
    inputs = session_inputs(model.layout, encode_session(heard, config.model, model.tokenizer), config.model)
    inputs = jax.tree.map(lambda leaf: leaf[:NUM_TURNS], inputs)
    assert int(inputs.counts_B.max()) > int(inputs.counts_B.min())
    step = engine.make_step(config.model, model.layout, config.stream)
    state = engine.init_state(config.model, model.layout, config.stream, 1)
    run = jax.jit(lambda params, state, inputs: engine.scan_turns(step, params, state, inputs))
    _, outputs = run(model.params, state, inputs)
    assert read_session(outputs, 0, NUM_TURNS, model.layout, model.tokenizer) == said


def test_a_picture_that_cannot_be_seen_is_refused_and_leaves_nothing() -> None:
    sight = Sight(VIDEO, CLOCK)
    sight.show(VideoFrame(sample=100, data=picture(0)))
    with pytest.raises(ValueError, match="follows one at 100"):
        sight.show(VideoFrame(sample=99, data=picture(1)))
    with pytest.raises(SessionError, match="cannot be decoded"):
        sight.show(VideoFrame(sample=100, data=b"no picture"))
    with pytest.raises(ValueError, match=r"would hold 9 tiles, more than video.max_tiles_per_turn = 2"):
        sight.show(VideoFrame(sample=200, data=picture(1, 12, 11)))
    assert [frame.sample for frame in sight.frames] == [100]
    with pytest.raises(ValueError, match="has no eyes"):
        Sight(VideoConfig(), CLOCK).show(VideoFrame(sample=0, data=picture(0)))
