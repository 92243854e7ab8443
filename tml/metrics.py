"""Metrics: sums that a step returns, and the sinks that the loop writes them to (console, TensorBoard, JSONL)."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax

from tml.params import Leaf

Scalars = Mapping[str, float]


@flax.struct.dataclass
class Mean:
    """A mean that has not been divided yet, so that it adds up exactly over chunks, steps and devices."""

    total: Leaf
    count: Leaf

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(total=self.total + other.total, count=self.count + other.count)


class Window:
    """Collects the metrics of the steps between two log lines; a `Mean` is pooled, anything else keeps its last value.

    Example:
        >>> window = Window()
        >>> window.add({"loss": Mean(np.float32(6.0), np.float32(3.0)), "lr": np.float32(0.1)})
        >>> window.add({"loss": Mean(np.float32(2.0), np.float32(1.0)), "lr": np.float32(0.2)})
        >>> window.take()["loss"]
        2.0
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._last: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Adds one step's metrics, fetching them from the device; returns that step's own values."""
        fetched = jax.device_get(dict(metrics))
        step: dict[str, float] = {}
        for name, value in fetched.items():
            if isinstance(value, Mean):
                total, count = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (total + float(value.total), count + float(value.count))
                if value.count > 0:
                    step[name] = float(value.total) / float(value.count)
            else:
                step[name] = self._last[name] = float(value)
        return step

    def take(self) -> dict[str, float]:
        """The values since the last call, and a fresh start. A mean over nothing is left out."""
        values = {name: total / count for name, (total, count) in self._sums.items() if count > 0}
        values |= self._last
        self._sums, self._last = {}, {}
        return values


@runtime_checkable
class Sink(Protocol):
    """Where scalars go."""

    def write(self, step: int, scalars: Scalars) -> None:
        """Writes the scalars of a step."""

    def close(self) -> None:
        """Flushes and releases what the sink holds."""


class JsonLines:
    """One JSON object a line, appended and flushed at once, so that a killed run loses at most one torn line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Scalars) -> None:
        """Appends one line. Numbers that JSON does not know (nan, inf) become null."""
        plain = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **plain}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Cuts what a killed writer left after the last line end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        position = end = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 4096)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position != end:
            file.truncate(position)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Reads what `JsonLines` wrote; a torn last line is left out.

    A run that was resumed may repeat steps after its last checkpoint; the later line counts.

    Raises:
        ValueError: a line that is not the last is not JSON.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); remove the line") from None


class TensorBoard:
    """Event files for TensorBoard, written at once.

    tensorboardX's own SummaryWriter writes in a thread. If that dies, of a full disk, the loop waits for ever.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        # Slow to import, and only the process that logs needs it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = Event, scalar
        self._writer = EventsWriter(str(folder / "events"))
        if start_step:
            # After a resume TensorBoard forgets what a killed run logged past its last checkpoint.
            begun = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=start_step + 1, wall_time=time.time(), session_log=begun))
            self._writer.flush()

    def write(self, step: int, scalars: Scalars) -> None:
        """Writes one point of every scalar's curve.

        Raises:
            OSError: the disk is full, or the file is gone.
        """
        now = time.time()
        for name, value in scalars.items():
            self._writer.write_event(self._event(step=step, wall_time=now, summary=self._scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


SHORT_NAMES = {
    "train/": "",
    "throughput/": "",
    "moe/": "",
    "/": " ",
    "accuracy_": "acc ",
    "loss_": "",
    "_per_s": "/s",
    "_": " ",
}


def short_name(name: str) -> str:
    """The name of a metric as the console shows it: `train/loss_text` becomes `text`."""
    for long, short in SHORT_NAMES.items():
        name = name.replace(long, short)
    return name


def short_number(value: float) -> str:
    """A number in about four figures: 12,345,678 becomes 12.3M."""
    if not math.isfinite(value):
        return str(value)
    for limit, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as 1h02m, 3m04s or 5s."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class PlainConsole:
    """One line a write, for files and pipes."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def write(self, step: int, scalars: Scalars) -> None:
        """Prints `step 10/400 name value …`."""
        print(f"step {step}/{self._num_steps}  {format_scalars(scalars)}", flush=True)

    def close(self) -> None:
        """Nothing to release."""


NOT_ON_CONSOLE = frozenset(
    {"train/accuracy_control", "eval/accuracy_control", "moe/load_max_over_mean", "data/tokens", "data/fill"}
)
"""What only TensorBoard and JSONL show."""


def console_parts(scalars: Scalars) -> list[str]:
    """`name value` of what the console shows, with short names."""
    return [
        f"{short_name(name)} {short_number(value)}"
        for name, value in scalars.items()
        if name not in NOT_ON_CONSOLE and not name.endswith("eta_s") and (value or not name.endswith("num_skipped"))
    ]


def format_scalars(scalars: Scalars) -> str:
    """What the console shows, in one line that ends with the time left."""
    parts = console_parts(scalars)
    if "throughput/eta_s" in scalars:
        parts.append(f"eta {duration(scalars['throughput/eta_s'])}")
    return "  ".join(parts)


class RichConsole:
    """A progress bar with the latest values below it, redrawn in place; evaluations stay above it."""

    def __init__(self, num_steps: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._num_steps = num_steps
        self._live = Live(console=Console(), auto_refresh=False, transient=False)

    def write(self, step: int, scalars: Scalars) -> None:
        """Redraws the panel; scalars of an evaluation are printed as a line that stays."""
        if not self._live.is_started:
            self._live.start()
        if any(name.startswith("eval/") for name in scalars):
            self._live.console.print(f"[bold]step {step}[/bold]  {format_scalars(scalars)}", highlight=False)
            return
        self._live.update(self._panel(step, scalars), refresh=True)

    def _panel(self, step: int, scalars: Scalars) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        head = Table.grid(padding=(0, 2))
        eta = scalars.get("throughput/eta_s")
        left = "" if eta is None else f"{duration(eta)} left"
        head.add_row(ProgressBar(total=self._num_steps, completed=step, width=40), f"{step}/{self._num_steps}", left)
        body = Table.grid(padding=(0, 2))
        cells = [
            f"[dim]{name}[/dim] {value}" for name, value in (part.rsplit(" ", 1) for part in console_parts(scalars))
        ]
        for start in range(0, len(cells), 5):
            body.add_row(*cells[start : start + 5])
        return Group(head, body)

    def close(self) -> None:
        """Leaves the last panel on the screen."""
        self._live.stop()


class Sinks:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, scalars: Scalars) -> None:
        """Writes to every sink."""
        for sink in self._sinks:
            sink.write(step, scalars)

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.close()


def open_sinks(workdir: Path, num_steps: int, start_step: int) -> Sinks:
    """The console (rich on a terminal, plain lines otherwise), `tensorboard/` and `metrics.jsonl` of a run folder.

    Only the first of several processes writes.
    """
    if jax.process_index() != 0:
        return Sinks([])
    console: Sink = RichConsole(num_steps) if sys.stdout.isatty() else PlainConsole(num_steps)
    return Sinks([console, TensorBoard(workdir / "tensorboard", start_step), JsonLines(workdir / "metrics.jsonl")])
