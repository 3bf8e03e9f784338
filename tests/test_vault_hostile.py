"""A malicious coordinator against the vault: replays, reorders, drops, edits, asks again, impersonates, shows two logs.

The vaults' books are real; where rows do not matter, bank and owner are played by a script (tests/scripted_vault.py).
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from pydantic import ValidationError

from fl_clients.bank import Bank
from fl_clients.contract import COORDINATOR, Contract, SignedContract, all_releases
from fl_clients.data import BankData, LabelledRows, OwnerData
from fl_clients.feature_owner import FeatureOwner
from fl_clients.protocol import Request, decode_request, encode_request, released_in, schedule
from fl_clients.vault import Vault
from fl_server.coordinator import JobStoppedError
from privacy.audit_format import SignedHead, countersign, sign_head
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.merkle import MerkleTree
from privacy.noise import SystemNoise
from simulations.job import Parties, admit
from tests.json_leaves import changed, leaves
from tests.scripted_vault import (
    BANK,
    DATA_SET,
    EPSILON,
    OWNER,
    Driven,
    Template,
    altered,
    make_template,
    open_vault,
    refused,
    request,
    sign_all,
    steps,
)
from tests.small_federation import Call, resigned, run_tapped, run_until, small_federation, small_parties

FEDERATION = small_federation(banks=2, owners=1, enterprises=300)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return make_template(tmp_path_factory.mktemp("hostile") / "template")


@pytest.fixture
def homes(template: Template, tmp_path: Path) -> dict[str, Path]:
    return template.copy(tmp_path / "homes")


def opened(template: Template, homes: dict[str, Path], **options: Any) -> dict[str, Driven]:
    return {name: open_vault(template, home, name, **options) for name, home in homes.items()}


def run(template: Template, driven: dict[str, Driven], **fields: Any) -> dict[str, str]:
    """Every step of a run, whatever was refused before; (party:step) -> refusal."""
    refusals = {}
    signed = next(iter(driven.values())).vault._signed
    for name, step in steps(signed.contract):
        reason = refused(driven[name].vault.handle(request(template, step.name, signed=signed, **fields)))
        if reason is not None:
            refusals[f"{name}:{step.name}"] = reason
    return refusals


def another_job(template: Template, homes: dict[str, Path], **changes: Any) -> SignedContract:
    """A further contract that everybody signed and authorised."""
    contract = altered(template.contract, job=os.urandom(16).hex(), **changes)
    signed = sign_all(contract, template.identities, template.coordinator)
    for name, home in homes.items():
        driven = open_vault(template, home, name)
        admit(driven.institution, signed)
        driven.institution.close()
    return signed


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BANK, OWNER])
def test_replays_are_answered_from_store_and_reordered_or_dropped_steps_are_refused(
    template: Template, homes: dict[str, Path], name: str
) -> None:
    """At every place of the schedule: all steps before again, all that come later too early, all of the other side."""
    driven = opened(template, homes)[name]
    own = [step.name for party, step in steps(template.contract) if party == name]
    everything = [item.step.name for exchange in schedule(template.contract) for item in exchange]
    answered: list[tuple[bytes, bytes]] = []
    for place, step in enumerate(own):
        for early in [*own[place + 1 :], *(other for other in everything if other not in own), "certify"]:
            assert "out of order" in str(refused(driven.vault.handle(request(template, early)))), (step, early)
        asked = request(template, step)
        reply = driven.vault.handle(asked)
        assert refused(reply) is None, step
        answered.append((asked, reply))
        if step == "close":
            answered = answered[-1:]
        for before, stored in answered:
            assert driven.vault.handle(before) == stored, "not one fresh bit for a replay"
    assert driven.role.performed == own, "each step was performed once"
    for before in own[:-1]:
        assert refused(driven.vault.handle(request(template, before))) is not None, "after the end nothing"
    assert driven.role.performed == own


def test_a_request_that_names_columns_is_no_request(template: Template, homes: dict[str, Path]) -> None:
    """Columns stand in the contract and nowhere else: the coordinator cannot even ask for another."""
    driven = opened(template, homes)[BANK]
    good = request(template, "join")
    plain = msgpack.unpackb(msgpack.unpackb(good)[1]) | {"columns": ["tax_number"]}
    asked = object.__new__(Request)
    for field, value in {**vars(decode_request(good, template.contract)), "columns": ["tax_number"]}.items():
        object.__setattr__(asked, field, value)
    assert plain["columns"]
    data = encode_request(asked, template.coordinator)
    assert "unknown" in str(refused(driven.vault.handle(data)))
    assert driven.role.performed == []
    assert refused(driven.vault.handle(good)) is None


# --- the contract ----------------------------------------------------------------------------------------------------


def edits(contract: Contract) -> Iterator[tuple[str, Contract]]:
    """The contract with any one value altered, a column, a party or a receiver taken away or added."""
    plain = contract.model_dump(mode="json")
    for path, value in leaves(plain):
        for other in alterations(path, value):
            try:
                yield f"{path}: {value} -> {other}", Contract.model_validate(changed(plain, path, other))
            except ValidationError:
                continue
    for number, party in enumerate(plain["parties"]):
        column = {**party["columns"][0], "name": "tax_number"}
        if party["role"] != "bank":
            yield (
                f"column for {party['name']}",
                Contract.model_validate(changed(plain, ("parties", number, "columns"), [*party["columns"], column])),
            )
    for number, release in enumerate(plain["releases"]):
        yield (
            f"without {release}",
            Contract.model_validate(
                {**plain, "releases": plain["releases"][:number] + plain["releases"][number + 1 :]}
            ),
        )


def alterations(path: tuple[Any, ...], value: Any) -> list[Any]:
    """Values of the same field that may be valid as well."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value - 1]
        case float():
            return [value * 1.5, value / 2]
        case None:
            return [1, 1e-5]
        case str() if path[-1] in ("identity", "coordinator_identity", "job"):
            return [("0" if value[0] != "0" else "1") + value[1:]]
        case str() if path[-1] in ("not_before", "expires"):
            return ["2026-01-01T00:00:00Z", "2030-01-01T00:00:00Z"]
        case str():
            return [value + "x"]
    raise AssertionError(f"no alteration of {path}")


@pytest.mark.parametrize("by_coordinator", [False, True])
def test_a_contract_edited_after_signing_opens_no_vault(
    template: Template, homes: dict[str, Path], by_coordinator: bool
) -> None:
    """Each field in turn: less noise, more columns, other receivers, longer validity; the coordinator may sign anew."""
    driven = opened(template, homes)
    contract, edited = template.contract, set()
    for what, other in edits(contract):
        assert other.hash != contract.hash, what
        signatures = dict(template.signed.signatures)
        if by_coordinator and other.coordinator_identity == contract.coordinator_identity:
            signatures[COORDINATOR] = (
                SignedContract(contract=other).signed(COORDINATOR, template.coordinator).signatures[COORDINATOR]
            )
        signed = SignedContract(contract=other, signatures=signatures)
        for party in driven.values():
            with pytest.raises(Refused):
                Vault(institution=party.institution, signed=signed, role=party.role, data=template.data)
            asked = encode_request(
                Request(job=other.hash, step="join", attempt=0, participants=("bank1", "bank2")), template.coordinator
            )
            assert "contract differs" in str(refused(party.vault.handle(asked)))
        if other.job == contract.job and by_coordinator and signatures[COORDINATOR] != template.signed.signatures:
            with pytest.raises(Refused):
                driven[BANK].institution.jobs.receive(signed, driven[BANK].institution.clock())
        edited.add(what.split(":")[0])
    words = str(edited)
    for field in ("epsilon", "delta", "colluding", "spare_attempts", "uses", "expires", "rounds", "purpose", "least"):
        assert field in words, f"the test does not alter {field}"
    assert len(edited) > 40
    assert not run(template, driven), "the honest contract still runs"


def test_an_unsigned_or_half_signed_contract_opens_no_vault(template: Template, homes: dict[str, Path]) -> None:
    driven = opened(template, homes)[BANK]
    stranger = SigningIdentity.generate()
    wrong = SignedContract(contract=altered(template.contract, coordinator_identity=stranger.public.hex()))
    good = template.signed.signatures
    assert set(good) == set(template.contract.signers)
    for signer in good:
        for other in (
            {name: signature for name, signature in good.items() if name != signer},
            {**good, signer: good[BANK if signer != BANK else OWNER]},
            {**good, signer: wrong.signed(COORDINATOR, stranger).signatures[COORDINATOR]},
            {**good, signer: "no hex"},
            {**good, signer: ""},
            {},
        ):
            with pytest.raises(Refused, match="signature"):
                Vault(
                    institution=driven.institution,
                    signed=SignedContract(contract=template.contract, signatures=other),
                    role=driven.role,
                    data=template.data,
                )


@pytest.mark.parametrize(
    ("release", "receiver"), [(terms.name, receiver) for terms in all_releases() for receiver in terms.receivers]
)
def test_a_receiver_that_the_contract_lacks_gets_nothing(
    template: Template, homes: dict[str, Path], release: str, receiver: str
) -> None:
    """Everybody signed without this receiver; the coordinator asks all the same."""
    releases = [
        replaced
        for terms in template.contract.model_dump()["releases"]
        if (
            replaced := terms
            | {"receivers": [r for r in terms["receivers"] if (terms["name"], r) != (release, receiver)]}
        )["receivers"]
    ]
    signed = another_job(template, homes, releases=releases)
    driven = opened(template, homes, signed=signed)
    refusals = run(template, driven)
    asked = [
        f"{name}:{step.name}"
        for name, step in steps(signed.contract)
        if (release, receiver) in released_in(step.kind) and name in (BANK, OWNER)
    ]
    assert asked
    for where in asked:
        name, step = where.split(":")
        assert where in refusals
        assert step not in driven[name].role.performed, "refused before the role computed anything"
    first = refusals[asked[0]]
    assert f"would release {release} to {receiver}, which the contract does not list" in first, first


def test_encryption_below_the_floor_is_refused(template: Template, homes: dict[str, Path]) -> None:
    signed = another_job(template, homes, he={"security_bits": 257, "flooding_bits": 40})
    assert "bits of security" in run(template, opened(template, homes, signed=signed))[f"{BANK}:roster"]


# --- asking again ----------------------------------------------------------------------------------------------------


def test_the_same_job_is_not_run_twice(template: Template, homes: dict[str, Path]) -> None:
    assert not run(template, opened(template, homes))
    for use, words in ((1, "was begun here already"), (2, "its contract allows 1"), (99, "its contract allows 1")):
        driven = opened(template, homes)
        refusals = run(template, driven, use=use)
        assert all(words in refusals[f"{name}:join"] for name in driven), refusals
        assert all(party.role.performed == [] for party in driven.values())


def test_a_second_job_over_the_same_data_is_charged_in_full_and_refused_when_the_budget_is_spent(
    template: Template, homes: dict[str, Path]
) -> None:
    """Differencing: a fresh contract over one customer less. The ledger does not care how little changed."""
    wide = replace(template.data, budget=replace(template.data.budget, epsilon_total=1.7 * EPSILON), most_openings=4)
    delta = wide.budget.delta

    def spent() -> float:
        driven = open_vault(template, homes[BANK], BANK)
        epsilon = driven.institution.ledger.spent(DATA_SET, delta).epsilon
        driven.institution.close()
        return epsilon

    assert not run(template, opened(template, homes, data=wide))
    once = spent()
    assert once == pytest.approx(EPSILON, rel=1e-3)
    # the narrow owner has no room for a second job
    second = another_job(template, homes)
    refusals = run(template, opened(template, homes, signed=second))
    assert "would have spent" in refusals[f"{BANK}:roster"]
    assert f"{BANK}:join" not in refusals
    assert "more than 3 times" in refusals[f"{OWNER}:score"], "two openings a job, three were allowed in all"
    assert spent() == once
    # the wide one pays for all of it: two jobs of rho each
    wider = replace(wide, most_openings=5)
    third = another_job(template, homes)
    assert set(run(template, opened(template, homes, signed=third, data=wider))) <= {f"{OWNER}:close"}
    assert 1.35 * once < spent() < 2 * once
    fourth = another_job(template, homes)
    refusals = run(template, opened(template, homes, signed=fourth, data=wider))
    assert "would have spent" in refusals[f"{BANK}:roster"]
    assert "more than 5 times" in refusals[f"{OWNER}:r1.direction"], "1 + 2 + 2 were opened"


def test_a_contract_with_more_epsilon_than_the_owner_gives_is_refused_though_all_signed(
    template: Template, homes: dict[str, Path]
) -> None:
    signed = another_job(template, homes, privacy={**template.contract.privacy.model_dump(), "epsilon": 2 * EPSILON})
    driven = opened(template, homes, signed=signed)
    refusals = run(template, driven)
    assert "would have spent" in refusals[f"{BANK}:roster"]
    assert driven[BANK].role.destroyed == 1
    assert not any(step.startswith("bins") for step in driven[BANK].role.performed)


def test_one_customer_less_in_a_whole_federation() -> None:
    """The same institutions, a new contract, real tables without one customer of bank1: the second run is refused."""
    parties = small_parties(FEDERATION, rounds=1, epsilon=EPSILON)
    run_tapped(parties)
    contract = altered(parties.contract, job=os.urandom(16).hex())
    identities = {name: institution.identity for name, institution in parties.institutions.items()}
    signed = sign_all(contract, identities, parties.coordinator)
    for institution in parties.institutions.values():
        admit(institution, signed)
    roles: dict[str, Any] = {}
    for table in FEDERATION.banks:
        last = len(table.ids) - (table.name == "bank1")

        def rows(mask: Any, table: Any = table, last: int = last) -> LabelledRows:
            keep = mask.copy()
            keep[last:] = False
            columns = {name: values[keep] for name, values in table.columns.items()}
            return LabelledRows(ids=table.ids[keep].tolist(), label=table.label[keep], columns=columns)

        data = BankData(training=rows(~table.held_out), held_out=rows(table.held_out))
        roles[table.name] = Bank(name=table.name, contract=contract, data=data, noise=SystemNoise())
    for owner in FEDERATION.owners:
        roles[owner.name] = FeatureOwner(
            name=owner.name,
            contract=contract,
            data=OwnerData(ids=owner.ids.tolist(), columns=owner.columns),
            noise=parties.forward_noise,
        )
    vaults = {
        name: Vault(institution=parties.institutions[name], signed=signed, role=role, data=parties.vaults[name]._data)
        for name, role in roles.items()
    }
    second = replace(parties, signed=signed, vaults=vaults)
    asked: list[str] = []

    def tap(party: str, data: bytes, call: Call) -> bytes:
        asked.append(decode_request(data, contract).step)
        return call(data)

    with pytest.raises(JobStoppedError, match=r"bank1 refused step roster.*would have spent"):
        run_tapped(second, tap)
    assert set(asked) == {"join", "roster"}, "not one sum was asked for"


# --- impersonation, forged heads, forks ------------------------------------------------------------------------------


def parties_of() -> Parties:
    return small_parties(FEDERATION, rounds=1, epsilon=EPSILON)


def with_head(parties: Parties, data: bytes, party: str, **changes: Any) -> bytes:
    """The request with fields of the head of `party` replaced."""
    heads = [dict(shown) for shown in decode_request(data, parties.contract).heads]
    found = next(shown for shown in heads if shown["head"]["party"] == party)
    found.update(changes)
    return resigned(parties, data, heads=tuple(heads))


@pytest.mark.parametrize("signer", ["coordinator", "bank2"])
def test_a_forged_head_is_refused_and_names_the_party(signer: str) -> None:
    parties = parties_of()
    waiting = run_until(parties, "match.1")["bank1"]
    identity = parties.coordinator if signer == "coordinator" else parties.institutions[signer].identity
    honest = parties.institutions["pboc"].log.head()
    forged = sign_head(identity, party="pboc", size=honest.size, root=os.urandom(32), time=honest.time)
    reply = parties.vaults["bank1"].handle(with_head(parties, waiting, "pboc", head=forged.to_json()))
    reason = str(refused(reply))
    assert "pboc" in reason, reason
    assert "signature" in reason, reason
    assert "other content" in str(refused(parties.vaults["bank1"].handle(waiting)))
    later = resigned(parties, waiting, step="match.2")
    assert "stopped this job" in str(refused(parties.vaults["bank1"].handle(later)))


def test_a_forged_countersignature_is_refused_and_names_the_party() -> None:
    parties = parties_of()
    waiting = run_until(parties, "bins.1")["bank1"]
    shown = next(h for h in decode_request(waiting, parties.contract).heads if "bank1" in h.get("countersigned", {}))
    head = parties.vaults["bank1"]._witness._shown[0]
    forged = {"bank1": {"size": head.size, "signature": countersign(parties.coordinator, head).hex()}}
    asked = with_head(parties, waiting, shown["head"]["party"], countersigned=forged)
    reason = str(refused(parties.vaults["bank1"].handle(asked)))
    assert f"the countersignature of {shown['head']['party']} on the log of bank1 is wrong" in reason, reason


@pytest.mark.parametrize("step", ["join", "bins.1", "r1.open", "r1.direction", "evaluate"])
def test_a_request_signed_by_a_party_is_no_request(step: str) -> None:
    """A bank that would like to be coordinator, and the reverse: a coordinator's signature under a bank's reply."""
    parties = parties_of()
    for name, data in run_until(parties, step).items():
        for other, institution in parties.institutions.items():
            asked = encode_request(decode_request(data, parties.contract), institution.identity)
            assert "signature" in str(refused(parties.vaults[name].handle(asked))), other


def test_a_coordinator_cannot_answer_for_a_bank() -> None:
    parties = parties_of()

    def tap(party: str, data: bytes, call: Call) -> bytes:
        reply = call(data)
        if party != "bank2" or decode_request(data, parties.contract).step != "bins.1":
            return reply
        version, signed_body, _, head = msgpack.unpackb(reply)
        return bytes(msgpack.packb([version, signed_body, parties.coordinator.sign(b"xinyi reply", signed_body), head]))

    with pytest.raises(JobStoppedError, match="bank2"):
        run_tapped(parties, tap)


class SecondHistory:
    """A forked log of pboc that is continued properly, with proofs, beside the real one."""

    def __init__(self, identity: SigningIdentity) -> None:
        self._identity = identity
        self._tree = MerkleTree()
        self._known: dict[int, SignedHead] = {}

    def of(self, shown: dict[str, Any]) -> dict[str, Any]:
        real, first = SignedHead.from_json(shown["head"]), shown["first"]
        if real.size not in self._known:
            while len(self._tree) < real.size:
                self._tree.append(os.urandom(32))
            self._known[real.size] = sign_head(
                self._identity, party="pboc", size=real.size, root=self._tree.root(), time=real.time
            )
        proof = self._tree.consistency(first, real.size) if first else ()
        return {**shown, "head": self._known[real.size].to_json(), "proof": [item.hex() for item in proof]}


@pytest.mark.parametrize("kept_up", [False, True])
def test_two_histories_of_one_log_are_noticed_and_name_the_party(kept_up: bool) -> None:
    """pboc and the coordinator show bank2 another log than bank1: once only, or until the end with valid proofs."""
    parties = parties_of()
    fork = SecondHistory(parties.institutions["pboc"].identity)
    shown_to_bank2: list[str] = []

    def tap(party: str, data: bytes, call: Call) -> bytes:
        asked = decode_request(data, parties.contract)
        heads = list(asked.heads)
        if party == "bank2" and (kept_up or not shown_to_bank2):
            heads = [fork.of(shown) if shown["head"]["party"] == "pboc" else shown for shown in heads]
            shown_to_bank2.extend(asked.step for shown in heads if shown["head"]["party"] == "pboc")
        if party == "pboc":  # it does not complain about countersignatures of its other log
            heads = [
                {**shown, "countersigned": {k: v for k, v in shown["countersigned"].items() if k != "pboc"}}
                if shown["head"]["party"] == "bank2"
                else shown
                for shown in heads
            ]
        return call(resigned(parties, data, heads=tuple(heads)))

    with pytest.raises(JobStoppedError) as caught:
        run_tapped(parties, tap)
    line = str(caught.value)
    assert "bank2 refused step" in line, line
    if kept_up:
        assert len(shown_to_bank2) > 3
        assert "refused step certify" in line, line
        assert "the head of pboc in the certificate is not the last one that bank2 saw" in line, line
    else:
        assert "the audit log of pboc" in line, line
        assert "does not continue the one it showed before" in line, line
