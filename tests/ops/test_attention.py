"""Every back-end of attention, and attention to a cache, against the definition, with packed segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tml.ops import attention
from tml.ops.attention import AttendFunction
from tml.ops.attention_gpu import attend_gpu
from tml.ops.attention_tpu import attend_tpu


def inputs(num_slots: int, extent: int, seed: int = 0) -> tuple:
    keys = jax.random.split(jax.random.key(seed), 5)
    shape_q, shape_k = (2, num_slots, 4, 8), (2, num_slots, 2, 8)
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, (shape_q, shape_k, shape_k), strict=False))
    r = jax.random.normal(keys[3], (2, num_slots, 4, 3))
    profiles = jax.random.normal(keys[4], (3, extent))
    cuts = np.array([[num_slots // 3, num_slots // 2], [5, 6]])
    segments = 1 + (np.arange(num_slots)[None, :, None] >= cuts[:, None, :]).sum(-1)
    return q, k, v, r, profiles, jnp.asarray(segments, jnp.int32)


def value_and_grads(function, cotangent, *arrays):
    def loss(*arrays):
        out = function(*arrays)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True))(*arrays)


@functools.cache
def attended(
    attend: AttendFunction, num_slots: int, extent: int, window: int | None, part: tuple[int, int] | None
) -> tuple:
    """Value and gradients; those of the definition serve all back-ends."""
    *arrays, segments = inputs(num_slots, extent)
    first_query = None
    if part is not None:
        first_query = jnp.int32(part[0])
        arrays[0], arrays[3] = arrays[0][:, slice(*part)], arrays[3][:, slice(*part)]
    cotangent = jax.random.normal(jax.random.key(9), arrays[0].shape)
    return value_and_grads(lambda *a: attend(*a, segments, window, first_query), cotangent, *arrays)


def assert_equals_the_definition(
    attend: AttendFunction, num_slots: int, extent: int, window: int | None, part: tuple[int, int] | None = None
) -> None:
    case = num_slots, extent, window, part
    ours, expected = attended(attend, *case), attended(attention.attention_reference, *case)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), ours, expected)


class AttentionBackendTests:
    """What every back-end must do; `attend` of a kernel runs it in interpret mode, in blocks of 8 queries."""

    attend: AttendFunction

    @pytest.mark.parametrize(("num_slots", "window"), [(40, 12), pytest.param(21, 30, marks=pytest.mark.slow)])
    def test_sliding(self, num_slots: int, window: int) -> None:
        assert_equals_the_definition(self.attend, num_slots, window, window)

    @pytest.mark.parametrize(("num_slots", "extent"), [(40, 12), pytest.param(21, 30, marks=pytest.mark.slow)])
    def test_global(self, num_slots: int, extent: int) -> None:
        assert_equals_the_definition(self.attend, num_slots, extent, None)

    @pytest.mark.parametrize("window", [pytest.param(12, marks=pytest.mark.slow), None])
    def test_part_of_the_queries(self, window: int | None) -> None:
        assert_equals_the_definition(self.attend, 40, 12, window, (16, 32))

    @pytest.mark.slow
    def test_bfloat16_is_as_near_as_its_rounding(self) -> None:
        *arrays, segments = inputs(32, 12)
        exact = attention.attention_reference(*arrays, segments, 12)
        rounded = jax.jit(self.attend, static_argnums=6)(*(x.astype(jnp.bfloat16) for x in arrays), segments, 12)
        assert rounded.dtype == jnp.bfloat16
        error = jnp.abs(rounded.astype(jnp.float32) - exact)
        # Half a unit of the last of 8 bits, of logits up to 20 and of values up to 4, on average over both signs.
        assert float(jnp.mean(error)) < 0.02


class TestBlocked(AttentionBackendTests):
    attend = staticmethod(attention.attend_blocked)


class TestTPU(AttentionBackendTests):
    attend = staticmethod(functools.partial(attend_tpu, block=8, interpret=True))


class TestGPU(AttentionBackendTests):
    attend = staticmethod(functools.partial(attend_gpu, block=8, interpret=True))


@pytest.mark.parametrize(("num_slots", "window", "block"), [(50, 16, 8), (33, 12, 8), (10, 16, 4), (64, 5, 32)])
def test_sliding_equals_the_definition_forward_and_gradient(num_slots: int, window: int, block: int) -> None:
    q, k, v, r, profiles, segments = inputs(num_slots, window)
    cotangent = jax.random.normal(jax.random.key(9), q.shape)
    ours = value_and_grads(lambda *a: attention.attend_sliding(*a, segments, block), cotangent, q, k, v, r, profiles)
    expected = value_and_grads(
        lambda *a: attention.attention_reference(*a, segments, window), cotangent, q, k, v, r, profiles
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), ours, expected)


@pytest.mark.parametrize(("num_slots", "extent"), [(40, 16), (16, 40), (7, 1)])
def test_global_equals_the_definition_forward_and_gradient(
    num_slots: int, extent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GLOBAL_BLOCK_SLOTS", 12)
    q, k, v, r, profiles, segments = inputs(num_slots, extent)
    cotangent = jax.random.normal(jax.random.key(9), q.shape)
    ours = value_and_grads(lambda *a: attention.attend_global(*a, segments), cotangent, q, k, v, r, profiles)
    expected = value_and_grads(
        lambda *a: attention.attention_reference(*a, segments, None), cotangent, q, k, v, r, profiles
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), ours, expected)


@pytest.mark.parametrize(
    ("window", "extent", "num_entries"), [(None, 20, 300), (None, 150, 160), (None, 5, 31), (6, 6, 9), (6, 6, 14)]
)
def test_cache_equals_the_definition(window: int | None, extent: int, num_entries: int) -> None:
    num_positions, num_queries = 30, 4
    q, k, v, r, profiles, _ = inputs(num_positions, extent)
    one_segment = jnp.ones((2, num_positions), jnp.int32)
    expected = attention.attention_reference(q, k, v, r, profiles, one_segment, window)
    # Sessions of different lengths; in a ring the places repeat, and what was never written is junk.
    lengths = np.array([num_positions, 17])
    cache_k, cache_v = (np.full((2, num_entries, *x.shape[2:]), 7.0, np.float32) for x in (k, v))
    held = np.full((2, num_entries), -1, np.int32)
    for row, length in enumerate(lengths):
        for position in range(length):
            place = position % num_entries
            cache_k[row, place], cache_v[row, place] = k[row, position], v[row, position]
            held[row, place] = position
    asked = (lengths[:, None] - num_queries + np.arange(num_queries)).astype(np.int32)
    q, r, expected = (jnp.take_along_axis(x, asked[:, :, None, None], axis=1) for x in (q, r, expected))
    attend = jax.jit(attention.attend_cache, static_argnums=(7, 8))
    for heads_at_once in (False, True):
        got = attend(q, cache_k, cache_v, r, profiles, asked, held, window, heads_at_once)
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_the_skewed_bias_places_every_distance() -> None:
    r, profiles = jax.random.normal(jax.random.key(0), (2, 5, 3, 2)), jax.random.normal(jax.random.key(1), (2, 4))
    skewed = np.asarray(attention.skewed_bias(r, profiles))
    assert skewed.shape == (2, 3, 5, 9)
    for query in range(5):
        for key in range(9):
            distance = 4 + query - key
            expected = r[:, query] @ profiles[:, distance] if 0 <= distance < 4 else np.zeros((2, 3))
            np.testing.assert_allclose(skewed[:, :, query, key], expected, atol=1e-6)
