"""Parameters as they are born: deviations, smooth axes, independence of order and of devices."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tml.params import SMOOTH_STEPS, Init, init_params, param, scale

SIZES = {"M": 40, "Q": 16, "D": 64, "E": 8}
TABLE = param("M Q D", SIZES, fan_in="D", smooth_axis="Q")


def test_a_normal_parameter_has_the_deviation_of_its_fan_in():
    values = init_params({"matrix": param("E D Q", SIZES, fan_in="D")}, jax.random.key(0))["matrix"]
    # Cutting a normal at 3 deviations takes 1.3 % off its deviation.
    assert np.std(values) == pytest.approx(0.987 / 8, rel=0.02)


def test_a_smooth_axis_has_the_covariance_it_promises():
    values_QN = np.moveaxis(init_params({"table": TABLE}, jax.random.key(0))["table"], 1, 0).reshape(16, -1)
    found = np.cov(values_QN) * 64 / 0.987**2
    distance = np.arange(16)[:, None] - np.arange(16)[None]
    np.testing.assert_allclose(found, np.exp(-0.5 * (distance / SMOOTH_STEPS) ** 2), atol=0.1)


def test_other_axes_stay_independent():
    values = np.asarray(init_params({"table": TABLE}, jax.random.key(0))["table"])
    correlation = np.corrcoef(values[:, 7])
    assert np.abs(correlation - np.eye(40)).max() < 0.7


def test_values_follow_from_key_and_path_alone():
    alone = init_params({"b": TABLE}, jax.random.key(1))["b"]
    beside = init_params({"a": scale("D", SIZES), "b": TABLE}, jax.random.key(1))["b"]
    np.testing.assert_array_equal(alone, beside)
    assert not np.array_equal(alone, init_params({"c": TABLE}, jax.random.key(1))["c"])


def test_a_sharded_parameter_is_born_with_the_same_values():
    mesh = Mesh(np.array(jax.devices()[:8]), ("fsdp",))
    sharding = {"table": NamedSharding(mesh, PartitionSpec("fsdp"))}
    sharded = init_params({"table": TABLE}, jax.random.key(2), sharding)["table"]
    assert sharded.sharding == sharding["table"]
    np.testing.assert_allclose(sharded, init_params({"table": TABLE}, jax.random.key(2))["table"], rtol=1e-5, atol=1e-6)


def test_constants():
    specs = {"one": scale("D", SIZES), "zero": param("D", SIZES, init=Init.ZEROS)}
    values = init_params(specs, jax.random.key(0))
    assert (np.asarray(values["one"]) == 1).all()
    assert (np.asarray(values["zero"]) == 0).all()
