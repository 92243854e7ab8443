"""A real endpoint for each test of the background."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_servers import ChatServer, running_chat_server


@pytest.fixture
def chat_server(tmp_path: Path) -> Iterator[ChatServer]:
    with running_chat_server(tmp_path / "requests") as server:
        yield server
