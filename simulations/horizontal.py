"""The horizontal job on a federation folder: banks train one network on their own columns; twin, baselines, report.

Every bank runs `fl_clients.horizontal_training` behind `secure_mod`, the coordinator `SecureStrategy`, over the
in-memory `Grid`. The feature owners of the folder take no part: banks share columns here, not enterprises.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from flwr.clientapp import ClientApp

from fl_clients.data import BankData, LabelledRows
from fl_clients.horizontal_terms import CountTerms
from fl_clients.horizontal_training import Best, TrainingPlan, histograms, horizontal_app, weight
from fl_server.horizontal_report import render
from fl_server.memory_grid import MemoryGrid
from fl_server.secure_strategy import SecureStrategy
from models import standardising
from models.errors import DataError
from models.standardising import PASSES
from simulations import baselines
from simulations.federation_folder import BankTable, Federation
from simulations.horizontal_parties import HorizontalParties, make_horizontal
from simulations.horizontal_twin import Trained, alone, held_out_scores, pooled_table, replay

Int64 = npt.NDArray[np.int64]

CLIP = 2.0
"""Largest change of one parameter in a round; Adam at the default rate moves it by less than 0.01 a batch."""

STAND_INS = (
    "Terms: a local file that every party is given; nobody countersigned it.",
    "Sums of updates, statistics and histograms are exact: no differential privacy, for simulation only.",
    "Consent: the tables of a simulation have no register, everybody counts as consenting.",
    "Deployment: every bank runs in this process.",
)


@dataclass(frozen=True, kw_only=True)
class HorizontalRun:
    """A finished run: `result` (result.json), and every file to write by name."""

    result: dict[str, Any]
    files: Mapping[str, str]


def bank_data(federation: Federation) -> dict[str, BankData]:
    """Every bank's own table, by name. `DataError` for fewer than two banks or a bank without training rows."""
    if len(federation.banks) < 2:
        raise DataError("horizontal training needs at least 2 banks; give --banks, or a horizontal_key in the split")
    empty = [table.name for table in federation.banks if not (~table.held_out).any()]
    if empty:
        raise DataError(f"bank {empty[0]} has no training rows; leave it out of horizontal_groups")
    return {table.name: _cut(table) for table in federation.banks}


def _cut(table: BankTable) -> BankData:
    def rows(mask: npt.NDArray[np.bool_]) -> LabelledRows:
        columns = {name: values[mask] for name, values in table.columns.items()}
        return LabelledRows(ids=table.ids[mask].tolist(), label=table.label[mask], columns=columns)

    return BankData(training=rows(~table.held_out), held_out=rows(table.held_out))


def make_plan(federation: Federation, **chosen: Any) -> TrainingPlan:
    """The plan for the label holders' columns. `chosen`: fields of `TrainingPlan` other than the columns."""
    specs = tuple(column.spec for column in federation.columns[federation.label_holder])
    return TrainingPlan(columns=specs, **chosen)


def make_parties(plan: TrainingPlan, data: Mapping[str, BankData]) -> HorizontalParties:
    """Identities and terms. The bound of the weights and counts is that of the largest bank."""
    largest = max(max(weight(table), len(table.held_out.label)) for table in data.values())
    shared, _ = plan.initial()
    return make_horizontal(
        tuple(data),
        purpose=f"simulation of horizontal training; plan {plan.digest}",
        parameters=len(shared),
        clip=CLIP,
        largest_weight=largest,
        rounding_seed=plan.seed & 0xFFFFFFFF,
        counts=CountTerms(length=plan.counts, largest=standardising.largest_count(largest)),
    )


def run_encrypted(
    plan: TrainingPlan, parties: HorizontalParties, data: Mapping[str, BankData]
) -> tuple[dict[str, Best], dict[str, dict[str, Int64]], SecureStrategy]:
    """(best parameters by bank, opened counts by bank and step, the strategy with its costs)."""
    best: dict[str, Best] = {}
    counts: dict[str, dict[str, Int64]] = {}

    def keep(name: str, found: Best, opened: Mapping[str, Int64]) -> None:
        best[name], counts[name] = found, dict(opened)

    app: ClientApp = horizontal_app(parties.terms, plan, data.__getitem__, keep, parties.bank_of)
    strategy = SecureStrategy(terms=parties.terms, identity=parties.coordinator, evaluate=True)
    shared, _ = plan.initial()
    strategy.start(
        grid=MemoryGrid(app, parties.nodes()),
        initial_arrays=ArrayRecord({"vector": Array(shared)}),
        num_rounds=plan.all_rounds,
    )
    return best, counts, strategy


def run_horizontal(federation: Federation, plan: TrainingPlan) -> HorizontalRun:
    """Train encrypted, replay in the clear (rounded and float), measure the baselines, and gather the report."""
    data = bank_data(federation)
    parties = make_parties(plan, data)
    started = time.perf_counter()
    best, counts, strategy = run_encrypted(plan, parties, data)
    trained = time.perf_counter()
    twin = replay(plan, parties.terms, data, rounded=True)
    replayed = time.perf_counter()
    float_run = replay(plan, parties.terms, data, rounded=False)
    federated = Judged.of(plan, best, twin)
    models = {"federated": federated, "rounded_twin": Judged.of(plan, twin.best, twin)}
    models["float"] = Judged.of(plan, float_run.best, float_run)
    if plan.personalised:
        plain = replace_plan(plan, personalised=False)
        shared_run = replay(plain, make_parties(plain, data).terms, data, rounded=True)
        models["not_personalised"] = Judged.of(plain, shared_run.best, shared_run)
    models |= _baselines(plan, data)
    steps = sorted((step for step in counts[next(iter(counts))]), key=lambda step: int(step.split(".")[1]))
    opened = counts[next(iter(counts))]
    rounds = [_by_round(int(step.split(".")[1]) - PASSES, opened[step]) for step in steps[PASSES:]]
    one = next(iter(best.values()))
    costs = strategy.costs
    result: dict[str, Any] = {
        "job": parties.terms.job,
        "terms": parties.terms.hash.hex(),
        "plan": plan.digest,
        "model": plan.net,
        "strategy": plan.strategy,
        "personalised": plan.personalised,
        "parameters": {"shared": len(one.shared), "own": len(one.own)},
        "data": {"name": federation.name, "folder_hash": federation.folder_hash, "synthetic": federation.synthetic},
        "rows": {
            name: {"training": weight(table), "held_out": len(table.held_out.label)} for name, table in data.items()
        },
        "auc": {name: judged.auc for name, judged in models.items()},
        "auc_own_rows": {name: judged.auc_own_rows for name, judged in models.items()},
        "ks": {name: judged.ks for name, judged in models.items()},
        "best_round": one.round_number - PASSES,
        "by_round": rounds,
        "exact": is_exact(best, counts, twin),
        "failed": dict(strategy.failed),
        "seconds": {"total": trained - started, "twin": replayed - trained},
        "bytes": {"up": sum(cost.bytes_up for cost in costs), "down": sum(cost.bytes_down for cost in costs)},
        "privacy": {"epsilon": None},
        "warnings": _warnings(federation, len(data)),
        "stand_ins": list(STAND_INS),
    }
    files = {
        "result.json": json.dumps(result, indent=1, ensure_ascii=False),
        "report.html": render(result),
        "terms.json": parties.terms.model_dump_json(indent=1),
        "plan.json": plan.model_dump_json(indent=1),
    }
    if plan.personalised:
        for place, found in enumerate(best.values()):
            files[f"models/own_{place}.json"] = json.dumps([*found.shared.tolist(), *found.own.tolist()])
    else:
        files["models/shared.json"] = json.dumps(one.shared.tolist())
    return HorizontalRun(result=result, files=files)


def replace_plan(plan: TrainingPlan, **changes: Any) -> TrainingPlan:
    """The plan with other choices, checked again."""
    return TrainingPlan.model_validate(plan.model_dump() | changes)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A model on the held-out rows: pooled AUC and KS; `auc_own_rows`: each bank's AUC on its own held-out rows,
    weighted by them (banks with both classes)."""

    auc: float
    ks: float
    auc_own_rows: float

    @classmethod
    def of(cls, plan: TrainingPlan, best: Mapping[str, Best], run: Trained) -> "Judged":
        """Of a federated model, each bank's rows by that bank's parameters."""
        held_out = {name: rows.held_out for name, rows in run.rows.items()}
        return cls.of_scores(
            {name: (held_out_scores(plan, best[name], inputs), label) for name, (inputs, label) in held_out.items()}
        )

    @classmethod
    def of_scores(cls, each: Mapping[str, tuple[Int64, npt.NDArray[np.int8]]]) -> "Judged":
        """From (score, label) by bank."""
        label = np.concatenate([part for _, part in each.values()])
        score = np.concatenate([part for part, _ in each.values()])
        usable = [(score, label) for score, label in each.values() if np.unique(label).size == 2]
        own = sum(len(label) * baselines.auc(label, score) for score, label in usable)
        return cls(
            auc=baselines.auc(label, score),
            ks=baselines.ks(label, score),
            auc_own_rows=own / max(1, sum(len(label) for _, label in usable)),
        )


def _baselines(plan: TrainingPlan, data: Mapping[str, BankData]) -> dict[str, Judged]:
    """`alone`: each bank's rows by its own model; `pooled`: one model of all rows. The plan's network, not shared."""
    plan = replace_plan(plan, personalised=False, strategy="fedavg")
    each = {}
    for name, table in data.items():
        rows, best = alone(plan, table)
        inputs, label = rows.held_out
        each[name] = (held_out_scores(plan, best, inputs), label)
    rows, best = alone(plan, pooled_table(data))
    score = held_out_scores(plan, best, rows.held_out[0])
    ends = np.cumsum([len(table.held_out.label) for table in data.values()])[:-1]
    parts = zip(np.split(score, ends), np.split(rows.held_out[1], ends), strict=True)
    return {"alone": Judged.of_scores(each), "pooled": Judged.of_scores(dict(zip(data, parts, strict=True)))}


def is_exact(best: Mapping[str, Best], counts: Mapping[str, Mapping[str, Int64]], twin: Trained) -> bool:
    """Parameters of every bank and every opened sum equal the rounded twin's, bit by bit."""
    return set(best) == set(twin.best) and all(
        np.array_equal(best[name].shared, twin.best[name].shared)
        and np.array_equal(best[name].own, twin.best[name].own)
        and set(counts[name]) == set(twin.counts)
        and all(np.array_equal(opened, twin.counts[step]) for step, opened in counts[name].items())
        for name in best
    )


def _by_round(number: int, counts: Int64) -> dict[str, Any]:
    """What every bank knows after a round: figures of the summed histograms; None where a class is absent."""
    validation, held_out = histograms(counts)
    return {
        "round": number,
        "validation_auc": validation.auc() if validation.is_usable else None,
        "held_out_auc": held_out.auc() if held_out.is_usable else None,
        "held_out_ks": held_out.ks() if held_out.is_usable else None,
        "held_out_brier": held_out.brier() if held_out.is_usable else None,
    }


def _warnings(federation: Federation, banks: int) -> list[str]:
    lines = list(federation.warnings)
    if banks == 2:
        lines.append("two banks: each can subtract its own update from the sum and has the other's")
    if federation.owners:
        names = ", ".join(owner.name for owner in federation.owners)
        lines.append(f"the columns of {names} are not used: horizontal training takes the banks' own columns only")
    return lines
