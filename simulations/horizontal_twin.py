"""Plaintext twin of a horizontal job, and its baselines: the same pure steps in one loop, nothing encrypted.

`replay` follows the terms' rounding (must equal the encrypted run to the bit) or averages floats (what rounding costs).
`alone` and `pooled` train one network on one table with the same plan: a bank by itself, or all rows in one place.
None of this exists outside a simulation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_clients.data import BankData, LabelledRows
from fl_clients.horizontal_terms import HorizontalTerms
from fl_clients.horizontal_training import (
    BankRows,
    Best,
    TrainingPlan,
    bank_rows,
    preparation,
    score_counts,
    statistics,
    trained,
    tuned,
    weight,
)
from models.nets import scores
from models.standardising import PASSES, Inputs
from privacy.update_sum import Contribution, quantise, sum_updates_in_the_clear

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, repr=False)
class Trained:
    """Where a job ends: `best` by bank, the opened counts by step, and every bank's prepared rows."""

    best: Mapping[str, Best]
    counts: Mapping[str, Int64]
    rows: Mapping[str, BankRows]


def replay(plan: TrainingPlan, terms: HorizontalTerms, data: Mapping[str, BankData], *, rounded: bool) -> Trained:
    """The job in the clear. `rounded`: with the integers of the terms; else weighted averages of float64 updates."""
    rounding = terms.plan("train")
    counts: dict[str, Int64] = {}
    for number in range(1, PASSES + 1):
        first = counts.get("evaluate.1", np.zeros(0, np.int64))
        counts[f"evaluate.{number}"] = _sum(
            [statistics(plan, table.training, number, first) for table in data.values()]
        )
    prepared = preparation(plan, counts)
    rows = {name: bank_rows(prepared, table) for name, table in data.items()}
    start, own_start = plan.initial()
    own = dict.fromkeys(data, own_start)
    best = {name: Best(shared=start, own=own_start) for name in data}
    state: Mapping[str, Float64] = {"vector": start.astype(np.float64)}
    for number in range(PASSES + 1, plan.all_rounds + 1):
        shared = state["vector"].astype(np.float32)
        updates: dict[str, Float64] = {}
        for name in data:
            after = shared
            if not best[name].is_over(number - 1, plan.patience):
                after, own[name] = trained(plan, name, number, rows[name], shared, own[name])
            updates[name] = after.astype(np.float64) - shared.astype(np.float64)
        if rounded:
            parts = [
                Contribution(
                    values=quantise(update, weight(data[name]), rounding, terms.rounding_key(name, f"train.{number}")),
                    weight=weight(data[name]),
                    counts=np.zeros(0, np.int64),
                )
                for name, update in updates.items()
            ]
            average = sum_updates_in_the_clear(parts, [], rounding).average(rounding)
        else:
            shares = np.array([weight(data[name]) for name in updates], np.float64)
            average = np.average(list(updates.values()), axis=0, weights=shares)
        state = plan.server_step(state, average)
        shared = state["vector"].astype(np.float32)
        opened = _sum([score_counts(plan, rows[name], shared, own[name]) for name in data])
        counts[f"evaluate.{number}"] = opened
        best = {name: best[name].after(number, opened, shared, own[name]) for name in data}
    if plan.personalised:
        best = {name: tuned(plan, name, rows[name], best[name]) for name in data}
    return Trained(best=best, counts=counts, rows=rows)


def alone(plan: TrainingPlan, data: BankData) -> tuple[BankRows, Best]:
    """One network trained on one table: its own preparation, as many rounds, the same rule to stop."""
    counts: dict[str, Int64] = {}
    for number in range(1, PASSES + 1):
        first = counts.get("evaluate.1", np.zeros(0, np.int64))
        counts[f"evaluate.{number}"] = statistics(plan, data.training, number, first)
    rows = bank_rows(preparation(plan, counts), data)
    shared, own = plan.initial()
    best = Best(shared=shared, own=own)
    for number in range(PASSES + 1, plan.all_rounds + 1):
        if best.is_over(number - 1, plan.patience):
            break
        shared, own = trained(plan, "one table", number, rows, shared, own)
        best = best.after(number, score_counts(plan, rows, shared, own), shared, own)
    return rows, best


def pooled_table(data: Mapping[str, BankData]) -> BankData:
    """All banks' rows as one table, bank by bank."""

    def joined(tables: list[LabelledRows]) -> LabelledRows:
        columns: dict[str, Any] = {
            name: np.concatenate([table.columns[name] for table in tables]) for name in tables[0].columns
        }
        return LabelledRows(
            ids=[identifier for table in tables for identifier in table.ids],
            label=np.concatenate([table.label for table in tables]),
            columns=columns,
        )

    tables = list(data.values())
    return BankData(
        training=joined([table.training for table in tables]), held_out=joined([table.held_out for table in tables])
    )


def held_out_scores(plan: TrainingPlan, best: Best, inputs: Inputs) -> Int64:
    """Fixed-point logits by the best parameters, int64[n]."""
    return scores(plan.spec, np.concatenate([best.shared, best.own]), inputs)


def _sum(parts: list[Int64]) -> Int64:
    total: Int64 = np.sum(parts, axis=0, dtype=np.int64)
    return total
