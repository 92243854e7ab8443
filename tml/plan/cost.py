"""What one instruction of a compiled program costs on a chip: FLOPs, bytes, seconds, and the category it counts under.

An operation takes the longer of its matmul FLOPs at peak and its bytes at the bandwidth of main memory. Inputs of
which a fusion reads a slice count as the slice; buffers updated in place count as the update; what stays in on-chip
memory counts nothing. Where the compiler's own estimate of a matmul's cycles agrees with arithmetic
(`Chip.is_cycles_trusted`), it counts instead when it is longer.
"""

import functools
import math
import re
from dataclasses import dataclass

import numpy as np

from tml.plan.chips import Chip
from tml.plan.hlo import HBM, Computation, Instruction, Program, inner_instructions
from tml.plan.links import COLLECTIVES

MATMUL, GROUPED_MATMUL, ATTENTION, ROUTER = "matmul", "grouped matmul", "attention", "router"
MOVEMENT, GATHER, SORT, ELEMENTWISE, OPTIMIZER = (
    "copy, transpose, convert",
    "gather, scatter",
    "sort",
    "elementwise",
    "optimizer",
)

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "add-dependency", "iota", "get-dimension-size", "domain"),
}
MOVING = {"copy", "transpose", "convert", "reshape", "bitcast-convert"}
PASSING = (
    FREE | MOVING | {"fusion", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "broadcast"}
)
GATHERING = {"gather", "scatter"}
SLICE_STARTS = {"slice-start", "dynamic-slice-start", "dynamic-update-slice-start", "async-start"}
"""What begins to move a part of an array: (operands), result, state. The whole is the first operand; the part is the
result, or of an update the second operand."""
FREE_CALLS = ("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "ConcatBitcast")
MATMUL_CALLS = ("__cublas", "__onednn$matmul")

SCOPES = {"attend": ATTENTION, "router": ROUTER, "update": OPTIMIZER, "gather_rows": GATHER}
"""Named scopes of the model and of the train step, and a kernel's name, and where their time counts."""
EXPERTS, SHARED_EXPERTS = "experts", "shared_experts"
"""The scope whose matmuls are grouped, but for those in the second."""


@dataclass(frozen=True)
class Cost:
    """What one execution of an instruction costs on one chip.

    Attributes:
        category: where its time counts.
        flops: of matmuls, convolutions and stated kernels.
        hbm_bytes: moved to and from main memory.
        seconds: the estimate.
        unknown: what could not be told, or empty.
    """

    category: str
    flops: float = 0.0
    hbm_bytes: float = 0.0
    seconds: float = 0.0
    unknown: str = ""


class CostModel:
    """Costs of the instructions of one program on one kind of chip.

    Args:
        program: the program.
        chip: the chip; of several devices on one, each has its part.
    """

    def __init__(self, program: Program, chip: Chip) -> None:
        self._program, self._chip = program, chip
        self.peak_flops_per_s = chip.peak_flops_per_s / chip.devices_per_chip
        self.hbm_bytes_per_s = chip.hbm_bytes_per_s / chip.devices_per_chip
        self._users: dict[str, dict[str, list[Instruction]]] = {}

    def cost(self, computation: Computation, instruction: Instruction) -> Cost:
        """The cost of an instruction that is not a collective, a loop or a call."""
        if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
            return Cost(ELEMENTWISE)
        if instruction.opcode == "custom-call":
            return self._custom_call(computation, instruction)
        flops = self.flops(computation, instruction)
        hbm_bytes = self.hbm_bytes(computation, instruction)
        seconds = max(flops / self.peak_flops_per_s, hbm_bytes / self.hbm_bytes_per_s)
        if flops:
            seconds = max(seconds, self._compiler_seconds(instruction))
        seconds = max(seconds, self._gather_seconds(computation, instruction))
        return Cost(self.category(computation, instruction, flops), flops, hbm_bytes, seconds)

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        """FLOPs of the matmuls and convolutions in an instruction."""
        return sum(_matmul_flops(scope, inner) for scope, inner in self._inside(computation, instruction))

    def hbm_bytes(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes that an instruction moves to and from main memory."""
        opcode = instruction.opcode
        operands = [computation.instructions[name] for name in instruction.operands]
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _hbm_bytes(instruction)
        if opcode == "dynamic-update-slice":
            return 2 * _hbm_bytes(operands[1])
        if opcode == "scatter":
            return 3 * sum(_hbm_bytes(update) for update in _updates(computation, instruction))
        if opcode == "copy-start":
            return sum(array.hbm_bytes for array in instruction.arrays[:2])
        if opcode in SLICE_STARTS:
            stack, part = instruction.arrays[0], instruction.arrays[self._place_of_part(instruction)]
            return part.num_bytes * ((stack.space == HBM) + (part.space == HBM))
        if opcode == "sort":
            length = instruction.arrays[0].dims[instruction.integers("dimensions")[0]]
            return 2 * math.log2(max(2, length)) * _hbm_bytes(instruction)
        if opcode != "fusion":
            return sum(_hbm_bytes(operand) for operand in operands) + _hbm_bytes(instruction)
        fused = self._program.computations[instruction.called["calls"]]
        # What a collective that passes through a matmul's fusion moves is no traffic of the matmul's.
        passing = _passing_places(fused) if fused.name.startswith("async_collective_fusion") else set()
        read = 0.0
        for place, operand in enumerate(operands):
            if place not in passing and any(array.space == HBM for array in operand.arrays):
                whole = _hbm_bytes(operand)
                parameter = fused.parameters.get(place)
                read += whole if parameter is None else min(whole, self._read_bytes(fused, parameter.name))
        return read + self._written_bytes(fused, fused.root, instruction)

    def _place_of_part(self, start: Instruction) -> int:
        """Which array of one of SLICE_STARTS is the part that moves."""
        inner = start.called.get("calls")
        opcode = self._program.computations[inner].root.opcode if inner else start.opcode.removesuffix("-start")
        return 1 if opcode == "dynamic-update-slice" else len(start.operands)

    def category(self, computation: Computation, instruction: Instruction, flops: float) -> str:
        """Where the time of an instruction counts."""
        # jax writes the gradient of a scope as transpose(jvp(scope)).
        scopes = set(re.split(r"[/()]", instruction.op_name))
        scoped = next((name for scope, name in SCOPES.items() if scope in scopes), None)
        if flops:
            is_grouped = EXPERTS in scopes and SHARED_EXPERTS not in scopes
            return scoped or (GROUPED_MATMUL if is_grouped else MATMUL)
        opcodes = {inner.opcode for _, inner in self._inside(computation, instruction)}
        if opcodes & GATHERING:
            return GATHER
        if "sort" in opcodes:
            return SORT
        if opcodes <= PASSING and opcodes & MOVING:
            return MOVEMENT
        return scoped or ELEMENTWISE

    def _inside(self, computation: Computation, instruction: Instruction) -> list[tuple[Computation, Instruction]]:
        if instruction.opcode != "fusion":
            return [(computation, instruction)]
        return list(inner_instructions(self._program, self._program.computations[instruction.called["calls"]]))

    def _custom_call(self, computation: Computation, instruction: Instruction) -> Cost:
        target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
        if target in FREE_CALLS:
            return Cost(ELEMENTWISE)
        operands = [computation.instructions[name] for name in instruction.operands]
        moved = sum(_hbm_bytes(operand) for operand in operands) + _hbm_bytes(instruction)
        flops, unknown = 0.0, ""
        stated = _stated_cost(instruction)
        if stated:
            numbers = dict(re.findall(r'"(\w+)": ?"?(\d+)', stated))
            flops, moved = float(numbers.get("flops", 0)), float(numbers.get("bytes_accessed", moved))
        elif target.startswith(MATMUL_CALLS):
            flops = _library_matmul_flops(computation, instruction)
        else:
            unknown = f"FLOPs of {target}, which states no cost_estimate; its bytes count by its shapes"
        seconds = max(flops / self.peak_flops_per_s, moved / self.hbm_bytes_per_s)
        category = self.category(computation, instruction, flops)
        return Cost(category, flops, moved, seconds, unknown)

    def _compiler_seconds(self, instruction: Instruction) -> float:
        cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
        if not self._chip.is_cycles_trusted or cycles is None:
            return 0.0
        return int(cycles) / self._chip.clock_hz

    def _gather_seconds(self, computation: Computation, instruction: Instruction) -> float:
        """Rows that are gathered one by one take a time each, whatever the bandwidth."""
        per_row, per_byte = self._chip.row_gather_cycles
        if not per_row:
            return 0.0
        cycles = 0.0
        for _, inner in self._inside(computation, instruction):
            if inner.opcode == "gather":
                sizes = inner.integers("slice_sizes")
                rows = inner.arrays[0].size / max(1, math.prod(sizes))
                row_bytes = inner.arrays[0].num_bytes / max(1.0, rows)
                cycles += rows * (per_row + per_byte * row_bytes)
        return cycles / self._chip.clock_hz

    def _users_in(self, computation: Computation) -> dict[str, list[Instruction]]:
        if computation.name not in self._users:
            users: dict[str, list[Instruction]] = {}
            for instruction in computation.instructions.values():
                for operand in instruction.operands:
                    users.setdefault(operand, []).append(instruction)
            self._users[computation.name] = users
        return self._users[computation.name]

    def _read_bytes(self, computation: Computation, name: str) -> float:
        """Bytes of a value that its users inside a fusion read; infinite for all of it."""
        total = math.inf if computation.root.name == name else 0.0
        for user in self._users_in(computation).get(name, []):
            if user.opcode == "bitcast":
                total += self._read_bytes(computation, user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += user.out_bytes
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue
            elif user.opcode == "scatter" and name in user.operands[: len(user.operands) // 2]:
                # In place too: what it updates is read, and nothing else.
                total += sum(update.out_bytes for update in _updates(computation, user))
            elif user.opcode == "fusion":
                inner = self._program.computations[user.called["calls"]]
                places = [place for place, operand in enumerate(user.operands) if operand == name]
                for place in places:
                    # A fusion inside may hand on what it gets, for others to read.
                    hands_on = _without_bitcasts(inner, inner.root).name == inner.parameters[place].name
                    reader, value = (computation, user.name) if hands_on else (inner, inner.parameters[place].name)
                    total += self._read_bytes(reader, value)
            else:
                return math.inf
        return total

    def _written_bytes(self, fused: Computation, root: Instruction, fusion: Instruction) -> float:
        """Bytes that a fusion writes: only the update where its result is a buffer updated in place."""
        if root.opcode == "tuple":
            parts = [fused.instructions[name] for name in root.operands]
            written = [array.space == HBM for array in fusion.arrays]
            is_step = fused.name.startswith("async_collective_fusion")
            passes = [is_step and (part.opcode == "parameter" or part.opcode in COLLECTIVES) for part in parts]
            sizes = [0.0 if does else self._update_bytes(fused, part) for part, does in zip(parts, passes, strict=True)]
            return sum(size for size, is_written in zip(sizes, written, strict=False) if is_written)
        return min(_hbm_bytes(fusion), self._update_bytes(fused, root)) if _hbm_bytes(fusion) else 0.0

    def _update_bytes(self, scope: Computation, result: Instruction) -> float:
        while result.opcode in ("bitcast", "copy") and result.operands[0] in scope.instructions:
            result = scope.instructions[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            return scope.instructions[result.operands[1]].out_bytes
        if result.opcode == "scatter":
            return sum(update.out_bytes for update in _updates(scope, result))
        return result.out_bytes


def _without_bitcasts(scope: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = scope.instructions[instruction.operands[0]]
    return instruction


def _updates(scope: Computation, scatter: Instruction) -> list[Instruction]:
    """What a scatter writes; its operands are the arrays that it writes into, the places, and as many updates."""
    return [scope.instructions[name] for name in scatter.operands[len(scatter.operands) // 2 + 1 :]]


def _stated_cost(kernel: Instruction) -> str | None:
    """What a Pallas kernel says that it costs: for TPU by itself, for GPU in its metadata, with quotes in octal."""
    beside = kernel.attribute(r'serialized_metadata = "([^"]*)"')
    return beside.replace(r"\22", '"') if beside else kernel.attribute(r'"cost_estimate":\{([^}]*)\}')


def _passing_places(fused: Computation) -> set[int]:
    """The parameters of a fusion that only a collective inside it takes, or nobody."""
    takers: dict[str, set[str]] = {}
    for instruction in fused.instructions.values():
        for operand in instruction.operands:
            takers.setdefault(operand, set()).add(instruction.opcode)
    return {
        place
        for place, parameter in fused.parameters.items()
        if takers.get(parameter.name, set()) <= {*COLLECTIVES, "tuple"}
    }


def _hbm_bytes(instruction: Instruction) -> float:
    return sum(array.hbm_bytes for array in instruction.arrays)


def _matmul_flops(scope: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        left = scope.instructions[instruction.operands[0]].arrays[0]
        summed = math.prod(left.dims[dim] for dim in instruction.integers("lhs_contracting_dims"))
        return 2.0 * instruction.arrays[0].size * summed
    if instruction.opcode == "convolution":
        return _convolution_flops(scope, instruction)
    return 0.0


def _convolution_flops(scope: Computation, instruction: Instruction) -> float:
    """FLOPs of a convolution: pairs of input and kernel places that meet; padding and holes cost nothing.

    On TPU every matmul is one; a batch dimension becomes a spatial one in which most pairs do not meet.
    """
    left, right = (scope.instructions[name].arrays[0] for name in instruction.operands[:2])
    labels = instruction.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    assert labels, instruction.name
    in_labels, rest = labels.split("_")
    kernel_labels, out_labels = rest.split("->")
    groups = int(instruction.attribute(r"feature_group_count=(\d+)") or 1)
    batch_groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    out = instruction.arrays[0]
    flops = 2.0 * left.dims[in_labels.index("f")] / groups * out.dims[out_labels.index("f")]
    flops *= left.dims[in_labels.index("b")] / batch_groups
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    spatial = sorted(label for label in in_labels if label.isdigit())
    for place, label in enumerate(spatial):
        flops *= _meeting_pairs(
            left.dims[in_labels.index(label)],
            right.dims[kernel_labels.index(label)],
            out.dims[out_labels.index(label)],
            _window(window, "stride", place, 1),
            _window(window, "lhs_dilate", place, 1),
            _window(window, "rhs_dilate", place, 1),
            _window(window, "pad", place, 0),
        )
    return flops


def _window(window: str, name: str, place: int, default: int) -> int:
    found = re.search(rf"\b{name}=([\dx_\-]+)", window)
    return int(found.group(1).split("x")[place].split("_")[0]) if found else default


@functools.lru_cache(maxsize=4096)
def _meeting_pairs(size: int, kernel: int, out: int, stride: int, hole: int, kernel_hole: int, pad: int) -> int:
    positions = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * kernel_hole - pad
    return int(((positions >= 0) & (positions <= (size - 1) * hole) & (positions % hole == 0)).sum())


def _library_matmul_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a library's matmul, from the sizes of its operands and result: sqrt(left * right * out) a batch."""
    left, right = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    found = instruction.attribute(r'"lhs_batch_dimensions":\[([^\]]*)\]') or ""
    batch = math.prod(left.dims[int(dim)] for dim in re.findall(r"\d+", found))
    out = instruction.arrays[0]
    return 2.0 * batch * math.sqrt(left.size / batch * right.size / batch * out.size / batch)
