"""People and their roles, signed decisions, and rules that only an admin's key changes."""

import json
from pathlib import Path
from typing import Any

import pytest

from fl_clients import rules as in_force
from fl_clients.decision import Decision, decide
from fl_clients.institution import open_institution
from fl_clients.people import People, Person, dump_people, founded_by, load_people
from fl_clients.policy import Policy, dump_policy
from privacy.audit_log import Entry
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from tests.small_institution import NOW, PEOPLE, POLICY, House, make_contract, make_house

KEYS = {name: SigningIdentity.generate() for name in PEOPLE}
LIST = People(people=tuple(Person(name=name, role=role, key=KEYS[name].public.hex()) for name, role in PEOPLE.items()))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return make_house(tmp_path, "bank1")


def reopened(house: House) -> in_force.Rules:
    house.institution.close()
    return in_force.rules(open_institution(house.home, clock=house.clock))


# --- the list --------------------------------------------------------------------------------------------------------


def test_one_person_has_one_key_and_one_role() -> None:
    with pytest.raises(Refused, match="occurs twice"):
        LIST.added(Person(name="Li Na", role="auditor", key="ab" * 32))
    with pytest.raises(Refused, match="occurs twice"):
        LIST.added(Person(name="Li Na again", role="admin", key=KEYS["Li Na"].public.hex()))
    with pytest.raises(Refused, match="no admin"):
        LIST.removed("Wang Wei")
    with pytest.raises(Refused, match="none of this institution's people"):
        LIST.removed("Nobody")
    with pytest.raises(Refused, match="automatic approval"):
        LIST.added(Person(name="policy", role="approver", key="ab" * 32))
    with pytest.raises(Refused, match="no admin"):
        founded_by(Person(name="Li Na", role="approver", key="ab" * 32))
    with pytest.raises(Refused, match="Li Na is approver; only an admin may"):
        LIST.with_role("Li Na", "admin", "change the policy")


def test_the_list_survives_its_file() -> None:
    assert load_people(dump_people(LIST), "people.toml") == LIST
    with pytest.raises(Refused, match=r"people.toml: no TOML"):
        load_people("people", "people.toml")
    with pytest.raises(Refused, match=r"people.0.role"):
        load_people(dump_people(LIST).replace('"admin"', '"king"'), "people.toml")


# --- decisions -------------------------------------------------------------------------------------------------------

COORDINATOR = SigningIdentity.generate()
CONTRACT = make_contract(COORDINATOR, {})


def decision(person: str = "Li Na", key: str | None = None, **changes: Any) -> Decision:
    made = decide(
        CONTRACT,
        institution="bank1",
        person=person,
        key=KEYS.get(key or person, KEYS["Li Na"]),
        verdict="approve",
        reason="agreed",
        now=NOW,
    )
    return made.model_copy(update=changes)


def test_an_approvers_decision_holds_and_survives_json() -> None:
    decision().check(LIST, "bank1", CONTRACT)
    Decision.model_validate_json(decision().model_dump_json()).check(LIST, "bank1", CONTRACT)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (decision("Wang Wei"), "Wang Wei is admin; only an approver"),
        (decision("Zhao Min"), "Zhao Min is auditor; only an approver"),
        (decision(key="Wang Wei"), "not signed by the key"),
        (decision(verdict="refuse"), "not signed by the key"),
        (decision(reason="no"), "not signed by the key"),
        (decision(time=NOW.replace(hour=13)), "not signed by the key"),
        (decision(institution="bank2"), "made at 'bank2'"),
        (decision(job="00" * 16), "decided on contract"),
        (decision(contract="00" * 32), "decided on contract 0000"),
        (decision(person="Nobody"), "none of this institution's people"),
        (decision(signature="zz"), "not hexadecimal"),
        (decision(signature=""), "not signed by the key"),
    ],
)
def test_no_other_decision_holds(made: Decision, words: str) -> None:
    with pytest.raises(Refused, match=words):
        made.check(LIST, "bank1", CONTRACT)


def test_a_decision_fits_one_contract() -> None:
    with pytest.raises(Refused, match="decided on contract"):
        decision().check(LIST, "bank1", CONTRACT.model_copy(update={"uses": 2}))
    with pytest.raises(Refused, match="needs a reason"):
        decide(CONTRACT, institution="bank1", person="Li Na", key=KEYS["Li Na"], verdict="refuse", reason=" ", now=NOW)


# --- the rules in force ----------------------------------------------------------------------------------------------


def test_rules_are_what_admins_signed_and_every_change_is_logged(house: House) -> None:
    assert [person.name for person in house.rules.people.people] == list(PEOPLE)
    assert house.rules.policy == POLICY
    kinds = [entry.kind for entry in house.institution.log.entries()]
    assert kinds == ["people", "people", "people", "policy"]
    assert reopened(house).policy == POLICY


def test_without_a_policy_the_strict_default_holds(tmp_path: Path) -> None:
    rules = make_house(tmp_path, "bank1", policy=None).rules
    assert rules.policy == Policy()
    assert not rules.policy_is_set


@pytest.mark.parametrize("person", ["Li Na", "Zhao Min"])
def test_only_an_admin_changes_people_and_policy(house: House, person: str) -> None:
    before = house.log
    with pytest.raises(Refused, match="only an admin"):
        in_force.set_policy(house.institution, Policy(), person, house.keys[person])
    with pytest.raises(Refused, match="only an admin"):
        in_force.set_people(house.institution, house.rules.people.removed("Zhao Min"), person, house.keys[person])
    with pytest.raises(Refused, match="not the key"):
        in_force.set_policy(house.institution, Policy(), "Wang Wei", house.keys[person])
    me = Person(name="Me", role="admin", key=house.keys[person].public.hex())
    with pytest.raises(Refused, match="people already"):
        in_force.found(house.institution, me, house.keys[person])
    assert house.log == before


@pytest.mark.parametrize("name", ["policy.toml", "people.toml"])
def test_a_file_that_was_edited_by_hand_is_not_used(house: House, name: str) -> None:
    path = house.home / name
    text = path.read_text()
    replaced = {
        "policy.toml": ("most_epsilon_job = 4.0", "most_epsilon_job = 5.0"),
        "people.toml": ("auditor", "admin"),
    }
    old, new = replaced[name]
    assert old in text
    for edited in (text.replace(old, new), "nonsense"):
        path.write_text(edited)
        with pytest.raises(Refused, match="without an admin's signature"):
            _ = house.rules
    path.unlink()
    assert house.rules.policy == POLICY, "the log is what counts; the file is written again"
    assert path.read_text() == text


def test_a_file_left_behind_by_a_crash_is_written_again(house: House) -> None:
    old = (house.home / "policy.toml").read_bytes()
    stricter = POLICY.model_copy(update={"most_rounds": 1})
    in_force.set_policy(house.institution, stricter, "Wang Wei", house.keys["Wang Wei"])
    new = (house.home / "policy.toml").read_bytes()
    (house.home / "policy.toml").write_bytes(old)
    assert house.rules.policy == stricter
    assert (house.home / "policy.toml").read_bytes() == new


def test_a_policy_file_without_a_logged_policy_is_not_used(tmp_path: Path) -> None:
    house = make_house(tmp_path, "bank1", policy=None)
    (house.home / "policy.toml").write_text(dump_policy(POLICY))
    with pytest.raises(Refused, match="not in the audit log"):
        _ = house.rules


def forged(house: House, kind: str, signer: SigningIdentity, **changes: Any) -> dict[str, Any]:
    """The body of the last change of `kind`, as somebody with the institution's identity would alter and sign it."""
    body = dict(house.institution.log.entries(kind=kind)[-1].body) | changes
    del body["signature"]
    data = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return body | {"signature": signer.sign(b"xinyi change 1", data).hex()}


def test_a_change_in_the_log_without_an_admins_signature_stops_everything(house: House) -> None:
    """Whoever has the institution's identity can append, and still changes nothing."""
    previous = in_force._history(house.institution).last("policy")
    loose = POLICY.model_copy(update={"most_level": 4}).model_dump(mode="json")
    body = forged(house, "policy", house.keys["Li Na"], content=loose, previous=previous)
    house.institution.log.append([Entry(kind="policy", job=None, body=body)])
    with pytest.raises(Refused, match="changes policy, but"):
        _ = house.rules


def test_the_same_forgery_by_the_admin_would_have_counted(house: House) -> None:
    """So that the test above fails for the signature and nothing else."""
    previous = in_force._history(house.institution).last("policy")
    loose = POLICY.model_copy(update={"most_level": 4})
    content = loose.model_dump(mode="json")
    body = forged(house, "policy", house.keys["Wang Wei"], content=content, previous=previous)
    house.institution.log.append([Entry(kind="policy", job=None, body=body)])
    assert house.rules.policy == loose


def test_a_change_is_not_replayed_over_a_later_one(house: House) -> None:
    loose = POLICY.model_copy(update={"most_level": 4})
    in_force.set_policy(house.institution, loose, "Wang Wei", house.keys["Wang Wei"])
    old = house.institution.log.entries(kind="policy")[-1].body
    in_force.set_policy(house.institution, POLICY, "Wang Wei", house.keys["Wang Wei"])
    house.institution.log.append([Entry(kind="policy", job=None, body=dict(old))])
    # it followed a change to POLICY, and POLICY is in force again: it must not count twice all the same
    assert house.rules.policy == POLICY


def test_a_removed_admin_changes_nothing_any_more(house: House) -> None:
    second = SigningIdentity.generate()
    people = house.rules.people.added(Person(name="Sun Li", role="admin", key=second.public.hex()))
    in_force.set_people(house.institution, people, "Wang Wei", house.keys["Wang Wei"])
    in_force.set_people(house.institution, people.removed("Wang Wei"), "Sun Li", second)
    with pytest.raises(Refused, match="none of this institution's people"):
        in_force.set_policy(house.institution, Policy(), "Wang Wei", house.keys["Wang Wei"])
    assert reopened(house).people.person("Sun Li").role == "admin"


def test_of_two_admins_at_once_the_first_counts_and_the_second_is_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, first = house.institution.log, POLICY.model_copy(update={"most_rounds": 1})
    append = log.append

    def raced(entries: Any) -> Any:
        monkeypatch.setattr(log, "append", append)
        in_force.set_policy(house.institution, first, "Wang Wei", house.keys["Wang Wei"])
        return append(entries)

    monkeypatch.setattr(log, "append", raced)
    with pytest.raises(Refused, match="came first"):
        in_force.set_policy(house.institution, Policy(), "Wang Wei", house.keys["Wang Wei"])
    assert house.rules.policy == first
