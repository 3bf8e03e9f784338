"""Consent in a whole run: only live consent takes part; a revocation after alignment takes the row out at once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from fl_clients.bank import Bank
from fl_clients.checked_data import consent_of
from fl_clients.consent import ConsentStore
from fl_clients.contract import AlignmentTerms, PrivacyTerms
from fl_clients.data import BankData, LabelledRows
from fl_clients.feature_owner import FeatureOwner
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
    positives: list[int] = []
    encrypt = blind_aggregate.BankKey.encrypt

    def counts(self: blind_aggregate.BankKey, values: npt.NDArray[np.int64], packing: int) -> bytes:
        encrypted.append(int((values == 0).sum()))
        return encrypt(self, values, packing)

    monkeypatch.setattr(blind_aggregate.BankKey, "encrypt", counts)
    parties = make_parties(federation, SETTINGS, PrivacyTerms(), None, AlignmentTerms(bucket=8))

    def watch(done: int, total: int, step: str) -> None:
        if step == "bins.1":  # aligned, nothing counted yet
            register.revoked = victims
        if step == "finish":
            positives.append(parties.banks[bank.name]._binning().positives)

    outcome = run_in_memory(parties, watch)
    assert encrypted == [7, 0]
    # the held-out rows of the release are untouched, the base rate has lost the victims' labels
    training = [table.label[~table.held_out] for table in federation.banks]
    lost = int(bank.label[np.isin(bank.ids, sorted(victims))].sum())
    everyone = sum(int(label.sum()) for label in training)
    assert positives == [everyone - lost]
    assert sum(outcome.histogram) == sum(int(table.held_out.sum()) for table in federation.banks)


def test_a_revocation_at_an_owner_takes_the_row_out_of_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = small_federation(banks=2, owners=2, enterprises=400)
    register, owner = Register(), federation.owners[0]
    held: list[int] = []
    find = FeatureOwner._find_direction

    def counts(self: FeatureOwner, step: object, request: object) -> object:
        if self._name == owner.name:
            held.append(sum(int((cells[:, 0] >= 0).sum()) for cells in self._cells.values()))
        return find(self, step, request)  # type: ignore[arg-type]

    monkeypatch.setattr(FeatureOwner, "_find_direction", counts)
    create = FeatureOwner.__init__

    def with_consent(self: FeatureOwner, **arguments: object) -> None:
        if arguments["name"] == owner.name:
            arguments["data"] = replace(arguments["data"], consent=register)  # type: ignore[type-var]
        create(self, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FeatureOwner, "__init__", with_consent)
    parties = make_parties(federation, replace(SETTINGS, rounds=2), PrivacyTerms(), None, AlignmentTerms(bucket=8))

    def watch(done: int, total: int, step: str) -> None:
        if step == "r2.residual":
            register.revoked = {str(name) for name in owner.ids}

    run_in_memory(parties, watch)
    assert held[0] > 100
    assert held[1] == 0


def test_the_register_answers_on_the_thread_of_the_socket(tmp_path: Path) -> None:
    store = ConsentStore(tmp_path / "consent.sqlite")
    asked = consent_of(store, "purpose", lambda: datetime(2025, 6, 15, tzinfo=UTC))
    with ThreadPoolExecutor(1) as pool_of_one:
        assert pool_of_one.submit(asked, ["91110000600037341L"]).result().tolist() == [False]


def test_a_bank_without_any_consent_refuses() -> None:
    rows = LabelledRows(ids=["a", "b"], label=np.array([0, 1], np.int8), columns={})
    nobody = BankData(training=rows, held_out=rows, consent=lambda ids: np.zeros(len(ids), np.bool_))
    parties = make_parties(small_federation(banks=2, owners=2, enterprises=300), SETTINGS, PrivacyTerms())
    with pytest.raises(Refused, match="no enterprise has live consent"):
        Bank(name="bank1", contract=parties.contract, data=nobody, noise=SystemNoise())
