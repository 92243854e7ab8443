"""How live sessions read large weights: where they lie in their stacks, and of experts only those that a token chose.

No session can change another's bits, whichever way.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from tml.config import MatmulBackend, MoEConfig
from tml.model.expert_dispatch import (
    Dispatched,
    ExpertFunction,
    SharedExperts,
    SharedFunction,
    output_projection,
    shared_experts,
    with_shared,
)
from tml.ops.grouped_matmul import LAYER_KERNELS
from tml.params import PyTree


class LayerOfStack(NamedTuple):
    """One layer's matrices within the stack of a stage, which are read where they are.

    Attributes:
        stack: those of all the stage's layers, [L, E, ...].
        layer: which of them.
    """

    stack: jax.Array
    layer: jax.Array | int

    def astype(self, dtype: DTypeLike) -> "LayerOfStack":
        """The same in another dtype; of the same dtype, untouched."""
        return LayerOfStack(self.stack.astype(dtype), self.layer)

    def cut(self) -> jax.Array:
        """The layer's matrices by themselves."""
        return self.stack[self.layer]

    def one(self, expert: jax.Array) -> jax.Array:
        """One expert's matrix by itself."""
        return self.stack[self.layer, expert]


WITHIN_STACKS = {
    "attention": ("o",),
    "mlp": ("gate_up", "down", "shared_gate_up", "shared_down"),
}
"""Matrices that are read where they are in their stacks; XLA would cut them out before it multiplies them."""


def params_of_layer(stacked: Mapping[str, PyTree], index: jax.Array | int) -> dict[str, PyTree]:
    """The parameters of one layer of a stage; those of `WITHIN_STACKS` as whole stacks and the layer's place."""

    def of_part(part: str, params: PyTree) -> PyTree:
        # A dense MLP has no experts.
        within = WITHIN_STACKS.get(part, ()) if part != "mlp" or "router" in params else ()
        if not within:
            return jax.tree.map(lambda leaf: leaf[index], params)
        return {name: LayerOfStack(leaf, index) if name in within else leaf[index] for name, leaf in params.items()}

    return {part: of_part(part, params) for part, params in stacked.items()}


def experts_chosen(num_tokens: int, cfg: MoEConfig) -> float:
    """Distinct experts that so many tokens choose in one layer, if all are as likely: E (1 - (1 - k/E)^n)."""
    return cfg.num_experts * (1 - (1 - cfg.num_experts_per_token / cfg.num_experts) ** num_tokens)


def streaming_experts(valid_BW: Bool[Array, "B W"], backend: MatmulBackend) -> ExpertFunction:
    """The way experts run on the next slots of live sessions: only chosen ones are read, by a kernel or one by one."""

    def run(
        weights: Mapping[str, LayerOfStack],
        h_TD: jax.Array,
        gates_TK: jax.Array,
        experts_TK: jax.Array,
        cfg: MoEConfig,
        shared: SharedExperts | None,
    ) -> Dispatched:
        valid_T = valid_BW.reshape(-1)
        with jax.named_scope("experts"):
            if backend not in LAYER_KERNELS:
                routed = chosen_experts(weights, h_TD, gates_TK, experts_TK, valid_T, cfg)
            else:
                usual = experts_chosen(valid_T.size, cfg)
                routed = served_experts(weights, h_TD, gates_TK, experts_TK, valid_T, usual, backend)
        return with_shared(shared, routed, h_TD)

    return run


def chosen_experts(
    weights: Mapping[str, LayerOfStack],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    valid_T: Bool[Array, "t"],
    cfg: MoEConfig,
) -> Dispatched:
    """Streaming: the experts that any valid token chose, one after another on all tokens; no others are read.

    A token adds up its own experts in their order and selects nothing of the others, so that no session can change
    another's bits. XLA on CPU multiplies an expert's matrices where they lie; gathered, it writes them out transposed.
    """
    is_choice_TKE = experts_TK[:, :, None] == jnp.arange(cfg.num_experts, dtype=jnp.int32)[None, None]
    is_chosen_ET = jnp.any(is_choice_TKE, axis=1).T
    gate_ET = jnp.sum(jnp.where(is_choice_TKE, gates_TK[:, :, None], 0), axis=1).T
    is_needed_E = jnp.any(is_chosen_ET & valid_T[None], axis=1)
    needed_first_E = jnp.argsort(~is_needed_E, stable=True)

    def add(expert: jax.Array, out_TD: jax.Array) -> jax.Array:
        gate_TF, up_TF = jnp.split(h_TD @ weights["gate_up"].one(expert).reshape(h_TD.shape[1], -1), 2, axis=1)
        own_TD = (jax.nn.silu(gate_TF) * up_TF) @ weights["down"].one(expert)
        return out_TD + jnp.where(is_chosen_ET[expert][:, None], own_TD * gate_ET[expert][:, None], 0)

    def add_if_needed(place: jax.Array, out_TD: jax.Array) -> jax.Array:
        expert = needed_first_E[place]
        return jax.lax.cond(is_needed_E[expert], add, lambda _, out_TD: out_TD, expert, out_TD)

    # As often as there can be chosen experts, not as there are: a plan must be able to count it.
    most = min(experts_TK.size, cfg.num_experts)
    return Dispatched(jax.lax.fori_loop(0, most, add_if_needed, jnp.zeros_like(h_TD)), jnp.int32(0))


def served_experts(
    weights: Mapping[str, LayerOfStack],
    h_TD: Float[Array, "t D"],
    gates_TK: Float[Array, "t k"],
    experts_TK: Int32[Array, "t k"],
    is_valid_T: Bool[Array, "t"],
    usual_experts: float,
    backend: MatmulBackend,
) -> Dispatched:
    """Streaming: copies sorted by expert, so that a kernel reads the matrices of every chosen expert once.

    The choices of slots that are not valid belong to no expert; `usual_experts` are those that the stated cost counts.
    """
    (num_tokens, num_choices), num_experts = experts_TK.shape, weights["down"].stack.shape[1]
    # Choice by choice: so the sum over them, in the end, is over the first axis.
    expert_C = jnp.where(is_valid_T[:, None], experts_TK, num_experts).T.reshape(-1)
    copy_C = jnp.arange(expert_C.size, dtype=jnp.int32)
    sorted_C, copy_R = jax.lax.sort((expert_C, copy_C), num_keys=1, is_stable=True)
    _, row_C = jax.lax.sort((copy_R, copy_C), num_keys=1)
    sizes_E = jnp.sum(jax.nn.one_hot(sorted_C, num_experts, dtype=jnp.int32), axis=0)
    y_RD = _gated_mlps(weights, h_TD[copy_R % num_tokens], sizes_E, usual_experts, backend)
    out_KTD = y_RD[row_C].reshape(num_choices, num_tokens, -1) * gates_TK.T[:, :, None]
    # What kernels leave in rows of no expert need not be a number.
    return Dispatched(jnp.where(is_valid_T[:, None], jnp.sum(out_KTD, axis=0), 0), jnp.int32(0))


def _gated_mlps(
    weights: Mapping[str, LayerOfStack],
    x_RD: Float[Array, "r D"],
    sizes_E: Int32[Array, "E"],
    usual_experts: float,
    backend: MatmulBackend,
) -> Float[Array, "r D"]:
    """The gated MLP of each row's expert, rows being sorted by expert."""
    multiply = functools.partial(LAYER_KERNELS[backend], usual_groups=usual_experts)
    gate_up, down = weights["gate_up"], weights["down"]
    both_RF = multiply(x_RD, jnp.swapaxes(gate_up.stack, 2, 3), gate_up.layer, sizes_E)
    gate_RF, up_RF = jnp.split(both_RF, 2, axis=1)
    return multiply(jax.nn.silu(gate_RF) * up_RF, down.stack[:, :, None], down.layer, sizes_E)


def streaming_shared_experts(backend: MatmulBackend) -> SharedFunction:
    """The way shared experts run in live sessions: for a kernel, they are experts that every token chooses."""

    @jax.named_scope("shared_experts")
    def run(h_TD: jax.Array, weights: Mapping[str, LayerOfStack], gates_TA: jax.Array) -> jax.Array:
        if backend not in LAYER_KERNELS:
            return shared_experts(h_TD, {name: each.cut() for name, each in weights.items()}, gates_TA)
        num_tokens, num_shared = gates_TA.shape
        sizes_A = jnp.full(num_shared, num_tokens, jnp.int32)
        y_RD = _gated_mlps(weights, jnp.concatenate([h_TD] * num_shared), sizes_A, float(num_shared), backend)
        y_ATD = y_RD.reshape(num_shared, num_tokens, -1)
        return jnp.sum(y_ATD * gates_TA.T.astype(h_TD.dtype)[:, :, None], axis=0)

    return run


def streaming_output_projection(backend: MatmulBackend) -> Callable[..., jax.Array]:
    """Attention's output projection in live sessions: for a kernel, its matrix is the one expert of all tokens."""

    def run(out_BWNH: jax.Array, o: LayerOfStack) -> jax.Array:
        if backend not in LAYER_KERNELS:
            return output_projection(out_BWNH, o.cut())
        rows_RD = out_BWNH.reshape(math.prod(out_BWNH.shape[:2]), -1)
        o_LEZDF = o.stack.reshape(o.stack.shape[0], 1, 1, rows_RD.shape[1], -1)
        sizes_E = jnp.full(1, rows_RD.shape[0], jnp.int32)
        out_RD = LAYER_KERNELS[backend](rows_RD, o_LEZDF, o.layer, sizes_E, usual_groups=1.0)
        return out_RD.reshape(*out_BWNH.shape[:2], -1)

    return run
