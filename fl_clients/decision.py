"""A person's decision on a job: approve or refuse, with the reason, signed by the approver's own key.

Guarantee: a decision that `check` accepts was made by an approver of this institution, about exactly this contract, and
nobody altered it. Against: the institution's software and administrators approving in somebody's name, a decision used
for another job, contract or institution. Source: Ed25519 (privacy/identity.py) over canonical JSON.
"""

import json
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fl_clients.contract import Contract, Moment
from fl_clients.people import People
from privacy.errors import Refused
from privacy.identity import SigningIdentity, verify

_CONTEXT = b"xinyi decision 1"

Verdict = Literal["approve", "refuse"]


class Decision(BaseModel):
    """`contract`: its hash, hex. `signature`: hex, over everything else; empty until signed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    institution: str
    job: str
    contract: str = Field(pattern="^[0-9a-f]{64}$")
    verdict: Verdict
    person: str
    reason: str = Field(max_length=2000)
    time: Moment
    signature: str = ""

    def check(self, people: People, institution: str, contract: Contract) -> None:
        """`Refused` unless an approver of `institution` decided this about `contract`."""
        person = people.with_role(self.person, "approver", "decide on jobs")
        if self.institution != institution:
            raise Refused(f"this decision was made at {self.institution!r}, not at {institution!r}; decide here")
        if (self.job, self.contract) != (contract.job, contract.hash.hex()):
            raise Refused(
                f"{self.person} decided on contract {self.contract[:16]}, this is {contract.hash.hex()[:16]}; look at "
                "this one and decide again"
            )
        try:
            verify(bytes.fromhex(person.key), _CONTEXT, _signed_bytes(self), bytes.fromhex(self.signature))
        except ValueError:
            raise Refused("the signature of the decision is not hexadecimal; decide again") from None
        except Refused:
            raise Refused(
                f"the decision is not signed by the key that people.toml has for {self.person}, or was altered after"
            ) from None


def decide(
    contract: Contract,
    *,
    institution: str,
    person: str,
    key: SigningIdentity,
    verdict: Verdict,
    reason: str,
    now: datetime,
) -> Decision:
    """A signed decision. A refusal without a reason is `Refused`."""
    if verdict == "refuse" and not reason.strip():
        raise Refused("a refusal needs a reason: the coordinator and later readers of the log will ask for it")
    decision = Decision(
        institution=institution,
        job=contract.job,
        contract=contract.hash.hex(),
        verdict=verdict,
        person=person,
        reason=reason.strip(),
        time=now,
    )
    return decision.model_copy(update={"signature": key.sign(_CONTEXT, _signed_bytes(decision)).hex()})


def _signed_bytes(decision: Decision) -> bytes:
    body = decision.model_dump(mode="json", exclude={"signature"})
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
