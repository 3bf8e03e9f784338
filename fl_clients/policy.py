"""An institution's policy: the limits that no job may go beyond, whoever approves it.

Guarantee: `objections` is empty only for a contract within every limit; what the file leaves out is strict (nothing is
allowed until it is named). A policy without epsilon limits exists for simulations only, and such a policy admits no
other job. Against: a coordinator that asks for too much, and an approver in a hurry.
Sensitivity: levels 1-4 of models/schema (JR/T 0197-2020, proposals); the institution may raise them, and must give one
for a column that the schema does not have. Epsilon: what is asked is composed with what is spent as zCDP at the
institution's delta, an estimate for the person who approves; the ledger composes exactly and has the last word.
"""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal, Self

import tomli_w
from dp_accounting import ZCDpEvent
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl_clients.contract import MOST_DAYS, MOST_DELTA, MOST_EPSILON, Contract, Role
from models.schema import HIGHEST_LEVEL, load_schema
from privacy.accounting import epsilon_of, rho_of
from privacy.charges import Budget
from privacy.errors import Refused

Level = Annotated[int, Field(ge=1, le=HIGHEST_LEVEL)]
Epsilon = Annotated[float, Field(gt=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Automatic(_Frozen):
    """Jobs that need no person: of these purposes, asked by these coordinators (identity keys), up to this epsilon."""

    purposes: tuple[str, ...] = ()
    coordinators: tuple[Digest, ...] = ()
    most_epsilon: float | None = Field(default=None, gt=0, le=MOST_EPSILON)


class Policy(_Frozen):
    """policy.toml. Every key has a strict default; docs/governance.md explains each."""

    version: Literal[1] = 1
    simulation: bool = False
    """Admits contracts of simulations, and no others; False: the other way round."""
    purposes: tuple[str, ...] = ()
    """Allowed purposes, as whole texts."""
    scenarios: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Allowed scenarios -> columns that may be asked for in it; no column listed: any within `most_level`."""
    most_level: Level = 2
    levels: dict[str, Level] = Field(default_factory=dict)
    """Levels of columns outside the schema, and higher levels of the schema's own."""
    label_definitions: tuple[Digest, ...] = ()
    """SHA-256 of accepted label definitions; empty: any."""
    least_banks: int = Field(default=3, ge=1)
    least_cell: int = Field(default=20, ge=1)
    """Least rows of a category before it is merged (the contract's least_count)."""
    least_forward_noise: float = Field(default=1.0, ge=0)
    most_epsilon_job: Epsilon | Literal["none"] = 1.0
    """All uses of one job together, at `delta`; "none": no limit, in a simulation only."""
    most_epsilon_total: Epsilon | Literal["none"] = 3.0
    """All jobs of a data set together."""
    delta: float = Field(default=1e-6, gt=0, le=MOST_DELTA)
    most_score_openings: int = Field(default=12, ge=1)
    """Times that the score of one enterprise may be opened, over all jobs (feature owners)."""
    most_rounds: int = Field(default=3, ge=1)
    most_uses: int = Field(default=1, ge=1)
    most_days: int = Field(default=92, ge=1, le=MOST_DAYS)
    most_retention_days: int = Field(default=366, ge=0, le=MOST_DAYS)
    most_banks_per_enterprise: int = Field(default=4, ge=1)
    automatic: Automatic = Automatic()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.simulation and "none" in (self.most_epsilon_job, self.most_epsilon_total):
            raise ValueError("no epsilon limit: outside simulation a policy must set most_epsilon_job and _total")
        if not self.simulation and self.job_limit > MOST_EPSILON:
            raise ValueError(f"most_epsilon_job={self.job_limit:g}: outside simulation at most {MOST_EPSILON:g}")
        if not self.simulation and self.least_forward_noise < 1:
            raise ValueError(f"least_forward_noise={self.least_forward_noise}: outside simulation at least 1")
        if self.job_limit > self.total_limit:
            raise ValueError(f"most_epsilon_job={self.job_limit:g} is above most_epsilon_total={self.total_limit:g}")
        automatic = self.automatic
        if automatic.purposes and not (automatic.coordinators and automatic.most_epsilon):
            raise ValueError("automatic approval needs purposes, coordinators and most_epsilon, all three")
        if beyond := sorted(set(automatic.purposes) - set(self.purposes)):
            raise ValueError(f"automatic purposes that are not allowed ones: {', '.join(beyond)}")
        return self

    @property
    def job_limit(self) -> float:
        """most_epsilon_job as a number, infinite for "none"."""
        return math.inf if self.most_epsilon_job == "none" else self.most_epsilon_job

    @property
    def total_limit(self) -> float:
        """most_epsilon_total as a number, infinite for "none"."""
        return math.inf if self.most_epsilon_total == "none" else self.most_epsilon_total

    @property
    def budget(self) -> Budget:
        """The limits as the ledger takes them. `Refused` for a policy without epsilon limits."""
        if math.isinf(self.job_limit) or math.isinf(self.total_limit):
            raise Refused("this policy has no epsilon limits: it is for simulations only")
        return Budget(epsilon_job=self.job_limit, epsilon_total=self.total_limit, delta=self.delta)

    def level_of(self, role: Role, column: str) -> int | None:
        """Sensitivity of a column of a party in that role; None where nobody classified it."""
        schema = load_schema(role)
        known = schema.field(column).level if schema.has(column) else None
        given = self.levels.get(column)
        if known is None or given is None:
            return given if known is None else known
        return max(known, given)


@dataclass(frozen=True, kw_only=True)
class Objection:
    """One limit that a contract is beyond: what it concerns, what is asked, what is allowed, what to do."""

    what: str
    value: str
    limit: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.value}, allowed: {self.limit}; {self.remedy}"


def objections(policy: Policy, contract: Contract, party: str, spent_epsilon: float) -> tuple[Objection, ...]:
    """Every limit that the contract is beyond for `party`, whose data set has spent `spent_epsilon` at policy.delta.

    `Refused` if `party` is none of the contract.
    """
    return (
        *_about_the_job(policy, contract),
        *_about_columns(policy, contract, party),
        *_about_numbers(policy, contract),
        *_about_epsilon(policy, contract, party, spent_epsilon),
    )


def is_automatic(policy: Policy, contract: Contract, party: str, spent_epsilon: float) -> bool:
    """Whether the policy itself approves: no objection, and within its automatic rules."""
    rules, epsilon = policy.automatic, contract.privacy.epsilon
    if rules.most_epsilon is None or epsilon is None:
        return False
    return (
        contract.purpose in rules.purposes
        and contract.coordinator_identity in rules.coordinators
        and asked_epsilon(policy, contract) <= rules.most_epsilon
        and not objections(policy, contract, party, spent_epsilon)
    )


def asked_epsilon(policy: Policy, contract: Contract) -> float:
    """epsilon of all uses of the job together, at the policy's delta, as zCDP; infinite without epsilon."""
    rho = _rho(policy, contract)
    return math.inf if rho is None else epsilon_of(ZCDpEvent(rho), policy.delta)


def total_epsilon(policy: Policy, contract: Contract, spent_epsilon: float) -> float:
    """What would be spent in all after every use of the job, at the policy's delta, as zCDP."""
    rho = _rho(policy, contract)
    if rho is None or math.isinf(spent_epsilon):
        return math.inf
    before = rho_of(spent_epsilon, policy.delta) if spent_epsilon > 0 else 0.0
    return epsilon_of(ZCDpEvent(before + rho), policy.delta)


def openings_of(contract: Contract) -> int:
    """How often the job may open the score of one enterprise of a feature owner: each round, at each of its banks."""
    return contract.uses * contract.model.rounds * contract.privacy.banks_per_enterprise


def load_policy(text: str, where: str) -> Policy:
    """The policy in a TOML text; `Refused` names the key that is wrong."""
    try:
        return Policy.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{where}: no TOML ({error})") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Refused(f"{where}: {place + ': ' if place else ''}{first['msg']}; see docs/governance.md") from None


def dump_policy(policy: Policy) -> str:
    """The policy as TOML; the inverse of `load_policy`."""
    return tomli_w.dumps(policy.model_dump(mode="json", exclude_none=True))


def _about_the_job(policy: Policy, contract: Contract) -> list[Objection]:
    found = []
    if contract.simulation != policy.simulation:
        kinds = ("a deployed job", "a simulation")
        limit = f"{kinds[policy.simulation]} only"
        found.append(_objection("kind of job", kinds[contract.simulation], limit, "ask for a contract of that kind"))
    if contract.purpose not in policy.purposes:
        found.append(_unlisted("purpose", contract.purpose, policy.purposes))
    if contract.scenario not in policy.scenarios:
        found.append(_unlisted("scenario", contract.scenario, tuple(policy.scenarios)))
    if policy.label_definitions and contract.label.hash not in policy.label_definitions:
        found.append(_unlisted("label definition (SHA-256)", contract.label.hash, policy.label_definitions))
    return found


def _about_columns(policy: Policy, contract: Contract, party: str) -> list[Objection]:
    terms, allowed, found = contract.party(party), policy.scenarios.get(contract.scenario, ()), []
    for column in terms.columns:
        if allowed and column.name not in allowed:
            found.append(_unlisted("column in this scenario", column.name, allowed))
        level = policy.level_of(terms.role, column.name)
        if level is None:
            remedy = "an admin gives it a level under [levels], or the coordinator leaves it out"
            found.append(_objection("column without a level", column.name, "classified columns", remedy))
        elif level > policy.most_level:
            remedy = "ask the coordinator to leave it out"
            value, limit = f"{column.name} level {level}", f"at most level {policy.most_level}"
            found.append(_objection("sensitivity", value, limit, remedy))
    return found


def _about_numbers(policy: Policy, contract: Contract) -> list[Objection]:
    days = (contract.expires - contract.not_before) / timedelta(days=1)
    floors = (
        ("banks in the job", len(contract.banks), policy.least_banks),
        ("banks needed to go on (least_banks)", contract.least_banks, policy.least_banks),
        ("least cell (least_count)", contract.model.least_count, policy.least_cell),
        ("forward noise", contract.model.forward_noise, policy.least_forward_noise),
    )
    ceilings = (
        ("rounds", contract.model.rounds, policy.most_rounds),
        ("uses", contract.uses, policy.most_uses),
        ("days of validity", days, policy.most_days),
        ("days of retention", contract.retention_days, policy.most_retention_days),
        ("banks per enterprise", contract.privacy.banks_per_enterprise, policy.most_banks_per_enterprise),
    )
    ask = "ask the coordinator for a contract with "
    low = [_objection(what, f"{v:g}", f"at least {least:g}", ask + "more") for what, v, least in floors if v < least]
    high = [_objection(what, f"{v:g}", f"at most {most:g}", ask + "fewer") for what, v, most in ceilings if v > most]
    return low + high


def _about_epsilon(policy: Policy, contract: Contract, party: str, spent_epsilon: float) -> list[Objection]:
    """Epsilon protects the banks' records; a feature owner's ledger counts score openings instead."""
    found, bank = [], contract.party(party).role == "bank"
    delta, asked, opened = contract.privacy.delta, asked_epsilon(policy, contract), openings_of(contract)
    if delta is not None and delta > policy.delta:
        found.append(_objection("delta", f"{delta:.3g}", f"at most {policy.delta:.3g}", "ask for a smaller delta"))
    if not bank and opened > policy.most_score_openings:
        limit = f"at most {policy.most_score_openings} over all jobs"
        remedy = "ask for fewer rounds, uses or banks per enterprise"
        found.append(_objection("score openings of one enterprise", f"up to {opened}", limit, remedy))
    if asked > policy.job_limit:
        remedy = "ask for a smaller epsilon or fewer uses"
        found.append(_objection("epsilon of all uses", number(asked), f"at most {policy.job_limit:g}", remedy))
    if bank and (total := total_epsilon(policy, contract, spent_epsilon)) > policy.total_limit:
        value = f"{number(total)} with the {number(spent_epsilon)} already spent"
        remedy = "what is spent never comes back: ask for less, or an admin raises the limit"
        found.append(_objection("epsilon in all", value, f"at most {policy.total_limit:g}", remedy))
    return found


def _rho(policy: Policy, contract: Contract) -> float | None:
    """zCDP of all uses together; the contract's own delta, where it has none, is taken to be the policy's."""
    privacy = contract.privacy
    return None if privacy.epsilon is None else contract.uses * rho_of(privacy.epsilon, privacy.delta or policy.delta)


def _unlisted(what: str, value: str, allowed: Sequence[str]) -> Objection:
    return _objection(
        what, repr(value), ", ".join(map(repr, allowed)) or "none yet", "an admin may add it to the policy"
    )


def _objection(what: str, value: str, limit: str, remedy: str) -> Objection:
    return Objection(what=what, value=value, limit=limit, remedy=remedy)


def number(value: float) -> str:
    """An epsilon as people read it."""
    return "infinite" if math.isinf(value) else f"{value:.4g}"
