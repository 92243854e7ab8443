"""The compiler's flags on pods, each with its reason: one table for launching on a machine and for planning it."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Platform(enum.StrEnum):
    """What compiles the program: libtpu, which reads LIBTPU_INIT_ARGS, or XLA for CUDA, which reads XLA_FLAGS."""

    TPU = "tpu"
    CUDA = "cuda"


FLAGS_VARIABLE = {Platform.TPU: "LIBTPU_INIT_ARGS", Platform.CUDA: "XLA_FLAGS"}
"""The environment variable from which each compiler takes its flags."""


@dataclass(frozen=True, kw_only=True)
class XlaFlag:
    """One flag of the compiler.

    Attributes:
        name: without the dashes.
        value: as text.
        reason: what it does for our step, and why it is not left at its default.
        platform: whose flag it is.
        needs_slices: it acts on traffic between slices, so it is left out of a single one.
        chips: the chips it is for, by the names of topologies; empty for all of the platform.
    """

    name: str
    value: str
    reason: str
    platform: Platform
    needs_slices: bool = False
    chips: tuple[str, ...] = ()


FUSING_CHIPS = ("v5e",)
"""Chips whose collectives run inside fusions, for want of SparseCores. On others libtpu (0.0.42) says of gathers in
fusions: not supported, "incorrect results, hang, SDC"."""

OFFLOADING_CHIPS = ("v5p", "v6e", "tpu7x")
"""Chips whose SparseCores drive collectives."""

XLA_FLAGS = (
    XlaFlag(
        name="xla_tpu_enable_async_collective_fusion",
        value="true",
        reason="Lets a collective run inside the fusion of a matmul that does not need it; else it stands alone.",
        platform=Platform.TPU,
    ),
    XlaFlag(
        name="xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        value="true",
        reason="Does so for all-gathers, which bring every layer's weights under fsdp: most of the traffic.",
        platform=Platform.TPU,
        chips=FUSING_CHIPS,
    ),
    XlaFlag(
        name="xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        value="false",
        reason="A gather inside a fusion is driven by the tensor core, so it cannot be the SparseCores'.",
        platform=Platform.TPU,
        chips=OFFLOADING_CHIPS,
    ),
    XlaFlag(
        name="xla_tpu_enable_sparse_core_collective_offload_all_gather",
        value="true",
        reason="SparseCores gather weights and tokens while the tensor core multiplies: start and done, nothing fused.",
        platform=Platform.TPU,
        chips=OFFLOADING_CHIPS,
    ),
    XlaFlag(
        name="xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
        value="true",
        reason="Does so for gathers over two axes of the torus: experts' weights over fsdp.",
        platform=Platform.TPU,
        chips=OFFLOADING_CHIPS,
    ),
    XlaFlag(
        name="xla_tpu_enable_sparse_core_collective_offload_3d_all_gather",
        value="true",
        reason="Does so for gathers over all three axes: weights of attention and of shared experts.",
        platform=Platform.TPU,
        chips=OFFLOADING_CHIPS,
    ),
    XlaFlag(
        name="xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        value="true",
        reason="SparseCores scatter gradients and experts' sums; on the tensor core a reduce-scatter stops everything.",
        platform=Platform.TPU,
        chips=OFFLOADING_CHIPS,
    ),
    XlaFlag(
        name="xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter",
        value="true",
        reason="Does so over several axes of the torus, as the gradients of all matrices travel.",
        platform=Platform.TPU,
        chips=OFFLOADING_CHIPS,
    ),
    XlaFlag(
        name="xla_tpu_enable_concurrent_sparse_core_offloading",
        value="true",
        reason="Lets a collective start before the one before it is done; else weights wait behind tokens.",
        platform=Platform.TPU,
        chips=OFFLOADING_CHIPS,
    ),
    XlaFlag(
        name="xla_tpu_enable_sparse_core_offload_queuing_in_lhs",
        value="true",
        reason="Tells the scheduler so: with this pair the planned step of the 276B took 6 % less.",
        platform=Platform.TPU,
        chips=OFFLOADING_CHIPS,
    ),
    XlaFlag(
        name="xla_tpu_enable_async_collective_fusion_multiple_steps",
        value="true",
        reason="Spreads one long collective over several fusions; an expert stack outlasts any single matmul.",
        platform=Platform.TPU,
    ),
    XlaFlag(
        name="xla_tpu_overlap_compute_collective_tc",
        value="true",
        reason="Lets the tensor core compute while it drives a collective; without it the fusions above gain nothing.",
        platform=Platform.TPU,
    ),
    XlaFlag(
        name="xla_enable_async_all_gather",
        value="true",
        reason="Splits all-gathers into start and done, so that the scheduler may put work between them.",
        platform=Platform.TPU,
    ),
    XlaFlag(
        name="xla_tpu_enable_data_parallel_all_reduce_opt",
        value="true",
        reason="Sinks the gradients' all-reduce over slices out of the layer scan, to overlap the slow network.",
        platform=Platform.TPU,
        needs_slices=True,
    ),
    XlaFlag(
        name="xla_tpu_data_parallel_opt_different_sized_ops",
        value="true",
        reason="Does so for gradients of different shapes too; ours are experts, attention and tables.",
        platform=Platform.TPU,
        needs_slices=True,
    ),
    XlaFlag(
        name="xla_gpu_enable_latency_hiding_scheduler",
        value="true",
        reason="Orders the step so that collectives overlap matmuls; the default order is for the least memory.",
        platform=Platform.CUDA,
    ),
    XlaFlag(
        name="xla_gpu_enable_highest_priority_async_stream",
        value="true",
        reason="Gives communication kernels the highest priority, so that a full GPU does not delay them.",
        platform=Platform.CUDA,
    ),
    XlaFlag(
        name="xla_gpu_all_reduce_combine_threshold_bytes",
        value="134217728",
        reason="Joins small all-reduces over slices up to 128 MiB: fewer messages on the slow network.",
        platform=Platform.CUDA,
        needs_slices=True,
    ),
)
"""Sources: jax docs (xla_flags, gpu_performance_tips), libtpu's own help. libtpu and XLA stop at an unknown flag."""


def xla_flags(platform: Platform, num_slices: int, chip: str) -> tuple[XlaFlag, ...]:
    """The flags for a machine, in the order of the table."""
    return tuple(
        flag
        for flag in XLA_FLAGS
        if flag.platform is platform
        and (num_slices > 1 or not flag.needs_slices)
        and (not flag.chips or chip in flag.chips)
    )


def flags_environment(platform: Platform, num_slices: int, chip: str) -> Mapping[str, str]:
    """The environment variable that hands the flags to the compiler.

    Args:
        platform: whose compiler.
        num_slices: slices that a network joins.
        chip: kind of chip, as a topology names it.

    Example:
        >>> flags_environment(Platform.CUDA, num_slices=1, chip="h100")["XLA_FLAGS"].split()[0]
        '--xla_gpu_enable_latency_hiding_scheduler=true'
    """
    text = " ".join(f"--{flag.name}={flag.value}" for flag in xla_flags(platform, num_slices, chip))
    return {FLAGS_VARIABLE[platform]: text}
