"""Video drawn frame by frame: coloured shapes that move, bounce and change colour on a plain ground.

A frame is 40 pixels high and 39 wide, so that two frames take one tile of 40 x 40 (`tml.codec.video` adds a
column of tiles to pictures whose width is a multiple of 40).
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data_pipelines.speech import SAMPLE_RATE_HZ
from tml.session import VideoFrame

FRAMES_PER_SECOND = 5
FRAME_SAMPLES = SAMPLE_RATE_HZ // FRAMES_PER_SECOND
HEIGHT_PX, WIDTH_PX = 40, 39

RGB: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 185, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 45),
    "white": (240, 240, 240),
    "grey": (110, 110, 110),
}

Picture = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True, kw_only=True)
class Actor:
    """A shape in a film; place and colour are functions of the frame's index.

    Attributes:
        shape: circle, square or triangle.
        radius_px: half its height.
        place: (y, x) of its centre in pixels.
        colour: a key of `RGB`.
        shift: added to each channel of the colour.
    """

    shape: str
    radius_px: float
    place: Callable[[int], tuple[float, float]]
    colour: Callable[[int], str]
    shift: tuple[int, int, int] = (0, 0, 0)


def inside(shape: str, radius_px: float, centre: tuple[float, float]) -> Bool[np.ndarray, "H W"]:
    """The pixels that a shape covers.

    Raises:
        ValueError: there is no such shape.
    """
    y, x = np.mgrid[:HEIGHT_PX, :WIDTH_PX].astype(np.float32)
    y, x = y - centre[0], x - centre[1]
    if shape == "circle":
        return np.square(y) + np.square(x) <= radius_px * radius_px
    if shape == "square":
        return np.maximum(np.abs(y), np.abs(x)) <= 0.9 * radius_px
    if shape == "triangle":
        return (np.abs(y) <= radius_px) & (2 * np.abs(x) <= y + radius_px)
    raise ValueError(f"shape {shape!r} is not one of circle, square, triangle")


def draw(actors: Sequence[Actor], frame: int, ground: tuple[int, int, int]) -> Picture:
    """One frame; later actors cover earlier ones."""
    picture = np.empty((HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    picture[:] = ground
    for actor in actors:
        colour = np.clip(np.add(RGB[actor.colour(frame)], actor.shift), 0, 255)
        picture[inside(actor.shape, actor.radius_px, actor.place(frame))] = colour
    return picture


def film(
    actors: Sequence[Actor], num_samples: int, first_sample: int, ground: tuple[int, int, int]
) -> list[VideoFrame]:
    """Frames, as PNG, from `first_sample` to the end of a session of `num_samples`."""
    frames: list[VideoFrame] = []
    for index, sample in enumerate(range(first_sample, num_samples, FRAME_SAMPLES)):
        file = io.BytesIO()
        Image.fromarray(draw(actors, index, ground)).save(file, format="PNG", compress_level=6)
        frames.append(VideoFrame(sample=sample, data=file.getvalue()))
    return frames


def standing(y: float, x: float) -> Callable[[int], tuple[float, float]]:
    """A place that does not change."""
    return lambda frame: (y, x)


def drifting(
    start: tuple[float, float], step: tuple[float, float], margin_px: float
) -> Callable[[int], tuple[float, float]]:
    """A place that moves by `step` pixels a frame and turns back at the margins."""

    def place(frame: int) -> tuple[float, float]:
        y, x = (
            _reflected(begin + frame * by, margin_px, size - 1 - margin_px)
            for begin, by, size in zip(start, step, (HEIGHT_PX, WIDTH_PX), strict=True)
        )
        return y, x

    return place


def bouncing(
    bounces: Sequence[int], x: float, floor_y: float, height_px: float, fall_frames: int = 2
) -> Callable[[int], tuple[float, float]]:
    """A ball that rests at the top, touches the floor in the frames of `bounces`, and stays at the top afterwards."""

    def place(frame: int) -> tuple[float, float]:
        if not bounces or frame <= bounces[0] - fall_frames or frame >= bounces[-1] + fall_frames:
            return floor_y - height_px, x
        before = max((b for b in bounces if b <= frame), default=bounces[0] - 2 * fall_frames)
        after = min((b for b in bounces if b > frame), default=bounces[-1] + 2 * fall_frames)
        u = (frame - before) / (after - before)
        return floor_y - height_px * 4 * u * (1 - u), x

    return place


def changing(colours: Sequence[tuple[int, str]]) -> Callable[[int], str]:
    """A colour from each frame on: (first frame, colour) pairs in order, the first at frame 0."""

    def colour(frame: int) -> str:
        return [name for first, name in colours if first <= frame][-1]

    return colour


def flashing(flashes: Sequence[int], length: int, lit: str, dark: str = "grey") -> Callable[[int], str]:
    """A lamp that is lit for `length` frames from each of `flashes` on."""
    return lambda frame: lit if any(first <= frame < first + length for first in flashes) else dark


def _reflected(value: float, low: float, high: float) -> float:
    """The value folded back into [low, high]."""
    width = high - low
    folded = (value - low) % (2 * width)
    return low + (folded if folded <= width else 2 * width - folded)
