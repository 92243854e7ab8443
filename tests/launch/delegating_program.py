"""`launch.stream` of a model that calls its background once, in turn 3, and nothing else: `python FILE --model=...`."""

import dataclasses
from collections.abc import Sequence

from launch import stream
from launch.app import run_app
from tml.calls import Call
from tml.stream.outputs import OutputReader, Said

TURN = 3
read = OutputReader.read


def read_and_call(self: OutputReader, tokens: Sequence[int]) -> Said:
    """A turn of the model, with the call in place of those that it makes at random."""
    said = read(self, tokens)
    return dataclasses.replace(said, actions=(Call(name="delegate").spelt(),) if said.turn == TURN else ())


if __name__ == "__main__":
    OutputReader.read = read_and_call  # type: ignore[method-assign]
    run_app(stream.main)
