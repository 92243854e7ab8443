"""The objective: cross entropy of every stream's targets, weighted in the total and logged by itself.

Multi-token prediction is a term beside it, over targets further ahead; own audio is another, of mels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from tml.batch import Batch
from tml.config import LossConfig, MeshConfig
from tml.metrics import Mean
from tml.microturn import Target
from tml.ops.collectives import with_next
from tml.ops.cross_entropy import TokenLosses

STREAMS: dict[str, tuple[Target, ...]] = {
    target.name.lower(): (target,) for target in Target if target not in (Target.NONE, Target.AUDIO)
}
"""Streams of tokens."""
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


def num_own(batch: Batch) -> Float32[Array, ""] | None:
    """The own audio positions of some whole rows; None without a voice."""
    return None if batch.own is None else jnp.sum((batch.own.places_BP > 0).astype(jnp.float32))


def objective_of_audio(
    error: Mean, count: Float32[Array, ""], cfg: LossConfig
) -> tuple[Float32[Array, ""], dict[str, Mean]]:
    """The loss of own audio: `audio_weight` times the mean error of the batch.

    Args:
        error: of some rows' own audio positions (`tml.model.flow_head.loss`).
        count: own audio positions of the whole batch.
        cfg: the weight of the term.

    Returns:
        The term to differentiate, and its metric `loss_audio`, unweighted. It is no part of `loss`.
    """
    loss = cfg.audio_weight * error.total / jnp.maximum(count, 1.0)
    return loss, jax.lax.stop_gradient({"loss_audio": error})


def objective(
    losses: TokenLosses, batch: Batch, weight: Float32[Array, ""], cfg: LossConfig
) -> tuple[Float32[Array, ""], dict[str, Mean]]:
    """The loss of some rows of a batch: sum of weight * (cross entropy + z-loss) / `weight`.

    Args:
        losses: of the predictions.
        batch: the rows they belong to.
        weight: `total_weight` of the whole batch, of which these rows may be a part: then losses
            and gradients of the parts add up to those of the whole.
        cfg: the weight of the z-loss.

    Returns:
        The loss to differentiate, and the metrics: `loss`, `loss_STREAM` (unweighted), `accuracy_GROUP`.
        Multi-token prediction is no part of `loss`, so that runs with and without it can be compared.
    """
    nll_BS, log_norm_BS, is_right_BS = losses
    weights_BS = batch.loss_weights_BS
    loss_sum = jnp.sum(weights_BS * (nll_BS + cfg.z_loss_weight * jnp.square(log_norm_BS)))
    metrics = {"loss": Mean(total=loss_sum, count=jnp.sum(weights_BS))}
    for name, targets in STREAMS.items():
        metrics[f"loss_{name}"] = _mean_over(nll_BS, batch, targets)
    for name, targets in ACCURACIES.items():
        metrics[f"accuracy_{name}"] = _mean_over(is_right_BS, batch, targets)
    # A batch without any target has no weight: its loss is 0, not 0/0.
    return loss_sum / jnp.maximum(weight, 1e-6), jax.lax.stop_gradient(metrics)


class Ahead(NamedTuple):
    """What the blocks of multi-token prediction answer for: the rows of block 0, then those of block 1, and so on.

    Attributes:
        targets_BS: token to predict.
        weights_BS: weight of the target; 0 where nothing is predicted.
    """

    targets_BS: Int32[Array, "B S"]
    weights_BS: Float32[Array, "B S"]


def targets_ahead(batch: Batch, num_blocks: int, mesh: MeshConfig) -> Ahead:
    """The targets that lie 1 to `num_blocks` places ahead, with their weights.

    A target in another segment weighs nothing, and past the end of a row there is none.

    Args:
        batch: the rows, or this device's part of them.
        num_blocks: blocks, at least 1.
        mesh: sizes of the axes; slots may be split over `context`.
    """
    num_slots = batch.targets_BS.shape[1]
    fields = (batch.targets_BS, batch.loss_weights_BS, batch.segment_ids_BS)
    targets_BT, weights_BT, segments_BT = (with_next(field, num_blocks, 0, mesh) for field in fields)
    places = [slice(distance, distance + num_slots) for distance in range(1, num_blocks + 1)]
    weights = [jnp.where(segments_BT[:, place] == batch.segment_ids_BS, weights_BT[:, place], 0.0) for place in places]
    return Ahead(jnp.concatenate([targets_BT[:, place] for place in places]), jnp.concatenate(weights))


def objective_ahead(
    losses: TokenLosses, ahead: Ahead, num_blocks: int, weight: Float32[Array, ""], cfg: LossConfig
) -> tuple[Float32[Array, ""], dict[str, Mean]]:
    """The loss of multi-token prediction: `mtp_weight` times the mean over blocks of what `objective` is for one.

    Args:
        losses: of the predictions of all blocks.
        ahead: what they answer for.
        num_blocks: blocks.
        weight: as of `objective`, of the targets without shift (DeepSeek-V3, equation 24).
        cfg: the weights of the term and of its z-loss.

    Returns:
        The term to differentiate, and its metric `loss_mtp`: cross entropy, unweighted, over all blocks.
    """
    per_target_BS = losses.nll_BS + cfg.z_loss_weight * jnp.square(losses.log_norm_BS)
    loss_sum = jnp.sum(ahead.weights_BS * per_target_BS)
    is_target_BS = ahead.weights_BS > 0
    metric = Mean(
        total=jnp.sum(jnp.where(is_target_BS, losses.nll_BS, 0.0)), count=jnp.sum(is_target_BS.astype(jnp.float32))
    )
    loss = cfg.mtp_weight * loss_sum / (num_blocks * jnp.maximum(weight, 1e-6))
    return loss, jax.lax.stop_gradient({"loss_mtp": metric})


def _mean_over(values_BS: Float32[Array, "B S"], batch: Batch, targets: tuple[Target, ...]) -> Mean:
    mask_BS = jnp.zeros(values_BS.shape, bool)
    for target in targets:
        mask_BS |= batch.target_kinds_BS == target
    return Mean(total=jnp.sum(jnp.where(mask_BS, values_BS, 0.0)), count=jnp.sum(mask_BS.astype(jnp.float32)))
