"""The control plane as real processes over TLS: coordinator, three nodes, attacks on the public port, faults.

The same attacks are run against a SuperLink as Flower starts it (with TLS and node authentication), where they succeed:
a test of a wall needs to show that there was something to keep out.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, StartRunResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse

from fl_clients import enrolment as node_enrolment
from fl_clients import node, tls
from fl_clients.app_bundle import bundle
from fl_clients.contract import Contract, SignedContract
from fl_clients.invite import read_invite
from fl_clients.processes import environment, program
from fl_server import enrolment, job_folder, superlink
from fl_server.job_folder import coordinator_identity
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from tests.small_federation import small_federation, small_parties

pytestmark = pytest.mark.slow

NAMES = {"bank1": "bank", "bank2": "bank", "pboc": "pboc"}
WAIT_S = 120.0


def until(what: str, condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    """Wait for a condition; a wait that never ends is a failure with a name."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.25)


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for start in range(21000, 60000, 97):
        try:
            for port in range(start, start + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return start
    raise AssertionError("no free ports")


def command(*words: str, home: Path) -> str:
    """Output of one command of a user, in a folder that holds nothing."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "COLUMNS": "160"}
    done = subprocess.run(
        [program(words[0]), *words[1:], "--home", str(home)],
        env=env,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Where it runs, and what the nine commands said."""

    folder: Path
    said: str
    tokens: tuple[str, ...]

    @property
    def server(self) -> Path:
        return self.folder / "server"

    @property
    def settings(self) -> enrolment.Settings:
        return enrolment.settings_of(self.server)

    def online(self) -> set[str]:
        """Names of the members whose node the SuperLink sees."""
        known = superlink.nodes(self.server)
        return {m.name for m in enrolment.read_book(self.server).current() if known.get(m.node_id) == "online"}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """From nothing to three connected institutions by the README's nine commands."""
    folder = tmp_path_factory.mktemp("d")
    server = folder / "server"
    said = [command("xinyi-server", "init", "localhost", "--port", str(free_ports(4)), home=server)]
    said.append(command("xinyi-server", "invite", *(f"{n}={r}" for n, r in NAMES.items()), home=server))
    tokens = tuple(
        read_invite((server / "invites" / f"{name}.invite").read_bytes(), datetime.now(UTC)).token for name in NAMES
    )
    try:
        said.append(command("xinyi-server", "up", "--detach", home=server))
        for name in NAMES:
            invitation = folder / f"{name}.invite"
            invitation.write_bytes((server / "invites" / f"{name}.invite").read_bytes())
            said.append(command("xinyi-node", "join", str(invitation), home=folder / name))
            said.append(command("xinyi-node", "run", "--detach", home=folder / name))
        assert len(said) == 9
        made = Deployment(folder=folder, said="\n".join(said), tokens=tokens)
        until("three nodes online", lambda: made.online() == set(NAMES))
        yield made
    finally:
        for name in NAMES:
            if (folder / name).exists():
                node.down(folder / name)
        superlink.down(server)


def processes_of(home: Path) -> dict[str, dict[str, object]]:
    state = "superlink" if (home / "server.toml").exists() else "run"
    programs: dict[str, dict[str, object]] = json.loads((home / state / "processes.json").read_bytes())["programs"]
    return programs


def kill(home: Path, name: str) -> None:
    pid = processes_of(home)[name]["pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)


# what people see


def test_nine_commands_connect_three_institutions_and_fingerprints_are_on_both_sides(deployment: Deployment) -> None:
    status = command("xinyi-server", "status", home=deployment.server)
    for name in NAMES:
        own = next(line.split()[2] for line in deployment.said.split(f"as {name} ")[1].splitlines() if "own" in line)
        assert own in status, name
    coordinator = deployment.said.split("coordinator  ")[1].split()[0]
    assert deployment.said.count(coordinator) == 2 + len(NAMES)
    assert status.count("online") == len(NAMES)
    assert command("xinyi-node", "check", home=deployment.folder / "pboc").count("ok  ") == 5


# attacks


def _post(url: str, ca: Path, body: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/protobuf", "Accept": "application/protobuf", **_version_headers()}
    with httpx.Client(verify=tls.client_context(ca.read_text()), timeout=30) as client:
        return client.post(url, content=body, headers=headers)


def _version_headers() -> dict[str, str]:
    from flwr.supercore.version import package_name, package_version

    return {
        "flwr-package-name": package_name,
        "flwr-package-version": package_version,
        "flwr-component-name": "attacker",
    }


def _attacks(base: str, ca: Path) -> dict[str, httpx.Response]:
    """Register a node, start a job of one's own, take the ServerApp's task."""
    key = tls.new_key()
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    register = RegisterNodeRequest(public_key=public_key_to_bytes(key.public_key()), name="mallory")
    run = StartRunRequest()
    run.fab.content = bundle()
    task = AcquireTaskRequest(supported_task_types=["flwr-serverapp", "flwr-clientapp", "serverapp"])
    return {
        "register": _post(f"{base}/v1/control/register-node", ca, register.SerializeToString()),
        "run": _post(f"{base}/v1/control/start-run", ca, run.SerializeToString()),
        "task": _post(f"{base}/v1/runtime/acquire-task", ca, task.SerializeToString()),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A SuperLink as Flower starts it: TLS, node authentication, one port for all."""
    folder = tmp_path_factory.mktemp("plain")
    port = free_ports(1)
    enrolment.create(folder / "h", enrolment.Settings(federation="plain", host="localhost"), datetime.now(UTC))
    pair = enrolment.public_certificate(folder / "h")
    ca = folder / "h" / "ca" / "ca.crt"
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [
            program("flower-superlink"),
            *("--host", "127.0.0.1", "--port", str(port), "--ssl-ca-certfile", str(ca)),
            *("--ssl-certfile", str(pair[0]), "--ssl-keyfile", str(pair[1])),
            *("--enable-supernode-auth", "--isolation", "process"),
        ],
        env=environment(folder),
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    base = f"https://localhost:{port}"

    def up() -> bool:
        try:
            return httpx.get(f"{base}/health", verify=tls.client_context(ca.read_text())).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        until("plain SuperLink up", up)
        yield base, ca
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def test_the_attacks_succeed_on_a_plain_superlink(plain: tuple[str, Path]) -> None:
    got = _attacks(*plain)
    assert {name: answer.status_code for name, answer in got.items()} == {"register": 200, "run": 200, "task": 200}
    assert StartRunResponse.FromString(got["run"].content).run_id
    assert AcquireTaskResponse.FromString(got["task"].content).token


def test_the_attacks_fail_on_the_public_port_and_leave_a_line(deployment: Deployment) -> None:
    before = superlink.runs(deployment.server)
    got = _attacks(f"https://localhost:{deployment.settings.fleet_port}", deployment.server / "tls" / "root.crt")
    assert {name: answer.status_code for name, answer in got.items()} == {"register": 403, "run": 403, "task": 403}
    assert superlink.runs(deployment.server) == before
    assert len(superlink.nodes(deployment.server)) == len(NAMES)
    lines = [json.loads(line) for line in (deployment.server / "logs" / "calls.jsonl").read_text().splitlines()]
    refused = {line["path"] for line in lines if line.get("refused") == "no call of a SuperNode"}
    assert refused >= {"/v1/control/register-node", "/v1/control/start-run", "/v1/runtime/acquire-task"}


def test_without_the_secret_nobody_takes_a_task_even_on_loopback(deployment: Deployment) -> None:
    url = f"https://localhost:{deployment.settings.private_port}/v1/runtime/acquire-task"
    task = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    answer = _post(url, deployment.server / "ca" / "ca.crt", task.SerializeToString())
    assert answer.status_code == 401


def _supernode(deployment: Deployment, folder: Path, root: Path, key: Path) -> str:
    """What a SuperNode of one's own gets to hear within 15 s."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("flower-supernode"),
                *("--superlink", f"localhost:{deployment.settings.fleet_port}", "--root-certificates", str(root)),
                *("--auth-supernode-private-key", str(key), "--port", str(free_ports(1)), "--max-retries", "1"),
            ],
            env=environment(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            code: int | None = process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    words = (folder / "log").read_text()
    assert "SuperNode ID" not in words
    return f"{code} {words}"


def test_an_unknown_node_key_is_not_let_in(deployment: Deployment, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(tls.key_openssh(tls.new_key()))
    key.chmod(0o600)
    _supernode(deployment, tmp_path, deployment.server / "tls" / "root.crt", key)
    lines = (deployment.server / "logs" / "calls.jsonl").read_text()
    assert "unknown or revoked node key" in lines
    assert deployment.online() == set(NAMES)


def test_a_node_that_expects_another_ca_does_not_connect(deployment: Deployment, tmp_path: Path) -> None:
    enrolment.create(tmp_path / "other", enrolment.Settings(federation="x", host="localhost"), datetime.now(UTC))
    root = tmp_path / "other" / "tls" / "root.crt"
    words = _supernode(deployment, tmp_path, root, deployment.folder / "pboc" / "node" / "node.key")
    assert "certificate" in words.lower()
    said = tls.check_connection("localhost", deployment.settings.fleet_port, root.read_text(), datetime.now(UTC))
    assert "not from the CA" in str(said)


def test_a_used_invitation_lets_nobody_in(deployment: Deployment, tmp_path: Path) -> None:
    invitation = (deployment.folder / "bank1.invite").read_bytes()
    with pytest.raises(Refused, match="other keys"):
        node_enrolment.join(tmp_path / "thief", invitation, datetime.now(UTC))
    assert not (tmp_path / "thief" / "federation.toml").exists()


# what runs on the nodes


def _start(deployment: Deployment) -> dict[str, object]:
    """Start a job that everyone signed, but no vault was told of, and wait for the end of its run."""
    parties = small_parties(small_federation(banks=2, owners=1, enterprises=300))
    identity = coordinator_identity(deployment.server)
    terms = parties.contract.model_dump() | {"coordinator_identity": identity.public.hex()}
    keys = {"coordinator": identity}
    for party in terms["parties"]:
        keys[party["name"]] = SigningIdentity.load(deployment.folder / party["name"] / "identity.key")
        party["identity"] = keys[party["name"]].public.hex()
    contract = Contract.model_validate(terms)
    assert {party.name for party in contract.parties} == set(NAMES)
    signed = SignedContract(contract=contract)
    for name, key in keys.items():
        signed = signed.signed(name, key)
    job_folder.save(deployment.server, signed)
    use, _ = job_folder.begin_run(deployment.server, signed)
    run = superlink.start_run(deployment.server, job=contract.job, use=use)
    ended: list[dict[str, object]] = []

    def over() -> bool:
        ended[:] = [r for r in superlink.runs(deployment.server) if str(r["run-id"]) == run]
        return "finished" in str(ended[0]["status"])

    until("the run ends", over)
    return ended[0]


def test_the_shipped_app_reaches_the_vaults_and_a_job_without_approval_ends_there(deployment: Deployment) -> None:
    ended = _start(deployment)
    assert "failed" in str(ended["status"])
    assert "ServerApp failed with exception" in str(ended["status-details"])
    assert any(name in str(ended["status-details"]) for name in NAMES), ended
    for name in NAMES:
        vault = (deployment.folder / name / "logs" / "vault.log").read_text()
        assert "is approved here" in vault, (name, vault, ended)


def test_a_node_does_not_run_another_app(deployment: Deployment, tmp_path: Path) -> None:
    """A coordinator that ships its own code, through its own loopback port, gets the nodes' refusal."""
    app = tmp_path / "evil"
    (app / "evil").mkdir(parents=True)
    mark = tmp_path / "ran"
    (app / "pyproject.toml").write_text(
        '[project]\nname = "evil"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n'
        'dependencies = ["flwr>=1.41.0"]\n[tool.flwr.app]\npublisher = "mallory"\n'
        '[tool.flwr.app.components]\nserverapp = "evil.s:app"\nclientapp = "evil.c:app"\n[tool.flwr.app.config]\n'
    )
    (app / "evil" / "__init__.py").write_text("")
    (app / "evil" / "c.py").write_text(
        f"open({str(mark)!r}, 'w').write('x')\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
    )
    (app / "evil" / "s.py").write_text(
        "from flwr.app import Message, RecordDict\nfrom flwr.serverapp import ServerApp\napp = ServerApp()\n"
        "@app.main()\ndef main(grid, context):\n"
        "    ask = [Message(RecordDict(), dst_node_id=n, message_type='query') for n in grid.get_node_ids()]\n"
        "    replies = list(grid.send_and_receive(ask, timeout=60))\n"
        "    codes = sorted(r.error.code if r.has_error() else 0 for r in replies)\n"
        "    raise RuntimeError(f'evil got {codes}')\n"
    )
    superlink.flwr(deployment.server, "run", str(app), "loopback")

    def said() -> str:
        return str(superlink.runs(deployment.server)[0].get("status-details", ""))

    until("the nodes answer", lambda: "evil got" in said())
    assert "evil got [7, 7, 7]" in said()  # Flower's INVALID_FAB
    assert not mark.exists()


# secrets


def test_no_secret_is_in_logs_process_lists_or_the_database(deployment: Deployment) -> None:
    secrets: dict[str, list[bytes]] = {}
    for path in [*deployment.folder.rglob("*.key"), *deployment.folder.rglob("superexec.secret")]:
        data = path.read_bytes()
        lines = [line for line in data.splitlines() if b"-----" not in line]
        # the second line of a PEM holds key bytes; an OpenSSH file also its public half, which everybody may see
        secrets[str(path)] = [data] if path.suffix == ".secret" else [lines[-2] if len(lines) > 2 else lines[0]]
    for number, token in enumerate(deployment.tokens):
        secrets[f"token {number}"] = [token.encode()]
    assert len(secrets) >= 3 * 4 + 4 + 3
    command_lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command_lines += [(process / "cmdline").read_bytes(), (process / "environ").read_bytes()]
        except OSError:  # it ended, or is another user's
            continue
    places = {"process list": b"\n".join(command_lines)}
    for path in deployment.folder.rglob("*"):
        if path.is_file() and (
            path.suffix in (".log", ".jsonl", ".db", ".toml", ".json", ".yaml") or "-wal" in path.name
        ):
            places[str(path)] = path.read_bytes()
    assert any(name.endswith("state.db") for name in places)
    assert b"superexec.secret" in places["process list"]  # the list does show our processes
    for secret, forms in secrets.items():
        for form in forms:
            for place, content in places.items():
                assert form not in content, f"{secret} is in {place}"


# faults


def test_killed_processes_come_back_and_the_nodes_reconnect(deployment: Deployment) -> None:
    bank = deployment.folder / "bank1"
    for name in ("vault", "superexec", "supernode"):
        kill(bank, name)
    kill(deployment.server, "superlink")
    kill(deployment.server, "superexec")
    until("the SuperLink is back", lambda: superlink.healthy(deployment.server))
    # Flower lets a killed node return only when its heartbeat is overdue
    until("the killed node is refused or back", lambda: int(str(processes_of(bank)["supernode"]["starts"])) > 1)
    until("bank1's SuperNode stays", lambda: processes_of(bank)["supernode"]["pid"] is not None)

    def back() -> bool:
        try:
            return deployment.online() == set(NAMES) and processes_of(bank)["supernode"]["pid"] is not None
        except Refused:
            return False

    until("all online again", back, 180)
    assert node_enrolment.socket_path(bank).exists()


def test_a_killed_supervisor_leaves_nothing_behind_and_the_node_starts_again(deployment: Deployment) -> None:
    home = deployment.folder / "bank2"
    state = json.loads((home / "run" / "processes.json").read_bytes())
    children = [item["pid"] for item in state["programs"].values()]
    os.kill(state["supervisor"], signal.SIGKILL)
    until("the children are gone", lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert "runs: process" in command("xinyi-node", "run", "--detach", home=home)
    until("bank2 online", lambda: "bank2" in deployment.online())


def test_a_revoked_node_is_out_at_once(deployment: Deployment) -> None:
    """The last test of this file: it changes who is a member."""
    log = deployment.server / "logs" / "calls.jsonl"
    before = log.stat().st_size

    def lines() -> list[dict[str, object]]:
        return [
            json.loads(line) for line in log.read_bytes()[before:].splitlines(keepends=True) if line.endswith(b"\n")
        ]

    assert "revoked" in command("xinyi-server", "revoke", "bank2", home=deployment.server)
    # a SuperNode that is refused waits longer and longer: the first refusal may come before the command returns
    until("the revoked node is refused", lambda: any("unknown or revoked" in str(x.get("refused")) for x in lines()))
    first = next(n for n, line in enumerate(lines()) if "unknown or revoked" in str(line.get("refused")))
    assert not [line for line in lines()[first:] if line["member"] == "bank2"]
    assert deployment.online() <= {"bank1", "pboc"}
    assert "revoked" in command("xinyi-server", "status", home=deployment.server)


def test_an_expired_certificate_is_told_in_one_line(tmp_path: Path) -> None:
    """A whole coordinator whose certificate has expired: nobody joins, and the reason is said."""
    now = datetime.now(UTC)
    home = tmp_path / "s"
    port = free_ports(4)
    settings = enrolment.Settings(
        federation="old",
        host="localhost",
        fleet_port=port,
        lane_port=port + 1,
        private_port=port + 2,
        hub_port=port + 3,
    )
    enrolment.create(home, settings, now)
    invitation = enrolment.invite(home, "late", "bank", now).read_bytes()
    good = (home / "tls" / "server.crt").read_bytes(), (home / "tls" / "server.key").read_bytes()
    enrolment.renew(home, settings, now - timedelta(days=30), days=1)
    (home / "tls" / "server.crt").rename(home / "tls" / "public.crt")
    (home / "tls" / "server.key").rename(home / "tls" / "public.key")
    (home / "tls" / "server.crt").write_bytes(good[0])
    (home / "tls" / "server.key").write_bytes(good[1])
    command("xinyi-server", "up", "--detach", home=home)
    try:
        with pytest.raises(Refused, match="has expired; the coordinator must renew it"):
            node_enrolment.join(tmp_path / "late", invitation, now)
    finally:
        superlink.down(home)
