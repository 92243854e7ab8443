"""What differs between a training row and a live stream: how a layer looks back, and how experts are run.

A layer is written once (`tml.model.block`); `LayerFunctions` gives it the parts that depend on
whether all positions are there at once or arrive a micro-turn at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from tml.config import AttentionConfig, MeshConfig, ModelConfig
from tml.model.expert_dispatch import (
    ExpertFunction,
    SharedFunction,
    expert_function,
    output_projection,
    shared_experts,
)
from tml.ops import context
from tml.ops.attention import attend
from tml.ops.collectives import sum_over
from tml.ops.short_conv import short_conv_rows
from tml.params import Leaf, PyTree

Bias = tuple[Float[Array, "B S N J"], Float[Array, "J X"]]
"""The relative bias, not yet multiplied out: what each query mixes, and the profiles by distance."""


@flax.struct.dataclass
class LayerState:
    """What the live layers of one place in a stage remember, stacked along L like their parameters.

    Attributes:
        k_LBTKH: key caches: rings on sliding layers.
        v_LBTKH: value caches.
        histories: by convolution name, its last inputs.
    """

    k_LBTKH: Leaf
    v_LBTKH: Leaf
    histories: dict[str, Leaf]


class LiveLayer(NamedTuple):
    """One of those layers. What it writes goes into the stack, in place: no cache is ever cut out or copied.

    Attributes:
        stack: what all of them remember.
        layer: which of them it is.
    """

    stack: LayerState
    layer: jax.Array | int


class LayerFunctions(NamedTuple):
    """The parts of a layer that depend on how positions arrive.

    Attributes:
        positions: position of every slot within its segment or session (B x S).
        valid: slots that hold something; padding does not count as load.
        conv: (name, inputs, taps, state) to (outputs, state).
        attend: (is_global, q, k, v, bias, state) to (outputs, state).
        output_projection: (outputs of all heads, their matrix) to the model's width.
        experts: the expert matmuls.
        shared_experts: those of the shared experts.
        add_shards: sums partial outputs over the devices that split heads or hidden units.
    """

    positions: Int32[Array, "B S"]
    valid: Bool[Array, "B S"]
    conv: Callable[..., tuple[jax.Array, LiveLayer | None]]
    attend: Callable[..., tuple[jax.Array, LiveLayer | None]]
    output_projection: Callable[..., jax.Array]
    experts: ExpertFunction
    shared_experts: SharedFunction
    add_shards: Callable[[jax.Array], jax.Array]


def row_functions(
    segment_ids_BS: Int32[Array, "B S"], positions_BS: Int32[Array, "B S"], cfg: ModelConfig, mesh: MeshConfig
) -> LayerFunctions:
    """For packed rows, or this device's part of them: everything restarts where a segment starts."""
    convolve: context.Convolve = short_conv_rows
    attend_whole: context.Attend = _attend_to(None, cfg.attention)
    attend_window: context.Attend = _attend_to(cfg.attention.window, cfg.attention)
    if mesh.context > 1:
        convolve = context.conv_over_shards(mesh)
        attend_whole = context.global_over_shards(attend_whole, mesh)
        attend_window = context.sliding_over_shards(attend_window, cfg.attention.window, mesh)

    def conv(_: str, x: jax.Array, taps: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        return convolve(x, taps, positions_BS), state

    def look_back(is_global: bool, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias, state: PyTree) -> PyTree:
        function = attend_whole if is_global else attend_window
        return function(q, k, v, *bias, segment_ids_BS), state

    return LayerFunctions(
        positions=positions_BS,
        valid=segment_ids_BS > 0,
        conv=conv,
        attend=look_back,
        output_projection=output_projection,
        experts=expert_function(cfg.moe, mesh),
        shared_experts=shared_experts,
        add_shards=lambda x: sum_over(x, ("tensor",), mesh),
    )


def _attend_to(window: int | None, cfg: AttentionConfig) -> context.Attend:
    def attend_rows(
        q: jax.Array, k: jax.Array, v: jax.Array, r: jax.Array, profiles: jax.Array, segments: jax.Array
    ) -> jax.Array:
        return attend(q, k, v, r, profiles, segments, window, cfg.backend)

    return attend_rows


def log_length_scale(positions: Int32[Array, "B S"], cfg: AttentionConfig) -> Float[Array, "B S"]:
    """Tau: queries of global layers grow with the logarithm of a position beyond the floor."""
    length = (positions + 1).astype(jnp.float32) / cfg.log_scaling_floor
    return 1.0 + cfg.log_scaling_rate * jnp.log(jnp.maximum(length, 1.0))
