"""Step sizes of a round: Newton's method in the space of a few directions, from secure sums of integers.

What it guarantees: a bank contributes an integer vector, clipped per row, so it can be secure-summed exactly and its
sensitivity is bounded; every bank gets the same step sizes from the same sum, bit for bit (only + - * / sqrt).
Formula: x = direction / scale, clipped to +-CLIP; g = sum v x, H = sum q x x'; a <- a + t H^-1 g with t = 2 / (2 + M),
M a bound of |x . H^-1 g| over rows. 2 / (2 + M) <= ln(1 + M) / M, the step that lowers a generalised self-concordant
loss (Sun and Tran-Dinh, Mathematical Programming 178 (2019), Theorem 2; logistic loss: nu = 2). No loss is evaluated:
each would be another release.
Assumes that few rows lie beyond CLIP scales: they count as clipped in g and H while their score moves in full.
Units: x at 2**-DIRECTION_BITS of a scale; step sizes at 2**-ALPHA_BITS; the intercept at 2**-SCORE_BITS logit.
Columns: bank direction, summed owner direction, previous step (from the second round), intercept (always last).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from models import cholesky
from models.errors import DataError
from models.fixed_point import (
    ALPHA_BITS,
    CURVATURE_BITS,
    RESIDUAL_BITS,
    SCORE_BITS,
    Int8,
    Int64,
    curvature,
    residual,
    round_shift,
)
from models.scorecard import ALPHA_LIMIT, scaled

INNER_STEPS = 4
DIRECTION_BITS = 7
CLIP = 3  # scales: a direction counts as at most this many in the sums; the score itself is never clipped
SEARCH_RESIDUAL_BITS = 12
ROWS_LIMIT = 2**20
RIDGE = 1e-3  # of the mean curvature, as in the prototype: keeps collinear directions apart
_ONE = 1 << DIRECTION_BITS


def normalise(direction_rows: Int64, scale: int) -> Int64:
    """clip(round(d 2**7 / scale), +-CLIP * 2**7): int64[n], rounding half up. scale: >= 1, same units as d. Raises
    DataError otherwise.
    """
    if scale < 1:
        raise DataError(f"scale {scale} of a direction is under 1")
    reach = (CLIP + 1) * scale
    d = np.clip(direction_rows, -reach, reach)
    x = np.floor_divide(2 * _ONE * d + scale, 2 * scale)
    return np.clip(x, -CLIP * _ONE, CLIP * _ONE).astype(np.int64)


def design(directions: Sequence[Int64], scales: Sequence[int]) -> Int64:
    """Normalised directions and the intercept's constant as columns: int64[n, k], the `rows` of `moments`."""
    if not directions or len(directions) != len(scales):
        raise DataError(f"{len(directions)} directions and {len(scales)} scales; give one scale per direction")
    columns = [normalise(d, scale) for d, scale in zip(directions, scales, strict=True)]
    return np.column_stack([*columns, np.full(len(columns[0]), _ONE, dtype=np.int64)])


def moments(rows: Int64, score: Int64, label: Int8) -> Int64:
    """Gradient and curvature sums of one bank: int64[k + k (k + 1) / 2], the second part the upper triangle row by row.

    rows: int64[n, k] of `design`; score: int64[n] at the candidate step; label: int8[n]; n <= 2**20 over all banks.
    Units: gradient 2**-(12 + 7), curvature 2**-(CURVATURE_BITS + 14). |sum| <= 2**45 at 2**20 rows. Raises DataError
    beyond the limits.
    """
    n, k = rows.shape
    if n > ROWS_LIMIT:
        raise DataError(f"{n} rows exceed {ROWS_LIMIT} of a line search; split the job")
    if n and int(np.abs(rows).max()) > CLIP * _ONE:
        raise DataError(f"a normalised direction exceeds {CLIP} scales; clip it with normalise()")
    v = round_shift(residual(score, label), RESIDUAL_BITS - SEARCH_RESIDUAL_BITS)
    q = curvature(score)
    gradient = [int((v * rows[:, i]).sum()) for i in range(k)]
    curvatures = []
    for i in range(k):
        weighted = q * rows[:, i]
        curvatures += [int((weighted * rows[:, j]).sum()) for j in range(i, k)]
    return np.array(gradient + curvatures, dtype=np.int64)


def sensitivities(k: int) -> tuple[float, float]:
    """L2 bounds of one enterprise's part of (gradient, curvature) in the integer units of `moments`; k columns, the
    last the intercept.

    |v| <= 1, q <= 1/4, |x| <= CLIP for k - 1 columns and 1 for the intercept; adjacency: the row's contribution
    replaced by zero.
    """
    if k < 2:
        raise DataError(f"a line search has at least one direction and the intercept, not {k} columns")
    m = k - 1
    gradient = math.sqrt(m * CLIP**2 + 1) * 2 ** (SEARCH_RESIDUAL_BITS + DIRECTION_BITS)
    pairs = m * (m + 1) // 2 * CLIP**4 + m * CLIP**2 + 1
    return gradient, math.sqrt(pairs) * 2 ** (CURVATURE_BITS - 2 + 2 * DIRECTION_BITS)


def update(
    a: tuple[float, ...],
    moments: Int64,
    rows_total: int,
    noise_std_gradient: float = 0.0,
    noise_std_curvature: float = 0.0,
) -> tuple[float, ...]:
    """One damped Newton step in normalised coordinates: the next a, from the (noisy) sum of `moments` over the banks
    at a.

    rows_total: n over all banks; noise standard deviations in the integer units of `moments`. A noisy curvature is
    made safe by a ridge of a few of its standard deviations, doubled until the matrix is positive definite; both
    raise the ridge and so shorten the step.
    Raises DataError on a wrong length.
    """
    k = len(a)
    if moments.shape != (k + k * (k + 1) // 2,):
        raise DataError(f"{moments.shape} moments for {k} columns; expected {k + k * (k + 1) // 2}")
    if not 1 <= rows_total <= ROWS_LIMIT:
        raise DataError(f"rows_total {rows_total} of a line search is outside 1..{ROWS_LIMIT}; split the job")
    gradient = moments[:k].astype(np.float64) / float(1 << (SEARCH_RESIDUAL_BITS + DIRECTION_BITS))
    unit = float(1 << (CURVATURE_BITS + 2 * DIRECTION_BITS))
    matrix = np.zeros((k, k), dtype=np.float64)
    row, column = np.triu_indices(k)
    matrix[row, column] = moments[k:].astype(np.float64) / unit
    matrix[column, row] = matrix[row, column]
    noise_gradient = noise_std_gradient / float(1 << (SEARCH_RESIDUAL_BITS + DIRECTION_BITS))
    noise_curvature = noise_std_curvature / unit
    ridge = RIDGE * max(float(matrix[-1, -1]), 1.0) + 2.0 * noise_curvature * math.sqrt(float(k)) + noise_gradient
    for _ in range(60):
        try:
            lower = cholesky.factor(matrix + ridge * np.eye(k))
            break
        except DataError:
            ridge *= 2.0
    else:
        raise DataError(
            "the curvature of the line search is not usable; the sums are broken or the noise far too large"
        )
    step = cholesky.solve(lower, gradient).tolist()
    bound = CLIP * sum(abs(s) for s in step[:-1]) + abs(step[-1])
    damping = 2.0 / (2.0 + bound)
    return tuple(x + damping * s for x, s in zip(a, step, strict=True))


def alphas(a: tuple[float, ...], scales: Sequence[int]) -> tuple[int, ...]:
    """Fixed-point step sizes: round(a 2**(SCORE_BITS + ALPHA_BITS) / scale) per direction, the intercept's change at
    2**-SCORE_BITS last.

    Raises DataError if a step size is out of range.
    """
    if len(a) != len(scales) + 1:
        raise DataError(f"{len(a)} coordinates for {len(scales)} directions and the intercept")
    steps = [
        round(x * float(1 << (SCORE_BITS + ALPHA_BITS)) / float(scale)) for x, scale in zip(a, scales, strict=False)
    ]
    if any(abs(step) > ALPHA_LIMIT << SCORE_BITS for step in steps) or abs(a[-1]) > 64.0:
        raise DataError("the line search diverged: a step size is out of range; check labels and noise")
    return (*steps, round(a[-1] * float(1 << SCORE_BITS)))


def total_step(directions: Sequence[Int64], alphas: Sequence[int]) -> Int64:
    """The round's step of every row without the intercept: int64[n]; the next round's "previous step"."""
    if len(alphas) != len(directions) + 1:
        raise DataError(f"{len(alphas)} step sizes for {len(directions)} directions and the intercept")
    total = np.zeros_like(directions[0])
    for d, alpha in zip(directions, alphas, strict=False):
        total += scaled(d, alpha)
    return total


def advance(score: Int64, directions: Sequence[Int64], alphas: Sequence[int]) -> Int64:
    """The score after a step: z + sum of round(alpha d) + intercept change; int64[n], directions not clipped."""
    return score + total_step(directions, alphas) + np.int64(alphas[-1])


def owner_scale(spreads: Sequence[int], forward_noise: float = 1.0) -> int:
    """Scale of the noised sum of the owners' directions: sqrt(1 + forward_noise**2) times the sum of their spreads.

    forward_noise: the multiplier of the settings; each owner adds noise of that many spreads to its direction.
    """
    if not (math.isfinite(forward_noise) and 0 <= forward_noise <= 1000):
        raise DataError(f"forward noise of {forward_noise} spreads is outside 0..1000")
    power = round((1.0 + forward_noise * forward_noise) * float(1 << 20))
    return max(1, math.isqrt(power * sum(spreads) ** 2 >> 20))


def previous_scale(alphas: Sequence[int], scales: Sequence[int]) -> int:
    """Scale of the previous step: triangle bound from that round's step sizes and scales."""
    return max(1, sum(abs(alpha) * scale for alpha, scale in zip(alphas, scales, strict=False)) >> ALPHA_BITS)
