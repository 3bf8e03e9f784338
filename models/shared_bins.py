"""Bins that several banks share without pooling a value: three rounds of counts on a fixed public grid.

What it guarantees: a bank contributes integer counts only, one cell per row, feature and level; everything else here is
computed from the released totals (post-processing), so all banks get the same bins, and the rows in them.
Formula: level 1 counts the cells of a grid over float64 (sign, octave, 16 steps); each cell with more than its share of
the rows is cut into 256 at level 2, and again at level 3, which resolves 2**-20 of a value: a year, an age, an atom.
Noise: neighbouring cells are merged until their count exceeds THRESHOLD standard deviations of the merged noise.
Sensitivity to one row: L2 = sqrt(features + 1) at level 1 (it also counts the label), sqrt(numeric features) later.
Source: equi-depth histograms by hierarchical refinement; Qardaji, Yang, Li, "Understanding Hierarchical Methods for
Differentially Private Histograms", PVLDB 6(14), 2013.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.binning import ColumnSpec, FeatureBins, Tower, fit_categorical, fit_numeric, is_missing, just_above, numeric
from models.errors import DataError
from models.fixed_point import Float64, Int8, Int64

LEVELS = 3
PIECES = 256
THRESHOLD = 3.0  # standard deviations; a cell of pure noise passes with probability 0.0013
_LARGEST = float(np.finfo(np.float64).max)


def _grid() -> Float64:
    octave, step = np.divmod(np.arange(64 * 16), 16)
    size = np.ldexp(1.0 + step / 16.0, octave - 20)  # 2**-20 .. 2**44, exact
    return np.concatenate((-size[::-1], [0.0], just_above(np.zeros(1)), size))


GRID_EDGES = _grid()
GRID = len(GRID_EDGES) + 1  # 2051 cells; the first and the last take everything beyond
GRID_CELLS = np.column_stack((np.append(-_LARGEST, GRID_EDGES), np.append(GRID_EDGES, _LARGEST)))  # [low, high)


def first_size(spec: ColumnSpec) -> int:
    """Numbers of a column at level 1: grid cells, codes, missing; or categories, other, missing."""
    return GRID + len(spec.codes) + 1 if spec.kind == "numeric" else len(spec.categories) + 2


def grid_counts(spec: ColumnSpec, column: npt.NDArray[Any]) -> Int64:
    """Level 1: rows per cell, int64[first_size(spec)]; raises DataError on text or infinity in a numeric column."""
    if spec.kind == "categorical":
        place = {category: i for i, category in enumerate(spec.categories)}
        other, missing = len(spec.categories), len(spec.categories) + 1
        found = (missing if is_missing(v) else place.get(str(v), other) for v in column.tolist())
        cell = np.fromiter(found, dtype=np.int64, count=len(column))
    else:
        x = _numbers(spec, column)
        cell = np.searchsorted(GRID_EDGES, x, side="right").astype(np.int64)
        for i, code in enumerate(spec.codes):
            cell[x == code] = GRID + i
        cell[np.isnan(x)] = GRID + len(spec.codes)
    return np.bincount(cell, minlength=first_size(spec)).astype(np.int64)


def heavy(counts: Int64, cells: Float64, share: float, noise_std: float = 0.0) -> Float64:
    """The cells to refine: those with more than `share` rows (and clearly more than noise); float64[k, 2] intervals
    [low, high).

    counts: int64[m] released counts of `cells`, float64[m, 2]. Cells of a single value and the two unbounded ones
    cannot be refined.
    """
    limit = max(share, THRESHOLD * noise_std)
    width = cells[:, 1] - np.where(cells[:, 0] == float(just_above(np.zeros(1))[0]), 0.0, cells[:, 0])
    bounded = (np.abs(cells) < _LARGEST).all(axis=1)
    # 2**-30 of the value: far above the spacing of doubles, so that 256 pieces have distinct ends
    wide = width > np.maximum(np.abs(cells).max(axis=1) * 2.0**-30, 2.0**-60)
    refined: Float64 = cells[(counts > limit) & bounded & wide]
    return refined


def pieces(cells: Float64) -> Float64:
    """Each cell cut into 256 equal pieces: float64[k * 256, 2]; exact, because cells are binary fractions."""
    low = np.where(cells[:, 0] == float(just_above(np.zeros(1))[0]), 0.0, cells[:, 0])
    ends = low[:, None] + (cells[:, 1] - low)[:, None] * (np.arange(PIECES + 1) / PIECES)[None, :]
    ends[:, 0] = cells[:, 0]
    return np.column_stack((ends[:, :-1].ravel(), ends[:, 1:].ravel()))


def refined_counts(spec: ColumnSpec, column: npt.NDArray[Any], heavy_cells: Float64) -> Int64:
    """Level 2 or 3: rows in each piece of the heavy cells, int64[k * 256]; codes and missing are not counted."""
    if not len(heavy_cells):
        return np.zeros(0, dtype=np.int64)
    if spec.kind == "categorical":
        raise DataError(f"feature {spec.name!r} is categorical; it has no cells to refine")
    x = _numbers(spec, column)
    x = x[~np.isnan(x) & ~np.isin(x, np.array(spec.codes, dtype=np.float64))]
    cells = pieces(heavy_cells)
    at = np.searchsorted(cells[:, 0], x, side="right") - 1
    inside = (at >= 0) & (x < cells[np.maximum(at, 0), 1])
    return np.bincount(at[inside], minlength=len(cells)).astype(np.int64)


def _numbers(spec: ColumnSpec, column: npt.NDArray[Any]) -> Float64:
    try:
        return numeric(column)
    except DataError as error:
        raise DataError(f"feature {spec.name!r}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class SharedBinning:
    """The state of the banks' common binning: what has been released so far. The same at every bank.

    specs: the banks' columns; rows: training rows over all banks (public); released: the totals of levels 1, 2, 3.
    noise_std: standard deviation of the noise on every released number, 0 = exact.
    """

    specs: tuple[ColumnSpec, ...]
    rows: int
    max_bins: int
    least_count: int
    noise_std: float = 0.0
    released: tuple[Int64, ...] = ()

    def __post_init__(self) -> None:
        if not self.specs:
            raise DataError("the label holder needs at least one column; check the contract")
        if self.rows < 2:
            raise DataError(f"{self.rows} training rows; at least 2 are needed")
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise DataError(f"noise standard deviation {self.noise_std} must not be negative")

    @property
    def level(self) -> int:
        """The level to release next, 1..3; 4 when all are there."""
        return len(self.released) + 1

    @property
    def positives(self) -> int:
        """The released (noisy) number of positive labels, limited to 1..rows - 1."""
        return min(max(int(self.released[0][0]), 1), self.rows - 1)


def level_size(state: SharedBinning) -> int:
    """How many numbers the next level has; 0 means nothing to release (add an empty total)."""
    if state.level == 1:
        return 1 + sum(first_size(spec) for spec in state.specs)
    if state.level > LEVELS:
        return 0
    return sum(len(refined[state.level - 2]) * PIECES for refined, _ in _refinements(state))


def level_counts(state: SharedBinning, columns: Mapping[str, npt.NDArray[Any]], label: Int8) -> Int64:
    """One bank's counts at the next level, int64[level_size(state)]; at level 1 the first number is its sum of labels.

    columns, label: the bank's training rows. Summed over banks (and noised) they are the total for `with_level`.
    """
    absent = [spec.name for spec in state.specs if spec.name not in columns]
    if absent:
        raise DataError(f"column {absent[0]!r} is missing ({len(absent)} in all); give every column of the contract")
    if state.level == 1:
        parts = [np.array([int(label.sum())], dtype=np.int64)]
        parts += [grid_counts(spec, columns[spec.name]) for spec in state.specs]
    elif state.level <= LEVELS:
        parts = [
            refined_counts(spec, columns[spec.name], refined[state.level - 2])
            for spec, (refined, _) in zip(state.specs, _refinements(state), strict=True)
        ]
    else:
        raise DataError(f"all {LEVELS} levels are released already")
    return np.concatenate(parts)


def with_level(state: SharedBinning, total: Int64) -> SharedBinning:
    """The state after the next level's total over the banks; raises DataError on a wrong length."""
    if state.level > LEVELS:
        raise DataError(f"all {LEVELS} levels are released already")
    if total.shape != (level_size(state),):
        raise DataError(f"level {state.level} has {level_size(state)} numbers, not {total.shape}")
    return replace(state, released=(*state.released, total))


def fit_shared(state: SharedBinning) -> tuple[Tower, Int64]:
    """The banks' tower and the (noisy, at least 0) rows in each of its bins, from the three released levels."""
    if state.level <= LEVELS:
        raise DataError(f"level {state.level} is not released yet")
    features, counts = [], []
    for i, spec in enumerate(state.specs):
        first = _first(state)[i]
        bins, inside = _fit_categories(state, spec, first) if spec.kind == "categorical" else _fit_values(state, i)
        features.append(bins)
        counts.append(np.maximum(inside, 0))
    return Tower(features=tuple(features), has_no_file=False), np.concatenate(counts)


def _fit_categories(state: SharedBinning, spec: ColumnSpec, first: Int64) -> tuple[FeatureBins, Int64]:
    least = max(state.least_count, math.ceil(THRESHOLD * state.noise_std))
    bins = fit_categorical(spec.name, spec.categories, first[:-2], state.max_bins, least)
    kept = [spec.categories.index(category) for category in bins.categories]
    rest = int(first[:-1].sum()) - int(first[kept].sum())
    return bins, np.array([*first[kept].tolist(), rest, int(first[-1])], dtype=np.int64)


def _fit_values(state: SharedBinning, feature: int) -> tuple[FeatureBins, Int64]:
    spec, first = state.specs[feature], _first(state)[feature]
    cells, counts = _leaves(state, feature)
    low, high, merged = _significant(cells, counts, state.noise_std)
    # codes are counted apart, so a cell that happens to start at one is an ordinary cell: they join after the fit
    bins = replace(fit_numeric(spec.name, low, merged, state.max_bins, uppers=high), codes=spec.codes)
    inside = np.zeros(bins.size, dtype=np.int64)
    # every cell lies in one bin, because edges are ends of cells; counts of all cells keep the sums unbiased
    np.add.at(inside, np.searchsorted(np.array(bins.edges), cells[:, 0], side="right"), counts)
    inside[bins.ordered :] = first[GRID:]
    return bins, inside


def _first(state: SharedBinning) -> list[Int64]:
    ends = np.cumsum([1, *(first_size(spec) for spec in state.specs)])
    return [state.released[0][a:b] for a, b in itertools.pairwise(ends.tolist())]


def _refinements(state: SharedBinning) -> list[tuple[list[Float64], list[Int64]]]:
    """Per feature: the heavy cells of levels 2 and 3 (as far as known) and the released counts of their pieces.

    In a released level the pieces follow each other feature by feature.
    """
    share = state.rows / state.max_bins
    starts = [0] * (LEVELS + 1)
    out: list[tuple[list[Float64], list[Int64]]] = []
    for spec, first in zip(state.specs, _first(state), strict=True):
        refined: list[Float64] = []
        counts: list[Int64] = []
        known, cells = first[:GRID], GRID_CELLS
        for level in range(2, min(state.level, LEVELS) + 1):
            if spec.kind == "categorical":
                refined.append(np.zeros((0, 2)))
                counts.append(np.zeros(0, dtype=np.int64))
                continue
            refined.append(heavy(known, cells, share, state.noise_std))
            cells = pieces(refined[-1])
            if level < state.level:
                known = state.released[level - 1][starts[level] : starts[level] + len(cells)]
                starts[level] += len(cells)
                counts.append(known)
        out.append((refined, counts))
    return out


def _leaves(state: SharedBinning, feature: int) -> tuple[Float64, Int64]:
    """The finest released cells of a numeric feature in ascending order, and their counts."""
    refined, released = _refinements(state)[feature]
    cells, counts = GRID_CELLS, _first(state)[feature][:GRID]
    for heavy_cells, known in zip(refined, released, strict=True):
        kept = ~np.isin(cells[:, 0], heavy_cells[:, 0])
        cells = np.concatenate((cells[kept], pieces(heavy_cells)))
        counts = np.concatenate((counts[kept], known))
        order = np.argsort(cells[:, 0], kind="stable")
        cells, counts = cells[order], counts[order]
    return cells, counts


def _significant(cells: Float64, counts: Int64, noise_std: float) -> tuple[Float64, Float64, Int64]:
    """Runs of neighbouring cells with a significant count: (low, high, count), ascending.

    Cells are merged until their count exceeds THRESHOLD standard deviations of the merged noise. A cell that is
    significant alone stays alone (an atom must not be blurred), and what was not yet significant before it is left out.
    """
    runs: list[tuple[float, float, int]] = []
    low, mass, members = 0.0, 0, 0
    for (start, stop), count in zip(cells.tolist(), counts.tolist(), strict=True):
        if count > THRESHOLD * noise_std:
            runs.append((start, stop, count))
            mass = members = 0
            continue
        low = low if members else start
        mass, members = mass + count, members + 1
        if mass > THRESHOLD * noise_std * math.sqrt(members):
            runs.append((low, stop, mass))
            mass = members = 0
    return (
        np.array([run[0] for run in runs], dtype=np.float64),
        np.array([run[1] for run in runs], dtype=np.float64),
        np.array([run[2] for run in runs], dtype=np.int64),
    )
