"""Reads scheduled HLO text: computations, instructions with their shapes, and the source lines they came from.

The text is what `compiled.as_text()` gives (https://openxla.org/xla/operation_semantics names the operations).
Nothing here knows what anything costs.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

DTYPE_BYTES: dict[str, float] = {
    **dict.fromkeys(("pred", "s8", "u8"), 1.0),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2.0),
    **dict.fromkeys(("s32", "u32", "f32"), 4.0),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8.0),
    **dict.fromkeys(("s4", "u4", "f4e2m1fn"), 0.5),
    **dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz", "f8e8m0fnu", "f8e4m3", "f8e3m4"), 1.0),
    "c128": 16.0,
    "token": 0.0,
    "opaque": 0.0,
}
HBM, ON_CHIP = "hbm", "on_chip"

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPCODE = re.compile(r"([\w\-]+)\(")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')


@dataclass(frozen=True)
class ArrayShape:
    """One array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    space: str
    """HBM, or ON_CHIP for what the compiler keeps in the chip's own memory."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        """Bytes, wherever they are."""
        return self.size * DTYPE_BYTES[self.dtype]

    @property
    def hbm_bytes(self) -> float:
        """Bytes that have to be moved to or from main memory."""
        return self.num_bytes if self.space == HBM else 0.0


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: unique in the program.
        opcode: as in HLO, `fusion`, `dot`, `all-gather-start` and so on.
        arrays: the arrays of its result, a tuple's flattened.
        operands: names of the instructions it reads.
        literal: what stands in the brackets of a constant or a parameter.
        attributes: the text after the operands.
        is_root: whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[ArrayShape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """The path of named scopes that the instruction came from."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations that it runs, by their role; a fusion's is `calls`."""
        return dict(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> list[str]:
        """Computations of which a conditional runs one."""
        found = _BRANCHES.search(self.attributes)
        roles = ("true_computation", "false_computation")
        return _NAME.findall(found.group(1)) if found else [self.called[role] for role in roles if role in self.called]

    @property
    def out_bytes(self) -> float:
        """Bytes of the result, wherever they are."""
        return sum(array.num_bytes for array in self.arrays)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression, searched in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    def integers(self, name: str) -> tuple[int, ...]:
        """The numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        found = self.attribute(rf"\b{name}=\{{([\d,]*)\}}")
        return tuple(int(number) for number in found.split(",")) if found else ()


@dataclass
class Computation:
    """A named list of instructions, in the order in which they are scheduled."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @functools.cached_property
    def root(self) -> Instruction:
        """The result."""
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters, by their number."""
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclass
class Program:
    """A whole module."""

    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int
    lines: dict[int, str]
    """By stack frame, the file and line that asked for an operation."""

    def origin_of(self, instruction: Instruction) -> tuple[str, str]:
        """Source line and path of scopes of an instruction, or of the first one inside it that has them.

        A TPU's collectives that run beside the cores lose theirs; the sum that they make keeps its own.
        """
        source = next(filter(None, map(self.source_of, self._with_inner(instruction))), "")
        return source, next(filter(None, (inner.op_name for inner in self._with_inner(instruction))), "")

    def _with_inner(self, instruction: Instruction) -> Iterator[Instruction]:
        yield instruction
        for name in instruction.called.values():
            for inner in self.computations[name].instructions.values():
                yield from self._with_inner(inner)

    def source_of(self, instruction: Instruction) -> str:
        """File and line of ours, or of a library, that the instruction came from; empty where the compiler made it."""
        frame = _FRAME.search(instruction.attributes)
        if frame:
            return self.lines.get(int(frame.group(1)), "")
        found = _SOURCE.search(instruction.attributes)
        return f"{found.group(1)}:{found.group(2)}" if found else ""


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    Raises:
        ValueError: the text has no entry computation, so it is not a whole module.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    lines = text.split("\n")
    for line in lines:
        if current is not None:
            if line.startswith("}"):
                current = None
            elif " = " in line:
                instruction = parse_instruction(line)
                current.instructions[instruction.name] = instruction
            continue
        found = _COMPUTATION.match(line) if line.endswith("{") else None
        if found:
            current = computations[found.group(2)] = Computation(found.group(2))
            entry = current if found.group(1) else entry
    if entry is None:
        raise ValueError("the text holds no ENTRY computation; give the whole text of a compiled HLO module")
    partitions = re.search(r"num_partitions=(\d+)", lines[0])
    return Program(computations, entry, int(partitions.group(1)) if partitions else 1, _source_lines(lines))


def parse_instruction(line: str) -> Instruction:
    """Reads one line: `[ROOT] %name = shape opcode(operands), attributes`."""
    left, _, right = line.partition(" = ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, rest = right[:end], right[end:].lstrip()
    opcode = _OPCODE.match(rest)
    assert opcode, line[:200]
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    return Instruction(
        name=left.split("%")[-1].strip(),
        opcode=opcode.group(1),
        arrays=tuple(_array(*found) for found in _ARRAY.findall(shape)),
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        attributes=rest[close + 1 :],
        is_root=left.lstrip().startswith("ROOT "),
    )


def _array(dtype: str, dims: str, layout: str) -> ArrayShape:
    numbers = tuple(int(number.replace("<=", "")) for number in dims.replace(" ", "").split(",") if number)
    space = re.search(r"S\((\d+)\)", layout)
    return ArrayShape(dtype, numbers, ON_CHIP if space and space.group(1) != "5" else HBM)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"a bracket is never closed in {text[opening : opening + 80]!r}")


def _source_lines(lines: list[str]) -> dict[int, str]:
    """Resolves the tables of files, locations and stack frames that stand before the computations."""
    tables: dict[str, dict[int, str]] = {}
    current: dict[int, str] | None = None
    for line in lines:
        if line.startswith(("%", "ENTRY")):
            break
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(line, {})
        elif current is not None and line[:1].isdigit():
            key, _, value = line.partition(" ")
            current[int(key)] = value
    files = {number: name.strip('"') for number, name in tables.get("FileNames", {}).items()}
    places = {}
    for number, text in tables.get("FileLocations", {}).items():
        fields = _fields(text)
        places[number] = f"{files.get(int(fields['file_name_id']), '')}:{fields['line']}"
    frames = tables.get("StackFrames", {})
    return {number: places.get(int(_fields(text)["file_location_id"]), "") for number, text in frames.items()}


def _fields(text: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\d+)", text))


def inner_instructions(program: Program, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
    """Every instruction of a fused computation, those of fusions and calls inside it included."""
    for instruction in computation.instructions.values():
        yield computation, instruction
        inner = instruction.called.get("calls" if instruction.opcode == "fusion" else "to_apply")
        if instruction.opcode in ("fusion", "call") and inner:
            yield from inner_instructions(program, program.computations[inner])
