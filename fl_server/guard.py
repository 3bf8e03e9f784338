"""The SuperLink behind a guard: one process, the full Flower API on loopback, and a public port that lets little pass.

Guarantee: through the public port only enrolled, unrevoked node keys call, only the Fleet calls that a SuperNode needs,
with bodies of bounded size; each call leaves a line in the log. Flower 1.41 alone lets anybody who reaches its port
run code on all nodes, register a node, and take the ServerApp's task token.
Against: anyone on the network. Not against: other users of the coordinator's own machine, who reach the loopback port
(the nodes still run no bundle but the one they signed).
It uses Flower's app factory, which is importable but not documented; a test holds it to flwr 1.41.
"""

import argparse
import base64
import importlib
import json
import logging
import logging.handlers
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from fl_clients.app_bundle import APP, bundle
from fl_clients.invite import JOIN_PATH, LARGEST, read_request
from fl_clients.processes import program
from fl_server import enrolment
from privacy.errors import Refused
from privacy.identity import fingerprint

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Audit = Callable[[dict[str, object]], None]

PING_PATH = "/v1/xinyi/ping"
FLEET_CALLS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
        *("get-run", "get-fab", "push-object", "pull-object", "confirm-message-received"),
    )
)
LARGEST_BODY = 32 * 1024 * 1024
"""Bytes of one Fleet call: Flower sends arrays in objects of 5 MB."""
CONNECTIONS = 512


class _TooLargeError(Exception):
    pass


class Guard:
    """The public port's ASGI app, before Flower's. `keys`: node key as sent -> member; asked at every call."""

    def __init__(
        self,
        app: App,
        *,
        keys: Callable[[], dict[bytes, str]],
        join: Callable[[bytes], bytes],
        audit: Audit,
        largest_body: int = LARGEST_BODY,
    ) -> None:
        self._app = app
        self._keys = keys
        self._join = join
        self._audit = audit
        self._largest_body = largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # the loopback listener runs the app's own
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            return
        path = str(scope["path"])
        member, refusal = self._member(scope), ""
        status = 0

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            if scope["method"] != "POST":
                refusal = "only POST"
            elif path == PING_PATH:
                await _reply(watched, 200, b"{}")
            elif path == JOIN_PATH:
                refusal = await self._answer_join(receive, watched)
            elif path not in FLEET_CALLS:
                refusal = "no call of a SuperNode"
            elif member is None:
                refusal = "unknown or revoked node key"
            else:
                await self._app(scope, self._bounded(scope, receive), watched)
            if refusal and not status:
                await _reply(watched, 403, b"forbidden")
        except _TooLargeError:
            refusal = f"body larger than {self._largest_body} bytes"
            if not status:
                await _reply(watched, 413, b"too large")
        finally:
            client = scope.get("client") or ("?", 0)
            line = {"peer": client[0], "path": path[:80], "member": member, "status": status}
            self._audit({**line, "refused": refusal} if refusal else line)

    def _member(self, scope: Scope) -> str | None:
        for name, value in scope["headers"]:
            if name == b"flwr-public-key":
                return self._keys().get(value)
        return None

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that stops at the limit, by the announced length and by what really comes."""
        for name, value in scope["headers"]:
            if name == b"content-length" and (not value.isdigit() or int(value) > self._largest_body):
                raise _TooLargeError
        taken = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._largest_body:
                raise _TooLargeError
            return message

        return bounded

    async def _answer_join(self, receive: Receive, send: Send) -> str:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > LARGEST:
                await _reply(send, 413, b"too large")
                return f"join request larger than {LARGEST} bytes"
            if not message.get("more_body") or message["type"] == "http.disconnect":
                break
        from starlette.concurrency import run_in_threadpool

        try:
            answer = await run_in_threadpool(self._join, body)
        except Refused as refused:
            await _reply(send, 403, str(refused).encode())
            return str(refused)
        await _reply(send, 200, answer)
        return ""


async def _reply(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class MemberKeys:
    """Node keys of the current members, read again when the book changes."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._seen: tuple[int, int] | None = None
        self._keys: dict[bytes, str] = {}

    def __call__(self) -> dict[bytes, str]:
        status = (self._home / "members.json").stat()
        seen = (status.st_mtime_ns, status.st_ino)
        if seen != self._seen:
            book = enrolment.read_book(self._home)
            self._keys = {header_of(member.node_key): member.name for member in book.current()}
            self._seen = seen
        return self._keys


def header_of(node_key: str) -> bytes:
    """The value of Flower's public key header for a node key in OpenSSH form."""
    key = load_ssh_public_key(node_key.encode())
    return base64.b64encode(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def audit_log(path: Path) -> Audit:
    """A writer of JSON lines: time, peer, path, member, status. At most 11 files of 20 MB, the oldest is dropped."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=20_000_000, backupCount=10, encoding="utf-8")
    logger = logging.Logger("xinyi.guard")
    logger.addHandler(handler)

    def write(line: dict[str, object]) -> None:
        logger.info(json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}))

    return write


def registrar(home: Path) -> Callable[[str, str], str]:
    """Registers a node key with the SuperLink through Flower's own command, over the loopback port."""

    def register(node_key: str, name: str) -> str:
        file = home / "superlink" / f"{name}.pub"
        file.write_text(node_key)
        done = subprocess.run(  # noqa: S603 a fixed command; the name is checked by its pattern
            [program("flwr"), "supernode", "register", str(file), "loopback", "--name", name, "--format", "json"],
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        try:
            return str(json.loads(done.stdout)["node-id"])
        except (ValueError, KeyError):
            print(f"registration of {name} failed: {done.stdout.strip()} {done.stderr.strip()}", file=sys.stderr)
            raise Refused("the SuperLink did not register the node key; see the coordinator's log") from None

    return register


def hub(home: Path, port: int) -> ThreadingHTTPServer:
    """Flower's app hub on loopback: it has one app, our bundle, with the approvals of the current members."""

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.path == "/bundle.fab":
                self._send(200, "application/octet-stream", bundle())
            else:
                self._send(404, "application/json", b'{"detail": "not here"}')

        def do_POST(self) -> None:
            body = self.rfile.read(min(int(self.headers.get("Content-Length", "0")), LARGEST))
            try:
                asked = str(json.loads(body)["app_id"])
            except (ValueError, KeyError, TypeError):
                asked = ""
            if self.path != "/v1/hub/fetch-fab" or asked != APP:
                self._send(404, "application/json", b'{"detail": "not here"}')
                return
            approvals = [
                {
                    "public_key_id": member.approval.key_id,
                    "signature": member.approval.signature,
                    "signed_at": member.approval.signed_at,
                }
                for member in enrolment.read_book(home).current()
            ]
            where = f"http://{enrolment.LOOPBACK}:{port}/bundle.fab"
            self._send(200, "application/json", json.dumps({"fab_url": where, "verifications": approvals}).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return ThreadingHTTPServer((enrolment.LOOPBACK, port), Handler)


def serve(home: Path) -> None:
    """Run SuperLink, guard and hub until a signal. The command line that Flower parses is written here."""
    settings = enrolment.settings_of(home)
    server_crt, server_key = home / "tls" / "server.crt", home / "tls" / "server.key"
    sys.argv = [
        "flower-superlink",
        *("--host", enrolment.LOOPBACK, "--port", str(settings.private_port)),
        *("--ssl-ca-certfile", str(home / "ca" / "ca.crt")),
        *("--ssl-certfile", str(server_crt), "--ssl-keyfile", str(server_key)),
        *("--enable-supernode-auth", "--database", str(home / "superlink" / "state.db")),
        *("--isolation", "process", "--superexec-auth-secret-file", str(home / "superlink" / "superexec.secret")),
        "--disable-runtime-dependency-installation",
    ]
    os.umask(0o077)  # Flower's database and logs are nobody else's
    flower = importlib.import_module("flwr.superlink.cli.flower_superlink")
    from flwr.superlink.main import create_app

    config = flower._parse_superlink_lifespan_config()
    app = create_app(config, flower.SuperLinkLifespan)
    register = registrar(home)

    def join(body: bytes) -> bytes:
        request = read_request(body)
        answer = enrolment.admit(home, request, register, datetime.now(UTC))
        print(f"{request.name} joined, identity {fingerprint(bytes.fromhex(request.identity))}", flush=True)
        return answer.to_bytes()

    apps = hub(home, settings.hub_port)
    threading.Thread(target=apps.serve_forever, daemon=True).start()
    guard = Guard(app, keys=MemberKeys(home), join=join, audit=audit_log(home / "logs" / "calls.jsonl"))
    certificate, key = enrolment.public_certificate(home)
    public_config = uvicorn.Config(
        guard,
        host=settings.bind,
        port=settings.fleet_port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=15,
    )
    public_config.load()
    assert public_config.ssl is not None  # noqa: S101 a certificate was given
    public_config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    public = uvicorn.Server(public_config)
    listener = threading.Thread(target=public.run, daemon=True)
    listener.start()
    private = uvicorn.Server(
        uvicorn.Config(
            app,
            host=enrolment.LOOPBACK,
            port=settings.private_port,
            ssl_certfile=server_crt,
            ssl_keyfile=server_key,
            log_level="warning",
            access_log=False,
        )
    )
    watch = threading.Thread(target=_end_together, args=(listener, private), daemon=True)
    watch.start()
    private.run()
    public.should_exit = True
    listener.join(10)
    apps.shutdown()


def _end_together(listener: threading.Thread, private: uvicorn.Server) -> None:
    """A SuperLink whose public port is gone must end, so that its supervisor starts both again."""
    listener.join()
    private.should_exit = True


def main() -> None:
    parser = argparse.ArgumentParser(description="The coordinator's SuperLink behind its guard")
    parser.add_argument("--home", type=Path, required=True)
    serve(parser.parse_args().home)


if __name__ == "__main__":
    main()
