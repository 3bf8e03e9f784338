"""A job in plain words: what is said follows the contract, and both languages say the same."""

import math
import re
from typing import Any

import pytest

from fl_clients import words_zh
from fl_clients.contract import RELEASES, Contract
from fl_clients.job_facts import ARRIVES, LEAVES, facts_of
from fl_clients.plain_words import describe, describe_objections
from fl_clients.policy import Policy, objections
from privacy.identity import SigningIdentity
from tests.small_institution import POLICY, make_contract

KEY = SigningIdentity.generate()
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dear": {"uses": 3, "privacy": {"epsilon": 1.5, "banks_per_enterprise": 2, "spare_attempts": 2}},
    "exact": {"simulation": True, "privacy": {"epsilon": None}},
    "two-way": {"alignment": {"one_sided": False, "bucket": 512}},
}


def contract(form: str = "plain") -> Contract:
    return make_contract(KEY, {}, **FORMS[form])


def few(banks: int, owners: int) -> Contract:
    whole = contract().model_dump(mode="json")
    whole["parties"] = [*whole["parties"][:banks], *whole["parties"][3 : 3 + owners]]
    whole["privacy"]["colluding_banks"], whole["least_banks"] = None, 1
    return Contract.model_validate(whole)


def text(job: Contract, party: str = "bank1", language: Any = "en", spent: float = 0.5) -> str:
    return "\n".join(describe(job, party, POLICY, spent, language))


FINGERPRINT = re.compile(r"[0-9a-f]{16,}|(?:[0-9a-f]{4} ){7}[0-9a-f]{4}")
NUMBERS = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")


@pytest.mark.parametrize("party", ["bank1", "pboc", "tax"])
@pytest.mark.parametrize("form", FORMS)
def test_both_languages_have_the_same_lines_and_figures(form: str, party: str) -> None:
    job = contract(form)
    english = describe(job, party, POLICY, 0.5, "en")
    chinese = describe(job, party, POLICY, 0.5, "zh")
    assert len(english) == len(chinese) > 30
    for one, other in zip(english, chinese, strict=True):
        # "where your bins have ones" has its figure in Chinese only
        figures = [sorted(NUMBERS.findall(line.replace("have ones", "have 1"))) for line in (one, other)]
        assert figures[0] == figures[1], (one, other)


@pytest.mark.parametrize("form", FORMS)
def test_the_chinese_text_is_chinese(form: str) -> None:
    for party in ("bank1", "pboc"):
        for line in describe(contract(form), party, POLICY, math.inf, "zh"):
            words = re.findall(r"[A-Za-z]{4,}", FINGERPRINT.sub("", line))
            known = {"risk", "model", "working", "capital", "days", "overdue", "epsilon", "Epsilon", "delta", "bank"}
            known |= {"pboc", "least_banks", "least", "banks", "requested", "amount", "guarantee", "mode", "lender"}
            assert set(words) <= known, line


def test_every_release_is_told_to_exactly_one_side_or_both() -> None:
    told = {release for side in LEAVES.values() for release in side}
    assert told == set(RELEASES)
    for side in LEAVES.values():
        for release, receivers in side.items():
            assert set(receivers) <= set(RELEASES[release])
    for release, receivers in RELEASES.items():
        leaving = {receiver for side in LEAVES.values() for receiver in side.get(release, ())}
        assert leaving == set(receivers), f"nobody is told that {release} goes to all of {receivers}"
        assert (release in ARRIVES["bank"]) == ("banks" in receivers)
        assert (release in ARRIVES["owner"]) == ("owners" in receivers)


def test_only_what_the_contract_lists_is_said_to_leave() -> None:
    whole = contract().model_dump(mode="json")
    whole["releases"] = [one for one in whole["releases"] if one["name"] not in ("score_histogram", "scores")]
    without = Contract.model_validate(whole)
    assert "histogram of scores by label" in text(contract())
    assert "histogram" not in text(without)
    assert "EXACT sum over all owners" in text(contract(), "pboc")
    assert "EXACT sum over all owners" not in text(without, "pboc")


def test_columns_have_names_levels_and_the_own_ones_only() -> None:
    english, chinese = text(contract()), text(contract(), language="zh")
    assert "requested_amount 申请金额 (numeric, level 3)" in english
    assert "申请金额 requested_amount（数值，级别 3）" in chinese
    assert "lender_cnt" not in english
    assert "lender_cnt" in text(contract(), "pboc")
    whole = contract().model_dump(mode="json")
    whole["parties"][3]["columns"] = [{"name": "own_invention", "kind": "numeric"}]
    assert "own_invention (numeric, NO LEVEL)" in text(Contract.model_validate(whole), "pboc")
    for bank in whole["parties"][:3]:
        bank["columns"] = [{"name": "owner_age", "kind": "numeric"}]
    personal = Contract.model_validate(whole)
    assert "PERSONAL INFORMATION" in text(personal)
    assert "separate consent" in text(personal)
    assert "单独同意" in text(personal, language="zh")
    assert "separate consent" not in text(contract())


def test_epsilon_asked_spent_and_left_for_banks_and_openings_for_owners() -> None:
    bank, owner = text(contract("dear")), text(contract("dear"), "pboc")
    assert "Epsilon asked: 1.5 in each of 3 uses" in bank
    assert "Epsilon already spent: 0.5; left: 5.5 of 6" in bank
    assert "NO EPSILON" not in bank
    assert "YOUR FEATURES HAVE NO EPSILON" in owner
    assert "up to 12 in this job, at most 12 over all jobs" in owner  # 3 uses, 2 rounds, 2 banks
    assert "Epsilon: NONE" in text(contract("exact"))
    assert "EXACT, without noise" in text(contract("exact"))
    assert "EXACT, without noise" not in text(contract())
    assert "left: 0 of 6" in text(contract(), spent=math.inf)


def test_few_parties_and_open_doors_are_named() -> None:
    assert "Two banks: each can subtract itself" in text(few(2, 2))
    assert "One bank: every sum" in text(few(1, 2))
    assert "One feature owner" in text(few(3, 1))
    for words in ("Two banks", "One bank:", "One feature owner"):
        assert words not in text(contract())
    assert "One-sided alignment" in text(contract())
    assert "One-sided alignment" not in text(contract("two-way"))
    assert "rounded up to a multiple of 512" in text(contract("two-way"))
    for party, words in (("bank1", "decryption oracle"), ("pboc", "final score is exact")):
        assert words in text(contract(), party)
    for party in ("bank1", "pboc"):
        assert "Membership" in text(contract(), party)


def test_every_objection_has_chinese_words() -> None:
    wide = make_contract(KEY, {}, uses=5, privacy={"banks_per_enterprise": 2})
    strict = Policy(
        label_definitions=("ab" * 32,), least_banks=5, least_cell=99, least_forward_noise=2.0, most_rounds=1,
        delta=1e-9, most_days=1, most_retention_days=0, most_banks_per_enterprise=1, most_score_openings=1,
        most_level=1, scenarios={"working capital": ("other",)},
    )  # fmt: skip
    whole = wide.model_dump(mode="json")
    whole["parties"][3]["columns"].append({"name": "own_invention", "kind": "numeric"})
    odd = Contract.model_validate(whole)
    found = (
        *objections(strict, odd, "bank1", math.inf),
        *objections(strict, odd, "pboc", 0.0),
        *objections(Policy(), contract("exact"), "bank1", 0.0),
    )
    assert {one.what for one in found} == set(words_zh.WHAT)
    lines = describe_objections(found, "zh")
    assert len(lines) == len(found) + 2
    for line in lines:
        plain = re.sub(r"'[^']*'|[a-z]+_[a-z_]+|epsilon|delta|SHA-256", "", line)
        assert not re.search(r"[A-Za-z]{3,}", plain), line
    assert describe_objections((), "en") == ("Your policy has no objection.",)
    assert describe_objections((), "zh") == ("本机构策略没有异议。",)
    assert str(found[0]) in describe_objections(found, "en")[1]


def test_facts_follow_the_party() -> None:
    assert facts_of(contract(), "bank1", POLICY, 0.0).side == "bank"
    assert facts_of(contract(), "tax", POLICY, 0.0).side == "owner"
    assert facts_of(contract(), "bank1", POLICY, 1.0).left == 5.0
