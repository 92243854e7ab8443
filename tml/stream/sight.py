"""What a live session sees: pictures as they come, and the tiles of every turn, as a recording would give them."""

import math

import numpy as np

from tml.codec.video import FrameGroup, decode_frames, group_frames, tile_grid, tiles_of_frames
from tml.config import VideoConfig
from tml.microturn import Clock
from tml.session import VideoFrame

_ENDLESS = np.iinfo(np.int64).max


class Sight:
    """Groups pictures into tiles (`tml.codec.video`); a group goes in with the turn in which it is complete."""

    def __init__(self, cfg: VideoConfig, clock: Clock) -> None:
        self._cfg, self._clock = cfg, clock
        self._waiting: list[tuple[VideoFrame, np.ndarray]] = []
        self.frames: list[VideoFrame] = []

    def show(self, frame: VideoFrame) -> None:
        """Takes a picture, not earlier than the one before it.

        Raises:
            ValueError: it is earlier, it cannot be decoded, the model has no eyes, or a turn would hold more tiles than
                `video.max_tiles_per_turn`; the picture is not taken.
        """
        if not self._cfg.max_tiles_per_turn:
            raise ValueError("this model has no eyes (model.video.max_tiles_per_turn is 0)")
        if self.frames and frame.sample < self.frames[-1].sample:
            raise ValueError(f"a picture at sample {frame.sample} follows one at {self.frames[-1].sample}")
        waiting = [*self._waiting, (frame, decode_frames([frame])[0])]
        tiles_of_turn: dict[int, int] = {}
        for group in self._groups(waiting):
            turn = self._clock.turn_of(group.complete_sample)
            height, width, _ = waiting[group.first][1].shape
            tiles_of_turn[turn] = tiles_of_turn.get(turn, 0) + math.prod(tile_grid(height, width, self._cfg))
        most = max(tiles_of_turn.values())
        if most > self._cfg.max_tiles_per_turn:
            raise ValueError(
                f"with the picture at sample {frame.sample} one turn would hold {most} tiles, more than "
                f"video.max_tiles_per_turn = {self._cfg.max_tiles_per_turn}; show smaller or fewer pictures"
            )
        self._waiting = waiting
        self.frames.append(frame)

    def take(self, end_sample: int) -> np.ndarray:
        """The tiles that are complete before `end_sample` and were not yet taken (int16 [n, t, h, w, 3])."""
        cfg = self._cfg
        tiles = [np.zeros((0, cfg.frames_per_tile, cfg.tile_px, cfg.tile_px, 3), np.int16)]
        done = 0
        for group in self._groups(self._waiting):
            if group.complete_sample >= end_sample:
                break
            tiles.append(self._tiles(self._waiting, group))
            done = group.last
        del self._waiting[:done]
        return np.concatenate(tiles)

    def _groups(self, waiting: list[tuple[VideoFrame, np.ndarray]]) -> list[FrameGroup]:
        samples = [frame.sample for frame, _ in waiting]
        sizes = [picture.shape[:2] for _, picture in waiting]
        return group_frames(samples, sizes, int(_ENDLESS), self._clock.sample_rate_hz, self._cfg)

    def _tiles(self, waiting: list[tuple[VideoFrame, np.ndarray]], group: FrameGroup) -> np.ndarray:
        return tiles_of_frames(np.stack([picture for _, picture in waiting[group.first : group.last]]), self._cfg)
