"""What holds at an institution: its people and its policy, changed by signed changes only, as its audit log proves.

Each change is an entry (kind `people` or `policy`) with the whole new content, the hash of the change before, and the
signature of an admin that the list before it names; the first list is signed by the admin that it makes. The log is
what counts. The files people.toml and policy.toml are its latest contents, for reading.

Guarantee: nobody but an admin's key changes people or policy, and every change stays readable. A file that was edited
by hand is `Refused`, not used; one that lags behind by a crash is written again. Against: whoever can write the files,
and whoever holds the institution's identity but no admin's key. Not against: whoever makes the home from nothing.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import ValidationError

from fl_clients.institution import PEOPLE, POLICY, Institution
from fl_clients.people import People, Person, dump_people, founded_by, load_people
from fl_clients.policy import Policy, dump_policy, load_policy
from privacy.audit_format import Entry, utc_text
from privacy.errors import Refused
from privacy.identity import SigningIdentity, verify
from privacy.private_file import write_private

_CONTEXT = b"xinyi change 1"

Kind = Literal["people", "policy"]

Content = TypeVar("Content", People, Policy)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """People and policy in force. `policy`: the strict default, which admits nothing, until an admin sets one."""

    people: People
    policy: Policy
    policy_is_set: bool


@dataclass(frozen=True, kw_only=True)
class _History:
    """What the log says: the `changes` of each kind that count, in order."""

    people: People | None
    policy: Policy | None
    changes: dict[Kind, tuple[dict[str, Any], ...]]

    def last(self, kind: Kind) -> str:
        """Hash of the last change; empty before the first."""
        return _hash(self.changes[kind][-1]) if self.changes[kind] else ""


def rules(institution: Institution) -> Rules:
    """People and policy in force; every signature in their history is checked, and that the files say the same."""
    history = _history(institution)
    if history.people is None:
        raise Refused("this institution has no people yet; name the first admin with `xinyi-node people add`")
    all_people = [People.model_validate(change["content"]) for change in history.changes["people"]]
    all_policies = [Policy.model_validate(change["content"]) for change in history.changes["policy"]]
    _check_file(institution.home / PEOPLE, load_people, dump_people, all_people)
    _check_file(institution.home / POLICY, load_policy, dump_policy, all_policies)
    return Rules(people=history.people, policy=history.policy or Policy(), policy_is_set=history.policy is not None)


def found(institution: Institution, admin: Person, key: SigningIdentity) -> None:
    """Name the first admin, with that person's own signature. `Refused` where there are people already."""
    if _history(institution).people is not None:
        raise Refused("this institution has people already; an admin adds others (--as NAME --key FILE)")
    if admin.role != "admin":
        raise Refused(f"{admin.name} would be {admin.role}; the first person must be an admin")
    _change(institution, "people", founded_by(admin), admin, key)


def set_people(institution: Institution, people: People, by: str, key: SigningIdentity) -> None:
    """Change the list of people, signed by the admin `by`."""
    _change(institution, "people", people, _admin(institution, by, "change the list of people"), key)


def set_policy(institution: Institution, policy: Policy, by: str, key: SigningIdentity) -> None:
    """Change the policy, signed by the admin `by`."""
    _change(institution, "policy", policy, _admin(institution, by, "change the policy"), key)


def current_people(institution: Institution) -> People | None:
    """The list in force, None before the first admin; the file is not looked at."""
    return _history(institution).people


def _admin(institution: Institution, name: str, act: str) -> Person:
    people = _history(institution).people
    if people is None:
        raise Refused("this institution has no people yet; name the first admin with `xinyi-node people add`")
    return people.with_role(name, "admin", act)


def _change(
    institution: Institution, kind: Kind, content: People | Policy, admin: Person, key: SigningIdentity
) -> None:
    """Log first, then write the file: a crash between leaves a file that the next reading replaces."""
    if key.public.hex() != admin.key:
        raise Refused(f"this is not the key that the list of people has for {admin.name}; use {admin.name}'s own")
    body = {
        "version": 1,
        "institution": institution.name,
        "kind": kind,
        "content": content.model_dump(mode="json"),
        "previous": _history(institution).last(kind),
        "by": admin.name,
        "time": utc_text(institution.clock()),
    }
    body["signature"] = key.sign(_CONTEXT, _bytes(body)).hex()
    institution.log.append([Entry(kind=kind, job=None, body=body)])
    if _history(institution).last(kind) != _hash(body):
        raise Refused(f"somebody else changed {kind} at the same moment and came first; look at it and begin again")
    if isinstance(content, People):
        write_private(institution.home / PEOPLE, dump_people(content).encode())
    else:
        write_private(institution.home / POLICY, dump_policy(content).encode())


def _history(institution: Institution) -> _History:
    people: People | None = None
    policy: Policy | None = None
    changes: dict[Kind, list[dict[str, Any]]] = {"people": [], "policy": []}
    for entry in institution.log.entries():
        if entry.kind not in ("people", "policy"):
            continue
        kind = cast(Kind, entry.kind)
        try:
            body = dict(entry.body)
            content, before = body["content"], changes[kind]
            if body["kind"] != kind or body["institution"] != institution.name:
                raise Refused("it is of another institution or kind")
            if body["previous"] != (_hash(before[-1]) if before else ""):
                continue  # two admins at once: the first counts, the second was told so; or a change put in again
            if kind == "people":
                listed = People.model_validate(content)
                _check_signature(body, people or listed)
                people = listed
            else:
                if people is None:
                    raise Refused("there was no admin yet")
                _check_signature(body, people)
                policy = Policy.model_validate(content)
            before.append(body)
        except (KeyError, TypeError, ValueError, ValidationError, Refused) as error:
            why = str(error) if isinstance(error, Refused) else f"it cannot be read ({type(error).__name__})"
            raise Refused(
                f"entry {entry.index} of the audit log changes {kind}, but {why}; nothing is decided until an auditor "
                "has looked at it"
            ) from None
    return _History(people=people, policy=policy, changes={kind: tuple(items) for kind, items in changes.items()})


def _check_signature(body: dict[str, Any], people: People) -> None:
    admin = people.with_role(body["by"], "admin", "change people or policy")
    unsigned = {key: value for key, value in body.items() if key != "signature"}
    verify(bytes.fromhex(admin.key), _CONTEXT, _bytes(unsigned), bytes.fromhex(body["signature"]))


def _check_file(
    path: Path, load: Callable[[str, str], Content], dump: Callable[[Content], str], contents: Sequence[Content]
) -> None:
    """`Refused` unless the file says what the log says; one from before the last change is written again."""
    found, there = None, path.exists()
    with suppress(Refused, UnicodeDecodeError, FileNotFoundError):
        found = load(path.read_text(encoding="utf-8"), path.name)
    if contents and (found is None or found != contents[-1]):
        if there and found not in contents[-2:]:
            raise Refused(
                f"{path} was changed without an admin's signature; move it away (it is written again from the audit "
                "log), then let an admin make the change with `xinyi-node`"
            )
        write_private(path, dump(contents[-1]).encode())
    if not contents and there:
        raise Refused(f"{path} is not in the audit log; move it away and let an admin set it with `xinyi-node`")


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(_bytes(content)).hexdigest()


def _bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
