"""The coordinator's processes: SuperLink with guard, SuperExec (which starts the ServerApp of each job); kept alive.

SuperLink and ServerApp are separate (Flower's "process" isolation): a run outlives a killed SuperLink. SuperExec proves
itself with a secret from a file, so that nobody else takes a ServerApp's task. Flower's own files are in the home.
"""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import tomli_w

from fl_clients.app_bundle import APP, VERSION
from fl_clients.processes import Program, Supervisor, environment, program, running_supervisor, stop_on_signals
from fl_server import enrolment
from fl_server.job_folder import HOME_VARIABLE
from privacy.errors import Refused
from privacy.private_file import private_folder

STOP_S = 60.0


def _flower_home(home: Path) -> Path:
    """Flower's own folder, with the one connection that its commands may use: the loopback port."""
    settings = enrolment.settings_of(home)
    folder = private_folder(home / "superlink" / "flwr")
    connection = {
        "address": f"{enrolment.LOOPBACK}:{settings.private_port}",
        "root-certificates": str(home / "ca" / "ca.crt"),
    }
    config = {"superlink": {"default": "loopback", "loopback": connection}}
    (folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    return folder


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of every Flower process and command of this coordinator."""
    settings = enrolment.settings_of(home)
    hub = f"http://{enrolment.LOOPBACK}:{settings.hub_port}/v1"
    return environment(_flower_home(home), {"FLWR_SUPERGRID_API_URL": hub, HOME_VARIABLE: str(home)})


def programs(home: Path) -> list[Program]:
    settings = enrolment.settings_of(home)
    env = flower_environment(home)
    loopback = f"{enrolment.LOOPBACK}:{settings.private_port}"
    return [
        Program(
            name="superlink",
            command=[sys.executable, "-m", "fl_server.guard", "--home", str(home)],
            env=env,
            log=home / "logs" / "superlink.log",
            ready=lambda: healthy(home),
        ),
        Program(
            name="superexec",
            command=[
                program("flower-superexec"),
                *("--runtime-api-address", loopback, "--root-certificates", str(home / "ca" / "ca.crt")),
                *("--superexec-auth-secret-file", str(home / "superlink" / "superexec.secret")),
            ],
            env=env,
            log=home / "logs" / "superexec.log",
        ),
    ]


def healthy(home: Path) -> bool:
    """Whether the SuperLink answers on its loopback port."""
    settings = enrolment.settings_of(home)
    context = ssl.create_default_context(cafile=str(home / "ca" / "ca.crt"))
    url = f"https://{enrolment.LOOPBACK}:{settings.private_port}/health"
    try:
        with urllib.request.urlopen(url, context=context, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _status_file(home: Path) -> Path:
    return home / "superlink" / "processes.json"


def up(home: Path, say: Callable[[str], None]) -> None:
    """Run the coordinator in the foreground until SIGTERM or SIGINT."""
    if (pid := running_supervisor(_status_file(home))) is not None:
        raise Refused(f"the coordinator of {home} runs already (process {pid}); stop it with `xinyi-server down`")
    supervisor = Supervisor(programs(home), status=_status_file(home), say=say)
    stop_on_signals(supervisor)
    supervisor.run()


def up_detached(home: Path, wait_s: float = 90.0) -> int:
    """Start `up` as a process of its own; returns its id when the SuperLink answers."""
    if (pid := running_supervisor(_status_file(home))) is not None:
        raise Refused(f"the coordinator of {home} runs already (process {pid}); stop it with `xinyi-server down`")
    log = home / "logs" / "supervisor.log"
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        process = subprocess.Popen(  # noqa: S603 our own command
            [program("xinyi-server"), "up", "--home", str(home)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and process.poll() is None:
        if running_supervisor(_status_file(home)) == process.pid and healthy(home):
            return process.pid
        time.sleep(0.2)
    if process.poll() is None:
        process.terminate()
    raise Refused(f"the coordinator did not come up within {wait_s:.0f} s; see {home / 'logs'}")


def down(home: Path) -> bool:
    """Stop the coordinator of this home in order; False when it did not run."""
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


def flwr(home: Path, *arguments: str) -> dict[str, object]:
    """One of Flower's own commands over the loopback port, as its JSON answer. `Refused` with its words if it fails."""
    done = subprocess.run(  # noqa: S603 arguments are ours
        [program("flwr"), *arguments, "--format", "json"],
        env=flower_environment(home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        answer = None
    if done.returncode != 0 or not isinstance(answer, dict) or answer.get("success") is False:
        words = " ".join((done.stdout + done.stderr).split())[-400:]
        raise Refused(f"flwr {' '.join(arguments[:2])} failed: {words}; is the coordinator up?")
    return answer


def nodes(home: Path) -> dict[str, str]:
    """What the SuperLink knows of each registered node: node id -> status (online, offline, registered...)."""
    listed = flwr(home, "supernode", "list", "loopback").get("nodes", [])
    assert isinstance(listed, list)  # noqa: S101 Flower's form, held by a test
    return {str(item["node-id"]): str(item["status"]) for item in listed}


def unregister(home: Path, node_id: str) -> None:
    flwr(home, "supernode", "unregister", node_id, "loopback")


def start_run(home: Path, *, job: str, use: int) -> str:
    """Start run number `use` of a job in the home, on the connected nodes; returns Flower's run id."""
    config = f'job="{job}" use={use}'
    return str(flwr(home, "run", f"{APP}=={VERSION}", "loopback", "-c", config)["run-id"])


def runs(home: Path) -> list[dict[str, object]]:
    """Flower's runs, newest first: run id, status, times."""
    listed = flwr(home, "ls", "loopback").get("runs", [])
    assert isinstance(listed, list)  # noqa: S101 Flower's form, held by a test
    return listed
