"""A checksum of every array of a checkpoint: the same on any mesh, and of parts that are added up."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

SUM_WORDS = 2**22
"""Words of an array that are summed at a time."""


def checksums_of(items: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, int]:
    """The sum of the bits of every array, by path; the same on any mesh, as integers add up in any order."""
    flat = {path: leaf for item in items.values() for path, leaf in item.items()}
    return {path: int(value) for path, value in jax.device_get(_bit_sums(flat)).items()}


@jax.jit
def _bit_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(_bit_sum, leaves)


def _bit_sum(values: jax.Array) -> jax.Array:
    """Sums words, each multiplied by an odd number of its place, so that two that are swapped are noticed."""
    words = jax.lax.bitcast_convert_type(values, f"uint{8 * values.dtype.itemsize}").astype(jnp.uint32)
    places, stride = jnp.ones(words.shape, jnp.uint32), 2
    for axis in reversed(range(words.ndim)):  # no reshape, which would gather a sharded array
        places += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        stride = stride * words.shape[axis] % 2**32
    return jnp.sum(words * places, dtype=jnp.uint32)


def bit_sum_of_part(values: np.ndarray, first: int) -> int:
    """What neighbouring float32 values add to the checksum of an array, in which `first` others stand before them.

    The parts' sums add up to the array's, modulo 2^32.
    """
    words = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    total = 0
    for start in range(0, len(words), SUM_WORDS):
        block = words[start : start + SUM_WORDS]
        places = np.arange(len(block), dtype=np.uint32) * np.uint32(2) + np.uint32((2 * (first + start) + 1) % 2**32)
        total += int(np.sum(block * places, dtype=np.uint32))
    return total % 2**32
