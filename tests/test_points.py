"""The point scale: known answers, and the law that points add up to the score whatever a party knows of a row."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import DataError
from models.points import PointScale, bin_points, scorecard_rows

law = settings(derandomize=True, deadline=None, max_examples=80)
scales = st.builds(
    PointScale,
    base_score=st.floats(-1000, 1000),
    base_odds=st.floats(0.01, 100),
    points_to_double_odds=st.floats(1, 100),
    higher_is_safer=st.booleans(),
    decimals=st.integers(0, 2),
)


def test_siddiqi_known_answers() -> None:
    scale = PointScale(base_score=600, base_odds=30, points_to_double_odds=20)
    assert scale.factor == pytest.approx(28.8539, abs=1e-4)  # Siddiqi 2006, ch. 6: 600 points at 30 : 1, PDO 20
    assert scale.offset == pytest.approx(501.8622, abs=1e-4)


def test_default_scale_doubles_the_odds_every_twenty_points() -> None:
    scale = PointScale()
    logits = -np.log(np.array([20.0, 40.0, 10.0, 1.0]))
    np.testing.assert_allclose(scale.score(logits), [600, 620, 580, scale.offset])
    np.testing.assert_allclose(scale.probability(np.array([600.0, 620.0])), [1 / 21, 1 / 41])
    riskier = PointScale(higher_is_safer=False)
    np.testing.assert_allclose(riskier.score(logits[:3]), [600, 580, 620])


@law
@given(scales, st.floats(-15, 15))
def test_probability_inverts_score(scale: PointScale, logit: float) -> None:
    pd = scale.probability(scale.score(np.array([logit])))[0]
    assert pd == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-6, abs=1e-9)


@law
@given(scales, st.floats(-6, 2), st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=4), min_size=1, max_size=6))
def test_points_of_all_parties_add_up_to_the_score(
    scale: PointScale, intercept: float, parties: list[list[float]]
) -> None:
    """`parties[k]` holds the weight of the bin that applies in each feature of party k."""
    total = sum(len(weights) for weights in parties)
    points = [
        bin_points(np.array(weights), scale=scale, intercept=intercept, features_total=total) for weights in parties
    ]
    card = sum(int(part.sum()) for part in points) * scale.unit
    score = float(scale.score(np.array([intercept + sum(sum(weights) for weights in parties)]))[0])
    assert abs(card - score) <= scale.rounding_bound(total) + 1e-6


@law
@given(scales, st.floats(-6, 2), st.integers(1, 5), st.integers(1, 5), st.floats(-3, 3))
def test_a_row_without_a_file_collects_the_same_shares(
    scale: PointScale, intercept: float, own: int, outside: int, no_file_weight: float
) -> None:
    total = own + outside
    bank = bin_points(np.full(own, 0.25), scale=scale, intercept=intercept, features_total=total)
    owner = bin_points(
        np.array([0.5] * outside + [no_file_weight]),
        scale=scale,
        intercept=intercept,
        features_total=total,
        no_file_features=outside,
    )
    card = (int(bank.sum()) + int(owner[-1])) * scale.unit
    score = float(scale.score(np.array([intercept + 0.25 * own + no_file_weight]))[0])
    assert abs(card - score) <= scale.rounding_bound(own + 1) + 1e-6


def test_points_fall_with_risk_and_turn_with_the_direction() -> None:
    weights = np.array([-1.0, 0.0, 1.0])
    safer = bin_points(weights, scale=PointScale(), intercept=-2.0, features_total=10)
    assert (np.diff(safer) < 0).all()
    riskier = bin_points(weights, scale=PointScale(higher_is_safer=False), intercept=-2.0, features_total=10)
    assert (np.diff(riskier) > 0).all()


def test_scorecard_rows_with_counts_and_a_no_file_bin() -> None:
    labels = [("age", "< 30"), ("age", ">= 30"), ("tax", "A"), ("tax", "B"), ("file", "no file")]
    rows = scorecard_rows(
        labels,
        np.array([0.5, -0.5, -0.2, 0.4, 0.1]),
        scale=PointScale(),
        intercept=-2.0,
        features_total=4,
        counts=np.array([30, 50, 60, 20, 20]),
        no_file=True,
    )
    assert [(row.feature, row.bin) for row in rows] == labels
    assert [row.share for row in rows] == [0.3, 0.5, 0.6, 0.2, 0.2]
    base = (PointScale().offset + 2 * PointScale().factor) / 4
    assert rows[0].points == round(base - 0.5 * PointScale().factor, 2)
    assert rows[4].points == round(2 * base - 0.1 * PointScale().factor, 2)
    assert rows[1].weight == -0.5


def test_shares_are_absent_or_clipped_when_counts_are_absent_or_noisy() -> None:
    def shares(counts: list[int] | None) -> list[float | None]:
        rows = scorecard_rows(
            [("a", "1"), ("a", "2")],
            np.zeros(2),
            scale=PointScale(),
            intercept=0.0,
            features_total=1,
            counts=None if counts is None else np.array(counts),
        )
        return [row.share for row in rows]

    assert shares(None) == [None, None]
    assert shares([-2, 12]) == [0.0, 1.0]
    assert shares([-2, 1]) == [None, None]


@pytest.mark.parametrize(
    "change",
    [
        {"base_score": math.nan},
        {"base_odds": 0.0},
        {"base_odds": math.inf},
        {"points_to_double_odds": -20.0},
        {"decimals": 3.0},
    ],
)
def test_impossible_scales_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(PointScale(), **change)


def test_impossible_points_are_refused() -> None:
    def points(weights: list[float], intercept: float = 0.0, total: int = 2, no_file: int = 0) -> None:
        bin_points(
            np.array(weights), scale=PointScale(), intercept=intercept, features_total=total, no_file_features=no_file
        )

    with pytest.raises(DataError, match="weights"):
        points([0.0, math.nan])
    with pytest.raises(DataError, match="logit"):
        PointScale().score(np.array([math.inf]))
    with pytest.raises(ValueError, match="intercept"):
        points([0.0], intercept=math.inf)
    with pytest.raises(ValueError, match="features_total"):
        points([0.0], total=0)
    with pytest.raises(ValueError, match="no_file_features"):
        points([0.0, 0.0, 0.0], no_file=3)
    with pytest.raises(ValueError, match="every feature needs a bin"):
        points([0.0, 0.0], no_file=2)
    with pytest.raises(ValueError, match="fixed-point integers"):
        points([65536.0 * 1000])
    with pytest.raises(ValueError, match="expected one weight per bin"):
        bin_points(np.zeros((2, 2)), scale=PointScale(), intercept=0.0, features_total=1)


@pytest.mark.parametrize(
    ("labels", "weights", "no_file", "message"),
    [
        ([("a", "1")], [0.0, 0.0], False, "one of each per bin"),
        ([("a", "1"), ("b", "1"), ("a", "2")], [0.0, 0.0, 0.0], False, "adjacent"),
        ([("file", "no file")], [0.0], True, "no-file bin must come last"),
    ],
)
def test_disordered_scorecards_are_refused(
    labels: list[tuple[str, str]], weights: list[float], no_file: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scorecard_rows(labels, np.array(weights), scale=PointScale(), intercept=0.0, features_total=3, no_file=no_file)
