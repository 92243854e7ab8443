"""Configuration of the device mesh: its five axes, what each of them splits, and the meshes that fit."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tml.config.checks import check_positive, nearest_multiple

ROW_AXES = ("replica", "fsdp", "expert")
"""Mesh axes over which rows are split outside the experts."""

SHARD_AXES = ("fsdp", "expert", "context")
"""Mesh axes over which a parameter's model dimension is split, and gathered when its layer runs."""

DATA_AXES = (*ROW_AXES, "context")
"""Mesh axes over which positions are split; the devices along `tensor` work on the same positions."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis; the product must be the number of devices.

    Attributes:
        replica: copies of the parameters, slowest: across slices or data centres.
        fsdp: rows and parameters are split; parameters are gathered layer by layer.
        expert: like `fsdp`, and experts are split.
        context: rows are split along the sequence, parameters as by `fsdp`.
        tensor: heads, hidden units and vocabulary are split.
    """

    replica: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_positive("mesh", **vars(self))

    @property
    def shape(self) -> dict[str, int]:
        """Size of every axis, slowest first."""
        return dict(vars(self))

    @property
    def num_devices(self) -> int:
        """Product of the axes."""
        return math.prod(self.shape.values())

    def product(self, axes: Sequence[str]) -> int:
        """Devices along some axes together."""
        return math.prod(self.shape[axis] for axis in axes)

    def present(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Those of the axes that split anything, in the order given."""
        return tuple(axis for axis in axes if self.shape[axis] > 1)


class Split(NamedTuple):
    """One dimension that mesh axes split evenly.

    Attributes:
        name: its name in the config.
        size: its size.
        axes: the mesh axes that split it.
        parts: what else divides it, by name; gradient accumulation divides rows.
    """

    name: str
    size: int
    axes: tuple[str, ...]
    parts: tuple[tuple[str, int], ...] = ()

    def divisor(self, mesh: MeshConfig) -> int:
        """What the size must be a multiple of."""
        return mesh.product(self.axes) * math.prod(count for _, count in self.parts)


def check_splits(mesh: MeshConfig, splits: Sequence[Split]) -> None:
    """Raises ValueError unless the mesh divides every dimension.

    The error names every dimension that it does not divide, the axes, their sizes and the nearest size that they would
    divide, and the nearest mesh of as many devices that fits everything.
    """
    wrong = [_describe(split, mesh) for split in splits if split.size % split.divisor(mesh)]
    if wrong:
        raise ValueError("; ".join((*wrong, describe_nearest(mesh, mesh.num_devices, splits))))


def _describe(split: Split, mesh: MeshConfig) -> str:
    """A dimension that the mesh does not divide."""
    divisor, parts = split.divisor(mesh), [(name, count) for name, count in split.parts if count > 1]
    factors = [f"mesh.{axis} ({mesh.shape[axis]})" for axis in split.axes]
    factors += [f"{name} ({count})" for name, count in parts]
    return (
        f"{split.name} = {split.size} is not a multiple of {' * '.join(factors)} = {divisor}; "
        f"the nearest valid value is {nearest_multiple(split.size, divisor)}"
        f"{''.join(f'; or set {name} = 1' for name, _ in parts)}"
    )


def check_slices(mesh: MeshConfig, num_slices: int, splits: Sequence[Split]) -> None:
    """Checks that `replica` alone crosses the slow network between slices.

    Raises:
        ValueError: with both numbers and the nearest mesh of as many devices that fits everything.
    """
    if mesh.replica % num_slices:
        raise ValueError(
            f"mesh.replica = {mesh.replica} is not a multiple of the {num_slices} slices, so another axis would cross "
            f"the slow network between them; {describe_nearest(mesh, mesh.num_devices, splits, num_slices)}"
        )


def describe_nearest(mesh: MeshConfig, num_devices: int, splits: Sequence[Split], num_slices: int = 1) -> str:
    """The way out of a mesh that does not fit, as the end of an error; or which dimension leaves none."""
    nearest = nearest_mesh(mesh, num_devices, splits, num_slices)
    if nearest is not None:
        return f"the nearest valid mesh of {num_devices} devices is {nearest.shape}"
    guilty = [
        f"{split.name} = {split.size}"
        for split in splits
        if nearest_mesh(mesh, num_devices, [other for other in splits if other is not split], num_slices)
    ]
    return f"no mesh of {num_devices} devices fits" + (f" as long as {' or '.join(guilty)}" if guilty else "")


def nearest_mesh(mesh: MeshConfig, num_devices: int, splits: Sequence[Split], num_slices: int = 1) -> MeshConfig | None:
    """The mesh of `num_devices` that divides every dimension and changes the axes by the smallest factors, or None.

    Its `replica` is a multiple of `num_slices`.
    """
    fitting = (other for other in meshes_of(num_devices) if other.replica % num_slices == 0 and fits(other, splits))
    return min(fitting, key=lambda other: _distance(mesh, other), default=None)


def fits(mesh: MeshConfig, splits: Sequence[Split]) -> bool:
    """Whether the mesh divides every dimension."""
    return all(split.size % split.divisor(mesh) == 0 for split in splits)


def meshes_of(num_devices: int) -> Iterator[MeshConfig]:
    """Every mesh of so many devices."""

    def sizes(count: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (count,)
            return
        for size in range(1, count + 1):
            if count % size == 0:
                yield from ((size, *rest) for rest in sizes(count // size, axes - 1))

    names = tuple(MeshConfig().shape)
    yield from (MeshConfig(**dict(zip(names, found, strict=True))) for found in sizes(num_devices, len(names)))


def _distance(mesh: MeshConfig, other: MeshConfig) -> float:
    """The sum of the factors' logarithms; of equal ones, that with the larger `fsdp` is nearer."""
    factors = [abs(math.log(other.shape[axis] / size)) for axis, size in mesh.shape.items()]
    return sum(factors) - 1e-6 * math.log(other.fsdp)
