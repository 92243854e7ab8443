"""A tool server over MCP: time, calculator, full-text search, drawing on a canvas; arguments' schemas come from types.

Needs the extra `delegate`. Model Context Protocol: modelcontextprotocol.io, SDK `mcp` 2.
"""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tml.serve.tools.calculator import calculate
from tml.serve.tools.canvas import HEIGHT_PX, WIDTH_PX, Canvas, Shape
from tml.serve.tools.clock import time_in
from tml.serve.tools.search import MAX_RESULTS, TextIndex

if TYPE_CHECKING:
    from mcp.server import MCPServer


def make_server(documents: Path | None = None, canvas: Path | None = None) -> "MCPServer":
    """The server; run it with `.run("stdio")`.

    Args:
        documents: the folder that is searched; without it there is no tool `search`.
        canvas: the SVG file that is drawn on; without it there is no tool `draw`.

    Raises:
        ValueError: `mcp` is not installed, or the folder has no texts.
        OSError: the canvas cannot be written.
    """
    try:
        from mcp.server import MCPServer
    except ImportError as error:
        raise ValueError("a tool server needs the package mcp; install the extra `delegate`") from error
    server = MCPServer("tml tools", log_level="ERROR")
    for tool in (_time(), _calculator()):
        server.add_tool(tool, structured_output=False)
    if documents is not None:
        server.add_tool(_search(TextIndex(documents)), structured_output=False)
    if canvas is not None:
        server.add_tool(_draw(Canvas(canvas)), structured_output=False)
    return server


def _said(make: Callable[[], str]) -> str:
    """What a tool says; a ValueError becomes the protocol's error, which the caller may read."""
    from mcp.server.mcpserver.exceptions import ToolError

    try:
        return make()
    except ValueError as error:
        raise ToolError(str(error)) from error


def _field(description: str, **limits: Any) -> Any:
    from pydantic import Field

    return Field(description=description, **limits)


def _time() -> Callable[..., str]:
    def time(zone: Annotated[str, _field("IANA time zone, such as Europe/Berlin")] = "UTC") -> str:
        """The date and time now."""
        return _said(lambda: time_in(zone, datetime.datetime.now(datetime.UTC)))

    return time


def _calculator() -> Callable[..., str]:
    def calculator(expression: Annotated[str, _field("such as 2 * (3 + 4) ^ 2, or sqrt(2)")]) -> str:
        """The value of an arithmetic expression."""
        return _said(lambda: calculate(expression))

    return calculator


def _search(index: TextIndex) -> Callable[..., str]:
    def search(
        query: Annotated[str, _field("words to look for")],
        limit: Annotated[int, _field("texts at most", ge=1, le=MAX_RESULTS)] = 3,
    ) -> str:
        """Texts that hold the words, the best first: a line each, title and excerpt."""
        hits = _said_hits(index, query, limit)
        return hits or "nothing found"

    return search


def _said_hits(index: TextIndex, query: str, limit: int) -> str:
    return _said(lambda: "\n".join(f"{hit.title}: {hit.snippet}" for hit in index.search(query, limit)))


def _draw(canvas: Canvas) -> Callable[..., str]:
    def draw(
        shape: Shape,
        colour: Annotated[str, _field("a name in CSS, or #rrggbb")] = "black",
        x: Annotated[float, _field("of the centre, pixels from the left", ge=0, le=WIDTH_PX)] = WIDTH_PX / 2,
        y: Annotated[float, _field("of the centre, pixels from the top", ge=0, le=HEIGHT_PX)] = HEIGHT_PX / 2,
        size: Annotated[float, _field("width in pixels", gt=0, le=WIDTH_PX)] = 100.0,
    ) -> str:
        """Draws a shape on the canvas."""
        return _said(lambda: canvas.draw(shape, colour, x, y, size))

    return draw
