"""Vaults whose bank or owner is played by a script: real home, ledger, log and job book, and no cryptography of rows.

A whole run takes milliseconds, so tests can kill, fill disks and turn clocks at every single write of it.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from fl_clients.contract import COORDINATOR, Contract, PrivacyTerms, SignedContract
from fl_clients.institution import Clock, Institution, open_institution, system_clock
from fl_clients.protocol import Audience, Request, Step, StepKind, encode_request, schedule
from fl_clients.roster import Announcement, Roster
from fl_clients.vault import DataTerms, Openings, Outgoing, Vault
from models.scorecard import ScorecardSettings
from privacy.charges import Budget
from privacy.identity import SigningIdentity
from simulations.job import admit, make_parties
from tests.small_federation import small_federation

EPSILON = 3.0
DATA_SET = "loans"
BANK, OWNER = "bank1", "pboc"
CUSTOMERS = tuple(f"9131{number:014d}" for number in range(20))


@dataclass(frozen=True, kw_only=True)
class Template:
    """Closed homes of every party in `folder`, and the contract that all signed and authorised."""

    folder: Path
    homes: Mapping[str, str]
    signed: SignedContract
    coordinator: SigningIdentity
    identities: Mapping[str, SigningIdentity]
    roster: Roster
    data: DataTerms

    @property
    def contract(self) -> Contract:
        return self.signed.contract

    def copy(self, to: Path) -> dict[str, Path]:
        """Fresh homes of the bank and the owner that are driven."""
        found = {name: to / self.homes[name] for name in (BANK, OWNER)}
        for name, home in found.items():
            shutil.copytree(self.folder / self.homes[name], home)
        return found


def sign_all(
    contract: Contract, identities: Mapping[str, SigningIdentity], coordinator: SigningIdentity
) -> SignedContract:
    """Signed by everyone."""
    signed = SignedContract(contract=contract).signed(COORDINATOR, coordinator)
    for name, identity in identities.items():
        signed = signed.signed(name, identity)
    return signed


def altered(contract: Contract, **changes: Any) -> Contract:
    """Another contract, validated like any other."""
    return Contract.model_validate({**contract.model_dump(), **changes})


def make_template(folder: Path, **changes: Any) -> Template:
    """`changes`: fields of the contract that differ from the simulation's."""
    parties = make_parties(
        small_federation(banks=2, owners=1, enterprises=60),
        ScorecardSettings(rounds=1, max_bins_bank=6, max_bins_owner=6, forward_noise=1.0, cross_tabs=False),
        PrivacyTerms(epsilon=EPSILON),
    )
    identities = {name: institution.identity for name, institution in parties.institutions.items()}
    signed = parties.signed
    if changes:
        signed = sign_all(
            altered(parties.contract, job=os.urandom(16).hex(), **changes), identities, parties.coordinator
        )
        for institution in parties.institutions.values():
            admit(institution, signed)
    homes = {name: institution.home.name for name, institution in parties.institutions.items()}
    for institution in parties.institutions.values():
        institution.close()
    shutil.copytree(parties.folder.name, folder)
    roster = roster_of(signed.contract)
    delta = roster.delta
    return Template(
        folder=folder,
        homes=homes,
        signed=signed,
        coordinator=parties.coordinator,
        identities=identities,
        roster=roster,
        data=DataTerms(
            data_set=DATA_SET,
            budget=Budget(epsilon_job=EPSILON, epsilon_total=EPSILON, delta=delta),
            most_openings=3,
        ),
    )


def roster_of(contract: Contract) -> Roster:
    """What the parties would have announced."""
    banks = {
        bank.name: Announcement(public=os.urandom(32), list_size=8192, training_rows=4000, held_out_rows=1000)
        for bank in contract.banks
    }
    owners = {owner.name: Announcement(public=os.urandom(32), list_size=8192) for owner in contract.owners}
    return Roster(contract, {**banks, **owners})


class ScriptedRole:
    """Answers every step with random bytes, as many releases and openings as the real one."""

    def __init__(self, side: Audience, roster: Roster) -> None:
        self.side = side
        self._roster = roster
        self.performed: list[str] = []
        self.destroyed = 0
        self.breaks_in = ""

    @property
    def roster(self) -> Roster:
        return self._roster

    def perform(self, step: Step, request: Request) -> Outgoing:
        del request
        self.performed.append(step.name)
        if step.name == self.breaks_in:
            raise ZeroDivisionError("a value that must not leave")
        if step.kind is StepKind.CLOSE:
            return Outgoing(released={"model": self.model_digest()})
        openings: tuple[Openings, ...] = ()
        if self.side == "owners" and step.kind in (StepKind.DIRECTION, StepKind.SCORE):
            openings = (Openings(kind=str(step.kind), ids=CUSTOMERS, times=1),)
        return Outgoing(summand=os.urandom(40), openings=openings)

    def model_digest(self) -> str:
        return "ab" * 32

    def destroy(self) -> None:
        self.destroyed += 1


@dataclass(kw_only=True)
class Driven:
    """One opened home with its vault, and what was sent."""

    institution: Institution
    vault: Vault
    role: ScriptedRole
    sent: dict[str, bytes] = field(default_factory=dict)


def open_vault(
    template: Template,
    home: Path,
    name: str,
    *,
    clock: Clock = system_clock,
    signed: SignedContract | None = None,
    data: DataTerms | None = None,
) -> Driven:
    """The home opened, with a fresh vault, as after a restart."""
    institution = open_institution(home, clock=clock)
    signed = signed or template.signed
    roster = template.roster if signed is template.signed else Roster(signed.contract, template.roster.announcements)
    role = ScriptedRole("banks" if name == BANK else "owners", roster)
    vault = Vault(institution=institution, signed=signed, role=role, data=data or template.data)
    return Driven(institution=institution, vault=vault, role=role)


def steps(contract: Contract) -> Iterator[tuple[str, Step]]:
    """(party, step) of the bank and the owner in the order of the schedule, up to the end of the run."""
    for exchange in schedule(contract):
        for item in exchange:
            if item.step.kind is StepKind.CERTIFY:
                continue
            for name, side in ((BANK, "banks"), (OWNER, "owners")):
                if item.audience in (side, "all"):
                    yield name, item.step


def request(template: Template, step: str, *, signed: SignedContract | None = None, **fields: Any) -> bytes:
    """What the coordinator sends."""
    contract = (signed or template.signed).contract
    fields.setdefault("attempt", 0)
    fields.setdefault("participants", tuple(bank.name for bank in contract.banks))
    return encode_request(Request(job=contract.hash, step=step, **fields), template.coordinator)


def body(reply: bytes) -> dict[str, Any]:
    """The signed part of a reply."""
    plain: dict[str, Any] = msgpack.unpackb(msgpack.unpackb(reply)[1])
    return plain


def refused(reply: bytes) -> str | None:
    """The reason; None for an answer."""
    reason: str | None = body(reply)["refused"]
    return reason


def digest(reply: bytes) -> str:
    """What the audit log keeps of a reply."""
    return hashlib.sha256(msgpack.unpackb(reply)[1]).hexdigest()


def check_after(template: Template, home: Path, name: str, sent: Mapping[str, str], use: int = 1) -> None:
    """The promises of the issue: everything that was sent (step -> digest of the reply) is logged and paid for."""
    institution = open_institution(home)
    try:
        logged = [entry for entry in institution.log.entries() if entry.kind == "release"]
        assert set(sent.values()) <= {entry.body["reply"] for entry in logged}, (name, sorted(sent))
        job = template.contract.job
        if name == BANK:
            spent = institution.ledger.spent(DATA_SET, template.data.budget.delta).uses
            charges = [c for known in spent if (known.job, known.use) == (job, use) for c in known.charges]
            assert all(charged.performed <= charged.reserved for charged in charges)
            performed = {charged.charge.name: charged.performed for charged in charges}
            released: dict[str, int] = {}
            for step in sent:
                for release in Roster.released_in(step):
                    released[release] = released.get(release, 0) + 1
            for release, times in released.items():
                assert performed.get(release, 0) >= times, (release, performed)
        else:
            opened = sum(step.endswith("direction") or step == "score" for step in sent)
            assert len(institution.ledger.openings(DATA_SET).calls) >= opened
        if sent:
            assert institution.jobs.get(job).uses >= use
    finally:
        institution.close()
