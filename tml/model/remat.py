"""What the backward pass of a layer recomputes, and what it keeps of the forward pass."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from tml.config import MeshConfig, Remat

KEPT = "kept"
"""The name of what `Remat.EXPERTS` keeps."""

ATTENTION_RESULTS = ("attention_out", "attention_lse")
"""What attention kernels name of their results."""

MADE_ANEW = (
    *("all_gather", "convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim"),
    "optimization_barrier",
)
"""Operations on the way from a stored parameter to a matmul."""


def kept(x: jax.Array) -> jax.Array:
    """Marks the result of a matmul, which takes longer to make anew than to read, to be kept by `Remat.EXPERTS`."""
    return checkpoint_name(x, KEPT)


def recomputed(layer: Callable, remat: Remat, mesh: MeshConfig, in_loop: bool) -> Callable:
    """The layer, with what its backward pass recomputes.

    Args:
        layer: the program of one layer.
        remat: what the config asks for.
        mesh: sizes of the axes; on one device nothing need be recomputed.
        in_loop: whether a loop over layers runs it. Then the backward pass is a loop of its own, which XLA cannot
            merge with the first; a barrier against that would keep weights from being gathered ahead.
    """
    if remat is Remat.LAYER:
        return jax.checkpoint(layer, prevent_cse=not in_loop)
    if remat is Remat.EXPERTS:
        policy = jax.checkpoint_policies.save_only_these_names(KEPT, *ATTENTION_RESULTS)
        return jax.checkpoint(layer, prevent_cse=not in_loop, policy=policy)
    return layer if mesh.num_devices == 1 else jax.checkpoint(layer, policy=is_no_weight)


def is_no_weight(primitive: Any, *_: Any, **__: Any) -> bool:
    """What the backward pass keeps without remat on a mesh: all but gathered weights and views, which are made anew.

    Kept, the gathered weights of a layer would be kept of every layer: the whole model on every device.
    """
    return primitive.name not in MADE_ANEW
