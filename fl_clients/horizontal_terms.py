"""The terms of a horizontal job, and what travels in its messages: signed headers from the coordinator, signed replies.

Every party is given the same terms file; its hash is the job in every seal, mask, header and reply. A header names the
one step and attempt, the participants, and the sum that is handed out; the coordinator's signature makes it answerable
for the list of participants. A reply is signed by its bank over the digest of what it brings: another round's
ciphertext, or one for other participants, is refused by the coordinator before it is added.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal, Self, TypeVar

import msgpack
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privacy.errors import Refused
from privacy.identity import SigningIdentity, verify
from privacy.noise import default_colluding
from privacy.sealing import KEY_BYTES, encode_fields
from privacy.update_sum import NoiseShares, UpdatePlan, choose_update

Kind = Literal["train", "evaluate"]

_SET_UP = ("join", "key", "admit")
_END = ("close", "check")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Record = TypeVar("Record", bound=_Frozen)


class BankTerms(_Frozen):
    """A bank in the job. `identity`: its Ed25519 public key (hex)."""

    name: str = Field(min_length=1, max_length=64)
    identity: str = Field(pattern="^[0-9a-f]{64}$")


class NoiseTerms(_Frozen):
    """Distributed noise: only for one-step FedSGD, where each record's gradient is clipped to `record_l2_clip`."""

    record_l2_clip: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0)
    colluding_banks: int | None = Field(default=None, ge=1)
    """Banks that may subtract their own noise shares; None: all but two of the fewest participants."""


class CountTerms(_Frozen):
    """Integers that are summed exactly beside or without an update, e.g. a score histogram: how many, and the largest
    magnitude of one at one bank."""

    length: int = Field(ge=1, le=1 << 20)
    largest: int = Field(ge=1)


class HorizontalTerms(_Frozen):
    """The terms of one horizontal job. `hash` identifies it everywhere. Overflow is refused when terms are made."""

    version: Literal[1] = 1
    job: str = Field(pattern="^[0-9a-f]{32}$")
    purpose: str = Field(min_length=1)
    coordinator_identity: str = Field(pattern="^[0-9a-f]{64}$")
    banks: tuple[BankTerms, ...] = Field(min_length=2)
    least_banks: int = Field(ge=2)
    """Banks needed to go on when others fail; with fewer the job stops."""
    most_attempts: int = Field(default=3, ge=1, le=100)
    """Attempts of one step, the first included."""
    parameters: int = Field(ge=1)
    """Values of the shared model."""
    clip: float = Field(gt=0)
    """Largest magnitude of one value of an update; a bank refuses its own update beyond it."""
    l2_clip: float | None = Field(default=None, gt=0)
    """Updates longer than this are scaled down to it, before anything else; None: they are not."""
    largest_weight: int = Field(ge=1)
    """Most rows of a bank: the unit of the weights."""
    values_per_coefficient: Literal[1, 2, 3] = 2
    rounding_seed: int = Field(default=0, ge=0, lt=1 << 32)
    """Makes stochastic rounding the same in every run. It is public and protects nothing."""
    own_noise: bool = False
    """Each bank makes its own differentially private update (DP-SGD), with its own full claim."""
    noise: NoiseTerms | None = None
    counts: CountTerms | None = None
    """What a reply to an evaluation message brings; None: evaluation messages are refused."""
    released_metrics: tuple[str, ...] = ()
    """Names of metrics that a bank lets out in clear. Nothing else of its replies reaches the coordinator."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [bank.name for bank in self.banks]
        if len(set(names)) != len(names) or len({bank.identity for bank in self.banks}) != len(names):
            raise ValueError("two banks have the same name or identity; every bank needs its own")
        if self.least_banks > len(names):
            raise ValueError(f"least_banks={self.least_banks} of {len(names)} banks; lower it")
        if self.noise is not None and self.own_noise:
            raise ValueError("noise shares beside each bank's own noise: no such claim is proved; leave one out")
        if self.noise is not None and self.colluding >= self.least_banks:
            raise ValueError(f"colluding_banks={self.colluding} of least_banks={self.least_banks}; one must be honest")
        if self.noise is not None and self.l2_clip is not None:
            raise ValueError("l2_clip would rescale a sum of clipped gradients; with noise shares leave it out")
        self.plan("train")  # refuses what would overflow
        if self.counts is not None:
            self.plan("evaluate")
        return self

    @classmethod
    def load(cls, path: Path | str) -> "HorizontalTerms":
        """Read a terms file (JSON). Everybody's must be the same to the letter of its meaning: its hash is the job."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

    @property
    def colluding(self) -> int:
        """Banks whose noise shares do not count."""
        if self.noise is None or self.noise.colluding_banks is None:
            return default_colluding(self.least_banks)
        return self.noise.colluding_banks

    @cached_property
    def identities(self) -> dict[str, bytes]:
        return {bank.name: bytes.fromhex(bank.identity) for bank in self.banks}

    def identity(self, bank: str) -> bytes:
        """The public Ed25519 key of a bank, 32 bytes."""
        if bank not in self.identities:
            raise Refused(f"{bank!r} is no bank of job {self.job}; ask the coordinator for terms that name it")
        return self.identities[bank]

    def plan(self, kind: Kind) -> UpdatePlan:
        """How a step's integers are added: the update in training, the counts in evaluation."""
        return _update_plan(self) if kind == "train" else _counts_plan(self)

    @cached_property
    def hash(self) -> bytes:
        """SHA-256 of the canonical form, 32 bytes."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()
        return hashlib.sha256(b"xinyi horizontal terms 1\x00" + canonical).digest()

    def rounding_key(self, bank: str, step: str) -> bytes:
        """The public key of a bank's stochastic rounding in one step, 32 bytes; the same in every attempt and run."""
        fields = [b"xinyi rounding 1", str(self.rounding_seed).encode(), bank.encode(), step.encode()]
        return hashlib.sha256(encode_fields(fields)).digest()


def _update_plan(terms: HorizontalTerms) -> UpdatePlan:
    noise = None
    if terms.noise is not None:
        noise = NoiseShares(
            record_l2_clip=terms.noise.record_l2_clip,
            noise_multiplier=terms.noise.noise_multiplier,
            colluding=terms.colluding,
            least_banks=terms.least_banks,
        )
    return choose_update(
        banks=len(terms.banks),
        length=terms.parameters,
        clip=terms.clip,
        largest_weight=terms.largest_weight,
        values_per_coefficient=terms.values_per_coefficient,
        noise=noise,
    )


def _counts_plan(terms: HorizontalTerms) -> UpdatePlan:
    if terms.counts is None:
        raise Refused("the terms list no counts, so nothing may be summed in evaluation; agree on `counts`")
    return choose_update(
        banks=len(terms.banks),
        length=0,
        clip=terms.clip,
        largest_weight=terms.largest_weight,
        counts=terms.counts.length,
        largest_count=terms.counts.largest,
    )


def step_kind(step: str) -> Kind | None:
    """ "train.3" -> "train", "evaluate.3" -> "evaluate", a step of set-up or end -> None; anything else `Refused`."""
    kind, _, number = step.partition(".")
    if kind in ("train", "evaluate") and number.isdecimal() and number == str(int(number)):
        return "train" if kind == "train" else "evaluate"
    if step in (*_SET_UP, *_END):
        return None
    raise Refused(f"step {step!r} is none of a horizontal job; the coordinator runs another version")


def step_order(step: str) -> tuple[int, int]:
    """Sorts steps as they follow each other in a job."""
    kind = step_kind(step)
    if kind is not None:
        return int(step.partition(".")[2]), 0 if kind == "train" else 1
    return (0, _SET_UP.index(step)) if step in _SET_UP else (1 << 62, _END.index(step))


class Handed(_Frozen):
    """The encrypted sum that a message hands out: of which step, attempt and banks, and the SHA-256 of its bytes."""

    step: str
    attempt: int
    participants: tuple[str, ...]
    digest: bytes


class Header(_Frozen):
    """What the coordinator says with a message, signed by it. `proofs`: bank -> proof of key or of what it opened."""

    job: bytes
    step: str
    attempt: int = Field(ge=0)
    participants: tuple[str, ...]
    handed: Handed | None = None
    proofs: dict[str, bytes] = Field(default_factory=dict)
    mail_digest: bytes = hashlib.sha256(b"").digest()
    """SHA-256 of the mail that comes with it (roster, common key), where no sum is handed out."""


class Answer(_Frozen):
    """What a bank says with its reply, signed by it. `brings`: digest of summand or mail; `proof`: as in `Header`."""

    job: bytes
    step: str
    attempt: int
    bank: str
    participants_hash: bytes
    brings: bytes = b""
    proof: bytes = b""
    refused: str = ""


class Announcement(_Frozen):
    """A bank's X25519 key of the job, signed by its identity."""

    bank: str
    public: bytes = Field(min_length=KEY_BYTES, max_length=KEY_BYTES)
    signature: bytes


@lru_cache(maxsize=8)
def participants_hash(participants: tuple[str, ...]) -> bytes:
    """SHA-256 of the list of banks, in the order of the terms."""
    return hashlib.sha256(encode_fields(name.encode() for name in participants)).digest()


def sign_header(header: Header, identity: SigningIdentity) -> tuple[bytes, bytes]:
    """(bytes, signature)."""
    data = _encode(header)
    return data, identity.sign(b"horizontal header", data)


def read_header(data: bytes, signature: bytes, terms: HorizontalTerms) -> Header:
    """A header that the coordinator of these terms signed; else `Refused`."""
    verify(bytes.fromhex(terms.coordinator_identity), b"horizontal header", data, signature)
    header = _decode(Header, data, "header")
    if header.job != terms.hash:
        raise Refused("a message of another job or of other terms; every party must be given the same terms file")
    step_kind(header.step)
    order = {bank.name: place for place, bank in enumerate(terms.banks)}
    places = [order.get(name, -1) for name in header.participants]
    if places != sorted(set(places)) or -1 in places:
        raise Refused(f"step {header.step!r}: the participants are not banks of the terms, in their order")
    return header


def sign_answer(answer: Answer, identity: SigningIdentity) -> tuple[bytes, bytes]:
    """(bytes, signature)."""
    data = _encode(answer)
    return data, identity.sign(b"horizontal answer", data)


def read_answer(data: bytes, signature: bytes, terms: HorizontalTerms) -> Answer:
    """An answer that the bank which it names signed; else `Refused`."""
    answer = _decode(Answer, data, "answer")
    verify(terms.identity(answer.bank), b"horizontal answer", data, signature)
    if answer.job != terms.hash:
        raise Refused(f"{answer.bank} answers with other terms; every party must be given the same terms file")
    return answer


def announce(bank: str, public: bytes, terms: HorizontalTerms, identity: SigningIdentity) -> Announcement:
    """The announcement of a bank's job key."""
    signature = identity.sign(b"horizontal job key", _announced(bank, public, terms.hash))
    return Announcement(bank=bank, public=public, signature=signature)


def _announced(bank: str, public: bytes, job: bytes) -> bytes:
    return encode_fields([job, bank.encode(), public])


def encode_roster(announcements: tuple[Announcement, ...]) -> bytes:
    """The job keys of all banks that joined, in the order of the terms."""
    return bytes(msgpack.packb([[item.bank, item.public, item.signature] for item in announcements]))


def read_roster(roster: bytes, terms: HorizontalTerms) -> Mapping[str, bytes]:
    """Bank -> job key, all signatures verified; else `Refused`. In the order of the terms."""
    return _read_roster(roster, terms.hash, tuple(terms.identities.items()))


@lru_cache(maxsize=4)
def _read_roster(roster: bytes, job: bytes, identities: tuple[tuple[str, bytes], ...]) -> Mapping[str, bytes]:
    # cached: banks of one process read the same public list in every step, and 1,000 signatures take 0.1 s
    try:
        items = [Announcement(bank=bank, public=public, signature=sig) for bank, public, sig in msgpack.unpackb(roster)]
    except (ValueError, TypeError, ValidationError):
        raise Refused("the roster is malformed; the coordinator runs another version") from None
    known = dict(identities)
    names = [item.bank for item in items]
    if names != [name for name in known if name in set(names)] or len(set(names)) != len(names):
        raise Refused("the roster does not list banks of the terms once each, in their order")
    for item in items:
        verify(known[item.bank], b"horizontal job key", _announced(item.bank, item.public, job), item.signature)
    return {item.bank: item.public for item in items}


def bytes_record(payload: bytes) -> ArrayRecord:
    """Bytes as a Flower array: Flower sends arrays in chunks, byte strings in a ConfigRecord it does not."""
    return ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(payload),), stype="bytes", data=payload)})


def bytes_in(record: ConfigRecord, key: str) -> bytes:
    """A byte string of a config record; another type or none: `Refused`."""
    found = record.get(key)
    if not isinstance(found, bytes):
        raise Refused(f"a message without {key!r}; its sender runs another version, drop it")
    return found


def bytes_of(content: RecordDict) -> bytes:
    """The payload of a message; empty if it has none."""
    found = content.array_records.get("payload")
    return b"" if found is None else found["bytes"].data


def _encode(model: BaseModel) -> bytes:
    return bytes(msgpack.packb(model.model_dump()))


def _decode(model: type[Record], data: bytes, what: str) -> Record:
    try:
        return model(**msgpack.unpackb(data, use_list=False))
    except (ValueError, TypeError, ValidationError):
        raise Refused(f"a malformed {what}; its sender runs another version, drop it") from None
