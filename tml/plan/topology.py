"""Pods that are not there: their devices as the compiler sees them, and where these stand.

The TPU compiler comes with the package libtpu, the GPU compiler with jax-cuda12-plugin and jax-cuda12-pjrt (extra
`plan`). Both run on a machine that has neither.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies

from tml.plan.chips import GPUS, Chip, read_topology
from tml.plan.links import Fabric
from tml.xla_flags import Platform, flags_environment, xla_flags

CUBE = 4
"""A torus axis of v5p and tpu7x closes to a ring when it is made of whole cubes of this side (scaling book)."""
FLAT_RING = 16
"""A torus axis of v5e and v6e closes when it spans the whole pod (scaling book)."""

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask a metadata server which TPU this machine has
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a second process would fail on a lock file
    "TPU_WORKER_HOSTNAMES": "localhost",  # else libtpu complains that it cannot find out
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # likewise; the topology asked for is what counts
}
GPU_ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # no NVIDIA libraries are needed to compile
GPU_COMPILER_OPTIONS: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"}  # nothing to measure on


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A pod.

    Attributes:
        name: chip and shape, as in `v5p:8x8x8` or `h100:1x64x8` (slices x hosts x GPUs a host).
        num_slices: slices, joined by a network.
        chip: kind of chip.
        devices: as the compiler numbers them.
        wraps: which axes of a slice's torus close to a ring.
    """

    name: str
    num_slices: int
    chip: Chip
    devices: Sequence[jax.Device]
    wraps: tuple[bool, ...]

    @property
    def num_chips(self) -> int:
        """Chips, all slices together."""
        return len(self.devices) // self.chip.devices_per_chip

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """What the compiler must be told: for GPUs the flags of a launch too, which for TPUs are in the environment."""
        if self.chip.is_tpu:
            return {}
        flags = xla_flags(Platform.CUDA, self.num_slices, self.chip.name)
        # A flag that is a bool takes one, and no word for it.
        words = {"true": True, "false": False}
        return {**GPU_COMPILER_OPTIONS, **{flag.name: words.get(flag.value, flag.value) for flag in flags}}

    def fabric(self, devices: Sequence[jax.Device]) -> Fabric:
        """Where the devices of a mesh, in its order, stand."""
        if not self.chip.is_tpu:
            per_host = int(self.name.rpartition("x")[2])
            number = {device.id: place for place, device in enumerate(self.devices)}
            coords = np.array([divmod(number[device.id], per_host) for device in devices])
        else:
            rows = [(getattr(device, "slice_index", None) or 0, *device.coords) for device in devices]
            coords = np.array(rows)[:, : 1 + self.chip.torus_axes]
        return Fabric(self.chip, coords, self.wraps)


def open_topology(name: str, num_slices: int = 1) -> Topology:
    """Opens a topology by its name. Call it before jax makes its first array: the compilers read the environment once.

    Raises:
        ValueError: a chip or shape that is not known, or the compiler's package is not installed.
    """
    chip, sizes = read_topology(name)
    if num_slices < 1 or (num_slices > 1 and not chip.is_tpu):
        raise ValueError(
            f"slices = {num_slices} with topology {name!r}: the flag is for TPUs; GPUs have their slices in the name"
        )
    jax.config.update("jax_platforms", "cpu")
    return _open_tpu(name, chip, sizes, num_slices) if chip.is_tpu else _open_gpu(name, chip, sizes)


def _open_tpu(name: str, chip: Chip, sizes: tuple[int, ...], num_slices: int) -> Topology:
    _needs("libtpu", name)
    # The flags of a launch, so that the plan is of the program that will run; a variable that is set stays.
    for variable, value in (TPU_ENVIRONMENT | dict(flags_environment(Platform.TPU, num_slices, chip.name))).items():
        os.environ.setdefault(variable, value)
    # A slice of whole cubes is a torus along every axis; a smaller one has no rings.
    is_torus = all(size % CUBE == 0 for size in sizes)
    wraps = tuple(is_torus if chip.torus_axes == 3 else size == FLAT_RING for size in sizes)
    # The compiler wants three axes always.
    padded = [*wraps, False][:3] if chip.torus_axes == 2 else list(wraps)
    options = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(name, "tpu", wrap=padded, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu knows no topology {name!r}: {error}") from error
    expected = math.prod(sizes) * chip.devices_per_chip * num_slices
    assert len(devices) == expected, (name, len(devices), expected)
    return Topology(name=name, num_slices=num_slices, chip=chip, devices=devices, wraps=wraps)


def _open_gpu(name: str, chip: Chip, sizes: tuple[int, ...]) -> Topology:
    _needs("jax_cuda12_plugin", name)
    for variable, value in GPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    target, shape = GPUS[chip.name].target_config(), "x".join(str(size) for size in sizes)
    devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape).devices
    return Topology(name=name, num_slices=sizes[0], chip=chip, devices=devices, wraps=())


def _needs(module: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"topology {name!r} needs the compiler in {module}, which is not installed: pip install -e '.[plan]'"
        )
