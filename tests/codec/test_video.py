import io
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tml.codec.video import (
    CLIP_MEAN,
    CLIP_STD,
    FrameGroup,
    decode_frames,
    group_frames,
    normalise_tiles,
    tiles_of_frames,
)
from tml.config import VideoConfig
from tml.session import SessionError, VideoFrame

INKLING = VideoConfig()
SMALL = VideoConfig(tile_px=10, fold_px=(5, 2), fold_dims=(128, 320))


def picture_bytes(pixels: np.ndarray, kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def test_pixel_values_equal_the_image_processor():
    golden = np.load(Path(__file__).with_name("picture_golden.npz"))
    tiles = tiles_of_frames(golden["picture"][None], SMALL)
    values = np.asarray(normalise_tiles(jnp.asarray(tiles)))
    expected = np.repeat(golden["pixel_values"], golden["slots"], axis=1)
    assert values.shape == expected.shape == (12, 2, 10, 10, 3)
    np.testing.assert_allclose(values, expected, atol=5e-7, rtol=0)


def test_colours_are_scaled_by_clips_mean_and_deviation():
    tiles = np.broadcast_to(np.array([0, 128, 255], np.int16)[:, None], (1, 1, 1, 3, 3)).copy()
    values = np.asarray(normalise_tiles(jnp.asarray(tiles)))[0, 0, 0]
    expected = (np.array([0, 128, 255])[:, None] / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(values, expected, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(num_frames=st.integers(1, 5), height=st.integers(1, 95), width=st.integers(1, 95))
def test_every_pixel_is_in_its_place_and_the_rest_is_padding(num_frames, height, width):
    frames = np.random.default_rng(height).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    tiles = tiles_of_frames(frames, INKLING)
    rows, columns = -(-height // 40), width // 40 + 1
    assert tiles.shape == (-(-num_frames // 2) * rows * columns, 2, 40, 40, 3)
    seen = 0
    for index, tile in enumerate(tiles):
        group, place = divmod(index, rows * columns)
        row, column = divmod(place, columns)
        for slot in range(2):
            frame = min(2 * group + slot, num_frames - 1)
            part = frames[frame, row * 40 : row * 40 + 40, column * 40 : column * 40 + 40]
            np.testing.assert_array_equal(tile[slot, : part.shape[0], : part.shape[1]], part)
            assert (tile[slot, part.shape[0] :] == -1).all()
            assert (tile[slot, :, part.shape[1] :] == -1).all()
            seen += part.size
    assert seen == -(-num_frames // 2) * 2 * height * width * 3


def test_a_width_that_fits_gets_one_more_column_of_padding():
    tiles = tiles_of_frames(np.zeros((2, 40, 40, 3), np.uint8), INKLING)
    assert tiles.shape[0] == 2
    assert (tiles[1] == -1).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pictures_of_every_mode_become_colours(mode):
    pixels = np.full((3, 5, 3), 200, np.uint8)
    (decoded,) = decode_frames([VideoFrame(sample=0, data=picture_bytes(pixels, mode=mode))])
    assert decoded.shape == (3, 5, 3)
    assert decoded.dtype == np.uint8
    np.testing.assert_allclose(decoded, pixels, atol=5)


def test_png_is_exact_and_jpeg_is_near():
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, 12:, 1] = 220
    png, jpeg = decode_frames([VideoFrame(sample=0, data=picture_bytes(pixels, kind)) for kind in ("PNG", "JPEG")])
    np.testing.assert_array_equal(png, pixels)
    assert np.abs(jpeg.astype(int) - pixels).mean() < 12


@settings(deadline=None, max_examples=150)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG"]))
def test_a_damaged_picture_decodes_or_is_a_session_error(data, kind):
    whole = bytearray(picture_bytes(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        (picture,) = decode_frames([VideoFrame(sample=4, data=damaged)])
    except SessionError as error:
        assert "video frame 0, at sample 4" in str(error)  # noqa: PT017
    else:
        assert picture.ndim == 3


def test_a_cut_picture_is_an_error():
    data = picture_bytes(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    with pytest.raises(SessionError, match="video frame 0"):
        decode_frames([VideoFrame(sample=0, data=data[: len(data) // 2])])


def groups_of(samples, sizes=None, num_samples=100_000, cfg=INKLING):
    groups = group_frames(samples, sizes or [(4, 4)] * len(samples), num_samples, 16_000, cfg)
    return [(group.first, group.last, group.complete_sample) for group in groups]


def test_pairs_are_complete_at_their_later_frame_and_stills_when_their_span_is_over():
    assert groups_of([0, 3_200, 6_400, 9_600]) == [(0, 2, 3_200), (2, 4, 9_600)]
    assert groups_of([0, 3_200, 6_400]) == [(0, 2, 3_200), (2, 3, 6_400 + 6_400)]
    assert groups_of([500, 40_000]) == [(0, 1, 6_900), (1, 2, 46_400)]
    assert groups_of([5, 5]) == [(0, 2, 5)]
    assert groups_of([0, 6_399]) == [(0, 2, 6_399)]
    assert groups_of([0, 6_400]) == [(0, 1, 6_400), (1, 2, 12_800)]
    assert groups_of([]) == []


def test_the_end_of_the_session_closes_the_last_group():
    assert groups_of([99_000]) == [(0, 1, 99_999)]


def test_a_frame_of_another_size_closes_the_group_before_it():
    assert groups_of([0, 3_200, 6_400], [(4, 4), (8, 4), (8, 4)]) == [(0, 1, 3_200), (1, 3, 6_400)]


def test_tiles_of_one_frame_are_complete_at_once():
    cfg = VideoConfig(frames_per_tile=1)
    assert groups_of([0, 10, 90_000], cfg=cfg) == [(0, 1, 0), (1, 2, 10), (2, 3, 90_000)]


@settings(deadline=None)
@given(
    gaps=st.lists(st.integers(0, 8_000), max_size=20),
    slots=st.integers(1, 4),
    later=st.lists(st.integers(0, 8_000), max_size=5),
    seed=st.integers(0, 100),
)
def test_groups_are_known_when_they_close(gaps, slots, later, seed):
    cfg = VideoConfig(frames_per_tile=slots)
    samples = np.cumsum(gaps).tolist()
    sizes = [(4, int(height)) for height in np.random.default_rng(seed).choice([4, 4, 4, 8], len(samples) + len(later))]
    end = samples[-1] + 40_000 if samples else 40_000
    groups = group_frames(samples, sizes[: len(samples)], end, 16_000, cfg)
    assert [frame for group in groups for frame in range(group.first, group.last)] == list(range(len(samples)))
    complete = [group.complete_sample for group in groups]
    assert complete == sorted(complete)
    for group in groups:
        assert 1 <= group.last - group.first <= slots
        assert len({sizes[frame] for frame in range(group.first, group.last)}) == 1
        assert samples[group.last - 1] <= group.complete_sample
        # Whatever comes after a group has closed does not change it.
        known = [sample for sample in samples if sample <= group.complete_sample]
        after = [group.complete_sample + 1 + sample for sample in np.cumsum(later).tolist()]
        other = group_frames(known + after, sizes[: len(known) + len(after)], end + 50_000, 16_000, cfg)
        assert group in other
    assert all(isinstance(group, FrameGroup) for group in groups)
