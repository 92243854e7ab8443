"""Checkpoints: the whole TrainState, written by Orbax in the background, verified when it is read.

    checkpoints/STEP/params     the parameters, router biases included
    checkpoints/STEP/optimizer  step, num_skipped and the optimizer's state
    checkpoints/STEP/manifest   config, its hash, and a checksum of every array

Orbax writes a step into a temporary folder and renames it when it is complete, so that a step
exists whole or not at all; what a killed run left is swept away by the next one.
The position in the data is the step itself: batch k is read by step k.
"""

import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from tml.checksums import checksums_of
from tml.config import FREE_MODEL_KEYS, Experiment, config_hash, describe, difference, to_mapping
from tml.config.tree import from_mapping
from tml.model import transformer
from tml.params import PyTree, abstract_params, spec_leaves
from tml.train_step import TrainState, abstract_state

FORMAT = 1
FOLDER = "checkpoints"
CHUNK_BYTES = 64 * 2**20
"""Arrays above this are stored in chunks of about this."""
UNREAD = re.compile("RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAVAILABLE|Out of memory|Too many open files|Stale file")
"""What an error says that is of this machine or of the way to the files, not of what stands in them."""
ADDED = re.compile(r"(audio_out|embed/own_audio|embed/video|mtp)/")
"""Parts that a run may add to the network that it begins with: a voice, eyes, blocks ahead."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, with what to do about it."""


class Checkpoints:
    """The checkpoints of one run folder.

    Example:
        >>> with Checkpoints(Path("runs/quick"), keep=2) as checkpoints:
        ...     state = checkpoints.restore(experiment, mesh)
        ...     checkpoints.save(state, experiment)
    """

    def __init__(self, workdir: Path, keep: int = 2, is_read_only: bool = False) -> None:
        self._folder = (workdir / FOLDER).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=is_read_only,
            create=not is_read_only,
            cleanup_tmp_directories=not is_read_only,
            # In the background a folder that cannot be made is noticed only after minutes of waiting.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Every committed step, oldest first."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest committed step; None when there is none."""
        return max(self._manager.all_steps(), default=None)

    def save(self, state: TrainState, experiment: Experiment) -> None:
        """Copies the state to the host and writes it in the background.

        If the save before it failed, that is said, and this one is tried: it holds all that the other would have.

        Raises:
            CheckpointError: it could not begin.
        """
        step = int(state.step)
        try:
            self.wait()
        except CheckpointError as error:
            print(error, file=sys.stderr)
        params, optimizer = _items(state)
        checksums = checksums_of({"params": params, "optimizer": optimizer})
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params, save_args={path: _save_args(leaf) for path, leaf in params.items()}),
            optimizer=ocp.args.StandardSave(optimizer),
            manifest=ocp.args.JsonSave(manifest_of(experiment, step, checksums)),
        )
        self._surfaced(f"saving step {step}", lambda: self._manager.save(step, args=items))

    def check(self) -> None:
        """Raises the error of a save in the background, if it has failed.

        Raises:
            CheckpointError: with the reason.
        """
        # Orbax's own check finds nothing: the thread that ends a save takes its error first, and waiting for it raises.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: a save failed.
        """
        self._surfaced("saving in the background", self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for the last save and releases the folder.

        Raises:
            CheckpointError: a save failed.
        """
        self._surfaced("saving in the background", self._manager.close)

    def _surfaced(self, doing: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            raise CheckpointError(
                f"{doing} to {self._folder} failed: {_first_line(error)}; "
                "free the disk or change --workdir, then run the same command to continue from the last checkpoint"
            ) from error

    def restore(self, experiment: Experiment, mesh: Mesh, step: int | None = None) -> TrainState:
        """Reads a checkpoint onto the shardings of `mesh`, which need not be those it was written from.

        Args:
            experiment: the run that continues.
            mesh: where the state goes.
            step: which checkpoint; the newest if None.

        Raises:
            CheckpointError: there is none, it belongs to another model, or it is damaged.
        """
        step = self.chosen(step)
        manifest = self.manifest(step)
        if "step" not in manifest["checksums"]:
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} was imported and holds parameters alone: a run can start from "
                f"it in another --workdir, with --config.train.init_from={self._folder.parent}, but not go on in it"
            )
        theirs = self.experiment(step, manifest)
        changed = difference(_fixed_part(to_mapping(theirs)), _fixed_part(to_mapping(experiment)))
        changed = [change for change in changed if not FREE_MODEL_KEYS.fullmatch(change[0])]
        if changed:
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} belongs to another model: {describe(changed)}; "
                "change the config back, or choose another --workdir"
            )
        abstract = abstract_state(experiment, mesh)
        params, optimizer = _items(abstract)
        restored = self._read(step, manifest, {"params": params, "optimizer": optimizer})
        values = [*restored["params"].values(), *restored["optimizer"].values()]
        by_path = dict(zip([*params, *optimizer], values, strict=True))
        paths = [path for path, _ in _named_leaves(abstract)]
        return jax.tree.unflatten(jax.tree.structure(abstract), [by_path[path] for path in paths])

    def restore_params(self, step: int | None = None) -> tuple[Experiment, PyTree]:
        """Reads the config and the parameters alone onto the first device, for streaming and evaluation.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        step = self.chosen(step)
        manifest = self.manifest(step)
        experiment = self.experiment(step, manifest)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
            abstract_params(transformer.specs(experiment.model)),
        )
        return experiment, self._read_params(step, manifest, abstract)

    def first_params(self, experiment: Experiment, mesh: Mesh) -> tuple[int, PyTree, list[tuple[str, Any, Any]]]:
        """Reads the newest checkpoint's parameters onto the shardings of `mesh`, for another run to begin with.

        Its config may differ from the run's in all but the parameters' shapes; whole parts may be missing (ADDED).

        Returns:
            The step they were trained to, the parameters (those of missing parts as shapes), and what of the model is
            another here (`difference`).

        Raises:
            CheckpointError: there is none, it is damaged, or a parameter has another shape.
        """
        step = self.chosen(None)
        manifest = self.manifest(step)
        theirs = self.experiment(step, manifest)
        found = {path: spec.shape for path, spec in spec_leaves(transformer.specs(theirs.model))}
        wanted = {path: spec.shape for path, spec in spec_leaves(transformer.specs(experiment.model))}
        odd = [path for path in {**wanted, **found} if found.get(path) != wanted.get(path)]
        wrong = next((path for path in odd if path in found or not ADDED.match(path)), None)
        changed = difference({"model": to_mapping(theirs.model)}, {"model": to_mapping(experiment.model)})
        if wrong is not None:
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} cannot begin this run: {wrong} has shape "
                f"{found.get(wrong, 'none')} there and {wanted.get(wrong, 'none')} here; {describe(changed)}; "
                "change config.model, or name another config.train.init_from"
            )
        changed = [change for change in changed if not FREE_MODEL_KEYS.fullmatch(change[0])]
        return step, self._read_params(step, manifest, abstract_state(experiment, mesh).params, odd), changed

    def _read_params(
        self, step: int, manifest: Mapping[str, Any], abstract: PyTree, but: Collection[str] = ()
    ) -> PyTree:
        """The parameters, placed as `abstract` says; those at the paths `but` stay shapes."""
        named = _named_leaves(abstract)
        there = {f"params.{path}": leaf for path, leaf in named if path.replace(".", "/") not in but}
        restored = self._read(step, manifest, {"params": there})["params"]
        leaves = [restored.get(f"params.{path}", leaf) for path, leaf in named]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

    def chosen(self, step: int | None) -> int:
        """The given step, or the newest if None.

        Raises:
            CheckpointError: there is none.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self._folder} holds no checkpoint; train first, or name another --workdir")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self._folder} holds steps {steps}, not step {step}")
        return steps[-1] if step is None else step

    def manifest(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself: its config, and the checksum of every array by path.

        Raises:
            CheckpointError: it is damaged, or of another format.
        """
        items = ocp.args.Composite(manifest=ocp.args.JsonRestore())
        manifest = self._guarded(step, lambda: self._manager.restore(step, args=items)["manifest"])
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} has format {manifest.get('format')}, this tml reads {FORMAT}"
            )
        return manifest

    def experiment(self, step: int, manifest: Mapping[str, Any]) -> Experiment:
        """The config that a checkpoint was written with, from its manifest.

        Raises:
            CheckpointError: it is no config of this version.
        """
        try:
            return from_mapping(Experiment, manifest["config"], "config")
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} was written by another version of tml: {error}; train it anew"
            ) from error

    def _read(
        self, step: int, manifest: Mapping[str, Any], abstract: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
    ) -> dict[str, dict[str, jax.Array]]:
        """Restores items and compares the checksum of every array with the manifest."""
        wanted = {path for item in abstract.values() for path in item}
        missing = sorted(wanted - manifest["checksums"].keys())
        if missing:
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} lacks {len(missing)} arrays of this run, "
                f"{missing[0]} first; it was written by another version of tml"
            )
        items = ocp.args.Composite(**{name: ocp.args.StandardRestore(dict(item)) for name, item in abstract.items()})
        read = self._guarded(step, lambda: self._manager.restore(step, args=items))
        restored = {name: {path: read[name][path] for path in item} for name, item in abstract.items()}
        found = checksums_of(restored)
        wrong = [path for path in found if found[path] != manifest["checksums"][path]]
        if wrong:
            raise self.damaged(step, f"the checksum of {wrong[0]} is wrong")
        return restored

    def _guarded(self, step: int, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            reason, folder = _first_line(error), self._folder / str(step)
            if not folder.is_dir():
                raise CheckpointError(
                    f"checkpoint {folder} was removed while it was read ({reason}): its run keeps a few of the newest; "
                    "run again for one of those"
                ) from error
            if isinstance(error, MemoryError | PermissionError) or UNREAD.search(str(error)):
                raise CheckpointError(
                    f"checkpoint {folder} could not be read ({reason}); nothing is known to be wrong with it"
                ) from error
            raise self.damaged(step, reason) from error

    def damaged(self, step: int, reason: str) -> CheckpointError:
        """The error of a checkpoint that is not what was written, with the way out."""
        older = [other for other in self.steps() if other < step]
        folder = self._folder / str(step)
        way_out = (
            f"delete {folder} and run again to continue from step {older[-1]}"
            if older
            else f"there is no older one; delete {folder} to start anew"
        )
        return CheckpointError(f"checkpoint {folder} is damaged ({reason}); {way_out}")


def restore(workdir: Path, step: int | None = None) -> tuple[Experiment, PyTree]:
    """The config and the parameters of a run folder, for streaming and evaluation.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    with opened(workdir) as checkpoints:
        return checkpoints.restore_params(step)


def opened(workdir: Path) -> Checkpoints:
    """The checkpoints of a run folder, to be read only.

    Raises:
        CheckpointError: it has none.
    """
    if not (workdir / FOLDER).is_dir():
        raise CheckpointError(f"{workdir} has no {FOLDER} folder; train or import first, or name another run folder")
    return Checkpoints(workdir, is_read_only=True)


def _fixed_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint cannot be read without: the model, and which optimizer's moments it holds. As JSON has it."""
    return json.loads(json.dumps({"model": config["model"], "optim": {"optimizer": config["optim"]["optimizer"]}}))


def state_hash(state: PyTree) -> str:
    """A short hash of every bit of a state: equal states, equal hash."""
    return config_hash(checksums_of({"state": dict(_named_leaves(state))}))


def manifest_of(experiment: Experiment, step: int, checksums: Mapping[str, int]) -> dict[str, Any]:
    """What a checkpoint says of itself (see `Checkpoints.manifest`)."""
    return {
        "format": FORMAT,
        "step": step,
        "config": to_mapping(experiment),
        "config_hash": config_hash(experiment),
        "checksums": dict(checksums),
    }


def _save_args(leaf: jax.Array) -> ocp.SaveArgs:
    """Stores large parameters in chunks, layer by layer, so that one layer can be read alone."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,)) if leaf.nbytes > CHUNK_BYTES else ocp.SaveArgs()


def _items(state: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a state into its parameters and the rest, each a flat dict by path."""
    leaves = dict(_named_leaves(state))
    params = {path: leaf for path, leaf in leaves.items() if path.startswith("params.")}
    return params, {path: leaf for path, leaf in leaves.items() if path not in params}


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _first_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " …"
