"""How long a collective takes over the links that its group of devices has.

TPU chips stand in a torus: each axis gives a chip one link to either side, a ring where it wraps. Gathers and
reductions use all links of the axes that a group spans; an all-to-all is bound by the longest axis's middle cut.
GPUs of a host share NVLink through a switch; between hosts, and between slices of TPUs, every chip has its part of
the network. All formulas are those of the scaling book, https://jax-ml.github.io/scaling-book/sharding and /gpus.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tml.plan.chips import GPU_COLLECTIVE_S, TPU_HOP_S, Chip
from tml.plan.hlo import Instruction

GATHERS = ("all-gather", "reduce-scatter", "all-reduce")
EXCHANGES = ("all-to-all", "ragged-all-to-all")
COLLECTIVES = (*GATHERS, *EXCHANGES, "collective-permute", "collective-broadcast")

DIE_TO_DIE_LINKS = 6
"""Two devices of one chip are joined as by this many links (cloud table's page on TPU7x: "six times")."""
MAX_GROUPS = 8
"""Groups of one collective that are looked at; the slowest counts."""


@dataclass(frozen=True)
class Fabric:
    """Where the devices of a program stand.

    Attributes:
        chip: their kind.
        coords: [devices, 1 + axes]: slice or host, then place in the torus or number in the host.
        wraps: which axes of the torus close to a ring.
    """

    chip: Chip
    coords: np.ndarray
    wraps: tuple[bool, ...]

    @property
    def num_devices(self) -> int:
        """Devices, of which a chip may have several."""
        return len(self.coords)

    @property
    def network_bytes_per_s(self) -> float:
        """A device's part of its chip's network between slices or hosts."""
        return self.chip.network_bytes_per_s / self.chip.devices_per_chip


@dataclass(frozen=True)
class Transfer:
    """What one collective costs.

    Attributes:
        kind: one of COLLECTIVES.
        num_bytes: bytes that every device receives.
        link_seconds: time on the links inside a slice or host.
        network_seconds: time on the network between them.
        group_size: devices that take part.
    """

    kind: str
    num_bytes: float
    link_seconds: float
    network_seconds: float
    group_size: int

    @property
    def seconds(self) -> float:
        """Links and network work side by side."""
        return max(self.link_seconds, self.network_seconds)


def collective_kind(opcode: str) -> str | None:
    """The collective that an opcode starts or is; None for any other operation and for the end of one."""
    base = opcode.removesuffix("-start")
    return base if base in COLLECTIVES else None


def transfer(instruction: Instruction, operand_bytes: float, fabric: Fabric) -> Transfer:
    """What a collective costs.

    Args:
        instruction: the collective, or its start.
        operand_bytes: bytes that one device puts into it.
        fabric: where the devices stand.
    """
    kind = collective_kind(instruction.opcode)
    assert kind is not None, instruction.opcode
    if kind == "collective-permute":
        return _permute(instruction, operand_bytes, fabric)
    groups = replica_groups(instruction, fabric.num_devices)
    costs = [_grouped(kind, fabric.coords[group], operand_bytes, fabric) for group in groups[:MAX_GROUPS]]
    return max(costs, key=lambda cost: cost.seconds)


def _grouped(kind: str, coords: np.ndarray, operand_bytes: float, fabric: Fabric) -> Transfer:
    size = len(coords)
    if size == 1:
        return Transfer(kind, 0.0, 0.0, 0.0, 1)
    share = (size - 1) / size
    whole = operand_bytes * (size if kind == "all-gather" else 1)
    received = whole * share * (2 if kind == "all-reduce" else 1)
    outer = len(np.unique(coords[:, 0]))
    inner = coords[coords[:, 0] == coords[0, 0]]
    passes = 2 if kind == "all-reduce" else 1
    if kind in EXCHANGES:
        link_seconds = exchange_seconds(inner, operand_bytes * len(inner) / size, fabric)
        network_seconds = operand_bytes * (outer - 1) / outer / fabric.network_bytes_per_s
    else:
        rate = gather_rate(inner, fabric)
        link_seconds = passes * whole * (len(inner) - 1) / len(inner) / rate if len(inner) > 1 else 0.0
        network_seconds = passes * whole * (outer - 1) / outer / (len(inner) * fabric.network_bytes_per_s)
    return Transfer(kind, received, link_seconds + passes * latency(inner, fabric), network_seconds, size)


def gather_rate(coords: np.ndarray, fabric: Fabric) -> float:
    """Bytes per second that every device of a group inside a slice or host can receive in a gather."""
    chip = fabric.chip
    if not chip.is_tpu:
        return chip.link_bytes_per_s
    rates = [links / gap for _, links, gap in torus_axes(coords, fabric)]
    if not rates:
        return DIE_TO_DIE_LINKS * chip.link_bytes_per_s
    return sum(rates) * chip.link_bytes_per_s / chip.devices_per_chip


def exchange_seconds(coords: np.ndarray, operand_bytes: float, fabric: Fabric) -> float:
    """An all-to-all inside a slice or host: n/8 of the time of an operand on one link on a ring of n, n/4 on a line."""
    chip = fabric.chip
    if not chip.is_tpu:
        return operand_bytes * (len(coords) - 1) / len(coords) / chip.link_bytes_per_s
    axes = torus_axes(coords, fabric)
    if not axes:
        return operand_bytes / (DIE_TO_DIE_LINKS * chip.link_bytes_per_s) if len(coords) > 1 else 0.0
    longest = max(count * gap / (4 * links) for count, links, gap in axes)
    return longest * operand_bytes * chip.devices_per_chip / chip.link_bytes_per_s


def latency(coords: np.ndarray, fabric: Fabric) -> float:
    """The least time that news takes to cross a group."""
    if len(coords) == 1:
        return 0.0
    if not fabric.chip.is_tpu:
        return GPU_COLLECTIVE_S
    return TPU_HOP_S * sum(count * gap / links for count, links, gap in torus_axes(coords, fabric))


def torus_axes(coords: np.ndarray, fabric: Fabric) -> list[tuple[int, int, int]]:
    """For every axis that a group spans: its places, links of a chip along it, and the gap between its places.

    With a gap, other groups share the links in between.
    """
    axes = []
    for axis in range(1, coords.shape[1]):
        places = np.unique(coords[:, axis])
        if len(places) < 2:
            continue
        length = int(fabric.coords[:, axis].max()) + 1
        gap = int(np.diff(places).max())
        is_ring = fabric.wraps[axis - 1] and len(places) * gap >= length and length > 2
        axes.append((len(places), 2 if is_ring else 1, gap))
    return axes


def _permute(instruction: Instruction, operand_bytes: float, fabric: Fabric) -> Transfer:
    chip, link_seconds, network_seconds = fabric.chip, 0.0, 0.0
    pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute(r"source_target_pairs=\{(.*?\})\}") or "")
    lengths = fabric.coords[:, 1:].max(axis=0) + 1
    for source, target in pairs:
        here, there = fabric.coords[int(source)], fabric.coords[int(target)]
        if here[0] != there[0]:
            network_seconds = operand_bytes / fabric.network_bytes_per_s
            continue
        away = np.abs(here[1:] - there[1:])
        if chip.is_tpu:
            hops = int(np.where(fabric.wraps, np.minimum(away, lengths - away), away).sum())
            rate = chip.link_bytes_per_s / chip.devices_per_chip if hops else DIE_TO_DIE_LINKS * chip.link_bytes_per_s
            link_seconds = max(link_seconds, max(hops, 1) * (operand_bytes / rate + TPU_HOP_S))
        else:
            link_seconds = max(link_seconds, operand_bytes / chip.link_bytes_per_s + GPU_COLLECTIVE_S)
    return Transfer("collective-permute", operand_bytes, link_seconds, network_seconds, len(pairs))


def replica_groups(instruction: Instruction, num_devices: int) -> np.ndarray:
    """The groups of a collective as device numbers, [groups, members].

    Raises:
        ValueError: a notation that is not known, or groups of different sizes.
    """
    text = instruction.attribute(r"replica_groups=(.*?)(?:, (?!device_ids=)\w+=|$)") or "{}"
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, source, order = (_numbers(part) for part in iota.groups(default=""))
        grid = np.arange(math.prod(source)).reshape(source)
        return (grid.transpose(order) if order else grid).reshape(shape)
    mesh = re.match(r"@?mesh\[(.*?)\](.*?) ?\{(.*?)\}$", text)
    if mesh:
        return _mesh_groups(mesh.group(1), mesh.group(2), mesh.group(3), instruction.name)
    listed = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text)]
    if listed and len({len(group) for group in listed}) == 1:
        return np.array(listed)
    if text.strip("{}") == "":
        return np.arange(num_devices)[None]
    raise ValueError(f"{instruction.name} has replica groups in a notation that is not known: {text[:200]}")


def _mesh_groups(axes: str, order: str, used: str, name: str) -> np.ndarray:
    """Groups written as axes of a mesh, as in `mesh['a'=2,'b'=4] {'b'}`, or a part of one, `{'b':(2)2}`.

    The devices of the mesh may have an order, `, device_ids=([4,2]T(1,0))`: those of a mesh 4 x 2, transposed.
    """
    transposed = re.fullmatch(r", device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", order.strip())
    if order.strip() and not transposed:
        raise ValueError(f"{name} has replica groups over a mesh with an order of devices that is not known: {order}")
    sizes = {axis: int(size) for axis, size in re.findall(r"'?([\w.]+)'?=(\d+)", axes)}
    parts = {axis: [(1, size)] for axis, size in sizes.items()}
    wanted = []
    for axis, before, size in re.findall(r"'?([A-Za-z_][\w.]*)'?(?::\((\d+)\)(\d+))?", used):
        if not size:
            wanted.append((axis, 1))
            continue
        first, middle = int(before), int(size)
        parts[axis] = [(1, first), (first, middle), (first * middle, sizes[axis] // (first * middle))]
        wanted.append((axis, first))
    keys = [(axis, start) for axis, pieces in parts.items() for start, size in pieces]
    shape = [size for pieces in parts.values() for _, size in pieces]
    inner = [keys.index(key) for key in wanted]
    outer = [place for place in range(len(keys)) if place not in inner]
    grid = np.arange(math.prod(shape)).reshape(shape).transpose(outer + inner)
    groups = grid.reshape(-1, math.prod(shape[place] for place in inner))
    if not transposed:
        return groups
    source, axes_order = (_numbers(part) for part in transposed.groups())
    return np.arange(math.prod(source)).reshape(source).transpose(axes_order).reshape(-1)[groups]


def _numbers(text: str) -> Sequence[int]:
    return [int(number) for number in text.split(",") if number]
