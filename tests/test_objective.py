"""The objective against a float64 reference, and its sums over parts of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tml.batch import Batch, empty_rows
from tml.config import LossConfig, MeshConfig, ModelConfig
from tml.microturn import Target
from tml.objective import ACCURACIES, STREAMS, objective, objective_ahead, targets_ahead, total_weight
from tml.ops.cross_entropy import token_losses_reference

NUM_ROWS, NUM_SLOTS, NUM_TOKENS = 4, 24, 17


def made_up() -> tuple[np.ndarray, Batch]:
    drawn = np.random.default_rng(0)
    batch = empty_rows(NUM_ROWS, NUM_SLOTS, 0, ModelConfig())
    kinds = drawn.integers(0, len(Target), (NUM_ROWS, NUM_SLOTS)).astype(np.uint8)
    kinds[kinds == Target.ACTION] = Target.NONE
    weights = np.where(kinds == Target.NONE, 0.0, drawn.uniform(0.5, 9.0, kinds.shape))
    targets = drawn.integers(0, NUM_TOKENS, kinds.shape)
    logits = drawn.normal(size=(*kinds.shape, NUM_TOKENS)) * 6 + 30
    # Make a good part of the predictions right, so that accuracies differ from chance.
    half = NUM_SLOTS // 2
    np.put_along_axis(logits[:, :half], targets[:, :half, None], 60.0, axis=2)
    batch = batch.replace(
        targets_BS=targets.astype(np.int32),
        target_kinds_BS=kinds,
        loss_weights_BS=weights.astype(np.float32),
    )
    return logits.astype(np.float32), jax.tree.map(jnp.asarray, batch)


@functools.partial(jax.jit, static_argnums=3)
def loss_of(logits: jax.Array, batch: Batch, weight: jax.Array, cfg: LossConfig) -> tuple[jax.Array, dict]:
    return objective(token_losses_reference(logits, batch.targets_BS), batch, weight, cfg)


def reference(logits: np.ndarray, batch: Batch, z_loss_weight: float) -> dict[str, float]:
    logits, batch = logits.astype(np.float64), jax.tree.map(np.asarray, batch)
    log_norm = np.log(np.sum(np.exp(logits), axis=-1))
    nll = log_norm - np.take_along_axis(logits, batch.targets_BS[:, :, None], axis=2)[:, :, 0]
    right = np.argmax(logits, axis=-1) == batch.targets_BS
    weights = batch.loss_weights_BS.astype(np.float64)
    values = {"loss": np.sum(weights * (nll + z_loss_weight * log_norm**2)) / np.sum(weights)}
    for prefix, field, groups in (("loss", nll, STREAMS), ("accuracy", right, ACCURACIES)):
        for name, targets in groups.items():
            mask = np.isin(batch.target_kinds_BS, targets)
            if mask.any():
                values[f"{prefix}_{name}"] = np.mean(field[mask])
    return values


def divided(metrics: dict) -> dict[str, float]:
    return {name: float(mean.total) / float(mean.count) for name, mean in metrics.items() if mean.count > 0}


@pytest.mark.parametrize("z_loss_weight", [0.0, 1e-3])
def test_equals_the_float64_reference(z_loss_weight: float):
    logits, batch = made_up()
    cfg = LossConfig(z_loss_weight=z_loss_weight)
    loss, metrics = loss_of(jnp.asarray(logits), batch, total_weight(batch), cfg)
    expected = reference(logits, batch, z_loss_weight)
    found = divided(metrics)
    assert found.keys() == expected.keys()
    assert "loss_action" not in found, "a stream without targets has no mean"
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-6, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(loss, expected["loss"], rtol=2e-6)


def test_gradient_is_the_weighted_error_of_the_softmax():
    logits, batch = made_up()
    weight = total_weight(batch)
    gradient = jax.grad(lambda logits: loss_of(logits, batch, weight, LossConfig())[0])(jnp.asarray(logits))
    wide, batch = logits.astype(np.float64), jax.tree.map(np.asarray, batch)
    probabilities = np.exp(wide) / np.sum(np.exp(wide), axis=-1, keepdims=True)
    np.put_along_axis(
        probabilities,
        batch.targets_BS[:, :, None],
        np.take_along_axis(probabilities, batch.targets_BS[:, :, None], axis=2) - 1,
        axis=2,
    )
    expected = probabilities * batch.loss_weights_BS[:, :, None] / np.sum(batch.loss_weights_BS)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_parts_add_up_to_the_whole():
    logits, batch = made_up()
    weight, cfg = total_weight(batch), LossConfig(z_loss_weight=1e-3)
    whole, metrics = loss_of(jnp.asarray(logits), batch, weight, cfg)
    halves = [
        loss_of(jnp.asarray(logits[rows]), jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch), weight, cfg)
        for rows in (slice(0, 1), slice(1, NUM_ROWS))
    ]
    np.testing.assert_allclose(halves[0][0] + halves[1][0], whole, rtol=1e-6)
    for name, mean in metrics.items():
        summed = halves[0][1][name] + halves[1][1][name]
        np.testing.assert_allclose([summed.total, summed.count], [mean.total, mean.count], rtol=1e-6, err_msg=name)


def test_a_batch_without_targets_has_loss_and_gradient_zero():
    logits, batch = made_up()
    batch = batch.replace(loss_weights_BS=jnp.zeros_like(batch.loss_weights_BS))

    def loss_alone(logits: jax.Array) -> jax.Array:
        return loss_of(logits, batch, total_weight(batch), LossConfig())[0]

    loss, gradient = jax.value_and_grad(loss_alone)(jnp.asarray(logits))
    assert float(loss) == 0.0
    assert not np.any(gradient)


def segmented() -> Batch:
    """Rows of several segments, one of them a single position, and padding after all but the last row."""
    _, batch = made_up()
    segments = np.zeros((NUM_ROWS, NUM_SLOTS), np.int32)
    for row, lengths in enumerate([(9, 1, 7), (20,), (2, 3, 11, 4), (NUM_SLOTS,)]):
        segments[row, : sum(lengths)] = np.repeat(np.arange(len(lengths)) + 1, lengths)
    return batch.replace(
        segment_ids_BS=jnp.asarray(segments), loss_weights_BS=jnp.where(segments > 0, batch.loss_weights_BS, 0.0)
    )


def ahead_by_hand(batch: Batch, distance: int) -> list[tuple[int, int, int, float]]:
    """Row, position, target and weight of everything that lies so far ahead in the same segment."""
    batch = jax.tree.map(np.asarray, batch)
    return [
        (row, slot, batch.targets_BS[row, slot + distance], batch.loss_weights_BS[row, slot + distance])
        for row in range(NUM_ROWS)
        for slot in range(NUM_SLOTS - distance)
        if batch.segment_ids_BS[row, slot] == batch.segment_ids_BS[row, slot + distance]
        and batch.loss_weights_BS[row, slot + distance] > 0
    ]


def test_targets_ahead_never_cross_a_border():
    batch, num_blocks = segmented(), 3
    ahead = jax.tree.map(np.asarray, targets_ahead(batch, num_blocks, MeshConfig()))
    for block in range(num_blocks):
        rows = slice(block * NUM_ROWS, (block + 1) * NUM_ROWS)
        targets, weights = ahead.targets_BS[rows], ahead.weights_BS[rows]
        found = [(row, slot, targets[row, slot], weights[row, slot]) for row, slot in np.argwhere(weights)]
        assert found == ahead_by_hand(batch, block + 1)
        assert 0 < len(found) < np.count_nonzero(batch.loss_weights_BS)


def test_the_loss_ahead_equals_the_float64_reference():
    batch, num_blocks = segmented(), 3
    cfg = LossConfig(z_loss_weight=1e-3, mtp_weight=0.3)
    logits = np.random.default_rng(3).normal(size=(num_blocks * NUM_ROWS, NUM_SLOTS, NUM_TOKENS)) * 3
    ahead = targets_ahead(batch, num_blocks, MeshConfig())
    losses = token_losses_reference(jnp.asarray(logits.astype(np.float32)), ahead.targets_BS)
    loss, metrics = objective_ahead(losses, ahead, num_blocks, total_weight(batch), cfg)
    total, plain = 0.0, []
    for block in range(num_blocks):
        for row, slot, target, weight in ahead_by_hand(batch, block + 1):
            z = logits[block * NUM_ROWS + row, slot]
            log_norm = np.log(np.sum(np.exp(z)))
            plain.append(log_norm - z[target])
            total += float(weight) * (plain[-1] + 1e-3 * log_norm**2)
    np.testing.assert_allclose(loss, 0.3 * total / 3 / np.sum(batch.loss_weights_BS), rtol=2e-6)
    assert metrics.keys() == {"loss_mtp"}
    np.testing.assert_allclose(divided(metrics)["loss_mtp"], np.mean(plain), rtol=2e-6)
