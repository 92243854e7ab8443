"""How token copies and experts come together on a mesh: three strategies, one local matmul."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tml.config import ExpertDispatch, MatmulBackend, MeshConfig, MoEConfig
from tml.model.remat import kept
from tml.ops.collectives import index_along
from tml.ops.expert_blocks import multiply_blocks
from tml.ops.expert_rows import multiply_sorted
from tml.ops.grouped_matmul import (
    BlockPlan,
    collect,
    dispatch,
    grouped_matmul,
    kernels_of,
    plan_blocks,
    plan_of_rows,
)
from tml.ops.projection import project
from tml.ops.ragged_exchange import AXIS, bring_back, plan_exchange, send
from tml.ops.sorted_copies import count_copies, sort_copies


class Dispatched(NamedTuple):
    """What experts give.

    Attributes:
        out_TD: the gated sum over each token's choices, and over the shared experts.
        num_dropped: copies that found no room, of this device's tokens or among this device's experts.
    """

    out_TD: Float[Array, "t D"]
    num_dropped: Int32[Array, ""]


SharedFunction = Callable[[Float[Array, "t D"], Mapping[str, Any], Float[Array, "t A"]], Float[Array, "t D"]]
"""(tokens, weights, gate of each shared expert) to the gated sum over the shared experts."""


class SharedExperts(NamedTuple):
    """The shared experts of a layer: what a device computes of its own tokens alone.

    Attributes:
        function: how they run.
        weights: their matrices.
        gates_TA: each token's gates.
    """

    function: SharedFunction
    weights: Mapping[str, Any]
    gates_TA: Float[Array, "t A"]


def with_shared(shared: SharedExperts | None, routed: Dispatched, h_TD: Float[Array, "t D"]) -> Dispatched:
    """The sum of shared experts, if there are any, on top of the routed ones'."""
    if shared is None:
        return routed
    return routed._replace(out_TD=routed.out_TD + shared.function(h_TD, shared.weights, shared.gates_TA))


ExpertFunction = Callable[
    [
        Mapping[str, Any],
        Float[Array, "t D"],
        Float[Array, "t k"],
        Int32[Array, "t k"],
        MoEConfig,
        SharedExperts | None,
    ],
    Dispatched,
]
"""(weights, tokens, gate of each choice, expert of each choice, config, shared experts) to the gated sum over all.

Weights are arrays, or in live sessions `LayerOfStack`s."""


def expert_function(cfg: MoEConfig, mesh: MeshConfig) -> ExpertFunction:
    """The way experts run on training rows: `cfg.dispatch` where a mesh splits experts, else on the device's own."""
    strategy = dense_experts if cfg.backend is MatmulBackend.DENSE else sorted_experts
    if mesh.expert > 1 and cfg.dispatch is ExpertDispatch.RING:
        by_blocks = cfg.backend is MatmulBackend.BLOCKED
        strategy = functools.partial(ring_by_blocks if by_blocks else ring_by_kernels, mesh=mesh)
    if mesh.expert > 1 and cfg.dispatch is ExpertDispatch.RAGGED_ALL_TO_ALL:
        strategy = functools.partial(ragged_experts, mesh=mesh)
    return jax.named_scope("experts")(strategy)


def keeps_experts_split(cfg: MoEConfig, mesh: MeshConfig) -> bool:
    """Whether a layer runs with this device's experts alone, instead of gathering all of them."""
    return mesh.expert > 1 and cfg.dispatch != ExpertDispatch.GATHERED_WEIGHTS


def dense_experts(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    cfg: MoEConfig,
    shared: SharedExperts | None,
) -> Dispatched:
    """The definition: every expert on every token, weighted by its gate or by zero."""
    both = jnp.einsum("tD,EDZF->tEZF", h_TD, weights["gate_up"])
    out_TED = jnp.einsum("tEF,EFD->tED", jax.nn.silu(both[:, :, 0]) * both[:, :, 1], weights["down"])
    choice_TKE = jax.nn.one_hot(experts_TK, cfg.num_experts, dtype=gates_TK.dtype)
    routed = Dispatched(jnp.einsum("tED,tk,tkE->tD", out_TED, gates_TK, choice_TKE), jnp.int32(0))
    return with_shared(shared, routed, h_TD)


def sorted_experts(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    cfg: MoEConfig,
    shared: SharedExperts | None,
) -> Dispatched:
    """All experts are here: copies sorted by expert, so that cost follows active experts."""
    if cfg.backend is not MatmulBackend.BLOCKED:
        return kernel_experts(weights, h_TD, gates_TK, experts_TK, experts_TK.size, experts_TK.size, cfg, shared)
    plan = plan_blocks(experts_TK, cfg.num_experts, cfg.block_rows)
    return with_shared(shared, Dispatched(blocked_experts(weights, h_TD, gates_TK, plan), jnp.int32(0)), h_TD)


def blocked_experts(
    weights: Mapping[str, jax.Array], h_TD: Float[Array, "t D"], gates_TK: Float[Array, "t k"], plan: BlockPlan
) -> Float[Array, "t D"]:
    """The experts here on their copies, by XLA."""
    return multiply_blocks(h_TD, gates_TK, _fused(weights["gate_up"]), weights["down"], plan)


def kernel_experts(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "g k"],
    experts_TK: Int32[Array, "g k"],
    num_rows: int,
    usual_rows: int,
    cfg: MoEConfig,
    shared: SharedExperts | None,
    axis: str | None = None,
) -> Dispatched:
    """The experts here on their copies, at most `num_rows` of them, by a platform's kernels.

    XLA wants whole blocks of one expert each; kernels begin a tile where an expert begins.

    Args:
        weights: those of the experts here.
        h_TD: this device's tokens.
        gates_TK: gate of each choice of all tokens along the axis.
        experts_TK: which of the experts here; negative for those that are elsewhere.
        num_rows: copies that find room.
        usual_rows: copies at balanced load, for the stated cost.
        cfg: the experts.
        shared: what is added.
        axis: mesh axis along which tokens come together; none where they are all here.
    """
    find_rows = count_copies if cfg.backend is MatmulBackend.GPU else sort_copies
    plan, gate_R = find_rows(experts_TK, gates_TK, weights["down"].shape[0], num_rows)
    # As the matrices are gathered: with the split dimension before the other (`collectives.gather_params`).
    down_EDF = weights["down"].swapaxes(1, 2)
    kernels, gate_up_EDF = kernels_of(cfg.backend, usual_rows), _fused(weights["gate_up"])
    beside, *beside_args = (None,) if shared is None else shared
    out_TD = multiply_sorted(kernels, axis, beside, h_TD, gate_R, gate_up_EDF, down_EDF, plan, tuple(beside_args))
    return Dispatched(out_TD, plan.num_dropped)


def ring_by_kernels(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    cfg: MoEConfig,
    shared: SharedExperts | None,
    mesh: MeshConfig,
) -> Dispatched:
    """The group's tokens come to every device, which adds up its own experts' share; the sums go back to the tokens.

    Wins when a token chooses many experts compared to the size of the group.
    """
    balanced = experts_TK.size
    gates_TK, place_TK = _choices_here(gates_TK, experts_TK, cfg, mesh)
    num_rows = buffer_rows(balanced, cfg, mesh)
    return kernel_experts(weights, h_TD, gates_TK, place_TK, num_rows, balanced, cfg, shared, AXIS)


def ring_by_blocks(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    cfg: MoEConfig,
    shared: SharedExperts | None,
    mesh: MeshConfig,
) -> Dispatched:
    """The same by XLA."""
    num_blocks = buffer_blocks(experts_TK.size, cfg, mesh)
    gates_TK, place_TK = _choices_here(gates_TK, experts_TK, cfg, mesh)
    plan = plan_blocks(place_TK, cfg.num_experts // mesh.expert, cfg.block_rows, num_blocks)
    out_TD = blocked_experts(weights, _of_group(h_TD), gates_TK, plan)
    num_placed = jnp.sum((plan.row_of_copy < num_blocks * cfg.block_rows).astype(jnp.int32))
    num_dropped = jnp.sum((place_TK >= 0).astype(jnp.int32)) - num_placed
    routed = Dispatched(jax.lax.psum_scatter(out_TD, AXIS, scatter_dimension=0, tiled=True), num_dropped)
    return with_shared(shared, routed, h_TD)


def _of_group(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, AXIS, axis=0, tiled=True)


def _choices_here(
    gates_TK: jax.Array, experts_TK: jax.Array, cfg: MoEConfig, mesh: MeshConfig
) -> tuple[jax.Array, jax.Array]:
    """Gates of all tokens of the group, and which of the experts here each choice is; -1 for those elsewhere."""
    num_local = cfg.num_experts // mesh.expert
    place_TK = _of_group(experts_TK) - index_along(AXIS, mesh) * num_local
    return _of_group(gates_TK), jnp.where((place_TK >= 0) & (place_TK < num_local), place_TK, -1)


def ragged_experts(
    weights: Mapping[str, jax.Array],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    cfg: MoEConfig,
    shared: SharedExperts | None,
    mesh: MeshConfig,
) -> Dispatched:
    """Each copy goes to the device of its expert, right into the expert's blocks, and its result comes back."""
    num_copies = experts_TK.size
    plan = plan_blocks(experts_TK, cfg.num_experts, 1, num_copies)
    counts_E = jnp.sum(jax.nn.one_hot(experts_TK.reshape(-1), cfg.num_experts, dtype=jnp.int32), axis=0)
    counts_GE = jax.lax.all_gather(counts_E, AXIS)
    num_blocks = buffer_blocks(num_copies, cfg, mesh)
    exchange = plan_exchange(counts_GE, index_along(AXIS, mesh), cfg.block_rows, num_blocks, num_copies)
    down = run_blocks(weights, send(dispatch(h_TD, plan), exchange), exchange.expert_of_block, cfg)
    out_TKD = collect(bring_back(down, exchange), plan)
    routed = Dispatched(jnp.sum(out_TKD * gates_TK[:, :, None], axis=1), exchange.num_dropped)
    return with_shared(shared, routed, h_TD)


def buffer_blocks(balanced_copies: int, cfg: MoEConfig, mesh: MeshConfig) -> int:
    """Blocks for `capacity_factor` times the balanced load, but no more than for all copies of the group.

    One block an expert is added, because the last block of every expert may be half empty.
    """
    return buffer_rows(balanced_copies, cfg, mesh) // cfg.block_rows + cfg.num_experts // mesh.expert


def buffer_rows(balanced_copies: int, cfg: MoEConfig, mesh: MeshConfig) -> int:
    """Rows, in whole blocks, for `capacity_factor` times the balanced load, but no more than all copies of the group.

    For kernels, which want no block of one expert, these are the rows.
    """
    factor = min(cfg.capacity_factor, mesh.expert)
    return math.ceil(factor * balanced_copies / cfg.block_rows) * cfg.block_rows


def output_projection(out_BSNH: Float[Array, "B S N H"], o_NHD: Float[Array, "N H D"]) -> Float[Array, "B S D"]:
    """Attention's output projection, from all heads to the model's width."""
    return project(out_BSNH, o_NHD, num_summed=2)


@jax.named_scope("shared_experts")
def shared_experts(
    h_TD: Float[Array, "t D"], weights: Mapping[str, jax.Array], gates_TA: Float[Array, "t A"]
) -> Float[Array, "t D"]:
    """Every shared expert on every token, as two plain matmuls, the second of which adds the experts up in float32.

    With an axis of experts XLA makes a convolution of them, which took a fifth of the 276B step on v5p.
    """
    dtype, num_experts, dim = h_TD.dtype, gates_TA.shape[1], h_TD.shape[1]
    if h_TD.shape[0] < dim:
        # Fewer tokens than a matrix has rows: to lay the matrices side by side would take longer than to multiply.
        both = [kept(project(h_TD, gate_up_DZF.reshape(dim, -1))) for gate_up_DZF in weights["gate_up"]]
        halves = [half for pair in both for half in jnp.split(pair, 2, axis=1)]
    else:
        gate_up_DAZF = jnp.moveaxis(weights["gate_up"], 0, 1)
        halves = jnp.split(kept(project(h_TD, gate_up_DAZF.reshape(dim, -1))), 2 * num_experts, axis=1)
    pairs = zip(halves[::2], halves[1::2], range(num_experts), strict=True)
    hidden = [jax.nn.silu(gate) * up * gates_TA[:, expert, None].astype(dtype) for gate, up, expert in pairs]
    return project(jnp.concatenate(hidden, axis=1), weights["down"].reshape(-1, dim))


def run_blocks(
    weights: Mapping[str, jax.Array], x_RD: Float[Array, "r D"], expert_of_block: Int32[Array, "C"], cfg: MoEConfig
) -> Float[Array, "r D"]:
    """The gated MLP of each block's expert over the block's rows: all that a strategy asks of the matmuls."""
    if cfg.backend is MatmulBackend.BLOCKED:
        return blocked_experts(weights, x_RD, jnp.ones_like(x_RD[:, :1]), plan_of_rows(x_RD.shape[0], expert_of_block))
    # Blocks stand in the order of their experts.
    owner_CE = jax.nn.one_hot(expert_of_block, weights["down"].shape[0], dtype=jnp.int32)
    group_sizes_E = jnp.sum(owner_CE, axis=0) * (x_RD.shape[0] // expert_of_block.shape[0])
    multiply = functools.partial(grouped_matmul, group_sizes_E=group_sizes_E, backend=cfg.backend)
    gate, up = jnp.split(multiply(x_RD, _fused(weights["gate_up"])), 2, axis=-1)
    return multiply(jax.nn.silu(gate) * up, weights["down"])


def _fused(gate_up_EDZF: Float[Array, "E D Z F"]) -> Float[Array, "E D f"]:
    return gate_up_EDZF.reshape(*gate_up_EDZF.shape[:2], -1)
