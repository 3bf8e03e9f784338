"""The privacy certificate of a run: what was promised, what was done, what each party saw, signed by everyone.

The coordinator writes the body; every vault checks what it can know (contract, roster, noise plan, encryption, its own
receipt, the heads it has witnessed) and signs its hash. `check` does the same from the file alone, for an auditor: the
epsilon is composed again from the releases, every signature verified. A certificate proves what the parties said and
agreed on; it does not prove that a party drew the noise that it signed for.
Form: canonical JSON as in `privacy.audit_format`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from fl_clients import who_sees_what
from fl_clients.contract import SignedContract
from fl_clients.roster import Announcement, Roster
from privacy.accounting import epsilon_after
from privacy.audit_format import SignedHead, canonical, parse_canonical, verify_head
from privacy.errors import Refused
from privacy.identity import SigningIdentity, fingerprint, verify

VERSION = 1
ROUNDING = 1e-6
"""Relative; other machines may round the last digits of epsilon otherwise."""

_FIELDS = {
    "version",
    "contract",
    "contract_hash",
    "use",
    "finished",
    "announcements",
    "facts",
    "receipts",
    "heads",
}
_RECEIPT = b"xinyi receipt 1"
_CERTIFICATE = b"xinyi certificate 1"

EPSILON_COVERS = (
    "Epsilon protects the banks' records: adjacency zeroes out one enterprise's v and bank fields; that it takes part "
    "is known from alignment, row counts are public."
)
OWNERS_HAVE_NONE = (
    "Owners' features have no epsilon: the forward noise is a heuristic, the final score is exact; an owner's ledger "
    "counts score openings per enterprise."
)
ASSUMES = "Parties follow the protocol and may be curious; nobody can prove here that noise was drawn as signed for."


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A party's word at the end of a run. `destroyed`: what it erased; `released`: steps by release and receiver."""

    party: str
    contract: str
    use: int
    model: str | None
    destroyed: tuple[str, ...]
    released: Mapping[str, int]
    messages: int
    bytes_in: int
    bytes_out: int
    spent: Mapping[str, Any]
    """What its ledger says after the run: of a bank epsilon, of an owner score openings."""
    time: str

    def to_json(self) -> dict[str, Any]:
        """JSON data, without signature."""
        return asdict(self) | {"destroyed": list(self.destroyed), "released": dict(self.released)}


def sign_receipt(receipt: Receipt, identity: SigningIdentity) -> dict[str, Any]:
    """The receipt as JSON data with its signature."""
    body = receipt.to_json()
    return body | {"signature": identity.sign(_RECEIPT, canonical(body)).hex()}


def check_receipt(signed: Mapping[str, Any], public: bytes) -> None:
    """`Refused` unless the holder of `public` signed it."""
    body = {name: value for name, value in signed.items() if name != "signature"}
    _verify(public, _RECEIPT, canonical(body), signed.get("signature"), f"receipt of {signed.get('party')}")


def facts(roster: Roster, participants: tuple[str, ...]) -> dict[str, Any]:
    """What follows from contract and announcements, the same at every party: keys, noise, epsilon, encryption."""
    contract, plan = roster.contract, roster.plan
    banks = len(contract.banks)
    aggregate, summed = roster.aggregate_parameters, roster.sum_parameters
    privacy: dict[str, Any] = {
        "epsilon_contract": contract.privacy.epsilon,
        "unit": contract.privacy.unit,
        "covers": EPSILON_COVERS,
        "owners": OWNERS_HAVE_NONE,
        "assumes": ASSUMES,
    }
    if plan is None:
        privacy |= {"epsilon": None, "delta": None, "releases": [], "noise": "none: sums are exact (simulation only)"}
    else:
        privacy |= {
            "epsilon": epsilon_after(plan, {}),
            "delta": plan.delta,
            "colluding_banks": contract.colluding(banks),
            "noise": f"each of {banks} banks adds a discrete Gaussian share; {contract.colluding(banks)} may subtract "
            "theirs and the rest still make std",
            "releases": [
                {
                    "name": release.name,
                    "group": release.group,
                    "times": release.count,
                    "l2_sensitivity": release.l2_sensitivity,
                    "std": plan.stds[release.name],
                    "share_std": roster.share(plan.stds[release.name], banks),
                    "rho_each": plan.rho(release.name),
                }
                for release in plan.releases
            ],
        }
    return {
        "participants": list(participants),
        "parties": {
            party.name: {
                "role": party.role,
                "identity": fingerprint(bytes.fromhex(party.identity)),
                "job_key": fingerprint(roster.announcements[party.name].public),
            }
            for party in contract.parties
        },
        "coordinator": fingerprint(bytes.fromhex(contract.coordinator_identity)),
        "privacy": privacy,
        "encryption": {
            "scheme": "BFV",
            "aggregate": {
                "degree": aggregate.degree,
                "prime_bits": list(aggregate.prime_bits),
                "log_t": aggregate.log_t,
                "security_bits": aggregate.security_bits,
                "flooding_bits": aggregate.hiding_bits,
            },
            "sum": {
                "degree": summed.degree,
                "prime_bits": list(summed.prime_bits),
                "log_t": summed.log_t,
                "security_bits": summed.security_bits,
            },
        },
        "who_saw_what": list(who_sees_what.table(contract)),
        "warnings": list(who_sees_what.warnings(contract)),
    }


def body_of(
    *,
    signed: SignedContract,
    roster: Roster,
    use: int,
    participants: tuple[str, ...],
    receipts: Mapping[str, Mapping[str, Any]],
    heads: Mapping[str, Mapping[str, Any]],
    finished: str,
) -> bytes:
    """The certificate's body, canonical JSON. `finished`: the coordinator's time (UTC text)."""
    return canonical(
        {
            "version": VERSION,
            "contract": signed.model_dump(mode="json"),
            "contract_hash": signed.contract.hash.hex(),
            "use": use,
            "finished": finished,
            "announcements": {
                name: {**asdict(announcement), "public": announcement.public.hex()}
                for name, announcement in roster.announcements.items()
            },
            "facts": facts(roster, participants),
            "receipts": {name: dict(receipt) for name, receipt in receipts.items()},
            "heads": {name: dict(head) for name, head in heads.items()},
        }
    )


@dataclass(frozen=True, kw_only=True)
class Body:
    """A parsed and checked body."""

    signed: SignedContract
    roster: Roster
    use: int
    participants: tuple[str, ...]
    receipts: Mapping[str, Mapping[str, Any]]
    heads: Mapping[str, SignedHead]
    facts: Mapping[str, Any]
    finished: str


def read_body(data: bytes) -> Body:
    """Parse a body and check everything that is signed or follows from it; `Refused` says what does not fit."""
    try:
        plain = parse_canonical(data)
        signed = SignedContract.model_validate(plain["contract"])
        contract = signed.contract
        announcements = {
            name: Announcement(**{**told, "public": bytes.fromhex(told["public"])})
            for name, told in plain["announcements"].items()
        }
        version, use, finished = plain["version"], plain["use"], str(plain["finished"])
        stated, receipts = plain["facts"], plain["receipts"]
        participants = tuple(stated["participants"])
        heads = {name: SignedHead.from_json(head) for name, head in plain["heads"].items()}
        hash_told = plain["contract_hash"]
    except ValidationError as error:
        raise Refused(f"the certificate's contract: {error.errors()[0]['msg']}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Refused("this is no body of a certificate; fields are missing or of another form") from None
    if set(plain) != _FIELDS:
        raise Refused(
            f"the certificate's body has other fields than {sorted(_FIELDS)}; nobody signs what it cannot read"
        )
    if version != VERSION:
        raise Refused(f"a certificate of version {version}, this program reads {VERSION}; update it")
    if canonical(plain["contract"]) != canonical(signed.model_dump(mode="json")):
        raise Refused("the certificate's contract is not in the form in which it was signed")
    signed.check_all()
    if set(signed.signatures) != set(contract.signers):
        raise Refused(f"the certificate's contract is signed by {sorted(signed.signatures)}, not by its parties alone")
    names = [party.name for party in contract.parties]
    if hash_told != contract.hash.hex():
        raise Refused("the certificate's contract has another hash than it states")
    if set(announcements) != set(names):
        raise Refused(
            "the certificate does not have the announcement of every party of the contract, or has strangers'"
        )
    present = [name for name in names if name in participants or not _is_bank(signed, name)]
    if set(receipts) != set(present) or set(heads) != set(present):
        raise Refused("the certificate lacks a receipt or a head of a party that took part to the end")
    roster = Roster(contract, announcements)
    try:
        derived = facts(roster, participants)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise Refused("no noise plan and no encryption follows from the certificate's announcements") from None
    _compare(stated, derived)
    for name in present:
        if (receipts[name].get("party"), receipts[name].get("contract"), receipts[name].get("use")) != (
            name,
            contract.hash.hex(),
            use,
        ):
            raise Refused(f"the receipt of {name} is of another party, contract or run")
        check_receipt(receipts[name], contract.identity_of(name))
        if heads[name].party != name:
            raise Refused(f"the head of {name} is that of {heads[name].party}")
        verify_head(contract.identity_of(name), heads[name])
    return Body(
        signed=signed,
        roster=roster,
        use=use,
        participants=participants,
        receipts=receipts,
        heads=heads,
        facts=stated,
        finished=finished,
    )


def sign_body(body: bytes, identity: SigningIdentity) -> str:
    """A party's signature of the certificate, hex."""
    return identity.sign(_CERTIFICATE, hashlib.sha256(body).digest()).hex()


def check_signature(body: bytes, public: bytes, signature: object, signer: str) -> None:
    """`Refused` unless `signer` signed this very body."""
    _verify(public, _CERTIFICATE, hashlib.sha256(body).digest(), signature, f"signature of {signer} on the certificate")


def check(certificate: Mapping[str, Any]) -> Body:
    """Verify a whole certificate ({"body": ..., "signatures": {signer: hex}}) from nothing but itself.

    `Refused` names what does not fit. The identities are those of the contract in it: compare their fingerprints with
    those you know.
    """
    if set(certificate) != {"body", "signatures"} or not isinstance(certificate["signatures"], dict):
        raise Refused("this is no certificate; it needs exactly body and signatures")
    data = canonical(certificate["body"])
    body = read_body(data)
    signers = {"coordinator", *body.receipts}
    signatures = certificate["signatures"]
    if set(signatures) != signers:
        raise Refused(f"the certificate is signed by {sorted(signatures)}, expected {sorted(signers)}")
    for signer in sorted(signers):
        check_signature(data, body.signed.contract.identity_of(signer), signatures[signer], signer)
    return body


def _is_bank(signed: SignedContract, name: str) -> bool:
    return signed.contract.party(name).role == "bank"


def _compare(stated: Any, derived: Any, where: str = "facts") -> None:
    """Every value that follows from the contract must be stated as it follows; numbers up to rounding."""
    if isinstance(derived, dict) and isinstance(stated, dict) and stated.keys() == derived.keys():
        for key, value in derived.items():
            _compare(stated[key], value, f"{where}.{key}")
    elif isinstance(derived, list) and isinstance(stated, list) and len(stated) == len(derived):
        for place, value in enumerate(derived):
            _compare(stated[place], value, f"{where}[{place}]")
    elif isinstance(derived, float) and type(stated) in (int, float):
        if not abs(stated - derived) <= ROUNDING * abs(derived):
            raise Refused(f"the certificate states {where} = {stated}, from contract and roster follows {derived}")
    elif type(stated) is not type(derived) or stated != derived:
        raise Refused(f"the certificate's {where} is not what follows from contract and roster")


def _verify(public: bytes, context: bytes, message: bytes, signature: object, what: str) -> None:
    try:
        verify(public, context, message, bytes.fromhex(str(signature)))
    except (ValueError, Refused):
        raise Refused(f"{what}: it does not fit, something was altered or another key signed") from None
