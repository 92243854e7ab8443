"""Losses of next-token predictions by position: over whole logits, or a block of the vocabulary at a time.

Per position, with logits z and target y: the negative log likelihood logsumexp(z) - z_y, the log
normaliser logsumexp(z), and whether y is the likeliest. Their gradient by the logits is
(g_nll + g_log_norm) softmax(z) - g_nll onehot(y).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from tml.config import MeshConfig
from tml.ops.collectives import highest_over, index_along, sum_over

EXCLUDED = -1e30
"""Logit of a padding entry of the vocabulary."""


class TokenLosses(NamedTuple):
    """What the objective needs of the predictions, by position.

    Attributes:
        nll_BS: negative log likelihood of the target.
        log_norm_BS: log normaliser.
        is_right_BS: 1 where the target is the likeliest, else 0; no gradient.
    """

    nll_BS: Float32[Array, "*b"]
    log_norm_BS: Float32[Array, "*b"]
    is_right_BS: Float32[Array, "*b"]


def token_losses_reference(logits_BSV: Float32[Array, "B S V"], targets_BS: Int32[Array, "B S"]) -> TokenLosses:
    """The definition, over whole logits; what the others are tested against."""
    highest_BS1 = jax.lax.stop_gradient(jnp.max(logits_BSV, axis=-1, keepdims=True))
    shifted_BSV = logits_BSV - highest_BS1
    log_sum_BS = jnp.log(jnp.sum(jnp.exp(shifted_BSV), axis=-1))
    # A masked sum instead of a gather: it fuses.
    is_target_BSV = jnp.arange(logits_BSV.shape[-1], dtype=jnp.int32)[None, None] == targets_BS[:, :, None]
    picked_BS = jnp.sum(jnp.where(is_target_BSV, shifted_BSV, 0.0), axis=-1)
    is_right_BS = (picked_BS >= 0.0).astype(jnp.float32)
    return TokenLosses(log_sum_BS - picked_BS, log_sum_BS + highest_BS1[:, :, 0], is_right_BS)


@jax.custom_vjp
def token_losses(
    h_BSD: Float[Array, "B S D"], unembed_DV: Float[Array, "D v"], targets_BS: Int32[Array, "B S"]
) -> TokenLosses:
    """Of whole logits h W, with a backward pass that on CPU makes no array of their size.

    It multiplies exp(z - max) as the forward pass leaves it; what depends on the position alone, and the targets'
    entries, are put to the factors and to the products, by gathers and scatters. Elsewhere these are slow, and what
    makes the gradient of logits is fused into the matmuls.

    Args:
        h_BSD: inputs of the unembedding.
        unembed_DV: the unembedding, the entries that count alone.
        targets_BS: token to predict.
    """
    return _token_losses_fwd(h_BSD, unembed_DV, targets_BS)[0]


def _token_losses_fwd(
    h_BSD: jax.Array, unembed_DV: jax.Array, targets_BS: jax.Array
) -> tuple[TokenLosses, tuple[jax.Array, ...]]:
    h_TD, targets_T = h_BSD.reshape(targets_BS.size, -1), targets_BS.reshape(-1)
    logits_TV = jnp.matmul(h_TD, unembed_DV, preferred_element_type=jnp.float32)
    highest_T = jnp.max(logits_TV, axis=-1)
    picked_T = jax.lax.platform_dependent(logits_TV, targets_T, cpu=_gathered, default=_selected)
    exp_TV = jnp.exp(logits_TV - highest_T[:, None])
    sum_T = jnp.sum(exp_TV, axis=-1)
    log_norm_T = jnp.log(sum_T) + highest_T
    values = log_norm_T - picked_T, log_norm_T, (picked_T >= highest_T).astype(jnp.float32)
    losses = TokenLosses(*(value_T.reshape(targets_BS.shape) for value_T in values))
    return losses, (h_BSD, unembed_DV, targets_BS, exp_TV.astype(h_BSD.dtype), sum_T)


def _gathered(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]


def _selected(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(_is_target(logits_TV, targets_T), logits_TV, 0.0), axis=-1)


def _is_target(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    return jnp.arange(logits_TV.shape[-1], dtype=jnp.int32)[None] == targets_T[:, None]


class _Found(NamedTuple):
    """What the gradients by h and W are made of.

    Attributes:
        h_TD: inputs of the unembedding.
        unembed_DV: the unembedding.
        targets_T: tokens to predict.
        exp_TV: exp(z - max).
        share_T1: gradient by a logit over its exp, but for the target's.
        grad_nll_T1: what the target's gradient is less.
    """

    h_TD: jax.Array
    unembed_DV: jax.Array
    targets_T: jax.Array
    exp_TV: jax.Array
    share_T1: jax.Array
    grad_nll_T1: jax.Array


def _token_losses_bwd(saved: tuple[jax.Array, ...], grads: TokenLosses) -> tuple[jax.Array, jax.Array, None]:
    h_BSD, unembed_DV, targets_BS, exp_TV, sum_T = saved
    h_TD = h_BSD.reshape(sum_T.size, -1)
    grad_nll_T1 = grads.nll_BS.reshape(-1, 1)
    share_T1 = (grad_nll_T1 + grads.log_norm_BS.reshape(-1, 1)) / sum_T[:, None]
    found = _Found(h_TD, unembed_DV, targets_BS.reshape(-1), exp_TV, share_T1, grad_nll_T1)
    grad_h_TD, grad_DV = jax.lax.platform_dependent(found, cpu=_products_of_exp, default=_products_of_gradient)
    return grad_h_TD.astype(h_BSD.dtype).reshape(h_BSD.shape), grad_DV.astype(unembed_DV.dtype), None


def _products_of_exp(found: _Found) -> tuple[jax.Array, jax.Array]:
    h_TD, unembed_DV, targets_T, exp_TV, share_T1, grad_nll_T1 = found
    grad_h_TD = share_T1 * _sum_over(1, exp_TV, 1, unembed_DV) - grad_nll_T1 * unembed_DV[:, targets_T].T
    grad_DV = _sum_over(0, (share_T1 * h_TD).astype(h_TD.dtype), 0, exp_TV)
    return grad_h_TD, grad_DV.at[:, targets_T].add(-(grad_nll_T1 * h_TD).T)


def _products_of_gradient(found: _Found) -> tuple[jax.Array, jax.Array]:
    is_target_TV = _is_target(found.exp_TV, found.targets_T)
    grad_TV = found.share_T1 * found.exp_TV - jnp.where(is_target_TV, found.grad_nll_T1, 0.0)
    grad_TV = grad_TV.astype(found.h_TD.dtype)
    return _sum_over(1, grad_TV, 1, found.unembed_DV), _sum_over(0, found.h_TD, 0, grad_TV)


def _sum_over(left_axis: int, left: jax.Array, right_axis: int, right: jax.Array) -> jax.Array:
    summed = ((left_axis,), (right_axis,)), ((), ())
    return jax.lax.dot_general(left, right, summed, preferred_element_type=jnp.float32)


token_losses.defvjp(_token_losses_fwd, _token_losses_bwd)


Gather = Callable[[jax.Array], jax.Array]
"""This device's part of a block of the unembedding to the whole block; linear."""


class _Blocks(NamedTuple):
    """How the vocabulary is cut.

    Attributes:
        width: entries of a block.
        num_entries: entries of this device, before the last block is filled up.
        num_logits: entries of the whole vocabulary that count.
    """

    width: int
    num_entries: int
    num_logits: int


def token_losses_in_blocks(
    h_BSD: Float[Array, "B S D"],
    unembed_DV: Float[Array, "d v"],
    targets_BS: Int32[Array, "B S"],
    num_logits: int,
    block_entries: int,
    gather: Gather,
    mesh: MeshConfig,
) -> TokenLosses:
    """The same without ever holding more than one block of the vocabulary: of logits, and of the unembedding.

    A block of the unembedding is gathered when its logits are made, and its gradient leaves before the next block's
    is made. The backward pass makes logits anew. Memory is that of B x S x `block_entries` float32 values, twice.

    Args:
        h_BSD: inputs of the unembedding, this device's positions.
        unembed_DV: this device's part, of `mesh.tensor` parts of the vocabulary in order.
        targets_BS: token to predict, of the whole vocabulary.
        num_logits: entries of the vocabulary that count; the rest is padding.
        block_entries: entries of a block; the last one is padded.
        gather: how a block's part becomes whole along D.
        mesh: sizes of the axes.
    """
    num_rows, num_entries = unembed_DV.shape
    blocks = _Blocks(min(block_entries, num_entries), num_entries, num_logits)
    w_DV = jnp.pad(unembed_DV, ((0, 0), (0, -num_entries % blocks.width)))
    w_CDV = jnp.moveaxis(w_DV.reshape(num_rows, -1, blocks.width), 1, 0)
    h_TD = h_BSD.reshape(targets_BS.size, -1)
    losses = _losses_by_blocks(h_TD, w_CDV, targets_BS.reshape(-1), blocks, gather, mesh)
    return TokenLosses(*(value_T.reshape(targets_BS.shape) for value_T in losses))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _losses_by_blocks(
    h_TD: jax.Array, w_CDV: jax.Array, targets_T: jax.Array, blocks: _Blocks, gather: Gather, mesh: MeshConfig
) -> TokenLosses:
    def block(
        found: tuple[jax.Array, jax.Array, jax.Array], index_and_part: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        highest_T, sum_T, picked_T = found
        index, part_DV = index_and_part
        logits_TV, is_target_TV = _block_logits(h_TD, gather(part_DV), targets_T, index, blocks, mesh)
        higher_T = jnp.maximum(highest_T, jnp.max(logits_TV, axis=-1))
        sum_T = sum_T * jnp.exp(highest_T - higher_T) + jnp.sum(jnp.exp(logits_TV - higher_T[:, None]), axis=-1)
        picked_T += jnp.sum(jnp.where(is_target_TV, logits_TV, 0.0), axis=-1)
        return (higher_T, sum_T, picked_T), None

    nothing_T = jnp.zeros(targets_T.shape, jnp.float32)
    start = nothing_T + EXCLUDED, nothing_T, nothing_T
    (local_T, sum_T, picked_T), _ = jax.lax.scan(block, start, _numbered(w_CDV))
    highest_T = highest_over(local_T, "tensor", mesh)
    sum_T, picked_T = sum_over((sum_T * jnp.exp(local_T - highest_T), picked_T), ("tensor",), mesh)
    log_norm_T = jnp.log(sum_T) + highest_T
    return TokenLosses(log_norm_T - picked_T, log_norm_T, (picked_T >= highest_T).astype(jnp.float32))


def _numbered(w_CDV: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.arange(w_CDV.shape[0], dtype=jnp.int32), w_CDV


def _block_logits(
    h_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, index: jax.Array, blocks: _Blocks, mesh: MeshConfig
) -> tuple[jax.Array, jax.Array]:
    """A block's logits, and which of them are the targets'."""
    logits_TV = jnp.einsum("TD,DV->TV", h_TD, w_DV, preferred_element_type=jnp.float32)
    local_V = index * blocks.width + jnp.arange(blocks.width, dtype=jnp.int32)
    entry_V = index_along("tensor", mesh) * blocks.num_entries + local_V
    counts_V = (local_V < blocks.num_entries) & (entry_V < blocks.num_logits)
    logits_TV = jnp.where(counts_V[None], logits_TV, EXCLUDED)
    return logits_TV, counts_V[None] & (entry_V[None] == targets_T[:, None])


def _losses_by_blocks_fwd(
    h_TD: jax.Array, w_CDV: jax.Array, targets_T: jax.Array, blocks: _Blocks, gather: Gather, mesh: MeshConfig
) -> tuple[TokenLosses, tuple[jax.Array, ...]]:
    losses = _losses_by_blocks(h_TD, w_CDV, targets_T, blocks, gather, mesh)
    return losses, (h_TD, w_CDV, targets_T, losses.log_norm_BS)


def _losses_by_blocks_bwd(
    blocks: _Blocks, gather: Gather, mesh: MeshConfig, saved: tuple[jax.Array, ...], grads: TokenLosses
) -> tuple[jax.Array, jax.Array, None]:
    h_TD, w_CDV, targets_T, log_norm_T = saved
    # Every device along `tensor` has the same losses; the loss of their positions is spread over them.
    grad_nll_T, grad_norm_T = sum_over((grads.nll_BS, grads.log_norm_BS), ("tensor",), mesh)

    def block(grad_h_TD: jax.Array, index_and_part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, part_DV = index_and_part
        w_DV, scatter = jax.vjp(gather, part_DV)
        logits_TV, is_target_TV = _block_logits(h_TD, w_DV, targets_T, index, blocks, mesh)
        grad_TV = (grad_nll_T + grad_norm_T)[:, None] * jnp.exp(logits_TV - log_norm_T[:, None])
        grad_TV = (grad_TV - jnp.where(is_target_TV, grad_nll_T[:, None], 0.0)).astype(h_TD.dtype)
        grad_h_TD += jnp.einsum("TV,DV->TD", grad_TV, w_DV, preferred_element_type=jnp.float32)
        (grad_part_DV,) = scatter(jnp.einsum("TD,TV->DV", h_TD, grad_TV))
        return grad_h_TD, grad_part_DV

    start_TD = jnp.zeros(h_TD.shape, jnp.float32)
    grad_h_TD, grad_w_CDV = jax.lax.scan(block, start_TD, _numbered(w_CDV))
    return grad_h_TD.astype(h_TD.dtype), grad_w_CDV, None


_losses_by_blocks.defvjp(_losses_by_blocks_fwd, _losses_by_blocks_bwd)
