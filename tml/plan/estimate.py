"""From a compiled program to seconds: the schedule replayed, a lower bound, and what the time goes to.

The replay runs the instructions in their scheduled order on one chip. A collective that is split into start and done
runs on the links beside what stands between the two; one that is not holds everything up. Loop bodies count as
often as they run; a conditional takes its longest branch, and its sums an equal part of each. The lower bound lets
everything overlap: it is the time of the busiest of the matmul units, main memory, the links, and the network
between slices.

Not known, and not in any number: what it takes to start an operation (they are counted), contention for links
between collectives of different groups, the time of the vector units, waiting of chips for each other, input of data,
and what a loop runs whose count is decided while it runs.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tml.plan.cost import ELEMENTWISE, Cost, CostModel
from tml.plan.hlo import Computation, Instruction, Program, inner_instructions
from tml.plan.links import Fabric, Transfer, collective_kind, transfer
from tml.plan.loops import trip_count

SLICES = ("slice", "dynamic-slice", "dynamic-update-slice")
PREFETCH = ("copy-start", *(f"{opcode}-start" for opcode in SLICES))
SUMS = ("count", "flops", "hbm_bytes", "transfer_bytes", "core_seconds", "link_seconds", "exposed_seconds")


@dataclass
class Line:
    """One instruction of the program, over all the times it runs.

    Attributes:
        name: as in the HLO.
        category: where its time counts.
        source: file and line that asked for it, or for what it runs.
        scope: the path of named scopes, likewise.
        count: how often it runs.
        flops: all of its runs together, as all that follows.
        hbm_bytes: moved to and from main memory.
        transfer_bytes: received from other devices.
        core_seconds: in which the chip computes.
        link_seconds: in which links or network are busy.
        exposed_seconds: in which the chip waits for the links.
    """

    name: str
    category: str
    source: str
    scope: str
    count: float = 0.0
    flops: float = 0.0
    hbm_bytes: float = 0.0
    transfer_bytes: float = 0.0
    core_seconds: float = 0.0
    link_seconds: float = 0.0
    exposed_seconds: float = 0.0

    def add(self, other: "Line") -> None:
        """Adds another's sums."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def seconds(self) -> float:
        """What it adds to the step."""
        return self.core_seconds + self.exposed_seconds


@dataclass
class Estimate:
    """What a program takes on every chip.

    Attributes:
        seconds: by replay of the schedule.
        lower_seconds: with everything overlapped.
        lower_limit: the resource that the lower bound is.
        lines: every instruction that takes time.
        unknown: what could not be told.
    """

    seconds: float
    lower_seconds: float
    lower_limit: str
    lines: list[Line]
    unknown: list[str]

    def by_category(self) -> dict[str, Line]:
        """Sums of the lines of each category, largest first."""
        sums: dict[str, Line] = {}
        for line in self.lines:
            total = sums.setdefault(line.category, Line(line.category, line.category, "", ""))
            total.add(line)
        return dict(sorted(sums.items(), key=lambda item: -item[1].seconds))

    def top(self, count: int) -> list[Line]:
        """The lines that take longest, those of one category, source line and innermost scope together."""
        merged: dict[tuple[str, ...], Line] = {}
        for line in self.lines:
            # The last name is the operation's; jax writes the gradient of a scope as transpose(jvp(scope)).
            innermost = [name for name in re.split(r"[/()]", line.scope) if name][-2:-1]
            key = (line.category, line.source or line.scope or line.name, *innermost)
            if key not in merged:
                merged[key] = dataclasses.replace(line)
                continue
            total = merged[key]
            total.add(line)
        return sorted(merged.values(), key=lambda line: -line.seconds)[:count]

    def numbers(self) -> dict[str, Any]:
        """Categories, top costs and what is not known, as plain values."""
        return {
            "categories": [_plain(line) for line in self.by_category().values()],
            "top_costs": [{**_plain(line), "scope": line.scope} for line in self.top(10)],
            "operations": sum(line.count for line in self.lines),
            "unknown": self.unknown,
        }


def _plain(line: Line) -> dict[str, Any]:
    return vars(line) | {"seconds": line.seconds}


def estimate(program: Program, fabric: Fabric, unknown_trips: int = 1) -> Estimate:
    """Estimates a program.

    Args:
        program: the compiled program, scheduled.
        fabric: the devices it runs on.
        unknown_trips: how often a loop is taken to run whose count is decided while it runs.
    """
    replay = _Replay(program, fabric, unknown_trips)
    seconds = replay.run(program.entry, 1.0)
    lines = [line for line in replay.lines.values() if line.core_seconds or line.link_seconds or line.hbm_bytes]
    network = replay.network_seconds
    busy = {
        "matmul units": sum(line.flops for line in lines) / replay.costs.peak_flops_per_s,
        "main memory": sum(line.hbm_bytes for line in lines) / replay.costs.hbm_bytes_per_s,
        "links": replay.link_seconds,
        "network": network,
    }
    limit = max(busy, key=lambda name: busy[name])
    # What is fetched ahead shares main memory with what hides it, which the replay does not see.
    return Estimate(max(seconds, busy[limit]), busy[limit], limit, lines, sorted(replay.unknown))


@dataclass
class _Clock:
    """The time of one computation's run: of the chip, of its links, and when asynchronous work is over."""

    now: float = 0.0
    links_free: float = 0.0
    network_free: float = 0.0
    memory_free: float = 0.0
    ends: dict[str, tuple[float, Line]] = field(default_factory=dict)


class _Replay:
    """Runs computations in order and adds up what each instruction takes."""

    def __init__(self, program: Program, fabric: Fabric, unknown_trips: int) -> None:
        self.program, self.fabric, self.unknown_trips = program, fabric, unknown_trips
        self.costs = CostModel(program, fabric.chip)
        self.lines: dict[str, Line] = {}
        self.unknown: set[str] = set()
        self.link_seconds = self.network_seconds = 0.0

    def run(self, computation: Computation, times: float) -> float:
        """The seconds of one run of a computation that runs `times` times in all."""
        clock = _Clock()
        for instruction in computation.instructions.values():
            self._step(computation, instruction, clock, times)
        return clock.now

    def _step(self, computation: Computation, instruction: Instruction, clock: _Clock, times: float) -> None:
        opcode = instruction.opcode
        rendezvous = instruction.attribute(r'_xla_host_transfer_rendezvous="([^"]+)"')
        if opcode == "while":
            self._loop(computation, instruction, clock, times)
        elif opcode == "send" and rendezvous:
            self._send_to_slices(computation, instruction, rendezvous, clock, times)
        elif opcode == "recv-done" and rendezvous:
            self._wait(dataclasses.replace(instruction, operands=(rendezvous,)), clock, times)
        elif opcode == "conditional":
            branches = [self.program.computations[name] for name in instruction.branches]
            clock.now += max(self.run(branch, times / len(branches)) for branch in branches)
        elif opcode == "call":
            clock.now += self.run(self.program.computations[instruction.called["to_apply"]], times)
        elif opcode.endswith(("-done", "-update")):
            self._wait(instruction, clock, times)
        elif opcode == "fusion" and self._has_call(instruction, "AsyncCollectiveDone"):
            self._wait(self._from_start(computation, instruction), clock, times)
        elif opcode in PREFETCH or self._is_wrapped_slice(instruction):
            self._prefetch(computation, instruction, clock, times)
        else:
            self._operation(computation, instruction, clock, times)

    def _loop(self, computation: Computation, instruction: Instruction, clock: _Clock, times: float) -> None:
        trips = trip_count(self.program, computation, instruction)
        if trips is None:
            trips = self.unknown_trips
            source = self.program.source_of(instruction) or instruction.name
            self.unknown.add(f"how often the loop at {source} runs; taken as {trips}")
        body = self.program.computations[instruction.called["body"]]
        clock.now += trips * self.run(body, times * trips)

    def _wait(self, instruction: Instruction, clock: _Clock, times: float) -> None:
        for operand in instruction.operands:
            if operand in clock.ends:
                end, line = clock.ends.pop(operand)
                if instruction.opcode.endswith("-update"):
                    clock.ends[instruction.name] = (end, line)
                    continue
                line.exposed_seconds += times * max(0.0, end - clock.now)
                clock.now = max(clock.now, end)

    def _send_to_slices(
        self, computation: Computation, instruction: Instruction, rendezvous: str, clock: _Clock, times: float
    ) -> None:
        """A sum over slices of TPUs, which the hosts carry out between a send and a receive of one rendezvous."""
        slices = len(np.unique(self.fabric.coords[:, 0]))
        moved = computation.instructions[instruction.operands[0]].out_bytes
        received = 2 * moved * (slices - 1) / slices
        seconds = received / self.fabric.network_bytes_per_s
        line = self._line(instruction, "all-reduce")
        line.count += times
        line.transfer_bytes += times * received
        line.link_seconds += times * seconds
        self.network_seconds += times * seconds
        clock.network_free = max(clock.network_free, clock.now) + seconds
        clock.ends[rendezvous] = (clock.network_free, line)

    def _is_wrapped_slice(self, instruction: Instruction) -> bool:
        """Whether an instruction starts a computation that is one slice: how a TPU fetches ahead by parts."""
        inner = instruction.called.get("calls") if instruction.opcode == "async-start" else None
        return inner is not None and self.program.computations[inner].root.opcode in SLICES

    def _has_call(self, instruction: Instruction, target: str) -> bool:
        """Whether a fusion is an end of a collective that is spread over several fusions (TPU)."""
        inner = instruction.called.get("calls") if instruction.opcode == "fusion" else None
        members = self.program.computations[inner].instructions.values() if inner else ()
        return any(f'custom_call_target="{target}"' in member.attributes for member in members)

    def _from_start(self, computation: Computation, instruction: Instruction) -> Instruction:
        """The same with the collectives under way as its operands, instead of what was taken from their tuples."""
        sources = [computation.instructions[name] for name in instruction.operands]
        starts = {source.operands[0] for source in sources if source.opcode == "get-tuple-element"}
        return dataclasses.replace(instruction, operands=tuple(sorted(starts)))

    def _prefetch(self, computation: Computation, instruction: Instruction, clock: _Clock, times: float) -> None:
        moved = self.costs.hbm_bytes(computation, instruction)
        line = self._line(instruction, ELEMENTWISE)
        line.count += times
        line.hbm_bytes += times * moved
        clock.memory_free = max(clock.memory_free, clock.now) + moved / self.costs.hbm_bytes_per_s
        clock.ends[instruction.name] = (clock.memory_free, line)

    def _operation(self, computation: Computation, instruction: Instruction, clock: _Clock, times: float) -> None:
        is_step = instruction.called.get("calls", "").startswith("async_collective_fusion")
        transfers = [] if is_step else self._transfers(computation, instruction)
        is_start = instruction.opcode.endswith("-start") or self._has_call(instruction, "AsyncCollectiveStart")
        cost = Cost(ELEMENTWISE) if transfers else self.costs.cost(computation, instruction)
        if instruction.opcode == "fusion" and transfers and not is_start:
            cost = self.costs.cost(computation, instruction)
        if is_step:
            for start in clock.ends.keys() & set(self._from_start(computation, instruction).operands):
                clock.ends[instruction.name] = clock.ends.pop(start)
        if not transfers and not cost.seconds:
            return
        line = self._line(instruction, transfers[0].kind if transfers and not cost.flops else cost.category)
        line.count += times
        line.flops += times * cost.flops
        line.hbm_bytes += times * cost.hbm_bytes
        line.core_seconds += times * cost.seconds
        if cost.unknown:
            self.unknown.add(cost.unknown)
        link_seconds = sum(moved.seconds for moved in transfers)
        line.transfer_bytes += times * sum(moved.num_bytes for moved in transfers)
        line.link_seconds += times * link_seconds
        self.link_seconds += times * sum(moved.link_seconds for moved in transfers)
        self.network_seconds += times * sum(moved.network_seconds for moved in transfers)
        if not transfers:
            clock.now += cost.seconds
            return
        clock.links_free = max(clock.links_free, clock.now) + link_seconds
        clock.now += cost.seconds
        if is_start:
            clock.ends[instruction.name] = (clock.links_free, line)
        else:
            line.exposed_seconds += times * max(0.0, clock.links_free - clock.now)
            clock.now = max(clock.now, clock.links_free)

    def _transfers(self, computation: Computation, instruction: Instruction) -> list[Transfer]:
        """The collectives in an instruction: itself, or those inside a fusion or an asynchronous computation."""
        if collective_kind(instruction.opcode):
            operands = [computation.instructions[name] for name in instruction.operands]
            return [transfer(instruction, _operand_bytes(instruction, operands), self.fabric)]
        inner = instruction.called.get("calls")
        if instruction.opcode == "call-start":
            inner = instruction.called["to_apply"]
        if inner is None:
            return []
        return [
            moved
            for scope, member in inner_instructions(self.program, self.program.computations[inner])
            if collective_kind(member.opcode)
            for moved in self._transfers(scope, _as_scatter(scope, member))
        ]

    def _line(self, instruction: Instruction, category: str) -> Line:
        if instruction.name not in self.lines:
            self.lines[instruction.name] = Line(instruction.name, category, *self.program.origin_of(instruction))
        return self.lines[instruction.name]


def _operand_bytes(collective: Instruction, operands: list[Instruction]) -> float:
    """Bytes that one device puts into a collective.

    A ragged all-to-all has a buffer to send from, one to receive into, and offsets and sizes. One of the buffers is as
    large as what travels, the other has room to spare: that of the experts' rows, by the capacity factor. With a
    balanced load what travels is the smaller one, there and back.
    """
    sizes = [operand.out_bytes for operand in operands]
    return min(sizes[:2]) if collective_kind(collective.opcode) == "ragged-all-to-all" else sum(sizes)


def _as_scatter(scope: Computation, member: Instruction) -> Instruction:
    """A reduction of which a TPU's fusion keeps this device's slice alone travels as a reduce-scatter, and is one."""
    is_scatter = scope.name.startswith("all-reduce-scatter") and member.opcode == "all-reduce"
    return dataclasses.replace(member, opcode="reduce-scatter") if is_scatter else member
