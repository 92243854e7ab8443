"""Without the extra `delegate` everything imports, and what needs it says so in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
for name in ("openai", "mcp", "jsonschema", "referencing", "pydantic", "httpx2"):
    sys.modules[name] = None
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_modules_import_without_it() -> None:
    rooms = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "tml" / "serve").rglob("*.py")
    )
    names = [name.removesuffix(".__init__") for name in rooms]
    done = run(f"import {', '.join([*names, 'launch.stream', 'launch.tool_server'])}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "program",
    [
        "from tml.serve.background import Background; Background()",
        "from tml.serve.tool_server import make_server; make_server()",
    ],
)
def test_what_needs_it_names_it(program: str) -> None:
    done = run(program)
    assert done.returncode == 1
    assert "ValueError" in done.stderr
    assert "install the extra `delegate`" in done.stderr
