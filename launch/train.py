"""Trains an experiment; the same command continues a run that was interrupted.

    python -m launch.train --config=experiments/quickstart.py --workdir=runs/quickstart
    python -m launch.train --config=experiments/quickstart.py --workdir=runs/long --config.train.num_steps=6000

The run folder gets config.json, data.json, tokenizer/, checkpoints/, metrics.jsonl and tensorboard/.
SIGTERM or Ctrl-C finish the step, save, and exit with code 75; of several processes any one may get it.

Several processes, one a host: every one gets this command, and --coordinator_address=HOST:PORT --num_processes=N
--process_id=I, or the same in TML_COORDINATOR_ADDRESS, TML_NUM_PROCESSES and TML_PROCESS_ID (launch.pod writes them).

A run folder belongs to one model, one tokenizer and one content of every data source: another is
refused, and then nothing in the folder changes. Where tokenizer and data lie may change.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import processes
from launch.app import EXIT_INTERRUPTED, define_config, output_folder, prepare_jax, read_experiment, run_app
from launch.processes import Place, agree, join, read_place, run_identity, together
from launch.run_folder import (
    Change,
    beginning_text,
    begins,
    check_config,
    check_data,
    check_tokenizer,
    claim_workdir,
    locked,
)
from tml.config import Experiment, config_hash, to_json

if TYPE_CHECKING:
    from data_pipelines.loader import RowLoader
    from tml.batch import Batch

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; runs/NAME by default, NAME being the experiment's.")
_PRINT_CONFIG = flags.DEFINE_bool("print_config", True, "Print the resolved config.")
flags.adopt_module_key_flags(processes)


def main(argv: list[str]) -> int:
    """Checks the config and the run folder, then trains."""
    experiment, place = read_experiment(_CONFIG), read_place()
    workdir = output_folder("workdir", _WORKDIR.value or f"runs/{experiment.name}")
    is_first = place is None or place.process_id == 0
    if _PRINT_CONFIG.value and is_first:
        print(to_json(experiment))
    if is_first:
        print(f"config {config_hash(experiment)}, run folder {workdir}", flush=True)
    join(place)
    agree(place, together(place, lambda: run_identity(experiment)))
    with ExitStack() as stack:

        def open_workdir() -> list[Change]:
            if is_first:
                stack.enter_context(locked(workdir))
            return check_config(experiment, workdir)

        changed = together(place, open_workdir)
        prepare_jax()
        return _train(experiment, workdir, changed, place)


def _train(experiment: Experiment, workdir: Path, changed: Sequence[Change], place: Place | None) -> int:
    # Imported here: jax, orbax and grain take seconds, and a bad flag should not.
    import jax

    from data_pipelines import loader
    from tml.codec.text import Tokenizer
    from tml.mesh import make_mesh, row_part
    from tml.train import train

    def open_data() -> tuple[Tokenizer, dict[str, Any], loader.RowLoader]:
        tokenizer = Tokenizer.load(experiment.text.tokenizer)
        check_tokenizer(tokenizer, experiment.text.tokenizer, workdir)
        described = check_data(experiment.data.sources, workdir)
        return tokenizer, described, loader.RowLoader(experiment.data.sources, experiment, tokenizer)

    tokenizer, described, rows = together(place, open_data)
    contents = {name: source["identity"] for name, source in described.items()}
    agree(place, {"tokenizer": tokenizer.fingerprint(), "data": config_hash(contents)})
    is_first = jax.process_index() == 0
    part = row_part(make_mesh(experiment.mesh, splits=experiment.splits), jax.process_index())

    def train_batches(start_step: int) -> Iterator["Batch"]:
        # The loop asks for batches when nothing is left that can refuse, such as a checkpoint of another optimizer.
        batches = loader.process_batches(rows, experiment, start_step=start_step, part=part)
        if not is_first:
            return batches
        if start_step >= experiment.train.num_steps:
            # The folder keeps the config it was trained with.
            made = f"{start_step} steps are made, config.train.num_steps = {experiment.train.num_steps}"
            print(f"nothing is left to train: {made}; a larger one goes on", flush=True)
            return batches
        if begins(workdir):
            print(beginning_text(tokenizer, experiment.train.init_from), end="")
        claim_workdir(experiment, tokenizer, described, workdir)
        for key, old, new in changed:
            print(f"config.{key} was {old!r} in this folder, is {new!r} from here on")
        print("records  " + "\n         ".join(rows.summary_lines()), flush=True)
        return batches

    @functools.cache  # the same every time, and few
    def eval_batches() -> Iterable["Batch"]:
        return loader.eval_batches(experiment, tokenizer, experiment.train.eval_batches, part=part)

    result = train(experiment, workdir, train_batches, eval_batches)
    if is_first:
        print(quarantine_text(rows), flush=True)
    return EXIT_INTERRUPTED if result.is_interrupted else 0


def quarantine_text(rows: "RowLoader") -> str:
    """How many records of the training sources could not be used, for the last line of a run."""
    counts = {name: len(entries) for name, entries in rows.quarantined.items() if entries}
    of_sources = f" ({', '.join(f'{name} {count}' for name, count in counts.items())})" if counts else ""
    total = sum(len(source.records) for source in rows.sources)
    return f"{sum(counts.values())} of {total} records quarantined{of_sources}"


if __name__ == "__main__":
    run_app(main)
