"""Consent in a whole run: only live consent takes part; a revocation after alignment takes the row out at once."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from fl_clients.bank import Bank
from fl_clients.contract import AlignmentTerms, PrivacyTerms
from fl_clients.data import BankData, LabelledRows
from models.scorecard import ScorecardSettings
from privacy import blind_aggregate
from privacy.errors import Refused
from privacy.noise import SystemNoise
from simulations import job
from simulations.federation_folder import Federation
from simulations.job import make_parties, model_files, noise_totals, run_in_memory
from simulations.run import is_exact, pool
from simulations.twin import run_twin
from tests.small_federation import small_federation

SETTINGS = ScorecardSettings(rounds=1, max_bins_bank=4, max_bins_owner=4)


class Register:
    """A consent register of one institution that can be changed while a job runs."""

    def __init__(self) -> None:
        self.revoked: set[str] = set()

    def __call__(self, ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        return np.array([name not in self.revoked for name in ids], np.bool_)


def with_register(monkeypatch: pytest.MonkeyPatch, register: Register) -> None:
    table = job._bank_data
    monkeypatch.setattr(job, "_bank_data", lambda bank: replace(table(bank), consent=register))


def federation_without(federation: Federation, ids: set[str]) -> Federation:
    banks = []
    for bank in federation.banks:
        keep = np.array([name not in ids for name in bank.ids])
        columns = {name: values[keep] for name, values in bank.columns.items()}
        banks.append(
            replace(bank, ids=bank.ids[keep], label=bank.label[keep], held_out=bank.held_out[keep], columns=columns)
        )
    return replace(federation, banks=tuple(banks))


def test_without_consent_an_enterprise_takes_part_in_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = small_federation(banks=2, owners=2, enterprises=400)
    register = Register()
    register.revoked = {str(name) for name in federation.banks[0].ids[:50]}
    with_register(monkeypatch, register)
    parties = make_parties(federation, SETTINGS, PrivacyTerms(), None, AlignmentTerms(bucket=8))
    outcome = run_in_memory(parties, lambda done, total, step: None)
    reduced = federation_without(federation, register.revoked)
    assert outcome.roster.training_rows == sum(int((~bank.held_out).sum()) for bank in reduced.banks)
    twin = run_twin(pool(reduced), SETTINGS, noise_totals(parties, outcome), outcome.roster.noise_stds)
    assert is_exact(model_files(parties), twin, parties)


def test_a_revocation_after_alignment_takes_the_row_out_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = small_federation(banks=2, owners=2, enterprises=400)
    register = Register()
    with_register(monkeypatch, register)
    bank = federation.banks[0]
    victims = {str(name) for name in bank.ids[~bank.held_out][:7]}
    encrypted: list[int] = []
    encrypt = blind_aggregate.BankKey.encrypt

    def counts(self: blind_aggregate.BankKey, values: npt.NDArray[np.int64], packing: int) -> bytes:
        encrypted.append(int((values == 0).sum()))
        return encrypt(self, values, packing)

    monkeypatch.setattr(blind_aggregate.BankKey, "encrypt", counts)
    parties = make_parties(federation, SETTINGS, PrivacyTerms(), None, AlignmentTerms(bucket=8))

    def watch(done: int, total: int, step: str) -> None:
        if step == "bins.1":  # aligned, nothing counted yet
            register.revoked = victims

    outcome = run_in_memory(parties, watch)
    assert encrypted == [7, 0]
    # the held-out rows of the release are untouched, the base rate has lost the victims' labels
    training = [table.label[~table.held_out] for table in federation.banks]
    lost = int(bank.label[np.isin(bank.ids, sorted(victims))].sum())
    everyone = sum(int(label.sum()) for label in training)
    assert parties.banks[bank.name]._binning().positives == everyone - lost  # type: ignore[attr-defined]
    assert sum(outcome.histogram) == sum(int(table.held_out.sum()) for table in federation.banks)


def test_a_bank_without_any_consent_refuses() -> None:
    rows = LabelledRows(ids=["a", "b"], label=np.array([0, 1], np.int8), columns={})
    nobody = BankData(training=rows, held_out=rows, consent=lambda ids: np.zeros(len(ids), np.bool_))
    parties = make_parties(small_federation(banks=2, owners=2, enterprises=300), SETTINGS, PrivacyTerms())
    with pytest.raises(Refused, match="no enterprise has live consent"):
        Bank(name="bank1", contract=parties.contract, data=nobody, noise=SystemNoise())
