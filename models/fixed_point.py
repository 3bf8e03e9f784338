"""Fixed-point numbers of the training loop: logits, residuals and curvatures as integers per row.

What it guarantees: every per-row number is an integer before any sum, and is read from a table that is computed in
decimal arithmetic; results therefore do not depend on the CPU, on libm, or on how rows are split over banks.
Formula: residual v = y - p(z), curvature q = p(z) (1 - p(z)), p(z) = 1 / (1 + exp(-z)); z in logits.
Units: logits at 2**-SCORE_BITS, residuals at 2**-RESIDUAL_BITS, curvatures at 2**-CURVATURE_BITS, step sizes at
2**-ALPHA_BITS.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from models.errors import DataError

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Int8 = npt.NDArray[np.int8]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

SCORE_BITS = 16
RESIDUAL_BITS = 19
CURVATURE_BITS = 8
ALPHA_BITS = 24

TABLE_LIMIT = 16  # logits; beyond it p differs from 0 or 1 by less than 2**-23, under half a unit of the residual
TABLE_STEP_BITS = (
    10  # one entry each 2**-10 logit: p is off by at most 2**-13, an order below what a bin's noise can resolve
)
SHIFT_LIMIT = 2**62
_DECIMAL = Context(prec=40, rounding=ROUND_HALF_EVEN)


def round_shift(x: Int64, bits: int) -> Int64:
    """Round x / 2**bits to the nearest integer, ties towards plus infinity.

    x: int64 array with |x| < 2**62 (checked, so that adding the half cannot overflow); bits: 0..62.
    Raises DataError if a value is out of range.
    """
    if not 0 <= bits <= 62:
        raise DataError(f"shift of {bits} bits is outside 0..62; check the scales")
    if x.size and (int(x.max()) >= SHIFT_LIMIT or int(x.min()) <= -SHIFT_LIMIT):
        raise DataError("fixed-point overflow: a value reaches 2**62 before rounding; lower the scale or the step")
    if bits == 0:
        return x.copy()
    rounded: Int64 = np.right_shift(x + np.int64(1 << (bits - 1)), np.int64(bits))
    return rounded


@lru_cache(maxsize=1)
def probability_table() -> Float64:
    """p(z) at z = -16, -16 + 2**-10, ..., 16: float64[32769], each the double nearest to the exact value.

    Computed once with correctly rounded decimal exp (General Decimal Arithmetic); read-only.
    """
    half = TABLE_LIMIT << TABLE_STEP_BITS
    one, step = Decimal(1), Decimal(1 << TABLE_STEP_BITS)
    upper = [_DECIMAL.divide(one, one + _DECIMAL.exp(_DECIMAL.divide(Decimal(-k), step))) for k in range(half + 1)]
    lower = [one - p for p in upper[:0:-1]]
    table = np.array([float(p) for p in lower + upper], dtype=np.float64)
    table.flags.writeable = False
    return table


@lru_cache(maxsize=1)
def residual_table() -> Int64:
    """round(p * 2**RESIDUAL_BITS), int64[32769]; exact, because scaling a double by a power of two is."""
    table = np.rint(probability_table() * float(1 << RESIDUAL_BITS)).astype(np.int64)
    table.flags.writeable = False
    return table


@lru_cache(maxsize=1)
def curvature_table() -> Int64:
    """round(p (1 - p) * 2**CURVATURE_BITS), int64[32769]."""
    p = probability_table()
    table = np.rint(p * (1.0 - p) * float(1 << CURVATURE_BITS)).astype(np.int64)
    table.flags.writeable = False
    return table


def _table_index(score: Int64) -> Int64:
    limit = TABLE_LIMIT << SCORE_BITS
    return round_shift(np.clip(score, -limit, limit), SCORE_BITS - TABLE_STEP_BITS) + (TABLE_LIMIT << TABLE_STEP_BITS)


def residual(score: Int64, label: Int8) -> Int64:
    """Residual v = y - p(z) of the logistic loss, at 2**-RESIDUAL_BITS.

    score: int64[n], logits at 2**-SCORE_BITS, clipped to +-16; label: int8[n], 0 or 1. Returns int64[n], |v| <=
    2**RESIDUAL_BITS.
    Raises DataError on other labels or unequal lengths.
    """
    if score.shape != label.shape:
        raise DataError(
            f"scores of shape {score.shape} and labels of shape {label.shape} differ; give one of each per row"
        )
    if label.size and not bool(np.isin(label, (0, 1)).all()):
        raise DataError("labels must be 0 or 1; map other codes before training")
    return (label.astype(np.int64) << RESIDUAL_BITS) - residual_table()[_table_index(score)]


def curvature(score: Int64) -> Int64:
    """Curvature q = p(z) (1 - p(z)), at 2**-CURVATURE_BITS; int64[n], 0 <= q <= 2**(CURVATURE_BITS - 2)."""
    return curvature_table()[_table_index(score)]


def logit_of_rate(positives: int, rows: int) -> int:
    """ln(positives / (rows - positives)) at 2**-SCORE_BITS, rounded; the score every row starts with.

    A noisy count is clamped to 1..rows - 1, so that a rare label never stops a job. Raises DataError for fewer than 2
    rows.
    """
    if rows < 2:
        raise DataError(f"{rows} training rows: at least 2 are needed to have a base rate")
    good = min(max(positives, 1), rows - 1)
    odds = _DECIMAL.divide(Decimal(good), Decimal(rows - good))
    scaled = _DECIMAL.multiply(_DECIMAL.ln(odds), Decimal(1 << SCORE_BITS))
    return int(scaled.to_integral_value(rounding=ROUND_HALF_EVEN))
