"""The objective: cross entropy of every stream's targets, weighted in the total and logged by itself."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from tml.batch import Batch
from tml.config import LossConfig
from tml.metrics import Mean
from tml.microturn import Target
from tml.model.mtp import ahead

STREAMS: dict[str, tuple[Target, ...]] = {
    target.name.lower(): (target,) for target in Target if target is not Target.NONE
}
ACCURACIES: dict[str, tuple[Target, ...]] = {
    "control": (Target.LISTEN, Target.SPEAK),
    "speak": (Target.SPEAK,),
    "text": (Target.TEXT,),
}
"""Groups of targets whose accuracy is logged. [listen] is nearly always right, so [speak] stands by itself too."""


def total_weight(batch: Batch) -> Float32[Array, ""]:
    """The sum of the loss weights of the global batch, by which the total loss is divided."""
    return jnp.sum(batch.loss_weights_BS)


def objective(
    logits_BSV: Float32[Array, "B S V"], batch: Batch, weight: Float32[Array, ""], cfg: LossConfig
) -> tuple[Float32[Array, ""], dict[str, Mean]]:
    """The loss of some rows of a batch: sum of weight * (cross entropy + z-loss) / `weight`.

    Args:
        logits_BSV: predictions.
        batch: the rows they belong to.
        weight: `total_weight` of the whole batch, of which these rows may be a part: then losses
            and gradients of the parts add up to those of the whole.
        cfg: the weight of the z-loss.

    Returns:
        The loss to differentiate, and the metrics: `loss`, `loss_STREAM` (unweighted), `accuracy_GROUP`.
    """
    nll_BS, log_norm_BS, is_right_BS = score(logits_BSV, batch.targets_BS)
    weights_BS = batch.loss_weights_BS
    loss_sum = jnp.sum(weights_BS * (nll_BS + cfg.z_loss_weight * jnp.square(log_norm_BS)))
    metrics = {"loss": Mean(total=loss_sum, count=jnp.sum(weights_BS))}
    for name, targets in STREAMS.items():
        metrics[f"loss_{name}"] = _mean_over(nll_BS, batch, targets)
    for name, targets in ACCURACIES.items():
        metrics[f"accuracy_{name}"] = _mean_over(is_right_BS, batch, targets)
    # A batch without any target has no weight: its loss is 0, not 0/0.
    return loss_sum / jnp.maximum(weight, 1e-6), jax.lax.stop_gradient(metrics)


def objective_ahead(
    logits: Sequence[Float32[Array, "B S V"]], batch: Batch, weight: Float32[Array, ""], cfg: LossConfig
) -> tuple[Float32[Array, ""], dict[str, Mean]]:
    """The loss of multi-token prediction: `mtp_weight` times the mean over its blocks, each weighted as `objective`.

    Args:
        logits: predictions of every block; block k predicts what is due k + 1 positions later.
        batch: the rows they belong to.
        weight: as for `objective`.
        cfg: the weight.

    Returns:
        The loss to differentiate, and the metric `loss_mtp` (without `mtp_weight`).
    """
    loss_sum = count = jnp.float32(0.0)
    for number, logits_BSV in enumerate(logits, 1):
        is_inside_BS = ahead(batch.segment_ids_BS, number) == batch.segment_ids_BS
        weights_BS = jnp.where(is_inside_BS, ahead(batch.loss_weights_BS, number), 0.0)
        loss_sum += jnp.sum(weights_BS * score(logits_BSV, ahead(batch.targets_BS, number))[0])
        count += jnp.sum(weights_BS)
    loss = cfg.mtp_weight / len(logits) * loss_sum / jnp.maximum(weight, 1e-6)
    return loss, jax.lax.stop_gradient({"loss_mtp": Mean(total=loss_sum, count=count)})


def score(
    logits_BSV: Float32[Array, "B S V"], targets_BS: Int32[Array, "B S"]
) -> tuple[Float32[Array, "B S"], Float32[Array, "B S"], Float32[Array, "B S"]]:
    """Negative log likelihood, log normaliser, and whether the target is the likeliest (1 or 0), of every position."""
    highest_BS1 = jax.lax.stop_gradient(jnp.max(logits_BSV, axis=-1, keepdims=True))
    shifted_BSV = logits_BSV - highest_BS1
    log_sum_BS = jnp.log(jnp.sum(jnp.exp(shifted_BSV), axis=-1))
    # A masked sum instead of a gather: it fuses, and it splits over a sharded vocabulary.
    is_target_BSV = jnp.arange(logits_BSV.shape[-1], dtype=jnp.int32)[None, None] == targets_BS[:, :, None]
    picked_BS = jnp.sum(jnp.where(is_target_BSV, shifted_BSV, 0.0), axis=-1)
    is_right_BS = (picked_BS >= 0.0).astype(jnp.float32)
    return log_sum_BS - picked_BS, log_sum_BS + highest_BS1[:, :, 0], is_right_BS


def _mean_over(values_BS: Float32[Array, "B S"], batch: Batch, targets: tuple[Target, ...]) -> Mean:
    mask_BS = jnp.zeros(values_BS.shape, bool)
    for target in targets:
        mask_BS |= batch.target_kinds_BS == target
    return Mean(total=jnp.sum(jnp.where(mask_BS, values_BS, 0.0)), count=jnp.sum(mask_BS.astype(jnp.float32)))
