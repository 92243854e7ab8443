"""A tool server over MCP, on standard input and output: time, calculator, full-text search, an SVG canvas.

    python -m launch.tool_server --documents=texts --canvas=canvas.svg

Whoever wants its tools starts it, as `launch.stream --tools="python -m launch.tool_server --canvas=canvas.svg"` does.
Needs the extra `delegate`.
"""

from pathlib import Path

from absl import flags

from launch.app import run_app

_DOCUMENTS = flags.DEFINE_string("documents", "", "Folder of texts (.txt, .md) for the tool search; without it none.")
_CANVAS = flags.DEFINE_string("canvas", "", "SVG file for the tool draw, begun anew; without it there is no such tool.")


def main(argv: list[str]) -> int:
    """Serves until standard input ends."""
    from tml.serve.tool_server import make_server

    documents = Path(_DOCUMENTS.value) if _DOCUMENTS.value else None
    canvas = Path(_CANVAS.value) if _CANVAS.value else None
    make_server(documents, canvas).run("stdio")
    return 0


if __name__ == "__main__":
    run_app(main)
