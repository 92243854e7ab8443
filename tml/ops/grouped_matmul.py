"""Routing of token copies to experts and the matmuls over them.

`plan_blocks` places the copies of each expert in a buffer whose parts are padded to whole blocks, so
that every block belongs to one expert: the cost follows the copies, not the number of experts
(`jax.lax.ragged_dot` computes every expert for every row on CPU). XLA multiplies such blocks in a loop
(`tml.ops.expert_blocks`); `grouped_matmul` multiplies rows that are sorted by expert with a platform's kernels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tml.config import MatmulBackend
from tml.ops import grouped_matmul_gpu, grouped_matmul_tpu, row_gather_tpu
from tml.params import Leaf


@flax.struct.dataclass
class BlockPlan:
    """Where each copy of each token stands in the padded buffer of C blocks of b rows.

    Attributes:
        row_of_copy: buffer row of each copy.
        token_of_row: the token in each buffer row, or the number of tokens where the row is padding.
        copy_of_row: the copy (token * K + choice) in each buffer row, or the number of copies.
        expert_of_block: the expert of each block, ascending; the number of experts for blocks of none.
        holds_all: whether every copy has a row; where not, the row of a copy without one is the number of rows.
    """

    row_of_copy: Leaf
    token_of_row: Leaf
    copy_of_row: Leaf
    expert_of_block: Leaf
    holds_all: bool = flax.struct.field(pytree_node=False)


def plan_blocks(
    experts_TK: Int32[Array, "t k"], num_experts: int, block_rows: int, num_blocks: int | None = None
) -> BlockPlan:
    """Plans the buffer.

    Args:
        experts_TK: the expert of each copy; with `num_blocks`, -1 for copies that belong elsewhere.
        num_experts: experts here.
        block_rows: rows of a block.
        num_blocks: size of the buffer. Copies that do not fit have no row, those of the last experts
            first. By default as many as hold any routing: the last block of every expert may be partly empty.
    """
    num_copies, holds_all = experts_TK.size, num_blocks is None
    if num_blocks is None:
        num_blocks = num_copies if block_rows == 1 else -(-num_copies // block_rows) + num_experts
    choice_RE = jax.nn.one_hot(experts_TK.reshape(-1), num_experts, dtype=jnp.int32)
    rank_RE = jnp.cumsum(choice_RE, axis=0) - 1
    counts_E = rank_RE[-1] + 1
    blocks_E = -(-counts_E // block_rows)
    last_block_E = jnp.cumsum(blocks_E)
    first_row_E = (last_block_E - blocks_E) * block_rows
    row_R = jnp.sum(choice_RE * (rank_RE + first_row_E[None]), axis=1)
    num_rows = num_blocks * block_rows
    if not holds_all:
        has_row_R = (experts_TK.reshape(-1) >= 0) & (row_R < num_rows)
        row_R = jnp.where(has_row_R, row_R, num_rows)
    copies = jnp.arange(num_copies, dtype=jnp.int32)
    empty = jnp.full(num_rows, num_copies, jnp.int32)
    copy_of_row = empty.at[row_R].set(copies, unique_indices=holds_all, mode=None if holds_all else "drop")
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    expert = jnp.sum((block[:, None] >= last_block_E[None]).astype(jnp.int32), axis=1)
    return BlockPlan(
        row_of_copy=row_R.reshape(experts_TK.shape),
        token_of_row=copy_of_row // experts_TK.shape[1],
        copy_of_row=copy_of_row,
        expert_of_block=expert,
        holds_all=holds_all,
    )


def plan_of_rows(num_rows: int, expert_of_block: Int32[Array, "C"]) -> BlockPlan:
    """The plan of tokens that stand in the blocks of their one expert already."""
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    return BlockPlan(rows[:, None], rows, rows, expert_of_block, holds_all=True)


def _rows_or_zero(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.at[index].get(mode="fill", fill_value=0)


def _rows_of_copies(x_RD: jax.Array, plan: BlockPlan) -> jax.Array:
    return x_RD[plan.row_of_copy] if plan.holds_all else _rows_or_zero(x_RD, plan.row_of_copy)


@jax.custom_vjp
def dispatch(x_TD: Float[Array, "t D"], plan: BlockPlan) -> Float[Array, "r D"]:
    """Copies tokens to the rows of the buffer. Both directions are gathers: a scatter-add is slow on every platform."""
    return _rows_or_zero(x_TD, plan.token_of_row)


def _dispatch_fwd(x_TD: jax.Array, plan: BlockPlan) -> tuple[jax.Array, BlockPlan]:
    return dispatch(x_TD, plan), plan


def _dispatch_bwd(plan: BlockPlan, grad: jax.Array) -> tuple[jax.Array, None]:
    return jnp.sum(_rows_of_copies(grad, plan), axis=1), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def collect(y_RD: Float[Array, "r D"], plan: BlockPlan) -> Float[Array, "t k D"]:
    """Reads each copy's row back from the buffer; zeros for a copy without a row."""
    return _rows_of_copies(y_RD, plan)


def _collect_fwd(y_RD: jax.Array, plan: BlockPlan) -> tuple[jax.Array, BlockPlan]:
    return collect(y_RD, plan), plan


def _collect_bwd(plan: BlockPlan, grad: jax.Array) -> tuple[jax.Array, None]:
    return _rows_or_zero(grad.reshape(-1, grad.shape[-1]), plan.copy_of_row), None


collect.defvjp(_collect_fwd, _collect_bwd)


def grouped_matmul(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E D F"],
    group_sizes_E: Int32[Array, "E"],
    backend: MatmulBackend,
) -> Float[Array, "R F"]:
    """Multiplies rows that are sorted by expert with the matrix of their expert.

    It works on the rows and experts of one device: under `shard_map` each shard calls it with its own.

    Args:
        x_RD: rows, those of expert 0 first.
        w_EDF: the experts' matrices.
        group_sizes_E: rows of each expert; rows that are left over belong to none and give zero.
        backend: whose kernels; one that the target platform does not have is an error of the compiler.

    Example:
        >>> grouped_matmul(x_RD, w_EDF, jnp.array([3, 0, 5], jnp.int32), MatmulBackend.TPU)
    """
    return kernel_grouped_matmul(kernels_of(backend), x_RD, w_EDF, group_sizes_E)


def grouped_matmul_reference(
    x_RD: Float[Array, "R D"],
    w_EDF: Float[Array, "E _ _"],
    group_sizes_E: Int32[Array, "E"],
    is_transposed: bool = False,
) -> Float[Array, "R F"]:
    """The definition: every expert on every row, and one or none of them chosen."""
    w_EDF = w_EDF.swapaxes(1, 2) if is_transposed else w_EDF
    return jnp.einsum("RE,REF->RF", _owner(x_RD, group_sizes_E), jnp.einsum("RD,EDF->REF", x_RD, w_EDF))


def multiply_rows_of_layer_reference(
    x_RD: Float[Array, "R D"],
    w_LEZDF: Float[Array, "L E Z D F"],
    layer: jax.Array | int,
    group_sizes_E: Int32[Array, "E"],
    usual_groups: float,
) -> Float[Array, "R O"]:
    """The definition of `LAYER_KERNELS`; zero in rows of no group."""
    y_REZF = jnp.einsum("RD,EZDF->REZF", x_RD, w_LEZDF[layer])
    return jnp.einsum("RE,REZF->RZF", _owner(x_RD, group_sizes_E), y_REZF).reshape(x_RD.shape[0], -1)


def sums_of_groups_reference(
    x_RD: Float[Array, "R D"], y_RF: Float[Array, "R F"], group_sizes_E: Int32[Array, "E"]
) -> Float[Array, "E D F"]:
    """The definition of the sum over each group's rows of x_R^T y_R."""
    owner_RE = _owner(x_RD, group_sizes_E)
    # Times zero would not do: what stands in rows of no group need not be a number.
    x_RD, y_RF = (jnp.where(jnp.sum(owner_RE, axis=1)[:, None] > 0, rows, 0) for rows in (x_RD, y_RF))
    return jnp.einsum("RE,RD,RF->EDF", owner_RE, x_RD, y_RF)


def _owner(x_RD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    return jax.nn.one_hot(_expert_of_row(x_RD.shape[0], group_sizes_E), group_sizes_E.shape[0], dtype=x_RD.dtype)


def _expert_of_row(num_rows: int, group_sizes_E: jax.Array) -> jax.Array:
    """The expert of each sorted row; the number of experts for rows of none."""
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    return jnp.sum((row_R[:, None] >= jnp.cumsum(group_sizes_E)[None]).astype(jnp.int32), axis=1)


def _as_it_is(x_TD: jax.Array) -> jax.Array:
    return x_TD


def _gather(x_TD: jax.Array, place_R: jax.Array, num_used: jax.Array, like: jax.Array) -> jax.Array:
    # All places are there: checked, every row would be written twice.
    return x_TD.at[place_R].get(mode="promise_in_bounds")


class GroupedKernels(NamedTuple):
    """What a platform's kernels do with rows of groups; those of no group may come out as anything.

    Attributes:
        rows: (x_RD, w_EDF, group_sizes_E, is_transposed) to x_R w_E for the expert of each row.
        groups: (x_RD, y_RF, group_sizes_E) to the sum over each expert's rows of x_R^T y_R.
        rows_for_gather: the first, with a result that `gather` reads.
        for_gather: (x_TD) to what `gather` reads.
        gather: (x_TP, place_R, num_used, like) to the rows at the first so many places, anything behind them, of the
            width and type of `like`.
        are_matrices_first: whether tokens travel when the layer's matrices are there, not before: one queue takes both
            on TPU, and is empty while attention runs. On GPU matrices come by another network.
    """

    rows: Callable[..., jax.Array]
    groups: Callable[..., jax.Array]
    rows_for_gather: Callable[..., jax.Array]
    for_gather: Callable[[jax.Array], jax.Array] = _as_it_is
    gather: Callable[..., jax.Array] = _gather
    are_matrices_first: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def multiply_groups_of_rows(
    kernels: GroupedKernels, is_transposed: bool, x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """By a platform's kernels, forward and both gradients; rows of no group may come out as anything, both ways.

    Args:
        kernels: the kernels.
        is_transposed: whether the matrices come as E x F x D.
        x_RD: rows, those of expert 0 first.
        w_EDF: the experts' matrices.
        group_sizes_E: rows of each expert.
    """
    return kernels.rows(x_RD, w_EDF, group_sizes_E, is_transposed=is_transposed)


def _multiply_fwd(
    kernels: GroupedKernels, is_transposed: bool, x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return kernels.rows(x_RD, w_EDF, group_sizes_E, is_transposed=is_transposed), (x_RD, w_EDF, group_sizes_E)


def _multiply_bwd(
    kernels: GroupedKernels, is_transposed: bool, saved: tuple[jax.Array, jax.Array, jax.Array], grad_RF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_RD, w_EDF, group_sizes_E = saved
    grad_x_RD = kernels.rows(grad_RF, w_EDF, group_sizes_E, is_transposed=not is_transposed)
    pair = (grad_RF, x_RD) if is_transposed else (x_RD, grad_RF)
    return grad_x_RD, kernels.groups(*pair, group_sizes_E), None


multiply_groups_of_rows.defvjp(_multiply_fwd, _multiply_bwd)


def kernel_grouped_matmul(
    kernels: GroupedKernels, x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array
) -> jax.Array:
    """The same with zeros in rows of no group, both ways."""
    has_group_R1 = (jnp.arange(x_RD.shape[0], dtype=jnp.int32) < jnp.sum(group_sizes_E))[:, None]
    x_RD = jnp.where(has_group_R1, x_RD, jnp.zeros((), x_RD.dtype))
    y_RF = multiply_groups_of_rows(kernels, False, x_RD, w_EDF, group_sizes_E)
    return jnp.where(has_group_R1, y_RF, jnp.zeros((), y_RF.dtype))


def dense_kernels() -> GroupedKernels:
    """The definitions."""
    return GroupedKernels(grouped_matmul_reference, sums_of_groups_reference, grouped_matmul_reference)


def tpu_kernels(**options: Any) -> GroupedKernels:
    """The kernels for TPU, with options that all of them have: `usual_rows`, `unit`, `interpret`."""
    rows, groups, gather = (
        functools.partial(kernel, **options)
        for kernel in (grouped_matmul_tpu.multiply_rows, grouped_matmul_tpu.multiply_groups, row_gather_tpu.gather_rows)
    )
    for_gather = functools.partial(row_gather_tpu.pair_halves, unit=options.get("unit", row_gather_tpu.LANES))
    return GroupedKernels(rows, groups, functools.partial(rows, is_gathered_next=True), for_gather, gather, True)


def gpu_kernels(**options: Any) -> GroupedKernels:
    """The kernels for GPU, with options that all of them have: `usual_rows`, `interpret`."""
    rows = functools.partial(grouped_matmul_gpu.multiply_rows, **options)
    return GroupedKernels(rows, functools.partial(grouped_matmul_gpu.multiply_groups, **options), rows)


def kernels_of(backend: MatmulBackend, usual_rows: int | None = None) -> GroupedKernels:
    """The kernels of a platform; their stated cost counts `usual_rows`, where groups usually leave some rows over."""
    if backend is MatmulBackend.DENSE:
        return dense_kernels()
    make = {MatmulBackend.TPU: tpu_kernels, MatmulBackend.GPU: gpu_kernels}[backend]
    return make(usual_rows=usual_rows)


LAYER_KERNELS: dict[MatmulBackend, Callable[..., jax.Array]] = {
    MatmulBackend.DENSE: multiply_rows_of_layer_reference,
    MatmulBackend.TPU: grouped_matmul_tpu.multiply_rows_of_layer,
    MatmulBackend.GPU: grouped_matmul_gpu.multiply_rows_of_layer,
}
"""(x_RD, w_LEZDF, layer, group_sizes_E, usual_groups) to x_R w_Z for the Z matrices of each row's expert, side by
side, [R, Z F]; anything in rows of no group."""
