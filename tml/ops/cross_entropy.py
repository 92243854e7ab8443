"""Scores of next-token predictions: over whole logits, or a chunk of positions and a shard of the vocabulary at a time.

Per position, with logits z and target y: the negative log likelihood logsumexp(z) - z_y, the log
normaliser logsumexp(z), and whether y is the likeliest. Their gradient by the logits is
(g_nll + g_log_norm) softmax(z) - g_nll onehot(y).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from tml.config import MeshConfig
from tml.ops.collectives import highest_over, index_along, sum_over

EXCLUDED = -1e30
"""Logit of a padding entry of the vocabulary."""


class Scores(NamedTuple):
    """What the objective needs of the predictions, by position.

    Attributes:
        nll_BS: negative log likelihood of the target.
        log_norm_BS: log normaliser.
        is_right_BS: 1 where the target is the likeliest, else 0; no gradient.
    """

    nll_BS: Float32[Array, "*b"]
    log_norm_BS: Float32[Array, "*b"]
    is_right_BS: Float32[Array, "*b"]


def score(logits_BSV: Float32[Array, "B S V"], targets_BS: Int32[Array, "B S"]) -> Scores:
    """The definition, over whole logits."""
    highest_BS1 = jax.lax.stop_gradient(jnp.max(logits_BSV, axis=-1, keepdims=True))
    shifted_BSV = logits_BSV - highest_BS1
    log_sum_BS = jnp.log(jnp.sum(jnp.exp(shifted_BSV), axis=-1))
    # A masked sum instead of a gather: it fuses.
    is_target_BSV = jnp.arange(logits_BSV.shape[-1], dtype=jnp.int32)[None, None] == targets_BS[:, :, None]
    picked_BS = jnp.sum(jnp.where(is_target_BSV, shifted_BSV, 0.0), axis=-1)
    is_right_BS = (picked_BS >= 0.0).astype(jnp.float32)
    return Scores(log_sum_BS - picked_BS, log_sum_BS + highest_BS1[:, :, 0], is_right_BS)


def score_in_chunks(
    h_BSD: Float[Array, "B S D"],
    unembed_DV: Float[Array, "D v"],
    targets_BS: Int32[Array, "B S"],
    num_logits: int,
    chunk_positions: int,
    mesh: MeshConfig,
) -> Scores:
    """The same scores without ever holding the logits of more than one chunk.

    The backward pass makes the logits of a chunk anew, and adds up the gradient of the unembedding
    in float32. Memory is that of `chunk_positions` x v float32 values, a few times.

    Args:
        h_BSD: inputs of the unembedding, this device's positions.
        unembed_DV: this device's part of the vocabulary: `mesh.tensor` parts in order.
        targets_BS: token to predict, of the whole vocabulary.
        num_logits: entries of the vocabulary that count; the rest is padding.
        chunk_positions: positions of a chunk; the last one is padded.
        mesh: sizes of the axes.
    """
    shape = targets_BS.shape
    num_positions = targets_BS.size
    chunk = min(chunk_positions, num_positions)
    num_chunks = -(-num_positions // chunk)
    tail = num_chunks * chunk - num_positions
    h_CAD = jnp.pad(h_BSD.reshape(num_positions, -1), ((0, tail), (0, 0))).reshape(num_chunks, chunk, -1)
    targets_CA = jnp.pad(targets_BS.reshape(-1), (0, tail)).reshape(num_chunks, chunk)
    scores = _score_chunks(h_CAD, unembed_DV, targets_CA, num_logits, mesh)
    return Scores(*(value.reshape(-1)[:num_positions].reshape(shape) for value in scores))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _score_chunks(
    h_CAD: jax.Array, unembed_DV: jax.Array, targets_CA: jax.Array, num_logits: int, mesh: MeshConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def chunk(h_and_targets: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        h_AD, targets_A = h_and_targets
        logits_AV, is_target_AV = _chunk_logits(h_AD, unembed_DV, targets_A, num_logits, mesh)
        highest_A = highest_over(jnp.max(logits_AV, axis=-1), "tensor", mesh)
        picked_A = jnp.sum(jnp.where(is_target_AV, logits_AV, 0.0), axis=-1)
        sum_A = jnp.sum(jnp.exp(logits_AV - highest_A[:, None]), axis=-1)
        sum_A, picked_A = sum_over((sum_A, picked_A), ("tensor",), mesh)
        log_norm_A = jnp.log(sum_A) + highest_A
        return log_norm_A - picked_A, log_norm_A, (picked_A >= highest_A).astype(jnp.float32)

    return jax.lax.map(chunk, (h_CAD, targets_CA))


def _chunk_logits(
    h_AD: jax.Array, unembed_DV: jax.Array, targets_A: jax.Array, num_logits: int, mesh: MeshConfig
) -> tuple[jax.Array, jax.Array]:
    logits_AV = jnp.einsum("AD,DV->AV", h_AD, unembed_DV, preferred_element_type=jnp.float32)
    num_local = unembed_DV.shape[1]
    entry_V = index_along("tensor", mesh) * num_local + jnp.arange(num_local, dtype=jnp.int32)
    logits_AV = jnp.where((entry_V < num_logits)[None], logits_AV, EXCLUDED)
    return logits_AV, entry_V[None] == targets_A[:, None]


def _score_chunks_fwd(
    h_CAD: jax.Array, unembed_DV: jax.Array, targets_CA: jax.Array, num_logits: int, mesh: MeshConfig
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    scores = _score_chunks(h_CAD, unembed_DV, targets_CA, num_logits, mesh)
    return scores, (h_CAD, unembed_DV, targets_CA, scores[1])


def _score_chunks_bwd(
    num_logits: int,
    mesh: MeshConfig,
    saved: tuple[jax.Array, ...],
    grads: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
    h_CAD, unembed_DV, targets_CA, log_norm_CA = saved
    # Every device along `tensor` has the same scores; the loss of their positions is spread over them.
    grad_nll_CA, grad_norm_CA = sum_over(grads[:2], ("tensor",), mesh)

    def chunk(grad_w_DV: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        h_AD, targets_A, log_norm_A, grad_nll_A, grad_norm_A = inputs
        logits_AV, is_target_AV = _chunk_logits(h_AD, unembed_DV, targets_A, num_logits, mesh)
        probabilities_AV = jnp.exp(logits_AV - log_norm_A[:, None])
        grad_AV = (grad_nll_A + grad_norm_A)[:, None] * probabilities_AV
        grad_AV = (grad_AV - jnp.where(is_target_AV, grad_nll_A[:, None], 0.0)).astype(h_AD.dtype)
        grad_w_DV += jnp.einsum("AD,AV->DV", h_AD, grad_AV, preferred_element_type=jnp.float32)
        return grad_w_DV, jnp.einsum("AV,DV->AD", grad_AV, unembed_DV)

    start_DV = jnp.zeros(unembed_DV.shape, jnp.float32)
    inputs = (h_CAD, targets_CA, log_norm_CA, grad_nll_CA, grad_norm_CA)
    grad_w_DV, grad_h_CAD = jax.lax.scan(chunk, start_DV, inputs)
    return grad_h_CAD, grad_w_DV.astype(unembed_DV.dtype), None


_score_chunks.defvjp(_score_chunks_fwd, _score_chunks_bwd)
