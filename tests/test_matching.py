"""Alignment inside a run: every form of private set intersection gives the rows that plain matching gives."""

from dataclasses import replace

import numpy as np
import pytest

from fl_clients.contract import AlignmentTerms, PrivacyTerms
from fl_clients.feature_owner import FeatureOwner
from fl_clients.protocol import StepKind
from fl_server.coordinator import JobStoppedError
from models.scorecard import ScorecardSettings
from simulations.federation_folder import Federation, OwnerTable, locate
from simulations.job import make_parties, model_files, noise_totals, run_in_memory
from simulations.run import is_exact, pool
from simulations.twin import run_twin
from tests.small_federation import small_federation

SETTINGS = ScorecardSettings(rounds=1, max_bins_bank=4, max_bins_owner=4)


def few(table: OwnerTable, rows: int) -> OwnerTable:
    return replace(table, ids=table.ids[:rows], columns={name: c[:rows] for name, c in table.columns.items()})


def federation_for(form: str) -> Federation:
    federation = small_federation(banks=2, owners=2, enterprises=600)
    if form == "banks publish":
        return replace(federation, owners=tuple(few(owner, 40) for owner in federation.owners))
    return federation


@pytest.mark.parametrize("form", ["two-way", "owners publish", "banks publish"])
def test_every_form_aligns_as_plain_matching_does(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = federation_for(form)
    terms = AlignmentTerms(bucket=8, one_sided=form != "two-way")
    parties = make_parties(federation, SETTINGS, PrivacyTerms(), None, terms)
    seen: dict[str, dict[str, np.ndarray]] = {}
    prepare = FeatureOwner._prepare

    def looks(self: FeatureOwner, request: object) -> object:
        outgoing = prepare(self, request)  # type: ignore[arg-type]
        seen[self._name] = {
            bank: np.concatenate([aligned.training, aligned.held_out]) for bank, aligned in self._aligned.items()
        }
        return outgoing

    monkeypatch.setattr(FeatureOwner, "_prepare", looks)
    outcome = run_in_memory(parties, lambda done, total, step: None)
    assert outcome.roster.matching_form == form
    for owner in federation.owners:
        for bank in federation.banks:
            plain = locate(bank.ids, owner.ids)
            # the bank's order is its own secret of this job: the same rows, in another order
            assert np.array_equal(np.sort(seen[owner.name][bank.name]), np.sort(plain))
            assert not np.array_equal(seen[owner.name][bank.name], plain)
            assert parties.banks[bank.name].known_rows[owner.name] == int((plain >= 0).sum())
    twin = run_twin(pool(federation), SETTINGS, noise_totals(parties, outcome), outcome.roster.noise_stds)
    assert is_exact(model_files(parties), twin, parties)


def test_an_owner_that_knows_nobody_stops_the_job_with_its_name() -> None:
    federation = small_federation(banks=2, owners=2, enterprises=300)
    stranger = replace(federation.owners[1], ids=np.array([f"X{name}" for name in federation.owners[1].ids]))
    federation = replace(federation, owners=(federation.owners[0], stranger))
    parties = make_parties(federation, SETTINGS, PrivacyTerms(), None, AlignmentTerms(bucket=8))
    with pytest.raises(JobStoppedError, match=f"{stranger.name} refused step {StepKind.PREPARE}"):
        run_in_memory(parties, lambda done, total, step: None)


def test_list_sizes_leave_a_party_rounded_up_to_the_bucket_only() -> None:
    federation = small_federation(banks=2, owners=2, enterprises=300)
    parties = make_parties(federation, SETTINGS, PrivacyTerms(), None, AlignmentTerms(bucket=64))
    outcome = run_in_memory(parties, lambda done, total, step: None)
    for owner in federation.owners:
        announced = outcome.roster.announcements[owner.name]
        assert announced.list_size % 64 == 0
        assert announced.list_size - 64 < len(owner.ids) <= announced.list_size


def shared_federation() -> Federation:
    """Two banks with the same 60 customers among their own."""
    federation = small_federation(banks=2, owners=2, enterprises=400)
    first, second = federation.banks
    known = np.flatnonzero(np.isin(first.ids, federation.owners[0].ids))[:60]
    columns = {name: np.concatenate([values, first.columns[name][known]]) for name, values in second.columns.items()}
    both = replace(
        second,
        ids=np.concatenate([second.ids, first.ids[known]]),
        label=np.concatenate([second.label, first.label[known]]),
        held_out=np.concatenate([second.held_out, first.held_out[known]]),
        columns=columns,
    )
    return replace(federation, banks=(first, both))


def test_an_enterprise_of_two_banks_needs_a_contract_that_says_so() -> None:
    federation, terms = shared_federation(), AlignmentTerms(bucket=8)
    settings = replace(SETTINGS, cross_tabs=False)
    parties = make_parties(federation, settings, PrivacyTerms(epsilon=3.0), None, terms)
    with pytest.raises(JobStoppedError, match="some enterprises are customers of more than 1 banks"):
        run_in_memory(parties, lambda done, total, step: None)
    single = make_parties(small_federation(banks=2, owners=2), settings, PrivacyTerms(epsilon=3.0), None, terms)
    double = make_parties(federation, settings, PrivacyTerms(epsilon=3.0, banks_per_enterprise=2), None, terms)
    outcomes = [run_in_memory(parties, lambda done, total, step: None) for parties in (single, double)]
    stds = [outcome.roster.std("sums") for outcome in outcomes]
    # delta follows the number of rows, so the factor is 2 up to that
    assert stds[1] == pytest.approx(2 * stds[0], rel=0.1)
    assert stds[1] > 1.8 * stds[0]
    twin = run_twin(pool(federation), settings, noise_totals(double, outcomes[1]), outcomes[1].roster.noise_stds)
    assert is_exact(model_files(double), twin, double)
