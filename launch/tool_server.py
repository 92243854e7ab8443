"""A tool server over MCP, on standard input and output or HTTP: time, calculator, full-text search, an SVG canvas.

    python -m launch.tool_server --documents=texts --canvas=canvas.svg

Whoever wants its tools starts it, as `launch.stream --tools="python -m launch.tool_server --canvas=canvas.svg"` does.
With --port it stays, and whoever wants its tools names its address: `--tools=http://127.0.0.1:8765/mcp`.
Needs the extra `delegate`.
"""

import sys
from pathlib import Path

from absl import flags

from launch.app import run_app

_DOCUMENTS = flags.DEFINE_string("documents", "", "Folder of texts (.txt, .md) for the tool search; without it none.")
_CANVAS = flags.DEFINE_string("canvas", "", "SVG file for the tool draw, begun anew; without it there is no such tool.")
_PORT = flags.DEFINE_integer(
    "port", None, "Serve at http://127.0.0.1:PORT/mcp instead of on standard input and output.", 1, 65_535
)


def main(argv: list[str]) -> int:
    """Serves until standard input ends, or the process does."""
    from tml.serve.tool_server import make_server

    documents = Path(_DOCUMENTS.value) if _DOCUMENTS.value else None
    canvas = Path(_CANVAS.value) if _CANVAS.value else None
    server = make_server(documents, canvas)
    if _PORT.value is None:
        server.run("stdio")
    else:
        print(f"tools at http://127.0.0.1:{_PORT.value}/mcp", file=sys.stderr, flush=True)
        server.run("streamable-http", host="127.0.0.1", port=_PORT.value)
    return 0


if __name__ == "__main__":
    run_app(main)
