"""Counts parameters and floating-point operations from the specs, and measures what this machine can do.

The convention, stated with every MFU: model FLOPs of one row = 6 * N * S + 12 * heads * head_dim * span
for every layer, forward and backward; nothing recomputed is counted. N is the parameters that one
position multiplies: routed experts count by the share that is chosen, tables that are looked up do
not count, nor do the image tower, which works per tile, and the flow head, which works per own audio
position. Span is S^2/2 for global layers and S*w - w^2/2 for sliding ones: the positions of a row count
as one segment, padding included. A block of multi-token prediction counts as a layer, and multiplies by
the unembedding once more.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from tml.config import ModelConfig
from tml.params import ParamSpec, PyTree, Update, spec_leaves


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """One line of the parameter table.

    Attributes:
        name: what the parameters belong to.
        total: parameters stored.
        active: parameters that one position uses, looked-up tables as a whole included.
        multiplied: active parameters that take part in a multiplication: N of the convention.
    """

    name: str
    total: int
    active: int
    multiplied: int


def param_table(specs: PyTree, model: ModelConfig) -> list[ParamGroup]:
    """Parameters by place: the embeddings, each kind of sub-layer, the head; ends with the sum.

    Example:
        >>> [group.name for group in param_table(transformer.specs(model), model)]
        ['embed/audio', 'embed/tokens', 'stages/attention', ..., 'unembed', 'all']
    """
    groups: dict[str, np.ndarray] = {}
    for path, spec in spec_leaves(specs):
        share = model.moe.num_experts_per_token / model.moe.num_experts if is_routed(spec) else 1.0
        active = round(spec.size * share)
        multiplied = 0 if is_table(spec) or is_per_tile(path) or is_per_own(path) else active
        counts = np.array([spec.size, active, multiplied])
        name = group_name(path)
        groups[name] = groups.get(name, np.zeros(3, np.int64)) + counts
    groups["all"] = sum(groups.values(), np.zeros(3, np.int64))
    return [
        ParamGroup(name=name, total=int(counts[0]), active=int(counts[1]), multiplied=int(counts[2]))
        for name, counts in groups.items()
    ]


def group_name(path: str) -> str:
    """The table line of a parameter: its path without layer numbers, two names deep."""
    names = [name for name in path.split("/") if not name.isdigit()]
    return "/".join(names[:2]) if names[0] in ("embed", "stages") else names[0]


def is_routed(spec: ParamSpec) -> bool:
    """Whether the parameter is a stack of routed experts, of which a position uses a few."""
    return "E" in spec.axes and spec.update is Update.MATRIX


def is_table(spec: ParamSpec) -> bool:
    """Whether the parameter is a table of vectors that is looked up, not multiplied."""
    return spec.update is Update.EMBEDDING and spec.axes[-1] == "D"


def is_per_tile(path: str) -> bool:
    """Whether the parameter belongs to the image tower."""
    return path.startswith("embed/video/")


def is_per_own(path: str) -> bool:
    """Whether the parameter belongs to the flow head."""
    return path.startswith("audio_out/")


def param_table_text(groups: Sequence[ParamGroup]) -> str:
    """The table for the first screen."""
    width = max(len(group.name) for group in groups)
    lines = [f"{'parameters':<{width}} {'total':>16} {'active':>16} {'multiplied':>16}"]
    lines += [
        f"{group.name:<{width}} {group.total:>16,} {group.active:>16,} {group.multiplied:>16,}" for group in groups
    ]
    return "\n".join(lines)


def attention_span(num_slots: int, window: int | None) -> float:
    """Pairs of query and key in one row: all before a query, or those in the window."""
    if window is None or window >= num_slots:
        return num_slots**2 / 2
    return num_slots * window - window**2 / 2


def row_flops(specs: PyTree, model: ModelConfig, row_slots: int) -> float:
    """Model FLOPs of training on one row of positions, by the convention above: no image tower, no flow head."""
    multiplied = param_table(specs, model)[-1].multiplied
    multiplied += model.mtp.num_blocks * model.d_model * model.vocab_size
    num_global = len(set(model.global_layers)) + len(set(model.mtp.global_blocks))
    num_sliding = model.num_layers + model.mtp.num_blocks - num_global
    attention = model.attention
    span = num_global * attention_span(row_slots, None)
    span += num_sliding * attention_span(row_slots, attention.window)
    return 6.0 * multiplied * row_slots + 12.0 * attention.num_heads * attention.head_dim * span


def token_flops(specs: PyTree, model: ModelConfig, row_slots: int) -> float:
    """Model FLOPs of one position of a row."""
    return row_flops(specs, model, row_slots) / row_slots


def measure_matmul_rate(devices: Sequence[jax.Device], size: int = 1024, seconds: float = 0.3) -> float:
    """The float32 matmul rate of one device in FLOP/s, while all of them work.

    Virtual CPU devices share the machine, so each gets its part. The best of several rounds counts:
    the peak should not depend on what else runs now.

    Args:
        devices: the devices of this process.
        size: side of the square matrices.
        seconds: how long to measure.
    """
    operands = [jax.device_put(jnp.ones((size, size), jnp.float32), device) for device in devices]
    multiply = jax.jit(lambda a: a @ a)
    jax.block_until_ready([multiply(a) for a in operands])
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        began = time.perf_counter()
        jax.block_until_ready([multiply(a) for a in operands])
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
