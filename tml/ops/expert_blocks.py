"""The gated MLP of experts over blocks of rows, a loop over experts and their blocks: what XLA does best on CPU.

A product with an axis of blocks runs on one core there, and wants a copy of its expert's matrices for every block. Here
each expert's matrices are read once, their gradients are added up where they stay, a block's hidden units never
leave the cache, and blocks that no expert owns cost nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


@jax.custom_vjp
def multiply_blocks(
    x_RD: Float[Array, "r D"],
    gate_up_EDF: Float[Array, "E D f"],
    down_EFD: Float[Array, "E F D"],
    expert_of_block: Int32[Array, "C"],
) -> Float[Array, "r D"]:
    """(silu(gate) * up) down of each row by the expert of its block.

    Args:
        x_RD: C blocks of rows; padding within an expert's blocks is zero.
        gate_up_EDF: gate and up, side by side.
        down_EFD: down.
        expert_of_block: the expert of each block, ascending; E for blocks of none, whose rows come out as zeros.
    """
    return _forward(x_RD, gate_up_EDF, down_EFD, expert_of_block)[0]


def _forward(
    x_RD: jax.Array, gate_up_EDF: jax.Array, down_EFD: jax.Array, expert_of_block: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    ends_E = _block_ends(expert_of_block, gate_up_EDF.shape[0])
    num_rows, block_rows = x_RD.shape[0], x_RD.shape[0] // expert_of_block.shape[0]

    def expert(expert: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gate_up_DF, down_FD = gate_up_EDF[expert], down_EFD[expert]

        def block(block: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            both_AF = _rows(x_RD, block, block_rows) @ gate_up_DF
            gate_AF, up_AF = jnp.split(both_AF, 2, axis=1)
            out_AD = (jax.nn.silu(gate_AF) * up_AF) @ down_FD
            return _with_rows(results[0], block, out_AD), _with_rows(results[1], block, both_AF)

        return jax.lax.fori_loop(_first_block(ends_E, expert), ends_E[expert], block, results)

    zeros = jnp.zeros_like(x_RD), jnp.zeros((num_rows, gate_up_EDF.shape[2]), x_RD.dtype)
    out_RD, both_RF = jax.lax.fori_loop(0, gate_up_EDF.shape[0], expert, zeros)
    return out_RD, (x_RD, both_RF, gate_up_EDF, down_EFD, ends_E, expert_of_block)


def _backward(saved: tuple[jax.Array, ...], grad_RD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    x_RD, both_RF, gate_up_EDF, down_EFD, ends_E, expert_of_block = saved
    block_rows = x_RD.shape[0] // expert_of_block.shape[0]

    def expert(expert: jax.Array, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        gate_up_DF, down_FD = gate_up_EDF[expert], down_EFD[expert]

        def block(block: jax.Array, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            grad_x_RD, grad_gate_up_DF, grad_down_FD = grads
            x_AD, both_AF, grad_AD = (_rows(x, block, block_rows) for x in (x_RD, both_RF, grad_RD))
            gate_AF, up_AF = jnp.split(both_AF, 2, axis=1)
            share_AF = jax.nn.sigmoid(gate_AF)
            act_AF = gate_AF * share_AF
            grad_hidden_AF = _times_transposed(grad_AD, down_FD)
            grad_gate_AF = grad_hidden_AF * up_AF * (share_AF + act_AF * (1 - share_AF))
            grad_both_AF = jnp.concatenate([grad_gate_AF, grad_hidden_AF * act_AF], axis=1)
            return (
                _with_rows(grad_x_RD, block, _times_transposed(grad_both_AF, gate_up_DF)),
                grad_gate_up_DF + _transposed_times(x_AD, grad_both_AF),
                grad_down_FD + _transposed_times(act_AF * up_AF, grad_AD),
            )

        grad_x_RD, *all_experts = grads
        start = grad_x_RD, jnp.zeros_like(gate_up_DF), jnp.zeros_like(down_FD)
        grad_x_RD, *own = jax.lax.fori_loop(_first_block(ends_E, expert), ends_E[expert], block, start)
        return grad_x_RD, *(every.at[expert].set(one) for every, one in zip(all_experts, own, strict=True))

    zeros = jnp.zeros_like(x_RD), jnp.zeros_like(gate_up_EDF), jnp.zeros_like(down_EFD)
    return *jax.lax.fori_loop(0, gate_up_EDF.shape[0], expert, zeros), None


multiply_blocks.defvjp(_forward, _backward)


def _block_ends(expert_of_block: jax.Array, num_experts: int) -> Int32[Array, "E"]:
    """The block after the last one of every expert."""
    expert_E1 = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    return jnp.sum((expert_of_block[None] <= expert_E1).astype(jnp.int32), axis=1)


def _first_block(ends_E: jax.Array, expert: jax.Array) -> Int32[Array, ""]:
    return jnp.where(expert > 0, ends_E[jnp.maximum(expert - 1, 0)], 0)


def _rows(x: jax.Array, block: jax.Array, block_rows: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, block * block_rows, block_rows)


def _with_rows(x: jax.Array, block: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, block * rows.shape[0], axis=0)


def _times_transposed(x_AF: jax.Array, w_DF: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_AF, w_DF, (((1,), (1,)), ((), ())))


def _transposed_times(x_AD: jax.Array, y_AF: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x_AD, y_AF, (((0,), (0,)), ((), ())))
