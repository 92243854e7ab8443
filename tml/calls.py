"""What passes between the model and its background: calls that leave the stream, and the words that come back.

A call is JSON, always spelt alike, in training data and in what is judged and carried out:
{"name":"light","arguments":{"colour":"red"}}. What comes back stands in the stream `background`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DELEGATE, CANCEL = "delegate", "cancel"
"""Names of the calls that are no tools: hand the conversation to the background model; drop what it is at."""

SEARCHING, FAILED, RESULT = "searching", "failed", "result"
"""How what comes back begins: it is being worked on; it came to nothing; here it is."""


class CallError(ValueError):
    """An action that is no call, or a call that cannot be carried out."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call with its arguments.

    Example: `Call(name="draw", arguments={"shape": "circle"}).spelt()`.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def spelt(self) -> str:
        """The call as the payload of an action."""
        return json.dumps({"name": self.name, "arguments": dict(self.arguments)}, separators=(",", ":"))


def read_call(payload: str) -> Call:
    """The call in the payload of an action; absent arguments are none.

    Raises:
        CallError: not JSON, or not an object with a `name` and, if any, `arguments` that are an object.
    """
    call = _read_json(payload)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise CallError("a call needs a name")
    return Call(name=call["name"], arguments=_object(call.get("arguments", {})))


def read_arguments(text: str) -> Mapping[str, Any]:
    """The arguments of a call, where they stand alone; nothing at all is none.

    Raises:
        CallError: not JSON, or not an object.
    """
    return _object(_read_json(text)) if text.strip() else {}


def _read_json(text: str) -> Any:
    try:
        value = json.loads(text)
        # Half of a surrogate pair is JSON, but no text: what sends it on would break.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CallError(f"not JSON: {error}") from error
    return value


def _object(arguments: Any) -> Mapping[str, Any]:
    if not isinstance(arguments, dict):
        raise CallError("arguments must be an object")
    return arguments
