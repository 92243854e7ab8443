"""A background worker behind an OpenAI-compatible HTTP endpoint: streamed chat completions, tools over MCP.

Needs the extra `delegate`: the client library is `openai`.
"""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tml.calls import Call, CallError, read_arguments
from tml.microturn import Clock
from tml.serve.conversation import Media, content_of
from tml.serve.toolbox import Toolbox, ToolError
from tml.serve.worker import Chunk, ChunkKind, Worker, WorkerError
from tml.session import Session

if TYPE_CHECKING:
    from openai import AsyncOpenAI

KEY_VARIABLE = "OPENAI_API_KEY"
INSTRUCTIONS = (
    "You are the background model of a spoken conversation. The assistant, which is talking with the user right now, "
    "has handed you the conversation: you get what happened so far with its times, the sound and what was seen. Find "
    "out what the user wants that the assistant could not answer by itself, use tools where they help, and answer "
    "in as few words as possible, plain and without markup: the assistant will say them aloud."
)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An endpoint and how it is asked.

    Attributes:
        url: its base, as in http://127.0.0.1:8000/v1.
        model: the name of the model there.
        media: what it takes beside text.
        max_frames: pictures at most in one request, spread evenly; a notice says when there are more.
        max_rounds: answers at most, each of which may call tools.
        max_tries: requests at most for one answer; those that the endpoint was too busy for are sent again.
    """

    url: str
    model: str
    media: tuple[Media, ...] = tuple(Media)
    max_frames: int = 32
    max_rounds: int = 8
    max_tries: int = 3

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"the worker's address {self.url!r} does not begin with http:// or https://")
        if not self.model:
            raise ValueError(f"the worker at {self.url} needs the name of a model")


@asynccontextmanager
async def open_endpoint(endpoint: Endpoint, clock: Clock, toolbox: Toolbox) -> AsyncIterator[Worker]:
    """A worker at an endpoint; the key, if it wants one, is in the environment variable OPENAI_API_KEY.

    Raises:
        ValueError: `openai` is not installed.
    """
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise ValueError("a worker needs the package openai; install the extra `delegate`") from error
    key = os.environ.get(KEY_VARIABLE) or "none"
    async with AsyncOpenAI(base_url=endpoint.url, api_key=key, max_retries=endpoint.max_tries - 1) as client:
        yield _EndpointWorker(endpoint, clock, toolbox, client)


@dataclass(kw_only=True)
class _Answer:
    """One streamed answer, as far as it has come: text that holds no whole word yet, and the calls by their index."""

    unsaid: str = ""
    calls: dict[int, dict[str, str]] = field(default_factory=dict)
    reason: str | None = None

    def whole_words(self, text: str) -> str:
        """What can be said once `text` has come: everything up to the last space."""
        self.unsaid += text
        cut = max(self.unsaid.rfind(space) for space in " \n\t") + 1
        said, self.unsaid = self.unsaid[:cut], self.unsaid[cut:]
        return said

    def add_calls(self, deltas: Sequence[Any]) -> None:
        """Pieces of calls: the first has an id and a name, all may have a part of the arguments."""
        for delta in deltas:
            call = self.calls.setdefault(delta.index, {"id": "", "name": "", "arguments": ""})
            call["id"] += delta.id or ""
            if delta.function is not None:
                call["name"] += delta.function.name or ""
                call["arguments"] += delta.function.arguments or ""


class _EndpointWorker:
    def __init__(self, endpoint: Endpoint, clock: Clock, toolbox: Toolbox, client: "AsyncOpenAI") -> None:
        self._endpoint, self._clock, self._toolbox, self._client = endpoint, clock, toolbox, client

    async def work(self, session: Session) -> AsyncIterator[Chunk]:
        """Asks, carries out the calls of the answer, asks again, until an answer has none."""
        endpoint = self._endpoint
        content = content_of(session, self._clock, endpoint.media, endpoint.max_frames)
        messages: list[Any] = [
            {"role": "system", "content": INSTRUCTIONS},
            {"role": "user", "content": content},
        ]
        if Media.FRAMES in endpoint.media and len(session.frames) > endpoint.max_frames:
            left = f"{endpoint.max_frames} of {len(session.frames)} pictures are sent"
            yield Chunk(kind=ChunkKind.NOTICE, text=left)
        for _ in range(endpoint.max_rounds):
            answer, text = _Answer(), ""
            async for piece in self._streamed(messages, answer):
                text += piece
                yield Chunk(kind=ChunkKind.RESULT, text=piece)
            if not answer.calls:
                if not text.strip():
                    raise WorkerError("the answer is empty")
                return
            calls: list[dict[str, Any]] = [
                {"id": call["id"], "type": "function", "function": {n: call[n] for n in ("name", "arguments")}}
                for _, call in sorted(answer.calls.items())
            ]
            messages.append({"role": "assistant", "content": text or None, "tool_calls": calls})
            for call in calls:
                yield Chunk(kind=ChunkKind.PROGRESS, text=f"uses {call['function']['name']}")
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": await self._call(call)})
        raise WorkerError(f"no answer in {endpoint.max_rounds} rounds of calls")

    async def _streamed(self, messages: list[Any], answer: _Answer) -> AsyncIterator[str]:
        """The words of one answer as they come; what else it holds is collected in `answer`."""
        tools: list[Any] = [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.schema)},
            }
            for tool in self._toolbox.tools.values()
        ]
        extra: dict[str, Any] = {"tools": tools} if tools else {}
        stream = await self._client.chat.completions.create(
            model=self._endpoint.model, messages=messages, stream=True, **extra
        )
        async with stream:
            async for event in stream:
                if not event.choices:
                    continue
                choice = event.choices[0]
                answer.add_calls(choice.delta.tool_calls or ())
                answer.reason = choice.finish_reason or answer.reason
                if words := answer.whole_words(choice.delta.content or ""):
                    yield words
        if answer.reason is None:
            raise WorkerError("the answer broke off")
        if answer.reason == "content_filter":
            raise WorkerError("the answer was withheld")
        if answer.unsaid:
            yield answer.unsaid

    async def _call(self, call: dict[str, Any]) -> str:
        """What a tool says, or why it could not be called, for the endpoint to read."""
        function = call["function"]
        try:
            arguments = read_arguments(function["arguments"])
            return await self._toolbox.call(Call(name=function["name"], arguments=arguments))
        except (CallError, ToolError) as error:
            return f"error: {error}"
