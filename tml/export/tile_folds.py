"""How Inkling's image tower divides its folds: which pixels each layer joins, and how wide it is, from three numbers.

A tile of P x P pixels and T frames is folded prime by prime, space before time, the largest prime first.
Every stage of that chain is a candidate; a tower of n layers picks those whose places shrink most evenly
in the logarithm. Source: `plan_out_scales` of transformers' `modeling_inkling.py`.
"""

import itertools
import math

import numpy as np
from scipy.optimize import linear_sum_assignment

COLOURS = 3
WIDTH_MULTIPLE = 64
"""Widths are rounded up to a multiple of this."""


def plan(tile_px: int, frames_per_tile: int, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The folds of space of a tower, and their widths; its last layer folds time.

    Args:
        tile_px: side of a tile.
        frames_per_tile: frames of a tile.
        num_layers: layers of the tower, that of time included.

    Raises:
        ValueError: the tower would not fold space alone in all layers but the last, and time alone in that.

    Example:
        >>> plan(40, 2, 4)
        ((5, 2, 4), (128, 320, 4800))
    """
    sides = np.cumprod([1, *reversed(_primes(tile_px))])
    frames = np.cumprod([1, *reversed(_primes(frames_per_tile))])
    stages = [(1, int(side)) for side in sides] + [(int(count), tile_px) for count in frames[1:]]
    joined = np.array([count * side**2 for count, side in stages], np.float64)
    wanted = np.linspace(0.0, math.log(tile_px**2 * frames_per_tile * COLOURS), num_layers + 1)
    cost = np.abs(wanted[:, None] - np.log(joined)[None])
    if num_layers >= len(stages):
        chosen = np.argmin(cost, axis=1)
    else:
        _, chosen = linear_sum_assignment(cost)
    chosen[0], chosen[-1] = 0, len(stages) - 1
    picked = [stages[place] for place in chosen]
    folds = [(after[0] // before[0], after[1] // before[1]) for before, after in itertools.pairwise(picked)]
    *space, last = folds
    if any(time != 1 for time, _ in space) or last != (frames_per_tile, 1):
        raise ValueError(
            f"an image tower of {num_layers} layers over {frames_per_tile} frames of {tile_px} pixels folds "
            f"(frames, pixels) by {folds}, but this one folds pixels alone in all layers before the last, and "
            f"frames alone in that"
        )
    return tuple(fold for _, fold in space), tuple(_width(side) for _, side in picked[1:-1])


def is_planned(tile_px: int, frames_per_tile: int, folds: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    """Whether a tower with these folds of space and widths is the one that Inkling's config.json would name."""
    try:
        return plan(tile_px, frames_per_tile, len(folds[0]) + 1) == folds
    except ValueError:
        return False


def _width(side: int) -> int:
    """The width of what `side` x `side` pixels became; a layer that has joined none keeps the colours."""
    return COLOURS if side == 1 else math.ceil(side**2 * COLOURS / WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def _primes(number: int) -> list[int]:
    """The prime factors, smallest first."""
    found, prime = [], 2
    while number > 1:
        while number % prime == 0:
            found.append(prime)
            number //= prime
        prime += 1
    return found
