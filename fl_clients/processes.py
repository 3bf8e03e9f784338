"""Child processes that are kept alive: started in order, restarted when they end, stopped in reverse order.

Flower refuses a node that returns within about a minute of a crash (exit code 305) and a SuperLink's port may be busy
for a while: a process that ends is started again after `pause_s`, for ever, until the supervisor is told to stop. A
child dies with its supervisor (Linux: parent death signal), so a killed supervisor leaves no process behind.
The children's environment carries no FLWR_ variable of the caller: only the ones written here.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from privacy.private_file import write_private

STOP_S = 15.0
_LARGEST_LOG = 20_000_000
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def environment(flower_home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a Flower process with its own home; offline, and free of the caller's FLWR_ settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FLWR_", "PYTHONSTARTUP"))}
    # the folder of this interpreter's programs first: Flower starts its own by name
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', os.defpath)}"
    return {**own, **OFFLINE, "FLWR_HOME": str(flower_home), **(more or {})}


def program(name: str) -> str:
    """Path of a program that was installed with this interpreter."""
    return str(Path(sys.executable).parent / name)


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to run. `ready` is asked until true before the next program starts."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    ready: Callable[[], bool] = lambda: True
    ready_s: float = 60.0


@dataclass
class _Running:
    program: Program
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    next_start: float = 0.0
    exits: list[int] = field(default_factory=list)


def _die_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Supervisor:
    """Keeps programs running until `stop`. `status` is a JSON file that says what runs."""

    def __init__(
        self, programs: Sequence[Program], *, status: Path, say: Callable[[str], None], pause_s: float = 3.0
    ) -> None:
        self._running = [_Running(program) for program in programs]
        self._status = status
        self._say = say
        self._pause_s = pause_s
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def wait(self, seconds: float) -> bool:
        """Wait; True when told to stop."""
        return self._stop.wait(seconds)

    def run(self) -> None:
        """Start all, keep them alive, return after `stop` when all have ended. Call it from the main thread."""
        try:
            for item in self._running:
                self._start(item)
                self._await(item)
            while not self._stop.wait(0.2):
                for item in self._running:
                    self._tend(item)
        finally:
            for item in reversed(self._running):
                self._end(item)
            self._status.unlink(missing_ok=True)

    def _start(self, item: _Running) -> None:
        if self._stop.is_set():
            return
        program = item.program
        # a log that is appended to for ever would fill the disk: the last one is kept, nothing older
        if program.log.exists() and program.log.stat().st_size > _LARGEST_LOG:
            program.log.replace(program.log.with_suffix(".old"))
        descriptor = os.open(program.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as log:
            item.process = subprocess.Popen(  # noqa: S603 the commands are written in this project
                list(program.command),
                env=dict(program.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=program.log.parent,  # a neutral folder: a process may import from where it starts
                preexec_fn=_die_with_parent,
                start_new_session=True,
            )
        item.starts += 1
        self._write_status()

    def _await(self, item: _Running) -> None:
        deadline = time.monotonic() + item.program.ready_s
        while not self._stop.is_set() and not item.program.ready():
            if time.monotonic() > deadline:
                self._say(
                    f"{item.program.name} is not ready after {item.program.ready_s:.0f} s; see {item.program.log}"
                )
                return
            self._tend(item)
            self._stop.wait(0.1)

    def _tend(self, item: _Running) -> None:
        if item.process is not None and item.process.poll() is not None:
            code = item.process.returncode
            item.exits.append(code)
            del item.exits[:-5]
            item.process = None
            item.next_start = time.monotonic() + self._pause_s
            self._say(f"{item.program.name} ended with {code}; it starts again in {self._pause_s:g} s")
            self._write_status()
        if item.process is None and time.monotonic() >= item.next_start:
            self._start(item)

    def _end(self, item: _Running) -> None:
        process = item.process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._say(f"{item.program.name} did not end within {STOP_S:g} s and is killed")
            process.kill()
            process.wait()
        item.process = None

    def _write_status(self) -> None:
        state = {
            "supervisor": os.getpid(),
            "programs": {
                item.program.name: {
                    "pid": item.process.pid if item.process else None,
                    "starts": item.starts,
                    "last_exits": item.exits,
                }
                for item in self._running
            },
        }
        write_private(self._status, json.dumps(state, indent=2).encode())


def stop_on_signals(supervisor: Supervisor) -> None:
    """SIGTERM and SIGINT stop the supervisor, which stops its programs in order."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())


def running_supervisor(status: Path) -> int | None:
    """Process id of the supervisor that wrote this status file, if it still lives."""
    try:
        pid = int(json.loads(status.read_bytes())["supervisor"])
        os.kill(pid, 0)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid
