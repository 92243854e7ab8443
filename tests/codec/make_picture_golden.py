"""Writes picture_golden.npz: what transformers' Inkling image processor makes of one small picture.

Run: python tests/codec/make_picture_golden.py, with transformers 5.23 and torchvision 0.28.0 for torch 2.13.0.
The processor needs torchvision, whose wheels need a CUDA build of torch; the test environment has the CPU
build, so the result is kept in a file. The two operators that torchvision insists on at import, and that no
picture needs, are declared below, so that the CPU build will do.
"""

from pathlib import Path

import numpy as np
import torch

declared = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers.models.inkling.image_processing_inkling import InklingImageProcessor

TILE_PX = 10


def main() -> None:
    """Runs the processor on noise of 23 x 30 pixels, cut into tiles of 10: 3 rows, and 3 + 1 columns."""
    picture = np.random.default_rng(0).integers(0, 256, (23, 30, 3), dtype=np.uint8)
    processor = InklingImageProcessor(size={"height": TILE_PX, "width": TILE_PX})
    result = processor([picture], return_tensors="pt")
    pixel_values = result["pixel_values"].numpy()
    assert result["num_patches"].tolist() == [len(pixel_values)] == [12]
    np.testing.assert_array_equal(pixel_values[:, 0], pixel_values[:, 1])
    path = Path(__file__).with_name("picture_golden.npz")
    np.savez_compressed(path, picture=picture, pixel_values=pixel_values[:, :1], slots=pixel_values.shape[1])


if __name__ == "__main__":
    main()
