"""Scorecard points: a logit of PD as a score on the usual credit scale, and every bin's share of it.

    factor = points_to_double_odds / ln 2        sign = +1 if higher is safer, else -1
    offset = base_score - sign * factor * ln(base_odds)
    score  = offset - sign * factor * logit(PD)                  (odds are good : bad, logit(PD) = ln(bad : good))
    points of a bin = shares * (offset - sign * factor * intercept) / features_total - sign * factor * weight

The constant is spread evenly over the features of *all* parties (`features_total`); a feature's bin carries one
share, the "no file" bin of a party carries one share for each feature that it stands for. So every row, whatever its
parties know of it, collects exactly `features_total` shares, and its points add up to its score.

Rounding: each bin's points are rounded once, half to even, to `decimals` places and kept as integers of that unit.
The score on a card *is* the sum of its rounded points, so that anyone can add it up by hand and integers add without
error; it differs from `score(logit)` by at most `rounding_bound(bins)`: half a unit for every bin that applies.

A party needs only its own weights, the scale, the intercept and `features_total`. Points of a party are a release of
their own that the contract must list. Source: Siddiqi, Credit Risk Scorecards (2006), ch. 6.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import DataError

MOST_POINTS = 1e9
"""Larger points mean a weight in the wrong unit (a logit at fixed point) and are refused."""


@dataclass(frozen=True, kw_only=True)
class PointScale:
    """How logits become points: `base_score` at `base_odds` (good : bad), and what twice the odds are worth.

    The default is the usual 600 at 20 : 1, 20 points to double, higher is safer. `decimals` (0, 1 or 2) is the
    rounding of points. Raises ValueError for values that no scale can have.
    """

    base_score: float = 600.0
    base_odds: float = 20.0
    points_to_double_odds: float = 20.0
    higher_is_safer: bool = True
    decimals: int = 2

    def __post_init__(self) -> None:
        if not math.isfinite(self.base_score):
            raise ValueError(f"base_score={self.base_score}: expected a finite number of points")
        for name in ("base_odds", "points_to_double_odds"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: expected a finite number above 0")
        if self.decimals not in (0, 1, 2):
            raise ValueError(f"decimals={self.decimals}: points are rounded to 0, 1 or 2 places")

    @property
    def factor(self) -> float:
        """Points per unit of log odds."""
        return self.points_to_double_odds / math.log(2)

    @property
    def offset(self) -> float:
        """Score at even odds (PD = 1/2)."""
        return self.base_score - self.sign * self.factor * math.log(self.base_odds)

    @property
    def unit(self) -> float:
        """Points in one unit of the integers that `bin_points` returns (0.01 for two decimals)."""
        return float(10.0**-self.decimals)

    @property
    def sign(self) -> int:
        """1 if higher is safer, else -1."""
        return 1 if self.higher_is_safer else -1

    def score(self, logit: NDArray[np.float64]) -> NDArray[np.float64]:
        """Unrounded score of each logit of PD (any shape). Raises DataError for a logit that is not finite."""
        logits = _finite(logit, "logit")
        return np.asarray(self.offset - self.sign * self.factor * logits, dtype=np.float64)

    def probability(self, score: NDArray[np.float64]) -> NDArray[np.float64]:
        """PD at each score, the inverse of `score`."""
        logits = self.sign * (self.offset - _finite(score, "score")) / self.factor
        return np.asarray(0.5 * (1 + np.tanh(logits / 2)), dtype=np.float64)  # the logistic function, without overflow

    def rounding_bound(self, bins: int) -> float:
        """Largest distance, in points, of a card's sum of `bins` rounded points from the unrounded score."""
        if bins < 0:
            raise ValueError(f"bins={bins}: expected a number of bins >= 0")
        return bins * self.unit / 2


@dataclass(frozen=True, kw_only=True)
class ScorecardRow:
    """One line of a scorecard: `share` of all rows in the bin (None: not released), `weight` as a logit, points."""

    feature: str
    bin: str
    share: float | None
    weight: float
    points: float


def bin_points(
    weights: NDArray[np.float64],
    *,
    scale: PointScale,
    intercept: float,
    features_total: int,
    no_file_features: int = 0,
) -> NDArray[np.int64]:
    """Points of each bin of one party, int64[bins] in units of `scale.unit`, by the formula of the module.

    `weights` float[bins] and `intercept` are logits (fixed point divided by its scale). `features_total` counts the
    features of all parties. With `no_file_features` = f > 0 the last bin is the "no file" bin of a party with f
    features. Raises DataError for weights that are not finite, ValueError for numbers of features that do not fit.
    """
    logits = _finite(weights, "weights")
    if logits.ndim != 1:
        raise ValueError(f"weights.shape={logits.shape}: expected one weight per bin, float[bins]")
    if not math.isfinite(intercept):
        raise ValueError(f"intercept={intercept}: expected a finite logit")
    if features_total < 1 or not 0 <= no_file_features <= features_total:
        raise ValueError(
            f"features_total={features_total}, no_file_features={no_file_features}: "
            "expected at least one feature, and no more features behind a no-file bin than there are"
        )
    shares = np.ones(len(logits))
    if no_file_features:
        if len(logits) <= no_file_features:
            raise ValueError(
                f"{len(logits)} weights for {no_file_features} features and a no-file bin: every feature needs a bin"
            )
        shares[-1] = no_file_features
    base = (scale.offset - scale.sign * scale.factor * intercept) / features_total
    points = (shares * base - scale.sign * scale.factor * logits) / scale.unit
    if len(points) and np.abs(points).max() * scale.unit > MOST_POINTS:
        raise ValueError(
            f"a bin of {np.abs(points).max() * scale.unit:.3g} points: weights must be logits, not fixed-point integers"
        )
    return np.rint(points).astype(np.int64)


def scorecard_rows(
    labels: Sequence[tuple[str, str]],
    weights: NDArray[np.float64],
    *,
    scale: PointScale,
    intercept: float,
    features_total: int,
    counts: NDArray[np.int64] | None = None,
    no_file: bool = False,
) -> tuple[ScorecardRow, ...]:
    """The printed scorecard of one party: a row per bin in the order given.

    `labels` names (feature, bin) of every bin; with `no_file` the last one stands for enterprises that the party does
    not know. `counts` int64[bins] are rows per bin (noisy ones may be negative) or None if they are not released; a
    share is the count over all rows of the feature, those without a file included, clipped to [0, 1], and None if
    that total is not positive. Raises ValueError if lengths differ, the bins of a feature are not adjacent, or as
    `bin_points`.
    """
    if len(labels) != len(weights) or (counts is not None and len(counts) != len(labels)):
        given = "no" if counts is None else len(counts)
        raise ValueError(f"{len(labels)} labels, {len(weights)} weights, {given} counts: expected one of each per bin")
    features = [feature for feature, _ in (labels[:-1] if no_file else labels)]
    blocks = [feature for i, feature in enumerate(features) if i == 0 or features[i - 1] != feature]
    if len(set(blocks)) != len(blocks) or (no_file and not blocks):
        raise ValueError(
            "bins of a feature must be adjacent, and a no-file bin must come last, after those of the features"
        )
    points = bin_points(
        weights,
        scale=scale,
        intercept=intercept,
        features_total=features_total,
        no_file_features=len(blocks) if no_file else 0,
    )
    return tuple(
        ScorecardRow(
            feature=feature, bin=label, share=share, weight=float(weight), points=round(int(p) * scale.unit, 2)
        )
        for (feature, label), share, weight, p in zip(
            labels, _shares(features, counts, no_file), weights, points, strict=True
        )
    )


def _shares(features: Sequence[str], counts: NDArray[np.int64] | None, no_file: bool) -> list[float | None]:
    """Share of all rows in each bin; `features` without the no-file bin, `counts` with it."""
    if counts is None:
        return [None] * (len(features) + no_file)
    unknown = int(counts[-1]) if no_file else 0
    totals: dict[str, int] = {}
    for feature, count in zip(features, counts[: len(features)], strict=True):
        totals[feature] = totals.get(feature, unknown) + int(count)
    # Every feature counts the same rows; the no-file bin is measured against the first.
    ratios = [(int(count), totals[feature]) for feature, count in zip(features, counts[: len(features)], strict=True)]
    if no_file:
        ratios.append((unknown, totals[features[0]]))
    return [min(1.0, max(0.0, count / total)) if total > 0 else None for count, total in ratios]


def _finite(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise DataError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are not finite: nothing to score")
    return array
