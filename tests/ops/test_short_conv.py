"""The short convolution against torch, across segments, and streamed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tml.ops.short_conv import short_conv_rows, short_conv_stream, zero_history


def by_torch(x_SD: np.ndarray, taps_YD: np.ndarray) -> np.ndarray:
    x = torch.tensor(x_SD.T)[None]
    weight = torch.tensor(taps_YD.T)[:, None]
    return x_SD + torch.nn.functional.conv1d(x, weight, padding=3, groups=x.shape[1])[0, :, : x.shape[2]].numpy().T


def test_equals_torch_segment_by_segment() -> None:
    rng = np.random.default_rng(0)
    x, taps = rng.standard_normal((1, 17, 6), np.float32), rng.standard_normal((4, 6), np.float32)
    lengths = [5, 1, 2, 9]
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    got = jax.jit(short_conv_rows)(jnp.asarray(x), jnp.asarray(taps), jnp.asarray(positions))
    first = 0
    for length in lengths:
        part = slice(first, first + length)
        np.testing.assert_allclose(got[0, part], by_torch(x[0, part], taps), atol=1e-5)
        first += length


@pytest.mark.parametrize("chunks", [[1] * 12, [3, 0, 2, 4, 3], [4, 4, 4]])
def test_streaming_equals_the_row(chunks: list[int]) -> None:
    rng = np.random.default_rng(1)
    x, taps = rng.standard_normal((1, 12, 6), np.float32), rng.standard_normal((4, 6), np.float32)
    whole = jax.jit(short_conv_rows)(jnp.asarray(x), jnp.asarray(taps), jnp.arange(12, dtype=jnp.int32)[None])
    history, first, outputs = zero_history(1, 4, 6, np.float32), 0, []
    for count in chunks:
        slots = np.full((1, 4, 6), 99.0, np.float32)
        slots[:, :count] = x[:, first : first + count]
        out, history = jax.jit(short_conv_stream)(
            jnp.asarray(slots), jnp.asarray(taps), history, jnp.array([count], jnp.int32)
        )
        outputs.append(out[:, :count])
        first += count
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=1e-6)
    assert jax.tree.leaves(history)[0].shape == (1, 3, 6)


@pytest.mark.parametrize("num_slots", [12, 2], ids=["rows", "fewer slots than taps"])
def test_the_gradient_is_that_of_the_definition(num_slots: int) -> None:
    drawn = np.random.default_rng(3)
    x, taps, cotangent = (
        drawn.standard_normal(shape, np.float32) for shape in ((2, num_slots, 5), (4, 5), (2, num_slots, 5))
    )
    positions = np.stack([np.arange(num_slots), np.maximum(np.arange(num_slots) - 1, 0) % 5]).astype(np.int32)

    def definition(x, taps):
        out = x * (1.0 + taps[-1])[None, None]
        for slot in range(num_slots):
            for lag in range(1, 4):
                seen = jnp.asarray(positions[:, slot] >= lag)[:, None] & (slot >= lag)
                out = out.at[:, slot].add(jnp.where(seen, x[:, max(slot - lag, 0)] * taps[-1 - lag][None], 0.0))
        return jnp.sum(out * cotangent)

    def ours(x, taps):
        return jnp.sum(short_conv_rows(x, taps, jnp.asarray(positions)) * cotangent)

    found, expected = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, taps) for f in (ours, definition))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
