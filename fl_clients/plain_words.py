"""A job in plain words, for the person who approves it: who asks, for what, what leaves to whom, and what leaks.

Both languages say the same things with the same figures (tests/test_plain_words.py). The texts are in words_en.py and
words_zh.py; docs/threat-model.md has the long form.
"""

from typing import Literal

from fl_clients import words_en, words_zh
from fl_clients.contract import Contract
from fl_clients.job_facts import facts_of
from fl_clients.policy import Objection, Policy

Language = Literal["en", "zh"]


def describe(
    contract: Contract, party: str, policy: Policy, spent_epsilon: float, language: Language
) -> tuple[str, ...]:
    """The job as `party` must know it, line by line. `spent_epsilon`: of its data set, at the policy's delta."""
    facts = facts_of(contract, party, policy, spent_epsilon)
    return words_zh.lines(facts) if language == "zh" else words_en.lines(facts)


def describe_objections(objections: tuple[Objection, ...], language: Language) -> tuple[str, ...]:
    """What the policy has against the job, one line each, or that it has nothing."""
    return words_zh.objections(objections) if language == "zh" else words_en.objections(objections)
