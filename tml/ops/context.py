"""Rows split along the sequence over `mesh.context`: how each operation looks back over the devices' borders.

A short convolution and sliding attention borrow the few slots before their own (a halo). Global
attention trades the split of the sequence for one of the heads and back (all-to-all, as in DeepSpeed
Ulysses, Jacobs et al. 2023): every device attends over whole rows with its share of the heads, so
causal work is spread evenly and any kernel for whole rows serves.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tml.config import MeshConfig
from tml.ops.collectives import swap_split, with_halo
from tml.ops.short_conv import short_conv_rows

NO_SEGMENT = -1
"""Segment of the slots before a row's start, which no query belongs to."""

Convolve = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(inputs, taps, positions) to outputs, as `short_conv_rows`."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(q, k, v, r, profiles, segment ids) to outputs, as `attend` with a window and a back-end."""


def conv_over_shards(mesh: MeshConfig) -> Convolve:
    """The short convolution of rows of which each device along `context` holds a part."""

    def convolve(
        x_BSD: Float[Array, "B s D"], taps_YD: Float[Array, "Y D"], positions_BS: Int32[Array, "B s"]
    ) -> Float[Array, "B s D"]:
        halo = taps_YD.shape[0] - 1
        # The halo's own outputs are not used, so neither are its positions.
        positions_BT = jnp.pad(positions_BS, ((0, 0), (halo, 0)))
        return short_conv_rows(with_halo(x_BSD, halo, 0, mesh), taps_YD, positions_BT)[:, halo:]

    return convolve


def sliding_over_shards(attend: Attend, window: int, mesh: MeshConfig) -> Attend:
    """Sliding attention of a part of the rows: keys and values of the window before it are borrowed.

    `attend` gets as many queries as keys; those of the halo are zeros and their outputs are dropped.
    """
    halo = window - 1

    def over_shards(
        q_BSNH: Float[Array, "B s N H"],
        k_BSKH: Float[Array, "B s K H"],
        v_BSKH: Float[Array, "B s K H"],
        r_BSNJ: Float[Array, "B s N J"],
        profiles_JX: Float[Array, "J X"],
        segment_ids_BS: Int32[Array, "B s"],
    ) -> Float[Array, "B s N H"]:
        q, r = (jnp.pad(x, ((0, 0), (halo, 0), (0, 0), (0, 0))) for x in (q_BSNH, r_BSNJ))
        k, v = (with_halo(x, halo, 0, mesh) for x in (k_BSKH, v_BSKH))
        segments = with_halo(segment_ids_BS, halo, NO_SEGMENT, mesh)
        return attend(q, k, v, r, profiles_JX, segments)[:, halo:]

    return over_shards


def global_over_shards(attend: Attend, mesh: MeshConfig) -> Attend:
    """Global attention of a part of the rows: over whole rows, with this device's share of the heads.

    Key and value heads are repeated where there are fewer than devices along `context`.
    """

    def over_shards(
        q_BSNH: Float[Array, "B s N H"],
        k_BSKH: Float[Array, "B s K H"],
        v_BSKH: Float[Array, "B s K H"],
        r_BSNJ: Float[Array, "B s N J"],
        profiles_JX: Float[Array, "J X"],
        segment_ids_BS: Int32[Array, "B s"],
    ) -> Float[Array, "B s N H"]:
        repeats = mesh.context // math.gcd(k_BSKH.shape[2], mesh.context)
        k_BSKH, v_BSKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BSKH, v_BSKH))
        q, k, v, r = (swap_split(x, 2, 1) for x in (q_BSNH, k_BSKH, v_BSKH, r_BSNJ))
        segments = jax.lax.all_gather(segment_ids_BS, "context", axis=1, tiled=True)
        return swap_split(attend(q, k, v, r, profiles_JX, segments), 1, 2)

    return over_shards
