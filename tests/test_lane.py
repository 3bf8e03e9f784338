"""The lane: laws of its two directions under loss, duplication, reordering and cuts; sessions over TLS; strangers."""

import datetime
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from flwr.app import Context
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_clients import frames
from fl_clients.courier import client_app
from fl_clients.frames import CHANNEL_OPTIONS, METHOD, Incoming, Kind, LaneError, Outgoing, pack, read_opening, unpack
from fl_clients.lane import TLS, Lane, LaneOpener
from fl_server.coordinator import Coordinator, JobStoppedError
from fl_server.lane import LaneGrid, open_lanes, serve_lane
from fl_server.memory_grid import MemoryGrid
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from simulations.job import Parties
from tests.small_federation import Call, assert_equals_twin, small_federation, small_parties

FEDERATION = small_federation(banks=2, owners=2, enterprises=400)


# --- the two directions ----------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=6),
    moves=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), max_size=200),
)
def test_messages_arrive_once_and_in_order_whatever_the_wire_does(
    sizes: list[int], moves: list[tuple[int, int]]
) -> None:
    """Frames are lost, repeated, swapped; streams are cut anywhere; then the wire heals."""
    messages = [bytes([number]) * size for number, size in enumerate(sizes)]
    out, inbox = Outgoing(), Incoming()
    before = frames.CHUNK, frames.WINDOW
    frames.CHUNK, frames.WINDOW = 97, 1000
    try:
        for message in messages:
            out.put(message)
        wire: list[bytes] = []
        got: list[bytes] = []
        clock = 0.0

        def deliver(frame: bytes) -> None:
            kind, (position, chunk) = unpack(frame)
            assert kind is Kind.DATA
            got.extend(inbox.take(position, chunk))

        for move, place in moves:
            clock += 0.1
            if move == 0 and (frame := out.next(clock)) is not None:
                wire.append(frame)
            elif move == 1 and wire:
                deliver(wire.pop(place % len(wire)))  # any frame: reordering
            elif move == 2 and wire:
                deliver(wire[place % len(wire)])  # and again: duplication
            elif move == 3 and wire:
                wire.pop(place % len(wire))  # loss
            elif move == 4:
                out.acknowledge(inbox.position, clock)
            elif move == 5:
                wire.clear()  # a cut
                out.rewind()
            assert out.sent - out.acknowledged <= frames.WINDOW + frames.CHUNK
        for _ in range(1000):
            clock += 2 * frames.RESEND_S
            out.resend_if_silent(clock)
            while (frame := out.next(clock)) is not None:
                deliver(frame)
            out.acknowledge(inbox.position, clock)
            if out.acknowledged == out.end:
                break
        assert got == messages
    finally:
        frames.CHUNK, frames.WINDOW = before


def test_a_cut_in_the_middle_of_100_mb_goes_on_where_it_stopped() -> None:
    message = os.urandom(1 << 20) * 100
    out, inbox = Outgoing(), Incoming()
    out.put(message)
    got: list[bytes] = []
    sent = 0
    cut = False
    while not got:
        frame = out.next(0.0)
        if frame is None:
            out.acknowledge(inbox.position, 0.0)
            continue
        sent += len(frame)
        if not cut and sent > 50 << 20:
            cut = True  # this frame and the unacknowledged window are lost
            out.rewind()
            continue
        got += inbox.take(*unpack(frame)[1])
    assert got == [message]
    assert sent < (100 << 20) + frames.WINDOW + (4 << 20), "not from the beginning again"


def test_a_slow_receiver_holds_the_sender_back() -> None:
    out = Outgoing()
    out.put(bytes(64 << 20))
    under_way = 0
    while (frame := out.next(0.0)) is not None:
        under_way += len(frame)
    assert under_way <= frames.WINDOW + frames.LARGEST_FRAME


def test_an_announced_length_sets_nothing_aside_and_too_large_a_one_is_refused() -> None:
    inbox = Incoming()
    assert inbox.take(0, (700 << 20).to_bytes(8, "big") + b"x") == []
    assert len(inbox._buffer) == 9
    with pytest.raises(LaneError, match="at most"):
        Incoming().take(0, (1 << 40).to_bytes(8, "big"))

    class _Huge(bytes):
        def __len__(self) -> int:
            return frames.LARGEST_MESSAGE + 1

    with pytest.raises(Refused, match="split the job"):
        Outgoing().put(_Huge())


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_garbage_is_no_frame(data: bytes) -> None:
    try:
        kind, fields = unpack(data)
    except LaneError:
        return
    assert pack(kind, *fields)


@pytest.mark.parametrize(
    "frame",
    [
        *(pack(Kind.DATA, -1, b""), pack(Kind.DATA, True, b""), pack(Kind.DATA, 0), pack(Kind.ACK, "0")),
        *(b"", b"\x90", b"\x91\x63", bytes(frames.LARGEST_FRAME + 1)),
    ],
)
def test_frames_of_the_wrong_form_are_refused(frame: bytes) -> None:
    with pytest.raises(LaneError):
        unpack(frame)


def test_an_acknowledgement_of_what_was_never_sent_is_refused() -> None:
    with pytest.raises(LaneError, match="acknowledged"):
        Outgoing().acknowledge(1, 0.0)


# --- over TLS --------------------------------------------------------------------------------------------------------


class Authority:
    """A CA of the tests."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self._certificate = self._sign("test CA", self._key, ca=True)
        self.pem = self._certificate.public_bytes(Encoding.PEM)

    def _sign(self, name: str, key: ec.EllipticCurvePrivateKey, ca: bool = False, days: int = 1) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        start = now - datetime.timedelta(days=3)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def issue(self, name: str, days: int = 1) -> TLS:
        key = ec.generate_private_key(ec.SECP256R1())
        return TLS(
            ca=self.pem,
            key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            certificate=self._sign(name, key, days=days).public_bytes(Encoding.PEM),
        )


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def served(authority: Authority) -> Iterator[tuple[Parties, LaneGrid, str]]:
    parties = small_parties(FEDERATION, rounds=1)
    grid = LaneGrid(parties.contract, parties.coordinator)
    server = authority.issue("coordinator")
    with serve_lane(grid, "localhost:0", ca=server.ca, key=server.key, certificate=server.certificate) as port:
        yield parties, grid, f"localhost:{port}"
        grid.close("end of the test")


def lane_of(parties: Parties, grid: LaneGrid, address: str, party: str, tls: TLS, **changes: Any) -> Lane:
    options: dict[str, Any] = {
        "opening": changes.get("opening") or read_opening(grid.opening(party, address), parties.contract, party),
        "contract": parties.contract,
        "identity": parties.vaults[party]._identity,
        "handle": parties.vaults[party].handle,
        "tls": tls,
        **changes,
    }
    lane = Lane(**options)
    lane.start()
    return lane


def test_a_job_over_the_lane_is_the_twins_though_every_stream_is_cut_again_and_again(
    served: tuple[Parties, LaneGrid, str], authority: Authority
) -> None:
    parties, grid, address = served
    lanes = [lane_of(parties, grid, address, name, authority.issue(name)) for name in parties.vaults]
    done = threading.Event()
    cuts = 0

    def cut() -> None:
        nonlocal cuts
        while not done.wait(0.15):
            for lane in lanes:
                if lane.connected and lane._call is not None:
                    lane._call.cancel()
                    cuts += 1

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        outcome = Coordinator(grid=grid, signed=parties.signed, identity=parties.coordinator, timeout_s=60).run()
    finally:
        done.set()
        cutter.join()
    assert cuts > 5
    assert_equals_twin(FEDERATION, parties, outcome)
    grid.close("the job is done")
    for lane in lanes:
        assert lane.wait(20)
        assert lane.reason == "the job is done"


def test_a_flower_message_opens_the_lane_and_returns_at_once_and_only_the_coordinators(
    served: tuple[Parties, LaneGrid, str], authority: Authority
) -> None:
    parties, grid, address = served
    openers = {
        name: LaneOpener(
            contract=parties.contract,
            party=name,
            identity=vault._identity,
            handle=vault.handle,
            tls=authority.issue(name),
        )
        for name, vault in parties.vaults.items()
    }
    names = dict(enumerate(parties.vaults, start=10))

    def opened(context: Context) -> Call:
        def call(payload: bytes) -> bytes:
            openers[names[context.node_id]].open(payload)
            return b""

        return call

    app = client_app(lambda context: (names[context.node_id], lambda data: b""), opened)
    nodes = {name: node for node, name in names.items()}
    control = MemoryGrid(app, {node: {} for node in names})
    for _ in range(2):
        open_lanes(control, grid, address, nodes)
    outcome = Coordinator(grid=grid, signed=parties.signed, identity=parties.coordinator, timeout_s=60).run()
    assert_equals_twin(FEDERATION, parties, outcome)
    grid.close("done")
    assert all(opener.lane is not None and opener.lane.wait(20) for opener in openers.values())
    impostor = LaneGrid(parties.contract, SigningIdentity.generate())
    with pytest.raises(JobStoppedError, match="bank1 opened no lane"):
        open_lanes(control, impostor, address, nodes)


def test_a_100_mb_step_crosses_the_lane_both_ways(served: tuple[Parties, LaneGrid, str], authority: Authority) -> None:
    from flwr.app import Message

    from fl_clients.courier import from_record, to_record

    parties, grid, address = served
    payload = os.urandom(1 << 20) * 100
    lane_of(parties, grid, address, "bank1", authority.issue("bank1"), handle=lambda data: data[::-1])
    while not list(grid.get_node_ids()):
        time.sleep(0.01)
    (reply,) = grid.send_and_receive([Message(to_record(payload), 1, "train.step")], timeout=60)
    assert from_record(reply.content) == payload[::-1]


def test_a_stuck_party_is_named_and_what_is_known_of_it(
    served: tuple[Parties, LaneGrid, str], authority: Authority
) -> None:
    parties, grid, address = served
    stuck = threading.Event()

    def handle(data: bytes) -> bytes:
        stuck.wait(30)
        return data

    for name in parties.vaults:
        changes = {"handle": handle} if name == "tax" else {}
        lane_of(parties, grid, address, name, authority.issue(name), **changes)
    with pytest.raises(JobStoppedError, match=r"tax died.*no answer in 3 s: connected, its vault has not answered"):
        Coordinator(grid=grid, signed=parties.signed, identity=parties.coordinator, timeout_s=3).run()
    stuck.set()


def turned_away(grid: LaneGrid, lane: Lane) -> str:
    """Why; fails if it got a session."""
    deadline = time.monotonic() + 20
    while not lane.reason and time.monotonic() < deadline:
        time.sleep(0.02)
    reason = lane.reason
    assert reason
    assert list(grid.get_node_ids()) == []
    lane.close()
    return reason


def test_nobody_but_the_party_with_its_identity_and_its_own_certificate_gets_a_session(
    served: tuple[Parties, LaneGrid, str], authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    parties, grid, address = served
    good = authority.issue("bank1")
    turned_away(grid, lane_of(parties, grid, address, "bank1", good, identity=SigningIdentity.generate()))
    assert grid.turned_away >= 1
    # another CA's certificate; one that expired
    strange, expired = Authority().issue("bank1"), authority.issue("bank1", days=-1)
    for tls in (TLS(ca=authority.pem, key=strange.key, certificate=strange.certificate), expired):
        turned_away(grid, lane_of(parties, grid, address, "bank1", tls))
    # a session of another job number
    opening = read_opening(grid.opening("bank1", address), parties.contract, "bank1")
    other = frames.Opening(party="bank1", address=address, session=bytes(32))
    turned_away(grid, lane_of(parties, grid, address, "bank1", good, opening=other))
    # the signature relayed over a stranger's TLS connection
    lane = Lane(
        opening=opening,
        contract=parties.contract,
        identity=parties.vaults["bank1"]._identity,
        handle=parties.vaults["bank1"].handle,
        tls=authority.issue("bank1"),
    )
    lane._certificate = bytes(32)
    lane.start()
    turned_away(grid, lane)


def test_a_coordinator_that_is_not_the_contracts_gets_no_vault(authority: Authority) -> None:
    parties = small_parties(FEDERATION, rounds=1)
    impostor = LaneGrid(parties.contract, SigningIdentity.generate())
    server = authority.issue("coordinator")
    with serve_lane(impostor, "localhost:0", ca=server.ca, key=server.key, certificate=server.certificate) as port:
        with pytest.raises(Refused, match="signature"):
            read_opening(impostor.opening("bank1", f"localhost:{port}"), parties.contract, "bank1")
        opening = frames.Opening(party="bank1", address=f"localhost:{port}", session=impostor.session)
        lane = lane_of(parties, impostor, "", "bank1", authority.issue("bank1"), opening=opening)
        assert "did not prove to be coordinator" in turned_away(impostor, lane)


def test_garbage_of_any_size_is_refused_without_eating_memory(
    served: tuple[Parties, LaneGrid, str], authority: Authority
) -> None:
    """256 MB stand for the gigabyte: gRPC refuses by the announced length, 1 MB is the limit."""
    _, grid, address = served
    tls = authority.issue("bank1")
    credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    unlimited = [("grpc.max_send_message_length", -1)]
    before = resident()
    with grpc.secure_channel(address, credentials, unlimited) as channel:
        for garbage in (bytes(256 << 20), os.urandom(1000), b"", pack(Kind.DATA, 0, b"x")):
            call = channel.stream_stream(METHOD)(iter([garbage]))
            with pytest.raises(grpc.RpcError):
                next(call)
    assert list(grid.get_node_ids()) == []
    assert resident() - before < 200 << 20


def resident() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_channel_options_bound_a_message() -> None:
    assert dict(CHANNEL_OPTIONS)["grpc.max_receive_message_length"] == frames.LARGEST_FRAME
