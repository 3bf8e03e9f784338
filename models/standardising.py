"""Inputs of a network, from statistics that several banks add up: no pooled table, two passes of counts.

Guarantee: a bank contributes integers only (`first_pass`, `second_pass`); the preparation is computed from their sums,
so all banks have the same one, and it is the one of the pooled rows. What the sums release: by numeric column the rows
with a value and the mean of g (pass 1), and how many rows fall into each cell around that mean (pass 2). They are exact
(no epsilon): for simulation, or where the banks agree to show each other these counts. Categories are a public list.
Formula: g = sign(x) log(1 + |x|); cells at mean(g) +- 2^(k / STEPS), k from -12 STEPS to 5 STEPS.
Inputs of a numeric column: sqrt(12) (share of rows below - 1/2), linear within a cell; (g - mean) / standard deviation,
clipped to +-CLIP; one indicator for missing and one for each special code (the first two are 0 there).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.binning import ColumnSpec, is_missing, numeric
from models.errors import DataError

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

PASSES = 2
STEPS = 6
CLIP = 5.0
_MEAN_BITS = 16
_LARGEST_G = 45.0  # log(1 + 1e19)
_DISTANCES: Float64 = np.exp2(np.arange(-12 * STEPS, 5 * STEPS + 1) / STEPS)
_OFFSETS: Float64 = np.concatenate((-_DISTANCES[::-1], _DISTANCES))
CELLS = len(_OFFSETS) + 1


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Inputs:
    """SECRET (rows). What a network takes: `numbers` float32[n, f], `codes` int64[n, c], each below its size."""

    numbers: Float32
    codes: Int64

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        return f"Inputs({self.numbers.shape[0]} rows)"

    def take(self, rows: npt.NDArray[Any]) -> "Inputs":
        """The rows at these places, or under this mask."""
        return Inputs(numbers=self.numbers[rows], codes=self.codes[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """How every bank prepares its rows. `mean`, `deviation` float64[f] of g; `below` float64[f, CELLS + 1]: share of
    rows below each cell; f numeric columns in the order of `specs`."""

    specs: tuple[ColumnSpec, ...]
    mean: Float64
    deviation: Float64
    below: Float64

    def inputs(self, columns: Mapping[str, npt.NDArray[Any]]) -> Inputs:
        """The rows of a table; `DataError` for text or infinity in a numeric column."""
        numbers: list[Float64] = []
        codes: list[Int64] = []
        place = 0
        for spec in self.specs:
            if spec.kind == "categorical":
                codes.append(_codes(spec, columns[spec.name]))
                continue
            g, special = _values(spec, columns[spec.name])
            known = ~np.isnan(g)
            offset = np.where(known, g, self.mean[place]) - self.mean[place]
            edges = np.concatenate(([-2 * _LARGEST_G], _OFFSETS, [2 * _LARGEST_G]))
            rank = np.interp(offset, edges, self.below[place])
            numbers.append(np.where(known, np.sqrt(12.0) * (rank - 0.5), 0.0))
            numbers.append(np.clip(offset / self.deviation[place], -CLIP, CLIP))
            numbers.extend((special == value).astype(np.float64) for value in range(len(spec.codes) + 1))
            place += 1
        rows = len(next(iter(columns.values())))
        return Inputs(
            numbers=np.column_stack(numbers).astype(np.float32) if numbers else np.zeros((rows, 0), np.float32),
            codes=np.column_stack(codes) if codes else np.zeros((rows, 0), np.int64),
        )


def first_pass(specs: tuple[ColumnSpec, ...], columns: Mapping[str, npt.NDArray[Any]]) -> Int64:
    """int64[2 f]: by numeric column the rows with a value, and the sum of g in units of 2^-16."""
    parts: list[int] = []
    for spec in _numeric(specs):
        g, _ = _values(spec, columns[spec.name])
        known = g[~np.isnan(g)]
        parts += [len(known), int(np.rint(known * 2.0**_MEAN_BITS).sum())]
    return np.array(parts, np.int64)


def second_pass(specs: tuple[ColumnSpec, ...], columns: Mapping[str, npt.NDArray[Any]], first: Int64) -> Int64:
    """int64[f CELLS]: rows in each cell around the mean, which the summed `first` int64[2 f] gives."""
    parts = [np.zeros(0, np.int64)]
    for spec, mean in zip(_numeric(specs), _means(specs, first), strict=True):
        g, _ = _values(spec, columns[spec.name])
        cell = np.searchsorted(_OFFSETS, g[~np.isnan(g)] - mean, side="right")
        parts.append(np.bincount(cell, minlength=CELLS).astype(np.int64))
    return np.concatenate(parts)


def counts_length(specs: tuple[ColumnSpec, ...]) -> int:
    """Integers that the longer of the two passes needs."""
    return len(_numeric(specs)) * CELLS


def largest_count(rows: int) -> int:
    """Largest magnitude of one integer of a bank with `rows` rows."""
    return int(_LARGEST_G * (1 << _MEAN_BITS)) * rows


def prepare(specs: tuple[ColumnSpec, ...], first: Int64, second: Int64) -> Preparation:
    """The preparation from the sums of both passes over all banks; `DataError` for sums that no rows give."""
    count = len(_numeric(specs))
    if first.shape != (2 * count,) or second.shape != (count * CELLS,):
        raise DataError(f"sums of {len(first)} and {len(second)} numbers for {count} numeric columns; another version")
    counts = second.reshape(count, CELLS)
    if (counts < 0).any() or (counts.sum(axis=1) != first[::2]).any():
        raise DataError("the counts of the two passes differ: some bank changed its rows between them")
    mean = _means(specs, first)
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    below = np.concatenate((np.zeros((count, 1)), np.cumsum(counts / total, axis=1)), axis=1)
    middle = np.concatenate(([_OFFSETS[0]], (_OFFSETS[1:] + _OFFSETS[:-1]) / 2, [_OFFSETS[-1]]))
    deviation = np.sqrt((counts / total) @ middle**2)
    return Preparation(specs=specs, mean=mean, deviation=np.where(deviation > 0, deviation, 1.0), below=below)


def _numeric(specs: tuple[ColumnSpec, ...]) -> tuple[ColumnSpec, ...]:
    return tuple(spec for spec in specs if spec.kind == "numeric")


def _means(specs: tuple[ColumnSpec, ...], first: Int64) -> Float64:
    if first.shape != (2 * len(_numeric(specs)),):
        raise DataError(f"a sum of {len(first)} numbers for {len(_numeric(specs))} numeric columns; another version")
    means: Float64 = first[1::2] / (np.maximum(first[::2], 1) * 2.0**_MEAN_BITS)
    return means


def _values(spec: ColumnSpec, column: npt.NDArray[Any]) -> tuple[Float64, Int64]:
    """(g, NaN where there is no quantity; place of the special code, len(codes) for missing, -1 for a quantity)."""
    x = numeric(column)
    special = np.full(len(x), -1, np.int64)
    special[np.isnan(x)] = len(spec.codes)
    for place, code in enumerate(spec.codes):
        special[x == code] = place
    g = np.clip(np.sign(x) * np.log1p(np.abs(x)), -_LARGEST_G, _LARGEST_G)
    return np.where(special < 0, g, np.nan), special


def code_size(spec: ColumnSpec) -> int:
    """Values of a categorical column: its public categories, other, missing."""
    return len(spec.categories) + 2


def _codes(spec: ColumnSpec, column: npt.NDArray[Any]) -> Int64:
    place = {category: number for number, category in enumerate(spec.categories)}
    other, missing = len(spec.categories), len(spec.categories) + 1
    found = (missing if is_missing(value) else place.get(str(value), other) for value in column.tolist())
    return np.fromiter(found, dtype=np.int64, count=len(column))
