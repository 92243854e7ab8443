"""Token copies as rows sorted by expert, and back to tokens, for a platform's grouped matmul kernels.

Where rows come from is found by two sorts, of copies by expert and of rows by token: nothing is counted along the
copies one by one, and nothing is scattered, which TPUs do slowly. GPUs scatter fast, and XLA's sort for them is
hundreds of kernels; there copies are counted (`count_copies`), with the same result. The way back adds up the rows
of every token in blocks of tokens (`expert_rows`): so a device gathers only the rows that it has, however many tokens
it looks at.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tml.params import Leaf

BLOCK_TOKENS = 128
"""Tokens whose rows are added up by one group of the matmul: few, because its work is their number times the rows."""


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


COUNTED_TOGETHER = 256
"""Copies of a block whose predecessors one matmul counts."""


def count_copies(
    experts_TK: Int32[Array, "t k"], gates_TK: Float[Array, "t k"], num_experts: int, num_rows: int
) -> tuple[SortedCopies, Float[Array, "r"]]:
    """The same plan by counting: a copy's row is the number of copies that come before it, which matmuls add up.

    Arguments and results are those of `sort_copies`.
    """
    num_tokens, num_choices = experts_TK.shape
    flat_C = experts_TK.reshape(-1)
    num_copies = flat_C.size
    is_expert_EC = jnp.arange(num_experts, dtype=jnp.int32)[:, None] == flat_C[None]
    counts_E = jnp.sum(is_expert_EC, axis=1, dtype=jnp.int32)
    ends_E = jnp.cumsum(counts_E)
    before_EC = _count_before(is_expert_EC) + (ends_E - counts_E)[:, None]
    row_C = jnp.sum(jnp.where(is_expert_EC, before_EC, 0), axis=0)
    has_row_C = (flat_C >= 0) & (row_C < num_rows)
    copies = jnp.arange(num_copies, dtype=jnp.int32)
    # Beyond the rows, and different, for what has none.
    nowhere_C = num_rows + copies
    row_C = jnp.where(has_row_C, row_C, nowhere_C)
    nth_C = jnp.where(has_row_C, _count_before(has_row_C[None])[0], nowhere_C)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    copy_R = _put(jnp.zeros_like(rows), row_C, copies)
    token_by_token = _put(jnp.zeros_like(rows), nth_C, copies) // num_choices
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    tail = num_blocks * BLOCK_TOKENS * num_choices - num_copies
    sizes_E = jnp.diff(jnp.minimum(ends_E, num_rows), prepend=0)
    plan = SortedCopies(
        token_of_row=copy_R // num_choices,
        is_row=rows < jnp.sum(sizes_E),
        group_sizes_E=sizes_E,
        row_by_token=_put(rows, nth_C, row_C),
        place_by_token=token_by_token % BLOCK_TOKENS,
        block_sizes=jnp.sum(jnp.pad(has_row_C, (0, tail)).reshape(num_blocks, -1), axis=1, dtype=jnp.int32),
        num_dropped=jnp.sum(counts_E) - jnp.sum(sizes_E),
        num_tokens=num_tokens,
    )
    gate_R = _move_gates(gates_TK.reshape(-1), copy_R, row_C)
    return plan, jnp.where(plan.is_row, gate_R, jnp.zeros((), gate_R.dtype))


def _put(values: jax.Array, places: jax.Array, what: jax.Array) -> jax.Array:
    return values.at[places].set(what, mode="drop", unique_indices=True)


def _count_before(is_one_EC: jax.Array) -> Int32[Array, "_ _"]:
    """How many entries before each, along the last axis, are ones.

    Blocks times a triangle of ones, and the blocks' sums in the same way: exact in float32 below 2^24.
    """

    def sums_before(values_EC: jax.Array) -> jax.Array:
        num_lines, size = values_EC.shape
        values_EBC = jnp.pad(values_EC, ((0, 0), (0, -size % COUNTED_TOGETHER)))
        values_EBC = values_EBC.reshape(num_lines, -1, COUNTED_TOGETHER)
        is_before = jnp.triu(jnp.ones((COUNTED_TOGETHER, COUNTED_TOGETHER), values_EC.dtype), 1)
        within_EBC = jnp.matmul(values_EBC, is_before, precision="highest", preferred_element_type=jnp.float32)
        if values_EBC.shape[1] > 1:
            totals_EB = jnp.sum(values_EBC, axis=2, dtype=jnp.float32)
            within_EBC += sums_before(totals_EB)[:, :, None]
        return within_EBC.reshape(num_lines, -1)[:, :size]

    return sums_before(is_one_EC.astype(jnp.bfloat16)).astype(jnp.int32)


@jax.custom_vjp
def _move_gates(gate_C: jax.Array, copy_R: jax.Array, row_C: jax.Array) -> jax.Array:
    return _rows(gate_C, copy_R)


def _move_fwd(gate_C: jax.Array, copy_R: jax.Array, row_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _rows(gate_C, copy_R), row_C


def _move_bwd(row_C: jax.Array, grad_R: jax.Array) -> tuple[jax.Array, None, None]:
    return grad_R.at[row_C].get(mode="fill", fill_value=0), None, None


_move_gates.defvjp(_move_fwd, _move_bwd)


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
