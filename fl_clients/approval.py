"""How a job gets from a received contract to this institution's signature, or to a refusal (告知、授权).

    receive   the coordinator's signature, this institution's name, role and key are checked       -> notified
    approve   contract still valid, no objection of the policy, an approver's signed decision      -> authorised, signed
    refuse    an approver's signed decision with a reason; also of a job that was authorised       -> refused
    complete  everyone's signatures are there                                                      kept; may be run
Guarantee: the institution's identity signs a contract only after an approver's signature over this very contract, or
the policy's own automatic rule, was verified and is in the audit log on disk; the log comes before the job book, so a
crash between leaves less allowed than logged, never more. The policy's limits bind approvers too.
"""

from fl_clients.contract import COORDINATOR, Contract, SignedContract
from fl_clients.decision import Decision
from fl_clients.institution import Institution
from fl_clients.job_book import JobEntry, JobState, check_valid
from fl_clients.people import POLICY_ITSELF
from fl_clients.policy import Objection, asked_epsilon, is_automatic, objections
from fl_clients.rules import Rules
from privacy.audit_format import Entry
from privacy.errors import Refused


def receive(institution: Institution, rules: Rules, signed: SignedContract, spent_epsilon: float) -> JobEntry:
    """Enter a contract; the same one again changes nothing, with everyone's signatures it is completed.

    Where the policy approves by itself, it is authorised and signed. `Refused`: not signed by the coordinator, or this
    institution is not in it under its own name, role and key.
    """
    contract = signed.contract
    _check_party(institution, signed)
    known = _known(institution, contract)
    if known is None:
        check_valid_to_come(institution, contract)
        institution.log.append([_contract_entry(signed), _state_entry(contract, "", JobState.NOTIFIED)])
        known = institution.jobs.receive(signed, institution.clock())
    elif known.contract.hash != contract.hash:
        institution.jobs.receive(signed, institution.clock())  # refuses: a changed contract is a new job
    if known.state is JobState.NOTIFIED and is_automatic(rules.policy, contract, institution.name, spent_epsilon):
        _authorise(institution, rules, known, spent_epsilon, _automatic(rules, contract))
    elif set(signed.signatures) > {COORDINATOR} and known.state is not JobState.NOTIFIED:
        _complete(institution, known, signed)
    return institution.jobs.get(contract.job)


def approve(institution: Institution, rules: Rules, decision: Decision, spent_epsilon: float) -> JobEntry:
    """Authorise the job of the decision and sign its contract. `Refused` unless everything in the head above holds."""
    entry = institution.jobs.get(decision.job)
    if decision.verdict != "approve":
        raise Refused(f"{decision.person} decided to {decision.verdict} job {decision.job}, not to approve it")
    decision.check(rules.people, institution.name, entry.contract)
    _authorise(institution, rules, entry, spent_epsilon, decision.model_dump(mode="json"))
    return institution.jobs.get(decision.job)


def refuse(institution: Institution, rules: Rules, decision: Decision) -> JobEntry:
    """Refuse the job of the decision for good; one that has begun cannot be refused any more."""
    entry = institution.jobs.get(decision.job)
    if decision.verdict != "refuse":
        raise Refused(f"{decision.person} decided to {decision.verdict} job {decision.job}, not to refuse it")
    decision.check(rules.people, institution.name, entry.contract)
    if entry.state not in (JobState.NOTIFIED, JobState.AUTHORISED):
        raise Refused(f"job {decision.job} is {entry.state}; only a job that has not begun can be refused")
    institution.log.append(
        [
            Entry(kind="refusal", job=decision.job, body={"decision": decision.model_dump(mode="json")}),
            _state_entry(entry.contract, entry.state, JobState.REFUSED),
        ]
    )
    institution.jobs.refuse(entry.contract, decision.reason, institution.clock())
    return institution.jobs.get(decision.job)


def own_objections(
    institution: Institution, rules: Rules, contract: Contract, spent_epsilon: float
) -> tuple[Objection, ...]:
    """What the policy in force has against a contract."""
    return objections(rules.policy, contract, institution.name, spent_epsilon)


def spent_epsilon(institution: Institution, rules: Rules, data_set: str | None) -> float:
    """epsilon that the data set has spent at the policy's delta; without a name: of the data set that spent most."""
    names = institution.ledger.data_sets() if data_set is None else (data_set,)
    return max((institution.ledger.spent(name, rules.policy.delta).epsilon for name in names), default=0.0)


def check_valid_to_come(institution: Institution, contract: Contract) -> None:
    """`Refused` once the contract has expired; it may begin later."""
    check_valid(contract, max(institution.clock(), contract.not_before))


def _authorise(
    institution: Institution, rules: Rules, entry: JobEntry, spent_epsilon: float, decision: dict[str, object]
) -> None:
    contract = entry.contract
    if entry.state is not JobState.NOTIFIED:
        raise Refused(f"job {contract.job} is {entry.state}; only a job that waits for a decision can be approved")
    check_valid_to_come(institution, contract)
    _check_party(institution, entry.signed)
    found = own_objections(institution, rules, contract, spent_epsilon)
    if found:
        raise Refused(
            f"the policy has {len(found)} objection{'s' if len(found) > 1 else ''} to job {contract.job}: "
            + "; and ".join(str(item) for item in found)
            + ". No approver can set it aside: an admin changes the policy, or the job is refused"
        )
    signed = entry.signed.signed(institution.name, institution.identity)
    body = {
        "decision": decision,
        "epsilon_asked": _finite(asked_epsilon(rules.policy, contract)),
        "epsilon_spent": _finite(spent_epsilon),
        "signature": signed.signatures[institution.name],
    }
    institution.log.append(
        [
            Entry(kind="approval", job=contract.job, body=body),
            _state_entry(contract, entry.state, JobState.AUTHORISED),
        ]
    )
    institution.jobs.authorise(signed, institution.clock())


def _complete(institution: Institution, known: JobEntry, signed: SignedContract) -> None:
    """Keep the contract with everyone's signatures; with some of them nothing changes."""
    if set(known.signed.signatures) == set(signed.contract.signers):
        return
    if known.state is JobState.REFUSED:
        raise Refused(f"job {signed.contract.job} was refused here ({known.reason}); it stays so")
    signed.check(*signed.signatures)
    if set(signed.contract.signers) - set(signed.signatures):
        return
    signed.check_all()
    institution.log.append([_contract_entry(signed)])
    institution.jobs.sign_all(signed, institution.clock())


def _check_party(institution: Institution, signed: SignedContract) -> None:
    signed.check(COORDINATOR)
    terms = signed.contract.party(institution.name)
    if terms.identity != institution.identity.public.hex():
        raise Refused(
            f"the contract has another identity key for {institution.name!r} than this node; send the coordinator the "
            "card of this node (`xinyi-node card`)"
        )
    if terms.role != institution.role:
        raise Refused(f"the contract has {institution.name!r} as {terms.role}, this node is {institution.role}")


def _known(institution: Institution, contract: Contract) -> JobEntry | None:
    return next((entry for entry in institution.jobs.all() if entry.contract.job == contract.job), None)


def _automatic(rules: Rules, contract: Contract) -> dict[str, object]:
    limit = rules.policy.automatic.most_epsilon
    reason = f"automatic: purpose and coordinator are listed, epsilon is at most {limit}"
    return {"person": POLICY_ITSELF, "verdict": "approve", "contract": contract.hash.hex(), "reason": reason}


def _contract_entry(signed: SignedContract) -> Entry:
    contract = signed.contract
    body = {
        "contract": contract.model_dump(mode="json"),
        "hash": contract.hash.hex(),
        "signatures": dict(sorted(signed.signatures.items())),
    }
    return Entry(kind="contract", job=contract.job, body=body)


def _state_entry(contract: Contract, before: str, after: JobState) -> Entry:
    return Entry(kind="state", job=contract.job, body={"from": str(before), "to": str(after)})


def _finite(epsilon: float) -> str:
    return f"{epsilon:.6g}"
