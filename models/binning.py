"""Bins of features and the 0/1 design of a tower: which bin each row falls into.

What it guarantees: bins are a deterministic function of (values, counts); a row falls into exactly one bin of every
feature of a party that knows it; nothing is imputed: missing, special codes and "no file" have bins of their own.
Local bin order: numeric: ordered bins, special codes, missing. Categorical: known categories, other, missing.
Source: Siddiqi, Credit Risk Scorecards (2006), chapter 6, for fine classing with special values apart; the rule for
atoms is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.errors import DataError
from models.fixed_point import Bool, Float64, Int32, Int64

Kind = Literal["numeric", "categorical"]
OTHER, MISSING, NO_FILE = "other", "missing", "no file"
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """What the contract says about a column before anyone looks at it.

    codes: special numeric codes that get bins of their own. categories: the public code list of a label holder's
    categorical column (empty for an owner, who finds its categories itself).
    """

    name: str
    kind: Kind
    codes: tuple[float, ...] = ()
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # the rules for codes and categories are those of bins without edges
        FeatureBins(name=self.name, kind=self.kind, codes=self.codes, categories=self.categories)


@dataclass(frozen=True, kw_only=True)
class FeatureBins:
    """The bins of one feature.

    edges: ascending floats; a value x is in ordered bin searchsorted(edges, x, side="right"). atoms: ordered bins
    that hold one value (or one indivisible cell) with more than its share of the rows. codes: special numeric codes,
    ascending. categories: known categories.
    """

    name: str
    kind: Kind
    edges: tuple[float, ...] = ()
    codes: tuple[float, ...] = ()
    atoms: tuple[int, ...] = ()
    categories: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("numeric", "categorical"):
            raise DataError(f"feature {self.name!r}: kind {self.kind!r} is not numeric or categorical")
        for what, numbers in (("edges", self.edges), ("codes", self.codes)):
            if not all(math.isfinite(x) for x in numbers) or any(a >= b for a, b in itertools.pairwise(numbers)):
                raise DataError(f"feature {self.name!r}: {what} must be finite and strictly ascending")
        if self.kind == "categorical" and (self.edges or self.codes or self.atoms):
            raise DataError(f"feature {self.name!r}: a categorical feature has no edges, codes or atoms")
        if self.kind == "numeric" and self.categories:
            raise DataError(f"feature {self.name!r}: a numeric feature has no categories")
        if len(set(self.categories)) != len(self.categories):
            raise DataError(f"feature {self.name!r}: categories must be distinct")
        if any(not 0 <= a <= len(self.edges) for a in self.atoms) or list(self.atoms) != sorted(set(self.atoms)):
            raise DataError(f"feature {self.name!r}: atoms must be ascending ordered bins in 0..{len(self.edges)}")

    @property
    def ordered(self) -> int:
        """Number of ordered numeric bins (0 for a categorical feature)."""
        return len(self.edges) + 1 if self.kind == "numeric" else 0

    @property
    def size(self) -> int:
        """Number of bins; the last one is "missing"."""
        if self.kind == "numeric":
            return self.ordered + len(self.codes) + 1
        return len(self.categories) + 2

    @property
    def neighbours(self) -> tuple[tuple[int, int], ...]:
        """Pairs (i, i + 1) of ordered bins that a smooth weight should link; none across atoms, codes or missing."""
        atoms = set(self.atoms)
        return tuple((i, i + 1) for i in range(self.ordered - 1) if i not in atoms and i + 1 not in atoms)

    def labels(self) -> tuple[str, ...]:
        """One human label per bin, for example "[0.5, 1.2)", "= 0", "code -7", "other", "missing"."""
        if self.kind == "categorical":
            return (*self.categories, OTHER, MISSING)
        return (*_interval_labels(self.edges), *(f"code {code:.10g}" for code in self.codes), MISSING)

    def to_json(self) -> dict[str, Any]:
        """Plain dict; floats survive JSON exactly."""
        return {
            "name": self.name,
            "kind": self.kind,
            "edges": list(self.edges),
            "codes": list(self.codes),
            "atoms": list(self.atoms),
            "categories": list(self.categories),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FeatureBins:
        """Inverse of to_json; raises DataError on a missing field or bad values."""
        try:
            return cls(
                name=str(data["name"]),
                kind=data["kind"],
                edges=tuple(float(x) for x in data["edges"]),
                codes=tuple(float(x) for x in data["codes"]),
                atoms=tuple(int(x) for x in data["atoms"]),
                categories=tuple(str(x) for x in data["categories"]),
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"bins are malformed: {error!r}; expected the fields of FeatureBins.to_json") from error


NARROW = 2.0**-18
"""Width of a bin relative to its value below which the label names the value instead of the interval."""


def _interval_labels(edges: tuple[float, ...]) -> list[str]:
    if not edges:
        return ["any value"]
    short = [f"{x:.9g}" for x in edges]
    previous = [_just_below(x) for x in edges]
    # an edge just above another number x means "greater than x"
    after = [_is_round(p) and not _is_round(x) for p, x in zip(previous, edges, strict=True)]
    text = [f"{p:.9g}" if a else s for p, a, s in zip(previous, after, short, strict=True)]
    if len({(t, a) for t, a in zip(text, after, strict=True)}) != len(text):
        text, after = [repr(x) for x in edges], [False] * len(edges)
    # a released cell as narrow as this holds one value as far as anyone can tell
    narrow = [b - a <= abs(a) * NARROW for a, b in itertools.pairwise(edges)]
    for i, is_narrow in enumerate(narrow):
        if is_narrow:
            after[i + 1], text[i + 1] = True, text[i]
    labels = [f"<= {text[0]}" if after[0] else f"< {text[0]}"]
    for i in range(len(edges) - 1):
        if edges[i + 1] == float(just_above(np.array(edges[i]))):
            labels.append(f"= {text[i]}")
            continue
        if narrow[i]:
            labels.append(f"\u2248 {text[i]}")
            continue
        left = f"({text[i]}" if after[i] else f"[{text[i]}"
        right = f"{text[i + 1]}]" if after[i + 1] else f"{text[i + 1]})"
        labels.append(f"{left}, {right}")
    labels.append(f"> {text[-1]}" if after[-1] else f">= {text[-1]}")
    return labels


def just_above(x: Float64) -> Float64:
    """The next double above each value; above 0 the least normal one, as some libraries flush subnormals to 0."""
    return np.where(x == 0.0, _TINY, np.nextafter(x, math.inf))


def _just_below(x: float) -> float:
    return 0.0 if x == _TINY else math.nextafter(x, -math.inf)


def _is_round(x: float) -> bool:
    return len(repr(x)) <= 12


def fit_numeric(
    name: str,
    values: Float64,
    counts: Int64,
    max_bins: int,
    codes: Sequence[float] = (),
    uppers: Float64 | None = None,
) -> FeatureBins:
    """Cut a numeric feature: heavy single values get bins of their own, quantiles of the rest the others.

    values: float64[m], finite, strictly ascending; counts: int64[m] >= 0, rows (or noisy rows) at each value;
    max_bins: ordered bins at most, >= 2; codes: special values that get bins of their own (ignored among the values).
    uppers: float64[m], exclusive upper end of the cell that a value stands for; None: each value stands for itself.
    With at most max_bins distinct values each has its own bin. All arithmetic is on integers: the same result
    everywhere.
    Raises DataError on malformed input.
    """
    if max_bins < 2:
        raise DataError(f"feature {name!r}: max_bins {max_bins} is under 2")
    if values.shape != counts.shape or values.ndim != 1:
        raise DataError(f"feature {name!r}: {values.shape} values and {counts.shape} counts; give one count per value")
    ends = just_above(values) if uppers is None else uppers
    if not bool(np.isfinite(values).all()) or bool((np.diff(values) <= 0).any()):
        raise DataError(f"feature {name!r}: values to bin must be finite and strictly ascending")
    if bool((counts < 0).any()):
        raise DataError(f"feature {name!r}: a negative count; drop noisy cells under the threshold first")
    if bool((ends <= values).any()) or bool((ends[:-1] > values[1:]).any()):
        raise DataError(f"feature {name!r}: upper ends must lie above their value and not above the next")
    special = tuple(sorted({float(code) for code in codes}))
    used = (counts > 0) & ~np.isin(values, np.array(special, dtype=np.float64))
    values, counts, ends = values[used], counts[used], ends[used]
    total = int(counts.sum())
    is_atom = counts * np.int64(max_bins) > total
    if len(values) <= max_bins:
        atoms = tuple(int(i) for i in np.flatnonzero(is_atom))
        return FeatureBins(
            name=name,
            kind="numeric",
            edges=tuple(values[1:].tolist()),
            codes=special,
            atoms=atoms if len(values) > 1 else (),
        )
    while int(is_atom.sum()) + len(_segments(is_atom)) > max_bins:
        heavy = np.flatnonzero(is_atom)
        is_atom[heavy[np.argmin(counts[heavy])]] = False
    edges: set[float] = set()
    segments = _segments(is_atom)
    for (start, stop), pieces in zip(segments, _share(segments, counts, max_bins - int(is_atom.sum())), strict=True):
        edges.add(float(values[start]) if start == 0 or not is_atom[start - 1] else float(ends[start - 1]))
        edges.update(float(values[i]) for i in _quantile_starts(counts, start, stop, pieces))
    for i in np.flatnonzero(is_atom):
        edges.add(float(values[i]))
    # nothing lies below the first value, so an edge there would make an empty bin
    ordered = sorted(edges - {float(values[0])})
    places = np.searchsorted(np.array(ordered, dtype=np.float64), values[is_atom], side="right")
    return FeatureBins(
        name=name, kind="numeric", edges=tuple(ordered), codes=special, atoms=tuple(sorted({int(i) for i in places}))
    )


def _segments(is_atom: Bool) -> list[tuple[int, int]]:
    """Runs [start, stop) of values that are no atoms."""
    padded = np.concatenate(([True], is_atom, [True]))
    starts = np.flatnonzero(padded[:-1] & ~padded[1:])
    stops = np.flatnonzero(~padded[:-1] & padded[1:])
    return [(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]


def _share(segments: list[tuple[int, int]], counts: Int64, bins: int) -> list[int]:
    """Bins per segment: one to its number of values; the next always goes to the segment with the fullest bins."""
    mass = [int(counts[a:b].sum()) for a, b in segments]
    pieces = [1] * len(segments)
    for _ in range(bins - len(segments)):
        room = [i for i, (a, b) in enumerate(segments) if pieces[i] < b - a]
        if not room:
            break
        best = room[0]
        for i in room[1:]:
            if mass[i] * pieces[best] > mass[best] * pieces[i]:
                best = i
        pieces[best] += 1
    return pieces


def _quantile_starts(counts: Int64, start: int, stop: int, pieces: int) -> list[int]:
    """Indexes at which bins 2..pieces of the segment start: cumulated counts nearest to equal shares."""
    below = np.concatenate(([0], np.cumsum(counts[start:stop])))  # rows before each value
    total, starts = int(below[-1]), []
    for j in range(1, pieces):
        i = int(np.searchsorted(below * pieces, j * total, side="left"))
        if i > 1 and j * total - int(below[i - 1]) * pieces < int(below[i]) * pieces - j * total:
            i -= 1
        if 0 < i < stop - start:
            starts.append(start + i)
    return starts


def fit_categorical(
    name: str, categories: Sequence[str], counts: Int64, max_bins: int, least_count: int
) -> FeatureBins:
    """Keep the categories with at least least_count rows, at most max_bins of them (most frequent first); the rest is
    "other".

    categories: distinct strings; counts: int64, one per category (noisy counts may be negative). Kept ones are in
    alphabetical order.
    """
    if len(categories) != len(counts):
        raise DataError(
            f"feature {name!r}: {len(categories)} categories and {len(counts)} counts; give one per category"
        )
    if max_bins < 2:
        raise DataError(f"feature {name!r}: max_bins {max_bins} is under 2")
    ranked = sorted(zip(categories, counts.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    kept = sorted(category for category, count in ranked[:max_bins] if count >= max(least_count, 1))
    return FeatureBins(name=name, kind="categorical", categories=tuple(kept))


def fit_column(spec: ColumnSpec, column: npt.NDArray[Any], max_bins: int, least_count: int) -> FeatureBins:
    """Bins of a column that one party (an owner) holds as a whole, from its exact counts."""
    if spec.kind == "categorical":
        categories, counts = category_list(column)
        return fit_categorical(spec.name, categories, counts, max_bins, least_count)
    try:
        values, counts = value_counts(column)
    except DataError as error:
        raise DataError(f"feature {spec.name!r}: {error}") from error
    return fit_numeric(spec.name, values, counts, max_bins, spec.codes)


def value_counts(column: npt.NDArray[Any]) -> tuple[Float64, Int64]:
    """Ascending distinct values and their counts, missing left out; DataError on text or infinite values."""
    x = numeric(column)
    values, counts = np.unique(x[~np.isnan(x)] + 0.0, return_counts=True)  # + 0.0 turns -0.0 into 0.0
    return values, counts.astype(np.int64)


def category_list(column: npt.NDArray[Any]) -> tuple[tuple[str, ...], Int64]:
    """Distinct categories of a column in alphabetical order and their counts, missing left out."""
    found: dict[str, int] = {}
    for value in column.tolist():
        if not is_missing(value):
            found[str(value)] = found.get(str(value), 0) + 1
    names = tuple(sorted(found))
    return names, np.array([found[name] for name in names], dtype=np.int64)


def is_missing(value: object) -> bool:
    """None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def numeric(column: npt.NDArray[Any]) -> Float64:
    """The column as float64 with NaN for missing; raises DataError on text or infinite values."""
    try:
        x = np.asarray(column, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError("a numeric column holds text; declare it categorical or clean it") from error
    infinite = int(np.isinf(x).sum())
    if infinite:
        raise DataError(f"{infinite} infinite values in a numeric column; replace them by a value or by missing")
    return x


def assign(bins: FeatureBins, column: npt.NDArray[Any]) -> Int32:
    """Local bin of each row: int32[n] in 0..size-1; NaN and None are "missing", unknown categories "other".

    Raises DataError if a numeric column holds text or infinite values.
    """
    if bins.kind == "categorical":
        place = {category: i for i, category in enumerate(bins.categories)}
        other, missing = len(bins.categories), bins.size - 1
        found = (missing if is_missing(v) else place.get(str(v), other) for v in column.tolist())
        return np.fromiter(found, dtype=np.int32, count=len(column))
    try:
        x = numeric(column)
    except DataError as error:
        raise DataError(f"feature {bins.name!r}: {error}") from error
    local = np.searchsorted(np.array(bins.edges, dtype=np.float64), x, side="right").astype(np.int32)
    for i, code in enumerate(bins.codes):
        local[x == code] = bins.ordered + i
    local[np.isnan(x)] = bins.size - 1
    return local


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The bins of one party, in order; has_no_file adds a last bin for rows that the party does not know."""

    features: tuple[FeatureBins, ...]
    has_no_file: bool

    def __post_init__(self) -> None:
        if not self.features:
            raise DataError("a party needs at least one feature; check the contract's columns")
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            raise DataError(f"a feature is listed twice among {len(names)} features; list each once")

    @property
    def rows(self) -> int:
        """R, the number of bins of the party: rows of its 0/1 design A (R x n)."""
        return sum(feature.size for feature in self.features) + int(self.has_no_file)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Global index of the first bin of each feature."""
        starts = np.cumsum([0, *(feature.size for feature in self.features)])[:-1]
        return tuple(int(start) for start in starts)

    def neighbours(self) -> tuple[Int64, Int64]:
        """Global indexes (left, right) of the bin pairs under the smoothness penalty."""
        pairs = [
            (offset + i, offset + j)
            for feature, offset in zip(self.features, self.offsets, strict=True)
            for i, j in feature.neighbours
        ]
        array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        return {"features": [feature.to_json() for feature in self.features], "has_no_file": self.has_no_file}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tower:
        """Inverse of to_json."""
        try:
            features = tuple(FeatureBins.from_json(feature) for feature in data["features"])
            return cls(features=features, has_no_file=bool(data["has_no_file"]))
        except (KeyError, TypeError) as error:
            raise DataError(f"a tower is malformed: {error!r}; expected the fields of Tower.to_json") from error


def cells(tower: Tower, columns: Mapping[str, npt.NDArray[Any]], known: Bool | None = None) -> Int32:
    """Global bin of every row in every feature: int32[n, F] (F + 1 columns if the tower has a "no file" bin); -1
    contributes nothing.

    columns: one array of n rows per feature; known: bool[n], False where the party has no file (values there are
    ignored); None: all.
    A row that is not known is -1 in every feature and R - 1 in the last column; a known row is -1 there.
    The design that the encrypted kernel multiplies is A[r, i] = #{f: cells[i, f] == r}.
    Raises DataError on a missing column, unequal lengths, or unknown rows in a tower without a "no file" bin.
    """
    absent = [feature.name for feature in tower.features if feature.name not in columns]
    if absent:
        raise DataError(f"column {absent[0]!r} is missing ({len(absent)} in all); give every feature of the tower")
    n = len(columns[tower.features[0].name])
    if any(len(columns[feature.name]) != n for feature in tower.features) or (known is not None and len(known) != n):
        raise DataError(f"columns have different lengths, the first has {n} rows; give one value per row")
    if known is not None and not tower.has_no_file and not bool(known.all()):
        raise DataError("rows without a file in a tower that has no bin for them; set has_no_file")
    out = np.full((n, len(tower.features) + int(tower.has_no_file)), -1, dtype=np.int32)
    for f, (feature, offset) in enumerate(zip(tower.features, tower.offsets, strict=True)):
        if known is None:
            out[:, f] = assign(feature, columns[feature.name]) + np.int32(offset)
        else:
            out[known, f] = assign(feature, columns[feature.name][known]) + np.int32(offset)
    if known is not None and tower.has_no_file:
        out[~known, -1] = tower.rows - 1
    return out
