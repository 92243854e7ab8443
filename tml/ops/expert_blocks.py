"""Experts' gated MLPs over blocks of token copies, a loop over experts and their blocks: what XLA does best on CPU.

A product with an axis of blocks runs on one core there, and wants a copy of its expert's matrices for every block. Here
each expert's matrices are read once and their gradients are added up where they stay. A block gathers its tokens itself
and multiplies its gates into the hidden units, so that neither copies of tokens nor gradients of results nor ungated
results are ever written out; and what a block makes hardly leaves the cache. Blocks that no expert owns cost nothing.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tml.ops.grouped_matmul import BlockPlan

BLOCKS_AT_ONCE = 4
"""Blocks of one expert that are multiplied as one, as long as there are as many: larger products keep cores busier."""

Carry = TypeVar("Carry")


@jax.custom_vjp
def multiply_blocks(
    x_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    gate_up_EDF: Float[Array, "E D f"],
    down_EFD: Float[Array, "E F D"],
    plan: BlockPlan,
) -> Float[Array, "t D"]:
    """The sum over each token's copies of gate * (silu(gate) * up) down, by the expert of the copy's block.

    Args:
        x_TD: tokens.
        gates_TK: gate of each copy.
        gate_up_EDF: gate and up, side by side.
        down_EFD: down.
        plan: where copies stand; those without a row add nothing.
    """
    return _forward(x_TD, gates_TK, gate_up_EDF, down_EFD, plan)[0]


def _forward(
    x_TD: jax.Array, gates_TK: jax.Array, gate_up_EDF: jax.Array, down_EFD: jax.Array, plan: BlockPlan
) -> tuple[jax.Array, tuple[jax.Array | BlockPlan, ...]]:
    gate_R = _gates_of_rows(gates_TK, plan)

    def expert(expert: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gate_up_DF, down_FD = gate_up_EDF[expert], down_EFD[expert]

        def rows(first: jax.Array, num_rows: int, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            tokens_A, gate_A = (_rows(x, first, num_rows) for x in (plan.token_of_row, gate_R))
            both_AF = _tokens(x_TD, tokens_A) @ gate_up_DF
            gate_AF, up_AF = jnp.split(both_AF, 2, axis=1)
            out_AD = (jax.nn.silu(gate_AF) * up_AF * gate_A[:, None]) @ down_FD
            return _with_rows(results[0], first, out_AD), _with_rows(results[1], first, both_AF)

        return _loop_over_blocks(plan, expert, rows, results)

    num_rows = plan.token_of_row.shape[0]
    nothing = (jnp.zeros((num_rows, width), x_TD.dtype) for width in (x_TD.shape[1], gate_up_EDF.shape[2]))
    out_RD, both_RF = jax.lax.fori_loop(0, gate_up_EDF.shape[0], expert, tuple(nothing))
    return _sum_of_copies(out_RD, plan), (x_TD, gate_R, both_RF, gate_up_EDF, down_EFD, plan)


def _backward(saved: tuple, grad_TD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, None]:
    x_TD, gate_R, both_RF, gate_up_EDF, down_EFD, plan = saved

    def expert(expert: jax.Array, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        gate_up_DF, down_FD = gate_up_EDF[expert], down_EFD[expert]

        def rows(first: jax.Array, num_rows: int, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            grad_x_RD, grad_gate_R, grad_gate_up_DF, grad_down_FD = grads
            tokens_A, gate_A, both_AF = (_rows(x, first, num_rows) for x in (plan.token_of_row, gate_R, both_RF))
            x_AD, grad_AD = _tokens(x_TD, tokens_A), _tokens(grad_TD, tokens_A)
            gate_AF, up_AF = jnp.split(both_AF, 2, axis=1)
            share_AF = jax.nn.sigmoid(gate_AF)
            act_AF = gate_AF * share_AF
            grad_hidden_AF = _times_transposed(grad_AD, down_FD)
            grad_gate_A = jnp.sum(grad_hidden_AF * act_AF * up_AF, axis=1)
            grad_hidden_AF *= gate_A[:, None]
            grad_silu_AF = grad_hidden_AF * up_AF * (share_AF + act_AF * (1 - share_AF))
            grad_both_AF = jnp.concatenate([grad_silu_AF, grad_hidden_AF * act_AF], axis=1)
            return (
                _with_rows(grad_x_RD, first, _times_transposed(grad_both_AF, gate_up_DF)),
                _with_rows(grad_gate_R, first, grad_gate_A),
                grad_gate_up_DF + _transposed_times(x_AD, grad_both_AF),
                grad_down_FD + _transposed_times(act_AF * up_AF * gate_A[:, None], grad_AD),
            )

        *of_rows, all_gate_up, all_down = grads
        start = *of_rows, jnp.zeros_like(gate_up_DF), jnp.zeros_like(down_FD)
        *of_rows, own_gate_up, own_down = _loop_over_blocks(plan, expert, rows, start)
        return *of_rows, all_gate_up.at[expert].set(own_gate_up), all_down.at[expert].set(own_down)

    grad_x_RD = jnp.zeros((plan.token_of_row.shape[0], x_TD.shape[1]), x_TD.dtype)
    zeros = grad_x_RD, jnp.zeros_like(gate_R), jnp.zeros_like(gate_up_EDF), jnp.zeros_like(down_EFD)
    grad_x_RD, grad_gate_R, *grads = jax.lax.fori_loop(0, gate_up_EDF.shape[0], expert, zeros)
    grad_gates_TK = grad_gate_R.at[plan.row_of_copy].get(mode="fill", fill_value=0)
    return _sum_of_copies(grad_x_RD, plan), grad_gates_TK, *grads, None


multiply_blocks.defvjp(_forward, _backward)


def _loop_over_blocks(
    plan: BlockPlan, expert: jax.Array, rows: Callable[[jax.Array, int, Carry], Carry], carry: Carry
) -> Carry:
    """Calls (first row, number of rows, carry) for the blocks of one expert: several at once, then one by one."""
    num_blocks = plan.expert_of_block.shape[0]
    block_rows = plan.token_of_row.shape[0] // num_blocks
    first, last = (jnp.sum((plan.expert_of_block < owner).astype(jnp.int32)) for owner in (expert, expert + 1))
    for at_once in (min(BLOCKS_AT_ONCE, num_blocks), 1):

        def blocks(index: jax.Array, carry: Carry, first: jax.Array = first, at_once: int = at_once) -> Carry:
            return rows((first + index * at_once) * block_rows, at_once * block_rows, carry)

        times = (last - first) // at_once
        carry = jax.lax.fori_loop(0, times, blocks, carry)
        first += times * at_once
    return carry


def _gates_of_rows(gates_TK: jax.Array, plan: BlockPlan) -> jax.Array:
    """The gate of the copy in each row; 0 in padding, which therefore adds to no gradient."""
    return gates_TK.reshape(-1).at[plan.copy_of_row].get(mode="fill", fill_value=0)


def _tokens(x_TD: jax.Array, tokens_A: jax.Array) -> jax.Array:
    """The token of each row; any in padding."""
    return x_TD.at[tokens_A].get(mode="clip")


def _sum_of_copies(y_RD: jax.Array, plan: BlockPlan) -> jax.Array:
    """The sum over each token's rows, in float32. Gathered one by one, they are added up in one pass."""
    how = "promise_in_bounds" if plan.holds_all else "fill"
    copies = (y_RD.at[row_T].get(mode=how, fill_value=0) for row_T in plan.row_of_copy.T)
    return functools.reduce(jnp.add, (copy_TD.astype(jnp.float32) for copy_TD in copies)).astype(y_RD.dtype)


def _rows(x: jax.Array, first: jax.Array, num_rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, num_rows)


def _with_rows(x: jax.Array, first: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, first, axis=0)


def _times_transposed(x_AF: jax.Array, w_DF: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_AF, w_DF, (((1,), (1,)), ((), ())))


def _transposed_times(x_AD: jax.Array, y_AF: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_AD, y_AF, (((0,), (0,)), ((), ())))
