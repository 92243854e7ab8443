import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.row_index import pack, permutation, record_order


def first(order, count):
    return [int(order[k]) for k in range(count)]


def test_order_is_a_function_of_the_seed():
    lengths, weights = [30, 20], [2.0, 1.0]
    order = first(record_order(lengths, weights, 3), 200)
    assert order == first(record_order(lengths, weights, 3), 200)
    assert order != first(record_order(lengths, weights, 4), 200)
    again = record_order(lengths, weights, 3)
    assert [int(again[k]) for k in (150, 7, 99)] == [order[k] for k in (150, 7, 99)]


def test_every_pass_holds_each_record_once_in_another_order():
    order = np.array(first(record_order([30, 20], [2.0, 1.0], 3), 180))
    of_first, of_second = order[order < 30], order[order >= 30] - 30
    assert abs(len(of_first) - 120) <= 1
    passes = of_first[:90].reshape(3, 30)
    assert (np.sort(passes, axis=1) == np.arange(30)).all()
    assert len({tuple(row) for row in passes}) == 3
    assert (np.sort(of_second[:20]) == np.arange(20)).all()


def test_neighbouring_seeds_share_no_pass():
    def passes(seed):
        return {tuple(first(record_order([30], [1.0], seed), 90)[k : k + 30]) for k in (0, 30, 60)}

    assert not passes(3) & passes(4)


def test_permutations_are_fair_and_never_change():
    assert permutation(10, "0/0/0").tolist() == [1, 2, 6, 5, 7, 4, 9, 3, 8, 0], "old runs resume in this order"
    counts = np.zeros((5, 5))
    for turn in range(2_000):
        counts[np.arange(5), permutation(5, f"0/0/{turn}")] += 1
    assert (abs(counts - 400) < 80).all(), "four and a half standard deviations"
    assert (np.sort(permutation(1_000, "x")) == np.arange(1_000)).all()


def test_without_a_seed_sources_are_read_in_order():
    order = np.array(first(record_order([3, 2], [3.0, 2.0], None), 10))
    assert order[order < 3].tolist() == [0, 1, 2, 0, 1, 2]
    assert order[order >= 3].tolist() == [3, 4, 3, 4]


@pytest.mark.parametrize("lengths", [[300, 60], [47, 103], [60, 73, 116, 87], [1, 200], [5]])
def test_without_a_seed_a_pass_holds_every_record_once_whatever_the_weights(lengths):
    total = sum(lengths)
    order = first(record_order(lengths, [1.0] * len(lengths), None), 2 * total)
    assert order[:total] == order[total:]
    assert sorted(order[:total]) == list(range(total))
    of_last = [k for k, number in enumerate(order[:total]) if number >= total - lengths[-1]]
    assert abs(np.mean(of_last) - (total - 1) / 2) < total / 20 + 1, "spread over the whole pass"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=400))
def test_rows_are_never_too_full(slots):
    rows = pack(np.array(slots), 100)
    assert np.bincount(rows, weights=slots).max() <= 100
    assert set(rows.tolist()) == set(range(int(rows.max()) + 1))


def test_little_padding():
    slots = np.random.default_rng(0).integers(40, 400, 4_096)
    num_rows = int(pack(slots, 512).max()) + 1
    assert slots.sum() / (num_rows * 512) > 0.95
