"""Saves a bundle over another again and again, each time killed one step later: what tests/export/test_bundle.py runs.

python tests/export/killed_program.py FOLDER    FOLDER/0, FOLDER/1, … are equal bundles
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from tml.codec.text import Tokenizer
from tml.config.tree import from_json
from tml.export import bundle
from tml.model import transformer
from tml.params import map_specs, spec_leaves

STEPS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


def newer_model(folder: Path) -> bundle.Model:
    """What the bundle holds, with 1 added to every parameter; numpy only, because processes are forked below."""
    experiment = from_json((folder / bundle.CONFIG).read_text())
    tensors = safetensors.numpy.load_file(folder / bundle.PARAMS)
    specs = transformer.specs(experiment.model)
    values = iter([tensors[path] + np.float32(1) for path, _ in spec_leaves(specs)])
    params = map_specs(lambda spec: next(values), specs)
    return bundle.Model(experiment=experiment, params=params, tokenizer=Tokenizer.load(folder / bundle.TOKENIZER))


def die_at(moment: int) -> None:
    """Kills this process at its n-th step that changes the disk from here."""
    left = moment

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1] != "r" and "r" not in arguments[1]
        if event in STEPS or writes:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)


def main() -> None:
    folders = sorted(Path(sys.argv[1]).iterdir(), key=lambda path: int(path.name))
    model = newer_model(folders[0])
    for moment, folder in enumerate(folders):
        child = os.fork()
        if child == 0:
            die_at(moment)
            bundle.save(model, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(folder.name, "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)


if __name__ == "__main__":
    main()
