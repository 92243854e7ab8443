"""The travelling strategies with a fixed buffer: what fits equals the definition, the rest is dropped and counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tml.config import MatmulBackend, MeshConfig, MoEConfig
from tml.mesh import make_mesh
from tml.model.expert_dispatch import (
    buffer_blocks,
    buffer_rows,
    dense_experts,
    ragged_experts,
    ring_by_blocks,
    ring_by_kernels,
    sorted_experts,
)

GROUP, TOKENS, WIDTH, EXPERTS, CHOICES, BLOCK = 4, 12, 6, 8, 2, 4
MESH = MeshConfig(expert=GROUP)


def config(capacity_factor: float, backend: MatmulBackend = MatmulBackend.BLOCKED) -> MoEConfig:
    return MoEConfig(
        backend=backend,
        num_experts=EXPERTS,
        num_experts_per_token=CHOICES,
        expert_dim=5,
        block_rows=BLOCK,
        capacity_factor=capacity_factor,
    )


def routing(skewed: bool) -> np.ndarray:
    """The experts of every token of the group; skewed, half of the copies go to one device's two experts."""
    drawn = np.random.default_rng(1)
    scores = drawn.random((GROUP * TOKENS, EXPERTS))
    if skewed:
        scores[: GROUP * TOKENS // 2, 2:4] += 1
    return np.argsort(-scores, axis=1)[:, :CHOICES].astype(np.int32)


def fitting(experts: np.ndarray, cfg: MoEConfig) -> np.ndarray:
    """Which copies find room, by a loop: device by device, expert by expert in whole blocks, in the group's order.

    Kernels need no whole blocks; the definition stands for them here.
    """
    is_blocked = cfg.backend is MatmulBackend.BLOCKED
    room = (buffer_blocks if is_blocked else buffer_rows)(TOKENS * CHOICES, cfg, MESH) * (BLOCK if is_blocked else 1)
    unit = BLOCK if is_blocked else 1
    fits = np.zeros(experts.shape, bool)
    for device in range(GROUP):
        first = 0
        for expert in range(device * EXPERTS // GROUP, (device + 1) * EXPERTS // GROUP):
            copies = np.argwhere(experts == expert)
            for rank, copy in enumerate(copies):
                fits[tuple(copy)] = first + rank < room
            first += -(-len(copies) // unit) * unit
    return fits


@pytest.mark.parametrize(
    ("strategy", "backend"),
    [
        (ring_by_blocks, MatmulBackend.BLOCKED),
        (ring_by_kernels, MatmulBackend.DENSE),
        (ragged_experts, MatmulBackend.BLOCKED),
    ],
)
def test_what_fits_is_exact_and_the_rest_is_counted(strategy, backend: MatmulBackend) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    weights = {
        "gate_up": jax.random.normal(keys[0], (EXPERTS, WIDTH, 2, 5)),
        "down": jax.random.normal(keys[1], (EXPERTS, 5, WIDTH)),
    }
    h = jax.random.normal(keys[2], (GROUP * TOKENS, WIDTH))
    gates = jax.random.uniform(keys[3], (GROUP * TOKENS, CHOICES))
    cotangent = jax.random.normal(keys[4], h.shape)

    def program(capacity_factor: float):
        @functools.partial(
            jax.shard_map,
            mesh=make_mesh(MESH, jax.devices()[:GROUP]),
            in_specs=(P("expert"),) * 5,
            out_specs=((P("expert"),) * 3, P("expert"), P("expert")),
            check_vma=False,
        )
        def run(weights, h, gates, experts, cotangent):
            def loss(weights, h, gates):
                out, num_dropped = strategy(weights, h, gates, experts, config(capacity_factor, backend), None, MESH)
                return jnp.sum(out * cotangent), (out, num_dropped[None])

            grads, (out, num_dropped) = jax.grad(loss, (0, 1, 2), has_aux=True)(weights, h, gates)
            return grads, out, num_dropped

        return jax.jit(run)

    @jax.jit
    def definition(weights, h, gates, experts, fits):
        def loss(weights, h, gates):
            out = dense_experts(weights, h, jnp.where(fits, gates, 0.0), experts, config(1.0), None).out_TD
            return jnp.sum(out * cotangent), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(weights, h, gates)

    # Without blocks there is no room to spare for chance.
    tight = 1.0 if backend is MatmulBackend.BLOCKED else 1.25
    for capacity_factor in (tight, float(GROUP)):
        run = program(capacity_factor)
        for skewed in (False, True):
            experts = routing(skewed)
            fits = fitting(experts, config(capacity_factor, backend))
            grads, out, num_dropped = run(weights, h, gates, experts, cotangent)
            expected_grads, expected = definition(weights, h, gates, experts, fits)
            assert int(num_dropped.sum()) == (~fits).sum()
            assert (num_dropped.sum() > 0) == (skewed and capacity_factor == tight)
            np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, expected_grads)


@pytest.mark.parametrize("backend", [MatmulBackend.BLOCKED, MatmulBackend.DENSE])
def test_copies_sorted_by_expert_give_the_definition(backend):
    """BLOCKED multiplies whole blocks of an expert; all others, here DENSE for the kernels, groups of any size."""
    cfg = MoEConfig(num_experts=5, num_experts_per_token=2, expert_dim=6, block_rows=4, backend=backend)
    keys = jax.random.split(jax.random.key(0), 5)
    weights = {"gate_up": jax.random.normal(keys[0], (5, 4, 2, 6)), "down": jax.random.normal(keys[1], (5, 6, 4))}
    h, gates = jax.random.normal(keys[2], (9, 4)), jax.random.uniform(keys[3], (9, 2))
    experts = jnp.argsort(jax.random.uniform(keys[4], (9, 5)), axis=1)[:, :2].astype(jnp.int32)
    ours, expected = (
        jax.jit(jax.grad(lambda w, h, g, f=f: jnp.sum(jnp.square(f(w, h, g, experts, cfg, None).out_TD)), (0, 1, 2)))(
            weights, h, gates
        )
        for f in (sorted_experts, dense_experts)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected)
