"""An institution's processes: the vault, and Flower's SuperNode with its SuperExec; kept alive.

All connections go outward. Everything that listens here is on a Unix socket of mode 0600 (vault) or on loopback
(Flower's runtime, where SuperExec proves itself with a secret from a file: no other user of the machine takes a task).
The SuperNode runs one bundle only: the one this institution signed at joining (app_bundle.py). Flower refuses a node
that returns within a minute of a crash: the restart loop tries until it is let in.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from fl_clients import enrolment, tls
from fl_clients.app_bundle import bundle_hash
from fl_clients.processes import Program, Supervisor, environment, program, running_supervisor, stop_on_signals
from fl_clients.vault_host import unattended_passphrase
from privacy.errors import Refused
from privacy.private_file import private_folder, write_private

WAIT_S = 5.0
STOP_S = 60.0


def _status_file(home: Path) -> Path:
    return home / "run" / "processes.json"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def programs(home: Path, vault: Sequence[str], port: int) -> list[Program]:
    """Vault, SuperNode and SuperExec of a home. `vault`: the command that serves the vault's socket."""
    federation = enrolment.federation_of(home)
    if federation.bundle != bundle_hash():
        raise Refused(
            f"the approved app is {federation.bundle[:16]}, this installation's is {bundle_hash()[:16]}; join again"
        )
    path = enrolment.socket_path(home)
    secret = home / "run" / "superexec.secret"
    write_private(secret, secrets.token_bytes(32))
    env = environment(private_folder(home / "run" / "flwr"))
    runtime = f"127.0.0.1:{port}"
    return [
        Program(name="vault", command=vault, env=env, log=home / "logs" / "vault.log", ready=path.exists),
        Program(
            name="supernode",
            command=[
                program("flower-supernode"),
                *("--superlink", f"{federation.host}:{federation.fleet_port}"),
                *("--root-certificates", str(home / "tls" / "root.crt")),
                *("--auth-supernode-private-key", str(home / "node" / "node.key")),
                *("--trusted-entities", str(home / "trusted.yaml")),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
                *("--node-config", f'vault="unix:{path}"'),
            ],
            env=env,
            log=home / "logs" / "supernode.log",
        ),
        Program(
            name="superexec",
            command=[
                program("flower-superexec"),
                *("--runtime-api-address", runtime, "--insecure"),  # loopback of this machine
                *("--superexec-auth-secret-file", str(secret)),
            ],
            env=env,
            log=home / "logs" / "superexec.log",
        ),
    ]


def run(home: Path, vault: Sequence[str], say: Callable[[str], None], clock: Callable[[], datetime]) -> None:
    """Run the institution's node in the foreground until SIGTERM or SIGINT; waits for a coordinator that is not up."""
    if (pid := running_supervisor(_status_file(home))) is not None:
        raise Refused(f"the node of {home} runs already (process {pid}); stop it with `xinyi-node down`")
    unattended_passphrase(home)
    supervisor = Supervisor(programs(home, vault, _free_port()), status=_status_file(home), say=say)
    stop_on_signals(supervisor)
    federation = enrolment.federation_of(home)
    root = (home / "tls" / "root.crt").read_text(encoding="utf-8")
    told = ""
    while (wrong := tls.check_connection(federation.host, federation.fleet_port, root, clock())) is not None:
        if wrong != told:
            say(f"waiting: {wrong}")
            told = wrong
        if supervisor.wait(WAIT_S):
            return
    say(f"{federation.name}: connected to {federation.host}:{federation.fleet_port}")
    supervisor.run()


def run_detached(home: Path, wait_s: float = 60.0) -> int:
    """Start `run` as a process of its own; returns its id once it has started the SuperNode."""
    if (pid := running_supervisor(_status_file(home))) is not None:
        raise Refused(f"the node of {home} runs already (process {pid}); stop it with `xinyi-node down`")
    log = home / "logs" / "node.log"
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        start = file.tell()
        process = subprocess.Popen(  # noqa: S603 our own command
            [program("xinyi-node"), "run", "--home", str(home)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and process.poll() is None:
        if running_supervisor(_status_file(home)) == process.pid:
            return process.pid
        time.sleep(0.1)
    words = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    if process.poll() is None:
        process.terminate()
    raise Refused(f"the node did not start: {words[-1] if words else f'see {log}'}")


def down(home: Path) -> bool:
    """Stop the node of this home in order; False when it did not run."""
    pid = running_supervisor(_status_file(home))
    if pid is None:
        return False
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while running_supervisor(_status_file(home)) is not None:
        if time.monotonic() > deadline:
            raise Refused(f"process {pid} did not end within {STOP_S:.0f} s; see {home / 'logs'}")
        time.sleep(0.1)
    return True


def vault_command(home: Path) -> list[str]:
    """The command that serves the vault of a home."""
    return [sys.executable, "-m", "fl_clients.vault_host", "--home", str(home)]
