"""Topologies of TPU slices and GPU clusters: what --topology means, and what the schedulers call the machines."""

import math
import re
from dataclasses import dataclass

from tml.config.tree import nearest_keys
from tml.xla_flags import Platform


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of chip and the hosts it comes in.

    Attributes:
        platform: whose compiler.
        num_dims: numbers in its topology.
        chips_per_host: of the hosts that slices of several hosts are made of; for GPUs the topology says it.
        devices_per_chip: what jax counts as a device; the mesh is of devices.
        gke_name: value of GKE's node label `cloud.google.com/gke-tpu-accelerator`; empty if GKE is not rendered.
        skypilot_name: its name in SkyPilot's catalogue; empty if it has none.
        skypilot_units_per_chip: TPU slices of SkyPilot are counted in these.
    """

    platform: Platform
    num_dims: int
    chips_per_host: int = 0
    devices_per_chip: int = 1
    gke_name: str = ""
    skypilot_name: str = ""
    skypilot_units_per_chip: int = 1


ACCELERATORS = {
    "v5p": Accelerator(
        platform=Platform.TPU,
        num_dims=3,
        chips_per_host=4,
        gke_name="tpu-v5p-slice",
        skypilot_name="tpu-v5p",
        skypilot_units_per_chip=2,
    ),
    "v5e": Accelerator(
        platform=Platform.TPU,
        num_dims=2,
        chips_per_host=4,
        gke_name="tpu-v5-lite-podslice",
        skypilot_name="tpu-v5litepod",
    ),
    "v6e": Accelerator(
        platform=Platform.TPU,
        num_dims=2,
        chips_per_host=4,
        gke_name="tpu-v6e-slice",
        skypilot_name="tpu-v6e",
    ),
    "tpu7x": Accelerator(platform=Platform.TPU, num_dims=3, chips_per_host=4, devices_per_chip=2, gke_name="tpu7x"),
    "h100": Accelerator(platform=Platform.CUDA, num_dims=3, skypilot_name="H100"),
    "h200": Accelerator(platform=Platform.CUDA, num_dims=3, skypilot_name="H200"),
    "b200": Accelerator(platform=Platform.CUDA, num_dims=3, skypilot_name="B200"),
}
"""GKE's names and hosts: cloud.google.com/kubernetes-engine/docs/concepts/tpus and XPK's table of systems.
SkyPilot's: `sky show-gpus --all`; v5p slices are counted in cores, two a chip."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Identical slices of one kind of chip.

    Attributes:
        name: the accelerator's, as in `ACCELERATORS`.
        shape: chips along each axis of one TPU slice, or (hosts, GPUs a host).
        num_slices: slices that only the data centre's network joins.
    """

    name: str
    shape: tuple[int, ...]
    num_slices: int

    @property
    def accelerator(self) -> Accelerator:
        """The kind of chip."""
        return ACCELERATORS[self.name]

    @property
    def chips_per_host(self) -> int:
        """Chips, or GPUs, that one host drives."""
        return self.shape[-1] if self.accelerator.platform is Platform.CUDA else self.accelerator.chips_per_host

    @property
    def chips_per_slice(self) -> int:
        """Chips of one slice."""
        return math.prod(self.shape)

    @property
    def hosts_per_slice(self) -> int:
        """Hosts of one slice; each runs one process."""
        return self.chips_per_slice // self.chips_per_host

    @property
    def num_processes(self) -> int:
        """Processes of the whole job, one a host."""
        return self.hosts_per_slice * self.num_slices

    @property
    def num_devices(self) -> int:
        """What `len(jax.devices())` will be."""
        return self.chips_per_slice * self.num_slices * self.accelerator.devices_per_chip


def parse_topology(text: str, num_slices: int) -> Topology:
    """Reads `v5p:8x8x8` (chips along the axes of a slice) or `h100:1x64x8` (slices x hosts x GPUs a host).

    Raises:
        ValueError: an unknown chip, a shape that is none, or one that whole hosts do not fill.

    Example:
        >>> parse_topology("v5p:8x8x8", num_slices=2).num_processes
        256
    """
    name, _, sizes = text.partition(":")
    if name not in ACCELERATORS:
        raise ValueError(f"--topology={text}: unknown chip {name!r}; {nearest_keys(name, ACCELERATORS)}")
    if num_slices < 1:
        raise ValueError(f"--num_slices={num_slices} must be greater than 0")
    accelerator = ACCELERATORS[name]
    shape = tuple(int(size) for size in sizes.split("x")) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) else ()
    if len(shape) != accelerator.num_dims:
        example = {2: "16x16", 3: "8x8x8"}[accelerator.num_dims]
        meaning = f"chips along {accelerator.num_dims} axes, as in {name}:{example}"
        if accelerator.platform is Platform.CUDA:
            meaning = f"slices x hosts x GPUs a host, as in {name}:1x64x8"
        raise ValueError(f"--topology={text}: the shape of {name} is {meaning}")
    if accelerator.platform is Platform.CUDA:
        return Topology(name=name, shape=shape[1:], num_slices=shape[0] * num_slices)
    if math.prod(shape) % accelerator.chips_per_host:
        raise ValueError(
            f"--topology={text} has {math.prod(shape)} chips, which hosts of {accelerator.chips_per_host} do not fill; "
            f"the smallest slice is {name}:{'2x2x1' if accelerator.num_dims == 3 else '2x2'}"
        )
    return Topology(name=name, shape=shape, num_slices=num_slices)
