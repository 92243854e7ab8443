"""A run that begins with parameters from elsewhere: an imported checkpoint, or another run's."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from made_up import made_up_batches, made_up_experiment
from tiny import VOICE

from launch.run_folder import beginning_text, claim_workdir
from tml.checkpoint import CheckpointError, Checkpoints, state_hash
from tml.codec.text import train_tokenizer
from tml.config import Experiment, MeshConfig, MtpConfig
from tml.config.tree import from_json
from tml.export import inkling_config, inkling_layout
from tml.export.inkling_import import KEEPSAKE, STORED, import_folder
from tml.export.tensor_folder import Planned, write_shards
from tml.mesh import make_mesh
from tml.train import start, train

MODEL = made_up_experiment().model


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the published layout, imported."""
    folder = tmp_path_factory.mktemp("imported")
    rng = np.random.default_rng(0)
    (folder / "in").mkdir()

    def drawn(tensor: inkling_layout.Tensor) -> Planned:
        values = rng.standard_normal(tensor.shape).astype(np.float32)
        return Planned(tensor.name, values.nbytes, lambda: values)

    write_shards(folder / "in", map(drawn, inkling_layout.tensors(MODEL)), 10**6)
    (folder / "in" / "config.json").write_text(json.dumps(inkling_config.from_model(MODEL, {})))
    import_folder(folder / "in", folder / "run")
    return folder / "run"


def begun(experiment: Experiment, workdir: Path) -> tuple[int, object]:
    mesh = make_mesh(experiment.mesh, jax.devices()[: experiment.mesh.fsdp])
    with Checkpoints(workdir) as checkpoints:
        return start(experiment, mesh, checkpoints)


def test_a_run_that_begins_keeps_what_its_own_origin_kept(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one two three"], 300, tmp_path / "tokenizer")
    for name in ("first", "second"):
        (tmp_path / name / KEEPSAKE).mkdir(parents=True)
        (tmp_path / name / KEEPSAKE / STORED).write_text(name)
    run = tmp_path / "run"
    run.mkdir()
    kept = run / KEEPSAKE / STORED
    for name in ("first", "second"):
        claim_workdir(beginning(tmp_path / name), tokenizer, {}, run)
        assert kept.read_text() == name
    (run / "checkpoints" / "3").mkdir(parents=True)
    claim_workdir(made_up_experiment(), tokenizer, {}, run)
    assert kept.read_text() == "second", "a run that goes on keeps what it began with"
    assert from_json((run / "config.json").read_text()).train.init_from == str(tmp_path / "second")


def test_a_folder_of_that_name_that_is_something_else_is_not_removed(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["one two three"], 300, tmp_path / "tokenizer")
    (tmp_path / "origin" / KEEPSAKE).mkdir(parents=True)
    (tmp_path / "origin" / KEEPSAKE / STORED).write_text("{}")
    other_run = tmp_path / "runs" / KEEPSAKE / "checkpoints"
    other_run.mkdir(parents=True)
    claim_workdir(made_up_experiment(), tokenizer, {}, tmp_path / "runs")
    assert other_run.is_dir()
    with pytest.raises(ValueError, match=r"runs/inkling is in the way of what the import of .*/origin kept"):
        claim_workdir(beginning(tmp_path / "origin"), tokenizer, {}, tmp_path / "runs")
    assert other_run.is_dir()


def test_another_tokenizer_than_the_origin_had_is_said(tmp_path: Path) -> None:
    ours = train_tokenizer(["one two three"], 300, tmp_path / "ours")
    theirs = train_tokenizer(["four five six"], 300, tmp_path / "theirs")
    theirs.save(tmp_path / "origin" / "tokenizer")
    assert beginning_text(theirs, str(tmp_path / "origin")) == ""
    assert beginning_text(ours, "") == beginning_text(ours, str(tmp_path)) == ""
    assert beginning_text(ours, str(tmp_path / "origin")) == (
        f"{tmp_path}/origin was trained with tokenizer {theirs.fingerprint()}, this run has {ours.fingerprint()}: "
        "the same id means another word\n"
    )
    for file in (tmp_path / "origin" / "tokenizer").iterdir():
        file.unlink()
    assert "is not compared with this run's" in beginning_text(ours, str(tmp_path / "origin"))


def beginning(origin: Path, **changes) -> Experiment:
    experiment = made_up_experiment(**changes)
    return replace(experiment, train=replace(experiment.train, init_from=str(origin)))


def test_parameters_are_taken_over_and_all_else_is_new(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh = MeshConfig(fsdp=8)
    step, state = begun(beginning(imported, mesh=mesh), tmp_path / "run")
    assert "another model" not in capsys.readouterr().out
    _, drawn = begun(made_up_experiment(mesh=mesh), tmp_path / "drawn")
    with Checkpoints(imported, is_read_only=True) as checkpoints:
        _, params = checkpoints.restore_params()
    assert (step, int(state.step), int(state.num_skipped)) == (0, 0, 0)
    assert state_hash(state.params) == state_hash(params) != state_hash(drawn.params)
    assert state_hash(state.opt_state) == state_hash(drawn.opt_state)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(drawn), strict=True):
        assert ours.sharding == theirs.sharding


def test_what_of_the_network_is_another_here_is_said(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moe = replace(MODEL.moe, route_scale=7.0, capacity_factor=3.0)
    begun(beginning(imported, model=replace(MODEL, moe=moe)), tmp_path / "run")
    said = f"which were of another model than this one: model.moe.route_scale was {MODEL.moe.route_scale}, is 7.0\n"
    assert capsys.readouterr().out.endswith(said)


@pytest.mark.slow
def test_a_run_trains_on_from_there_and_then_from_its_own(imported: Path, tmp_path: Path) -> None:
    experiment = beginning(imported, mesh=MeshConfig(fsdp=8))
    first = train(experiment, tmp_path, lambda step: made_up_batches(experiment, step), list)
    assert first.scalars["train/loss"] > 0
    step, state = begun(experiment, tmp_path)
    assert step == experiment.train.num_steps
    assert state_hash(state) == state_hash(first.state)


def test_another_shape_is_refused_with_both(imported: Path, tmp_path: Path) -> None:
    wider = beginning(imported, model=replace(MODEL, dense_dim=32, d_model=32))
    shapes = (
        r"cannot begin this run: embed/audio/norm has shape \(16,\) there and \(32,\) here; .*d_model was 16, is 32"
    )
    with pytest.raises(CheckpointError, match=shapes):
        begun(wider, tmp_path)
    deeper = beginning(imported, model=replace(MODEL, num_layers=2, global_layers=(1,)))
    with pytest.raises(CheckpointError, match=r"stages/.* has shape none there and \(.*\) here; model.global_layers"):
        begun(deeper, tmp_path)


def test_a_voice_and_blocks_ahead_may_be_added_to_imported_weights(imported: Path, tmp_path: Path) -> None:
    model = replace(MODEL, audio_out=VOICE, mtp=MtpConfig(num_blocks=1))
    mesh = MeshConfig(fsdp=8)
    _, state = begun(beginning(imported, model=model, mesh=mesh), tmp_path / "run")
    _, drawn = begun(made_up_experiment(model=model, mesh=mesh), tmp_path / "drawn")
    with Checkpoints(imported, is_read_only=True) as checkpoints:
        _, params = checkpoints.restore_params()
    found, fresh, theirs = (dict(jax.tree_util.tree_leaves_with_path(t)) for t in (state.params, drawn.params, params))
    added = found.keys() - theirs.keys()
    assert {jax.tree_util.keystr(path[:1], simple=True) for path in added} == {"audio_out", "mtp", "embed"}
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, fresh[path] if path in added else theirs[path])
        assert leaf.sharding == fresh[path].sharding
    # What the run cannot hold is refused, not dropped.
    export = tmp_path / "voiced"
    with Checkpoints(export) as checkpoints:
        checkpoints.save(state, beginning(imported, model=model, mesh=mesh))
    with pytest.raises(CheckpointError, match=r"audio_out/.* has shape \(.*\) there and none here; model.audio_out"):
        begun(beginning(export), tmp_path / "silent")


def test_where_there_is_nothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing has no checkpoints folder; train or import first"):
        begun(beginning(tmp_path / "nothing"), tmp_path / "run")


def test_a_run_cannot_go_on_inside_an_import(imported: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds parameters alone: .* --config.train.init_from=.*/run, but not"):
        begun(made_up_experiment(), imported)
