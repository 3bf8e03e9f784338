"""The people of an institution: admins, approvers, auditors, each with a key of their own (三员分立).

    admin      changes people and policy         approver   approves and refuses jobs
    auditor    reads, verifies and exports the log
Guarantee: one person, one key, one role; the file lists public keys only. No role, and no command, rewrites or deletes
the log. What a person signs holds in this institution and for this one thing (context and institution are in it).
"""

import tomllib
from typing import Annotated, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privacy.errors import Refused

PersonRole = Literal["admin", "approver", "auditor"]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^\S(.*\S)?$")]

POLICY_ITSELF = "policy"
"""Stands for the policy where it approved a job by its automatic rules; no person may be named so."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Person(_Frozen):
    """`key`: the person's Ed25519 public key, hex."""

    name: Name
    role: PersonRole
    key: str = Field(pattern="^[0-9a-f]{64}$")


class People(_Frozen):
    """people.toml. Never without an admin."""

    version: Literal[1] = 1
    people: tuple[Person, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for what, values in (("name", self._names), ("key", [person.key for person in self.people])):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{what} {twice[0]} occurs twice; one person has one key and one role")
        if POLICY_ITSELF in self._names:
            raise ValueError(f"nobody may be named {POLICY_ITSELF!r}; it stands for automatic approval")
        if not any(person.role == "admin" for person in self.people):
            raise ValueError("no admin: nobody could change anything any more; keep one at least")
        return self

    @property
    def _names(self) -> list[str]:
        return [person.name for person in self.people]

    def person(self, name: str) -> Person:
        for person in self.people:
            if person.name == name:
                return person
        raise Refused(f"{name!r} is none of this institution's people; see `xinyi-node people list`")

    def with_role(self, name: str, role: PersonRole, act: str) -> Person:
        """The person, if of that role; `act` says what it is needed for."""
        person = self.person(name)
        if person.role != role:
            raise Refused(f"{name} is {person.role}; only an {role} may {act}")
        return person

    def added(self, person: Person) -> "People":
        """With one more person; `Refused` where name or key is there already."""
        return _valid((*self.people, person))

    def removed(self, name: str) -> "People":
        """Without a person; `Refused` for the last admin."""
        gone = self.person(name)
        return _valid(tuple(person for person in self.people if person != gone))


def load_people(text: str, where: str) -> People:
    """The people in a TOML text; `Refused` says what is wrong."""
    try:
        return People.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{where}: no TOML ({error})") from None
    except ValidationError as error:
        raise Refused(f"{where}: {_first(error)}") from None


def dump_people(people: People) -> str:
    """The people as TOML; the inverse of `load_people`."""
    return tomli_w.dumps(people.model_dump(mode="json"))


def founded_by(person: Person) -> People:
    """The first list: one admin."""
    return _valid((person,))


def _valid(people: tuple[Person, ...]) -> People:
    try:
        return People(people=people)
    except ValidationError as error:
        raise Refused(_first(error)) from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
