"""The protocol between coordinator and vaults: its schedule of steps and the form of its messages.

One schedule serves the coordinator, which drives it, and every vault, which refuses whatever departs from it. Steps are
grouped in exchanges: a bank that dies inside an exchange voids it, and it is run again from its first step with the
next attempt number and the survivors; an exchange whose result was opened is never run again (PROTOCOL 7, 8).

A message is MessagePack, signed by its sender's Ed25519 identity. The coordinator relays two kinds of mail between
parties: `Letter` (sealed to one party) and `Post` (signed, for all banks or all feature owners: BFV ciphertexts and
public keys, which are no secret), and adds the banks' ciphertexts of a secure sum.
"""

import hashlib
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import msgpack

from fl_clients.contract import Contract, Receiver, ReleaseName
from models.line_search import INNER_STEPS
from models.shared_bins import LEVELS
from privacy.errors import Refused
from privacy.identity import SigningIdentity, verify

Audience = Literal["banks", "owners", "all"]
PROTOCOL_VERSION = 2


class StepKind(StrEnum):
    """What a step does; the docstrings of `bank` and `feature_owner` say how."""

    JOIN = "join"
    ROSTER = "roster"
    MATCH = "match"
    PREPARE = "prepare"
    BINS = "bins"
    CROSS_TAB = "cross_tab"
    RESIDUAL = "residual"
    AGGREGATE = "aggregate"
    OPEN = "open"
    DIRECTION = "direction"
    SEARCH = "search"
    FINISH = "finish"
    SCORE = "score"
    EVALUATE = "evaluate"
    RELEASE = "release"
    CLOSE = "close"
    CERTIFY = "certify"


@dataclass(frozen=True, kw_only=True, order=True)
class Step:
    """A step of the schedule. `round_number` from 1 (0: outside the rounds); `index` counts repetitions from 1."""

    kind: StepKind
    round_number: int = 0
    index: int = 0

    @property
    def name(self) -> str:
        parts = [f"r{self.round_number}"] if self.round_number else []
        return ".".join([*parts, str(self.kind), *([str(self.index)] if self.index else [])])


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    step: Step
    audience: Audience


Exchange = tuple[Scheduled, ...]


def schedule(contract: Contract) -> tuple[Exchange, ...]:
    """Every exchange of a job, in order. With epsilon the cross-tabs are left out: one more release to pay for
    (PROTOCOL rule 3).
    """

    def single(kind: StepKind, audience: Audience, round_number: int = 0, index: int = 0) -> Exchange:
        return (Scheduled(step=Step(kind=kind, round_number=round_number, index=index), audience=audience),)

    exchanges = [single(StepKind.JOIN, "all"), single(StepKind.ROSTER, "all")]
    exchanges += [single(StepKind.MATCH, "all", index=index) for index in (1, 2, 3)]
    exchanges.append(single(StepKind.PREPARE, "owners"))
    exchanges += [single(StepKind.BINS, "banks", index=level) for level in range(1, LEVELS + 1)]
    if contract.settings.cross_tabs:
        exchanges.append(single(StepKind.CROSS_TAB, "banks"))
    for number in range(1, contract.model.rounds + 1):
        exchanges.append(
            single(StepKind.RESIDUAL, "banks", number)
            + single(StepKind.AGGREGATE, "owners", number)
            + single(StepKind.OPEN, "banks", number)
        )
        exchanges.append(single(StepKind.DIRECTION, "owners", number))
        exchanges += [single(StepKind.SEARCH, "banks", number, inner) for inner in range(1, INNER_STEPS + 1)]
    exchanges += [
        single(StepKind.FINISH, "banks"),
        single(StepKind.SCORE, "owners"),
        single(StepKind.EVALUATE, "banks"),
        single(StepKind.RELEASE, "banks"),
        single(StepKind.CLOSE, "all"),
        single(StepKind.CERTIFY, "all"),
    ]
    return tuple(exchanges)


def released_in(kind: StepKind) -> tuple[tuple[ReleaseName, Receiver], ...]:
    """What a step lets out, to whom: the contract must list each. Keys, proofs, uniform values are no release."""
    match kind:
        case StepKind.JOIN:
            return ("row_counts", "coordinator"), ("row_counts", "banks"), ("row_counts", "owners")
        case StepKind.MATCH:
            return ("alignment", "banks"), ("alignment", "owners")
        case StepKind.PREPARE:
            return (("row_counts", "banks"),)
        case StepKind.BINS | StepKind.CROSS_TAB | StepKind.SEARCH:
            return (("bank_sums", "banks"),)
        case StepKind.RESIDUAL:
            return ("bank_sums", "banks"), ("owner_sums", "owners")
        case StepKind.OPEN | StepKind.FINISH:
            return (("owner_sums", "owners"),)
        case StepKind.DIRECTION:
            return (("directions", "banks"),)
        case StepKind.SCORE:
            return (("scores", "banks"),)
        case StepKind.EVALUATE:
            return (("score_histogram", "banks"),)
        case StepKind.RELEASE:
            return (("score_histogram", "coordinator"),)
        case StepKind.CLOSE:
            return (("model_digest", "coordinator"),)
        case StepKind.ROSTER | StepKind.AGGREGATE | StepKind.CERTIFY:
            return ()


def ends_stage(step: Step) -> bool:
    """After these steps a party's signed tree head goes round: roster, alignment, each round, evaluation, the end."""
    match step.kind:
        case StepKind.ROSTER | StepKind.DIRECTION | StepKind.SCORE | StepKind.EVALUATE | StepKind.CLOSE:
            return True
        case StepKind.MATCH:
            return step.index == 3
        case StepKind.SEARCH:
            return step.index == INNER_STEPS
        case _:
            return False


@dataclass(frozen=True, kw_only=True)
class Letter:
    """Mail sealed to `receiver`. `attempt` and `participants` are the sender's, authenticated by the seal."""

    sender: str
    receiver: str
    step: str
    attempt: int
    participants: tuple[str, ...]
    sealed: bytes

    def __post_init__(self) -> None:
        _check_types((self.sender, self.receiver, self.step, *self.participants), self.attempt, (self.sealed,))


@dataclass(frozen=True, kw_only=True)
class Post:
    """Signed mail for every bank or every feature owner."""

    sender: str
    audience: Audience
    step: str
    attempt: int
    content: bytes
    signature: bytes

    def __post_init__(self) -> None:
        _check_types((self.sender, self.audience, self.step), self.attempt, (self.content, self.signature))


@dataclass(frozen=True, kw_only=True)
class Request:
    """From the coordinator to one vault."""

    job: bytes
    step: str
    attempt: int
    participants: tuple[str, ...]
    letters: tuple[Letter, ...] = ()
    posts: tuple[Post, ...] = ()
    use: int = 1
    """Which run of the contract this is, from 1."""
    summed: bytes | None = None
    """Sum of the banks' ciphertexts of the previous secure sum, for banks."""
    heads: tuple[dict[str, Any], ...] = ()
    """Heads of the other parties' audit logs that this party has not been shown yet (fl_clients/witness.py)."""
    certificate: bytes | None = None
    """In the last step: the certificate's body, for every party to check and sign."""

    def __post_init__(self) -> None:
        _check_types(
            (self.step, *self.participants), self.attempt, (self.job, self.summed or b"", self.certificate or b"")
        )
        if type(self.use) is not int or self.use < 1 or not all(isinstance(head, dict) for head in self.heads):
            raise TypeError("a use is an integer from 1, a head is a map")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """From a vault. `refused`: why it will not, in one line; then everything else is empty."""

    job: bytes
    step: str
    attempt: int
    party: str
    letters: tuple[Letter, ...] = ()
    posts: tuple[Post, ...] = ()
    summand: bytes | None = None
    """This bank's ciphertext of a secure sum."""
    released: dict[str, Any] = field(default_factory=dict)
    """What the contract lets the coordinator see: row counts, pooled metrics, receipts."""
    head: dict[str, Any] | None = None
    """At the end of a stage: the head of this party's audit log, for the others (fl_clients/witness.py)."""
    refused: str | None = None

    def __post_init__(self) -> None:
        _check_types((self.step, self.party, self.refused or ""), self.attempt, (self.job, self.summand or b""))
        if not isinstance(self.head, dict | None):
            raise TypeError("a head is a map")


def _check_types(texts: tuple[object, ...], attempt: object, blobs: tuple[object, ...]) -> None:
    """MessagePack carries any type in any field; what comes from the wire is checked before it is compared or bound."""
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(blob, bytes) for blob in blobs):
        raise TypeError("a text or byte field of a message has another type")
    if type(attempt) is not int or not 0 <= attempt < LARGEST_ATTEMPT:
        raise TypeError(f"an attempt must be an integer from 0 to {LARGEST_ATTEMPT - 1}")
    if any(isinstance(text, str) and len(text) > LONGEST_TEXT for text in texts):
        raise TypeError(f"a name or step of more than {LONGEST_TEXT} characters")


LARGEST_ATTEMPT = 1 << 20
LONGEST_TEXT = 4096
"""Characters of a name, a step or a reason."""

_REQUEST = b"xinyi request"
_REPLY = b"xinyi reply"
_POST = b"xinyi post"
_MAIL = {"letters": Letter, "posts": Post}


def _fields(message: Any) -> dict[str, Any]:
    """Dataclass to plain dict without copying byte strings (dataclasses.asdict copies every one)."""
    plain = {name: value for name, value in vars(message).items() if name != "head"}
    for name in _MAIL:
        if name in plain:
            plain[name] = [vars(mail) for mail in plain[name]]
    return plain


def _body(message: Request | Reply) -> bytes:
    return bytes(msgpack.packb(_fields(message), use_bin_type=True))


def _encode(body: bytes, context: bytes, identity: SigningIdentity, head: dict[str, Any] | None = None) -> bytes:
    return bytes(msgpack.packb([PROTOCOL_VERSION, body, identity.sign(context, _signed(body, head)), head]))


def _signed(body: bytes, head: Any) -> bytes:
    return hashlib.sha256(body).digest() + hashlib.sha256(bytes(msgpack.packb(head))).digest()


def _decode(kind: type[Any], data: bytes, context: bytes, identity: bytes, sender: str) -> Any:
    try:
        version, body, signature, head = msgpack.unpackb(data, max_bin_len=1 << 31)
        if not isinstance(body, bytes) or not isinstance(signature, bytes):
            raise TypeError("body and signature must be byte strings")
    except Exception:
        raise Refused(f"a message of {sender} is no protocol message ({len(data)} bytes); send it again") from None
    if version != PROTOCOL_VERSION:
        # whatever an unsigned message says is quoted as a number only: reasons go into logs
        shown = version if type(version) is int and 0 <= version < 1000 else "unknown"
        raise Refused(f"{sender} speaks protocol version {shown}, we speak {PROTOCOL_VERSION}; update the older one")
    verify(identity, context, _signed(body, head), signature)
    try:
        plain = msgpack.unpackb(body, max_bin_len=1 << 31)
        for name, mail in _MAIL.items():
            plain[name] = tuple(mail(**_tuples(entry)) for entry in plain[name])
        if kind is Reply:
            plain["head"] = head
        return kind(**_tuples(plain))
    except (TypeError, KeyError, ValueError, AttributeError):
        raise Refused(
            f"a message of {sender} lacks fields or has unknown or mistyped ones; update the older program"
        ) from None


def _tuples(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def encode_request(request: Request, coordinator: SigningIdentity) -> bytes:
    return _encode(_body(request), _REQUEST, coordinator)


def address_of(data: bytes) -> tuple[bytes, str]:
    """(hash of the contract, name of the step) that a request says it is for: to find its vault. Nothing is checked."""
    try:
        _, body, _, _ = msgpack.unpackb(data, max_bin_len=1 << 31)
        plain = msgpack.unpackb(body, max_bin_len=1 << 31)
        job, step = plain["job"], plain["step"]
    except Exception:
        job = step = None
    if not isinstance(job, bytes) or not isinstance(step, str):
        raise Refused(f"a message of {len(data)} bytes is no step of a job; the coordinator's program is another one")
    return job, step


def decode_request(data: bytes, contract: Contract) -> Request:
    """Raises `Refused` unless signed by the coordinator that the contract names, for this very contract."""
    request: Request = _decode(Request, data, _REQUEST, bytes.fromhex(contract.coordinator_identity), "the coordinator")
    if request.job != contract.hash:
        raise Refused(
            f"a step of contract {request.job.hex()[:16]} for a vault of contract {contract.hash.hex()[:16]}; the "
            "coordinator's contract differs from ours"
        )
    return request


def reply_body(reply: Reply) -> bytes:
    """What is signed of a reply, and hashed into the audit log. The head is not in it: it covers that very entry."""
    return _body(reply)


def encode_reply(body: bytes, identity: SigningIdentity, head: dict[str, Any] | None = None) -> bytes:
    """The reply as it travels; `body` from `reply_body`."""
    return _encode(body, _REPLY, identity, head)


def decode_reply(data: bytes, contract: Contract, party: str, request: Request) -> Reply:
    """Raises `Refused` unless `party` signed it as its answer to `request`."""
    reply: Reply = _decode(Reply, data, _REPLY, bytes.fromhex(contract.party(party).identity), party)
    # a vault that cannot read a request cannot name its step, and one of another contract names that contract
    if reply.refused is not None and reply.party == party and reply.step in ("", request.step):
        return reply
    if (reply.job, reply.step, reply.attempt, reply.party) != (request.job, request.step, request.attempt, party):
        raise Refused(f"{party} answered {reply.step} attempt {reply.attempt} to {request.step} {request.attempt}")
    return reply


def _post_context(contract: Contract, post: Post) -> bytes:
    return _POST + bytes(msgpack.packb([contract.hash, post.sender, post.audience, post.step, post.attempt]))


def sign_post(post: Post, contract: Contract, identity: SigningIdentity) -> Post:
    digest = hashlib.sha256(post.content).digest()
    return replace(post, signature=identity.sign(_post_context(contract, post), digest))


def verify_post(post: Post, contract: Contract) -> bytes:
    """The content, if its sender signed it; else `Refused`."""
    identity = bytes.fromhex(contract.party(post.sender).identity)
    verify(identity, _post_context(contract, post), hashlib.sha256(post.content).digest(), post.signature)
    return post.content
