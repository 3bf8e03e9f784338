"""The coordinator's end of the lane: a gRPC server with mutual TLS, and the Flower `Grid` that drives a job over it.

The driver (`coordinator`) sees nodes, messages and error replies as on any Flower wire. Only parties of the contract
get a session (`frames`); before it is proved nobody may send more than three small frames, and a stream that has not
proved itself in HANDSHAKE_S seconds is cut. A request stays until it is answered: after a break it goes on where it
stopped, after a restart of a vault it is asked again, byte for byte. After the deadline of a step the missing party is
named, with what is known of it: not connected since when, or connected and silent.
"""

import hashlib
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fl_clients.contract import Contract
from fl_clients.courier import from_record, to_record
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
    check_proof,
    pack,
    sign_challenge,
    sign_opening,
    unpack,
    unpack_reply,
)
from fl_server.coordinator import JobStoppedError
from privacy.identity import SigningIdentity

LOGGER = logging.getLogger(__name__)

NO_ANSWER = 3
"""Code of the error reply for a party that did not answer in time (Flower's MESSAGE_UNAVAILABLE)."""
FAILED = 2
REVOKED = "revoked by the coordinator"
_SPARE_STREAMS = 8


class _Party:
    """A party's link, and the requests that it has not answered, by number."""

    def __init__(self, name: str, changed: threading.Condition) -> None:
        self.name = name
        self._changed = changed
        self.unanswered: dict[bytes, bytes] = {}
        self.answers: dict[bytes, tuple[bool, bytes]] = {}
        self.link = Link(self._answer)
        self.since = time.monotonic()
        self.refusals = ""

    def ask(self, data: bytes) -> bytes:
        number = os.urandom(REQUEST_BYTES)
        with self._changed:
            self.unanswered[number] = data
        self.link.send(number + data)
        return number

    def ask_again(self) -> None:
        for number, data in list(self.unanswered.items()):
            self.link.send(number + data)

    def forget(self, number: bytes) -> None:
        with self._changed:
            self.unanswered.pop(number, None)
            self.answers.pop(number, None)

    def _answer(self, message: bytes) -> None:
        number, answered, content = unpack_reply(message)
        with self._changed:
            if self.unanswered.pop(number, None) is not None:  # a second answer, or one to an old question: dropped
                self.answers[number] = (answered, content)
            self._changed.notify_all()


class LaneGrid(Grid):
    """A job's parties as Flower nodes 1, 2, ... in the order of the contract."""

    def __init__(
        self, contract: Contract, identity: SigningIdentity, admitted: Callable[[str], bool] = lambda party: True
    ) -> None:
        """`admitted`: whether a party may connect and be asked, as of now (a member may be revoked while a job runs).

        Without it every party of the contract is: the contract names the identities.
        """
        self._contract = contract
        self._identity = identity
        self._admitted = admitted
        self.session = os.urandom(32)
        self._changed = threading.Condition()
        self._parties = {party.name: _Party(party.name, self._changed) for party in contract.parties}
        self._names = dict(enumerate(self._parties, start=1))
        self._replies: dict[str, Message] = {}
        self._run: Run | None = None
        self.turned_away = 0
        """Streams that did not prove to be a party of this job."""
        with self._changed:
            _identify()

    @property
    def contract(self) -> Contract:
        return self._contract

    def opening(self, party: str, address: str) -> bytes:
        """What a Flower message brings to this party's vault."""
        return sign_opening(Opening(party=party, address=address, session=self.session), self._contract, self._identity)

    def status(self) -> dict[str, str]:
        """One line by party, for people."""
        return {name: self._state(party) for name, party in self._parties.items()}

    def close(self, reason: str) -> None:
        """Tell every vault that the lane is over."""
        for party in self._parties.values():
            party.link.end(reason)

    # --- Flower's Grid -----------------------------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        if self._run is None:
            raise RuntimeError("no Flower run in the lane")
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [node for node, name in self._names.items() if self._parties[name].link.connected]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError("the lane answers each step as a whole; use send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError("the lane answers each step as a whole; use send_and_receive")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Every message gets a reply: the party's, or an error that says what is known of it."""
        asked: list[tuple[Message, _Party, bytes]] = []
        replies: list[Message] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = os.urandom(8).hex()
            party = self._parties[self._names[message.metadata.dst_node_id]]
            if message.metadata.message_type == "query.who":
                # the handshake proved it
                replies.append(Message(RecordDict({"who": ConfigRecord({"party": party.name})}), reply_to=message))
            elif not self._admitted(party.name):
                party.link.end(REVOKED)
                replies.append(Message(Error(FAILED, REVOKED), reply_to=message))
            else:
                asked.append((message, party, party.ask(from_record(message.content))))
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while any(number not in party.answers for _, party, number in asked):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            for message, party, number in asked:
                answered, content = party.answers.get(number, (False, b""))
                if answered:
                    replies.append(Message(to_record(content), reply_to=message))
                elif content:
                    replies.append(Message(Error(FAILED, content.decode(errors="replace")), reply_to=message))
                else:
                    why = f"no answer in {timeout or 0:.0f} s: {self._state(party)}"
                    replies.append(Message(Error(NO_ANSWER, why), reply_to=message))
                party.forget(number)
        return replies

    def _state(self, party: _Party) -> str:
        if party.link.connected:
            return "connected" if not party.unanswered else "connected, its vault has not answered yet"
        return f"not connected for {time.monotonic() - party.since:.0f} s; look at its node"

    # --- the wire ----------------------------------------------------------------------------------------------------

    def session_stream(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """One stream of one party: handshake, then frames until it breaks."""
        timer = threading.Timer(HANDSHAKE_S, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            hello = next(frames, b"")
            version, name, job, session, _, instance, known, position = _expect(hello, Kind.HELLO)
            known_party = name in self._parties
            if version != VERSION or job != self._contract.hash or session != self.session or not known_party:
                raise LaneError("a stream for another job, session, party or version")
            if not self._admitted(name):
                raise LaneError(f"{name}: {REVOKED}")
            party = self._parties[name]
            mine = party.link.position
            challenge: list[Any] = [os.urandom(32), party.link.instance, *mine, b""]
            challenge[-1] = sign_challenge(self._identity, hello, challenge)
            yield pack(Kind.CHALLENGE, *challenge)
            proof = _expect(next(frames, b""), Kind.PROOF)
            check_proof(self._contract, name, hello, challenge, proof)
            if proof[0] != _peer_certificate(context):
                raise LaneError(f"{name} signed another TLS certificate than it connects with")
            timer.cancel()
            stream, anew = party.link.attach(instance, known, position, mine)
        except (LaneError, grpc.RpcError) as error:
            self.turned_away += 1
            LOGGER.warning("a stream from %s was turned away: %s", context.peer(), error)
            timer.cancel()
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no party of this job")
        if anew:
            party.ask_again()
        party.since = time.monotonic()
        with self._changed:
            self._changed.notify_all()
        threading.Thread(
            target=_read, args=(frames, party.link, stream, context), name=f"from {name}", daemon=True
        ).start()
        try:
            yield pack(Kind.WELCOME)
            yield from party.link.outgoing(stream)
        finally:
            party.since = time.monotonic()
            party.link.detach(stream)


def _read(frames: Iterator[bytes], link: Link, stream: int, context: grpc.ServicerContext) -> None:
    try:
        for frame in frames:
            link.incoming(frame, stream)
    except LaneError as error:
        LOGGER.warning("the stream from %s was dropped: %s", context.peer(), error)
        context.cancel()
    except Exception:
        LOGGER.debug("stream from %s ended", context.peer(), exc_info=True)
    finally:
        link.detach(stream)


def _expect(frame: bytes, kind: Kind) -> list[Any]:
    if not frame:
        raise LaneError("the stream ended in the handshake")
    found, fields = unpack(frame)
    if found is not kind:
        raise LaneError(f"a frame {found.name} where {kind.name} belongs")
    return fields


def _peer_certificate(context: grpc.ServicerContext) -> bytes:
    """SHA-256 of the TLS certificate at the other end."""
    found = context.auth_context().get("x509_pem_cert", [b""])[0]
    if not found:
        raise LaneError("a stream without a client certificate")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(found.decode("ascii"))).digest()


def _identify() -> None:
    """flwr 1.41 stamps messages with the running task; outside a Flower run this process is it."""
    try:
        _ = TaskIdentity.run_id
    except RuntimeError:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def open_lanes(control: Grid, lane: LaneGrid, address: str, nodes: Mapping[str, int], wait_s: float = 60.0) -> None:
    """Ask every party's vault over Flower (`control`) to open its lane; each message returns at once.

    `nodes`: party -> node, from the coordinator's own book. `JobStoppedError` names who is not there or refuses. Asked
    again, an open lane changes nothing.
    """
    deadline = time.monotonic() + wait_s
    while absent := sorted(set(nodes.values()) - set(control.get_node_ids())):
        if time.monotonic() > deadline:
            names = ", ".join(party for party, node in nodes.items() if node in absent)
            raise JobStoppedError(f"not connected after {wait_s:.0f} s: {names}; look at `xinyi-node run` there")
        time.sleep(0.2)
    messages = [
        Message(to_record(lane.opening(party, address)), dst_node_id=node, message_type="query.lane")
        for party, node in nodes.items()
    ]
    names_of = {node: party for party, node in nodes.items()}
    answered: dict[str, str] = {}
    for reply in control.send_and_receive(messages, timeout=wait_s):
        party = names_of[reply.metadata.src_node_id]
        answered[party] = str(reply.error.reason) if reply.has_error() else ""
    for party in nodes:
        why = answered.get(party, "no answer")
        if why:
            raise JobStoppedError(f"{party} opened no lane ({why}); look at its node and start the job again")


@contextmanager
def serve_lane(grid: LaneGrid, address: str, *, ca: bytes, key: bytes, certificate: bytes) -> Iterator[int]:
    """Listen on `address` (host:port, port 0 = any) with mutual TLS while the context is open; gives the port."""
    streams = 2 * len(grid.status()) + _SPARE_STREAMS
    server = grpc.server(
        ThreadPoolExecutor(max_workers=streams), options=CHANNEL_OPTIONS, maximum_concurrent_rpcs=streams
    )
    handler = grpc.stream_stream_rpc_method_handler(grid.session_stream)
    service, method = METHOD.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    credentials = grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)
    port = server.add_secure_port(address, credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(grace=2).wait()
