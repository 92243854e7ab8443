"""Trains an experiment; the same command continues a run that was interrupted.

    python -m launch.train --config=experiments/quickstart.py --workdir=runs/quick
    python -m launch.train --config=experiments/quickstart.py --workdir=runs/long --config.train.num_steps=6000

The run folder gets config.json, checkpoints/, metrics.jsonl and tensorboard/. SIGTERM or Ctrl-C
finish the step, save, and exit with code 75.
"""

import fcntl
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from absl import flags

from launch.app import define_config, prepare_jax, read_experiment, run_app
from tml.config import Experiment, config_hash, difference, to_json, to_mapping
from tml.config.tree import from_json

if TYPE_CHECKING:
    from tml.batch import Batch

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; runs/NAME by default, NAME being the experiment's.")
_PRINT_CONFIG = flags.DEFINE_bool("print_config", True, "Print the resolved config.")

FIXED_GROUPS = ("model", "turn", "text", "data", "seed")
"""What a run folder may not change: the parameters, and which batch belongs to which step, follow from it."""


def main(argv: list[str]) -> int:
    """Checks the config and the run folder, then trains."""
    experiment = read_experiment(_CONFIG)
    workdir = Path(_WORKDIR.value or f"runs/{experiment.name}")
    if _PRINT_CONFIG.value:
        print(to_json(experiment))
    print(f"config {config_hash(experiment)} in {workdir / 'config.json'}", flush=True)
    with locked(workdir):
        claim_workdir(experiment, workdir)
        prepare_jax()
        return _train(experiment, workdir)


def _train(experiment: Experiment, workdir: Path) -> int:
    # Imported here: jax, orbax and grain take seconds, and a bad flag should not.
    import jax

    from data_pipelines import loader
    from tml.codec.text import Tokenizer
    from tml.train import EXIT_INTERRUPTED, train

    tokenizer = Tokenizer.load(experiment.text.tokenizer)
    tokenizer.save(workdir / "tokenizer")
    place = {"process_index": jax.process_index(), "process_count": jax.process_count()}

    def train_batches(start_step: int) -> Iterator["Batch"]:
        return loader.train_batches(experiment, tokenizer, start_step=start_step, **place)

    @functools.cache  # the same every time, and few
    def eval_batches() -> Iterable["Batch"]:
        return loader.eval_batches(experiment, tokenizer, experiment.train.eval_batches, **place)

    result = train(experiment, workdir, train_batches, eval_batches)
    return EXIT_INTERRUPTED if result.is_interrupted else 0


def claim_workdir(experiment: Experiment, workdir: Path) -> None:
    """Writes config.json, after comparing it with the one that is there.

    Raises:
        ValueError: the folder belongs to a run with another model or other data.
    """
    path = workdir / "config.json"
    if path.exists():
        try:
            before = to_mapping(from_json(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path} is not a config of this version: {error}; choose another --workdir") from error
        changed = difference(before, to_mapping(experiment))
        fixed = [change for change in changed if change[0].split(".")[0] in FIXED_GROUPS]
        if fixed:
            shown = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in fixed[:5])
            raise ValueError(
                f"{workdir} belongs to another run: {shown}"
                + (f"; and {len(fixed) - 5} more" if len(fixed) > 5 else "")
                + "; choose another --workdir, or change the config back"
            )
        for key, old, new in changed:
            print(f"config.{key} was {old!r} in this folder, is {new!r} from here on")
    temporary = path.with_suffix(".json.new")
    temporary.write_text(to_json(experiment) + "\n")
    temporary.replace(path)


class locked:  # noqa: N801 (a context manager that reads like a function)
    """Holds a run folder for one process; the lock goes with the process, however it ends."""

    def __init__(self, workdir: Path) -> None:
        self._workdir = workdir

    def __enter__(self) -> None:
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = (self._workdir / ".lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {self._workdir}; choose another --workdir") from None

    def __exit__(self, *error: object) -> None:
        self._file.close()


if __name__ == "__main__":
    run_app(main)
