"""Laws and vectors of the fixed-point numbers."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import fixed_point as fp
from models.errors import DataError

LAW = settings(derandomize=True, deadline=None)


@LAW
@given(st.integers(-(2**62) + 1, 2**62 - 1), st.integers(0, 62))
def test_round_shift_rounds_to_nearest_with_ties_up(x: int, bits: int) -> None:
    got = int(fp.round_shift(np.array([x], dtype=np.int64), bits)[0])
    assert got == math.floor(Fraction(x, 2**bits) + Fraction(1, 2)) if bits else got == x


@pytest.mark.parametrize("x", [2**62, -(2**62), 2**63 - 1])
def test_round_shift_refuses_what_could_overflow(x: int) -> None:
    with pytest.raises(DataError, match="overflow"):
        fp.round_shift(np.array([x], dtype=np.int64), 3)


def test_round_shift_refuses_a_shift_out_of_range() -> None:
    with pytest.raises(DataError, match=r"outside 0\.\.62"):
        fp.round_shift(np.zeros(1, dtype=np.int64), 63)


def test_tables_have_the_published_bits() -> None:
    tables = fp.residual_table().astype("<i8").tobytes() + fp.curvature_table().astype("<i8").tobytes()
    assert hashlib.sha256(tables).hexdigest() == "0eb348176f2a5c04baa5ba288d11c04ac2e3ebbd4487014ff44129d8cce0a191"


def test_tables_agree_with_the_logistic_function() -> None:
    z = np.arange(-16 * 1024, 16 * 1024 + 1) / 1024.0
    p = 1.0 / (1.0 + np.exp(-z))
    assert np.abs(fp.residual_table() - p * 2**19).max() <= 0.5 + 1e-6
    assert np.abs(fp.curvature_table() - p * (1 - p) * 2**8).max() <= 0.5 + 1e-6
    assert (fp.residual_table() + fp.residual_table()[::-1] == 2**19).all()  # p(z) + p(-z) = 1 exactly


@LAW
@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=50), st.integers(0, 1))
def test_residual_has_the_sign_of_the_label_and_its_bound(scores: list[int], label: int) -> None:
    score = np.array(scores, dtype=np.int64)
    v = fp.residual(score, np.full(len(scores), label, dtype=np.int8))
    assert ((v >= 0) if label else (v <= 0)).all()
    assert np.abs(v).max() <= 2**fp.RESIDUAL_BITS
    order = np.argsort(score)
    assert (np.diff(v[order]) <= 0).all()
    q = fp.curvature(score)
    assert q.min() >= 0
    assert q.max() <= 2 ** (fp.CURVATURE_BITS - 2)


def test_residual_refuses_other_labels_and_lengths() -> None:
    score = np.zeros(2, dtype=np.int64)
    with pytest.raises(DataError, match="labels must be 0 or 1"):
        fp.residual(score, np.array([0, 2], dtype=np.int8))
    with pytest.raises(DataError, match="differ"):
        fp.residual(score, np.array([0], dtype=np.int8))


@LAW
@given(st.integers(2, 10**7).flatmap(lambda n: st.tuples(st.integers(1, n - 1), st.just(n))))
def test_logit_of_rate_is_the_rounded_logit(case: tuple[int, int]) -> None:
    positives, rows = case
    exact = math.log(positives / (rows - positives)) * 2**16
    assert abs(fp.logit_of_rate(positives, rows) - exact) <= 0.5 + 1e-6
    assert fp.logit_of_rate(rows - positives, rows) == -fp.logit_of_rate(positives, rows)


def test_logit_of_rate_clamps_noisy_counts() -> None:
    assert fp.logit_of_rate(-5, 100) == fp.logit_of_rate(1, 100)
    assert fp.logit_of_rate(170, 100) == fp.logit_of_rate(99, 100)
    with pytest.raises(DataError, match="at least 2"):
        fp.logit_of_rate(1, 1)
