"""Topologies of TPU slices and GPU clusters: what --topology means, and what the schedulers call the machines."""

import math
from dataclasses import dataclass

from tml.plan.chips import Chip, read_topology


@dataclass(frozen=True, kw_only=True)
class Machines:
    """The hosts that one kind of chip comes in, and what the schedulers call them.

    Attributes:
        chips_per_host: of the hosts that slices of several hosts are made of; for GPUs the topology says it.
        gke_name: value of GKE's node label `cloud.google.com/gke-tpu-accelerator`; empty if GKE is not rendered.
        skypilot_name: its name in SkyPilot's catalogue; empty if it has none.
        skypilot_units_per_chip: TPU slices of SkyPilot are counted in these.
        skypilot_host_chips: SkyPilot gives a slice of at most so many chips as one host; larger ones have
            `chips_per_host`.
    """

    chips_per_host: int = 0
    gke_name: str = ""
    skypilot_name: str = ""
    skypilot_units_per_chip: int = 1
    skypilot_host_chips: int = 0


MACHINES = {
    "v5p": Machines(chips_per_host=4, gke_name="tpu-v5p-slice", skypilot_name="tpu-v5p", skypilot_units_per_chip=2),
    "v5e": Machines(
        chips_per_host=4, gke_name="tpu-v5-lite-podslice", skypilot_name="tpu-v5litepod", skypilot_host_chips=8
    ),
    "v6e": Machines(chips_per_host=4, gke_name="tpu-v6e-slice", skypilot_name="tpu-v6e", skypilot_host_chips=8),
    "tpu7x": Machines(chips_per_host=4, gke_name="tpu7x"),
    "h100": Machines(skypilot_name="H100"),
    "h200": Machines(skypilot_name="H200"),
    "b200": Machines(skypilot_name="B200"),
}
"""GKE's names and hosts: cloud.google.com/kubernetes-engine/docs/concepts/tpus and XPK's table of systems.
SkyPilot's: `sky show-gpus --all`; v5p slices are counted in cores, two a chip. Its v5e and v6e slices are the TPU
API's, of which those up to 2x4 are one VM (docs.cloud.google.com/tpu/docs/v6e); on GKE 2x4 is two nodes of four chips,
ct6e-standard-4t."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Identical slices of one kind of chip.

    Attributes:
        chip: the kind of chip.
        shape: chips along each axis of one TPU slice, or (hosts, GPUs a host).
        num_slices: slices that only the data centre's network joins.
        chips_per_host: chips, or GPUs, that one host drives.
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int
    chips_per_host: int

    @property
    def machines(self) -> Machines:
        """What it comes in."""
        return MACHINES[self.chip.name]

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
        return self.chips_per_slice * self.num_slices * self.chip.devices_per_chip


def parse_topology(text: str, num_slices: int) -> Topology:
    """Reads `v5p:8x8x8` (chips along the axes of a slice) or `h100:1x64x8` (slices x hosts x GPUs a host).

    Raises:
        ValueError: an unknown chip, a shape that is none, or one that whole hosts do not fill.

    Example:
        >>> parse_topology("v5p:8x8x8", num_slices=2).num_processes
        256
    """
    chip, shape = read_topology(text)
    if num_slices < 1:
        raise ValueError(f"--num_slices={num_slices} must be greater than 0")
    if not chip.is_tpu:
        return Topology(chip=chip, shape=shape[1:], num_slices=shape[0] * num_slices, chips_per_host=shape[-1])
    per_host = MACHINES[chip.name].chips_per_host
    if math.prod(shape) % per_host:
        raise ValueError(
            f"--topology={text} has {math.prod(shape)} chips, which hosts of {per_host} do not fill; "
            f"the smallest slice is {chip.name}:{'2x2x1' if len(shape) == 3 else '2x2'}"
        )
    if shape[0] % 2 or shape[1] % 2:
        raise ValueError(f"--topology={text}: chips stand in squares of 2 x 2, so the first two sizes must be even")
    return Topology(chip=chip, shape=shape, num_slices=num_slices, chips_per_host=per_host)
