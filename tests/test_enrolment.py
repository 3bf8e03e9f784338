"""Joining a federation, without processes: bundle, invitation, request, book, guard, certificates, restart loop."""

import asyncio
import base64
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.supercore.fab import Fab
from flwr.supernode.start_client_internal import _verify_fab

from fl_clients import invite as messages
from fl_clients import tls
from fl_clients.app_bundle import PINNED_HASH, approve, bundle, bundle_hash
from fl_clients.invite import Invite, JoinRequest, read_answer, read_invite, read_request, sign
from fl_clients.processes import Program, Supervisor, environment
from fl_server import enrolment
from fl_server.guard import FLEET_CALLS, Guard, MemberKeys, header_of
from privacy.errors import Refused
from privacy.identity import SigningIdentity

ROOT = Path(__file__).resolve().parents[1]
NOW = datetime(2026, 11, 25, 8, 0, tzinfo=UTC)
SETTINGS = enrolment.Settings(federation="test", host="localhost")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    enrolment.create(folder, SETTINGS, NOW)
    return folder


class Node:
    """An institution's keys."""

    def __init__(self) -> None:
        self.identity = SigningIdentity.generate()
        self.key, self.lane = tls.new_key(), tls.new_key()

    def request(self, invited: Invite, **changes: Any) -> JoinRequest:
        fields = {
            "name": invited.name,
            "token": invited.token,
            "identity": self.identity.public.hex(),
            "node_key": tls.public_openssh(self.key),
            "lane_request": tls.signing_request(invited.name, self.lane).decode(),
            "approval": approve(NOW),
        }
        return sign(JoinRequest(**{**fields, **changes}), self.identity)


class Register:
    """Stands for the SuperLink; counts."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def __call__(self, node_key: str, name: str) -> str:
        self.calls.append((node_key, name))
        return str(len(self.calls))


def invited(home: Path, name: str = "bank_a", now: datetime = NOW) -> Invite:
    return read_invite(enrolment.invite(home, name, "bank", now).read_bytes(), now)


# the bundle


def test_the_bundle_is_the_one_of_this_release() -> None:
    """A change of the bundle needs a new version, or Flower and the institutions mix two of them up."""
    assert bundle_hash() == PINNED_HASH


def _as_flower_has_it(content: bytes) -> tuple[Fab, dict[str, str]]:
    approval = approve(NOW)
    signed = {"signature": approval.signature, "signed_at": approval.signed_at}
    fab = Fab("", content, {approval.key_id: json.dumps(signed), "valid_license": "Valid"})
    return fab, {approval.key_id: approval.public_key}


def test_flower_accepts_the_approved_bundle_and_no_other() -> None:
    fab, trusted = _as_flower_has_it(bundle())
    assert _verify_fab(fab, trusted)
    altered, trusted = _as_flower_has_it(bundle().replace(b"fl_clients.courier", b"fl_clients.c0urier"))
    assert not _verify_fab(altered, trusted)
    fab, _ = _as_flower_has_it(bundle())
    assert not _verify_fab(fab, {approve(NOW).key_id: approve(NOW).public_key})


def test_the_client_app_of_the_bundle_loads_nothing_heavy(tmp_path: Path) -> None:
    import io
    import zipfile

    zipfile.ZipFile(io.BytesIO(bundle())).extractall(tmp_path)
    code = (
        "import sys; from xinyi_courier.client_app import app; heavy = ('torch', 'tenseal', 'privacy', 'models'); "
        "print([m for m in sys.modules if m.split('.')[0] in heavy], type(app).__name__)"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ClientApp"


# invitations


def test_an_invitation_that_was_altered_or_is_late_is_refused(home: Path) -> None:
    data = enrolment.invite(home, "bank_a", "bank", NOW).read_bytes()
    assert read_invite(data, NOW).name == "bank_a"
    with pytest.raises(Refused, match="signature does not fit"):
        read_invite(data.replace(b'"localhost"', b'"attacker."'), NOW)
    with pytest.raises(Refused, match="signature does not fit"):
        read_invite(data.replace(b'"signature": "', b'"signature": "00'), NOW)
    with pytest.raises(Refused, match="expired"):
        read_invite(data, NOW + timedelta(days=8))
    with pytest.raises(Refused, match="malformed"):
        read_invite(data[:-20], NOW)
    with pytest.raises(Refused, match="larger than"):
        read_invite(b" " * (messages.LARGEST + 1), NOW)


def test_secrets_are_files_of_their_owner_and_no_token_is_in_the_book(home: Path) -> None:
    message = invited(home)
    for path in (*home.rglob("*.key"), home / "invites" / "bank_a.invite", home / "superlink" / "superexec.secret"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert len(list(home.rglob("*.key"))) == 3
    assert message.token not in (home / "members.json").read_text()
    assert message.token not in repr(message)


# joining


def test_a_token_lets_one_institution_join_once(home: Path) -> None:
    message, node, register = invited(home), Node(), Register()
    request = node.request(message)
    answer = enrolment.admit(home, read_request(request.to_bytes()), register, NOW)
    assert read_answer(answer.to_bytes(), request, message.coordinator).node_id == "1"
    # the answer was lost on the way: the same keys get it again, without a second registration
    again = node.request(message)
    assert enrolment.admit(home, again, register, NOW).node_id == "1"
    assert len(register.calls) == 1
    with pytest.raises(Refused, match="other keys"):
        enrolment.admit(home, Node().request(message), register, NOW)
    with pytest.raises(Refused, match="member already"):
        enrolment.invite(home, "bank_a", "bank", NOW)
    assert not (home / "invites" / "bank_a.invite").exists()


def test_who_has_no_token_or_a_late_one_does_not_join(home: Path) -> None:
    message, register = invited(home), Register()
    other = invited(home, "bank_b")
    for request, words in (
        (Node().request(message, token="0" * 64), "no open invitation"),
        (Node().request(message, name="bank_b"), "no open invitation"),
        (Node().request(other, name="bank_c"), "no open invitation"),
    ):
        with pytest.raises(Refused, match=words):
            enrolment.admit(home, request, register, NOW)
    with pytest.raises(Refused, match="expired"):
        enrolment.admit(home, Node().request(message), register, NOW + timedelta(days=7))
    assert register.calls == []
    assert enrolment.read_book(home).members == ()


def test_a_new_invitation_voids_the_old_one(home: Path) -> None:
    old, new = invited(home), invited(home)
    with pytest.raises(Refused, match="no open invitation"):
        enrolment.admit(home, Node().request(old), Register(), NOW)
    assert enrolment.admit(home, Node().request(new), Register(), NOW).node_id == "1"


def test_a_bad_key_another_bundle_or_a_foreign_certificate_request_is_refused(home: Path) -> None:
    message, register = invited(home), Register()
    other_bundle = approve(NOW).model_copy(update={"bundle": "0" * 64})
    for changes, words in (
        ({"node_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEY"}, "no P-384 key"),
        ({"approval": other_bundle}, "same release"),
        ({"lane_request": "nothing"}, "malformed"),
    ):
        with pytest.raises(Refused, match=words):
            enrolment.admit(home, Node().request(message, **changes), register, NOW)
    assert register.calls == []


def test_a_request_is_by_the_identity_that_it_names_and_an_answer_fits_one_request(home: Path) -> None:
    message, node = invited(home), Node()
    request = node.request(message)
    with pytest.raises(Refused, match="signature does not fit"):
        read_request(request.model_copy(update={"identity": Node().identity.public.hex()}).to_bytes())
    answer = enrolment.admit(home, request, Register(), NOW)
    with pytest.raises(Refused, match="another request"):
        read_answer(answer.to_bytes(), node.request(message), message.coordinator)
    with pytest.raises(Refused, match="signature does not fit"):
        read_answer(answer.to_bytes(), request, node.identity.public.hex())


def test_a_revoked_member_does_not_return_with_its_old_keys(home: Path) -> None:
    message, node = invited(home), Node()
    enrolment.admit(home, node.request(message), Register(), NOW)
    keys = MemberKeys(home)
    header = header_of(tls.public_openssh(node.key))
    assert keys() == {header: "bank_a"}
    enrolment.revoke(home, "bank_a", NOW)
    assert keys() == {}
    with pytest.raises(Refused, match="no member"):
        enrolment.revoke(home, "bank_a", NOW)
    with pytest.raises(Refused, match="no open invitation"):
        enrolment.admit(home, node.request(message), Register(), NOW)
    again = invited(home)
    with pytest.raises(Refused, match="revoked one"):
        enrolment.admit(home, node.request(again), Register(), NOW)
    assert enrolment.admit(home, Node().request(again), Register(), NOW).node_id == "1"


def test_the_lane_certificate_is_for_clients_and_from_the_ca(home: Path) -> None:
    message, node = invited(home), Node()
    answer = enrolment.admit(home, node.request(message), Register(), NOW)
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    ca = x509.load_pem_x509_certificate((home / "ca" / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(ca)
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


# the guard


class Upstream:
    """Stands for Flower's app: reads the body, answers 200."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.bytes = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            self.bytes += len(message["body"])
            more = message["more_body"]
        self.paths.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


def _refuse_join(_: bytes) -> bytes:
    raise Refused("no open invitation")


def call(
    upstream: Upstream, path: str, *, key: bytes = b"good", chunks: int = 1, announced: int | None = None
) -> tuple[int, dict[str, object]]:
    """Status and audit line of one call with `chunks` KB of body."""
    lines: list[dict[str, object]] = []
    guard = Guard(upstream, keys=lambda: {b"good": "bank_a"}, join=_refuse_join, audit=lines.append, largest_body=4096)
    headers = [(b"flwr-public-key", key)]
    if announced is not None:
        headers.append((b"content-length", str(announced).encode()))
    left = chunks
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"x" * 1024, "more_body": left > 0}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": ("192.0.2.1", 5)}
    asyncio.run(guard(scope, receive, send))
    assert len(lines) == 1
    return int(sent[0]["status"]), lines[0]


def test_only_the_calls_of_a_node_with_a_known_key_pass() -> None:
    upstream = Upstream()
    for path in sorted(FLEET_CALLS):
        status, line = call(upstream, path)
        assert status == 200
        assert line == {"peer": "192.0.2.1", "path": path, "member": "bank_a", "status": 200}
    assert upstream.paths == sorted(FLEET_CALLS)


def test_the_calls_that_pass_exist_in_this_flower_and_the_dangerous_ones_are_not_among_them() -> None:
    from flwr.superlink.routers.fleet.router import router

    known = {str(route.path) for route in router.routes}  # type: ignore[attr-defined]
    assert known >= FLEET_CALLS
    assert known - FLEET_CALLS == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/v1/fleet/register-node"),
        *("/docs", "/health", "/", "//v1/fleet/pull-messages", "/v1/fleet/../control/start-run", "/v1/fleet/get-run/"),
    ],
)
def test_no_other_call_passes_even_with_a_good_key(path: str) -> None:
    upstream = Upstream()
    status, line = call(upstream, path)
    assert (status, upstream.paths) == (403, [])
    assert line["refused"] == "no call of a SuperNode"


def test_an_unknown_key_and_a_body_too_large_do_not_pass() -> None:
    upstream = Upstream()
    status, line = call(upstream, "/v1/fleet/pull-messages", key=b"other")
    assert (status, line["refused"]) == (403, "unknown or revoked node key")
    assert call(upstream, "/v1/fleet/push-object", chunks=4)[0] == 200
    before = upstream.bytes
    status, line = call(upstream, "/v1/fleet/push-object", chunks=1_000_000)
    assert status == 413
    assert upstream.bytes - before <= 4096
    assert call(upstream, "/v1/fleet/push-object", announced=1 << 30)[0] == 413
    assert call(upstream, messages.JOIN_PATH, chunks=1000)[0] == 413
    assert call(upstream, messages.JOIN_PATH)[0] == 403


def test_the_key_header_is_as_flower_sends_it() -> None:
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = tls.new_key()
    assert header_of(tls.public_openssh(key)) == base64.b64encode(public_key_to_bytes(key.public_key()))


# TLS


@contextmanager
def tls_server(certificate: Path, key: Path) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("0.0.0.0", 0))
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                peer, _ = listener.accept()
                peer.settimeout(5)
                with context.wrap_socket(peer, server_side=True) as wrapped:
                    wrapped.recv(65536)
                    date = datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
                    wrapped.sendall(f"HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode())
            except OSError:
                continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        stop.set()
        with socket.socket() as last:
            last.connect_ex(("127.0.0.1", listener.getsockname()[1]))
        thread.join(5)
        listener.close()


def test_a_wrong_an_expired_and_a_foreign_named_certificate_are_told_apart(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    homes = {}
    for name, made, host in (
        ("good", now, "localhost"),
        ("expired", now - timedelta(days=500), "localhost"),
        ("future", now + timedelta(days=2), "localhost"),
    ):
        homes[name] = tmp_path / name
        enrolment.create(homes[name], enrolment.Settings(federation="test", host=host), made)
    root = (homes["good"] / "tls" / "root.crt").read_text()
    with tls_server(*enrolment.public_certificate(homes["good"])) as port:
        assert tls.check_connection("localhost", port, root, now) is None
        assert "clock: " in str(tls.check_connection("localhost", port, root, now + timedelta(seconds=90)))
        foreign = (homes["expired"] / "tls" / "root.crt").read_text()
        assert "not from the CA" in str(tls.check_connection("localhost", port, foreign, now))
        assert "another name" in str(tls.check_connection("127.0.0.2", port, root, now))
    assert "is the coordinator up" in str(tls.check_connection("localhost", port, root, now))
    for name, words in (("expired", "has expired"), ("future", "not valid yet")):
        with tls_server(*enrolment.public_certificate(homes[name])) as port:
            theirs = (homes[name] / "tls" / "root.crt").read_text()
            assert words in str(tls.check_connection("localhost", port, theirs, now))


def test_given_certificates_are_checked_before_use(home: Path, tmp_path: Path) -> None:
    crt, key, root = home / "tls" / "server.crt", home / "tls" / "server.key", home / "tls" / "root.crt"
    enrolment.create(tmp_path / "a", SETTINGS, NOW, (crt, key, root))
    assert (tmp_path / "a" / "tls" / "root.crt").read_bytes() == root.read_bytes()
    assert enrolment.public_certificate(tmp_path / "a")[0].read_bytes() == crt.read_bytes()
    with pytest.raises(Refused, match="names"):
        enrolment.create(tmp_path / "b", SETTINGS.model_copy(update={"host": "elsewhere"}), NOW, (crt, key, root))
    with pytest.raises(Refused, match="not the one"):
        enrolment.create(tmp_path / "c", SETTINGS, NOW, (crt, home / "ca" / "ca.key", root))
    with pytest.raises(Refused, match="valid until"):
        enrolment.create(tmp_path / "d", SETTINGS, NOW + timedelta(days=500), (crt, key, root))


# the restart loop


def test_what_ends_is_started_again_and_the_rest_is_stopped_in_reverse_order(tmp_path: Path) -> None:
    order = tmp_path / "order"
    lasting = (
        "import signal, sys, time\n"
        "def end(*_):\n    open({order!r}, 'a').write({name!r}); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    said: list[str] = []

    def make(name: str, code: str) -> Program:
        log = tmp_path / f"{name}.log"
        env = environment(tmp_path)
        return Program(name=name, command=[sys.executable, "-c", code], env=env, log=log)

    def runs(name: str) -> bool:
        log = tmp_path / f"{name}.log"
        return log.exists() and b"up" in log.read_bytes()

    programs = [
        make("first", lasting.format(order=str(order), name="first ")),
        make("flaky", "print('here'); raise SystemExit(5)"),
        make("last", lasting.format(order=str(order), name="last ")),
    ]
    status = tmp_path / "status.json"
    supervisor = Supervisor(programs, status=status, say=said.append, pause_s=0.05)

    def stop_later() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not (len(said) >= 3 and runs("first") and runs("last")):
            time.sleep(0.02)
        state = json.loads(status.read_bytes())
        said.append(f"pids {state['supervisor'] == os.getpid()} {state['programs']['flaky']['last_exits'][-1]}")
        supervisor.stop()

    thread = threading.Thread(target=stop_later)
    thread.start()
    supervisor.run()
    thread.join()
    assert (tmp_path / "flaky.log").read_text().count("here") >= 3
    assert said[0] == "flaky ended with 5; it starts again in 0.05 s"
    assert "pids True 5" in said
    assert order.read_text() == "last first "
    assert not status.exists()


def test_the_environment_of_flower_is_not_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_SUPERGRID_API_URL", "https://elsewhere.example")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    env = environment(tmp_path)
    assert "FLWR_SUPERGRID_API_URL" not in env
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_HOME"] == str(tmp_path)
