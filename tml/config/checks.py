"""The checks every config dataclass shares; each error names the value, the limit and the way out."""

import math
from typing import Any


def check_positive(owner: str, **fields: float | int) -> None:
    """Raises ValueError unless every named field is greater than zero."""
    for name, value in fields.items():
        if not value > 0:
            raise ValueError(f"{owner}.{name} = {value} must be greater than 0")


def check_not_negative(owner: str, **fields: float | int) -> None:
    """Raises ValueError when a named field is negative, or not finite."""
    for name, value in fields.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{owner}.{name} = {value} must be 0 or greater, and finite")


def check_fraction(owner: str, **fields: float | int) -> None:
    """Raises ValueError unless every named field lies in [0, 1]."""
    for name, value in fields.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{owner}.{name} = {value} must lie between 0 and 1")


def check_below_one(owner: str, **fields: float) -> None:
    """Raises ValueError unless every named field is less than one, as the decay of an average must be."""
    for name, value in fields.items():
        if not value < 1:
            raise ValueError(f"{owner}.{name} = {value} must be less than 1")


def nearest_multiple(value: int, of: int) -> int:
    """The positive multiple of `of` that lies nearest to `value`."""
    return max(of, round(value / of) * of)


def check_multiple(name: str, value: int, of_name: str, of: int) -> None:
    """Raises ValueError, with the nearest valid choice, unless `value` is a multiple of `of`."""
    if value % of:
        raise ValueError(
            f"{name} = {value} is not a multiple of {of_name} = {of}; the nearest valid value is "
            f"{nearest_multiple(value, of)}"
        )


def check_at_most(name: str, value: Any, limit_name: str, limit: Any) -> None:
    """Raises ValueError when `value` exceeds `limit`."""
    if value > limit:
        raise ValueError(f"{name} = {value} exceeds {limit_name} = {limit}")
