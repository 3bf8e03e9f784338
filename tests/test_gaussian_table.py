"""The vectorised discrete Gaussian: its table against high precision, its draws against the distribution."""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import chisquare

from privacy import gaussian_table
from privacy.errors import Refused
from privacy.gaussian_table import LARGEST_STD, TableNoise, discrete_gaussian_vector


@pytest.mark.parametrize("std", [0.5, 2.0, 3.7, 50.0])
def test_the_table_is_the_cumulative_distribution_of_the_magnitude(std: float) -> None:
    high, cumulative = gaussian_table._table(std)
    weights = [math.exp(-(k**2) / (2 * std**2)) for k in range(math.ceil(20 * std))]
    total = 2 * math.fsum(weights) - 1
    for place in range(0, len(cumulative), max(1, len(cumulative) // 50)):
        expected = (2 * math.fsum(weights[: place + 1]) - 1) / total
        assert float(Fraction(cumulative[place], 1 << 128)) == pytest.approx(expected, abs=1e-14)
        assert int(high[place]) == cumulative[place] >> 64
    assert list(cumulative) == sorted(cumulative)
    # what is cut off is below 2^-110
    assert (1 << 128) - cumulative[-1] < 1 << 18


def test_the_tail_is_right_to_many_digits() -> None:
    """P(|X| > 20) for std 2, whose logarithm no 64-bit table would show."""
    _, cumulative = gaussian_table._table(2.0)
    tail = float(Fraction((1 << 128) - cumulative[20], 1 << 128))
    weights = [math.exp(-(k**2) / 8) for k in range(100)]
    assert tail == pytest.approx(2 * math.fsum(weights[21:]) / (2 * math.fsum(weights) - 1), rel=1e-10)


def draws_fit(values: np.ndarray, std: float) -> float:
    edge = math.ceil(4 * std)
    places = np.arange(-edge, edge + 1)
    expected = np.exp(-(places**2) / (2 * std**2))
    inside = values[np.abs(values) <= edge]
    expected *= len(inside) / expected.sum()
    return float(chisquare(np.bincount(inside + edge, minlength=len(places)), expected).pvalue)


@pytest.mark.parametrize("std", [0.7, 2.0, 15.5])
def test_draws_follow_the_distribution_and_no_other(std: float) -> None:
    values = discrete_gaussian_vector(std, 300_000)
    assert draws_fit(values, std) > 1e-6
    assert draws_fit(values, std * 2 / 3) < 1e-6
    assert abs(values.mean()) < 5 * std / math.sqrt(300_000)


def test_large_std() -> None:
    values = discrete_gaussian_vector(LARGEST_STD, 100_000)
    assert abs(values.std() / LARGEST_STD - 1) < 5 / math.sqrt(2 * 100_000)


def test_a_tie_in_the_upper_half_is_decided_by_the_lower_half(monkeypatch: pytest.MonkeyPatch) -> None:
    high, cumulative = gaussian_table._table(2.0)
    monkeypatch.setattr(gaussian_table, "stream", lambda key, length: np.full(length, high[3], np.uint64))
    for low, magnitude in ((0, 3), ((1 << 64) - 1, 4)):
        monkeypatch.setattr(os, "urandom", lambda size, low=low: low.to_bytes(8) if size == 8 else bytes(size))
        assert int(abs(discrete_gaussian_vector(2.0, 1)[0])) == magnitude
    assert cumulative[3] & ((1 << 64) - 1) not in (0, (1 << 64) - 1)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 2 * LARGEST_STD, 0.4])
def test_refused_std(std: float) -> None:
    with pytest.raises(Refused, match="standard deviation"):
        discrete_gaussian_vector(std, 3)


def test_a_tag_is_drawn_once_and_small_shares_are_refused() -> None:
    noise = TableNoise()
    assert noise.gaussian("a", 2.0, 5).shape == (5,)
    with pytest.raises(Refused, match="drawn already"):
        noise.gaussian("a", 2.0, 5)
    with pytest.raises(Refused, match="below 2"):
        noise.gaussian("b", 1.9, 5)
    with pytest.raises(Refused, match="0 or more"):
        discrete_gaussian_vector(2.0, -1)
    assert discrete_gaussian_vector(2.0, 0).tolist() == []
