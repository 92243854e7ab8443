"""The accelerators a plan can be made for: peaks, memory and links, each with its source.

Sources: "scaling book" is https://jax-ml.github.io/scaling-book/tpus; "cloud table" is the comparison table at
https://docs.cloud.google.com/tpu/docs/tpu7x; "datasheet" is NVIDIA's of the product. Rates are per chip and one way.
"""

import re
from dataclasses import dataclass

from tml.config.tree import nearest_keys
from tml.xla_flags import Platform


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of accelerator.

    Attributes:
        name: as in a topology.
        peak_flops_per_s: dense bf16 matmul peak of one chip.
        hbm_bytes: main memory of one chip that a program may take; of a GPU's the share that `launch.pod` asks for.
        hbm_bytes_per_s: its bandwidth.
        devices_per_chip: devices that jax sees on one chip; they share the chip's figures equally.
        link_bytes_per_s: TPU: one link of the torus; GPU: all NVLinks of a chip together.
        torus_axes: axes of the torus; 0 for a switched network.
        network_bytes_per_s: the network between slices (TPU) or hosts (GPU), per chip.
        clock_hz: cycles in which the compiler estimates; 0 where it does not.
        is_cycles_trusted: whether the compiler's cycles of a matmul agree with arithmetic within 14 %.
        row_gather_cycles: cycles that a gather from main memory takes for each row, and for each byte of a row;
            zeros where not known.
        source: where the numbers are from.
    """

    name: str
    peak_flops_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    devices_per_chip: int = 1
    link_bytes_per_s: float
    torus_axes: int
    network_bytes_per_s: float
    clock_hz: float = 0.0
    is_cycles_trusted: bool = False
    row_gather_cycles: tuple[float, float] = (0.0, 0.0)
    source: str

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU, whose chips are linked in a torus."""
        return self.torus_axes > 0

    @property
    def platform(self) -> Platform:
        """Whose compiler."""
        return Platform.TPU if self.is_tpu else Platform.CUDA


TPU_HOP_S = 1e-6
"""Latency of one hop in the torus (scaling book, "communication latency")."""
GPU_COLLECTIVE_S = 1e-5
"""Least time of a collective between GPUs (order of NCCL's small-message latency; an assumption, not a measurement)."""

_TPU_SOURCES = (
    "peak, HBM: scaling book and cloud table; link: scaling book, 0.9 of the cloud table's; slices' network: cloud "
    "table; clock: the scheduler's of libtpu 0.0.42"
)

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5p",
            peak_flops_per_s=459e12,
            hbm_bytes=95e9,
            hbm_bytes_per_s=2.765e12,
            link_bytes_per_s=9e10,
            torus_axes=3,
            network_bytes_per_s=6.25e9,
            clock_hz=1.75e9,
            is_cycles_trusted=True,
            row_gather_cycles=(3.55, 0.002065),
            source=_TPU_SOURCES + "; row gathers: the compiler's static schedules, half of the rows on either core",
        ),
        Chip(
            name="v5e",
            peak_flops_per_s=197e12,
            hbm_bytes=16e9,
            hbm_bytes_per_s=0.82e12,
            link_bytes_per_s=4.5e10,
            torus_axes=2,
            network_bytes_per_s=3.125e9,
            clock_hz=1.5e9,
            is_cycles_trusted=True,
            source=_TPU_SOURCES,
        ),
        Chip(
            name="v6e",
            peak_flops_per_s=918e12,
            hbm_bytes=32e9,
            hbm_bytes_per_s=1.64e12,
            link_bytes_per_s=9e10,
            torus_axes=2,
            network_bytes_per_s=12.5e9,
            clock_hz=1.75e9,
            source=_TPU_SOURCES,
        ),
        Chip(
            name="tpu7x",
            peak_flops_per_s=2307e12,
            hbm_bytes=192e9,
            hbm_bytes_per_s=7.38e12,
            devices_per_chip=2,
            link_bytes_per_s=9e10,
            torus_axes=3,
            network_bytes_per_s=12.5e9,
            clock_hz=1.9e9,
            source=_TPU_SOURCES + "; link: as v5p's, since the cloud table gives both the same",
        ),
        Chip(
            name="h100",
            peak_flops_per_s=989e12,
            hbm_bytes=0.92 * 84.943e9,
            hbm_bytes_per_s=3.35e12,
            link_bytes_per_s=4.5e11,
            torus_axes=0,
            network_bytes_per_s=5e10,
            source="datasheet of H100 SXM5; network: one 400 Gb/s port a GPU, as in DGX H100",
        ),
        Chip(
            name="h200",
            peak_flops_per_s=989e12,
            hbm_bytes=0.92 * 151.398e9,
            hbm_bytes_per_s=4.8e12,
            link_bytes_per_s=4.5e11,
            torus_axes=0,
            network_bytes_per_s=5e10,
            source="datasheet of H200 SXM; network: one 400 Gb/s port a GPU, as in DGX H200",
        ),
        Chip(
            name="b200",
            peak_flops_per_s=2250e12,
            hbm_bytes=0.92 * 191.514e9,
            hbm_bytes_per_s=8e12,
            link_bytes_per_s=9e11,
            torus_axes=0,
            network_bytes_per_s=5e10,
            source="datasheet of DGX B200; network: one 400 Gb/s port a GPU",
        ),
    )
}


def read_topology(name: str) -> tuple[Chip, tuple[int, ...]]:
    """The chip and the sizes that `v5p:8x8x8` (chips along the axes of a slice) or `h100:1x64x8` gives.

    Raises:
        ValueError: an unknown chip, or a shape that is none of its.

    Example:
        >>> read_topology("v6e:16x16")[1]
        (16, 16)
    """
    chip_name, _, shape = name.partition(":")
    if chip_name not in CHIPS:
        raise ValueError(f"topology {name!r}: unknown chip {chip_name!r}; {nearest_keys(chip_name, CHIPS)}")
    chip = CHIPS[chip_name]
    num_sizes = chip.torus_axes or 3
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != num_sizes - 1:
        example = {3: "8x8x8", 2: "16x16", 0: "1x64x8"}[chip.torus_axes]
        meaning = "chips along the axes of a slice" if chip.is_tpu else "slices x hosts x GPUs a host"
        raise ValueError(f"topology {name!r} must give {num_sizes} sizes, {meaning}, as in {chip_name}:{example}")
    return chip, tuple(int(size) for size in shape.split("x"))


@dataclass(frozen=True, kw_only=True)
class GpuTarget:
    """What the GPU compiler wants to know of a GPU beyond its peaks.

    The numbers are those that devices report; openxla collects them in xla/backends/gpu/target_config/specs.
    """

    description: str
    num_cores: int
    compute_capability: int
    memory_bytes: int
    memory_bytes_per_s: int
    l2_bytes: int
    clock_ghz: float

    def target_config(self) -> str:
        """The text of a `stream_executor.GpuTargetConfigProto`."""
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49_152,
            "shared_memory_per_core": 233_472,
            "shared_memory_per_block_optin": 232_448,
            "threads_per_core_limit": 2_048,
            "core_count": self.num_cores,
            "fpus_per_core": 128,
            "block_dim_limit_x": 2_147_483_647,
            "block_dim_limit_y": 65_535,
            "block_dim_limit_z": 65_535,
            "thread_dim_limit_x": 1_024,
            "thread_dim_limit_y": 1_024,
            "thread_dim_limit_z": 64,
            "memory_bandwidth": self.memory_bytes_per_s,
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
            "registers_per_core_limit": 65_536,
            "registers_per_block_limit": 65_536,
        }
        fields = " ".join(f"{name}: {value}" for name, value in info.items())
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {self.compute_capability} "
            f"feature_extension: ACCELERATED_FEATURES }} }} "
            f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} '
            f'device_description_str: "{self.description}"'
        )


GPUS: dict[str, GpuTarget] = {
    "h100": GpuTarget(
        description="NVIDIA H100 80GB HBM3",
        num_cores=132,
        compute_capability=9,
        memory_bytes=84_942_979_072,
        memory_bytes_per_s=3_352_320_000_000,
        l2_bytes=52_428_800,
        clock_ghz=1.98,
    ),
    "h200": GpuTarget(
        description="NVIDIA H200 141GB HBM3e",
        num_cores=132,
        compute_capability=9,
        memory_bytes=151_397_597_184,
        memory_bytes_per_s=4_800_000_000_000,
        l2_bytes=52_428_800,
        clock_ghz=1.98,
    ),
    "b200": GpuTarget(
        description="NVIDIA B200",
        num_cores=148,
        compute_capability=10,
        memory_bytes=191_514_411_008,
        memory_bytes_per_s=7_672_320_000_000,
        l2_bytes=132_644_864,
        clock_ghz=1.965,
    ),
}
