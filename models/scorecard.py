"""The additive scorecard's tower: its design, its local Newton-like direction and its steps.

What it guarantees: everything summed over rows is an integer; the float part (one factorisation, one solve per round)
uses only elementwise IEEE operations in a fixed order. So a party's weights are bit-identical in the federated run
and in the plaintext twin.
Formula: d = (p(1-p) A A' + ridge I + smoothness D'D + noise I)^-1 (A v - ridge w - smoothness D'D w), D = differences
of neighbouring bins, p the base rate: the curvature of the first round serves all rounds, the line search finds the
length.
Units: weights and directions at 2**-SCORE_BITS logit, gradients A v at 2**-RESIDUAL_BITS. Source: DESIGN section 2,
PROTOCOL rules 1-5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from models import cholesky
from models.binning import Tower
from models.errors import DataError
from models.fixed_point import ALPHA_BITS, RESIDUAL_BITS, SCORE_BITS, Float64, Int32, Int64, round_shift

DIRECTION_LIMIT = 2**26  # 1024 logits per bin at SCORE_BITS; a larger direction means a broken gradient or no ridge
ALPHA_LIMIT = 2**34  # a step of 1024 times a direction; with DIRECTION_LIMIT a product stays under 2**60
SPREAD_ROWS_LIMIT = 2**24
NOISE_SMOOTHNESS = (
    5.0  # measured at epsilon 3: neighbouring bins share what the noise hides; 0 costs .003 of the mean AUC
)


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """Strength of the penalties on a tower's weights, in units of the log-likelihood, whatever the number of rows.

    ridge: of each squared weight, > 0; smoothness: of each squared difference of neighbouring ordered bins, >= 0.
    """

    ridge: float
    smoothness: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise DataError(f"ridge {self.ridge} must be positive: bins of a feature are collinear with the intercept")
        if not (math.isfinite(self.smoothness) and self.smoothness >= 0):
            raise DataError(f"smoothness {self.smoothness} must not be negative")


@dataclass(frozen=True, kw_only=True)
class ScorecardSettings:
    """What a job fixes about the additive scorecard (one default for all data sets).

    rounds: training rounds, 1..8 (each shows the banks one noised sum of directions). max_bins_owner, max_bins_bank:
    ordered bins or categories per feature. forward_noise: standard deviations of an owner's direction added to it,
    per enterprise. least_count: rows under which a category joins "other". cross_tabs: the banks sum their full
    cross-tab; False when epsilon is set (PROTOCOL rule 3).
    """

    rounds: int = 3
    max_bins_owner: int = 16
    max_bins_bank: int = 16
    ridge: float = 2.0
    smoothness: float = 20.0
    forward_noise: float = 1.0
    least_count: int = 20
    cross_tabs: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= 8:
            raise DataError(f"rounds {self.rounds} outside 1..8: rounds are a privacy cost")
        for what, bins in (("max_bins_owner", self.max_bins_owner), ("max_bins_bank", self.max_bins_bank)):
            if not 2 <= bins <= 256:
                raise DataError(f"{what} {bins} outside 2..256")
        if not (math.isfinite(self.forward_noise) and self.forward_noise >= 0):
            raise DataError(f"forward_noise {self.forward_noise} must not be negative")
        if self.least_count < 1:
            raise DataError(f"least_count {self.least_count} must be at least 1")
        Penalty(ridge=self.ridge, smoothness=self.smoothness)

    @property
    def penalty(self) -> Penalty:
        """The penalty of every tower."""
        return Penalty(ridge=self.ridge, smoothness=self.smoothness)


@dataclass(frozen=True, kw_only=True)
class NoiseStds:
    """Standard deviations of the totals' DP noise, known to all parties; 0 without epsilon.

    bins: of each shared bin count. gradient: of each number of A v, in units of v. search: per round (gradient,
    curvature) in the integer units of models.line_search.moments; empty means 0.
    """

    bins: float = 0.0
    gradient: float = 0.0
    search: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) and x >= 0 for x in (self.bins, self.gradient, *sum(self.search, ()))):
            raise DataError("standard deviations of noise must be finite and not negative")

    def search_of(self, round_number: int) -> tuple[float, float]:
        """(gradient, curvature) of a round, counted from 1; raises DataError if the plan does not cover it."""
        if not self.search:
            return 0.0, 0.0
        if not 1 <= round_number <= len(self.search):
            raise DataError(f"round {round_number} has no line-search noise among {len(self.search)} planned rounds")
        return self.search[round_number - 1]


def cross_tab(cells: Int32, bins: int) -> Int64:
    """A A': how many rows fall into both bins; int64[bins, bins], symmetric, the diagonal holds the bin counts.

    cells: int32[n, F] global bins, -1 = none (models.binning.cells); bins: R. Sums of parts equal the whole.
    Raises DataError on a bin outside -1..bins-1.
    """
    if cells.size and (int(cells.min()) < -1 or int(cells.max()) >= bins):
        raise DataError(f"a cell lies outside -1..{bins - 1}; make the cells with the same tower")
    out = np.zeros((bins, bins), dtype=np.int64)
    if not cells.size:
        return out
    columns = [np.ascontiguousarray(cells[:, f]).astype(np.int64) for f in range(cells.shape[1])]
    # one extra slot in front of each column's range takes the -1
    slots, starts, widths = [], [], []
    for column in columns:
        used = column >= 0
        start = int(column[used].min()) if bool(used.any()) else 0
        starts.append(start)
        widths.append(int(column.max()) - start + 1 if bool(used.any()) else 0)
        slots.append(np.where(used, column - start + 1, 0))
    for f in range(len(columns)):
        for g in range(f, len(columns)):
            rows, width = widths[f], widths[g]
            counts = np.bincount(slots[f] * (width + 1) + slots[g], minlength=(rows + 1) * (width + 1))
            block = counts.reshape(rows + 1, width + 1)[1:, 1:]
            at, to = slice(starts[f], starts[f] + rows), slice(starts[g], starts[g] + width)
            out[at, to] += block
            if f != g:
                out[to, at] += block.T
    return out


def bin_counts(cells: Int32, bins: int) -> Int64:
    """Rows in each bin: int64[bins], the diagonal of the cross-tab."""
    return np.bincount(cells[cells >= 0], minlength=bins).astype(np.int64)


def gather(cells: Int32, values: Int64, bins: int) -> Int64:
    """A values: the sum of the rows' values in each bin, int64[bins]; what the encrypted kernel computes for an owner.

    values: int64[n], sum of |values| times features under 2**53 (checked: sums of doubles are exact below it).
    """
    if cells.shape[0] != len(values):
        raise DataError(f"{cells.shape[0]} rows of cells and {len(values)} values; give one value per row")
    if len(values) and int(np.abs(values).max()) * len(values) >= 2**53:
        raise DataError(f"sums over {len(values)} values may exceed 2**53; lower their scale")
    total = np.zeros(bins, dtype=np.int64)
    for f in range(cells.shape[1]):
        used = cells[:, f] >= 0
        total += np.bincount(cells[used, f], weights=values[used], minlength=bins).astype(np.int64)
    return total


def upper(square: Int64) -> Int64:
    """Upper triangle with the diagonal, row by row: int64[R (R + 1) / 2]."""
    return square[np.triu_indices(square.shape[0])].astype(np.int64)


def from_upper(packed: Int64, bins: int) -> Int64:
    """Symmetric int64[bins, bins] from `upper`; raises DataError on the wrong length."""
    if packed.shape != (bins * (bins + 1) // 2,):
        raise DataError(f"{packed.shape} numbers are not the upper triangle of {bins} bins")
    out = np.zeros((bins, bins), dtype=np.int64)
    rows, columns = np.triu_indices(bins)
    out[rows, columns] = packed
    out[columns, rows] = packed
    return out


def diagonal_blocks(tower: Tower, counts: Int64) -> Int64:
    """Stand-in for the cross-tab from bin counts alone: int64[R, R] with the counts (at least 0) on the diagonal."""
    if counts.shape != (tower.rows,):
        raise DataError(f"{counts.shape} bin counts for a tower of {tower.rows} bins")
    return np.diag(np.maximum(counts, 0)).astype(np.int64)


def preconditioner(
    cross: Int64, tower: Tower, base_rate: Fraction | float, penalty: Penalty, sum_noise_std: float = 0.0
) -> Float64:
    """Lower Cholesky factor of p(1-p) C + (ridge + noise) I + (smoothness + NOISE_SMOOTHNESS noise) D'D: float64[R, R].

    cross: int64[R, R]; base_rate: p in (0, 1); sum_noise_std: standard deviation of the DP noise on each number of A v,
    in units of v: it holds back what is mostly noise. The noise terms shape the direction only; what the weights
    converge to is decided by the penalty in `direction`. Raises DataError if the matrix is not positive definite (a
    noisy cross-tab can be; use diagonal_blocks).
    """
    p = float(base_rate)
    if not 0.0 < p < 1.0:
        raise DataError(f"base rate {p} is not inside (0, 1); training needs both labels")
    if cross.shape != (tower.rows, tower.rows):
        raise DataError(f"a cross-tab of shape {cross.shape} for a tower of {tower.rows} bins")
    if not (math.isfinite(sum_noise_std) and sum_noise_std >= 0):
        raise DataError(f"noise standard deviation {sum_noise_std} must not be negative")
    matrix = cross.astype(np.float64) * (p * (1.0 - p))
    diagonal = np.arange(tower.rows)
    matrix[diagonal, diagonal] += penalty.ridge + sum_noise_std
    smoothness = penalty.smoothness + NOISE_SMOOTHNESS * sum_noise_std
    left, right = tower.neighbours()
    for i, j in zip(left.tolist(), right.tolist(), strict=True):
        matrix[i, i] += smoothness
        matrix[j, j] += smoothness
        matrix[i, j] -= smoothness
        matrix[j, i] -= smoothness
    return cholesky.factor(matrix)


def direction(lower: Float64, gradient: Int64, weights: Int64, tower: Tower, penalty: Penalty) -> Int64:
    """The tower's direction of one round: int64[R] at 2**-SCORE_BITS, |d| <= 2**26 (1024 logits; checked).

    lower: factor of `preconditioner`; gradient: A v, int64[R] at 2**-RESIDUAL_BITS; weights: int64[R] at
    2**-SCORE_BITS.
    Raises DataError on other shapes or a direction beyond the bound.
    """
    if gradient.shape != (tower.rows,) or weights.shape != (tower.rows,):
        raise DataError(f"gradient {gradient.shape} and weights {weights.shape} for a tower of {tower.rows} bins")
    w = weights.astype(np.float64) / float(1 << SCORE_BITS)
    pull = gradient.astype(np.float64) / float(1 << RESIDUAL_BITS) - penalty.ridge * w
    left, right = tower.neighbours()
    if left.size:
        # each bin is at most once a left and once a right neighbour, so plain indexing adds every term
        bend = penalty.smoothness * (w[left] - w[right])
        pull[left] -= bend
        pull[right] += bend
    rounded = np.rint(cholesky.solve(lower, pull) * float(1 << SCORE_BITS))
    if not bool((np.abs(rounded) <= DIRECTION_LIMIT).all()):
        raise DataError(
            f"a direction exceeds {DIRECTION_LIMIT >> SCORE_BITS} logits; "
            f"the gradient is broken or the ridge {penalty.ridge} too small"
        )
    return rounded.astype(np.int64)


def apply(cells: Int32, weights: Int64) -> Int64:
    """Sum of the weights at each row's cells (-1 adds nothing): int64[n]."""
    if cells.size and (int(cells.min()) < -1 or int(cells.max()) >= len(weights)):
        raise DataError(f"a cell lies outside -1..{len(weights) - 1}; make the cells with the same tower")
    padded = np.append(weights, np.int64(0))  # index -1 reads this zero
    total = np.zeros(cells.shape[0], dtype=np.int64)
    for f in range(cells.shape[1]):
        total += padded[cells[:, f]]
    return total


def take_step(
    weights: Int64, direction: Int64, previous_step: Int64, alpha_direction: int, alpha_previous: int
) -> tuple[Int64, Int64]:
    """(weights + step, step) with step = alpha_direction direction + alpha_previous previous_step; alphas at
    2**-ALPHA_BITS.

    Raises DataError if a product could overflow.
    """
    step = scaled(direction, alpha_direction) + scaled(previous_step, alpha_previous)
    return weights + step, step


def scaled(values: Int64, alpha: int) -> Int64:
    """round(alpha values / 2**ALPHA_BITS), refusing (DataError) an overflow: |alpha| * max |value| must stay under
    2**62.
    """
    largest = int(np.abs(values).max()) if values.size else 0
    if abs(alpha) * largest >= 2**62:
        raise DataError(
            f"step size {alpha / 2**ALPHA_BITS:g} times a direction of {largest} overflows; the search diverged"
        )
    return round_shift(values * np.int64(alpha if largest else 0), ALPHA_BITS)


def spread(cross: Int64, direction: Int64, rows: int) -> int:
    """Root mean square of a tower's direction over its training rows: integer >= 1 at 2**-SCORE_BITS, exact, rounded
    up.

    cross: int64[R, R] cross-tab over the rows; rows: n, at most 2**24. The root mean square is the standard deviation
    where the mean is 0 (as fitted directions nearly are) and, unlike it, still bounds the size of a direction that is
    the same for every row.
    """
    _check_rows(rows)
    products = np.asarray(cross @ direction)  # |C d| <= rows features 2**26 < 2**62
    square = sum(a * b for a, b in zip(direction.tolist(), products.tolist(), strict=True))
    return max(1, math.isqrt(max(0, square) // rows) + 1)


def spread_bound(tower: Tower, counts: Int64, direction: Int64, rows: int) -> int:
    """Upper bound of `spread` from bin counts alone: the sum over features of their root mean squares; integer >= 1.

    counts: int64[R] (noisy ones may be negative and count as 0). By the triangle inequality of the root mean square.
    """
    _check_rows(rows)
    squares = [c * d * d for c, d in zip(np.maximum(counts, 0).tolist(), direction.tolist(), strict=True)]
    ends: Sequence[int] = (*tower.offsets[1:], tower.rows - int(tower.has_no_file))
    total = sum(squares[tower.rows - int(tower.has_no_file) :])
    bound = math.isqrt(total // rows) + 1 if tower.has_no_file else 0
    for start, stop in zip(tower.offsets, ends, strict=True):
        bound += math.isqrt(sum(squares[start:stop]) // rows) + 1
    return max(1, bound)


def _check_rows(rows: int) -> None:
    if not 1 <= rows <= SPREAD_ROWS_LIMIT:
        raise DataError(f"{rows} training rows are outside 1..{SPREAD_ROWS_LIMIT}")
