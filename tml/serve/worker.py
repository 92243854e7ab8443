"""The interface of a background worker: it is handed the whole Session, and says piece by piece what it finds."""

import enum
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from tml.serve.toolbox import Toolbox
from tml.session import Session


class ChunkKind(enum.StrEnum):
    """What a chunk says."""

    PROGRESS = "progress"
    """That something is being done: the model learns that it is, people read what."""
    NOTICE = "notice"
    """What people should know, and the model need not."""
    RESULT = "result"
    """The next words of the result."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of what a worker says."""

    kind: ChunkKind
    text: str


class WorkerError(RuntimeError):
    """A worker came to nothing; the message says why, in a few words."""


class Worker(Protocol):
    """Works on one delegation at a time or on many, in an event loop of its own."""

    def work(self, session: Session) -> AsyncIterator[Chunk]:
        """Works on what the conversation asks for.

        It may be cancelled at any time, and may raise anything: a failure is told to the model.

        Args:
            session: the conversation so far, sound and frames included.
        """


OpenWorker = Callable[[Toolbox], AbstractAsyncContextManager[Worker | None]]
"""Opens a worker that may use the tools of a toolbox."""
