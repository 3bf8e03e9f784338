"""The vault of an approved job: from an institution's home, its policy and its own checked table.

What may be spent comes from the policy in force, never from the contract; who takes part from the consent register. The
held-out rows of a bank are chosen by a keyed hash of the enterprise, so they are the same in every job and nobody else
can tell which they are.
"""

import hashlib
import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_clients import data_check, mapping, sources
from fl_clients.approval import own_objections
from fl_clients.bank import Bank
from fl_clients.checked_data import bank_data, consent_of, owner_data
from fl_clients.consent import ConsentStore
from fl_clients.feature_owner import FeatureOwner
from fl_clients.institution import JOBS, Institution
from fl_clients.job_book import JobEntry
from fl_clients.rules import rules
from fl_clients.vault import DataTerms, Vault
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


@dataclass(frozen=True, kw_only=True, repr=False)
class JobVault:
    """A vault and the role in it, which has the model when the job is closed."""

    vault: Vault
    role: Bank | FeatureOwner
    folder: Path

    def handle(self, data: bytes) -> bytes:
        """The vault's answer; the model is on the disk (0600) when the run was closed."""
        reply = self.vault.handle(data)
        path = self.folder / f"model.{self.vault.use}.json"
        if self.vault.is_closed and not path.exists():
            write_private(path, json.dumps(self.role.model(), ensure_ascii=False).encode())
        return reply


def job_vault(institution: Institution, job: str) -> JobVault:
    """The vault of an approved job that everyone signed, over the table that was named for it."""
    entry = institution.jobs.get(job)
    entry.signed.check_all()
    binding = read_binding(institution, entry)
    in_force = rules(institution)
    policy = in_force.policy
    # a policy that was tightened after the approval holds as well; what was spent since, the ledger decides
    if found := own_objections(institution, in_force, entry.contract, 0.0):
        raise Refused(f"the policy in force has objections to job {entry.contract.job[:8]}: {found[0]}")
    role = _role(institution, entry, binding)
    data = DataTerms(data_set=binding.data_set, budget=policy.budget, most_openings=policy.most_score_openings)
    return JobVault(
        vault=Vault(institution=institution, signed=entry.signed, role=role, data=data),
        role=role,
        folder=private_folder(institution.home / JOBS / entry.contract.job),
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
        noise = KeyedForwardNoise(os.urandom(KEY_BYTES))
        return FeatureOwner(name=name, contract=contract, data=owner_data(table, consent), noise=noise)
    part = enterprise_keys(table.codes.tolist(), _held_out_key(institution.openings_key)) % _HELD_OUT_PARTS
    held_out = part < round(binding.held_out * _HELD_OUT_PARTS)
    data = bank_data(table, binding.label, np.asarray(held_out, np.bool_), consent)
    return Bank(name=name, contract=contract, data=data, noise=SystemNoise())


def _held_out_key(openings_key: bytes) -> bytes:
    """Another key than that of the ledger's digests, which must not tell who is held out."""
    return hashlib.blake2b(b"held out", key=openings_key, digest_size=KEY_BYTES).digest()
