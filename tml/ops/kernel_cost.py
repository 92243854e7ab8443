"""What a kernel costs, said in the name of its scope: the way to a plan where a compiler drops the stated cost."""

import re
from contextlib import AbstractContextManager

import jax
from jax.experimental import pallas as pl

_SCOPE = re.compile(r"\bcost_(\d+)_flops_(\d+)_bytes\b")


def stated_in_scope(cost: pl.CostEstimate) -> AbstractContextManager[None]:
    """A named scope around a kernel that XLA for CUDA compiles: its custom calls keep their scopes, not their costs.

    Example:
        >>> with stated_in_scope(pl.CostEstimate(flops=6, transcendentals=0, bytes_accessed=4)):
        ...     run_kernel(x)
    """
    return jax.named_scope(f"cost_{int(cost.flops)}_flops_{int(cost.bytes_accessed)}_bytes")


def cost_in_scope(op_name: str) -> tuple[float, float] | None:
    """FLOPs and bytes of a kernel, from the path of its named scopes; None where they do not say."""
    found = _SCOPE.search(op_name)
    return (float(found.group(1)), float(found.group(2))) if found else None
