"""Real processes for tests of the background: an endpoint, tool servers."""

import contextlib
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tml.serve.background import Background

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WAIT_S = 240.0
"""Far more than anything here takes: the machine may stand still for a while."""


@dataclass(frozen=True)
class ChatServer:
    url: str
    folder: Path

    def release(self) -> None:
        """Lets the model `gated` answer."""
        (self.folder / "release").touch()

    def requests(self) -> list[bytes]:
        """The bodies of all requests, in order."""
        paths = sorted(self.folder.glob("request-*.json"), key=lambda path: int(path.stem.split("-")[1]))
        return [path.read_bytes() for path in paths]


@contextlib.contextmanager
def running_chat_server(folder: Path) -> Iterator[ChatServer]:
    """An endpoint that keeps its requests in a folder."""
    folder.mkdir()
    command = [sys.executable, str(HERE / "chat_server.py"), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield ChatServer(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", folder)
        finally:
            process.kill()


def tool_server(*flags: str) -> str:
    """The command of the tool server."""
    return f"env PYTHONPATH={ROOT} {sys.executable} -m launch.tool_server {' '.join(flags)}"


@contextlib.contextmanager
def running_tool_server(*flags: str) -> Iterator[str]:
    """The address of a tool server that stays."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(shlex.split(tool_server(f"--port={port}", *flags)), stderr=subprocess.DEVNULL) as process:

        def listens() -> bool:
            assert process.poll() is None, f"the tool server ended with {process.poll()}"
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_until(listens)
            yield f"http://127.0.0.1:{port}/mcp"
        finally:
            process.kill()


def odd_tools() -> str:
    """The command of the server whose tools misbehave."""
    return f"{sys.executable} {HERE / 'odd_tools.py'}"


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for something that another process or thread does."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.01)


def all_said(background: Background) -> list[str]:
    """Everything that comes back until nothing is in flight."""
    said: list[str] = []

    def ended() -> bool:
        said.extend(background.take_all())
        return background.num_in_flight == 0

    wait_until(ended)
    return said
