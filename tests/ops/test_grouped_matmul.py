"""Block plan, dispatch and block matmul against loops over experts."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tml.ops import grouped_matmul_gpu, grouped_matmul_tpu
from tml.ops.expert_blocks import multiply_blocks
from tml.ops.grouped_matmul import (
    gpu_kernels,
    grouped_matmul_reference,
    kernel_grouped_matmul,
    multiply_rows_of_layer_reference,
    plan_blocks,
    plan_of_rows,
    tpu_kernels,
)

ROUTINGS = {
    "even": np.stack([np.arange(24) % 5, (np.arange(24) + 1) % 5], axis=1),
    "all to one": np.full((24, 2), 3),
    "random": np.random.default_rng(0).integers(0, 5, (24, 2)),
    "one token": np.array([[4, 0]]),
}


@pytest.mark.parametrize("experts", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize("block_rows", [1, 4, 32])
def test_every_copy_stands_once_in_a_block_of_its_expert(experts: np.ndarray, block_rows: int) -> None:
    plan = jax.jit(plan_blocks, static_argnums=(1, 2))(jnp.asarray(experts, jnp.int32), 5, block_rows)
    rows = np.asarray(plan.row_of_copy)
    assert len(np.unique(rows)) == experts.size
    np.testing.assert_array_equal(np.asarray(plan.expert_of_block)[rows // block_rows], experts)
    tokens = np.broadcast_to(np.arange(len(experts))[:, None], experts.shape)
    np.testing.assert_array_equal(np.asarray(plan.token_of_row)[rows], tokens)
    empty = np.setdiff1d(np.arange(len(plan.token_of_row)), rows)
    assert (np.asarray(plan.token_of_row)[empty] == len(experts)).all()


def gated(multiply: Callable[..., jax.Array]) -> Callable:
    """(x, gates, gate_up, down, experts, cotangent, static) to the weighted sum of the outputs, and its gradients."""

    def total(x, gates, gate_up, down, experts, cotangent, static: int) -> jax.Array:
        return jnp.sum(multiply(x, gates, gate_up, down, experts, static) * cotangent)

    return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)), static_argnums=6)


@gated
def blocked(x, gates, gate_up, down, experts, block_rows: int) -> jax.Array:
    return multiply_blocks(x, gates, gate_up, down, plan_blocks(experts, 5, block_rows))


@gated
def blocked_in_a_small_buffer(x, gates, gate_up, down, experts, block_rows: int) -> jax.Array:
    return multiply_blocks(x, gates, gate_up, down, plan_blocks(experts, 5, block_rows, num_blocks=24 // block_rows))


@gated
def looped(x, gates, gate_up, down, experts, _: int) -> jax.Array:
    out = jnp.zeros_like(x)
    for expert in range(5):
        hidden = jax.nn.silu(x @ gate_up[expert, :, :7]) * (x @ gate_up[expert, :, 7:])
        out += hidden @ down[expert] * jnp.sum(jnp.where(experts == expert, gates, 0.0), axis=1)[:, None]
    return out


def blocks_case(experts: np.ndarray) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    x, gates = jax.random.normal(keys[0], (len(experts), 6)), jax.random.normal(keys[1], experts.shape)
    gate_up, down = jax.random.normal(keys[2], (5, 6, 14)), jax.random.normal(keys[3], (5, 7, 6))
    return x, gates, gate_up, down, jnp.asarray(experts, jnp.int32), jax.random.normal(keys[4], x.shape)


def assert_close(ours, reference) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, reference)


@pytest.mark.parametrize("experts", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize("block_rows", [1, 4])
def test_blocks_of_experts_and_their_gradients_equal_a_loop(experts: np.ndarray, block_rows: int) -> None:
    arguments = blocks_case(experts)
    assert_close(blocked(*arguments, block_rows), looped(*arguments, 0))


@pytest.mark.parametrize("block_rows", [1, 4])
def test_copies_without_a_row_add_nothing_and_get_no_gradient(block_rows: int) -> None:
    experts = np.where(np.arange(48).reshape(24, 2) % 3 == 0, -1, ROUTINGS["random"])
    plan = plan_blocks(jnp.asarray(experts, jnp.int32), 5, block_rows, num_blocks=24 // block_rows)
    found = np.where(np.asarray(plan.row_of_copy) < 24, experts, -1)
    assert (found < 0).sum() > (experts < 0).sum()
    ours = blocked_in_a_small_buffer(*blocks_case(experts), block_rows)
    assert_close(ours, looped(*blocks_case(found), 0))
    np.testing.assert_array_equal(np.asarray(ours[1][1])[found < 0], 0.0)


def test_rows_that_stand_in_blocks_already_keep_their_places() -> None:
    x, gate_up, down = jnp.ones((6, 4)), jnp.ones((2, 4, 6)), jnp.ones((2, 3, 4))
    plan = plan_of_rows(6, jnp.array([0, 1, 2], jnp.int32))
    out = jax.jit(multiply_blocks)(x, jnp.ones((6, 1)), gate_up, down, plan)
    # Blocks of no expert give zeros.
    assert (np.asarray(out) != 0.0).any(axis=1).tolist() == [True] * 4 + [False] * 2


@functools.partial(jax.jit, static_argnums=0)
def product_and_grads(grouped_matmul: Callable, x, w, sizes, cotangent) -> tuple:
    return jax.value_and_grad(lambda x, w: jnp.sum(grouped_matmul(x, w, sizes) * cotangent), (0, 1))(x, w)


class GroupedMatmulTests:
    """What every back-end must do, with experts of no rows, of many, and rows of no expert."""

    grouped_matmul: staticmethod

    @pytest.mark.parametrize("sizes", [(9, 0, 17, 1, 13), (0, 0, 40, 0, 0), (3, 4, 0, 2, 0)], ids=str)
    def test_forward_and_gradients_equal_the_definition(self, sizes: tuple[int, ...]) -> None:
        keys = jax.random.split(jax.random.key(0), 3)
        x, w = jax.random.normal(keys[0], (40, 12)), jax.random.normal(keys[1], (5, 12, 20))
        cotangent, sizes = jax.random.normal(keys[2], (40, 20)), jnp.asarray(sizes, jnp.int32)
        ours, expected = (
            product_and_grads(f, x, w, sizes, cotangent) for f in (self.grouped_matmul, grouped_matmul_reference)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected)

    def test_rows_of_no_expert_are_zero(self) -> None:
        x, w = jnp.ones((8, 4)), jnp.ones((2, 4, 3))
        out = jax.jit(self.grouped_matmul)(x, w, jnp.array([2, 3], jnp.int32))
        np.testing.assert_array_equal(out, np.where(np.arange(8)[:, None] < 5, np.full((8, 3), 4.0), 0.0))


class TestTPU(GroupedMatmulTests):
    grouped_matmul = staticmethod(functools.partial(kernel_grouped_matmul, tpu_kernels(unit=8, interpret=True)))


class TestGPU(GroupedMatmulTests):
    grouped_matmul = staticmethod(functools.partial(kernel_grouped_matmul, gpu_kernels(interpret=True)))


LAYER_KERNELS = {
    "tpu": functools.partial(grouped_matmul_tpu.multiply_rows_of_layer, unit=4, interpret=True),
    "gpu": functools.partial(grouped_matmul_gpu.multiply_rows_of_layer, interpret=True),
}
LAYER_PROGRAMS = {name: jax.jit(functools.partial(f, usual_groups=5.0)) for name, f in LAYER_KERNELS.items()}


@pytest.mark.parametrize("run", LAYER_PROGRAMS.values(), ids=LAYER_PROGRAMS.keys())
@pytest.mark.parametrize("sizes", [(9, 0, 17, 1, 13), (0, 0, 40, 0, 0), (3, 4, 0, 2, 0)], ids=str)
def test_a_layer_of_a_stack_equals_the_definition(run: Callable, sizes: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (40, 12)), jax.random.normal(keys[1], (3, 5, 2, 12, 20))
    arguments = jnp.int32(1), jnp.asarray(sizes, jnp.int32)
    expected = multiply_rows_of_layer_reference(x, w, *arguments, usual_groups=5.0)
    got = run(x, w, *arguments)
    np.testing.assert_allclose(got[: sum(sizes)], expected[: sum(sizes)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", LAYER_PROGRAMS.values(), ids=LAYER_PROGRAMS.keys())
def test_a_row_has_the_same_bits_whatever_the_others_are(run: Callable) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (40, 12)), jax.random.normal(keys[1], (3, 5, 2, 12, 20))
    among = run(x, w, jnp.int32(2), jnp.array([9, 0, 17, 1, 13], jnp.int32))[9:26]
    others = jax.random.normal(keys[2], (40, 12)).at[:17].set(x[9:26])
    alone = run(others, w, jnp.int32(2), jnp.array([0, 0, 17, 0, 0], jnp.int32))[:17]
    np.testing.assert_array_equal(among, alone)


@pytest.mark.parametrize("name", LAYER_KERNELS)
def test_the_stated_cost_is_that_of_the_groups_that_usually_have_rows(name: str) -> None:
    x = jax.ShapeDtypeStruct((96, 256), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((7, 256, 2, 256, 384), jnp.bfloat16)
    kernel = {"tpu": grouped_matmul_tpu, "gpu": grouped_matmul_gpu}[name].multiply_rows_of_layer

    def stated(usual_groups: float) -> tuple[int, int]:
        run = functools.partial(kernel, usual_groups=usual_groups)
        jaxpr = jax.make_jaxpr(run)(x, w, jnp.int32(0), jnp.zeros(256, jnp.int32))
        (call,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call")
        cost = call.params["cost_estimate"]
        return cost.flops, cost.bytes_accessed

    (flops, num_bytes), (more_flops, more_bytes) = stated(80.9), stated(160.9)
    matrices = 2 * 256 * 384
    # Most bytes are those of the matrices; a visit multiplies a tile of rows, of which a group has one or two.
    assert 80.9 * matrices * 2 < num_bytes < 1.6 * 80.9 * matrices * 2
    assert more_bytes - num_bytes >= 80 * matrices * 2
    assert 2 * 96 * matrices < flops < more_flops
