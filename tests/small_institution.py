"""Institutions with homes on disk, their people, and contracts between them, for the tests of approval and commands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fl_clients import institution as institutions
from fl_clients import rules as in_force
from fl_clients.contract import COORDINATOR, Contract, Role, SignedContract
from fl_clients.institution import Institution
from fl_clients.people import Person, PersonRole
from fl_clients.policy import Policy
from privacy.identity import SigningIdentity
from tests.test_contract import document

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ROLES: Mapping[str, Role] = {"bank1": "bank", "bank2": "bank", "bank3": "bank", "pboc": "pboc", "tax": "public_credit"}
COLUMNS: Mapping[Role, tuple[str, ...]] = {
    "bank": ("requested_amount", "guarantee_mode"),
    "pboc": ("pboc_hit", "lender_cnt"),
    "public_credit": ("public_hit", "reg_capital_wan"),
}
PEOPLE: Mapping[str, PersonRole] = {"Wang Wei": "admin", "Li Na": "approver", "Zhao Min": "auditor"}

POLICY = Policy(
    purposes=("risk model",),
    scenarios={"working capital": ()},
    most_level=3,
    most_epsilon_job=4.0,
    most_epsilon_total=6.0,
    most_uses=3,
    most_days=400,
)


@dataclass
class Clock:
    """A clock that stands until it is moved."""

    now: datetime = NOW

    def __call__(self) -> datetime:
        return self.now

    def move(self, **by: float) -> None:
        self.now += timedelta(**by)


@dataclass
class House:
    """One institution, open, with its people's keys."""

    home: Path
    institution: Institution
    clock: Clock
    keys: dict[str, SigningIdentity] = field(default_factory=dict)

    @property
    def rules(self) -> in_force.Rules:
        return in_force.rules(self.institution)

    @property
    def log(self) -> bytes:
        return (self.home / "audit" / "log.jsonl").read_bytes()


def make_house(folder: Path, name: str, policy: Policy | None = POLICY) -> House:
    """A home with an admin, an approver, an auditor, and a policy."""
    clock, home = Clock(), folder / name
    institutions.create(home, name, ROLES[name])
    house = House(home, institutions.open_institution(home, clock=clock), clock)
    house.keys = {person: SigningIdentity.generate() for person in PEOPLE}
    for person, role in PEOPLE.items():
        listed = Person(name=person, role=role, key=house.keys[person].public.hex())
        if role == "admin":
            in_force.found(house.institution, listed, house.keys[person])
        else:
            people = house.rules.people.added(listed)
            in_force.set_people(house.institution, people, "Wang Wei", house.keys["Wang Wei"])
    if policy is not None:
        in_force.set_policy(house.institution, policy, "Wang Wei", house.keys["Wang Wei"])
    return house


def make_contract(coordinator: SigningIdentity, identities: Mapping[str, SigningIdentity], **changes: Any) -> Contract:
    """A deployed job of everyone in ROLES; who is not in `identities` gets a fresh key."""
    whole = document() | {"simulation": False, "uses": 1, "least_banks": 3, "job": "5f" * 16}
    whole["not_before"], whole["expires"] = "2026-06-01T00:00:00Z", "2026-08-01T00:00:00Z"
    whole["coordinator_identity"] = coordinator.public.hex()
    whole["model"] = whole["model"] | {"least_count": 20}
    whole["parties"] = [
        {
            "name": name,
            "role": role,
            "identity": identities.get(name, SigningIdentity.generate()).public.hex(),
            "columns": [{"name": column, "kind": "numeric"} for column in COLUMNS[role]],
            "most_enterprises": 5000,
        }
        for name, role in ROLES.items()
    ]
    for key, value in changes.items():
        whole[key] = whole[key] | value if isinstance(whole[key], dict) else value
    return Contract.model_validate(whole)


def offered(coordinator: SigningIdentity, contract: Contract) -> SignedContract:
    """The contract as the coordinator sends it out."""
    return SignedContract(contract=contract).signed(COORDINATOR, coordinator)
