"""Cholesky factor and solve with the same bits on every IEEE-754 CPU.

What it guarantees: only elementwise +, -, *, / and sqrt, each element always in the same order of operations; no
BLAS, no reduction whose order a library may choose. So a party's direction is the same in the federated run and in
its plaintext twin, on any machine.
Formula: A = L L'; right-looking, l_jj = sqrt(a_jj), l_ij = a_ij / l_jj, a_ik -= l_ij l_kj for j ascending.
Source: Golub and Van Loan, Matrix Computations, 4th edition, section 4.2.
"""

from __future__ import annotations

import math

import numpy as np

from models.errors import DataError
from models.fixed_point import Float64

_TILE = 96  # columns and rows per tile: a tile and its temporary stay in the cache; results do not depend on it


def factor(a: Float64) -> Float64:
    """Lower factor L of a symmetric positive definite float64[r, r] (only the lower triangle is read).

    Raises DataError, naming the pivot, if the matrix is not positive definite or not finite.
    """
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise DataError(f"a matrix of shape {a.shape} is not square")
    r = a.shape[0]
    lower = np.tril(a).astype(np.float64)
    for start in range(0, r, _TILE):
        stop = min(start + _TILE, r)
        panel = lower[start:, start:stop].copy()
        for j in range(stop - start):
            pivot = float(panel[j, j])
            if not (pivot > 0.0 and math.isfinite(pivot)):
                raise DataError(f"matrix is not positive definite: pivot {start + j} is {pivot:g}; raise the ridge")
            panel[j:, j] /= math.sqrt(pivot)
            panel[j + 1 :, j + 1 :] -= panel[j + 1 :, j, None] * panel[None, j + 1 : stop - start, j]
        lower[start:, start:stop] = panel
        columns = np.ascontiguousarray(panel[stop - start :].T)
        for top in range(stop, r, _TILE):
            bottom = min(top + _TILE, r)
            for left in range(stop, bottom, _TILE):
                right = min(left + _TILE, bottom)
                tile = lower[top:bottom, left:right].copy()
                for column in columns:
                    tile -= column[top - stop : bottom - stop, None] * column[None, left - stop : right - stop]
                lower[top:bottom, left:right] = tile
    return np.tril(lower)


def solve(lower: Float64, b: Float64) -> Float64:
    """x with L L' x = b, for the factor of `factor`; b: float64[r]. Raises DataError on unequal sizes."""
    r = lower.shape[0]
    if b.shape != (r,):
        raise DataError(f"right-hand side of shape {b.shape} for a factor of {r} rows")
    by_column = np.ascontiguousarray(lower.T)
    x = b.astype(np.float64)
    for j in range(r):
        x[j] /= lower[j, j]
        x[j + 1 :] -= x[j] * by_column[j, j + 1 :]
    for j in range(r - 1, -1, -1):
        x[j] /= lower[j, j]
        x[:j] -= x[j] * lower[j, :j]
    return x
