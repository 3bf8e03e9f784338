"""The plaintext twin: the training loop of PROTOCOL.md on the pooled table, in plain numpy.

What it guarantees: given the noise that the parties of a federated run drew (its tape), it gives the same integers,
bit for bit, whatever the order of rows and their split over banks. It is the reference in tests and the baseline in
reports; it needs all raw data in one place, so it exists in simulation only.
Units: as in models.fixed_point. Rounds t and inner steps j are counted from 1 in the tags of the tape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from models import line_search
from models.binning import ColumnSpec, Tower, cells, fit_column
from models.errors import DataError
from models.fixed_point import Int8, Int32, Int64, logit_of_rate, residual
from models.scorecard import (
    NoiseStds,
    ScorecardSettings,
    apply,
    cross_tab,
    diagonal_blocks,
    direction,
    from_upper,
    gather,
    preconditioner,
    spread,
    spread_bound,
    take_step,
    upper,
)
from models.shared_bins import LEVELS, SharedBinning, fit_shared, level_counts, level_size, with_level

Columns = Mapping[str, npt.NDArray[Any]]
NoiseTape = Mapping[str, npt.NDArray[np.int64]]
EXACT = NoiseStds()


@dataclass(frozen=True, kw_only=True)
class OwnerData:
    """A feature owner's whole table; index: int64[n], for every pooled training row its row here, -1 = no file."""

    specs: tuple[ColumnSpec, ...]
    columns: Columns
    index: Int64


@dataclass(frozen=True, kw_only=True)
class PooledData:
    """The label holders' training rows in any order, and every owner's table. label: int8[n]."""

    specs: tuple[ColumnSpec, ...]
    columns: Columns
    label: Int8
    owners: Mapping[str, OwnerData]

    def __post_init__(self) -> None:
        if not self.owners:
            raise DataError("a job needs at least one feature owner")
        for name, owner in self.owners.items():
            if owner.index.shape != self.label.shape:
                raise DataError(f"owner {name!r}: {owner.index.shape} row indexes for {self.label.shape} training rows")
            known = len(owner.columns[owner.specs[0].name])
            if int(owner.index.min()) < -1 or int(owner.index.max()) >= known:
                raise DataError(f"owner {name!r}: a row index lies outside -1..{known - 1}")


@dataclass(frozen=True, kw_only=True)
class TwinResult:
    """The trained model: bins and integer weights by party, the intercept, and the step sizes of every round.

    bank, owners: towers. bank_weights, owner_weights: int64 at 2**-SCORE_BITS. alphas: per round (bank, owners,
    previous from the second round, intercept). training_score: int64[n], the score the label holders end with (it
    contains the forward noise).
    """

    bank: Tower
    bank_weights: Int64
    owners: Mapping[str, Tower]
    owner_weights: Mapping[str, Int64]
    intercept: int
    alphas: tuple[tuple[int, ...], ...]
    training_score: Int64

    def score(self, columns: Columns, owners: Mapping[str, tuple[Columns, Int64]]) -> Int64:
        """Exact scores: int64[n] at 2**-SCORE_BITS; per owner its table and the rows' index in it (-1 = no file)."""
        total = apply(cells(self.bank, columns), self.bank_weights) + np.int64(self.intercept)
        for name, tower in self.owners.items():
            table, index = owners[name]
            total = total + per_row(
                apply(cells(tower, table), self.owner_weights[name]), index, self.owner_weights[name]
            )
        return total


@dataclass
class _Party:
    """What a tower carries from round to round."""

    tower: Tower
    cells: Int32  # of the training rows
    factor: npt.NDArray[np.float64]
    weights: Int64
    step: Int64  # of the previous round


def per_row(of_table: Int64, index: Int64, weights: Int64) -> Int64:
    """An owner's numbers at the given rows; a row without a file gets the weight of the last bin."""
    return np.where(index >= 0, of_table[np.maximum(index, 0)], weights[-1])


def run_twin(
    pooled: PooledData, settings: ScorecardSettings, noise: NoiseTape, noise_stds: NoiseStds = EXACT
) -> TwinResult:
    """Train as PROTOCOL says ("Training loop of the additive scorecard"), with the noise of the tape added to the
    totals.

    noise: tag -> int64 array to add, absent = zeros: "sum/bins-1", "sum/bins-2", "sum/bins-3", "sum/crosstab",
    "sum/r{t}.own", "sum/r{t}.owner.{name}", "sum/r{t}.search.{j}", and "forward/r{t}/{owner}" (one number per row of
    the owner's table).
    noise_stds: their standard deviations as announced in the plan. Raises DataError on bad data or noise of the wrong
    length.
    """
    label, n = pooled.label, len(pooled.label)

    # bins: the banks' from released counts, the owners' from their own tables
    shared = SharedBinning(
        specs=pooled.specs,
        rows=n,
        max_bins=settings.max_bins_bank,
        least_count=settings.least_count,
        noise_std=noise_stds.bins,
    )
    for level in range(1, LEVELS + 1):
        exact = level_counts(shared, pooled.columns, label) if level_size(shared) else np.zeros(0, dtype=np.int64)
        shared = with_level(shared, _noised(exact, noise, f"sum/bins-{level}"))
    bank_tower, bank_counts = fit_shared(shared)
    base_rate = Fraction(shared.positives, n)

    # towers: cross-tabs and preconditioners
    bank_cells = cells(bank_tower, pooled.columns)
    if settings.cross_tabs:
        counted = upper(cross_tab(bank_cells, bank_tower.rows))
        bank_cross = from_upper(_noised(counted, noise, "sum/crosstab"), bank_tower.rows)
    else:
        bank_cross = diagonal_blocks(bank_tower, bank_counts)
    bank = _party(bank_tower, bank_cells, bank_cross, base_rate, settings, noise_stds)
    owners: dict[str, _Party] = {}
    owner_cross: dict[str, Int64] = {}
    table_cells: dict[str, Int32] = {}
    for name, owner in pooled.owners.items():
        fitted = (
            fit_column(spec, owner.columns[spec.name], settings.max_bins_owner, settings.least_count)
            for spec in owner.specs
        )
        tower = Tower(features=tuple(fitted), has_no_file=True)
        table_cells[name] = cells(tower, owner.columns)
        aligned = table_cells[name][np.maximum(owner.index, 0)]
        aligned[owner.index < 0] = [*[-1] * len(tower.features), tower.rows - 1]
        owner_cross[name] = cross_tab(aligned, tower.rows)
        owners[name] = _party(tower, aligned, owner_cross[name], base_rate, settings, noise_stds)

    # rounds
    intercept = logit_of_rate(shared.positives, n)
    score = np.full(n, intercept, dtype=np.int64)
    previous: tuple[Int64, int] | None = None  # the previous step of every row, and its scale
    history: list[tuple[int, ...]] = []
    for t in range(1, settings.rounds + 1):
        v = residual(score, label)

        gradient = _noised(gather(bank.cells, v, bank.tower.rows), noise, f"sum/r{t}.own")
        bank_direction = direction(bank.factor, gradient, bank.weights, bank.tower, settings.penalty)
        owner_directions: dict[str, Int64] = {}
        owner_sum = np.zeros(n, dtype=np.int64)
        for name, party in owners.items():
            gradient = _noised(gather(party.cells, v, party.tower.rows), noise, f"sum/r{t}.owner.{name}")
            d = direction(party.factor, gradient, party.weights, party.tower, settings.penalty)
            owner_directions[name] = d
            of_table = _noised(apply(table_cells[name], d), noise, f"forward/r{t}/{name}")
            owner_sum += per_row(of_table, pooled.owners[name].index, d)

        directions = [apply(bank.cells, bank_direction), owner_sum]
        scales = [
            spread_bound(bank.tower, bank_counts, bank_direction, n),
            line_search.owner_scale(
                [spread(owner_cross[name], owner_directions[name], n) for name in owners], settings.forward_noise
            ),
        ]
        if previous is not None:
            directions.append(previous[0])
            scales.append(previous[1])
        alphas = _search(directions, scales, score, label, noise, noise_stds, t)

        score = line_search.advance(score, directions, alphas)
        previous = line_search.total_step(directions, alphas), line_search.previous_scale(alphas, scales)
        alpha_previous = alphas[2] if len(alphas) == 4 else 0
        bank.weights, bank.step = take_step(bank.weights, bank_direction, bank.step, alphas[0], alpha_previous)
        for name, party in owners.items():
            d = owner_directions[name]
            party.weights, party.step = take_step(party.weights, d, party.step, alphas[1], alpha_previous)
        intercept += alphas[-1]
        history.append(alphas)

    return TwinResult(
        bank=bank.tower,
        bank_weights=bank.weights,
        owners={name: party.tower for name, party in owners.items()},
        owner_weights={name: party.weights for name, party in owners.items()},
        intercept=intercept,
        alphas=tuple(history),
        training_score=score,
    )


def _search(
    directions: Sequence[Int64],
    scales: Sequence[int],
    score: Int64,
    label: Int8,
    noise: NoiseTape,
    noise_stds: NoiseStds,
    t: int,
) -> tuple[int, ...]:
    rows = line_search.design(directions, scales)
    a = (0.0,) * (len(directions) + 1)
    for j in range(1, line_search.INNER_STEPS + 1):
        candidate = line_search.advance(score, directions, line_search.alphas(a, scales))
        total = _noised(line_search.moments(rows, candidate, label), noise, f"sum/r{t}.search.{j}")
        a = line_search.update(a, total, len(score), *noise_stds.search_of(t))
    return line_search.alphas(a, scales)


def _party(
    tower: Tower,
    rows: Int32,
    cross: Int64,
    base_rate: Fraction,
    settings: ScorecardSettings,
    noise_stds: NoiseStds,
) -> _Party:
    zeros = np.zeros(tower.rows, dtype=np.int64)
    factor = preconditioner(cross, tower, base_rate, settings.penalty, noise_stds.gradient)
    return _Party(tower=tower, cells=rows, factor=factor, weights=zeros, step=zeros)


def _noised(exact: Int64, noise: NoiseTape, tag: str) -> Int64:
    drawn = noise.get(tag)
    if drawn is None:
        return exact
    if drawn.shape != exact.shape:
        raise DataError(f"noise {tag!r} has shape {drawn.shape}, the total {exact.shape}; the tape is of another job")
    return exact + drawn
