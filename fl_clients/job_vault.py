"""The vault of an approved job: from an institution's home, its policy and its own checked table.

What may be spent comes from the policy in force, never from the contract; who takes part from the consent register. The
held-out rows of a bank are chosen by a keyed hash of the enterprise, so they are the same in every job and nobody else
can tell which they are.
"""

import fcntl
import hashlib
import json
import os
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np
import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_clients import data_check, mapping, sources
from fl_clients.approval import check_approved, own_objections
from fl_clients.bank import Bank
from fl_clients.checked_data import bank_data, consent_of, owner_data
from fl_clients.consent import ConsentStore
from fl_clients.feature_owner import FeatureOwner
from fl_clients.institution import JOBS, Institution
from fl_clients.job_book import JobEntry, JobState
from fl_clients.rules import rules
from fl_clients.vault import DataTerms, Vault
from privacy.audit_format import Entry
from privacy.errors import Refused
from privacy.noise import KeyedForwardNoise, SystemNoise
from privacy.private_file import private_folder, write_private
from privacy.score_openings import KEY_BYTES, enterprise_keys

DATA = "data.toml"
_HELD_OUT_PARTS = 1 << 16


class DataBinding(BaseModel):
    """Which of the institution's tables a job uses: `data.toml` in the job's folder.

    `data_set`: the table's name in the ledger; the same table must always have the same. `label` and `held_out` (share
    of rows that are scored and never trained on) are a bank's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mapping: Path
    receipt: Path
    consents: Path
    data_set: str = Field(min_length=1, max_length=200)
    label: str | None = None
    held_out: float = Field(default=0.3, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        relative = [str(path) for path in (self.mapping, self.receipt, self.consents) if not path.is_absolute()]
        if relative:
            raise ValueError(f"{relative[0]} is no absolute path; the vault may run in another folder")
        return self


def bind(institution: Institution, job: str, binding: DataBinding) -> Path:
    """Keep which table a job uses; the table is loaded once, so that a mistake shows now."""
    entry = institution.jobs.get(job)
    _role(institution, entry, binding)
    _check_name(institution, binding)
    institution.log.append([Entry(kind="data", job=entry.contract.job, body=_logged(binding))])
    path = private_folder(institution.home / JOBS / entry.contract.job) / DATA
    write_private(path, tomli_w.dumps(binding.model_dump(mode="json", exclude_none=True)).encode())
    return path


def read_binding(institution: Institution, entry: JobEntry) -> DataBinding:
    """The table that a job uses; `Refused` where none was named."""
    path = institution.home / JOBS / entry.contract.job / DATA
    try:
        return DataBinding.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        short = entry.contract.job[:8]
        raise Refused(f"job {short} has no table yet; name it with `xinyi-node job data {short}`") from None
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise Refused(f"{path}: {str(error).splitlines()[0]}") from None


def _logged(binding: DataBinding) -> dict[str, Any]:
    """What the log says of a binding: names and hashes, no row."""
    content = data_check.load_receipt(binding.receipt).content_hash
    whole = hashlib.sha256(binding.model_dump_json().encode()).hexdigest()
    shown = {"data_set": binding.data_set, "content": content, "binding": whole, "label": binding.label}
    return shown | {"mapping": hashlib.sha256(str(binding.mapping).encode()).hexdigest()}


def _check_name(institution: Institution, binding: DataBinding) -> None:
    """One table, one name in the ledger: another name would give it a fresh budget."""
    mine = _logged(binding)
    for entry in institution.log.entries(kind="data"):
        same = entry.body["content"] == mine["content"] or entry.body["mapping"] == mine["mapping"]
        if same and entry.body["data_set"] != binding.data_set:
            raise Refused(
                f"this table is the data set {entry.body['data_set']!r} in the ledger since {entry.time}; it cannot be "
                f"{binding.data_set!r} as well, or its budget would begin anew"
            )


def _check_binding(institution: Institution, entry: JobEntry, binding: DataBinding) -> None:
    """The binding that the log has for the job, and no other: the file could be edited."""
    logged = institution.log.entries(kind="data", job=entry.contract.job)
    if not logged or logged[-1].body != _logged(binding):
        raise Refused(
            f"data.toml of job {entry.contract.job[:8]} is not what the audit log says; name the table again with "
            f"`xinyi-node job data {entry.contract.job[:8]}`"
        )


@contextmanager
def only_vault(institution: Institution, job: str) -> Iterator[None]:
    """While this is open no other process has a vault for the job; a run that died before is ended in book and log."""
    entry = institution.jobs.get(job)
    folder = private_folder(institution.home / JOBS / entry.contract.job)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                f"another process has the vault of job {entry.contract.job[:8]} open; stop it first"
            ) from None
        entry = institution.jobs.get(job)  # as it stands now that nobody else has a vault for it
        if entry.state in (JobState.COLLECTING, JobState.APPLYING):
            reason = "its process died; keys and rows were in memory only"
            body = {"from": str(entry.state), "to": str(JobState.DESTROYED), "use": entry.uses}
            institution.log.append(
                [
                    Entry(kind="destruction", job=entry.contract.job, body={"reason": reason, "use": entry.uses}),
                    Entry(kind="state", job=entry.contract.job, body=body),
                ]
            )
            institution.jobs.destroy(entry.contract, reason, institution.clock())
        yield
    finally:
        os.close(lock)


def purge(institution: Institution) -> tuple[Path, ...]:
    """Erase the models whose contract's retention is over; logged before. Returns the files that are gone."""
    gone = []
    for entry in institution.jobs.all():
        contract = entry.contract
        if institution.clock() < contract.expires + timedelta(days=contract.retention_days):
            continue
        for path in sorted((institution.home / JOBS / contract.job).glob("model.*.json")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            body = {"reason": "retention is over", "model": digest}
            institution.log.append([Entry(kind="destruction", job=contract.job, body=body)])
            path.unlink()
            gone.append(path)
    return tuple(gone)


@dataclass(frozen=True, kw_only=True, repr=False)
class JobVault:
    """A vault and the role in it, which has the model when the job is closed."""

    vault: Vault
    role: Bank | FeatureOwner
    folder: Path
    lock: ExitStack
    """Held while the vault may answer: a job has one vault at a time, over all processes."""

    def close(self, reason: str) -> None:
        """End the run if it is not over, and let another vault take the job."""
        self.vault.stop(reason)
        self.lock.close()

    def handle(self, data: bytes) -> bytes:
        """The vault's answer; the model is on the disk (0600) when the run was closed."""
        reply = self.vault.handle(data)
        path = self.folder / f"model.{self.vault.use}.json"
        if self.vault.is_closed and not path.exists():
            write_private(path, json.dumps(self.role.model(), ensure_ascii=False).encode())
        return reply


def job_vault(institution: Institution, job: str) -> JobVault:
    """The vault of an approved job that everyone signed, over the table that was named for it; to be closed."""
    with ExitStack() as lock:
        lock.enter_context(only_vault(institution, job))
        return _locked_vault(institution, job, lock)


def _locked_vault(institution: Institution, job: str, lock: ExitStack) -> JobVault:
    entry = institution.jobs.get(job)
    entry.signed.check_all()
    binding = read_binding(institution, entry)
    _check_binding(institution, entry, binding)
    _check_name(institution, binding)
    in_force = rules(institution)
    policy = in_force.policy
    check_approved(institution, in_force, entry)
    # a policy that was tightened after the approval holds as well; what was spent since, the ledger decides
    if found := own_objections(institution, in_force, entry.contract, 0.0):
        raise Refused(f"the policy in force has objections to job {entry.contract.job[:8]}: {found[0]}")
    role = _role(institution, entry, binding)
    data = DataTerms(data_set=binding.data_set, budget=policy.budget, most_openings=policy.most_score_openings)
    return JobVault(
        vault=Vault(institution=institution, signed=entry.signed, role=role, data=data),
        role=role,
        folder=private_folder(institution.home / JOBS / entry.contract.job),
        lock=lock.pop_all(),
    )


def _role(institution: Institution, entry: JobEntry, binding: DataBinding) -> Bank | FeatureOwner:
    contract, name = entry.contract, institution.name
    mapped, schema = mapping.load_mapping(binding.mapping)
    receipt = data_check.load_receipt(binding.receipt)
    is_bank = contract.party(name).role == "bank"
    if is_bank != (binding.label is not None):
        raise Refused(f"{name} is {contract.party(name).role}: a bank names its label field, others none (--label)")
    labels = (binding.label,) if binding.label is not None else ()
    columns = [column.name for column in contract.party(name).columns]
    batches = sources.batches(mapped.source, mapped.source_columns)
    table = data_check.load_checked(mapped, schema, batches, receipt, features=columns, labels=labels)
    if not binding.consents.exists():
        raise Refused(f"no consent register {binding.consents}; import the consents first")
    consent = consent_of(ConsentStore(binding.consents), contract.purpose, institution.clock)
    if binding.label is None:
        # the same in every run of the contract: fresh noise in each could be averaged (PROTOCOL rule 2)
        key = hashlib.blake2b(
            b"forward noise" + contract.hash, key=institution.openings_key, digest_size=KEY_BYTES
        ).digest()
        noise = KeyedForwardNoise(key)
        return FeatureOwner(name=name, contract=contract, data=owner_data(table, consent), noise=noise)
    part = enterprise_keys(table.codes.tolist(), _held_out_key(institution.openings_key)) % _HELD_OUT_PARTS
    held_out = part < round(binding.held_out * _HELD_OUT_PARTS)
    data = bank_data(table, binding.label, np.asarray(held_out, np.bool_), consent)
    return Bank(name=name, contract=contract, data=data, noise=SystemNoise())


def _held_out_key(openings_key: bytes) -> bytes:
    """Another key than that of the ledger's digests, which must not tell who is held out."""
    return hashlib.blake2b(b"held out", key=openings_key, digest_size=KEY_BYTES).digest()
