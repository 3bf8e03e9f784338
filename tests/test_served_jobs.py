"""Which vault answers in the vault process, and which node is asked: by approvals and the book, never by the asker."""

from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fl_clients import job_vault
from fl_clients.app_bundle import Approval
from fl_clients.institution import Institution
from fl_clients.job_book import JobEntry, JobState
from fl_clients.job_vault import JobVault
from fl_clients.protocol import Request, address_of, decode_reply, decode_request, encode_request
from fl_clients.served_jobs import ServedJobs
from fl_clients.vault import Vault, VaultFailedError
from fl_server.coordinator import JobStoppedError
from fl_server.deployed_job import follow, nodes_of
from fl_server.enrolment import Book, Member
from fl_server.lane import LaneGrid
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.private_file import write_private
from simulations.job import Parties
from tests.small_federation import small_federation, small_parties

BANK = "bank1"


@pytest.fixture
def parties() -> Parties:
    return small_parties(small_federation(banks=2, owners=1, enterprises=300), rounds=1)


@pytest.fixture
def made(parties: Parties, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Vaults come from the simulated parties instead of a table; one number for each that was made."""
    numbers: list[int] = []

    def make(institution: Institution, job: str) -> JobVault:
        assert job == parties.contract.job
        numbers.append(len(numbers))
        vault, role = parties.vaults[institution.name], parties.banks[institution.name]
        if numbers[1:]:  # the first run's role has forgotten its rows
            role = small_parties(small_federation(banks=2, owners=1, enterprises=300), rounds=1).banks[institution.name]
            vault = Vault(institution=institution, signed=parties.signed, role=role, data=vault._data)
        return JobVault(lock=ExitStack(), vault=vault, role=role, folder=Path("/absent"))

    monkeypatch.setattr(job_vault, "job_vault", make)
    return numbers


def join(parties: Parties, use: int = 1, coordinator: SigningIdentity | None = None) -> bytes:
    banks = tuple(bank.name for bank in parties.contract.banks)
    request = Request(
        job=parties.contract.hash, step="join", attempt=0, participants=banks, letters=(), posts=(), use=use
    )
    return encode_request(request, coordinator or parties.coordinator)


def test_a_step_is_answered_by_the_vault_of_its_contract_which_is_made_once(parties: Parties, made: list[int]) -> None:
    served = ServedJobs(parties.institutions[BANK])
    data = join(parties)
    assert address_of(data) == (parties.contract.hash, "join")
    first = served.handle(data)
    assert served.handle(data) == first
    assert made == [0]
    assert "bank1" in repr(served)


def test_a_step_of_a_strange_coordinator_or_contract_makes_no_vault(parties: Parties, made: list[int]) -> None:
    served = ServedJobs(parties.institutions[BANK])
    with pytest.raises(Refused, match="signature"):
        served.handle(join(parties, coordinator=SigningIdentity.generate()))
    other = small_parties(small_federation(banks=2, owners=1, enterprises=300), rounds=1)
    with pytest.raises(Refused, match="is approved here"):
        served.handle(join(other))
    with pytest.raises(Refused, match="is no step of a job"):
        served.handle(b"garbage")
    assert made == []


def test_a_job_that_was_only_notified_is_not_served(
    parties: Parties, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    institution = parties.institutions[BANK]
    entry = institution.jobs.with_contract(parties.contract.hash)
    assert entry is not None

    def notified(_: bytes) -> JobEntry:
        return replace(entry, state=JobState.NOTIFIED)

    monkeypatch.setattr(institution.jobs, "with_contract", notified)
    with pytest.raises(Refused, match="is approved here"):
        ServedJobs(institution).handle(join(parties))
    assert made == []


def test_a_vault_that_was_started_anew_has_no_run_to_go_on_with(parties: Parties, made: list[int]) -> None:
    banks = tuple(bank.name for bank in parties.contract.banks)
    request = Request(
        job=parties.contract.hash, step="roster", attempt=0, participants=banks, letters=(), posts=(), use=1
    )
    with pytest.raises(Refused, match="no run of this contract was begun"):
        ServedJobs(parties.institutions[BANK]).handle(encode_request(request, parties.coordinator))
    assert made == []


def test_stopping_the_vault_ends_its_runs_in_book_and_log(parties: Parties, made: list[int]) -> None:
    institution = parties.institutions[BANK]
    served = ServedJobs(institution)
    served.handle(join(parties))
    entry = institution.jobs.with_contract(parties.contract.hash)
    assert entry is not None
    assert entry.state is JobState.COLLECTING
    served.close()
    entry = institution.jobs.with_contract(parties.contract.hash)
    assert entry is not None
    assert entry.state is JobState.DESTROYED
    assert "stopped its vault" in entry.reason
    kinds = [item.kind for item in institution.log.entries()]
    assert kinds[-1] == "state"
    assert "destruction" in kinds
    assert made == [0]


def test_a_run_whose_contract_expired_is_ended(parties: Parties, made: list[int]) -> None:
    institution = parties.institutions[BANK]
    served = ServedJobs(institution)
    served.handle(join(parties))
    served.end_expired()
    entry = institution.jobs.with_contract(parties.contract.hash)
    assert entry is not None
    assert entry.state is JobState.COLLECTING
    late = replace(institution, clock=lambda: parties.contract.expires)
    served._institution = late
    served.end_expired()
    entry = institution.jobs.with_contract(parties.contract.hash)
    assert entry is not None
    assert (entry.state, entry.reason) == (JobState.DESTROYED, "the contract expired")
    assert made == [0]


def test_the_wire_learns_no_reason(parties: Parties, made: list[int]) -> None:
    served = ServedJobs(parties.institutions[BANK])
    with pytest.raises(VaultFailedError, match="own log says why"):
        served.answer(b"garbage")
    assert made == []


def test_a_later_run_ends_the_one_before_it(parties: Parties, made: list[int]) -> None:
    served = ServedJobs(parties.institutions[BANK])
    served.handle(join(parties))
    ended = parties.institutions[BANK].log.entries()
    again = join(parties, use=2)
    reply = decode_reply(served.handle(again), parties.contract, BANK, decode_request(again, parties.contract))
    new = parties.institutions[BANK].log.entries()[len(ended) :]
    reasons = [entry.body["reason"] for entry in new if entry.kind == "destruction"]
    assert reasons[0] == "the coordinator began run 2"
    assert "the limits of bank1 do not allow this run" in str(reply.refused)
    assert made == [0, 1]


# the coordinator's side


def member(name: str, identity: str, node: int) -> Member:
    approval = Approval(key_id="k", public_key="p", signature="s", signed_at=0, bundle="b")
    return Member(
        name=name,
        role="bank",
        identity=identity,
        node_key="n",
        node_id=str(node),
        certificate="c",
        approval=approval,
        joined=datetime(2026, 11, 25, tzinfo=UTC),
    )


def test_nodes_come_from_the_book_and_only_for_members_with_the_contracts_identity(parties: Parties) -> None:
    contract = parties.contract
    members = [member(party.name, party.identity, 7 + number) for number, party in enumerate(contract.parties)]
    nodes = nodes_of(Book(members=tuple(members)), contract)
    assert nodes == {party.name: 7 + number for number, party in enumerate(contract.parties)}
    revoked = members[0].model_copy(update={"revoked": datetime(2026, 11, 25, tzinfo=UTC)})
    with pytest.raises(Refused, match="bank1 of the contract is no member"):
        nodes_of(Book(members=(revoked, *members[1:])), contract)
    other = members[0].model_copy(update={"identity": "ab" * 32})
    with pytest.raises(Refused, match="another identity than the contract's"):
        nodes_of(Book(members=(other, *members[1:])), contract)


def test_a_revoked_party_is_not_asked(parties: Parties) -> None:
    from flwr.app import Message

    from fl_clients.courier import to_record

    lane = LaneGrid(parties.contract, parties.coordinator, lambda party: party != "bank1")
    (reply,) = lane.send_and_receive([Message(to_record(b"step"), 1, "train.step")], timeout=30)
    assert reply.has_error()
    assert reply.error.reason == "revoked by the coordinator"


def test_the_command_learns_the_end_of_a_run_from_its_folder(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    write_private(tmp_path / "progress.json", b'{"stopped": "bank1 died in step bins (no answer)"}')
    with pytest.raises(JobStoppedError, match="bank1 died in step bins"):
        follow(tmp_path, "1", tmp_path / "result", lambda *step: seen.append(step))
    write_private(tmp_path / "progress.json", b'{"finished": true}')
    follow(tmp_path, "1", tmp_path / "result", lambda *step: seen.append(step))
    assert seen == []
