"""A progress line: redrawn on a terminal, repeated every few seconds elsewhere."""

import sys
import time

LINE_EVERY_S = 10.0


class Progress:
    """Shows on standard error how much of a job is done, and about how long the rest takes.

    Example:
        show = Progress("requests", "sessions")
        show(100, 6_000)  # requests: 100/6000 sessions, 2 s, 118 s left
    """

    def __init__(self, name: str, unit: str) -> None:
        self._name, self._unit = name, unit
        self._begun = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` units are done."""
        now = time.monotonic()
        elapsed = now - self._begun
        left = f", {(total - done) * elapsed / done:.0f} s left" if 0 < done < total else ""
        line = f"{self._name}: {done}/{total} {self._unit}, {elapsed:.0f} s{left}"
        if sys.stderr.isatty():
            print(f"\r{line}\033[K", end="" if done < total else "\n", file=sys.stderr, flush=True)
        elif now - self._shown > LINE_EVERY_S:
            self._shown = now
            print(line, file=sys.stderr, flush=True)
