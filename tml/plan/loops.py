"""How often the loops of a compiled program run, where that can be read from it."""

import re
from dataclasses import dataclass

from tml.plan.hlo import Computation, Instruction, Program

_STATED = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SAME_VALUE = ("copy", "bitcast", "copy-start", "copy-done", "convert")


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a while loop runs: as XLA states it, or from a counter compared with a constant; None if unknown."""
    stated = _STATED.search(loop.attributes)
    if stated:
        return int(stated.group(1))
    condition = program.computations[loop.called["condition"]]
    body = program.computations[loop.called["body"]]
    compare = _find_compare(program, condition)
    if compare is None:
        return None
    direction, left, right = compare
    if isinstance(left, int) or direction not in ("LT", "LE", "NE"):
        return None
    limit = right
    start = _initial(program, computation, loop, left.index)
    limit_value = limit if isinstance(limit, int) else _initial(program, computation, loop, limit.index)
    step = _step(program, body, left.index)
    if start is None or limit_value is None or not step or step < 0:
        return None
    return max(0, -(-(limit_value - start + (direction == "LE")) // step))


@dataclass(frozen=True)
class _Element:
    """An element of the loop's tuple."""

    index: int


_Scalar = int | _Element


def _find_compare(program: Program, condition: Computation) -> tuple[str, _Scalar, _Scalar] | None:
    """The comparison that ends the loop, looked up through a fusion around it."""
    root, scope, outer = condition.root, condition, condition
    bound: dict[int, str] = {}
    if root.opcode == "fusion":
        bound = dict(enumerate(root.operands))
        scope = program.computations[root.called["calls"]]
        root = scope.root
    if root.opcode != "compare":
        return None
    sides = []
    for operand in root.operands:
        instruction, where = scope.instructions[operand], scope
        if bound and instruction.opcode == "parameter":
            instruction, where = outer.instructions[bound[int(instruction.literal)]], outer
        value = _scalar(where, instruction)
        if value is None:
            return None
        sides.append(value)
    direction = root.attribute(r"direction=(\w+)") or ""
    if isinstance(sides[0], int) and direction == "GT":
        return "LT", sides[1], sides[0]
    return direction, sides[0], sides[1]


def _scalar(scope: Computation, instruction: Instruction) -> _Scalar | None:
    """A constant, or the loop element that an instruction passes on."""
    while instruction.opcode in _SAME_VALUE:
        instruction = scope.instructions[instruction.operands[0]]
    if instruction.opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if instruction.opcode == "get-tuple-element":
        index = instruction.attribute(r"index=(\d+)")
        return _Element(int(index)) if index else None
    return None


def _initial(program: Program, computation: Computation, loop: Instruction, index: int) -> int | None:
    """The value with which an element of the loop's tuple begins, where it is a constant."""
    source = computation.instructions[loop.operands[0]]
    if source.opcode == "tuple":
        value = _scalar(computation, computation.instructions[source.operands[index]])
        if not isinstance(value, _Element):
            return value
        inner = computation.instructions[source.operands[index]]
        while inner.opcode != "get-tuple-element":
            inner = computation.instructions[inner.operands[0]]
        source, index = computation.instructions[inner.operands[0]], value.index
    if source.opcode == "while" and _step(program, program.computations[source.called["body"]], index) == 0:
        return _initial(program, computation, source, index)
    return None


def _step(program: Program, body: Computation, index: int) -> int | None:
    """What a turn of the loop adds to an element; 0 where it passes unchanged, None where that is not plain."""
    root = body.root
    if root.opcode != "tuple":
        return None
    instruction, bound = body.instructions[root.operands[index]], {}
    while instruction.opcode in _SAME_VALUE:
        instruction = body.instructions[instruction.operands[0]]
    if instruction.opcode == "get-tuple-element":
        return 0 if instruction.attribute(r"index=(\d+)") == str(index) else None
    scope = body
    if instruction.opcode == "fusion":
        bound = dict(enumerate(instruction.operands))
        scope = program.computations[instruction.called["calls"]]
        instruction = scope.root
    if instruction.opcode != "add":
        return None
    values = []
    for operand in instruction.operands:
        inner, where = scope.instructions[operand], scope
        if bound and inner.opcode == "parameter":
            inner, where = body.instructions[bound[int(inner.literal)]], body
        values.append(_scalar(where, inner))
    constants = [value for value in values if isinstance(value, int)]
    elements = [value for value in values if isinstance(value, _Element)]
    return constants[0] if len(constants) == 1 and [e.index for e in elements] == [index] else None
