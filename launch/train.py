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

import fcntl
import functools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from absl import flags

from launch import processes
from launch.app import define_config, prepare_jax, read_experiment, run_app
from launch.processes import Place, agree, join, read_place, run_identity, together
from tml.config import FREE_MODEL_KEYS, Experiment, SourceConfig, config_hash, difference, to_json, to_mapping
from tml.config.tree import from_json

if TYPE_CHECKING:
    from data_pipelines.loader import RowLoader
    from tml.batch import Batch
    from tml.codec.text import Tokenizer

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string("workdir", "", "Run folder; runs/NAME by default, NAME being the experiment's.")
_PRINT_CONFIG = flags.DEFINE_bool("print_config", True, "Print the resolved config.")
flags.adopt_module_key_flags(processes)

CONFIG, DATA, TOKENIZER = "config.json", "data.json", "tokenizer"
"""What a run folder remembers of its run."""

Change = tuple[str, Any, Any]
"""A key of the config, its value in the run folder, and its value now."""

FIXED_GROUPS = ("model", "turn", "text", "data", "seed")
"""What a run folder may not change: the parameters, and which batch belongs to which step, follow from it."""

FREE_KEYS = re.compile(
    FREE_MODEL_KEYS.pattern
    + r"|text\.tokenizer|data\.(max_quarantined_fraction|read_threads|prefetch_rows|sources\..*\.path)"
    + r"|data\.eval_sources(\..*)?"
)
"""What of those it may: no parameter and no batch follows from it, or the contents are compared instead.

So a run may go on where another platform's kernels, or another way to the same sums, are wanted.
"""


def main(argv: list[str]) -> int:
    """Checks the config and the run folder, then trains."""
    experiment, place = read_experiment(_CONFIG), read_place()
    workdir = Path(_WORKDIR.value or f"runs/{experiment.name}")
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
    from tml.train import EXIT_INTERRUPTED, train

    def open_data() -> tuple[Tokenizer, dict[str, Any], loader.RowLoader]:
        tokenizer = Tokenizer.load(experiment.text.tokenizer)
        check_tokenizer(tokenizer, experiment.text.tokenizer, workdir)
        described = check_data(experiment.data.sources, workdir)
        return tokenizer, described, loader.RowLoader(experiment.data.sources, experiment, tokenizer)

    tokenizer, described, rows = together(place, open_data)
    contents = {name: source["identity"] for name, source in described.items()}
    agree(place, {"tokenizer": tokenizer.fingerprint(), "data": config_hash(contents)})
    is_first = jax.process_index() == 0
    rows_here = row_part(make_mesh(experiment.mesh, splits=experiment.splits), jax.process_index())
    part = {"process_index": rows_here.index, "process_count": rows_here.count}

    def train_batches(start_step: int) -> Iterator["Batch"]:
        # The loop asks for batches when nothing is left that can refuse, such as a checkpoint of another optimizer.
        batches = loader.process_batches(rows, experiment, start_step=start_step, **part)
        if not is_first:
            return batches
        if start_step >= experiment.train.num_steps:
            # The folder keeps the config it was trained with.
            made = f"{start_step} steps are made, config.train.num_steps = {experiment.train.num_steps}"
            print(f"nothing is left to train: {made}; a larger one goes on", flush=True)
            return batches
        claim_workdir(experiment, tokenizer, described, workdir)
        for key, old, new in changed:
            print(f"config.{key} was {old!r} in this folder, is {new!r} from here on")
        print("records  " + "\n         ".join(rows.summary_lines()), flush=True)
        return batches

    @functools.cache  # the same every time, and few
    def eval_batches() -> Iterable["Batch"]:
        return loader.eval_batches(experiment, tokenizer, experiment.train.eval_batches, **part)

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


def check_config(experiment: Experiment, workdir: Path) -> list[Change]:
    """Compares the config with the one in the folder; returns what may change and does.

    Raises:
        ValueError: the folder belongs to a run with another model or another mixture.
    """
    path = workdir / CONFIG
    if not path.exists():
        return []
    try:
        before = to_mapping(from_json(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is not a config of this version: {error}; choose another --workdir") from error
    changed = difference(before, to_mapping(experiment))
    fixed = [key for key in changed if key[0].split(".")[0] in FIXED_GROUPS and not FREE_KEYS.fullmatch(key[0])]
    if fixed:
        shown = "; ".join(f"{key} was {old!r}, is {new!r}" for key, old, new in fixed[:5])
        raise ValueError(
            f"{workdir} belongs to another run: {shown}"
            + (f"; and {len(fixed) - 5} more" if len(fixed) > 5 else "")
            + "; choose another --workdir, or change the config back"
        )
    return changed


def check_tokenizer(tokenizer: "Tokenizer", origin: str, workdir: Path) -> None:
    """Compares the tokenizer, which comes from `origin`, with the one in the folder.

    Raises:
        ValueError: it is another one.
    """
    for kept in sorted((workdir / TOKENIZER).glob("*")):
        before, now = tokenizer.load(kept).fingerprint(), tokenizer.fingerprint()
        if before != now:
            raise ValueError(
                f"{workdir} was trained with tokenizer {before}, {origin} is {now}; choose another --workdir, "
                f"or go on with --config.text.tokenizer={kept}"
            )


def check_data(sources: Mapping[str, SourceConfig], workdir: Path) -> dict[str, Any]:
    """Compares what the training sources hold with what they held when the folder was made; returns what they hold.

    Raises:
        FileNotFoundError: a source is not a data set.
        ValueError: it holds other records than before.
    """
    from data_pipelines.records import read_manifest

    manifests = {name: read_manifest(source.path) for name, source in sources.items()}
    described = {
        name: {"identity": manifest.identity, "num_records": manifest.num_records, "path": sources[name].path}
        for name, manifest in manifests.items()
    }
    path = workdir / DATA
    if not path.exists():
        return described
    try:
        before = {
            name: (known["identity"], known["num_records"]) for name, known in json.loads(path.read_text()).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}; choose another --workdir") from error
    for name, (identity, num_records) in before.items():
        manifest = manifests.get(name)
        if manifest is not None and manifest.identity != identity:
            raise ValueError(
                f"{workdir} was trained on other data: source {name} held {num_records} records ({identity}), "
                f"{sources[name].path} holds {manifest.num_records} ({manifest.identity}); choose another --workdir, "
                f"or name the folder of the old records with --config.data.sources.{name}.path"
            )
    return described


def claim_workdir(experiment: Experiment, tokenizer: "Tokenizer", described: Mapping[str, Any], workdir: Path) -> None:
    """Writes config.json, data.json and the tokenizer, each whole or not at all.

    What an import kept for the way back comes along from the run folder that the parameters come from.
    """
    from tml.export.inkling_import import KEEPSAKE

    kept = Path(experiment.train.init_from) / KEEPSAKE
    if experiment.train.init_from and kept.is_dir() and not (workdir / KEEPSAKE).exists():
        staging = workdir / f".{KEEPSAKE}.new"
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(kept, staging)
        staging.rename(workdir / KEEPSAKE)
    if not (workdir / TOKENIZER).exists():
        staging = workdir / f".{TOKENIZER}.new"
        shutil.rmtree(staging, ignore_errors=True)
        tokenizer.save(staging)
        staging.rename(workdir / TOKENIZER)
    for name, text in ((DATA, json.dumps(described, indent=2, sort_keys=True)), (CONFIG, to_json(experiment))):
        temporary = workdir / f"{name}.new"
        temporary.write_text(text + "\n")
        temporary.replace(workdir / name)


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
