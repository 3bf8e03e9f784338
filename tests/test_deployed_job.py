"""A governed job over the network: coordinator, three banks and PBOC as processes of their own, TLS on loopback."""

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fl_clients import node as node_processes
from fl_clients.audit_cli import app as audit_app
from fl_clients.institution import JOBS
from fl_clients.processes import program
from fl_server import enrolment, superlink
from tests.governed_job import DRAFT, PARTIES, agree, command, node, prepare, server

pytestmark = pytest.mark.slow

WAIT_S = 120.0


def until(what: str, condition: Callable[[], bool]) -> None:
    """Wait for a condition; a wait that never ends is a failure with a name."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S:.0f} s: {what}"
        time.sleep(0.25)


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for start in range(23000, 60000, 89):
        try:
            for port in range(start, start + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return start
    raise AssertionError("no free ports")


def process(name: str, *words: str, home: Path, expect: int = 0) -> str:
    """One command as a process, with the home by option; its output."""
    done = subprocess.run(
        [program(name), *words, "--home", str(home)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "COLUMNS": "200"},
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == expect, (words, done.stdout, done.stderr)
    return done.stdout + done.stderr


@dataclass(frozen=True, kw_only=True)
class Federation:
    """Connected institutions."""

    folder: Path
    homes: dict[str, Path]

    @property
    def coordinator(self) -> Path:
        return self.folder / "home-coordinator"

    def online(self) -> set[str]:
        known = superlink.nodes(self.coordinator)
        members = enrolment.read_book(self.coordinator).current()
        return {member.name for member in members if known.get(member.node_id) == "online"}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("d")
    made = Federation(folder=folder, homes=prepare(folder))
    server(made.coordinator, "init", "localhost", "--port", str(free_ports(4)))
    server(made.coordinator, "invite", *(f"{name}={role}" for name, role in PARTIES.items()))
    try:
        process("xinyi-server", "up", "--detach", home=made.coordinator)
        for name, home in made.homes.items():
            node(home, "join", made.coordinator / "invites" / f"{name}.invite")
            process("xinyi-node", "run", "--detach", home=home)
        until("all nodes online", lambda: made.online() == set(PARTIES))
        yield made
    finally:
        for home in made.homes.values():
            node_processes.down(home)
        superlink.down(made.coordinator)


def logs(federation: Federation) -> str:
    """What every process wrote, for the message of a failure."""
    return "\n".join(
        f"--- {path}\n{path.read_text(errors='replace')[-3000:]}"
        for home in (federation.coordinator, *federation.homes.values())
        for path in sorted((home / "logs").glob("*.log"))
    )


def test_a_job_over_tls_and_lanes_ends_with_a_valid_certificate_and_clean_logs(
    federation: Federation, capsys: pytest.CaptureFixture[str]
) -> None:
    job = agree(federation.folder, federation.homes)  # the nodes run already: a new job needs no restart
    started = time.monotonic()
    try:
        said = process("xinyi-server", "job", "start", job[:8], home=federation.coordinator)
    except AssertionError:
        print(logs(federation))
        raise
    seconds = time.monotonic() - started
    result = federation.coordinator / JOBS / job / "runs" / "1" / "result"
    assert str(result) in said
    whole = json.loads((result / "certificate.json").read_text())
    assert set(whole["signatures"]) == {"coordinator", *PARTIES}
    assert "valid" in command(audit_app, "certificate", result / "certificate.json", home=federation.folder)
    audits = [home / "audit" for home in federation.homes.values()]
    assert "clean" in command(audit_app, "verify", *audits, home=federation.folder)
    for name, home in federation.homes.items():
        assert any(json.loads((home / JOBS / job / "model.1.json").read_text())["weights"]), name
        assert "destroyed" in node(home, "job", "list")
    codes = [line.split(",")[0].strip('"') for line in (federation.folder / "bank1.csv").read_text().splitlines()[1:]]
    assert len(codes) > 900
    for home in (federation.coordinator, *federation.homes.values()):
        for log in (home / "logs").iterdir():
            text = log.read_text(errors="replace")
            assert "Traceback" not in text, log
            assert not any(code in text for code in codes), log
    with capsys.disabled():
        print(f"\njob over the network: {seconds:.1f} s")
    # the coordinator and every vault count the runs
    assert "its contract allows 1" in process(
        "xinyi-server", "job", "start", job, home=federation.coordinator, expect=2
    )


def test_a_job_is_refused_before_it_begins_where_a_party_is_revoked(federation: Federation) -> None:
    """The last test of this file: it changes who is a member."""
    folder, coordinator = federation.folder, federation.coordinator
    job = agree(folder, federation.homes, DRAFT.replace("epsilon = 8.0", "epsilon = 2.0"))
    process("xinyi-server", "revoke", "bank3", home=coordinator)
    said = process("xinyi-server", "job", "start", job, home=coordinator, expect=2)
    assert "bank3 of the contract is no member" in said
    assert not (coordinator / JOBS / job / "runs").exists(), "no run was begun"
    assert "8 of 12, left 4" in node(federation.homes["bank1"], "budget")
