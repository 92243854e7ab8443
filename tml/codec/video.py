"""Pictures and video to tiles of pixels in time and space, the input of the hMLP tile stack.

Consecutive frames share a tile: slot i of its time axis is frame i. A group of frames is closed, and
its tiles are complete, at the first of: the sample of the frame that fills it; the sample of a frame
of another size; the end of its span, `frames_per_tile` frame periods after its first frame. A group
that closes with too few frames repeats its last one, so a still picture fills every slot. All of this
is known at the sample where the group closes: a live stream can do the same.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int16, UInt8
from PIL import Image

from tml.config import VideoConfig
from tml.session import SessionError, VideoFrame

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of each colour over CLIP's training pictures, with white = 1 (openai/CLIP, clip.py)."""
PADDING_PIXEL = -1


def decode_frames(frames: Sequence[VideoFrame]) -> list[UInt8[np.ndarray, "H W 3"]]:
    """The pixels of each encoded picture, in red, green, blue.

    Raises:
        SessionError: a picture cannot be decoded.
    """
    pictures = []
    for index, frame in enumerate(frames):
        try:
            with Image.open(io.BytesIO(frame.data)) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise SessionError(
                f"video frame {index}, at sample {frame.sample}, cannot be decoded as a picture: {error}"
            ) from error
    return pictures


@dataclass(frozen=True, kw_only=True)
class FrameGroup:
    """Frames [first, last) that share their tiles, and the sample at which these are complete."""

    first: int
    last: int
    complete_sample: int


def group_frames(
    samples: Sequence[int], sizes: Sequence[tuple[int, ...]], num_samples: int, sample_rate_hz: int, cfg: VideoConfig
) -> list[FrameGroup]:
    """Groups frames into tiles by their times, by the rule at the top of this file.

    Args:
        samples: the sample of each frame, in order.
        sizes: height and width of each frame.
        num_samples: length of the session; its end closes the last group.
        sample_rate_hz: the clock of `samples`.
        cfg: slots of a tile, and frames per second.
    """
    span = round(cfg.frames_per_tile * sample_rate_hz / cfg.frames_per_second)
    groups: list[FrameGroup] = []
    first = 0
    while first < len(samples):
        last = first + 1
        deadline = min(samples[first] + span, num_samples - 1)
        complete = samples[first] if cfg.frames_per_tile == 1 else deadline
        while last < len(samples) and last - first < cfg.frames_per_tile and samples[last] < samples[first] + span:
            if sizes[last] != sizes[first]:
                complete = samples[last]
                break
            last += 1
            if last - first == cfg.frames_per_tile:
                complete = samples[last - 1]
        groups.append(FrameGroup(first=first, last=last, complete_sample=complete))
        first = last
    return groups


def tile_grid(height: int, width: int, cfg: VideoConfig) -> tuple[int, int]:
    """Rows and columns of the tiles of a group of H x W pixels: ceil(H / tile_px) and W // tile_px + 1."""
    return math.ceil(height / cfg.tile_px), width // cfg.tile_px + 1


def tiles_of_frames(frames: UInt8[np.ndarray, "f H W 3"], cfg: VideoConfig) -> Int16[np.ndarray, "n t h w 3"]:
    """Cuts frames of one size into tiles: group after group of frames, each group in raster order.

    What sticks out at the right and the bottom is `PADDING_PIXEL`. The last frame is repeated until its group is full.
    """
    num_frames, height, width, _ = frames.shape
    tile, slots = cfg.tile_px, cfg.frames_per_tile
    groups, (rows, columns) = math.ceil(num_frames / slots), tile_grid(height, width, cfg)
    canvas = np.full((groups * slots, rows * tile, columns * tile, 3), PADDING_PIXEL, np.int16)
    canvas[:num_frames, :height, :width] = frames
    canvas[num_frames:] = canvas[num_frames - 1 : num_frames]
    cut = canvas.reshape(groups, slots, rows, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    return cut.reshape(-1, slots, tile, tile, 3)


def picture_tiles(picture: bytes, cfg: VideoConfig) -> Int16[np.ndarray, "n t h w 3"]:
    """The tiles of a still picture, which fills every slot of theirs; none of no picture.

    Raises:
        SessionError: it cannot be decoded, or the model has no eyes.
    """
    if not picture:
        return np.zeros((0, cfg.frames_per_tile, cfg.tile_px, cfg.tile_px, 3), np.int16)
    if not cfg.max_tiles_per_turn:
        raise SessionError("it has a picture, but this model has no eyes (model.video.max_tiles_per_turn is 0)")
    return tiles_of_frames(np.stack(decode_frames([VideoFrame(sample=0, data=picture)])), cfg)


def normalise_tiles(tiles: Int16[Array, "*n t h w 3"]) -> Float32[Array, "*n t h w 3"]:
    """Pixels as the network wants them, (pixel / 255 - mean) / deviation; padding is a pixel of -1."""
    colours = (1,) * (tiles.ndim - 1) + (3,)
    mean = jnp.asarray(CLIP_MEAN, jnp.float32).reshape(colours) * 255.0
    deviation = jnp.asarray(CLIP_STD, jnp.float32).reshape(colours) * 255.0
    return (jax.lax.convert_element_type(tiles, jnp.float32) - mean) / deviation
