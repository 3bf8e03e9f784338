"""From a received contract to the institution's signature, against coordinators, people and disks that misbehave."""

from pathlib import Path
from typing import Any

import pytest

from fl_clients import approval
from fl_clients import rules as in_force
from fl_clients.contract import COORDINATOR, Contract, SignedContract
from fl_clients.decision import Decision, Verdict, decide
from fl_clients.job_book import JobState
from fl_clients.policy import Automatic
from privacy.audit_log import AuditFailed
from privacy.charges import Budget, ZcdpCharge
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from tests.small_institution import NOW, POLICY, ROLES, House, make_contract, make_house, offered

COORDINATOR_KEY = SigningIdentity.generate()


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path, "bank1")


def contract_for(house: House, **changes: Any) -> Contract:
    return make_contract(COORDINATOR_KEY, {house.institution.name: house.institution.identity}, **changes)


def received(house: House, **changes: Any) -> Contract:
    contract = contract_for(house, **changes)
    entry = approval.receive(house.institution, house.rules, offered(COORDINATOR_KEY, contract), 0.0)
    assert entry.state is JobState.NOTIFIED
    return contract


def decided(house: House, contract: Contract, verdict: Verdict = "approve", person: str = "Li Na") -> Decision:
    return decide(
        contract,
        institution="bank1",
        person=person,
        key=house.keys[person],
        verdict=verdict,
        reason="as agreed",
        now=house.clock(),
    )


def refused_and_unchanged(house: House, contract: Contract, decision: Decision, words: str, spent: float = 0.0) -> None:
    """The approval is refused, nothing is signed, nothing is logged as approved."""
    before = house.log
    with pytest.raises(Refused, match=words):
        approval.approve(house.institution, house.rules, decision, spent)
    entry = house.institution.jobs.get(contract.job)
    assert entry.state is JobState.NOTIFIED
    assert set(entry.signed.signatures) == {COORDINATOR}
    assert house.log == before


def test_an_approved_job_is_signed_logged_and_kept(house: House) -> None:
    contract = received(house)
    entry = approval.approve(house.institution, house.rules, decided(house, contract), 0.5)
    assert entry.state is JobState.AUTHORISED
    entry.signed.check(COORDINATOR, "bank1")
    logged = [(item.kind, item.body) for item in house.institution.log.entries(job=contract.job)]
    assert [kind for kind, _ in logged] == ["contract", "state", "approval", "state"]
    assert logged[0][1]["hash"] == contract.hash.hex()
    assert Contract.model_validate(logged[0][1]["contract"]).hash == contract.hash
    assert logged[2][1]["decision"]["person"] == "Li Na"
    assert logged[2][1]["epsilon_spent"] == "0.5"
    Decision.model_validate(logged[2][1]["decision"]).check(house.rules.people, "bank1", contract)
    assert logged[3][1] == {"from": "notified", "to": "authorised"}


def test_a_refused_job_stays_refused(house: House) -> None:
    contract = received(house)
    entry = approval.refuse(house.institution, house.rules, decided(house, contract, "refuse"))
    assert (entry.state, entry.reason) == (JobState.REFUSED, "as agreed")
    assert house.institution.log.entries(kind="refusal")[0].body["decision"]["reason"] == "as agreed"
    with pytest.raises(Refused, match="is refused; only a job that waits"):
        approval.approve(house.institution, house.rules, decided(house, contract), 0.0)
    again = approval.receive(house.institution, house.rules, offered(COORDINATOR_KEY, contract), 0.0)
    assert again.state is JobState.REFUSED


def test_an_approved_job_may_be_refused_until_it_begins(house: House) -> None:
    first = received(house)
    approval.approve(house.institution, house.rules, decided(house, first), 0.0)
    approval.refuse(house.institution, house.rules, decided(house, first, "refuse"))
    second = received(house, job="60" * 16)
    approval.approve(house.institution, house.rules, decided(house, second), 0.0)
    house.institution.jobs.begin_use(second, 1, NOW)
    with pytest.raises(Refused, match="is collecting; only a job that has not begun"):
        approval.refuse(house.institution, house.rules, decided(house, second, "refuse"))


# --- hostile people --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("person", "words"), [("Wang Wei", "is admin; only an approver"), ("Zhao Min", "is auditor")])
def test_admins_and_auditors_decide_nothing(house: House, person: str, words: str) -> None:
    contract = received(house)
    refused_and_unchanged(house, contract, decided(house, contract, person=person), words)
    with pytest.raises(Refused, match=words):
        approval.refuse(house.institution, house.rules, decided(house, contract, "refuse", person))


def test_an_admin_with_the_approvers_name_decides_nothing(house: House) -> None:
    contract = received(house)
    made = decided(house, contract, person="Wang Wei").model_copy(update={"person": "Li Na"})
    refused_and_unchanged(house, contract, made, "not signed by the key")


def test_a_refusal_is_no_approval_and_an_altered_one_neither(house: House) -> None:
    contract = received(house)
    refusal = decided(house, contract, "refuse")
    refused_and_unchanged(house, contract, refusal, "decided to refuse")
    refused_and_unchanged(house, contract, refusal.model_copy(update={"verdict": "approve"}), "not signed by the key")
    with pytest.raises(Refused, match="decided to approve"):
        approval.refuse(house.institution, house.rules, decided(house, contract))


def test_a_decision_for_another_contract_of_the_same_job_counts_nothing(house: House) -> None:
    contract = received(house)
    milder = contract_for(house, privacy={"epsilon": 0.5})
    assert milder.job == contract.job
    refused_and_unchanged(house, contract, decided(house, milder), "decided on contract")


def test_an_approver_who_was_removed_decides_nothing(house: House) -> None:
    contract = received(house)
    made = decided(house, contract)
    people = house.rules.people.removed("Li Na")
    in_force.set_people(house.institution, people, "Wang Wei", house.keys["Wang Wei"])
    refused_and_unchanged(house, contract, made, "none of this institution's people")


def test_no_approver_sets_the_policy_aside(house: House) -> None:
    contract = received(house, purpose="marketing", privacy={"epsilon": 5.0})
    refused_and_unchanged(
        house, contract, decided(house, contract), "2 objections .*purpose.*epsilon of all uses.*No approver"
    )


def test_a_policy_that_was_tightened_after_receipt_counts(house: House) -> None:
    contract = received(house)
    stricter = POLICY.model_copy(update={"most_rounds": 1})
    in_force.set_policy(house.institution, stricter, "Wang Wei", house.keys["Wang Wei"])
    refused_and_unchanged(house, contract, decided(house, contract), "1 objection .*rounds: 2, allowed: at most 1")


def test_what_the_ledger_says_is_spent_counts(house: House) -> None:
    contract, ledger = received(house), house.institution.ledger
    assert approval.spent_epsilon(house.institution, house.rules, None) == 0
    budget = Budget(epsilon_job=9.0, epsilon_total=9.0, delta=1e-6)
    charge = ZcdpCharge(name="sums", rho=0.5, count=1)
    ledger.reserve(data_set="loans", job="ab", use=1, charges=(charge,), budget=budget, now=NOW)
    spent = approval.spent_epsilon(house.institution, house.rules, None)
    assert 4 < spent < 6
    assert approval.spent_epsilon(house.institution, house.rules, "loans") == spent
    assert approval.spent_epsilon(house.institution, house.rules, "other") == 0
    refused_and_unchanged(house, contract, decided(house, contract), "epsilon in all", spent)


# --- hostile coordinators --------------------------------------------------------------------------------------------


def not_received(house: House, signed: SignedContract, words: str) -> None:
    before = house.log
    with pytest.raises(Refused, match=words):
        approval.receive(house.institution, house.rules, signed, 0.0)
    assert house.log == before


def test_a_contract_altered_after_signing_is_not_received(house: House) -> None:
    signed = offered(COORDINATOR_KEY, contract_for(house))
    altered = SignedContract(
        contract=signed.contract.model_copy(update={"uses": 3}), signatures=dict(signed.signatures)
    )
    not_received(house, altered, "does not fit contract")
    not_received(house, SignedContract(contract=signed.contract), "lacks the signature of coordinator")
    assert house.institution.jobs.all() == ()


def test_a_contract_for_another_key_name_or_role_is_not_received(house: House) -> None:
    not_received(
        house, offered(COORDINATOR_KEY, make_contract(COORDINATOR_KEY, {})), "another identity key for 'bank1'"
    )
    impersonated = make_contract(COORDINATOR_KEY, {"bank2": house.institution.identity})
    not_received(house, offered(COORDINATOR_KEY, impersonated), "another identity key for 'bank1'")
    renamed = contract_for(house).model_dump(mode="json")
    renamed["parties"][0]["name"] = "bank9"
    not_received(house, offered(COORDINATOR_KEY, Contract.model_validate(renamed)), "no party")


def test_an_owners_home_does_not_take_part_as_a_bank(tmp_path: Path) -> None:
    owner = make_house(tmp_path, "tax")
    parties = contract_for(owner).model_dump(mode="json")["parties"]
    parties[-1]["role"] = "pboc"
    not_received(owner, offered(COORDINATOR_KEY, contract_for(owner, parties=parties)), "this node is public_credit")


def test_a_changed_contract_under_a_known_number_is_not_received(house: House) -> None:
    received(house)
    wider = contract_for(house, uses=2)
    not_received(house, offered(COORDINATOR_KEY, wider), "a changed contract is a new job")


def test_an_expired_contract_is_neither_received_nor_approved(house: House) -> None:
    contract = received(house)
    made = decided(house, contract)
    house.clock.now = contract.expires
    refused_and_unchanged(house, contract, made, "expired")
    other = contract_for(house, job="60" * 16)
    not_received(house, offered(COORDINATOR_KEY, other), "expired")


def test_a_contract_that_begins_later_can_be_approved_now(house: House) -> None:
    contract = received(house, not_before="2026-07-01T00:00:00Z")
    entry = approval.approve(house.institution, house.rules, decided(house, contract), 0.0)
    assert entry.state is JobState.AUTHORISED
    with pytest.raises(Refused, match="valid from"):
        house.institution.jobs.begin_use(contract, 1, NOW)


def test_signatures_of_others_are_checked_before_the_job_is_complete(house: House) -> None:
    keys = {name: SigningIdentity.generate() for name in ROLES} | {"bank1": house.institution.identity}
    contract = make_contract(COORDINATOR_KEY, keys)
    approval.receive(house.institution, house.rules, offered(COORDINATOR_KEY, contract), 0.0)
    ours = approval.approve(house.institution, house.rules, decided(house, contract), 0.0).signed
    whole = ours
    for name in ROLES:
        whole = whole if name == "bank1" else whole.signed(name, keys[name])
    swapped = SignedContract(contract=contract, signatures=whole.signatures | {"pboc": whole.signatures["tax"]})
    for wrong in (swapped, SignedContract(contract=contract, signatures=ours.signatures | {"bank2": "00" * 64})):
        not_received(house, wrong, "does not fit")
    size = house.institution.log.size
    some = ours.signed("bank2", keys["bank2"])
    entry = approval.receive(house.institution, house.rules, some, 0.0)
    assert set(entry.signed.signatures) == {COORDINATOR, "bank1"}
    assert house.institution.log.size == size, "some signatures change nothing"
    entry = approval.receive(house.institution, house.rules, whole, 0.0)
    entry.signed.check_all()
    assert entry.state is JobState.AUTHORISED
    size = house.institution.log.size
    approval.receive(house.institution, house.rules, whole, 0.0)
    assert house.institution.log.size == size, "the same again changes nothing"


# --- the log comes first ---------------------------------------------------------------------------------------------


def test_without_the_log_nothing_is_received_approved_or_refused(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = received(house)
    log = house.institution.log

    def full(entries: object) -> None:
        raise AuditFailed("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(log, "append", full)
        refused_and_unchanged(house, contract, decided(house, contract), "disk full")
        with pytest.raises(AuditFailed):
            approval.refuse(house.institution, house.rules, decided(house, contract, "refuse"))
        other = offered(COORDINATOR_KEY, contract_for(house, job="60" * 16))
        with pytest.raises(AuditFailed):
            approval.receive(house.institution, house.rules, other, 0.0)
    assert [entry.contract.job for entry in house.institution.jobs.all()] == [contract.job]
    assert house.institution.jobs.get(contract.job).state is JobState.NOTIFIED


def test_a_crash_between_log_and_job_book_leaves_the_job_unapproved_and_approvable(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = received(house)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(house.institution.jobs, "authorise", killed)
        with pytest.raises(KeyboardInterrupt):
            approval.approve(house.institution, house.rules, decided(house, contract), 0.0)
    assert house.institution.jobs.get(contract.job).state is JobState.NOTIFIED
    assert len(house.institution.log.entries(kind="approval")) == 1
    entry = approval.approve(house.institution, house.rules, decided(house, contract), 0.0)
    assert entry.state is JobState.AUTHORISED


# --- automatic approval ----------------------------------------------------------------------------------------------


def test_the_policy_approves_by_itself_what_its_rule_covers_and_nothing_else(house: House) -> None:
    rule = Automatic(purposes=("risk model",), coordinators=(COORDINATOR_KEY.public.hex(),), most_epsilon=3.0)
    policy = POLICY.model_copy(update={"automatic": rule})
    in_force.set_policy(house.institution, policy, "Wang Wei", house.keys["Wang Wei"])
    contract = contract_for(house)
    entry = approval.receive(house.institution, house.rules, offered(COORDINATOR_KEY, contract), 0.0)
    assert entry.state is JobState.AUTHORISED
    entry.signed.check(COORDINATOR, "bank1")
    [logged] = house.institution.log.entries(kind="approval")
    assert logged.body["decision"]["person"] == "policy"
    dearer = contract_for(house, job="60" * 16, privacy={"epsilon": 3.5})
    entry = approval.receive(house.institution, house.rules, offered(COORDINATOR_KEY, dearer), 0.0)
    assert entry.state is JobState.NOTIFIED
    stranger = SigningIdentity.generate()
    other = make_contract(stranger, {"bank1": house.institution.identity}, job="61" * 16)
    entry = approval.receive(house.institution, house.rules, offered(stranger, other), 0.0)
    assert entry.state is JobState.NOTIFIED
