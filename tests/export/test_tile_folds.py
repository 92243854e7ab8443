"""The plan of the image tower's folds equals that of `transformers`, wherever ours can follow it."""

import itertools

import pytest
from transformers.models.inkling.modeling_inkling import plan_out_scales

from tml.export import tile_folds


@pytest.mark.parametrize("tile_px", [4, 6, 9, 16, 30, 40])
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_it_is_the_plan_of_transformers_or_refused(tile_px: int, frames: int) -> None:
    for num_layers in range(1, 8):
        scales = plan_out_scales(frames, tile_px, num_layers, 3).int().tolist()
        times = [after[0] // before[0] for before, after in itertools.pairwise(scales)]
        sides = [after[1] // before[1] for before, after in itertools.pairwise(scales)]
        if set(times[:-1]) <= {1} and (times[-1], sides[-1]) == (frames, 1):
            widths = tuple(scale[3] for scale in scales[1:-1])
            assert tile_folds.plan(tile_px, frames, num_layers) == (tuple(sides[:-1]), widths)
        else:
            with pytest.raises(ValueError, match=rf"{num_layers} layers over {frames} frames of {tile_px} pixels"):
                tile_folds.plan(tile_px, frames, num_layers)


def test_the_published_tower() -> None:
    assert tile_folds.plan(40, 2, 4) == ((5, 2, 4), (128, 320, 4800))
