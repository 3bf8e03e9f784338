"""Pooled evaluation metrics from one addable histogram of score by label.

Each label holder counts its held-out rows per (score cell, label); the histograms are summed (in a secure sum, with
noise if the job asks for it), and AUC, KS, Gini, ROC, lift, calibration and Brier score are read from the sum alone.
Metrics are therefore those of the pooled rows, never an average of the banks' own metrics.

Guarantee: the cells are fixed and public, so the histogram of any union of rows is the sum of the histograms of its
parts, and one row adds 1 to one cell (L2 sensitivity 1 under adding or removing a row; replacing one, or flipping its
label, moves two cells: sqrt 2). A histogram that is opened without noise shows exact counts per score cell, to
everybody it is opened to.

Orientation: label 1 is bad (default), scores are logits of PD at fixed point (1.0 = 2**16): higher means riskier.
Source: Siddiqi, Credit Risk Scorecards (2006), ch. 6; ties as in Hanley and McNeil (1982); Wilson (1927) intervals.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models.errors import DataError
from models.fixed_point import SCORE_BITS

Counts = NDArray[np.int64]
Reals = NDArray[np.float64]

SCORE_SCALE = 1 << SCORE_BITS
"""1.0 logit in fixed point (the scale of every score in this project)."""

# Scores of credit models live between a PD of 0.03 % (-8) and 98 % (+4): fine cells of 1/128 logit there, 1/32 outside.
EDGES: Counts = np.concatenate(
    [
        np.arange(-16 * 32, -8 * 32, dtype=np.int64) * (SCORE_SCALE // 32),
        np.arange(-8 * 128, 4 * 128, dtype=np.int64) * (SCORE_SCALE // 128),
        np.arange(4 * 32, 12 * 32 + 1, dtype=np.int64) * (SCORE_SCALE // 32),
    ]
)
"""int64[2049]: public edges of the finest histogram, [-16, 12) logits; scores beyond fall into the end cells."""
EDGES.setflags(write=False)

FINEST_CELLS = len(EDGES) - 1
"""Cells of an unmerged histogram; its vector has twice as many numbers (4096)."""

WILSON_Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, kw_only=True)
class LiftRow:
    """One risk group, riskiest first. Rates and shares are fractions of 1; `rows` and `bads` are counts.

    A group is made of whole score cells, so groups hold about, not exactly, the same number of rows.
    """

    group: int
    rows: float
    bads: float
    bad_rate: float
    lift: float
    share_of_rows: float
    share_of_bads: float
    cumulative_share_of_rows: float
    cumulative_share_of_bads: float
    cumulative_lift: float


@dataclass(frozen=True, kw_only=True)
class CalibrationRow:
    """One score group, safest first: mean predicted PD against the observed rate with its 95 % Wilson interval."""

    group: int
    rows: float
    bads: float
    predicted: float
    observed: float
    observed_low: float
    observed_high: float


@dataclass(frozen=True, kw_only=True)
class ScoreHistogram:
    """Counts of rows per score cell (axis 0) and label (axis 1: good, bad).

    `counts` is int64[cells, 2] with cells = 2048 / 2**k: 2048 from `of`, fewer after `merged`. Counts of a noised sum
    may be negative; no metric needs them to be otherwise:

    * AUC, Gini and Brier score use the counts as they are and clip only the result to [0, 1], so noise makes them
      uncertain (`auc_noise_std`) but not biased. (Clipping each count first costs .004 to .2 of AUC: it spreads rows
      over empty cells.)
    * KS, curves and tables use the nearest non-negative histogram with the same number of goods and of bads (Euclidean
      projection on the simplex, "Norm-Sub" of Wang et al. 2020), so curves are monotone and rates lie in [0, 1]. That
      pulls the curve slightly towards the diagonal: under noise the area below `roc` is not `auc`.

    Without negative counts both are the same. The error of a noised AUC grows with the root of the number of cells:
    merge before adding noise. With noise of 2 on every count, 30,000 rows and 10 % bad, its standard deviation is
    .015 with 2048 cells, .004 with 128 (`merged(16)`) and .003 with 64, where ties cost another .001; with 3,000 rows
    .03 at best.

    Raises ValueError for another shape or type; metrics raise DataError if the histogram has no goods or no bads.
    """

    counts: Counts

    def __post_init__(self) -> None:
        counts = self.counts
        if counts.dtype != np.int64:
            raise ValueError(
                f"counts.dtype={counts.dtype}: a score histogram holds int64 counts; convert before building it"
            )
        if counts.ndim != 2 or counts.shape[1] != 2 or not _is_layout(counts.shape[0]):
            raise ValueError(
                f"counts.shape={counts.shape}: expected (cells, 2), cells = {FINEST_CELLS} divided by a power of two"
            )
        frozen = counts.copy()
        frozen.setflags(write=False)
        object.__setattr__(self, "counts", frozen)

    @classmethod
    def of(cls, score: Counts, label: NDArray[np.integer]) -> "ScoreHistogram":
        """Histogram of rows with fixed-point logits `score` int64[n] and labels 0 (good) or 1 (bad), n >= 0."""
        score, label = np.asarray(score), np.asarray(label)
        if score.dtype != np.int64 or score.ndim != 1:
            raise ValueError(
                f"score is {score.dtype}{list(score.shape)}: expected int64[n], logits times {SCORE_SCALE}"
            )
        if label.shape != score.shape:
            raise ValueError(f"label.shape={label.shape} but score.shape={score.shape}: one label per score is needed")
        if not np.isin(label, (0, 1)).all():
            raise DataError("labels other than 0 (good) and 1 (bad): drop rows without an outcome before evaluating")
        cell = np.searchsorted(EDGES[1:-1], score, side="right")
        counts = np.bincount(2 * cell + label.astype(np.int64), minlength=2 * FINEST_CELLS)
        return cls(counts=counts.reshape(FINEST_CELLS, 2).astype(np.int64))

    def __add__(self, other: "ScoreHistogram") -> "ScoreHistogram":
        """The histogram of both sets of rows together (also the way to add a noise histogram)."""
        if self.cells != other.cells:
            raise ValueError(f"{self.cells} and {other.cells} cells: merge both histograms to the same cells first")
        return ScoreHistogram(counts=self.counts + other.counts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScoreHistogram) and np.array_equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash((self.cells, self.counts.tobytes()))

    @property
    def cells(self) -> int:
        """Number of score cells."""
        return int(self.counts.shape[0])

    @property
    def edges(self) -> Reals:
        """float64[cells + 1]: the edges of the cells in logits."""
        return EDGES[:: FINEST_CELLS // self.cells] / SCORE_SCALE

    def merged(self, factor: int) -> "ScoreHistogram":
        """Every `factor` neighbouring cells as one (a power of two): fewer numbers to send, less noise in metrics."""
        if factor < 1 or self.cells % factor or not _is_layout(self.cells // factor):
            raise ValueError(f"factor={factor}: expected a power of two up to {self.cells // 2} for {self.cells} cells")
        return ScoreHistogram(counts=self.counts.reshape(self.cells // factor, factor, 2).sum(axis=1))

    def to_vector(self) -> Counts:
        """int64[2 * cells], good and bad alternating: what goes into a secure sum."""
        return self.counts.reshape(-1).copy()

    @classmethod
    def from_vector(cls, vector: Counts) -> "ScoreHistogram":
        """Inverse of `to_vector`; the length tells the number of cells."""
        if vector.ndim != 1 or len(vector) % 2:
            raise ValueError(
                f"vector.shape={vector.shape}: expected one dimension of even length (good, bad alternating)"
            )
        return cls(counts=vector.reshape(-1, 2))

    @property
    def is_usable(self) -> bool:
        """Whether metrics can be computed: noise on few held-out rows can leave no goods or no bads at all."""
        return bool((self.counts.sum(axis=0) > 0).all())

    @cached_property
    def _totals(self) -> tuple[int, int]:
        """Goods and bads; both positive or DataError."""
        goods, bads = (int(total) for total in self.counts.sum(axis=0))
        if goods <= 0 or bads <= 0:
            raise DataError(
                f"goods={goods}, bads={bads}: metrics need at least one of each; hold out more rows or noise less"
            )
        return goods, bads

    @cached_property
    def _mass(self) -> Reals:
        """Non-negative counts per cell and label, float64[cells, 2], with the totals of `counts`."""
        _ = self._totals
        return np.stack([_nearest_non_negative(column) for column in self.counts.T], axis=1)

    @cached_property
    def _shares(self) -> Reals:
        """Share of all goods and of all bads in each cell, float64[cells, 2]."""
        return np.asarray(self._mass / self._mass.sum(axis=0), dtype=np.float64)

    @cached_property
    def _cumulative(self) -> Reals:
        """Share of goods and bads below each edge, float64[cells + 1, 2], from 0 to 1."""
        below = np.concatenate([np.zeros((1, 2)), np.cumsum(self._shares, axis=0)])
        below[-1] = 1.0  # the sum of shares is 1 up to rounding
        return np.asarray(np.minimum(below, 1.0), dtype=np.float64)

    def auc(self) -> float:
        """P(a bad scores above a good), a pair in one cell counting half: the pooled AUC up to `auc_error_bound`."""
        goods, bads = self._totals
        good, bad = (self.counts[:, column].astype(object) for column in (0, 1))
        # Twice the number of won pairs, in Python integers: exact, and no overflow at any number of rows.
        won = int(np.sum(bad * (2 * np.cumsum(good) - good)))
        return min(1.0, max(0.0, won / (2 * goods * bads)))

    def auc_error_bound(self) -> float:
        """Largest distance of `auc` from the AUC of the unbinned scores: half the pairs in one cell (noise apart)."""
        return float(np.sum(self._shares[:, 0] * self._shares[:, 1]) / 2)

    def auc_noise_std(self, noise_std: float) -> float:
        """Standard deviation of `auc` caused by independent noise of `noise_std` on every count (first order).

        0 for an exact histogram; meaningless once it is beyond a few hundredths.
        """
        if noise_std < 0 or not math.isfinite(noise_std):
            raise ValueError(f"noise_std={noise_std}: expected a finite number >= 0, in counts")
        goods, bads = self._mass.sum(axis=0)
        middle = self._cumulative[:-1] + self._shares / 2
        auc = self.auc()
        by_bad = np.sum((middle[:, 0] - auc) ** 2) / bads**2
        by_good = np.sum((1 - middle[:, 1] - auc) ** 2) / goods**2
        return float(noise_std * math.sqrt(by_bad + by_good))

    def gini(self) -> float:
        """2 AUC - 1 (accuracy ratio)."""
        return 2 * self.auc() - 1

    def ks(self) -> float:
        """Largest distance of both cumulative distributions at the edges; the exact KS is in [ks, ks + bound]."""
        return float(np.abs(self._cumulative[:, 0] - self._cumulative[:, 1]).max())

    def ks_error_bound(self) -> float:
        """How far the KS of the unbinned scores can lie above `ks` (inside a cell; noise apart)."""
        gap = self._cumulative[:, 0] - self._cumulative[:, 1]
        good, bad = self._shares.T
        # Inside a cell the gap rises at most by its goods from the left edge and by its bads from the right edge.
        above = np.minimum(gap[:-1] + good, gap[1:] + bad)
        below = np.minimum(bad - gap[:-1], good - gap[1:])
        return float(max(0.0, above.max() - self.ks(), below.max() - self.ks()))

    def roc(self) -> tuple[Reals, Reals]:
        """(false positive rate, true positive rate) from (0, 0) to (1, 1): "refuse above", falling threshold.

        One point per edge next to a non-empty cell.
        """
        above = 1 - self._cumulative[::-1]
        moved = np.concatenate([[True], np.any(np.diff(above, axis=0) > 0, axis=1)])
        return above[moved, 0], above[moved, 1]

    def ks_curve(self) -> tuple[Reals, Reals, Reals]:
        """(threshold in logits, share of goods below, share of bads below), over the edges around non-empty cells."""
        filled = np.flatnonzero(self._mass.sum(axis=1) > 0)
        part = slice(int(filled[0]), int(filled[-1]) + 2)
        return self.edges[part], self._cumulative[part, 0], self._cumulative[part, 1]

    def lift(self, groups: int = 10) -> tuple[LiftRow, ...]:
        """Lift table by `groups` of about equal numbers of rows, riskiest first (10: deciles)."""
        total_goods, total_bads = (float(total) for total in self._mass.sum(axis=0))
        total = total_goods + total_bads
        rows: list[LiftRow] = []
        rows_so_far = bads_so_far = 0.0
        for cells in reversed(self._groups(groups)):
            goods, bads = (float(part) for part in self._mass[cells].sum(axis=0))
            count = goods + bads
            rows_so_far, bads_so_far = rows_so_far + count, bads_so_far + bads
            rows.append(
                LiftRow(
                    group=len(rows) + 1,
                    rows=count,
                    bads=bads,
                    bad_rate=bads / count,
                    lift=(bads / total_bads) / (count / total),
                    share_of_rows=count / total,
                    share_of_bads=bads / total_bads,
                    cumulative_share_of_rows=min(1.0, rows_so_far / total),
                    cumulative_share_of_bads=min(1.0, bads_so_far / total_bads),
                    cumulative_lift=(bads_so_far / total_bads) / (rows_so_far / total),
                )
            )
        return tuple(rows)

    def calibration(self, groups: int = 10) -> tuple[CalibrationRow, ...]:
        """Predicted against observed PD by `groups` of about equal numbers of rows, safest first.

        Predictions are taken at the middle of each cell: off by at most 0.0010 in PD for the finest cells (that times
        the factor after `merged`); scores outside [-16, 12) count as the end cells.
        """
        pd = self._cell_pd()
        rows: list[CalibrationRow] = []
        for cells in self._groups(groups):
            mass = self._mass[cells]
            count, bads = float(mass.sum()), float(mass[:, 1].sum())
            low, high = wilson_interval(bads, count)
            rows.append(
                CalibrationRow(
                    group=len(rows) + 1,
                    rows=count,
                    bads=bads,
                    predicted=float(np.sum(mass.sum(axis=1) * pd[cells]) / count),
                    observed=bads / count,
                    observed_low=low,
                    observed_high=high,
                )
            )
        return tuple(rows)

    def brier(self) -> float:
        """Mean of (PD - label)**2, with PD at the middle of each cell."""
        pd = self._cell_pd()
        loss = self.counts[:, 0] * pd**2 + self.counts[:, 1] * (1 - pd) ** 2
        return float(min(1.0, max(0.0, loss.sum() / sum(self._totals))))

    def _cell_pd(self) -> Reals:
        middle = (self.edges[:-1] + self.edges[1:]) / 2
        return 1 / (1 + np.exp(-middle))

    def _groups(self, groups: int) -> tuple[NDArray[np.intp], ...]:
        """Indices of the cells of each group, rising score; a group that no row falls into does not appear."""
        if not 1 <= groups <= self.cells:
            raise ValueError(f"groups={groups}: expected 1 to {self.cells}")
        rows = self._mass.sum(axis=1)
        middle = (np.cumsum(rows) - rows / 2) / rows.sum()
        group = np.minimum((middle * groups).astype(np.intp), groups - 1)
        parts = (np.flatnonzero((group == number) & (rows > 0)) for number in range(groups))
        return tuple(part for part in parts if len(part))


def wilson_interval(positives: float, rows: float, z: float = WILSON_Z) -> tuple[float, float]:
    """Wilson score interval of a proportion, as fractions (default 95 %).

    Raises ValueError unless 0 <= positives <= rows and rows > 0.
    Source: E. B. Wilson, JASA 22 (1927).
    """
    if not 0 <= positives <= rows or rows <= 0:
        raise ValueError(f"positives={positives}, rows={rows}: expected 0 <= positives <= rows and rows > 0")
    rate = positives / rows
    centre = rate + z * z / (2 * rows)
    half = z * math.sqrt(rate * (1 - rate) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    # The interval holds the rate itself; rounding may put the limit of an empty or full group just beside it.
    return max(0.0, min(rate, (centre - half) / scale)), min(1.0, max(rate, (centre + half) / scale))


def _is_layout(cells: int) -> bool:
    return cells >= 2 and FINEST_CELLS % cells == 0


def _nearest_non_negative(column: Counts) -> Reals:
    """Euclidean projection of counts on {x >= 0, same sum} (Duchi et al. 2008); unchanged if none is negative."""
    values = column.astype(np.float64)
    if column.min() >= 0:
        return values
    falling = np.sort(values)[::-1]
    excess = (np.cumsum(falling) - values.sum()) / np.arange(1, len(values) + 1)
    kept = int(np.flatnonzero(falling > excess)[-1])
    return np.asarray(np.maximum(values - excess[kept], 0.0), dtype=np.float64)
