"""The objective: cross entropy of every stream's targets, weighted in the total and logged by itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from tml.batch import Batch
from tml.config import LossConfig
from tml.metrics import Mean
from tml.microturn import Target
from tml.ops.cross_entropy import Scores

STREAMS: dict[str, tuple[Target, ...]] = {
    target.name.lower(): (target,) for target in Target if target is not Target.NONE
}
ACCURACIES: dict[str, tuple[Target, ...]] = {
    "control": (Target.LISTEN, Target.SPEAK),
    "speak": (Target.SPEAK,),
    "text": (Target.TEXT,),
    "heard": (Target.HEARD,),
}
"""Groups of targets whose accuracy is logged. [listen] is nearly always right, so [speak] stands by itself too."""


def total_weight(batch: Batch) -> Float32[Array, ""]:
    """The sum of the loss weights of the global batch, by which the total loss is divided."""
    return jnp.sum(batch.loss_weights_BS)


def objective(
    scores: Scores, batch: Batch, weight: Float32[Array, ""], cfg: LossConfig
) -> tuple[Float32[Array, ""], dict[str, Mean]]:
    """The loss of some rows of a batch: sum of weight * (cross entropy + z-loss) / `weight`.

    Args:
        scores: of the predictions.
        batch: the rows they belong to.
        weight: `total_weight` of the whole batch, of which these rows may be a part: then losses
            and gradients of the parts add up to those of the whole.
        cfg: the weight of the z-loss.

    Returns:
        The loss to differentiate, and the metrics: `loss`, `loss_STREAM` (unweighted), `accuracy_GROUP`.
    """
    nll_BS, log_norm_BS, is_right_BS = scores
    weights_BS = batch.loss_weights_BS
    loss_sum = jnp.sum(weights_BS * (nll_BS + cfg.z_loss_weight * jnp.square(log_norm_BS)))
    metrics = {"loss": Mean(total=loss_sum, count=jnp.sum(weights_BS))}
    for name, targets in STREAMS.items():
        metrics[f"loss_{name}"] = _mean_over(nll_BS, batch, targets)
    for name, targets in ACCURACIES.items():
        metrics[f"accuracy_{name}"] = _mean_over(is_right_BS, batch, targets)
    # A batch without any target has no weight: its loss is 0, not 0/0.
    return loss_sum / jnp.maximum(weight, 1e-6), jax.lax.stop_gradient(metrics)


def _mean_over(values_BS: Float32[Array, "B S"], batch: Batch, targets: tuple[Target, ...]) -> Mean:
    mask_BS = jnp.zeros(values_BS.shape, bool)
    for target in targets:
        mask_BS |= batch.target_kinds_BS == target
    return Mean(total=jnp.sum(jnp.where(mask_BS, values_BS, 0.0)), count=jnp.sum(mask_BS.astype(jnp.float32)))
