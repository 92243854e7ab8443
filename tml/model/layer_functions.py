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

from tml.config import AttentionBackend, AttentionConfig, MatmulBackend, ModelConfig
from tml.model.moe import EXPERT_FUNCTIONS, ExpertFunction
from tml.ops.attention import attend
from tml.ops.short_conv import short_conv_rows
from tml.params import Leaf, PyTree

Bias = tuple[Float[Array, "B S N J"], Float[Array, "J X"]]
"""The relative bias, not yet multiplied out: what each query mixes, and the profiles by distance."""


@flax.struct.dataclass
class LayerState:
    """What a live layer remembers.

    Attributes:
        k_BTKH: key cache: a ring on sliding layers.
        v_BTKH: value cache.
        histories: by convolution name, its last inputs.
    """

    k_BTKH: Leaf
    v_BTKH: Leaf
    histories: dict[str, Leaf]


class LayerFunctions(NamedTuple):
    """The parts of a layer that depend on how positions arrive.

    Attributes:
        positions: position of every slot within its segment or session (B x S).
        valid: slots that hold something; padding does not count as load.
        conv: (name, inputs, taps, state) to (outputs, state).
        attend: (is_global, q, k, v, bias, state) to (outputs, state).
        experts: the expert matmuls.
    """

    positions: Int32[Array, "B S"]
    valid: Bool[Array, "B S"]
    conv: Callable[[str, jax.Array, jax.Array, LayerState | None], tuple[jax.Array, LayerState | None]]
    attend: Callable[..., tuple[jax.Array, LayerState | None]]
    experts: ExpertFunction


def row_functions(
    segment_ids_BS: Int32[Array, "B S"], positions_BS: Int32[Array, "B S"], cfg: ModelConfig
) -> LayerFunctions:
    """For packed rows: everything restarts where a segment starts."""
    backend = AttentionBackend(cfg.attention.backend)

    def conv(_: str, x: jax.Array, taps: jax.Array, state: PyTree) -> tuple[jax.Array, PyTree]:
        return short_conv_rows(x, taps, positions_BS), state

    def look_back(is_global: bool, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias, state: PyTree) -> PyTree:
        window = None if is_global else cfg.attention.window
        return attend(q, k, v, *bias, segment_ids_BS, window, backend), state

    return LayerFunctions(
        positions=positions_BS,
        valid=segment_ids_BS > 0,
        conv=conv,
        attend=look_back,
        experts=EXPERT_FUNCTIONS[MatmulBackend(cfg.moe.backend)],
    )


def log_length_scale(positions: Int32[Array, "B S"], cfg: AttentionConfig) -> Float[Array, "B S"]:
    """Tau: queries of global layers grow with the logarithm of a position beyond the floor."""
    length = (positions + 1).astype(jnp.float32) / cfg.log_scaling_floor
    return 1.0 + cfg.log_scaling_rate * jnp.log(jnp.maximum(length, 1.0))
