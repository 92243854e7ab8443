"""The background of a live session: carries out its calls, and says by and by what came of them.

    act(payload, recording)     the model called something; returns at once
    take()                      the next message of what has come back, as text for the stream `background`

Both are called between two micro-turns and wait for nothing. One message is taken when the one before has gone in, so
that each begins with its marker, as in training. The work is done in a thread of its own, with an event
loop. What is in flight is known to the calling side alone: once a task is cancelled or timed out, nothing more of it
comes back, and what comes too late is dropped with a notice. What has come back goes in over as many turns as it takes.

| what comes back                             | as text                                            |
|---------------------------------------------|----------------------------------------------------|
| a worker begins to use a tool               | searching (once, until there are words)            |
| words of a worker                           | result WORDS; what follows begins with a space     |
| what a tool says that the model called      | NAME result WORDS; nothing where it says nothing   |
| no call, bad arguments, failure, time is up | failed: WHY, of a tool NAME failed: WHY            |
"""

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from tml.calls import CANCEL, DELEGATE, FAILED, RESULT, SEARCHING, Call, CallError, read_call
from tml.serve.toolbox import Toolbox, check_arguments, open_toolbox, reason_of, root_of
from tml.serve.worker import Chunk, ChunkKind, OpenWorker, Worker
from tml.session import Session

_CLOSE_TIMEOUT_S = 30.0
_SHOWN = 80
_SCHEMAS = {
    DELEGATE: {"type": "object", "additionalProperties": False},
    CANCEL: {"type": "object", "properties": {"task": {"type": "integer"}}, "additionalProperties": False},
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the background may take.

    Attributes:
        max_delegations: in flight at a time; with more than one, what comes back says of which it is: task 2 result.
        max_tool_calls: of the model's own, in flight at a time.
        timeout_s: until a delegation or a call has failed.
        start_timeout_s: until a tool server has.
        max_characters: of one result; what is over is cut off.
        max_failure_characters: of the reason that the model is given.
    """

    max_delegations: int = 1
    max_tool_calls: int = 8
    timeout_s: float = 60.0
    start_timeout_s: float = 60.0
    max_characters: int = 2_000
    max_failure_characters: int = 120


@dataclass
class _Task:
    """A call in flight, on the side of the live session; `tool` is None for a delegation."""

    number: int
    tool: str | None
    job: concurrent.futures.Future[None]
    begun: bool = False
    announced: bool = False
    characters: int = 0


@dataclass
class _Message:
    """Text that has come back and was not taken yet; of a task, or of a call that was refused."""

    number: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class _News:
    """What a job says: a chunk, or how it ended; `failure` is None if it ended well."""

    number: int
    chunk: Chunk | None = None
    failure: str | None = None


class Background:
    """The background of one session.

    Attributes:
        notices: what was done, cancelled, dropped, cut or refused, in order, for people.
    """

    def __init__(
        self, servers: Sequence[str] = (), open_worker: OpenWorker | None = None, limits: Limits | None = None
    ) -> None:
        """Starts tool servers and worker, and waits until they are there.

        Args:
            servers: MCP servers whose tools the model may call, and the worker too (`open_toolbox`).
            open_worker: opens the worker; without one no delegation is accepted.
            limits: what it may take.

        Raises:
            ValueError: a tool server or the worker cannot be had.
        """
        self.notices: list[str] = []
        self._servers, self._open_worker = tuple(servers), open_worker or _no_worker
        self._limits = limits or Limits()
        self._news: queue.SimpleQueue[_News] = queue.SimpleQueue()
        self._tasks: dict[int, _Task] = {}
        self._said: list[_Message] = []
        self._taken_from: int | None = None
        self._last_number = 0
        self._toolbox = Toolbox({}, {})
        self._worker: Worker | None = None
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._jobs: set[asyncio.Task[None]] = set()
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="background", daemon=True)
        self._thread.start()
        ready.result()

    @property
    def tool_names(self) -> tuple[str, ...]:
        """The tools that the model may call."""
        return tuple(self._toolbox.tools)

    @property
    def num_in_flight(self) -> int:
        """Delegations and calls that have neither ended nor been cancelled."""
        return len(self._tasks)

    def act(self, payload: str, record: Callable[[], Session]) -> bool:
        """Carries out an action of the model; what cannot be done comes back as a failure.

        Args:
            payload: of the action.
            record: makes the Session so far; called in another thread, and for delegations only.

        Returns:
            Whether the message that was taken last is cancelled too: then nothing more of it should go in.
        """
        try:
            call = read_call(payload)
            if call.name in _SCHEMAS:
                check_arguments(call, _SCHEMAS[call.name])
            else:
                self._toolbox.check(call)
            if call.name == CANCEL:
                return self._cancel(call.arguments.get("task"))
            if call.name == DELEGATE:
                self._delegate(record)
            else:
                self._call(call)
        except CallError as error:
            self.notices.append(f"refused {payload[:_SHOWN]!r}: {error}")
            self._add(self._failed(str(error)))
        return False

    def take(self) -> str | None:
        """The next message of what has come back, None if there is none; takes no time."""
        while not self._news.empty():
            self._hear(self._news.get())
        if not self._said:
            return None
        message = self._said.pop(0)
        self._taken_from = message.number
        return message.text

    def take_all(self) -> list[str]:
        """All messages that have come back and were not taken, in order."""
        return list(iter(self.take, None))

    def close(self) -> None:
        """Ends everything; what is still in flight or comes now is dropped with a notice."""
        for text in self.take_all():
            self.notices.append(f"dropped, since the session is over: {text[:_SHOWN]!r}")
        for task in self._tasks.values():
            self.notices.append(f"task {task.number} was still in flight when the session ended, and is cancelled")
        self._tasks.clear()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self.take_all()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _delegate(self, record: Callable[[], Session]) -> None:
        most = self._limits.max_delegations
        if self._worker is None:
            raise CallError("there is no background model")
        if sum(task.tool is None for task in self._tasks.values()) >= most:
            raise CallError(f"{most} in flight already")
        worker = self._worker

        async def chunks() -> AsyncIterator[Chunk]:
            async with aclosing(worker.work(await asyncio.to_thread(record))) as found:  # type: ignore[type-var]
                async for chunk in found:
                    yield chunk

        self._start(None, chunks)

    def _call(self, call: Call) -> None:
        most = self._limits.max_tool_calls
        if sum(task.tool is not None for task in self._tasks.values()) >= most:
            raise CallError(f"{call.name}: {most} calls in flight already")

        async def chunks() -> AsyncIterator[Chunk]:
            yield Chunk(kind=ChunkKind.RESULT, text=await self._toolbox.call(call))

        self._start(call.name, chunks)

    def _start(self, tool: str | None, chunks: Callable[[], AsyncIterator[Chunk]]) -> None:
        if not self._thread.is_alive():
            raise CallError("the background has ended")
        self._last_number += 1
        number = self._last_number
        job = asyncio.run_coroutine_threadsafe(self._work(number, chunks), self._loop)
        self._tasks[number] = _Task(number=number, tool=tool, job=job)

    def _cancel(self, number: int | None) -> bool:
        chosen = [task for task in self._tasks.values() if number in (None, task.number)]
        if not chosen:
            self.notices.append("there was nothing in flight to cancel")
        for task in chosen:
            self._drop(task, "cancelled by the model")
        unwanted = [message for message in self._said if number in (None, message.number)]
        for message in unwanted:
            self._said.remove(message)
            self.notices.append(f"dropped, as the model cancelled before it went in: {message.text[:_SHOWN]!r}")
        return number in (None, self._taken_from)

    def _drop(self, task: _Task, why: str) -> None:
        del self._tasks[task.number]
        task.job.cancel()
        self.notices.append(f"task {task.number}: {why}")

    def _hear(self, news: _News) -> None:
        """Puts what a job says into words, unless nobody waits for it any more."""
        task = self._tasks.get(news.number)
        if task is None:
            if news.chunk is not None:
                self.notices.append(f"task {news.number}: dropped, too late: {news.chunk.text[:_SHOWN]!r}")
        elif news.chunk is None:
            del self._tasks[news.number]
            if news.failure is not None:
                self.notices.append(f"task {news.number} failed: {news.failure}")
                self._add(self._failed(news.failure, task), task)
        elif news.chunk.kind is ChunkKind.RESULT:
            self._say(task, news.chunk.text)
        else:
            self.notices.append(f"task {task.number}: {news.chunk.text}")
            if news.chunk.kind is ChunkKind.PROGRESS and not task.announced and not task.begun:
                task.announced = True
                self._add(f"{self._whose(task)}{SEARCHING}", task)

    def _say(self, task: _Task, text: str) -> None:
        words = " ".join(_encodable(text).split())
        room = self._limits.max_characters - task.characters
        if words and task.begun and self._said and self._said[-1].number == task.number:
            self._said[-1].text += f" {words[:room]}"
        elif words:
            begins = " " if task.begun else f"{RESULT} "
            self._add(f"{self._whose(task)}{begins}{words[:room]}", task)
        if words:
            task.begun = True
            task.characters += len(words)
        if len(words) > room:
            self._drop(task, f"cut off after {self._limits.max_characters} characters")

    def _add(self, text: str, task: _Task | None = None) -> None:
        self._said.append(_Message(number=None if task is None else task.number, text=text))

    def _failed(self, reason: str, task: _Task | None = None) -> str:
        short = " ".join(_encodable(reason).split())[: self._limits.max_failure_characters]
        return f"{self._whose(task) if task else ''}{FAILED}: {short}"

    def _whose(self, task: _Task) -> str:
        if task.tool is not None:
            return f"{task.tool} "
        return f"task {task.number} " if self._limits.max_delegations > 1 else ""

    def _run(self, ready: concurrent.futures.Future[None]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: concurrent.futures.Future[None]) -> None:
        try:
            async with (
                open_toolbox(self._servers, self._limits.start_timeout_s) as toolbox,
                self._open_worker(toolbox) as worker,
            ):
                self._toolbox, self._worker = toolbox, worker
                ready.set_result(None)
                await self._closing.wait()
                for job in self._jobs:
                    job.cancel()
                await asyncio.gather(*self._jobs, return_exceptions=True)
        except Exception as error:
            if ready.done():
                self.notices.append(f"the background ended badly: {reason_of(error)}")
            else:
                ready.set_exception(root_of(error))

    async def _work(self, number: int, chunks: Callable[[], AsyncIterator[Chunk]]) -> None:
        """One task from its beginning to its end; whatever a worker or a tool breaks with, the session goes on."""
        job = asyncio.current_task()
        assert job is not None
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        limit = asyncio.timeout(self._limits.timeout_s)
        failure: str | None = None
        try:
            async with limit:
                async for chunk in chunks():
                    self._news.put(_News(number=number, chunk=chunk))
        except asyncio.CancelledError:
            self._news.put(_News(number=number, failure="the background has ended"))
            raise
        except Exception as error:
            failure = f"no result in {self._limits.timeout_s:g} s" if limit.expired() else reason_of(error)
        self._news.put(_News(number=number, failure=failure))


@asynccontextmanager
async def _no_worker(toolbox: Toolbox) -> AsyncIterator[None]:
    yield None


def _encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
