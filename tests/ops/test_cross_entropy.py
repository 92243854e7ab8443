"""TokenLosses by blocks and shards of the vocabulary against whole logits, with gradients."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tml.config import MeshConfig
from tml.mesh import make_mesh
from tml.ops.collectives import sum_over
from tml.ops.cross_entropy import TokenLosses, token_losses, token_losses_in_blocks, token_losses_reference

NUM_LOGITS, VOCABULARY = 13, 16
KEYS = jax.random.split(jax.random.key(0), 5)
H_BSD = jax.random.normal(KEYS[0], (2, 9, 6))
UNEMBED_DV = jax.random.normal(KEYS[1], (6, VOCABULARY)) * 2
COTANGENTS = jax.random.normal(KEYS[3], (2, 2, 9))
# Half of the targets are the likeliest token.
LIKELIEST_BS = jnp.argmax(H_BSD @ UNEMBED_DV[:, :NUM_LOGITS], axis=-1).astype(jnp.int32)
TARGETS_BS = jnp.where(jax.random.bernoulli(KEYS[4], 0.5, (2, 9)), LIKELIEST_BS, jnp.int32(NUM_LOGITS - 1))


def weighted(losses: TokenLosses) -> jax.Array:
    return jnp.sum(losses.nll_BS * COTANGENTS[0] + losses.log_norm_BS * COTANGENTS[1])


def whole(h_BSD: jax.Array, unembed_DV: jax.Array) -> tuple[jax.Array, TokenLosses]:
    losses = token_losses_reference(h_BSD @ unembed_DV[:, :NUM_LOGITS], TARGETS_BS)
    return weighted(losses), losses


def assert_alike(found, gradients) -> None:
    (_, expected), expected_gradients = jax.value_and_grad(whole, (0, 1), has_aux=True)(H_BSD, UNEMBED_DV)
    assert 0 < float(jnp.mean(expected.is_right_BS)) < 1
    for value, wanted in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)


def as_it_is(part_DV: jax.Array) -> jax.Array:
    return part_DV


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_products_of_whole_logits_equal_the_definition(
    scale: float, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **ways: ways[platform](*args))

    # Logits far beyond what exp can take must not matter; the definition is scaled alike.
    def products(h_BSD: jax.Array, unembed_DV: jax.Array) -> tuple[jax.Array, TokenLosses]:
        losses = token_losses(h_BSD * scale, unembed_DV[:, :NUM_LOGITS], TARGETS_BS)
        return weighted(losses), losses

    def defined(h_BSD: jax.Array, unembed_DV: jax.Array) -> tuple[jax.Array, TokenLosses]:
        losses = token_losses_reference(h_BSD * scale @ unembed_DV[:, :NUM_LOGITS], TARGETS_BS)
        return weighted(losses), losses

    (_, found), gradients = jax.jit(jax.value_and_grad(products, (0, 1), has_aux=True))(H_BSD, UNEMBED_DV)
    (_, expected), expected_gradients = jax.value_and_grad(defined, (0, 1), has_aux=True)(H_BSD, UNEMBED_DV)
    for value, wanted in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_way_back_makes_no_array_like_the_logits_on_cpu_and_scatters_nowhere_else(platform: str) -> None:
    losses, way_back = jax.vjp(lambda h, w: token_losses(h, w, TARGETS_BS), H_BSD, UNEMBED_DV)
    ones = TokenLosses(*(jnp.ones_like(value) for value in losses))
    program = jax.export.export(jax.jit(way_back), platforms=[platform])(ones).mlir_module()
    logits_like = re.findall(r"= stablehlo\.(\w+) .*tensor<18x16xf32>(?: loc.*)?$", program, re.MULTILINE)
    assert (set(logits_like) <= {"constant"}) == (platform == "cpu"), logits_like
    assert ("stablehlo.scatter" in program) == (platform == "cpu")


@pytest.mark.parametrize("block", [5, 8, 100])
def test_blocks_equal_the_whole(block: int) -> None:
    def in_blocks(h_BSD: jax.Array, unembed_DV: jax.Array) -> tuple[jax.Array, TokenLosses]:
        losses = token_losses_in_blocks(h_BSD, unembed_DV, TARGETS_BS, NUM_LOGITS, block, as_it_is, MeshConfig())
        return weighted(losses), losses

    (_, found), gradients = jax.jit(jax.value_and_grad(in_blocks, (0, 1), has_aux=True))(H_BSD, UNEMBED_DV)
    assert_alike(found, gradients)


@pytest.mark.parametrize("block", [3, 4])
def test_shards_of_the_vocabulary_equal_the_whole(block: int) -> None:
    sizes = MeshConfig(tensor=4)

    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(sizes, jax.devices()[:4]),
        in_specs=(P(), P(None, "tensor")),
        out_specs=(P(), (P(), P(None, "tensor"))),
        check_vma=False,
    )
    def sharded(h_BSD: jax.Array, unembed_DV: jax.Array):
        def loss(h_BSD: jax.Array, unembed_DV: jax.Array) -> tuple[jax.Array, TokenLosses]:
            losses = token_losses_in_blocks(h_BSD, unembed_DV, TARGETS_BS, NUM_LOGITS, block, as_it_is, sizes)
            return weighted(losses) / sizes.tensor, losses

        (_, losses), (grad_h, grad_w) = jax.value_and_grad(loss, (0, 1), has_aux=True)(h_BSD, unembed_DV)
        return losses, (sum_over(grad_h, ("tensor",), sizes), grad_w)

    assert_alike(*jax.jit(sharded)(H_BSD, UNEMBED_DV))


def test_no_array_holds_all_logits() -> None:
    def in_blocks(h_BSD: jax.Array, unembed_DV: jax.Array) -> jax.Array:
        return weighted(token_losses_in_blocks(h_BSD, unembed_DV, TARGETS_BS, NUM_LOGITS, 4, as_it_is, MeshConfig()))

    text = str(jax.make_jaxpr(jax.grad(in_blocks, (0, 1)))(H_BSD, UNEMBED_DV))
    assert "f32[18,4]" in text
    assert f"f32[18,{VOCABULARY}]" not in text
    assert f"[2,9,{VOCABULARY}]" not in text
