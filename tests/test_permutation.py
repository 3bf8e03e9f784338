"""A fresh order of rows: a permutation, uniform, and another one each time."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chi2

from privacy.permutation import random_order


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 1000, 100_000])
def test_every_row_once(rows: int) -> None:
    order = random_order(rows)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(rows))


def test_fresh_each_time() -> None:
    assert not np.array_equal(random_order(30), random_order(30))  # else 1 / 30!


def test_uniform_over_all_orders_of_four() -> None:
    """12,000 draws over 24 orders; a lexsort on the wrong key, or a shuffle with a modulus, would lean."""
    draws = 12_000
    counts = Counter(tuple(random_order(4).tolist()) for _ in range(draws))
    assert len(counts) == math.factorial(4)
    expected = draws / 24
    statistic = sum((count - expected) ** 2 for count in counts.values()) / expected
    assert chi2.sf(statistic, 23) > 1e-6


def test_the_same_test_rejects_a_biased_order() -> None:
    draws = 12_000
    rng = np.random.default_rng(0)
    swaps = rng.integers(0, 4, (draws, 4))  # the classical mistake: swap every place with any place
    counts: Counter[tuple[int, ...]] = Counter()
    for places in swaps.tolist():
        order = [0, 1, 2, 3]
        for at, other in enumerate(places):
            order[at], order[other] = order[other], order[at]
        counts[tuple(order)] += 1
    expected = draws / 24
    statistic = sum((count - expected) ** 2 for count in counts.values()) / expected
    assert chi2.sf(statistic, 23) < 1e-6


def test_neighbours_of_the_file_are_not_neighbours_of_the_order() -> None:
    """Rank correlation of old and new place over 100,000 rows: standard deviation 0.0032 when there is none."""
    order = random_order(100_000)
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 6 * 0.0032


def test_the_keys_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 bits a row; equal keys would keep the order of the file."""
    asked = []

    def known(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    monkeypatch.setattr("privacy.permutation.os.urandom", known)
    assert random_order(50).tolist() == list(range(50))
    assert asked == [16 * 50]
