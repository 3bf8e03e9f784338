"""The main job on a federation folder: train encrypted, compare with plaintext twin and baselines, write a report."""

import json
import re
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_curve
from threadpoolctl import threadpool_limits

from fl_clients import who_sees_what
from fl_clients.contract import PrivacyTerms
from fl_clients.institution import AUDIT
from fl_clients.protocol import StepKind
from fl_server.certificate_page import certificate_page
from fl_server.coordinator import Outcome, StepRecord, Watch
from fl_server.report import Release, ReportSections, Step, render
from fl_server.run_store import outcome_figures, write_run
from models.binning import Tower, cells
from models.errors import DataError
from models.fixed_point import SCORE_BITS
from models.points import PointScale, ScorecardRow, scorecard_rows
from models.score_histogram import ScoreHistogram
from models.scorecard import ScorecardSettings, apply, bin_counts
from privacy.accounting import epsilon_after
from simulations import baselines
from simulations.federation_folder import Federation, locate
from simulations.job import Parties, Wire, make_parties, model_files, noise_totals, run_in_memory, run_on_ray
from simulations.twin import OwnerData, PooledData, TwinResult, run_twin

Int64 = npt.NDArray[np.int64]

STAND_INS = (
    "Approval: the simulator signs for every institution; nobody read the contract.",
    "Privacy ledger: each run begins with an empty one; budgets of earlier jobs do not count.",
    "Consent: the tables of a simulation have no register, everybody counts as consenting.",
    "Audit: logs, receipts and certificate are real, but one machine wrote all of them.",
    "Deployment: every vault runs on this machine, without TLS between institutions.",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a researcher chooses. `seed` was used for data splits already; nothing here reaches keys or noise."""

    rounds: int = 3
    epsilon: float | None = None
    delta: float | None = None
    colluding_banks: int | None = None
    least_banks: int | None = None
    wire: Wire = "memory"
    with_baselines: bool = True


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: `result` (result.json), the report's sections, and every file to write by name."""

    result: dict[str, Any]
    sections: ReportSections
    files: Mapping[str, str]


def run_job(federation: Federation, options: Options, watch: Watch = lambda done, total, step: None) -> Run:
    """Train over `options.wire`, replay in the clear, measure the baselines, and gather everything for the report.

    Raises `DataError` for bad data, `Refused` for what would be weaker than asked, `JobStoppedError` when a party dies.
    """
    settings = ScorecardSettings(rounds=options.rounds, cross_tabs=options.epsilon is None)
    privacy = PrivacyTerms(epsilon=options.epsilon, delta=options.delta, colluding_banks=options.colluding_banks)
    started = time.perf_counter()
    parties = make_parties(federation, settings, privacy, options.least_banks)
    outcome = run_in_memory(parties, watch) if options.wire == "memory" else run_on_ray(parties, watch)
    trained = time.perf_counter()
    twin = run_twin(pool(federation), settings, noise_totals(parties, outcome), outcome.roster.noise_stds)
    replayed = time.perf_counter()

    models = model_files(parties)
    label, scores = score_held_out(federation, models)
    twin_scores = _twin_scores(federation, twin)
    result: dict[str, Any] = outcome_figures(parties.contract, outcome)
    alignment = _alignment(parties, outcome)
    auc: dict[str, Any] = {"federated": baselines.auc(label, scores), "pooled_twin": baselines.auc(label, twin_scores)}
    ks: dict[str, Any] = {"federated": baselines.ks(label, scores), "pooled_twin": baselines.ks(label, twin_scores)}
    curves = {"federated": _roc(label, scores)}
    if options.with_baselines:
        # one thread: on shared machines the many small parallel loops of boosting are several times slower
        with threadpool_limits(limits=1):
            measured = baselines.measure(federation)
        if not np.array_equal(measured.label, label):
            raise DataError(
                "baselines and federation were judged on different held-out rows; this is a fault, report it"
            )
        for name in ("label_holder_columns", "label_holder_lr", "pooled_lr", "pooled_boosting"):
            judged: baselines.Judged = getattr(measured, name)
            auc[name], ks[name] = judged.auc, judged.ks
            curves[name.replace("_", " ")] = _roc(label, judged.score)
        auc["alone"] = {bank: judged.auc if judged else None for bank, judged in measured.alone.items()}
        ks["alone"] = {bank: judged.ks if judged else None for bank, judged in measured.alone.items()}
    result |= {
        "data": {"name": federation.name, "folder_hash": federation.folder_hash, "synthetic": federation.synthetic},
        "auc": auc,
        "ks": ks,
        "alignment": alignment,
        "exact": is_exact(models, twin, parties),
        "seconds": {
            "total": trained - started - alignment["seconds"],
            "twin": replayed - trained,
            "alignment": alignment["seconds"],
            "encrypted_over_twin": (trained - started - alignment["seconds"]) / max(replayed - trained, 1e-9),
        },
        "wire": options.wire,
        "peak_memory_mb": _peak_memory_mb(),
        "warnings": [
            *federation.warnings,
            *_noise_warnings(result),
            *_new(who_sees_what.warnings(parties.contract), federation.warnings),
        ],
        "stand_ins": list(STAND_INS),
    }
    plan = outcome.roster.plan
    if plan is not None:
        # spare attempts are paid for in advance and never refunded, so this holds however many were used
        result["privacy"]["epsilon_spent"] = epsilon_after(plan, {})
        result["privacy"]["releases"] = [
            dict(zip(("name", "times", "l2", "std"), r, strict=True)) for r in _releases(outcome)
        ]
    sections = _sections(federation, parties, outcome, models, curves, result)
    files = {
        "result.json": json.dumps(result, indent=1, ensure_ascii=False),
        "report.html": render(result, sections),
        "contract.json": parties.signed.model_dump_json(indent=1),
        "certificate.json": json.dumps(outcome.certificate, indent=1, ensure_ascii=False),
        "certificate.html": certificate_page(outcome.certificate),
        **audit_files(parties),
        **{f"models/{name}": json.dumps(model, ensure_ascii=False) for name, model in _model_names(models).items()},
    }
    return Run(result=result, sections=sections, files=files)


def audit_files(parties: Parties) -> dict[str, str]:
    """Every institution's audit log, side by side: `xinyi-audit verify OUT/audit/*`."""
    names = _file_names(parties.institutions)
    return {
        f"audit/{names[party]}/{file.name}": file.read_text(encoding="utf-8")
        for party, institution in parties.institutions.items()
        for file in sorted((institution.home / AUDIT).iterdir())
        if file.suffix in (".json", ".jsonl")
    }


def write(run: Run, folder: Path) -> None:
    """Write every file of the run into `folder`, whole or not at all."""
    write_run(folder, run.files)


# --- the pooled table, for twin and scores ---------------------------------------------------------------------------


def pool(federation: Federation) -> PooledData:
    """All banks' training rows in one table, as the twin takes it."""
    training = [~bank.held_out for bank in federation.banks]
    ids = np.concatenate([bank.ids[rows] for bank, rows in zip(federation.banks, training, strict=True)])
    return PooledData(
        specs=tuple(column.spec for column in federation.columns[federation.label_holder]),
        columns=_bank_columns(federation, training),
        label=np.concatenate([bank.label[rows] for bank, rows in zip(federation.banks, training, strict=True)]),
        owners={
            owner.name: OwnerData(
                specs=tuple(column.spec for column in federation.columns[owner.name]),
                columns=owner.columns,
                index=locate(ids, owner.ids),
            )
            for owner in federation.owners
        },
    )


def _bank_columns(federation: Federation, rows: list[npt.NDArray[np.bool_]]) -> dict[str, npt.NDArray[Any]]:
    return {
        name: np.concatenate([bank.columns[name][mask] for bank, mask in zip(federation.banks, rows, strict=True)])
        for name in federation.banks[0].columns
    }


def score_held_out(
    federation: Federation, models: Mapping[str, Mapping[str, Any]]
) -> tuple[npt.NDArray[np.int8], Int64]:
    """(label, score) of all held-out rows, from nothing but the parties' model files (2^-16 logit)."""
    held_out = [bank.held_out for bank in federation.banks]
    ids = np.concatenate([bank.ids[rows] for bank, rows in zip(federation.banks, held_out, strict=True)])
    label = np.concatenate([bank.label[rows] for bank, rows in zip(federation.banks, held_out, strict=True)])
    bank_model = models[federation.banks[0].name]
    score = np.full(len(ids), int(bank_model["intercept"]), np.int64)
    score += _partial(bank_model, _bank_columns(federation, held_out), None)
    for owner in federation.owners:
        score += _partial(models[owner.name], owner.columns, locate(ids, owner.ids))
    return label, score


def _partial(model: Mapping[str, Any], columns: Mapping[str, npt.NDArray[Any]], index: Int64 | None) -> Int64:
    tower = Tower.from_json(model["tower"])
    weights = np.array(model["weights"], np.int64)
    if index is None:
        return apply(cells(tower, columns), weights)
    return apply(_aligned_cells(tower, columns, index), weights)


def _aligned_cells(tower: Tower, columns: Mapping[str, npt.NDArray[Any]], index: Int64) -> npt.NDArray[np.int32]:
    known = index >= 0
    return cells(tower, {name: values[np.where(known, index, 0)] for name, values in columns.items()}, known)


def _twin_scores(federation: Federation, twin: TwinResult) -> Int64:
    held_out = [bank.held_out for bank in federation.banks]
    ids = np.concatenate([bank.ids[rows] for bank, rows in zip(federation.banks, held_out, strict=True)])
    owners = {owner.name: (owner.columns, locate(ids, owner.ids)) for owner in federation.owners}
    return twin.score(_bank_columns(federation, held_out), owners)


def is_exact(models: Mapping[str, Mapping[str, Any]], twin: TwinResult, parties: Parties) -> bool:
    """PROTOCOL rule 5: bins, every weight of every party and the intercept equal the twin's as integers."""
    banks = all(
        models[name]["tower"] == twin.bank.to_json()
        and models[name]["weights"] == twin.bank_weights.tolist()
        and models[name]["intercept"] == twin.intercept
        for name in parties.banks
    )
    owners = all(
        models[name]["tower"] == twin.owners[name].to_json()
        and models[name]["weights"] == twin.owner_weights[name].tolist()
        for name in parties.owners
    )
    return banks and owners


# --- figures for people ----------------------------------------------------------------------------------------------


def _peak_memory_mb() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(max(own, children) / 1024, 1)


def _noise_warnings(result: Mapping[str, Any]) -> list[str]:
    if result["pooled_metrics"] is None:
        return [
            "the noise of this epsilon drowns the held-out rows: no pooled metrics, no calibration, lift or KS chart; "
            "use more rows or more epsilon"
        ]
    if noise := result["pooled_metrics"]["auc_noise_std"]:
        return [
            f"calibration, lift and KS chart come from the released histogram, which carries noise (standard deviation "
            f"{noise:.4f} of its AUC); their intervals do not count it"
        ]
    return []


def _alignment(parties: Parties, outcome: Outcome) -> dict[str, Any]:
    """Private set intersection: form, seconds, bytes, and by pair how many of a bank's rows an owner knows."""
    steps = [step for step in outcome.steps if step.step.startswith(f"{StepKind.MATCH}.")]
    return {
        "form": outcome.roster.matching_form,
        "bucket": parties.contract.alignment.bucket,
        "seconds": sum(step.seconds for step in steps),
        "bytes": sum(step.bytes_in + step.bytes_out for step in steps),
        "known": {name: dict(bank.known_rows) for name, bank in parties.banks.items()},
        "rows": {
            name: announced.training_rows + announced.held_out_rows
            for name, announced in outcome.roster.announcements.items()
            if name in parties.banks
        },
    }


def _new(lines: tuple[str, ...], known: tuple[str, ...]) -> list[str]:
    """Lines whose subject (the words before the colon or bracket) the loader has not warned about already."""
    subjects = {re.split(r"[:(]", line)[0].strip() for line in known}
    return [line for line in lines if re.split(r"[:(]", line)[0].strip() not in subjects]


def _roc(label: npt.NDArray[np.int8], score: npt.NDArray[Any]) -> tuple[list[float], list[float]]:
    false_positive, true_positive, _ = roc_curve(label, score)
    keep = np.unique(np.linspace(0, len(false_positive) - 1, 250).astype(int))
    return false_positive[keep].tolist(), true_positive[keep].tolist()


def _releases(outcome: Outcome) -> list[Release]:
    """(name, times, L2 sensitivity, total standard deviation) of every kind of release."""
    roster = outcome.roster
    plan = roster.plan
    if plan is None:
        return []
    banks = len(roster.contract.banks)
    return [
        (
            release.name,
            release.count,
            release.l2_sensitivity,
            roster.total_std(plan.stds[release.name], banks),
        )
        for release in plan.releases
    ]


def _steps(steps: tuple[StepRecord, ...]) -> list[Step]:
    """Steps of one kind in a row (the inner steps of a line search) as one line."""
    sides = {"banks": "label holders", "owners": "feature owners", "all": "all"}
    lines: list[Step] = []
    for step in steps:
        name = re.sub(r"\.\d+$", "", step.step)
        line: Step = (name, sides[step.audience], step.messages, step.seconds, step.bytes_in, step.bytes_out)
        if lines and lines[-1][0] == name:
            last = lines.pop()
            line = (name, last[1], last[2] + line[2], last[3] + line[3], last[4] + line[4], last[5] + line[5])
        lines.append(line)
    return lines


_Placed = tuple[Mapping[str, Any], Mapping[str, npt.NDArray[Any]], Int64 | None]
"""A model file, the columns it reads, and the row of each training row in them (None: one to one)."""


def _scorecards(federation: Federation, models: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[ScorecardRow, ...]]:
    """Points of every party side by side: exists in simulation only."""
    pooled = pool(federation)
    bank = federation.banks[0].name
    towers: dict[str, _Placed] = {"banks": (models[bank], pooled.columns, None)}
    towers |= {name: (models[name], owner.columns, owner.index) for name, owner in pooled.owners.items()}
    features_total = sum(len(Tower.from_json(model["tower"]).features) for model, _, _ in towers.values())
    scale, unit = PointScale(), float(1 << SCORE_BITS)
    cards = {}
    for name, (model, columns, index) in towers.items():
        tower = Tower.from_json(model["tower"])
        placed = cells(tower, columns) if index is None else _aligned_cells(tower, columns, index)
        labels = [(feature.name, text) for feature in tower.features for text in feature.labels()]
        if tower.has_no_file:
            labels.append(("no file", "enterprise unknown to this owner"))
        cards[name] = scorecard_rows(
            labels,
            np.array(model["weights"], np.float64) / unit,
            scale=scale,
            intercept=models[bank]["intercept"] / unit,
            features_total=features_total,
            counts=bin_counts(placed, tower.rows),
            no_file=tower.has_no_file,
        )
    return cards


def _sections(
    federation: Federation,
    parties: Parties,
    outcome: Outcome,
    models: Mapping[str, Mapping[str, Any]],
    curves: dict[str, tuple[list[float], list[float]]],
    result: Mapping[str, Any],
) -> ReportSections:
    histogram = ScoreHistogram.from_vector(np.array(outcome.histogram, np.int64))
    usable = result["pooled_metrics"] is not None
    note = federation.note
    if federation.synthetic:
        note = f"SYNTHETIC DATA: every relation in it is invented. {note}"
    return ReportSections(
        job=f"{federation.name} (job {parties.contract.job[:8]})",
        date=time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        curves=curves,
        ks=histogram.ks_curve() if usable else None,
        calibration=histogram.calibration() if usable else (),
        lift=histogram.lift() if usable else (),
        scorecard=_scorecards(federation, models),
        point_scale=PointScale(),
        steps=_steps(outcome.steps),
        pairs=outcome.bytes_by_pair,
        releases=_releases(outcome),
        who_saw_what=who_sees_what.table(parties.contract),
        warnings=result["warnings"],
        stand_ins=STAND_INS,
        note=note,
    )


def _model_names(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {f"{name}.json": models[party] for party, name in _file_names(models).items()}


def _file_names(parties: Iterable[str]) -> dict[str, str]:
    """A file name per party; bank names may hold spaces and commas."""
    names: dict[str, str] = {}
    for party in parties:
        stem = re.sub(r"[^\w-]+", "_", party).strip("_") or "party"
        name, number = stem, 1
        while name in names.values():
            number += 1
            name = f"{stem}_{number}"
        names[party] = name
    return names
