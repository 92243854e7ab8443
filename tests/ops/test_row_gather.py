"""Rows gathered by their places, bit for bit, and those that a matmul hands on to a gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tml.ops import row_gather_tpu
from tml.ops.grouped_matmul import GroupedKernels, dense_kernels, gpu_kernels, tpu_kernels

KERNELS = {
    "definition": dense_kernels(),
    "TPU": tpu_kernels(unit=8, interpret=True),
    "GPU": gpu_kernels(interpret=True),
}
NUM_USED = 45


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def gathered(kernels: GroupedKernels, x_TD, place_R, num_used):
    return kernels.gather(kernels.for_gather(x_TD), place_R, num_used, like=x_TD)


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("width", [12, 48])
def test_rows_come_as_they_are(width: int, dtype: jnp.dtype, kernels: GroupedKernels) -> None:
    x_TD = jax.random.normal(jax.random.key(0), (37, width)).astype(dtype)
    x_TD = x_TD.at[3].set(jnp.inf).at[4].set(jnp.nan).at[5].set(-0.0)
    place_R = jax.random.randint(jax.random.key(1), (70,), 0, 37).at[:3].set(jnp.array([3, 4, 5]))
    rows = gathered(kernels, x_TD, place_R, jnp.int32(NUM_USED))
    assert rows.shape == (70, width)
    assert rows.dtype == dtype
    np.testing.assert_array_equal(bits(rows[:NUM_USED]), bits(x_TD[place_R[:NUM_USED]]))


@pytest.mark.parametrize("num_rows", [1, 8, 40, 41, 63])
def test_rows_need_not_fill_the_tiles(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_gather_tpu, "TILE_BYTES", 2 * 8 * 16 * 4)
    x_TD, place_R = jax.random.normal(jax.random.key(0), (50, 16)), jnp.arange(num_rows)[::-1] % 50
    rows = gathered(KERNELS["TPU"], x_TD, place_R, jnp.int32(num_rows))
    np.testing.assert_array_equal(rows, x_TD[place_R])


def test_tiles_without_a_row_that_is_asked_for_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_gather_tpu, "TILE_BYTES", 2 * 8 * 16 * 4)
    x_TD, place_R = jnp.ones((8, 16)), jnp.zeros(64, jnp.int32)
    kernels = tpu_kernels(unit=8, interpret=True)
    grids = [
        int(np.isfinite(np.asarray(gathered(kernels, x_TD, place_R, jnp.int32(used)))).all(axis=1).sum())
        for used in (0, 1, 16, 17, 64)
    ]
    # What no tile has written is not a number in interpret mode; two tiles at a time, one for each core.
    assert grids == [0, 32, 32, 32, 64]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("width", [20, 48])
def test_a_product_that_is_gathered_next_has_the_bits_of_the_product(
    width: int, is_transposed: bool, dtype: jnp.dtype
) -> None:
    kernels, keys = KERNELS["TPU"], jax.random.split(jax.random.key(0), 3)
    x_RD = jax.random.normal(keys[0], (40, 12)).astype(dtype)
    w_EDF = jax.random.normal(keys[1], (5, 12, width)).astype(dtype)
    w_EDF = w_EDF.swapaxes(1, 2) if is_transposed else w_EDF
    place_R, sizes_E = jax.random.randint(keys[2], (30,), 0, 36), jnp.array([9, 0, 17, 1, 9], jnp.int32)

    @jax.jit
    def both(x_RD, w_EDF):
        product = kernels.rows(x_RD, w_EDF, sizes_E, is_transposed=is_transposed)
        for_gather = kernels.rows_for_gather(x_RD, w_EDF, sizes_E, is_transposed=is_transposed)
        return product, kernels.gather(for_gather, place_R, jnp.int32(30), like=product)

    product, rows = both(x_RD, w_EDF)
    np.testing.assert_array_equal(bits(rows), bits(product[place_R]))


def test_the_stated_cost_is_that_of_the_rows_that_are_usual() -> None:
    kernels = tpu_kernels(usual_rows=300)
    x_TP, places = jax.ShapeDtypeStruct((512, 256), jnp.uint32), jax.ShapeDtypeStruct((384,), jnp.int32)
    like = jax.ShapeDtypeStruct((1, 512), jnp.bfloat16)
    gather = functools.partial(kernels.gather, num_used=jnp.int32(300), like=like)
    jaxpr = jax.make_jaxpr(gather)(x_TP, places)
    (call,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "pallas_call")
    assert call.params["cost_estimate"].bytes_accessed == 300 * (2 * 512 * 2 + 4)
