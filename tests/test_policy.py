"""The policy: what it refuses to say, each limit by itself, and when it approves without a person."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fl_clients.contract import Contract
from fl_clients.policy import (
    Automatic,
    Policy,
    asked_epsilon,
    dump_policy,
    is_automatic,
    load_policy,
    objections,
    openings_of,
    total_epsilon,
)
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from tests.small_institution import POLICY, make_contract

COORDINATOR = SigningIdentity.generate()


def contract(**changes: Any) -> Contract:
    return make_contract(COORDINATOR, {}, **changes)


def with_(**changes: Any) -> Policy:
    return Policy.model_validate(POLICY.model_dump() | changes)


def test_a_job_within_every_limit_has_no_objection() -> None:
    for party in ("bank1", "pboc", "tax"):
        assert objections(POLICY, contract(), party, 0.0) == ()


def test_the_default_policy_admits_nothing() -> None:
    whats = [objection.what for objection in objections(Policy(), contract(), "bank1", 0.0)]
    assert {"purpose", "scenario", "sensitivity", "epsilon of all uses"} <= set(whats)
    assert not is_automatic(Policy(), contract(), "bank1", 0.0)


@pytest.mark.parametrize(
    ("policy", "job", "party", "what"),
    [
        ({"purposes": ("marketing",)}, {}, "bank1", "purpose"),
        ({"scenarios": {"other": ()}}, {}, "bank1", "scenario"),
        ({"scenarios": {"working capital": ("requested_amount",)}}, {}, "bank1", "column in this scenario"),
        ({"most_level": 2}, {}, "bank1", "sensitivity; sensitivity"),
        ({"label_definitions": ("ab" * 32,)}, {}, "bank1", "label definition (SHA-256)"),
        ({"least_banks": 4}, {}, "pboc", "banks in the job; banks needed to go on (least_banks)"),
        ({}, {"least_banks": 2}, "pboc", "banks needed to go on (least_banks)"),
        ({"least_cell": 21}, {}, "pboc", "least cell (least_count)"),
        ({"least_forward_noise": 1.5}, {}, "pboc", "forward noise"),
        ({"most_rounds": 1}, {}, "bank1", "rounds"),
        ({}, {"uses": 4, "privacy": {"epsilon": 0.5}}, "bank1", "uses"),
        ({"most_days": 60}, {}, "bank1", "days of validity"),
        ({"most_retention_days": 364}, {}, "bank1", "days of retention"),
        ({"most_banks_per_enterprise": 1}, {"privacy": {"banks_per_enterprise": 2}}, "bank1", "banks per enterprise"),
        ({"delta": 1e-7}, {"privacy": {"epsilon": 1.0}}, "bank1", "delta"),
        ({"most_epsilon_job": 2.9}, {}, "bank1", "epsilon of all uses"),
        ({"most_epsilon_job": 2.9}, {}, "pboc", "epsilon of all uses"),
        ({"most_score_openings": 1}, {}, "pboc", "score openings of one enterprise"),
    ],
)
def test_each_limit_objects_by_itself(policy: dict[str, Any], job: dict[str, Any], party: str, what: str) -> None:
    found = objections(with_(**policy), contract(**job), party, 0.0)
    assert "; ".join(objection.what for objection in found) == what
    for objection in found:
        assert objection.value
        assert objection.limit
        assert objection.remedy


def test_what_is_spent_counts_for_banks_and_not_for_owners() -> None:
    assert objections(POLICY, contract(), "bank1", 3.0) == ()
    [found] = objections(POLICY, contract(), "bank1", 5.5)
    assert found.what == "epsilon in all"
    assert "5.5 already spent" in found.value
    assert objections(POLICY, contract(), "pboc", 5.5) == ()
    [infinite] = objections(POLICY, contract(), "bank1", math.inf)
    assert infinite.value.startswith("infinite")


def test_limits_are_inclusive() -> None:
    job = contract()
    tight = with_(
        least_cell=20,
        most_rounds=2,
        most_uses=1,
        most_days=61,
        most_retention_days=365,
        most_epsilon_job=3.0,
        most_score_openings=openings_of(job),
    )
    assert objections(tight, job, "bank1", 0.0) == ()
    assert objections(tight, job, "pboc", 0.0) == ()


def test_simulations_and_deployed_jobs_need_policies_of_their_own() -> None:
    simulated = contract(simulation=True)
    [found] = objections(POLICY, simulated, "bank1", 0.0)
    assert (found.what, found.value) == ("kind of job", "a simulation")
    loose = with_(simulation=True, most_epsilon_job="none", most_epsilon_total="none")
    assert objections(loose, contract(simulation=True, privacy={"epsilon": None}), "bank1", math.inf) == ()
    assert [one.what for one in objections(loose, contract(), "bank1", 0.0)] == ["kind of job"]
    with pytest.raises(Refused, match="simulations only"):
        _ = loose.budget
    exact = objections(with_(simulation=True), contract(simulation=True, privacy={"epsilon": None}), "bank1", 0.0)
    assert {one.what for one in exact} == {"epsilon of all uses", "epsilon in all"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"most_epsilon_job": "none"}, "no epsilon limit"),
        ({"most_epsilon_total": "none"}, "no epsilon limit"),
        ({"most_epsilon_job": 11.0, "most_epsilon_total": 20.0}, "at most 10"),
        ({"most_epsilon_job": 4.0, "most_epsilon_total": 3.0}, "above most_epsilon_total"),
        ({"most_epsilon_job": float("inf")}, "finite"),
        ({"least_forward_noise": 0.5}, "at least 1"),
        ({"delta": 0.01}, "delta"),
        ({"most_level": 5}, "most_level"),
        ({"levels": {"x": 0}}, "levels"),
        ({"label_definitions": ["90 days"]}, "label_definitions"),
        ({"unknown_key": 1}, "unknown_key"),
        ({"automatic": {"purposes": ["risk model"]}}, "all three"),
        (
            {"automatic": {"purposes": ["other"], "coordinators": ["c0" * 32], "most_epsilon": 1.0}},
            "not allowed ones: other",
        ),
    ],
)
def test_a_policy_that_says_too_little_or_too_much_cannot_be_made(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        with_(**values)


def test_levels_come_from_the_schema_and_may_only_be_raised() -> None:
    assert POLICY.level_of("bank", "requested_amount") == 3
    assert with_(levels={"requested_amount": 4}).level_of("bank", "requested_amount") == 4
    assert with_(levels={"requested_amount": 1}).level_of("bank", "requested_amount") == 3
    assert POLICY.level_of("bank", "own_invention") is None
    assert with_(levels={"own_invention": 2}).level_of("bank", "own_invention") == 2


def test_a_column_outside_the_schema_needs_a_level() -> None:
    job = contract()
    parties = [
        party
        if party.name != "pboc"
        else party.model_copy(update={"columns": (party.columns[0].model_copy(update={"name": "own_invention"}),)})
        for party in job.parties
    ]
    odd = job.model_copy(update={"parties": tuple(parties)})
    [found] = objections(POLICY, odd, "pboc", 0.0)
    assert (found.what, found.value) == ("column without a level", "own_invention")
    assert objections(with_(levels={"own_invention": 3}), odd, "pboc", 0.0) == ()
    assert objections(POLICY, odd, "tax", 0.0) == (), "the columns of others are their business"
    with pytest.raises(Refused, match="no party"):
        objections(POLICY, odd, "stranger", 0.0)


AUTOMATIC = Automatic(purposes=("risk model",), coordinators=(COORDINATOR.public.hex(),), most_epsilon=3.0)


def test_automatic_approval_needs_purpose_coordinator_epsilon_and_no_objection() -> None:
    policy = with_(automatic=AUTOMATIC.model_dump())
    assert is_automatic(policy, contract(), "bank1", 0.0)
    assert not is_automatic(POLICY, contract(), "bank1", 0.0)
    assert not is_automatic(policy, make_contract(SigningIdentity.generate(), {}), "bank1", 0.0)
    assert not is_automatic(policy, contract(privacy={"epsilon": 3.1}), "bank1", 0.0)
    assert not is_automatic(policy, contract(uses=2), "bank1", 0.0), "two uses cost more than the rule allows"
    assert not is_automatic(policy, contract(), "bank1", 5.5)
    other = with_(purposes=("risk model", "marketing"), automatic=AUTOMATIC.model_dump())
    assert not is_automatic(other, contract(purpose="marketing"), "bank1", 0.0)


def test_a_policy_survives_its_file() -> None:
    full = with_(levels={"a b": 2}, automatic=AUTOMATIC.model_dump(), label_definitions=("ab" * 32,))
    assert load_policy(dump_policy(full), "policy.toml") == full
    loose = with_(simulation=True, most_epsilon_job="none", most_epsilon_total="none")
    assert load_policy(dump_policy(loose), "policy.toml") == loose
    assert load_policy("", "policy.toml") == Policy()
    with pytest.raises(Refused, match=r"policy.toml: most_rounds"):
        load_policy('most_rounds = "many"', "policy.toml")
    with pytest.raises(Refused, match="no TOML"):
        load_policy("most_rounds 3", "policy.toml")


@settings(derandomize=True, deadline=None, max_examples=10)
@given(st.floats(0.1, 4.0), st.integers(1, 3), st.floats(0.0, 5.0))
def test_epsilon_composes_below_the_sum_and_above_each_part(epsilon: float, uses: int, spent: float) -> None:
    job = contract(privacy={"epsilon": epsilon}, uses=uses)
    asked = asked_epsilon(POLICY, job)
    assert epsilon * (1 - 1e-6) <= asked <= epsilon * uses * (1 + 1e-6)
    total = total_epsilon(POLICY, job, spent)
    assert max(asked, spent) * (1 - 1e-6) <= total <= (asked + spent) * (1 + 1e-6)


def test_the_reference_has_every_key_with_its_default() -> None:
    text = (Path(__file__).parents[1] / "docs/governance.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert set(rows) == set(Policy.model_fields)
    empty = {"()": "none", "{}": "none", "False": "false"}
    for key, shown in rows.items():
        if key != "automatic":
            default = str(getattr(Policy(), key))
            assert shown == empty.get(default, default), key
