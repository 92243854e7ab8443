"""The tools at hand: those of every MCP server that was named, their schemas, and calls whose arguments fit them.

Needs the extra `delegate`. Model Context Protocol: modelcontextprotocol.io, SDK `mcp` 2; JSON schemas by `jsonschema`.
"""

import asyncio
import shlex
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tml.calls import CANCEL, DELEGATE, Call, CallError

if TYPE_CHECKING:
    from mcp import Client


class ToolError(RuntimeError):
    """A tool says that it could not do what it was called for."""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool as a server describes it; `schema` is the JSON schema of its arguments, an object."""

    name: str
    description: str
    schema: Mapping[str, Any]


class Toolbox:
    """Tools by name. It lives in one event loop; `tools` and `check` may be used by any thread."""

    def __init__(self, clients: Mapping[str, "Client"], tools: Mapping[str, Tool]) -> None:
        self._clients, self.tools = clients, tools

    def check(self, call: Call) -> None:
        """Raises CallError if there is no such tool, or if the arguments do not fit its schema."""
        tool = self.tools.get(call.name)
        if tool is None:
            raise CallError(f"there is no tool {call.name}")
        check_arguments(call, tool.schema)

    async def call(self, call: Call) -> str:
        """What the tool says.

        Raises:
            CallError: there is no such tool, or the arguments do not fit its schema.
            ToolError: the tool says that it failed.
            Exception: whatever a connection breaks with.
        """
        self.check(call)
        result = await self._clients[call.name].call_tool(call.name, dict(call.arguments))
        text = "\n".join(part.text if part.type == "text" else f"[{part.type}]" for part in result.content)
        if result.is_error:
            raise ToolError(text or f"{call.name} failed and does not say why")
        return text


def check_arguments(call: Call, schema: Mapping[str, Any]) -> None:
    """Raises CallError if the arguments of a call do not fit a JSON schema; names the most telling misfit."""
    from jsonschema import exceptions, validators
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    # An empty registry: no schema makes this process fetch another one.
    validator = validators.validator_for(schema, validators.Draft202012Validator)(schema, registry=Registry())
    try:
        misfit = exceptions.best_match(validator.iter_errors(dict(call.arguments)))
    except (Unresolvable, RecursionError) as error:
        raise CallError(f"{call.name}: its schema refers to what is not there: {error}") from error
    if misfit is not None:
        place = f"{misfit.json_path.removeprefix('$.')} " if misfit.path else ""
        raise CallError(f"{call.name}: {place}{misfit.message}")


@asynccontextmanager
async def open_toolbox(servers: Sequence[str], start_timeout_s: float) -> AsyncIterator[Toolbox]:
    """Connects to MCP servers and lists their tools; they end with the context.

    Args:
        servers: for each the command that starts it (it then talks on its standard input and output), or the
            http address at which it is.
        start_timeout_s: how long a server may take until it has said which tools it has.

    Raises:
        ValueError: a server does not start or answer, a tool has no valid schema or the name of another one, or the
            extra `delegate` is not installed.
    """
    try:
        import jsonschema  # noqa: F401  the arguments of every call are checked by it
        from mcp import MCPError
    except ImportError as error:
        raise ValueError("calls need the packages mcp and jsonschema; install the extra `delegate`") from error
    clients: dict[str, Client] = {}
    tools: dict[str, Tool] = {}
    async with AsyncExitStack() as stack:
        for server in servers:
            try:
                async with asyncio.timeout(start_timeout_s):
                    client = await stack.enter_async_context(_client(server))
                    listed = await _tools_of(client)
            except (OSError, RuntimeError, MCPError, ExceptionGroup) as error:
                raise ValueError(f"the tool server {server!r} does not start: {reason_of(error)}") from error
            for tool in listed:
                if tool.name in tools or tool.name in (DELEGATE, CANCEL):
                    raise ValueError(f"the tool server {server!r} has a tool {tool.name!r}, but there is one already")
                clients[tool.name], tools[tool.name] = client, tool
        yield Toolbox(clients, tools)


def _client(server: str) -> "Client":
    from mcp import Client, StdioServerParameters

    if server.startswith(("http://", "https://")):
        return Client(server)
    command = shlex.split(server)
    if not command:
        raise ValueError("a tool server needs a command or an http address")
    return Client(StdioServerParameters(command=command[0], args=command[1:]))


async def _tools_of(client: "Client") -> list[Tool]:
    from jsonschema import exceptions, validators

    found: list[Tool] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            try:
                validators.validator_for(tool.input_schema, validators.Draft202012Validator).check_schema(
                    tool.input_schema
                )
            except exceptions.SchemaError as error:
                raise ValueError(f"the schema of the tool {tool.name!r} is none: {error.message}") from error
            found.append(Tool(name=tool.name, description=tool.description or "", schema=tool.input_schema))
        cursor = page.next_cursor
        if cursor is None:
            return found


def root_of(error: BaseException) -> BaseException:
    """What was raised, out of the groups that task groups of the protocol's library wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def reason_of(error: BaseException) -> str:
    """Why something failed, or if it does not say why, how."""
    root = root_of(error)
    return str(root).strip() or type(root).__name__
