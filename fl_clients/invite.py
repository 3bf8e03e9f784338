"""What an institution and the coordinator exchange when one joins the other: invitation, request, answer.

The invitation travels out of band (post, a courier, an encrypted mail) and carries the CA certificate and the
coordinator's identity, both signed by that identity, so that the first connection already is authenticated; people
compare the fingerprints by telephone. Its token lets its holder join once, under the invited name, before it expires.
The request is signed by the institution's identity and names its keys; the answer is signed by the coordinator over
the request's hash. Nothing else that is said over this channel is trusted: contracts name the identities again.
"""

import hashlib
import json
from datetime import datetime
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_clients.app_bundle import Approval
from fl_clients.contract import Role
from privacy.errors import Refused
from privacy.identity import SigningIdentity, verify

NAME = r"^[a-z][a-z0-9_-]{0,40}$"
HEX32 = r"^[0-9a-f]{64}$"
LARGEST = 64 * 1024
"""Bytes: no invitation, request or answer is larger."""
JOIN_PATH = "/v1/xinyi/join"

_INVITE, _REQUEST, _ANSWER = b"xinyi invite 1", b"xinyi join request 1", b"xinyi join answer 1"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    signature: str = ""

    def signed_bytes(self) -> bytes:
        """Canonical JSON of everything but the signature."""
        content = self.model_dump(mode="json", exclude={"signature"})
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    def to_bytes(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), indent=2).encode()


class Invite(_Message):
    """SECRET until used: whoever holds `token` may join under `name`."""

    federation: str
    name: str = Field(pattern=NAME)
    role: Role
    host: str
    fleet_port: int = Field(ge=1, le=65535)
    lane_port: int = Field(ge=1, le=65535)
    ca: str
    """PEM: the root that signed the coordinator's TLS certificate."""
    coordinator: str = Field(pattern=HEX32)
    token: str = Field(pattern=HEX32, repr=False)
    expires: datetime


class JoinRequest(_Message):
    """An institution's keys, under its invited name."""

    name: str = Field(pattern=NAME)
    token: str = Field(pattern=HEX32, repr=False)
    identity: str = Field(pattern=HEX32)
    node_key: str = Field(max_length=1024)
    """OpenSSH public key (P-384) of the SuperNode."""
    lane_request: str = Field(max_length=4096)
    """PEM: certificate signing request of the lane's client key."""
    approval: Approval


class JoinAnswer(_Message):
    """The coordinator's yes."""

    request: str = Field(pattern=HEX32)
    """SHA-256 of the request's signed bytes."""
    node_id: str
    certificate: str
    """PEM: the lane's client certificate."""


AnyMessage = TypeVar("AnyMessage", Invite, JoinRequest, JoinAnswer)


def sign(message: AnyMessage, identity: SigningIdentity) -> AnyMessage:
    return message.model_copy(update={"signature": identity.sign(_context(message), message.signed_bytes()).hex()})


def _context(message: Invite | JoinRequest | JoinAnswer) -> bytes:
    match message:
        case Invite():
            return _INVITE
        case JoinRequest():
            return _REQUEST
        case JoinAnswer():
            return _ANSWER


def _read(kind: type[AnyMessage], data: bytes, what: str) -> AnyMessage:
    if len(data) > LARGEST:
        raise Refused(f"{what} of {len(data)} bytes is larger than {LARGEST}; it is damaged, ask for a new one")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise Refused(f"{what} is malformed at {place}: {first['type']}; ask for a new one") from None


def _check(message: Invite | JoinRequest | JoinAnswer, public: str) -> None:
    try:
        signature = bytes.fromhex(message.signature)
    except ValueError:
        signature = b""
    verify(bytes.fromhex(public), _context(message), message.signed_bytes(), signature)


def read_invite(data: bytes, now: datetime) -> Invite:
    """The invitation in these bytes; `Refused` when altered, malformed or expired at `now` (aware, UTC)."""
    invite = _read(Invite, data, "invitation")
    _check(invite, invite.coordinator)
    if invite.expires.tzinfo is None or now >= invite.expires:
        raise Refused(f"invitation of {invite.name!r} expired {invite.expires.isoformat()}; ask for a new one")
    return invite


def read_request(data: bytes) -> JoinRequest:
    """The request in these bytes; `Refused` unless the identity that it names signed it."""
    request = _read(JoinRequest, data, "join request")
    _check(request, request.identity)
    return request


def request_hash(request: JoinRequest) -> str:
    return hashlib.sha256(request.signed_bytes()).hexdigest()


def read_answer(data: bytes, request: JoinRequest, coordinator: str) -> JoinAnswer:
    """The answer in these bytes; `Refused` unless `coordinator` signed it over this very request."""
    answer = _read(JoinAnswer, data, "answer of the coordinator")
    _check(answer, coordinator)
    if answer.request != request_hash(request):
        raise Refused("the coordinator answered another request; join again")
    return answer
