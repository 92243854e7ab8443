"""The run folder of a training run: what it remembers of its run, and what it refuses.

config.json, data.json and tokenizer/ say which run it belongs to; a lock keeps a second process out.
"""

import fcntl
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tml.config import FREE_MODEL_KEYS, Experiment, SourceConfig, describe, difference, to_json, to_mapping
from tml.config.tree import from_json
from tml.foreign_files import foreign_files
from tml.whole_folder import write_whole

if TYPE_CHECKING:
    from tml.codec.text import Tokenizer

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
        raise ValueError(
            f"{workdir} belongs to another run: {describe(fixed)}; choose another --workdir, or change the config back"
        )
    origin = [change for change in changed if change[0] == "train.init_from"]
    if not origin or begins(workdir):
        return changed
    _, old, new = origin[0]
    if new and (not old or Path(old).resolve() != Path(new).resolve()):
        raise ValueError(
            f"{describe(origin)}, but {workdir} goes on from its own checkpoint, and only a run that begins reads it; "
            "leave it out, or choose another --workdir"
        )
    # Left out, or the same place by another name: the folder keeps what it began with.
    return [change for change in changed if change not in origin]


def begins(workdir: Path) -> bool:
    """Whether a run in this folder begins: it has no whole checkpoint."""
    return not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def beginning_text(tokenizer: "Tokenizer", origin: str) -> str:
    """A line if the run folder `origin`, whose parameters a run begins with, has another tokenizer; else nothing."""
    kept = Path(origin) / TOKENIZER
    if not origin or not kept.is_dir():
        return ""
    try:
        before, now = tokenizer.load(kept).fingerprint(), tokenizer.fingerprint()
    except ValueError as error:
        return f"{error}: the tokenizer of {origin} is not compared with this run's\n"
    if before == now:
        return ""
    return f"{origin} was trained with tokenizer {before}, this run has {now}: the same id means another word\n"


def check_tokenizer(tokenizer: "Tokenizer", origin: str, workdir: Path) -> None:
    """Compares the tokenizer, which comes from `origin`, with the one in the folder.

    Raises:
        ValueError: it is another one.
    """
    kept = workdir / TOKENIZER
    if not kept.exists():
        return
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

    What an import kept for the way back comes along from the run folder that the parameters come from, while the
    run begins.
    """
    if begins(workdir):
        _take_keepsake(experiment.train.init_from, workdir)
    elif (workdir / CONFIG).exists():
        began = from_json((workdir / CONFIG).read_text()).train.init_from
        experiment = replace(experiment, train=replace(experiment.train, init_from=began))
    if not (workdir / TOKENIZER).exists():
        staging = workdir / f".{TOKENIZER}.new"
        shutil.rmtree(staging, ignore_errors=True)
        tokenizer.save(staging)
        staging.rename(workdir / TOKENIZER)
    for name, text in ((DATA, json.dumps(described, indent=2, sort_keys=True)), (CONFIG, to_json(experiment))):
        write_whole(workdir / name, text + "\n")


def _take_keepsake(origin: str, workdir: Path) -> None:
    """Copies what the import of `origin` kept, in the place of what an earlier beginning copied.

    Raises:
        ValueError: something else is in that place.
    """
    from tml.export.inkling_import import KEEPSAKE, KEPT, STORED

    kept, mine = Path(origin) / KEEPSAKE, workdir / KEEPSAKE
    if (mine / STORED).is_file() and not foreign_files(mine, KEPT.__contains__):
        shutil.rmtree(mine)
    if not origin or not (kept / STORED).is_file():
        return
    if mine.exists():
        raise ValueError(f"{mine} is in the way of what the import of {origin} kept; choose another --workdir")
    staging = workdir / f".{KEEPSAKE}.new"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(kept, staging)
    staging.rename(mine)


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
            self._file.close()
            raise ValueError(f"another process is training in {self._workdir}; choose another --workdir") from None

    def __exit__(self, *error: object) -> None:
        self._file.close()
