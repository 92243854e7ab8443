"""Experts' gated MLPs over rows sorted by expert, by a platform's kernels: there, and the whole way back.

The way back is written out, because what travels between devices and what is gathered next is not an array of
numbers on every platform (`row_gather_tpu`): a token becomes a row, and rows become sums of tokens, as one step each.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tml.ops.grouped_matmul import GroupedKernels
from tml.ops.sorted_copies import BLOCK_TOKENS, SortedCopies
from tml.params import PyTree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def multiply_sorted(
    kernels: GroupedKernels,
    axis: str | None,
    beside: Callable[..., jax.Array] | None,
    x_TD: Float[Array, "t D"],
    gate_R: Float[Array, "r"],
    gate_up_EDF: Float[Array, "E D f"],
    down_EDF: Float[Array, "E D F"],
    plan: SortedCopies,
    beside_args: tuple[PyTree, ...],
) -> Float[Array, "t D"]:
    """The sum over each token's copies of (gate * silu(gate unit) * up) down, by the expert of the copy's row.

    Gates multiply the hidden units: then nothing of the second matmul is needed again for their gradient. Rows of no
    expert hold anything between the kernels, which do not read them.

    Args:
        kernels: the platform's.
        axis: mesh axis whose devices bring their tokens together, each for its own experts, and take the sums back;
            none where a device's tokens are all there are.
        beside: (x_TD, *beside_args) to what is added, which a device computes while tokens or gradients travel.
        x_TD: this device's tokens.
        gate_R: gate of the copy in each row.
        gate_up_EDF: gate and up, side by side.
        down_EDF: down, transposed.
        plan: where the copies of all tokens stand.
        beside_args: what else `beside` takes.
    """
    return _forward(kernels, axis, beside, x_TD, gate_R, gate_up_EDF, down_EDF, plan, beside_args)[0]


def _forward(
    kernels: GroupedKernels,
    axis: str | None,
    beside: Callable[..., jax.Array] | None,
    x_TD: jax.Array,
    gate_R: jax.Array,
    gate_up_EDF: jax.Array,
    down_EDF: jax.Array,
    plan: SortedCopies,
    beside_args: tuple[PyTree, ...],
) -> tuple[jax.Array, tuple]:
    if axis is not None and kernels.are_matrices_first:
        x_TD, gate_up_EDF, down_EDF = jax.lax.optimization_barrier((x_TD, gate_up_EDF, down_EDF))
    x_RD = _rows_of_tokens(kernels, _all_tokens(kernels, axis, x_TD), x_TD, plan)
    both_RF = kernels.rows(x_RD, gate_up_EDF, plan.group_sizes_E)
    y_RP = kernels.rows_for_gather(_hidden(both_RF, gate_R), down_EDF, plan.group_sizes_E, is_transposed=True)
    out_TD = _sums_of_rows(kernels, axis, y_RP, x_TD, plan)
    beside_vjp = None
    if beside is not None:
        beside_TD, beside_vjp = jax.vjp(beside, x_TD, *beside_args)
        out_TD += beside_TD
    return out_TD, (x_RD, both_RF, gate_R, gate_up_EDF, down_EDF, plan, beside_vjp)


def _backward(
    kernels: GroupedKernels, axis: str | None, beside: Callable[..., jax.Array] | None, saved: tuple, grad_TD: jax.Array
) -> tuple:
    x_RD, both_RF, gate_R, gate_up_EDF, down_EDF, plan, beside_vjp = saved
    sizes_E = plan.group_sizes_E
    all_grads_TP = _all_tokens(kernels, axis, grad_TD)
    grad_x_TD, *grad_beside_args = [jnp.zeros_like(grad_TD)] if beside is None else beside_vjp(grad_TD)
    if axis is not None:
        # First what needs no other device's gradients: nothing else is there to do while they travel.
        all_grads_TP, grad_x_TD, grad_beside_args = jax.lax.optimization_barrier(
            (all_grads_TP, grad_x_TD, grad_beside_args)
        )
    grad_y_RD = _rows_of_tokens(kernels, all_grads_TP, grad_TD, plan)
    hidden_RF, hidden_vjp = jax.vjp(_hidden, both_RF, gate_R)
    grad_both_RF, grad_gate_R = hidden_vjp(kernels.rows(grad_y_RD, down_EDF, sizes_E))
    grad_x_RP = kernels.rows_for_gather(grad_both_RF, gate_up_EDF, sizes_E, is_transposed=True)
    return (
        grad_x_TD + _sums_of_rows(kernels, axis, grad_x_RP, grad_TD, plan),
        jnp.where(plan.is_row, grad_gate_R, jnp.zeros((), grad_gate_R.dtype)),
        kernels.groups(x_RD, grad_both_RF, sizes_E),
        kernels.groups(grad_y_RD, hidden_RF, sizes_E),
        None,
        tuple(grad_beside_args),
    )


multiply_sorted.defvjp(_forward, _backward)


@jax.named_scope("hidden")
def _hidden(both_RF: jax.Array, gate_R: jax.Array) -> jax.Array:
    gate_RF, up_RF = jnp.split(both_RF, 2, axis=-1)
    return jax.nn.silu(gate_RF) * up_RF * gate_R[:, None]


@jax.named_scope("all_tokens")
def _all_tokens(kernels: GroupedKernels, axis: str | None, x_TD: jax.Array) -> jax.Array:
    """The tokens of all devices along the axis, which travel as they are gathered next."""
    x_TP = kernels.for_gather(x_TD)
    return x_TP if axis is None else jax.lax.all_gather(x_TP, axis, axis=0, tiled=True)


@jax.named_scope("rows_of_tokens")
def _rows_of_tokens(kernels: GroupedKernels, x_TP: jax.Array, like_TD: jax.Array, plan: SortedCopies) -> jax.Array:
    """The token of every row."""
    return kernels.gather(x_TP, plan.token_of_row, jnp.sum(plan.group_sizes_E), like=like_TD)


@jax.named_scope("sums_of_rows")
def _sums_of_rows(
    kernels: GroupedKernels, axis: str | None, y_RP: jax.Array, like_TD: jax.Array, plan: SortedCopies
) -> jax.Array:
    """The transpose of both: the sum of every token's rows in float32, and of these the devices' sum.

    Rows in the order of their tokens times a matrix of ones are a grouped matmul, whose groups are blocks of tokens.
    """
    y_RD = kernels.gather(y_RP, plan.row_by_token, jnp.sum(plan.group_sizes_E), like=like_TD)
    ones = jax.nn.one_hot(plan.place_by_token, BLOCK_TOKENS, dtype=y_RD.dtype)
    sums_TD = kernels.groups(ones, y_RD, plan.block_sizes).reshape(-1, y_RD.shape[1])[: plan.num_tokens]
    return sums_TD if axis is None else jax.lax.psum_scatter(sums_TD, axis, scatter_dimension=0, tiled=True)
