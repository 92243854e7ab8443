"""Optimizers and schedules against independent numpy implementations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tml.config import OptimConfig, Optimizer, Schedule
from tml.optim import MATCHED_RMS, as_matrices, learning_rate, make_optimizer, orthogonalise
from tml.params import Init, Update, param

SIZES = {"L": 3, "E": 4, "D": 24, "F": 16, "Z": 2, "N": 2, "H": 8, "V": 20}
SPECS = {
    "gate_up": param("L E D Z F", SIZES, fan_in="D"),
    "down": param("L E F D", SIZES, fan_in="F"),
    "out": param("L N H D", SIZES, fan_in="N H"),
    "table": param("V D", SIZES, fan_in="D", update=Update.EMBEDDING),
    "norm": param("L D", SIZES, init=Init.ONES, update=Update.VECTOR),
    "scalar": param("", SIZES, init=Init.ONES, update=Update.VECTOR),
    "bias": param("L E", SIZES, init=Init.ZEROS, update=Update.BALANCE),
}
NUM_STEPS = 12


def config(**changes) -> OptimConfig:
    return OptimConfig(**{"warmup_steps": 3, "peak_lr": 0.05, "weight_decay": 0.1, "max_grad_norm": 0.7, **changes})


def gradients(step: int) -> dict[str, jax.Array]:
    drawn = np.random.default_rng(step)
    grads = {name: jnp.asarray(drawn.normal(size=spec.shape), jnp.float32) for name, spec in SPECS.items()}
    return {**grads, "bias": jnp.zeros_like(grads["bias"])}


def initial_params() -> dict[str, jax.Array]:
    drawn = np.random.default_rng(100)
    return {name: jnp.asarray(drawn.normal(size=spec.shape), jnp.float32) for name, spec in SPECS.items()}


def run(optim: OptimConfig, steps: int = 5) -> tuple[dict, dict]:
    params = initial_params()
    optimizer = make_optimizer(optim, NUM_STEPS, SPECS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    start = params
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, start), jax.tree.map(np.asarray, params)


def numpy_schedule(optim: OptimConfig, num_steps: int, step: int) -> float:
    warmup, floor = optim.warmup_steps, optim.peak_lr * optim.final_lr_ratio
    if step < warmup:
        return optim.peak_lr * (step + 1) / warmup
    if optim.schedule is Schedule.WARMUP_COSINE:
        angle = math.pi * (step - warmup) / (num_steps - warmup)
        return floor + (optim.peak_lr - floor) * (1 + math.cos(angle)) / 2
    steps_left, decay_steps = num_steps - step, round(optim.decay_fraction * num_steps)
    return floor + (optim.peak_lr - floor) * min(1.0, steps_left / decay_steps) if decay_steps else optim.peak_lr


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize(("warmup", "decay_fraction", "final"), [(0, 0.5, 0.0), (7, 0.3, 0.1), (1, 0.0, 0.0)])
def test_schedule_at_every_step(schedule: Schedule, warmup: int, decay_fraction: float, final: float):
    optim = config(schedule=schedule, warmup_steps=warmup, decay_fraction=decay_fraction, final_lr_ratio=final)
    rate = jax.jit(jax.vmap(learning_rate(optim, 40)))(jnp.arange(41, dtype=jnp.int32))
    expected = [numpy_schedule(optim, 40, step) for step in range(40)]
    np.testing.assert_allclose(rate[:40], expected, rtol=1e-5, atol=1e-9)
    assert all(rate[:40] > 0)
    if decay_fraction or schedule is Schedule.WARMUP_COSINE:
        np.testing.assert_allclose(rate[40], optim.peak_lr * final, atol=1e-8)


def test_wsd_never_decays_inside_the_warm_up():
    rate = learning_rate(config(schedule=Schedule.WSD, warmup_steps=8, decay_fraction=1.0), 10)
    rates = [float(rate(jnp.int32(step))) for step in range(11)]
    assert rates.index(max(rates)) == 7
    np.testing.assert_allclose(rates[7:], [0.05, 0.05, 0.025, 0.0], atol=1e-8)


def numpy_step(optim: OptimConfig, params: dict, moments: dict, grads: dict, step: int) -> None:
    """One update in float64, in place, written from the papers."""
    norm = math.sqrt(sum(float(np.sum(g**2)) for g in grads.values()))
    clip = min(1.0, optim.max_grad_norm / norm)
    rate = numpy_schedule(optim, NUM_STEPS, step)
    for name, spec in SPECS.items():
        gradient = grads[name] * clip
        if spec.update is Update.BALANCE:
            continue
        decay = 0.0 if spec.update is Update.VECTOR else optim.weight_decay
        if spec.update is Update.MATRIX and optim.optimizer is Optimizer.MUON:
            moment = moments.setdefault(name, np.zeros_like(gradient))
            moment[...] = optim.muon_momentum * moment + (1 - optim.muon_momentum) * gradient
            direction = numpy_muon(name, optim.muon_momentum * moment + (1 - optim.muon_momentum) * gradient)
            ratio = 1.0
        else:
            first, second = moments.setdefault(name, (np.zeros_like(gradient), np.zeros_like(gradient)))
            first[...] = optim.b1 * first + (1 - optim.b1) * gradient
            second[...] = optim.b2 * second + (1 - optim.b2) * gradient**2
            corrected = second / (1 - optim.b2 ** (step + 1))
            direction = first / (1 - optim.b1 ** (step + 1)) / (np.sqrt(corrected) + optim.eps)
            ratio = optim.adam_lr_ratio if optim.optimizer is Optimizer.MUON else 1.0
        params[name] -= rate * ratio * (direction + decay * params[name])


def numpy_muon(name: str, update: np.ndarray) -> np.ndarray:
    """Newton–Schulz, one matrix after the other."""
    result = np.zeros_like(update)
    for layer in range(SIZES["L"]):
        if name == "out":
            flat = newton_schulz(update[layer].reshape(-1, SIZES["D"]))
            result[layer] = flat.reshape(update[layer].shape)
            continue
        for expert in range(SIZES["E"]):
            if name == "down":
                result[layer, expert] = newton_schulz(update[layer, expert])
                continue
            for half in range(2):
                result[layer, expert, :, half] = newton_schulz(update[layer, expert, :, half])
    return result


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    x = matrix / np.linalg.norm(matrix)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x * 0.2 * math.sqrt(max(x.shape))


@pytest.mark.parametrize(
    "optim",
    [
        config(optimizer=Optimizer.ADAMW),
        config(optimizer=Optimizer.MUON, adam_lr_ratio=0.3, schedule=Schedule.WARMUP_COSINE),
    ],
    ids=["adamw", "muon"],
)
def test_five_steps_equal_numpy(optim: OptimConfig):
    start, found = run(optim)
    expected, moments = {name: value.astype(np.float64) for name, value in start.items()}, {}
    for step in range(5):
        grads = jax.tree.map(lambda g: np.asarray(g, np.float64), gradients(step))
        numpy_step(optim, expected, moments, grads, step)
    for name in SPECS:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-5, err_msg=name)
        assert np.any(found[name] != start[name]) == (name != "bias")


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_newton_schulz_makes_matrices_orthogonal(shape: tuple[int, int]):
    matrices = jax.random.normal(jax.random.key(1), (2, *shape))
    u, _, vt = np.linalg.svd(np.asarray(matrices), full_matrices=False)
    result = np.asarray(jax.jit(orthogonalise)(matrices))
    singular = np.linalg.svd(result, compute_uv=False)
    # Five iterations bring singular values near 1, not to it; the smallest of a square matrix start near 0.
    assert singular.max() < 1.3
    assert np.median(singular) > 0.65
    # What is left is close to the polar factor U V^T.
    cosine = np.sum(result * (u @ vt)) / np.linalg.norm(result) / np.linalg.norm(u @ vt)
    assert cosine > 0.95


def test_a_stack_is_updated_like_each_slice_alone():
    spec = SPECS["gate_up"]
    update = gradients(3)["gate_up"]
    matrices, restore = as_matrices(spec, update)
    orthogonal = jax.jit(orthogonalise)
    whole = np.asarray(restore(orthogonal(matrices)))
    for layer in range(SIZES["L"]):
        for expert in range(SIZES["E"]):
            for half in range(2):
                alone = orthogonal(update[layer, expert, :, half][None])[0]
                np.testing.assert_allclose(whole[layer, expert, :, half], alone, atol=2e-6)
    np.testing.assert_array_equal(restore(matrices), update)


def test_muon_moves_every_matrix_by_the_same_root_mean_square():
    start, found = run(config(weight_decay=0.0, warmup_steps=0, schedule=Schedule.WARMUP_COSINE), steps=1)
    for name in ("gate_up", "down", "out"):
        rms = np.sqrt(np.mean((found[name] - start[name]) ** 2)) / 0.05
        # A matrix with orthonormal rows (r x c, c >= r) has entries of rms 1/sqrt(c).
        assert 0.6 * MATCHED_RMS < rms < 1.2 * MATCHED_RMS, name


def test_clipping_bounds_the_gradient():
    optim = config(optimizer=Optimizer.ADAMW, max_grad_norm=1e-3)
    optimizer = make_optimizer(optim, NUM_STEPS, SPECS)
    params = initial_params()
    _, state = jax.jit(optimizer.update)(gradients(0), optimizer.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    first_moment_norm = math.sqrt(max(float(jnp.sum(leaf**2)) for leaf in moments))
    assert 0 < first_moment_norm <= (1 - optim.b1) * 1e-3 * 1.001
