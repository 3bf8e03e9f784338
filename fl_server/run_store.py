"""The coordinator's run store: one directory per job, written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fl_clients.contract import COORDINATOR, Contract, SignedContract
from fl_clients.roster import Roster
from fl_server.coordinator import Outcome
from models.score_histogram import ScoreHistogram


def check_folder(folder: Path) -> None:
    """Before a job: `folder` must be absent, empty or an earlier run, and its parent writable; else OSError."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name another folder for the results (--out, make OUT=)")
    if folder.exists() and any(folder.iterdir()) and not (folder / "result.json").exists():
        raise FileExistsError(f"{folder} is not empty and holds no earlier run; name another (--out, make OUT=)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.parent, os.W_OK):
        raise PermissionError(f"{folder.parent} is not writable; name another folder for results (--out, make OUT=)")


def write_run(folder: Path, files: Mapping[str, str]) -> None:
    """Write `files` (relative name -> text) into `folder`, which must be absent or a folder of an earlier run.

    Everything is written beside it first and then put in place by a rename, so that nothing half-written stays.
    """
    check_folder(folder)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, text in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        os.chmod(fresh, 0o755)  # noqa: S103 - results are no secret
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def outcome_figures(contract: Contract, outcome: Outcome) -> dict[str, Any]:
    """What the coordinator itself knows at the end: figures of the pooled histogram, cost, privacy parameters."""
    histogram = ScoreHistogram.from_vector(np.array(outcome.histogram, dtype=np.int64))
    roster = outcome.roster
    aggregate = roster.aggregate_parameters
    attempts: dict[str, int] = {}
    for step in outcome.steps:
        attempts[step.step] = max(attempts.get(step.step, 0), step.attempt + 1)
    return {
        "job": contract.job,
        "contract": contract.hash.hex(),
        "rounds": contract.model.rounds,
        "parties": {party.name: party.role for party in contract.parties},
        "rows": {
            "training": roster.training_rows,
            "held_out": sum(announcement.held_out_rows for announcement in roster.announcements.values()),
            "by_bank": {bank.name: roster.announcements[bank.name].training_rows for bank in contract.banks},
        },
        "messages": sum(step.messages for step in outcome.steps),
        "bytes": {
            "total": sum(step.bytes_in + step.bytes_out for step in outcome.steps),
            "coordinator_in": sum(step.bytes_in for step in outcome.steps),
        },
        "pooled_metrics": _pooled_metrics(histogram, roster),
        "privacy": {
            "epsilon": contract.privacy.epsilon,
            "delta": roster.delta if contract.privacy.epsilon is not None else None,
            "he": {
                "scheme": "BFV",
                "n": aggregate.degree,
                "log_q": aggregate.log_q,
                "log_t": aggregate.log_t,
                "security_bits": aggregate.security_bits,
                "flooding_bits": aggregate.hiding_bits,
            },
        },
        "attempts": {step: count for step, count in attempts.items() if count > 1},
        "bytes_by_pair": {f"{source} -> {target}": size for (source, target), size in outcome.bytes_by_pair.items()},
        "receipts": dict(outcome.receipts),
        "coordinator": COORDINATOR,
    }


MOST_AUC_NOISE = 0.03
"""Standard deviation of the AUC above which pooled metrics would mislead and are left out."""


def _pooled_metrics(histogram: ScoreHistogram, roster: Roster) -> dict[str, float] | None:
    """What the coordinator may know of the model's quality; None where the noise drowns the held-out rows."""
    noise_std = roster.total_std(roster.std("histogram"), len(roster.contract.banks))
    if not histogram.is_usable or histogram.auc_noise_std(noise_std) > MOST_AUC_NOISE:
        return None
    return {
        "auc": histogram.auc(),
        "auc_error_bound": histogram.auc_error_bound(),
        "auc_noise_std": histogram.auc_noise_std(noise_std),
        "ks": histogram.ks(),
        "gini": histogram.gini(),
        "brier": histogram.brier(),
    }


def write_outcome(folder: Path, signed: SignedContract, outcome: Outcome) -> None:
    """The coordinator's own record of a deployed job."""
    write_run(
        folder,
        {
            "result.json": json.dumps(outcome_figures(signed.contract, outcome), indent=1),
            "contract.json": signed.model_dump_json(indent=1),
            "certificate.json": json.dumps(outcome.certificate, indent=1, ensure_ascii=False),
        },
    )
