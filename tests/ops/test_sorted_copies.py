"""Rows sorted by expert, against loops over copies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tml.ops.sorted_copies import count_copies, sort_copies

EXPERTS, CHOICES = 5, 2
FIND_ROWS = {"sorted": sort_copies, "counted": count_copies}


def routing(num_tokens: int) -> np.ndarray:
    """Experts of every token, some of them elsewhere; expert 2 has none."""
    drawn = np.random.default_rng(0).integers(-2, EXPERTS, (num_tokens, CHOICES))
    return np.where(drawn == 2, -1, drawn).astype(np.int32)


def rows_of(experts: np.ndarray, num_rows: int) -> list[int]:
    """The copy in every row, by a loop."""
    flat = experts.reshape(-1)
    return [copy for expert in range(EXPERTS) for copy in np.flatnonzero(flat == expert)][:num_rows]


@pytest.mark.parametrize("find_rows", FIND_ROWS.values(), ids=FIND_ROWS.keys())
@pytest.mark.parametrize("num_rows", [8, 64, 1024], ids=["too few", "some over", "more than copies"])
def test_rows_hold_the_copies_of_each_expert_in_turn(num_rows: int, find_rows) -> None:
    experts, gates = routing(60), np.random.default_rng(1).random((60, CHOICES), np.float32)
    copies = rows_of(experts, num_rows)
    plan, gate_R = jax.jit(find_rows, static_argnums=(2, 3))(jnp.asarray(experts), gates, EXPERTS, num_rows)
    np.testing.assert_array_equal(np.flatnonzero(plan.is_row), np.arange(len(copies)))
    np.testing.assert_array_equal(plan.token_of_row[: len(copies)], np.array(copies) // CHOICES)
    np.testing.assert_array_equal(gate_R, np.pad(gates.reshape(-1)[copies], (0, num_rows - len(copies))))
    owners = experts.reshape(-1)[copies]
    np.testing.assert_array_equal(plan.group_sizes_E, [(owners == expert).sum() for expert in range(EXPERTS)])
    assert int(plan.num_dropped) == (experts >= 0).sum() - len(copies)


@pytest.mark.parametrize("num_tokens", [70, 70_000], ids=["one block", "blocks of blocks"])
def test_counting_finds_the_rows_of_sorting(num_tokens: int) -> None:
    experts, gates = routing(num_tokens), jnp.ones((num_tokens, CHOICES))
    find = functools.partial(jax.jit, static_argnums=(2, 3))
    by_sort, by_count = (find(f)(jnp.asarray(experts), gates, EXPERTS, num_tokens)[0] for f in FIND_ROWS.values())
    num_rows = int(by_sort.group_sizes_E.sum())
    assert int(by_sort.num_dropped) > 0
    for name in ("token_of_row", "row_by_token", "place_by_token"):
        np.testing.assert_array_equal(getattr(by_sort, name)[:num_rows], getattr(by_count, name)[:num_rows], name)
    for name in ("is_row", "group_sizes_E", "block_sizes", "num_dropped"):
        np.testing.assert_array_equal(getattr(by_sort, name), getattr(by_count, name), name)
    assert sorted(by_count.row_by_token.tolist()) == list(range(num_tokens))
