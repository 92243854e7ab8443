"""Runs portable programs with jax, numpy and safetensors alone: what tests/export/test_portable.py compares with.

    python portable_program.py EXPORT INPUTS.npz OUTPUTS.npz

INPUTS holds the arguments of consecutive calls as CALL/PROGRAM/ARGUMENT, such as 0/append_b8/tokens_BW.
OUTPUTS gets the logits of every call.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from jax import export


def main(folder: Path, inputs: Path, outputs: Path) -> None:
    manifest = json.loads((folder / "portable.json").read_text())
    weights = safetensors.numpy.load_file(folder / manifest["weights"])
    programs = {f"{each['name']}_b{each['bucket']}": each for each in manifest["programs"]}
    given = np.load(inputs)
    names = sorted({tuple(name.split("/")[:2]) for name in given.files}, key=lambda call: int(call[0]))
    state, logits = None, {}
    for call, name in names:
        program = programs[name]
        if state is None:
            state = run(folder, programs[f"init_b{program['bucket']}"], {})
        known = {f"params/{path}": values for path, values in weights.items()} | state
        known |= {f"input/{entry['name'].partition('/')[2]}": given[f"{call}/{name}/{entry['name'].partition('/')[2]}"]
                  for entry in program["arguments"] if entry["name"].startswith("input/")}  # fmt: skip
        state = run(folder, program, known)
        logits[call] = np.asarray(state.pop("logits_BV"))
    assert "tml" not in sys.modules
    np.savez(outputs, **logits)


def run(folder: Path, program: dict, known: dict) -> dict:
    """Calls a program with what the manifest lists, checked against it; returns its results by name."""
    arguments = [known[entry["name"]] for entry in program["arguments"]]
    for entry, value in zip(program["arguments"], arguments, strict=True):
        assert [*value.shape] == entry["shape"], entry
        assert str(value.dtype) == entry["dtype"], entry
    results = load(folder / program["file"])(*arguments)
    for entry, value in zip(program["results"], results, strict=True):
        assert ([*value.shape], str(value.dtype)) == (entry["shape"], entry["dtype"]), entry
    return {entry["name"]: value for entry, value in zip(program["results"], results, strict=True)}


@functools.cache
def load(file: Path) -> Callable[..., list[jax.Array]]:
    exported = export.deserialize(bytearray(file.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    return jax.jit(exported.call)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
