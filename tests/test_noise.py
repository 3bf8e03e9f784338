"""Noise: the right distribution at the right width (and the test would notice a wrong one), shares, replay."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, norm

from privacy.errors import Refused
from privacy.noise import (
    LEAST_SHARE_STD,
    KeyedForwardNoise,
    RecordedForwardNoise,
    RecordedNoise,
    SystemNoise,
    default_colluding,
    discrete_gaussian,
    forward_noise,
    share_std,
)

Int64 = npt.NDArray[np.int64]

# draws cannot be seeded, so a sound sampler fails a test of this level once in a million runs
LEVEL = 1e-6
SECRET = bytes(range(32))


def fits(values: Int64, std: float) -> bool:
    """Kolmogorov-Smirnov test against a Gaussian of `std` (in grid units, well above 1)."""
    return bool(kstest(values, norm(scale=std).cdf).pvalue > LEVEL)


def chi_square_fits(values: Int64, std: float) -> bool:
    """Chi-square test against the exact probabilities of the discrete Gaussian."""
    support = np.arange(-200, 201)
    weights = np.exp(-(support.astype(np.float64) ** 2) / (2 * std**2))
    expected = len(values) * weights / weights.sum()
    common = expected >= 10
    observed = np.array([np.count_nonzero(values == k) for k in support[common]])
    rest = len(values) - observed.sum(), len(values) - expected[common].sum()
    if rest[1] < 1:
        return bool(chisquare(observed, expected[common] / expected[common].sum() * observed.sum()).pvalue > LEVEL)
    return bool(chisquare(np.append(observed, rest[0]), np.append(expected[common], rest[1])).pvalue > LEVEL)


# --- discrete Gaussian ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [100.0, 5e6 * 2**3, 2.0**55])
def test_discrete_gaussian_has_its_width_and_no_other(std: float) -> None:
    noise = discrete_gaussian(std, 6000)
    assert noise.dtype == np.int64
    assert fits(noise, std)
    assert not fits(noise, std * 2 / 3)
    assert not fits(noise, std * 3 / 2)


@pytest.mark.parametrize("std", [0.5, 2.0, 5.5])
def test_discrete_gaussian_is_discrete(std: float) -> None:
    noise = discrete_gaussian(std, 10_000)
    assert chi_square_fits(noise, std)
    assert not chi_square_fits(noise, std * 2 / 3)
    assert not chi_square_fits(noise, std * 3 / 2)


def test_discrete_gaussian_never_repeats() -> None:
    first, second = discrete_gaussian(1e9, 200), discrete_gaussian(1e9, 200)
    assert not np.isin(first, second).any()
    assert len(np.unique(first)) == 200
    assert discrete_gaussian(3.0, 0).shape == (0,)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 2.0**56])
def test_discrete_gaussian_refuses_other_widths(std: float) -> None:
    with pytest.raises(Refused, match="standard deviation"):
        discrete_gaussian(std, 3)


def test_discrete_gaussian_refuses_negative_sizes() -> None:
    with pytest.raises(Refused, match="-1 values"):
        discrete_gaussian(3.0, -1)


# --- shares -----------------------------------------------------------------------------------------------------------


@given(total=st.floats(1e-3, 1e12), banks=st.integers(1, 50), data=st.data())
@settings(derandomize=True, deadline=None)
def test_honest_shares_make_the_total(total: float, banks: int, data: st.DataObject) -> None:
    colluding = data.draw(st.integers(0, banks - 1))
    share = share_std(total, banks, colluding)
    assert math.isclose((banks - colluding) * share**2, total**2, rel_tol=1e-12)
    assert share <= total
    if colluding:
        assert share > share_std(total, banks, colluding - 1)


def test_shares_without_colluders_what_the_others_have_left() -> None:
    total, banks, colluding = 1000.0, 5, 3
    share = share_std(total, banks, colluding)
    shares = [discrete_gaussian(share, 6000) for _ in range(banks)]
    honest = np.sum(shares[colluding:], axis=0)
    assert fits(honest, total)
    assert not fits(honest, total * 2 / 3)
    assert not fits(honest, total * 3 / 2)
    assert fits(np.sum(shares, axis=0), share * math.sqrt(banks))


def test_least_shares_add_up_to_a_discrete_gaussian() -> None:
    noise = discrete_gaussian(LEAST_SHARE_STD, 10_000) + discrete_gaussian(LEAST_SHARE_STD, 10_000)
    assert chi_square_fits(noise, LEAST_SHARE_STD * math.sqrt(2))
    # exactly: the largest log ratio of the two densities within 12 standard deviations
    support = np.arange(-60, 61).astype(np.float64)
    one = np.exp(-(support**2) / (2 * LEAST_SHARE_STD**2))
    two = np.convolve(one / one.sum(), one / one.sum(), mode="same")
    exact = np.exp(-(support**2) / (4 * LEAST_SHARE_STD**2))
    inside = np.abs(support) <= 12 * LEAST_SHARE_STD
    assert np.abs(np.log(two / (exact / exact.sum())))[inside].max() < 1e-12


@pytest.mark.parametrize(
    ("total", "banks", "colluding"),
    [
        (0.0, 3, 1),
        (-1.0, 3, 1),
        (math.inf, 3, 1),
        (math.nan, 3, 1),
        (1.0, 3, 3),
        (1.0, 3, -1),
        (1.0, 0, 0),
        (1.0, 1, 1),
    ],
)
def test_share_limits(total: float, banks: int, colluding: int) -> None:
    with pytest.raises(Refused):
        share_std(total, banks, colluding)


def test_the_default_leaves_the_full_noise_to_a_bank_that_looks() -> None:
    assert [default_colluding(banks) for banks in (1, 2, 3, 4, 10)] == [0, 1, 1, 2, 8]
    for banks in (2, 3, 4, 10):
        share = share_std(100.0, banks, default_colluding(banks))
        assert share * math.sqrt(banks - 1) >= 100.0 * (1 - 1e-12)  # what is left when it subtracts its own
    with pytest.raises(Refused):
        default_colluding(0)


def test_share_of_one_bank_is_everything() -> None:
    assert share_std(7.0, 1, 0) == 7.0
    assert math.isclose(share_std(7.0, 2, 0), 7.0 / math.sqrt(2))
    assert share_std(7.0, 2, 1) == 7.0


# --- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [False, True])
def test_a_tag_is_drawn_once(recorded: bool) -> None:
    source = RecordedNoise(SystemNoise()) if recorded else SystemNoise()
    first = source.gaussian("sum/r1.own.0/0/bank-a", 1e6, 50)
    kept = first.copy()
    first[:] = 0  # what a caller does to its copy reaches neither the memory nor the tape
    assert np.array_equal(source.gaussian("sum/r1.own.0/0/bank-a", 1e6, 50), kept)
    assert not np.array_equal(source.gaussian("sum/r1.own.0/1/bank-a", 1e6, 50), kept)
    for std, size in ((2e6, 50), (1e6, 51)):
        with pytest.raises(Refused, match="was drawn"):
            source.gaussian("sum/r1.own.0/0/bank-a", std, size)


@pytest.mark.parametrize("std", [0.0, 1.0, 1.99, math.nan, math.inf])
def test_shares_too_small_for_the_grid_are_refused(std: float) -> None:
    with pytest.raises(Refused):
        SystemNoise().gaussian("tag", std, 3)


def test_system_noise_has_its_width() -> None:
    noise = SystemNoise().gaussian("tag", 300.0, 6000)
    assert fits(noise, 300.0)
    assert not fits(noise, 200.0)
    assert not fits(noise, 450.0)


def test_the_tape_holds_what_was_given_out() -> None:
    source = RecordedNoise(SystemNoise())
    drawn = {tag: source.gaussian(tag, 1e5, 20) for tag in ("a", "b")}
    assert set(source.tape) == {"a", "b"}
    for tag, noise in drawn.items():
        assert np.array_equal(source.tape[tag], noise)
    drawn["a"][:] = 0
    assert source.tape["a"].any()


def test_forward_tape_keeps_the_last_scale() -> None:
    source = RecordedForwardNoise(KeyedForwardNoise(SECRET))
    source.draw("forward/r1/pboc", 20, 1000)
    last = source.draw("forward/r1/pboc", 20, 3000)
    assert np.array_equal(source.tape["forward/r1/pboc"], last)
    assert set(source.tape) == {"forward/r1/pboc"}


# --- forward noise ----------------------------------------------------------------------------------------------------


def test_forward_noise_has_its_width_and_no_other() -> None:
    noise = forward_noise(SECRET, "forward/r1/pboc", 6000, 4000)
    assert noise.dtype == np.int64
    assert fits(noise, 4000)
    assert not fits(noise, 4000 * 2 / 3)
    assert not fits(noise, 4000 * 3 / 2)


def test_forward_noise_is_one_draw_per_enterprise_and_round() -> None:
    noise = forward_noise(SECRET, "forward/r1/pboc", 3000, 10**6)
    assert np.array_equal(noise, forward_noise(SECRET, "forward/r1/pboc", 3000, 10**6))
    assert np.array_equal(noise, KeyedForwardNoise(SECRET).draw("forward/r1/pboc", 3000, 10**6))
    # a shorter table, another scale: the same enterprise has the same noise
    assert np.array_equal(noise[:100], forward_noise(SECRET, "forward/r1/pboc", 100, 10**6))
    assert np.abs(3 * noise - forward_noise(SECRET, "forward/r1/pboc", 3000, 3 * 10**6)).max() <= 2
    for other in (
        forward_noise(SECRET, "forward/r2/pboc", 3000, 10**6),
        forward_noise(SECRET, "forward/r1/tax", 3000, 10**6),
        forward_noise(bytes(32), "forward/r1/pboc", 3000, 10**6),
    ):
        assert abs(float(np.corrcoef(noise, other)[0, 1])) < 0.1


def test_forward_noise_edges() -> None:
    assert not forward_noise(SECRET, "t", 10, 0).any()
    assert forward_noise(SECRET, "t", 0, 5).shape == (0,)
    for secret, rows, std in ((b"short", 3, 5), (SECRET, 3, -1), (SECRET, 3, 2**56), (SECRET, -1, 5)):
        with pytest.raises(Refused):
            forward_noise(secret, "t", rows, std)
    with pytest.raises(Refused, match="expected 32"):
        KeyedForwardNoise(b"short")


def test_extreme_uniforms_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr("privacy.noise.stream", lambda key, rows: extremes)
    noise = forward_noise(SECRET, "t", 2, 10**6)
    assert noise[0] == -noise[1]
    assert 8 * 10**6 < noise[1] < 9 * 10**6


def test_sources_show_nothing() -> None:
    source = SystemNoise()
    noise = source.gaussian("tag", 1e15, 1)
    forward = KeyedForwardNoise(b"0123456789abcdef0123456789abcdef")
    shown = f"{source!r} {RecordedNoise(source)!r} {forward!r} {RecordedForwardNoise(forward)!r}"
    assert str(int(noise[0])) not in shown
    assert "0123456789" not in shown
