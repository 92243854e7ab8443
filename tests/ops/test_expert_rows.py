"""Experts over sorted rows, and their gradients, against a loop over copies; alone and with a group's tokens."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tml.ops.expert_rows import multiply_sorted
from tml.ops.grouped_matmul import GroupedKernels, dense_kernels, gpu_kernels, tpu_kernels
from tml.ops.sorted_copies import BLOCK_TOKENS, count_copies, sort_copies

EXPERTS, CHOICES, WIDTH, HIDDEN, ROWS = 5, 2, 8, 12, 160
FIND_ROWS = {"sorted": sort_copies, "counted": count_copies}


def leaving_nothing(kernels: GroupedKernels) -> GroupedKernels:
    """Kernels that leave no number in rows of no group, as those of a platform may."""

    def rows(multiply: Callable) -> Callable:
        def run(x_RD, w_EDF, sizes_E, **options):
            has_group_R1 = (jnp.arange(x_RD.shape[0]) < jnp.sum(sizes_E))[:, None]
            return jnp.where(has_group_R1, multiply(x_RD, w_EDF, sizes_E, **options), jnp.nan)

        return run

    return kernels._replace(rows=rows(kernels.rows), rows_for_gather=rows(kernels.rows_for_gather))


KERNELS = {
    "definition": leaving_nothing(dense_kernels()),
    "TPU": tpu_kernels(unit=8, interpret=True),
    "GPU": leaving_nothing(gpu_kernels(interpret=True)),
}


def routing(num_tokens: int) -> np.ndarray:
    """Experts of every token, some of them elsewhere; expert 2 has none, and most tokens no expert here."""
    drawn = np.random.default_rng(0).integers(-2, EXPERTS, (num_tokens, CHOICES))
    drawn[80:] = np.where(np.arange(num_tokens - 80)[:, None] % 9, -1, drawn[80:])
    return np.where(drawn == 2, -1, drawn).astype(np.int32)


def case(num_tokens: int, dtype: jnp.dtype, num_experts: int = EXPERTS) -> tuple[np.ndarray, ...]:
    """Tokens, gates, gate_up, down, what is computed beside with, and what the result is multiplied by."""
    shapes = (
        (num_tokens, WIDTH),
        (num_tokens, CHOICES),
        (num_experts, WIDTH, 2 * HIDDEN),
        (num_experts, WIDTH, HIDDEN),
        (WIDTH, WIDTH),
        (num_tokens, WIDTH),
    )
    drawn = np.random.default_rng(2)
    return tuple(drawn.standard_normal(shape).astype(dtype) for shape in shapes)


def beside(x_TD: jax.Array, w_DD: jax.Array) -> jax.Array:
    return jnp.tanh(x_TD @ w_DD)


def total(kernels: GroupedKernels, find_rows: Callable, experts: np.ndarray, *arrays) -> jax.Array:
    x, gates, gate_up, down, w, cotangent = arrays
    plan, gate_R = find_rows(jnp.asarray(experts), gates, EXPERTS, ROWS)
    return jnp.sum(multiply_sorted(kernels, None, beside, x, gate_R, gate_up, down, plan, (w,)) * cotangent)


def looped(experts: np.ndarray, *arrays) -> jax.Array:
    """One expert after another on all tokens; copies beyond ROWS are left out."""
    x, gates, gate_up, down, w, cotangent = arrays
    order = [copy for expert in range(EXPERTS) for copy in np.flatnonzero(experts.reshape(-1) == expert)]
    has_row = np.zeros(experts.size, bool)
    has_row[order[:ROWS]] = True
    out = beside(x, w)
    for expert in range(EXPERTS):
        chosen = (experts == expert) & has_row.reshape(experts.shape)
        gate = jnp.sum(jnp.where(chosen, gates, jnp.zeros_like(gates)), axis=1)[:, None]
        gate_unit, up = jnp.split(x @ gate_up[expert], 2, axis=1)
        out += (jax.nn.silu(gate_unit) * up * gate) @ down[expert].T
    return jnp.sum(out * cotangent)


@pytest.mark.parametrize("find_rows", FIND_ROWS.values(), ids=FIND_ROWS.keys())
@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("num_tokens", [60, 2 * BLOCK_TOKENS + 40, 900], ids=["few", "blocks", "some without a row"])
def test_values_and_gradients_equal_a_loop(num_tokens: int, kernels: GroupedKernels, find_rows: Callable) -> None:
    experts, arrays = routing(num_tokens), case(num_tokens, jnp.float32)
    assert ((experts >= 0).sum() > ROWS) == (num_tokens == 900)
    functions = functools.partial(total, kernels, find_rows, experts), functools.partial(looped, experts)
    found, expected = (jax.jit(jax.value_and_grad(f, range(4)))(*arrays) for f in functions)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("find_rows", FIND_ROWS.values(), ids=FIND_ROWS.keys())
def test_paired_rows_change_nothing_but_the_last_bits_of_bfloat16(find_rows: Callable) -> None:
    num_tokens = 2 * BLOCK_TOKENS + 40
    experts, arrays = routing(num_tokens), case(num_tokens, jnp.bfloat16)
    exact = [np.asarray(array, np.float32) for array in arrays]
    found = jax.jit(jax.grad(functools.partial(total, KERNELS["TPU"], find_rows, experts), range(5)))(*arrays)
    expected = jax.jit(jax.grad(functools.partial(looped, experts), range(5)))(*exact)
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.abs(np.asarray(ours, np.float32) - reference).max()
        assert error < 0.02 * np.abs(reference).max()


@pytest.mark.parametrize("name", ["definition", "TPU"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_devices_that_bring_their_tokens_together_get_the_sums_of_all_experts(name: str, dtype: jnp.dtype) -> None:
    devices, num_tokens = 2, 64
    experts = np.random.default_rng(3).integers(0, 2 * EXPERTS, (num_tokens, CHOICES)).astype(np.int32)
    arrays = case(num_tokens, dtype, 2 * EXPERTS)

    def gradients(axis: str | None, num_experts: int, experts: jax.Array, *arrays):
        def total(x, gates, gate_up, down, w):
            first, chosen = 0, experts
            if axis is not None:
                first = jax.lax.axis_index(axis) * num_experts
                chosen, gates = (jax.lax.all_gather(x, axis, axis=0, tiled=True) for x in (chosen, gates))
            here = chosen - first
            here = jnp.where((here >= 0) & (here < num_experts), here, -1)
            plan, gate_R = sort_copies(here, gates, num_experts, num_tokens * CHOICES)
            args = (x, gate_R, gate_up, down, plan, (w,))
            return jnp.sum(multiply_sorted(KERNELS[name], axis, beside, *args) * arrays[-1])

        *grads, grad_w = jax.grad(total, range(5))(*arrays[:5])
        return *grads, grad_w if axis is None else jax.lax.psum(grad_w, axis)

    mesh, split = Mesh(np.array(jax.devices()[:devices]), ("expert",)), PartitionSpec("expert")
    whole = PartitionSpec()
    run = jax.shard_map(
        functools.partial(gradients, "expert", EXPERTS),
        mesh=mesh,
        in_specs=(split, split, split, split, split, whole, split),
        out_specs=(split, split, split, split, whole),
        check_vma=False,
    )
    several = jax.jit(run)(experts, *arrays)
    alone = jax.jit(functools.partial(gradients, None, 2 * EXPERTS))(experts, *arrays)
    tolerance = 0.02 if dtype == jnp.bfloat16 else 1e-5
    for ours, reference in zip(several, alone, strict=True):
        ours, reference = np.asarray(ours, np.float32), np.asarray(reference, np.float32)
        np.testing.assert_allclose(ours, reference, atol=tolerance * np.abs(reference).max(), rtol=0)
