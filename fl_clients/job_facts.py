"""What one institution must know before it approves a job, as plain values: the same for every language."""

import math
from dataclasses import dataclass
from typing import Literal

from fl_clients.contract import Contract, PartyTerms, Receiver, ReleaseName
from fl_clients.policy import Policy, asked_epsilon, openings_of, total_epsilon
from models.schema import load_schema
from privacy.identity import fingerprint

Side = Literal["bank", "owner"]

LEAVES: dict[Side, dict[ReleaseName, tuple[Receiver, ...]]] = {
    "bank": {
        "row_counts": ("coordinator", "banks", "owners"),
        "alignment": ("owners",),
        "bank_sums": ("banks",),
        "owner_sums": ("owners",),
        "score_histogram": ("coordinator", "banks"),
        "model_digest": ("coordinator",),
    },
    "owner": {
        "row_counts": ("coordinator", "banks", "owners"),
        "alignment": ("banks",),
        "directions": ("banks",),
        "scores": ("banks",),
        "model_digest": ("coordinator",),
    },
}
"""What each side of a job lets out, and to whom at most; the contract may list fewer."""

ARRIVES: dict[Side, tuple[ReleaseName, ...]] = {
    "bank": ("row_counts", "alignment", "bank_sums", "directions", "scores", "score_histogram"),
    "owner": ("row_counts", "alignment", "owner_sums"),
}


@dataclass(frozen=True, kw_only=True)
class ColumnFacts:
    """`zh`: Chinese name, empty where the schema has none. `level`: None where nobody classified it."""

    name: str
    zh: str
    kind: str
    level: int | None
    personal: bool


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """`asked`, `spent`, `after`: epsilon of all uses, before, and in all, at the institution's `delta`; may be
    infinite. `limit`: None in a simulation without one."""

    contract: Contract
    terms: PartyTerms
    side: Side
    columns: tuple[ColumnFacts, ...]
    asked: float
    spent: float
    after: float
    limit: float | None
    delta: float
    openings: int
    most_openings: int

    @property
    def left(self) -> float | None:
        """What may still be spent before this job."""
        return None if self.limit is None else max(0.0, self.limit - self.spent)

    @property
    def colluding(self) -> int:
        return self.contract.colluding(len(self.contract.banks))

    @property
    def only_owner(self) -> bool:
        return len(self.contract.owners) == 1

    def leaves(self) -> tuple[tuple[ReleaseName, tuple[Receiver, ...]], ...]:
        """What leaves this institution, to whom, as the contract lists it."""
        found = []
        for release, most in LEAVES[self.side].items():
            to = tuple(receiver for receiver in most if receiver in self.contract.receivers(release))
            if to:
                found.append((release, to))
        return tuple(found)

    def arrives(self) -> tuple[ReleaseName, ...]:
        """What this institution receives from others."""
        group: Receiver = "banks" if self.side == "bank" else "owners"
        return tuple(name for name in ARRIVES[self.side] if group in self.contract.receivers(name))


def facts_of(contract: Contract, party: str, policy: Policy, spent_epsilon: float) -> JobFacts:
    """The facts for `party`; `Refused` if it is none of the contract."""
    terms = contract.party(party)
    schema = load_schema(terms.role)
    columns = []
    for column in terms.columns:
        field = schema.field(column.name) if schema.has(column.name) else None
        columns.append(
            ColumnFacts(
                name=column.name,
                zh="" if field is None else field.zh,
                kind=column.kind,
                level=policy.level_of(terms.role, column.name),
                personal=field is not None and field.personal,
            )
        )
    return JobFacts(
        contract=contract,
        terms=terms,
        side="bank" if terms.role == "bank" else "owner",
        columns=tuple(columns),
        asked=asked_epsilon(policy, contract),
        spent=spent_epsilon,
        after=total_epsilon(policy, contract, spent_epsilon),
        limit=None if math.isinf(policy.total_limit) else policy.total_limit,
        delta=policy.delta,
        openings=openings_of(contract),
        most_openings=policy.most_score_openings,
    )


def short_fingerprint(identity: str) -> str:
    """Fingerprint of a public key (hex), in groups of four for reading aloud."""
    digits = fingerprint(bytes.fromhex(identity))
    return " ".join(digits[at : at + 4] for at in range(0, len(digits), 4))


def epsilon_text(value: float, infinite: str) -> str:
    return infinite if math.isinf(value) else f"{value:.3g}"
