"""The train step: accumulation, sharding, skipped steps, and what it reports."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from made_up import made_up_batch, made_up_experiment

from tml.config import Experiment, MeshConfig, MtpConfig, OptimConfig, TrainConfig
from tml.mesh import make_mesh
from tml.metrics import Mean
from tml.model import transformer
from tml.optim import learning_rate
from tml.params import Update, spec_leaves
from tml.train_step import (
    TrainState,
    TrainStep,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    to_devices,
)


def mesh_of(experiment: Experiment) -> Mesh:
    return make_mesh(experiment.mesh, jax.devices()[: math.prod(experiment.mesh.shape.values())])


def first_state(experiment: Experiment) -> TrainState:
    return init_state(jax.random.key(3), experiment, mesh_of(experiment))


@functools.cache
def step_of(num_parts: int, **mesh: int) -> tuple[Experiment, TrainStep]:
    """The experiment and its jitted step; compiling one takes longer than all that is done with it."""
    experiment = made_up_experiment(mesh=MeshConfig(**mesh))
    experiment = dataclasses.replace(
        experiment, train=dataclasses.replace(experiment.train, num_steps=60, grad_accum_steps=num_parts)
    )
    return experiment, make_train_step(experiment, mesh_of(experiment))


def run(batches: list[int], num_parts: int = 1, **mesh: int) -> tuple[TrainState, list[dict[str, float]]]:
    experiment, step = step_of(num_parts, **mesh)
    state, reports = first_state(experiment), []
    for index in batches:
        state, metrics = step(state, to_devices(made_up_batch(experiment, index), mesh_of(experiment)))
        reports.append({name: value_of(metric) for name, metric in jax.device_get(metrics).items()})
    return jax.device_get(state), reports


def value_of(metric: Mean | np.ndarray) -> float:
    return float(metric.total) / float(metric.count) if isinstance(metric, Mean) else float(metric)


@pytest.fixture(scope="module")
def plain() -> tuple[Experiment, TrainState, list[dict[str, float]]]:
    return step_of(1)[0], *run([0, 1, 2])


def assert_close(found: TrainState, expected: TrainState) -> None:
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(value, wanted, rtol=2e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_two_parts_on_eight_devices_equal_one_batch_on_one(plain):
    _, expected, reports = plain
    found, found_reports = run([0, 1, 2], 2, replica=2, fsdp=4)
    assert_close(found, expected)
    for wanted, report in zip(reports, found_reports, strict=True):
        assert wanted.keys() == report.keys()
        for name, value in wanted.items():
            np.testing.assert_allclose(report[name], value, rtol=1e-3, err_msg=name)


def test_parameters_are_split_over_devices():
    experiment = made_up_experiment(mesh=MeshConfig(replica=2, fsdp=4))
    table = first_state(experiment).params["embed"]["tokens"]["table"]
    assert len(table.sharding.device_set) == 8
    assert table.sharding.shard_shape(table.shape)[1] == experiment.model.d_model // 4


def test_parameters_are_drawn_alike_on_any_mesh():
    one = made_up_experiment()
    eight = dataclasses.replace(one, mesh=MeshConfig(fsdp=8))
    for left, right in zip(jax.tree.leaves(first_state(one)), jax.tree.leaves(first_state(eight)), strict=True):
        np.testing.assert_array_equal(left, right)


def test_moments_live_where_their_parameters_live():
    experiment = made_up_experiment(mesh=MeshConfig(fsdp=8), optim=OptimConfig(warmup_steps=2))
    abstract = abstract_state(experiment, mesh_of(experiment))
    spread = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(abstract.params) if len(leaf.shape) > 1}
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.shape in spread]
    assert len(moments) > 10
    assert any("fsdp" in leaf.sharding.spec for leaf in moments)
    assert all(leaf.sharding.spec == spread[leaf.shape] for leaf in moments)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(plain):
    experiment, _, _ = plain
    good = made_up_batch(experiment, 0)
    bad = good.replace(loss_weights_BS=np.where(good.loss_weights_BS > 0, np.inf, 0.0).astype(np.float32))
    mesh, step, state = mesh_of(experiment), step_of(1)[1], first_state(experiment)
    before = jax.device_get(state)
    state, metrics = step(state, to_devices(bad, mesh))
    assert not math.isfinite(value_of(metrics["loss"]))
    assert (int(state.step), int(state.num_skipped)) == (1, 1)
    for left, right in zip(
        jax.tree.leaves((before.params, before.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(left, right)
    # The next good step is the first update: rate and moments start as if the bad one had not been.
    state, metrics = step(state, to_devices(good, mesh))
    rate = learning_rate(experiment.optim, experiment.train.num_steps)
    np.testing.assert_allclose(metrics["lr"], rate(jnp.int32(0)), rtol=1e-6)
    clean, _ = step(first_state(experiment), to_devices(good, mesh))
    for left, right in zip(jax.tree.leaves(clean.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(left, right)


def test_reports(plain):
    experiment, state, reports = plain
    first = made_up_batch(experiment, 0)
    assert reports[0]["tokens"] == np.count_nonzero(first.kinds_BS)
    assert reports[0]["fill"] == np.count_nonzero(first.kinds_BS) / first.kinds_BS.size
    assert 0 < reports[0]["load_cv"] < 2
    assert 1 <= reports[0]["load_max_over_mean"] <= experiment.model.moe.num_experts
    assert {"loss_listen", "loss_speak", "loss_text", "loss_action", "loss_document"} <= reports[0].keys()
    assert reports[0]["num_skipped"] == 0
    # The first loss of a random model is near that of a uniform guess.
    assert abs(reports[0]["loss"] - math.log(experiment.model.vocab_size)) < 1.0
    assert int(state.step) == 3


def test_router_bias_moves_by_the_rule_and_by_nothing_else(plain):
    experiment, state, _ = plain
    specs = dict(spec_leaves(transformer.specs(experiment.model)))
    (path,) = [path for path, spec in specs.items() if spec.update is Update.BALANCE]
    names = [int(name) if name.isdigit() else name for name in path.split("/")]
    bias = state.params
    for name in names:
        bias = bias[name]
    steps = np.asarray(bias) / experiment.model.moe.balance_rate
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    assert np.any(steps != 0)
    assert np.all(np.abs(steps) <= 3.001)


def test_loss_falls_on_what_can_be_learnt():
    _, reports = run([step % 4 for step in range(40)])
    assert reports[-1]["loss"] < 0.7 * reports[0]["loss"]


def test_blocks_ahead_learn_and_leave_the_loss_to_compare_alone():
    experiment, _ = step_of(1)
    model = dataclasses.replace(experiment.model, mtp=MtpConfig(num_blocks=2))
    loss = dataclasses.replace(experiment.loss, mtp_weight=1.0)
    experiment = dataclasses.replace(experiment, model=model, loss=loss)
    mesh = mesh_of(experiment)
    step, state, reports = make_train_step(experiment, mesh), first_state(experiment), []
    for index in range(40):
        state, metrics = step(state, to_devices(made_up_batch(experiment, index % 4), mesh))
        reports.append({name: value_of(metric) for name, metric in jax.device_get(metrics).items()})
    _, plain = run([0])
    # The same key draws the same parameters, with blocks or without.
    assert reports[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert reports[0].keys() - plain[0].keys() == {"loss_mtp"}
    assert abs(reports[0]["loss_mtp"] - math.log(experiment.model.vocab_size)) < 1.0
    assert reports[-1]["loss_mtp"] < 0.7 * reports[0]["loss_mtp"]


def test_evaluation_gives_the_metrics_of_the_objective(plain):
    experiment, _, reports = plain
    mesh = mesh_of(experiment)
    batch = to_devices(made_up_batch(experiment, 0), mesh)
    metrics = make_eval_step(experiment, mesh)(first_state(experiment).params, batch)
    for name, metric in metrics.items():
        np.testing.assert_allclose(value_of(metric), reports[0][name], rtol=1e-5, err_msg=name)


def test_rows_must_divide_into_parts_on_every_device():
    with pytest.raises(ValueError, match=r"rows_per_batch = 16 .* = 32; the nearest valid value is 32"):
        made_up_experiment(mesh=MeshConfig(fsdp=8), train=TrainConfig(num_steps=12, grad_accum_steps=4))
