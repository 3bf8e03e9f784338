"""The lane's protocol, without a network: one authenticated session of numbered, acknowledged, resent bytes each way.

Each direction is a stream of bytes: messages with their length in front, cut into chunks that carry their position.
The receiver takes the next byte only (what is repeated or ahead is dropped) and acknowledges its position; the sender
keeps what is not acknowledged, has at most WINDOW bytes under way, and starts again from the acknowledged position
after a break or a silence (go-back-N). So loss, duplication, reordering and cuts in the middle of a message change
nothing but the time. A process that restarted has another instance number: both directions begin anew, and the
coordinator asks again what was not answered (vaults repeat stored replies).
Guarantee: a session is between the coordinator and a party of this very contract: both sign the other's fresh nonce,
job, session and positions with their contract identities (a signed Diffie-Hellman is not needed, mutual TLS carries
the bytes), and the party signs the hash of the TLS certificate that it connects with, which the coordinator compares
with the one it sees. A session number is no secret.
Bounds: a frame has at most LARGEST_FRAME bytes, a message LARGEST_MESSAGE; nothing is set aside for a length that was
only announced.
"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack

from fl_clients.contract import Contract
from privacy.errors import Refused
from privacy.identity import SigningIdentity, verify
from privacy.sealing import encode_fields

VERSION = 1
METHOD = "/xinyi.Lane/Session"
CHUNK = 1 << 20
WINDOW = 8 << 20
LARGEST_FRAME = CHUNK + 4096
LARGEST_MESSAGE = 768 << 20
"""Bytes. The largest step is an alignment of 8 million enterprises (256 MiB of points) with two owners' lists."""

HEARTBEAT_S = 5.0
SILENCE_S = 20.0
"""A peer from which nothing came for so long is gone: the stream is dropped and made again."""
RESEND_S = 3.0
HANDSHAKE_S = 10.0

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", LARGEST_FRAME),
    ("grpc.max_send_message_length", LARGEST_FRAME),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.so_reuseport", 0),
]

_LENGTH_BYTES = 8
_COORDINATOR, _PARTY, _OPENING = b"xinyi lane coordinator 1", b"xinyi lane party 1", b"xinyi lane opening 1"


class LaneError(Exception):
    """The peer does not keep the lane's protocol, or is not who it says; the stream is dropped."""


class Kind(IntEnum):
    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    DATA = 5
    ACK = 6
    BYE = 7


_FORM: dict[Kind, tuple[type, ...]] = {
    Kind.HELLO: (int, str, bytes, bytes, bytes, bytes, bytes, int),
    Kind.CHALLENGE: (bytes, bytes, bytes, int, bytes),
    Kind.PROOF: (bytes, bytes),
    Kind.WELCOME: (),
    Kind.DATA: (int, bytes),
    Kind.ACK: (int,),
    Kind.BYE: (str,),
}


def pack(kind: Kind, *fields: object) -> bytes:
    return bytes(msgpack.packb([int(kind), *fields]))


def unpack(frame: bytes) -> tuple[Kind, list[Any]]:
    """Kind and fields; `LaneError` for anything that is no frame."""
    if len(frame) > LARGEST_FRAME:
        raise LaneError(f"a frame of {len(frame)} bytes, at most {LARGEST_FRAME} are taken")
    try:
        number, *fields = msgpack.unpackb(frame, max_bin_len=LARGEST_FRAME, max_str_len=4096, max_array_len=16)
        kind = Kind(number)
    except Exception:
        raise LaneError(f"{len(frame)} bytes that are no frame") from None
    form = _FORM[kind]
    if len(fields) != len(form) or any(type(item) is not wanted for item, wanted in zip(fields, form, strict=True)):
        raise LaneError(f"a frame {kind.name} of the wrong form")
    if any(isinstance(item, int) and item < 0 for item in fields):
        raise LaneError(f"a frame {kind.name} with a negative number")
    return kind, fields


# --- the two directions ----------------------------------------------------------------------------------------------


@dataclass
class Outgoing:
    """What is to be sent: bytes from `acknowledged` on are kept, those before `sent` are under way."""

    acknowledged: int = 0
    sent: int = 0
    end: int = 0
    _segments: deque[tuple[int, bytes]] = field(default_factory=deque)
    _progress: float = 0.0

    def put(self, message: bytes) -> None:
        if len(message) > LARGEST_MESSAGE:
            raise Refused(
                f"a message of {len(message)} bytes, the lane takes {LARGEST_MESSAGE}; split the job (fewer rows)"
            )
        for part in (len(message).to_bytes(_LENGTH_BYTES, "big"), message):
            if part:
                self._segments.append((self.end, part))
                self.end += len(part)

    def next(self, now: float) -> bytes | None:
        """The next chunk to send, None when all is sent or the window is full."""
        if self.sent == self.acknowledged:
            self._progress = now
        if self.sent >= min(self.end, self.acknowledged + WINDOW):
            return None
        for start, part in self._segments:
            if start <= self.sent < start + len(part):
                offset = self.sent - start
                chunk = part[offset : offset + CHUNK]
                frame = pack(Kind.DATA, self.sent, chunk)
                self.sent += len(chunk)
                return frame
        raise LaneError("the position to send from is no longer held")

    def acknowledge(self, position: int, now: float) -> None:
        if not self.acknowledged <= position:
            return  # an old acknowledgement that was overtaken
        if position > self.end:
            raise LaneError(f"byte {position} was acknowledged, only {self.end} exist")
        if position > self.acknowledged:
            self._progress = now
        self.acknowledged = position
        self.sent = max(self.sent, position)
        while self._segments and self._segments[0][0] + len(self._segments[0][1]) <= position:
            self._segments.popleft()

    def rewind(self) -> None:
        """After a break: send again whatever was not acknowledged."""
        self.sent = self.acknowledged

    def resend_if_silent(self, now: float) -> None:
        if self.sent > self.acknowledged and now - self._progress > RESEND_S:
            self.rewind()
            self._progress = now


@dataclass
class Incoming:
    """What has arrived in order: `position` bytes in all; an unfinished message is in the buffer."""

    position: int = 0
    _buffer: bytearray = field(default_factory=bytearray)

    def take(self, position: int, chunk: bytes) -> list[bytes]:
        """The messages that this chunk completes; a chunk that is not the next one changes nothing."""
        if position > self.position or position + len(chunk) <= self.position:
            return []
        fresh = memoryview(chunk)[self.position - position :]
        self._buffer += fresh
        self.position += len(fresh)
        messages = []
        while len(self._buffer) >= _LENGTH_BYTES:
            length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if length > LARGEST_MESSAGE:
                raise LaneError(f"a message of {length} bytes, at most {LARGEST_MESSAGE} are taken")
            if len(self._buffer) < _LENGTH_BYTES + length:
                break
            messages.append(bytes(memoryview(self._buffer)[_LENGTH_BYTES : _LENGTH_BYTES + length]))
            del self._buffer[: _LENGTH_BYTES + length]
        return messages


class Link:
    """One end of a lane to one peer, over any number of streams one after the other. Safe to use from threads."""

    def __init__(self, deliver: Callable[[bytes], None]) -> None:
        """`deliver`: called with each message, in order, once; not under a lock, and must return at once."""
        self.instance = os.urandom(16)
        self._peer = b""
        self._out, self._in = Outgoing(), Incoming()
        self._deliver = deliver
        self._changed = threading.Condition()
        self._stream = 0
        self._owes = False
        self._heard = 0.0
        self._bye: str | None = None

    @property
    def connected(self) -> bool:
        return self._stream % 2 == 1

    @property
    def silent_s(self) -> float:
        """Seconds since anything came from the peer."""
        return time.monotonic() - self._heard if self._heard else float("inf")

    @property
    def position(self) -> tuple[bytes, int]:
        """(the peer instance that this end knows, bytes received from it): its word in a handshake."""
        return self._peer, self._in.position

    def send(self, message: bytes) -> None:
        with self._changed:
            self._out.put(message)
            self._changed.notify_all()

    def end(self, reason: str) -> None:
        """Tell the peer that the lane is over."""
        with self._changed:
            self._bye = reason
            self._changed.notify_all()

    def attach(self, instance: bytes, known: bytes, position: int, mine: tuple[bytes, int]) -> tuple[int, bool]:
        """A stream to the peer is up: (its number, whether both directions began anew).

        `known`, `position`: what the peer said it knows of this end; `mine`: what this end said in this handshake.
        """
        with self._changed:
            if mine[0] != self._peer:
                raise LaneError("another stream of the same party came first; connect again")
            anew = known != self.instance or mine[0] != instance
            if anew:
                self._peer, self._out, self._in = instance, Outgoing(), Incoming()
            else:
                self._out.acknowledge(position, time.monotonic())
                self._out.rewind()
            self._stream += 1 if self._stream % 2 == 0 else 2
            self._heard = time.monotonic()
            self._owes = True
            self._changed.notify_all()
            return self._stream, anew

    def detach(self, stream: int) -> None:
        """This stream is gone; a newer one stays."""
        with self._changed:
            if self._stream == stream and self.connected:
                self._stream += 1
            self._changed.notify_all()

    def outgoing(self, stream: int) -> Iterator[bytes]:
        """Frames to send on this stream, until it is replaced, the peer falls silent or the lane ends."""
        last = time.monotonic()
        over = False
        while not over:
            with self._changed:
                frame = None
                while frame is None:
                    now = time.monotonic()
                    if self._stream != stream or now - self._heard > SILENCE_S:
                        return
                    self._out.resend_if_silent(now)
                    if self._owes or now - last > HEARTBEAT_S:
                        frame, self._owes = pack(Kind.ACK, self._in.position), False
                    else:
                        frame = self._out.next(now)
                    if frame is None and self._bye is not None and self._out.acknowledged == self._out.end:
                        frame, over = pack(Kind.BYE, self._bye), True
                    if frame is None:
                        self._changed.wait(timeout=0.5)
            last = time.monotonic()
            yield frame

    def incoming(self, frame: bytes, stream: int) -> str | None:
        """Take one frame; the reason if the peer says that the lane is over."""
        kind, fields = unpack(frame)
        messages: list[bytes] = []
        with self._changed:
            if self._stream != stream:
                return None
            self._heard = time.monotonic()
            match kind:
                case Kind.DATA:
                    messages = self._in.take(*fields)
                    self._owes = True
                case Kind.ACK:
                    self._out.acknowledge(fields[0], self._heard)
                case Kind.BYE:
                    return str(fields[0])
                case _:
                    raise LaneError(f"a frame {kind.name} in an open session")
            self._changed.notify_all()
        for message in messages:
            self._deliver(message)
        return None


# --- who is there ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The coordinator's signed word, carried by a Flower message: where its lane is, for which job and party."""

    party: str
    address: str
    session: bytes


def sign_opening(opening: Opening, contract: Contract, identity: SigningIdentity) -> bytes:
    body = bytes(msgpack.packb([contract.hash, opening.party, opening.address, opening.session]))
    return bytes(msgpack.packb([body, identity.sign(_OPENING, body)]))


def contract_named(data: bytes) -> bytes:
    """Hash of the contract that an opening says it belongs to: to find it. Nothing is checked by this."""
    try:
        job = msgpack.unpackb(msgpack.unpackb(data, max_bin_len=4096)[0])[0]
    except Exception:
        job = None
    if not isinstance(job, bytes):
        raise Refused("the opening of a lane has the wrong form; the coordinator's program is another version")
    return job


def read_opening(data: bytes, contract: Contract, party: str) -> Opening:
    """`Refused` unless the contract's coordinator signed it for this job and party."""
    try:
        body, signature = msgpack.unpackb(data, max_bin_len=4096)
        job, named, address, session = msgpack.unpackb(body)
    except Exception:
        raise Refused(
            "the opening of a lane has the wrong form; the coordinator's program is another version"
        ) from None
    verify(bytes.fromhex(contract.coordinator_identity), _OPENING, body, signature)
    if job != contract.hash or named != party:
        raise Refused(f"the opening of a lane is for another job or party than {party}; the messages were mixed up")
    return Opening(party=party, address=address, session=session)


def transcript(hello: bytes, challenge: list[Any]) -> bytes:
    """What both sign: the whole HELLO and the CHALLENGE without its signature."""
    nonce, instance, known, position, _ = challenge
    return hashlib.sha256(encode_fields([hello, nonce, instance, known, position.to_bytes(8, "big")])).digest()


def sign_challenge(identity: SigningIdentity, hello: bytes, challenge: list[Any]) -> bytes:
    return identity.sign(_COORDINATOR, transcript(hello, challenge))


def check_challenge(contract: Contract, hello: bytes, challenge: list[Any]) -> None:
    _checked(contract.coordinator_identity, _COORDINATOR, transcript(hello, challenge), challenge[-1], "coordinator")


def sign_proof(identity: SigningIdentity, hello: bytes, challenge: list[Any], certificate: bytes) -> bytes:
    return identity.sign(_PARTY, transcript(hello, challenge) + certificate)


def check_proof(contract: Contract, party: str, hello: bytes, challenge: list[Any], proof: list[Any]) -> None:
    certificate, signature = proof
    signed = transcript(hello, challenge) + certificate
    _checked(contract.party(party).identity, _PARTY, signed, signature, party)


def _checked(identity: str, context: bytes, signed: bytes, signature: bytes, who: str) -> None:
    try:
        verify(bytes.fromhex(identity), context, signed, signature)
    except Refused:
        raise LaneError(f"whoever is there did not prove to be {who} with the identity of the contract") from None


# --- requests and replies --------------------------------------------------------------------------------------------

REQUEST_BYTES = 16
ANSWERED, FAILED = b"\x01", b"\x00"


def pack_reply(request: bytes, answered: bool, content: bytes) -> bytes:
    return request + (ANSWERED if answered else FAILED) + content


def unpack_reply(message: bytes) -> tuple[bytes, bool, bytes]:
    """(request number, whether it is an answer, the answer or why there is none)."""
    flag = message[REQUEST_BYTES : REQUEST_BYTES + 1]
    if flag not in (ANSWERED, FAILED):
        raise LaneError("a reply of the wrong form")
    return message[:REQUEST_BYTES], flag == ANSWERED, message[REQUEST_BYTES + 1 :]
