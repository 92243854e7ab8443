"""An MCP server whose tools misbehave: one ends the server, one never answers, one says nothing."""

import os
import time

from mcp.server import MCPServer

server = MCPServer("odd tools", log_level="ERROR")


@server.tool(structured_output=False)
def die() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool(structured_output=False)
def hang() -> str:
    """Never answers, as far as a test can tell."""
    time.sleep(600)
    return "at last"


@server.tool(structured_output=False)
def light(colour: str) -> list[str]:
    """Does it, and says nothing."""
    return []


if __name__ == "__main__":
    server.run("stdio")
