"""The vault's end of the lane: one outward gRPC stream with mutual TLS to the coordinator, made anew after a break.

It takes requests one at a time, hands them to the vault and sends the replies; the protocol is `frames`. It opens only
to the address that the coordinator of the contract signed, and listens on no port. A lane ends when the coordinator
says so, when it is closed, or after `give_up_s` without a connection; it says why in one line.
"""

import hashlib
import logging
import os
import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from fl_clients.contract import Contract
from fl_clients.frames import (
    CHANNEL_OPTIONS,
    HANDSHAKE_S,
    METHOD,
    REQUEST_BYTES,
    VERSION,
    Kind,
    LaneError,
    Link,
    Opening,
    check_challenge,
    pack,
    pack_reply,
    read_opening,
    sign_proof,
    unpack,
)
from fl_clients.vault import VaultFailedError
from privacy.errors import Refused
from privacy.identity import SigningIdentity

LOGGER = logging.getLogger(__name__)

GIVE_UP_S = 3600.0
_LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True, kw_only=True, repr=False)
class TLS:
    """PEM: the coordinator's CA, this institution's key and certificate (chain)."""

    ca: bytes
    key: bytes
    certificate: bytes


def certificate_hash(pem: bytes) -> bytes:
    """SHA-256 of the first certificate of a PEM chain."""
    text = pem.decode("ascii")
    end = "-----END CERTIFICATE-----"
    if end not in text:
        raise Refused("no certificate in the PEM file of the lane; join the federation again")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(text[: text.index(end) + len(end)])).digest()


class Lane:
    """SECRET (identity). One job's lane of one party. `handle`: the vault's call."""

    def __init__(
        self,
        *,
        opening: Opening,
        contract: Contract,
        identity: SigningIdentity,
        handle: Callable[[bytes], bytes],
        tls: TLS,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        self._opening = opening
        self._contract = contract
        self._identity = identity
        self._handle = handle
        self._credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
        self._certificate = certificate_hash(tls.certificate)
        self._give_up_s = give_up_s
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._link = Link(self._requests.put)
        self._over = threading.Event()
        self.reason = ""
        """Why the lane ended, or why it is not connected now."""
        self._call: grpc.Call | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"vault {opening.party}", daemon=True),
            threading.Thread(target=self._connect_again, name=f"lane {opening.party}", daemon=True),
        ]

    def __repr__(self) -> str:
        return f"Lane({self._opening.party!r} -> {self._opening.address})"

    @property
    def connected(self) -> bool:
        return self._link.connected

    def start(self) -> None:
        """Returns at once."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._end("closed by the institution")

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the lane has ended."""
        return self._over.wait(timeout_s)

    def _end(self, reason: str) -> None:
        self.reason = reason
        self._over.set()
        self._requests.put(None)
        if self._call is not None:
            self._call.cancel()

    def _work(self) -> None:
        while (message := self._requests.get()) is not None and not self._over.is_set():
            request, data = message[:REQUEST_BYTES], message[REQUEST_BYTES:]
            answered, content = self._answer(data)
            try:
                self._link.send(pack_reply(request, answered, content))
            except Refused as error:
                self._link.send(pack_reply(request, False, str(error).encode()))

    def _answer(self, data: bytes) -> tuple[bool, bytes]:
        try:
            return True, self._handle(data)
        except VaultFailedError as error:
            return False, f"its vault failed ({error})".encode()
        except Exception as error:
            # the message may quote a value: only the kind of error leaves
            LOGGER.error("%s: the vault's service failed: %s", self._opening.party, type(error).__name__)
            return False, f"its vault failed ({type(error).__name__})".encode()

    def _connect_again(self) -> None:
        pause, since = 0.1, time.monotonic()
        while not self._over.is_set():
            established = False
            try:
                established = self._session()
            except grpc.RpcError as error:
                self.reason = f"the coordinator at {self._opening.address} cannot be reached: {_why(error)}"
            except (LaneError, Refused) as error:
                self.reason = f"the lane to {self._opening.address} was dropped: {error}"
            if self._over.is_set():
                return
            if established:
                pause, since = 0.1, time.monotonic()
            if time.monotonic() - since > self._give_up_s:
                self._end(f"no lane for {self._give_up_s:.0f} s; {self.reason or 'the coordinator is gone'}")
                return
            LOGGER.info("%s: %s", self._opening.party, self.reason)
            self._over.wait(pause)
            pause = min(_LONGEST_PAUSE_S, 2 * pause)

    def _session(self) -> bool:
        """One stream from connection to break; whether it was established."""
        link, party = self._link, self._opening.party
        to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        streams: queue.SimpleQueue[int] = queue.SimpleQueue()
        mine = link.position
        hello = pack(
            *(Kind.HELLO, VERSION, party, self._contract.hash, self._opening.session, os.urandom(32)),
            *(link.instance, *mine),
        )

        def frames() -> Iterator[bytes]:
            while (frame := to_send.get()) is not None:
                yield frame
            if not streams.empty():
                yield from link.outgoing(streams.get())
                if self._call is not None:
                    self._call.cancel()  # a peer that fell silent does not end the stream by itself

        with grpc.secure_channel(self._opening.address, self._credentials, CHANNEL_OPTIONS) as channel:
            call = channel.stream_stream(METHOD)(frames())
            self._call = call
            timer = threading.Timer(HANDSHAKE_S, call.cancel)
            timer.daemon = True
            timer.start()
            stream = 0
            try:
                to_send.put(hello)
                challenge = _expect(next(call, b""), Kind.CHALLENGE)
                check_challenge(self._contract, hello, challenge)
                proof = sign_proof(self._identity, hello, challenge, self._certificate)
                to_send.put(pack(Kind.PROOF, self._certificate, proof))
                _expect(next(call, b""), Kind.WELCOME)
                timer.cancel()
                _, instance, known, position, _ = challenge
                stream, _ = link.attach(instance, known, position, mine)
                streams.put(stream)
                to_send.put(None)
                self.reason = ""
                try:
                    for frame in call:
                        over = link.incoming(frame, stream)
                        if over is not None:
                            self._end(over)
                            break
                except grpc.RpcError as error:
                    self.reason = f"the lane to {self._opening.address} broke: {_why(error)}"
                return True
            finally:
                timer.cancel()
                link.detach(stream)
                to_send.put(None)
                call.cancel()


class LaneOpener:
    """SECRET (identity). Opens the lane of one job when a Flower message brings its opening; again changes nothing."""

    def __init__(
        self, *, contract: Contract, party: str, identity: SigningIdentity, handle: Callable[[bytes], bytes], tls: TLS
    ) -> None:
        self._contract, self._party, self._identity = contract, party, identity
        self._handle, self._tls = handle, tls
        self._lock = threading.Lock()
        self._opening: Opening | None = None
        self.lane: Lane | None = None

    def __repr__(self) -> str:
        return f"LaneOpener({self._party!r})"

    def open(self, data: bytes) -> None:
        """Start the lane and return; `Refused` unless the contract's coordinator signed this opening for this party.

        A restarted coordinator opens another session: the lane of the old one is closed.
        """
        opening = read_opening(data, self._contract, self._party)
        with self._lock:
            if self.lane is not None and not self.lane.wait(0):
                if self._opening == opening:
                    return
                self.lane.close()
            self._opening = opening
            self.lane = Lane(
                opening=opening, contract=self._contract, identity=self._identity, handle=self._handle, tls=self._tls
            )
            self.lane.start()


def _expect(frame: bytes, kind: Kind) -> list[Any]:
    if not frame:
        raise LaneError("the coordinator closed the stream in the handshake; it may not know this party or job")
    found, fields = unpack(frame)
    if found is not kind:
        raise LaneError(f"a frame {found.name} where {kind.name} belongs")
    return fields


def _why(error: grpc.RpcError) -> str:
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    return " ".join(str(details).split())[:200]
