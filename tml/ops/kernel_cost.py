"""What a kernel costs, stated so that every compiler hands it on to a plan."""

from typing import Any

from jax.experimental import pallas as pl


def stated(cost: pl.CostEstimate) -> dict[str, Any]:
    """Arguments of `pallas_call` that state a cost: Triton's lowering (jax 0.10.2) drops it, but keeps the metadata.

    Example:
        >>> cost = pl.CostEstimate(flops=6, transcendentals=0, bytes_accessed=4)
        >>> pl.pallas_call(kernel, out_shape=out, **stated(cost))
    """
    return {
        "cost_estimate": cost,
        "metadata": {"flops": str(cost.flops), "bytes_accessed": str(cost.bytes_accessed)},
    }
