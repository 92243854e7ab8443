"""What the backward pass of a layer makes anew instead of keeping."""

from collections.abc import Callable
from typing import Any

import jax

from tml.config import MeshConfig, ModelConfig, Remat


def recomputed(run: Callable[..., Any], cfg: ModelConfig, mesh: MeshConfig) -> Callable[..., Any]:
    """A layer that keeps only its inputs (`Remat.LAYER`), or on a mesh all but gathered weights."""
    if cfg.remat is Remat.LAYER:
        return jax.checkpoint(run)
    return run if mesh.num_devices == 1 else jax.checkpoint(run, policy=is_no_weight)


def is_no_weight(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the backward pass keeps without remat on a mesh: all but gathered weights and views, which are made anew.

    Kept, the gathered weights of a layer would be kept of every layer: the whole model on every device.
    """
    return primitive.name not in MADE_ANEW


MADE_ANEW = ("all_gather", "convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim")
"""Operations on the way from a stored parameter to a matmul."""
