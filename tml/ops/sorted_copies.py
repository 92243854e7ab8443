"""Token copies as rows sorted by expert, and back to tokens, for a platform's grouped matmul kernels.

Where rows come from is found by two sorts, of copies by expert and of rows by token: nothing is counted along the
copies one by one, and nothing is scattered. The way back adds up the rows of every token: rows in the order of
their tokens times a matrix of ones, which is a grouped matmul whose groups are blocks of tokens. So a device
gathers only the rows that it has, however many tokens it looks at.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tml.params import Leaf

BLOCK_TOKENS = 128
"""Tokens whose rows are added up by one group of the matmul: few, because its work is their number times the rows."""

SumGroups = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x_RD, y_RF, group_sizes_E) to the sum over each group's rows of x_R^T y_R, as `GroupedKernels.groups`."""


@flax.struct.dataclass
class SortedCopies:
    """Where the copies stand that these rows hold: first by expert, then by token.

    Attributes:
        token_of_row: the token in each row; any token in a row of no expert.
        is_row: whether a row holds a copy.
        group_sizes_E: rows of each expert.
        row_by_token: the rows in the order of their tokens, those that hold nothing last.
        place_by_token: in that order, the place of the row's token in its block.
        block_sizes: in that order, rows of each block of tokens.
        num_dropped: copies of these experts that found no row.
        num_tokens: tokens.
    """

    token_of_row: Leaf
    is_row: Leaf
    group_sizes_E: Leaf
    row_by_token: Leaf
    place_by_token: Leaf
    block_sizes: Leaf
    num_dropped: Leaf
    num_tokens: int = flax.struct.field(pytree_node=False)


class _Order(NamedTuple):
    """Copies sorted by expert: the expert (or their number) of each, which copy it is, and its gate."""

    expert_C: jax.Array
    copy_C: jax.Array
    gate_C: jax.Array


def sort_copies(
    experts_TK: Int32[Array, "t k"], gates_TK: Float[Array, "t k"], num_experts: int, num_rows: int
) -> tuple[SortedCopies, Float[Array, "r"]]:
    """Plans the rows.

    Args:
        experts_TK: the expert of each copy, from 0; negative for copies that belong elsewhere.
        gates_TK: the gate of each copy.
        num_experts: experts here.
        num_rows: rows here. Copies that do not fit have none, those of the last experts first.

    Returns:
        The plan, and the gate of the copy in each row: 0 in rows of no expert.
    """
    num_tokens, num_choices = experts_TK.shape
    num_copies = experts_TK.size
    flat_C = experts_TK.reshape(-1)
    order = _sort_by_expert(gates_TK.reshape(-1), jnp.where(flat_C < 0, num_experts, flat_C))
    expert_R, copy_R, gate_R = (
        _cut_or_pad(x, num_rows, fill) for x, fill in zip(order, (num_experts, 0, 0), strict=True)
    )
    is_row_R = expert_R < num_experts
    counts_E = jnp.sum(jax.nn.one_hot(flat_C, num_experts, dtype=jnp.int32), axis=0)
    ends_E = jnp.minimum(jnp.cumsum(counts_E), num_rows)
    sizes_E = jnp.diff(ends_E, prepend=0)
    copy_by_token, row_by_token = jax.lax.sort(
        (jnp.where(is_row_R, copy_R, num_copies), jnp.arange(num_rows, dtype=jnp.int32)), num_keys=1
    )
    token_by_token = copy_by_token // num_choices
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    block_by_token = jnp.where(copy_by_token < num_copies, token_by_token // BLOCK_TOKENS, num_blocks)
    plan = SortedCopies(
        token_of_row=copy_R // num_choices,
        is_row=is_row_R,
        group_sizes_E=sizes_E,
        row_by_token=row_by_token,
        place_by_token=token_by_token % BLOCK_TOKENS,
        block_sizes=jnp.sum(jax.nn.one_hot(block_by_token, num_blocks, dtype=jnp.int32), axis=0),
        num_dropped=jnp.sum(counts_E) - jnp.sum(sizes_E),
        num_tokens=num_tokens,
    )
    return plan, jnp.where(is_row_R, gate_R, jnp.zeros((), gate_R.dtype))


@jax.custom_vjp
def _sort_by_expert(gate_C: jax.Array, expert_C: jax.Array) -> _Order:
    copies = jnp.arange(expert_C.size, dtype=jnp.int32)
    return _Order(*jax.lax.sort((expert_C, copies, gate_C), num_keys=1, is_stable=True))


def _sort_fwd(gate_C: jax.Array, expert_C: jax.Array) -> tuple[_Order, jax.Array]:
    order = _sort_by_expert(gate_C, expert_C)
    return order, order.copy_C


def _sort_bwd(copy_C: jax.Array, grads: _Order) -> tuple[jax.Array, None]:
    # Sorting by the copies themselves undoes the order.
    return jax.lax.sort((copy_C, grads.gate_C), num_keys=1)[1], None


_sort_by_expert.defvjp(_sort_fwd, _sort_bwd)


def _cut_or_pad(values: jax.Array, size: int, fill: int) -> jax.Array:
    values = values[:size]
    return jnp.pad(values, (0, size - values.shape[0]), constant_values=fill)


def _rows(x: jax.Array, places: jax.Array) -> jax.Array:
    # All places are there: checked, every row would be written twice.
    return x.at[places].get(mode="promise_in_bounds")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rows_of_tokens(sum_groups: SumGroups, x_TD: Float[Array, "t D"], plan: SortedCopies) -> Float[Array, "r D"]:
    """The token of every row; rows of no expert hold any token's."""
    return _rows(x_TD, plan.token_of_row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_of_rows(sum_groups: SumGroups, y_RD: Float[Array, "r D"], plan: SortedCopies) -> Float[Array, "t D"]:
    """The sum of every token's rows, in float32; what stands in rows of no expert does not matter."""
    ones = jax.nn.one_hot(plan.place_by_token, BLOCK_TOKENS, dtype=y_RD.dtype)
    sums = sum_groups(ones, _rows(y_RD, plan.row_by_token), plan.block_sizes)
    return sums.reshape(-1, y_RD.shape[1])[: plan.num_tokens]


def _rows_fwd(sum_groups: SumGroups, x_TD: jax.Array, plan: SortedCopies) -> tuple[jax.Array, SortedCopies]:
    return rows_of_tokens(sum_groups, x_TD, plan), plan


def _sum_fwd(sum_groups: SumGroups, y_RD: jax.Array, plan: SortedCopies) -> tuple[jax.Array, SortedCopies]:
    return sum_of_rows(sum_groups, y_RD, plan), plan


# Each is the other's transpose, but for rows of no expert, from which nothing is asked either way.
rows_of_tokens.defvjp(_rows_fwd, lambda sum_groups, plan, grad: (sum_of_rows(sum_groups, grad, plan), None))
sum_of_rows.defvjp(_sum_fwd, lambda sum_groups, plan, grad: (rows_of_tokens(sum_groups, grad, plan), None))
