"""Checkpoints: what comes back, what is refused, and what damage is noticed."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from made_up import made_up_experiment
from small_disk import small_disk

from tml import checksums
from tml.checkpoint import CheckpointError, Checkpoints, restore, state_hash
from tml.config import Experiment, MeshConfig, OptimConfig, Optimizer, Remat
from tml.mesh import make_mesh
from tml.train_step import TrainState, init_state

EXPERIMENT = made_up_experiment()


@pytest.fixture(scope="module")
def first() -> TrainState:
    return init_state(jax.random.key(1), EXPERIMENT, make_mesh(EXPERIMENT.mesh, jax.devices()[:1]))


@jax.jit
def moved(state: TrainState) -> TrainState:
    """A stand-in for a step: every number changes."""
    return jax.tree.map(lambda leaf: leaf + 1, state)


@pytest.fixture
def run_folder(first: TrainState, tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path) as checkpoints:
        state = first
        for _ in range(2):
            state = moved(state)
            checkpoints.save(state, EXPERIMENT)
    return tmp_path


def at_step(first: TrainState, step: int) -> TrainState:
    for _ in range(step):
        first = moved(first)
    return first


def restored(folder: Path, experiment: Experiment = EXPERIMENT) -> TrainState:
    mesh = make_mesh(experiment.mesh, jax.devices()[: experiment.mesh.fsdp])
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(experiment, mesh)


def test_everything_comes_back_bit_for_bit(first: TrainState, run_folder: Path):
    state = restored(run_folder)
    wanted = at_step(first, 2)
    assert int(state.step) == 2
    for left, right in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    assert state_hash(state) == state_hash(wanted)
    assert state_hash(state) != state_hash(at_step(first, 1))


def test_restores_onto_other_devices(first: TrainState, run_folder: Path):
    eight = dataclasses.replace(EXPERIMENT, mesh=MeshConfig(fsdp=8))
    state = restored(run_folder, eight)
    table = state.params["embed"]["tokens"]["table"]
    assert len(table.sharding.device_set) == 8
    assert state_hash(state) == state_hash(at_step(first, 2))


def test_parameters_alone_come_with_their_config(first: TrainState, run_folder: Path):
    experiment, params = restore(run_folder)
    assert experiment == EXPERIMENT
    wanted = at_step(first, 2).params
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    for left, right in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_save_is_not_disturbed_by_the_steps_after_it(first: TrainState, tmp_path: Path):
    donating = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = jax.tree.map(lambda leaf: leaf.copy(), moved(first))
    wanted = state_hash(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, EXPERIMENT)
        for _ in range(50):
            state = donating(state)
        jax.block_until_ready(state)
    assert state_hash(restored(tmp_path)) == wanted


def test_only_the_newest_are_kept(first: TrainState, run_folder: Path):
    with Checkpoints(run_folder, keep=2) as checkpoints:
        checkpoints.save(at_step(first, 3), EXPERIMENT)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_another_model_is_refused_with_both_values(run_folder: Path):
    model = dataclasses.replace(EXPERIMENT.model, d_model=32, norm_eps=1e-5)
    with pytest.raises(CheckpointError, match=r"model.d_model was 16, is 32; model.norm_eps was 1e-06, is 1e-05; "):
        restored(run_folder, dataclasses.replace(EXPERIMENT, model=model))


def test_the_way_to_the_same_sums_may_change(first: TrainState, run_folder: Path):
    moe = dataclasses.replace(EXPERIMENT.model.moe, block_rows=16, capacity_factor=2.0)
    model = dataclasses.replace(EXPERIMENT.model, remat=Remat.LAYER, moe=moe)
    assert model != EXPERIMENT.model
    assert state_hash(restored(run_folder, dataclasses.replace(EXPERIMENT, model=model))) == state_hash(
        at_step(first, 2)
    )


def test_arrays_of_more_places_than_an_integer_holds_have_a_checksum():
    experts = jax.ShapeDtypeStruct((2, 256, 4_096, 2, 2_048), np.float32)  # of the 276B model
    assert jax.eval_shape(checksums._bit_sum, experts).dtype == np.uint32


def test_another_optimizer_is_refused(run_folder: Path):
    optim = OptimConfig(optimizer=Optimizer.ADAMW, warmup_steps=2)
    with pytest.raises(CheckpointError, match=r"optim.optimizer was 'muon', is 'adamw'"):
        restored(run_folder, dataclasses.replace(EXPERIMENT, optim=optim))


def test_nothing_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"holds no checkpoint"):
        restored(tmp_path)
    with pytest.raises(CheckpointError, match=r"train or import first"):
        restore(tmp_path / "elsewhere")


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax gives up
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_is_noticed_and_the_older_checkpoint_named(first: TrainState, run_folder: Path, how: str):
    newest = run_folder / "checkpoints" / "2"
    files = list(newest.glob("params/**/d/*"))
    assert files
    for file in files:
        damage(file, how)
    with pytest.raises(CheckpointError) as caught:
        restored(run_folder)
    assert "is damaged" in str(caught.value)
    assert f"delete {newest} and run again to continue from step 1" in str(caught.value)
    shutil.rmtree(newest)
    assert state_hash(restored(run_folder)) == state_hash(at_step(first, 1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damage_to_any_one_file_is_noticed_or_changes_nothing(first: TrainState, run_folder: Path, how: str):
    # OCDBT files also hold nodes of versions that were written over: damage there is not read, and harms nothing.
    newest, kept, wanted = run_folder / "checkpoints" / "2", run_folder / "kept", state_hash(at_step(first, 2))
    shutil.copytree(newest, kept)
    num_noticed = 0
    files = [path.relative_to(newest) for path in newest.glob("*/**/d/*")]
    for file in files:
        damage(newest / file, how)
        reason = ""
        try:
            assert state_hash(restored(run_folder)) == wanted, file
        except CheckpointError as error:
            reason = str(error)
        assert not reason or "is damaged" in reason
        num_noticed += bool(reason)
        shutil.copy(kept / file, newest / file)
    assert 0 < num_noticed <= len(files)


def test_a_checksum_guards_what_the_file_format_does_not(first: TrainState, run_folder: Path):
    with Checkpoints(run_folder) as checkpoints:
        manifest = checkpoints.manifest(2)
        name = next(name for name in manifest["checksums"] if name.startswith("params."))
        manifest["checksums"][name] ^= 1
        checkpoints.manifest = lambda step: manifest
        with pytest.raises(CheckpointError, match=f"the checksum of {name} is wrong"):
            checkpoints.restore(EXPERIMENT, make_mesh(EXPERIMENT.mesh, jax.devices()[:1]))


def test_what_a_killed_run_leaves_is_swept_away(first: TrainState, run_folder: Path):
    folder = run_folder / "checkpoints"
    # Killed while it wrote step 3, and while it deleted step 1.
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    (folder / "1" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(folder / "1" / "params")
    assert int(restored(run_folder).step) == 2
    with Checkpoints(run_folder) as checkpoints:
        checkpoints.save(at_step(first, 3), EXPERIMENT)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    assert int(restored(run_folder).step) == 3


def checked_for_long(checkpoints: Checkpoints) -> None:
    for _ in range(600):
        checkpoints.check()
        time.sleep(0.05)


def test_a_save_that_fails_in_the_background_is_found_and_the_next_one_is_made(first: TrainState, tmp_path: Path):
    with Checkpoints(tmp_path) as checkpoints:
        with small_disk(2_000):
            checkpoints.save(at_step(first, 1), EXPERIMENT)
            with pytest.raises(CheckpointError, match=r"saving in the background to .* failed: .*free the disk"):
                checked_for_long(checkpoints)
        checkpoints.check()
        checkpoints.save(at_step(first, 2), EXPERIMENT)
    assert int(restored(tmp_path).step) == 2


def test_a_last_save_is_made_though_the_one_before_it_failed(
    first: TrainState, tmp_path: Path, capsys: pytest.CaptureFixture
):
    with Checkpoints(tmp_path) as checkpoints:
        with small_disk(2_000):
            checkpoints.save(at_step(first, 1), EXPERIMENT)
            while checkpoints._manager.is_saving_in_progress():
                time.sleep(0.05)
        checkpoints.save(at_step(first, 2), EXPERIMENT)
    assert "saving in the background" in capsys.readouterr().err
    assert int(restored(tmp_path).step) == 2


def test_what_cannot_be_read_is_not_called_damaged(first: TrainState, run_folder: Path):
    with Checkpoints(run_folder) as checkpoints:

        def refuse() -> None:
            raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.")

        with pytest.raises(
            CheckpointError, match=r"could not be read \(RESOURCE_EXHAUSTED.*nothing is known to be wrong"
        ):
            checkpoints._guarded(2, refuse)
        shutil.rmtree(run_folder / "checkpoints" / "1")
        with pytest.raises(CheckpointError, match="was removed while it was read"):
            checkpoints.manifest(1)


def test_a_run_of_older_code_may_go_on_where_a_new_key_has_its_default(first: TrainState, run_folder: Path):
    for manifest in (run_folder / "checkpoints").glob("*/manifest/metadata"):
        content = json.loads(manifest.read_text())
        del content["config"]["model"]["mtp"]
        manifest.write_text(json.dumps(content))
    assert int(restored(run_folder).step) == 2


def test_a_save_that_cannot_begin_is_an_error(first: TrainState, tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at_step(first, 1), EXPERIMENT)
    checkpoints.wait()
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match=r"saving step 2 .* failed: .*run the same command to continue"):
        checkpoints.save(at_step(first, 2), EXPERIMENT)
