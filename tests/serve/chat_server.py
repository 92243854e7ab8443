"""An OpenAI-compatible endpoint as a process: streams what the model that is asked for stands for, well or badly.

    python chat_server.py FOLDER

Prints its port. Every request body is kept in FOLDER as request-N.json; the model `gated` answers once FOLDER/release
exists.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[1])
NUMBERS = itertools.count()
GATE_TIMEOUT_S = 300


def words(text: str) -> list[dict]:
    """Deltas of three characters each, so that words come in pieces."""
    return [{"content": text[first : first + 3]} for first in range(0, len(text), 3)]


def tool_call(name: str, arguments: str) -> list[dict]:
    """A call in pieces: its name, then its arguments by halves."""
    half = len(arguments) // 2
    first = {"index": 0, "id": "call-1", "type": "function", "function": {"name": name, "arguments": ""}}
    rest = [{"index": 0, "function": {"arguments": part}} for part in (arguments[:half], arguments[half:])]
    return [{"tool_calls": [piece]} for piece in (first, *rest)]


def deltas(model: str, messages: list[dict]) -> Iterator[dict | None]:
    """What the model says; None ends the connection in the middle."""
    answers = [message["content"] for message in messages if message["role"] == "tool"]
    if model == "gated":
        deadline = time.monotonic() + GATE_TIMEOUT_S
        while not (FOLDER / "release").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        yield from words("it is late now")
    elif model == "slow":
        time.sleep(1.5)
        yield from words("seven")
    elif model in ("fast", "busy"):
        yield from words("it is seven")
    elif model == "cut":
        yield from words("half of an ")
        yield None
    elif model == "surrogate":
        yield {"content": "odd \ud83d thing"}
    elif model == "endless":
        for number in range(100_000):
            yield {"content": f"{number} "}
    elif model == "calculates":
        yield from words(f"it is {answers[-1]}") if answers else tool_call("calculator", '{"expression":"6*7"}')
    elif model == "calls_wrongly":
        calls = ('{"expression":', '{"expression":3}', "[]", '{"expression":"1/0"}')
        if len(answers) < len(calls):
            yield from tool_call("calculator", calls[len(answers)])
        elif len(answers) == len(calls):
            yield from tool_call("teleport", "{}")
        else:
            yield from words(" | ".join(answers))
    elif model == "calls_for_ever":
        yield from tool_call("calculator", '{"expression":"1"}')
    else:
        assert model in ("empty", "withheld"), model


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        number = next(NUMBERS)
        (FOLDER / f"request-{number}.json").write_bytes(body)
        asked = json.loads(body)
        model = asked["model"]
        assert self.path == "/v1/chat/completions"
        assert asked["stream"] is True
        if model == "broken":
            self.whole(500, "application/json", '{"error":{"message":"out of order"}}')
        elif model == "busy" and number == 0:
            self.whole(429, "application/json", '{"error":{"message":"busy"}}', {"retry-after-ms": "1"})
        elif model == "page":
            self.whole(200, "text/html", "<html>welcome</html>")
        elif model == "junk":
            self.whole(200, "text/event-stream", 'data: {"choices": [{"delta"\n\n')
        elif model == "odd":
            self.whole(200, "text/event-stream", 'data: {"choices": [{"delta": 3}]}\n\ndata: [DONE]\n\n')
        else:
            self.stream(model, asked["messages"])

    def whole(self, status: int, kind: str, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def stream(self, model: str, messages: list[dict]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        called = False
        try:
            for delta in deltas(model, messages):
                if delta is None:
                    self.close_connection = True
                    self.wfile.write(b"0\r\n\r\n")
                    return
                called = called or "tool_calls" in delta
                self.event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            reason = "content_filter" if model == "withheld" else "tool_calls" if called else "stop"
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
            self.event({"choices": [], "usage": None})
            self.chunk(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            (FOLDER / "hung_up").touch()

    def event(self, fields: dict) -> None:
        whole = {"id": "chat-1", "object": "chat.completion.chunk", "created": 0, "model": "test", **fields}
        self.chunk(f"data: {json.dumps(whole)}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
