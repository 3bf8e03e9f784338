"""SIGKILL at every write of a vault, before, in the middle and after it, and at random moments; and two jobs at once.

Each run is a child process over homes of its own on the disk; what it sent reaches the parent through a pipe, after
`handle` returned. Afterwards: everything sent is in the log and paid for, the books open, the use is spent.
"""

import json
import os
import random
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest

from fl_clients import auditor
from fl_clients.institution import AUDIT, open_institution
from fl_clients.protocol import decode_request
from fl_clients.roster import Roster
from simulations.job import admit
from tests.scripted_vault import (
    BANK,
    DATA_SET,
    EPSILON,
    OWNER,
    Template,
    altered,
    body,
    check_after,
    digest,
    make_template,
    open_vault,
    refused,
    request,
    sign_all,
    steps,
)
from tests.small_federation import Call, run_tapped, small_federation, small_parties

RANDOM_KILLS = 60
FEDERATION_KILLS = 6
LEAST_KILLS = 200

_WRITE, _SYNC, _CONNECT = os.write, os.fdatasync, sqlite3.connect


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class WritePoints:
    """Counts every write of this process to log, ledger and job book; dies at number `victim`, if any, as `how` says.

    how: "before" the write, "half" way (a torn line of the log), "after" it.
    """

    def __init__(self, victim: int | None, how: str) -> None:
        self.passed = 0
        self._victim, self._how = victim, how

    def _is_victim(self) -> bool:
        self.passed += 1
        return self.passed == self._victim

    def around(self, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        if not self._is_victim():
            return act()
        if self._how == "before":
            die()
        if self._how == "half" and half is not None:
            half()
            die()
        act()
        die()
        raise AssertionError("alive after SIGKILL")

    def install(self) -> None:
        points = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                if sql.split()[0] in ("COMMIT", "INSERT", "UPDATE"):
                    found: sqlite3.Cursor = points.around(lambda: super(Connection, self).execute(sql, *args))
                    return found
                return super().execute(sql, *args)

        def write(descriptor: int, data: bytes) -> int:
            written: int = points.around(
                lambda: _WRITE(descriptor, data), lambda: _WRITE(descriptor, data[: len(data) // 2])
            )
            return written

        os.write = write
        os.fdatasync = lambda descriptor: points.around(lambda: _SYNC(descriptor))
        sqlite3.connect = lambda *args, **options: _CONNECT(*args, factory=Connection, **options)  # type: ignore[assignment,misc]


def in_child(work: Callable[[Callable[[dict[str, Any]], None]], None], kill_after_s: float | None = None) -> Any:
    """Run `work(tell)` in a forked child; (everything it told, whether it was killed). Child and pipe end here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            work(lambda told: None if _WRITE(writing, json.dumps(told).encode() + b"\n") else None)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with os.fdopen(reading, "rb") as pipe:
        told = [json.loads(line) for line in pipe.read().splitlines()]
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.WEXITSTATUS(status) == 0, "the child failed instead of being killed"
    return told, killed


def run_of(template: Template, homes: dict[str, Path], points: WritePoints) -> Callable[..., None]:
    """The whole run of a bank and an owner; heads go round as the coordinator passes them on."""

    def work(tell: Callable[[dict[str, Any]], None]) -> None:
        points.install()
        driven = {name: open_vault(template, home, name) for name, home in homes.items()}
        unseen: dict[str, list[Any]] = {name: [] for name in driven}
        for name, step in steps(template.contract):
            heads, unseen[name] = tuple(unseen[name]), []
            reply = driven[name].vault.handle(request(template, step.name, heads=heads))
            tell({"party": name, "step": step.name, "reply": digest(reply), "refused": body(reply)["refused"]})
            head = msgpack.unpackb(reply)[3]
            if head is not None:
                unseen[OWNER if name == BANK else BANK].append(head)
        tell({"points": points.passed})

    return work


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return make_template(tmp_path_factory.mktemp("kills") / "template", uses=2)


def check_killed(template: Template, homes: dict[str, Path], told: list[dict[str, Any]]) -> None:
    """After a kill: the books, then a restart that a malicious coordinator would like to use for a second look."""
    assert all(line["refused"] is None for line in told if "party" in line)
    report = auditor.verify([home / AUDIT for home in homes.values()])
    assert [f for f in report.findings if "recovered" not in f.text and "never finished" not in f.text] == []
    for name, home in homes.items():
        sent = {line["step"]: line["reply"] for line in told if line.get("party") == name}
        check_after(template, home, name, sent)
        driven = open_vault(template, home, name)
        uses = driven.institution.jobs.get(template.contract.job).uses
        reserved = {u.use for u in driven.institution.ledger.spent(DATA_SET, template.data.budget.delta).uses}
        again = refused(driven.vault.handle(request(template, "join", use=1)))
        driven.institution.close()
        assert (again is not None) == (uses >= 1), (name, again)
        assert bool(sent) <= (uses >= 1)
        assert reserved <= {1}
        if name != BANK:
            continue
        # the next use is another run: it pays again, and the data set has no room for it once the first had reserved
        driven = open_vault(template, home, name)
        assert refused(driven.vault.handle(request(template, "join", use=2))) is None
        second = refused(driven.vault.handle(request(template, "roster", use=2)))
        assert (second is not None) == bool(reserved), second
        assert not reserved or "would have spent" in str(second)
        driven.institution.close()
        driven = open_vault(template, home, name)
        assert "its contract allows 2" in str(refused(driven.vault.handle(request(template, "join", use=3))))
        driven.institution.close()


def test_every_write_point_survives_a_kill_and_so_do_random_moments(template: Template, tmp_path: Path) -> None:
    kills = 0
    homes = template.copy(tmp_path / "whole")
    started = time.monotonic()
    told, killed = in_child(run_of(template, homes, WritePoints(None, "")))
    takes_s = time.monotonic() - started
    assert not killed
    points = told[-1]["points"]
    assert points > 100
    assert len(told) == 1 + len(list(steps(template.contract)))
    for victim in range(1, points + 1):
        for how in ("before", "half", "after")[victim % 2 :: 2] if victim % 3 else ("half", "after"):
            homes = template.copy(tmp_path / f"{victim}-{how}")
            told, killed = in_child(run_of(template, homes, WritePoints(victim, how)))
            assert killed, (victim, how)
            kills += 1
            check_killed(template, homes, told)
    rng = random.Random(4)
    for number in range(RANDOM_KILLS):
        homes = template.copy(tmp_path / f"random-{number}")
        told, killed = in_child(run_of(template, homes, WritePoints(None, "")), rng.uniform(0.0, takes_s))
        kills += killed
        check_killed(template, homes, told)
    assert kills >= LEAST_KILLS


def test_a_whole_federation_with_real_cryptography_is_killed_at_random_writes(tmp_path: Path) -> None:
    """All parties in one child; every home is consistent with what left it."""
    federation = small_federation(banks=2, owners=1, enterprises=200)
    rng = random.Random(7)

    for number in range(FEDERATION_KILLS):
        folder = tmp_path / str(number)
        folder.mkdir()
        victim = rng.randrange(60, 330)

        def work(tell: Callable[[dict[str, Any]], None], folder: Path = folder, victim: int = victim) -> None:
            tempfile.tempdir = str(folder)
            WritePoints(victim, rng.choice(["before", "half", "after"])).install()
            parties = small_parties(federation, rounds=1, epsilon=EPSILON)
            tell({"homes": {name: str(i.home) for name, i in parties.institutions.items()}})

            def tap(party: str, data: bytes, call: Call) -> bytes:
                reply = call(data)
                step = decode_request(data, parties.contract).step
                tell({"party": party, "step": step, "reply": digest(reply), "refused": body(reply)["refused"]})
                return reply

            run_tapped(parties, tap)

        told, killed = in_child(work)
        assert killed, victim
        homes = {name: Path(home) for name, home in told[0]["homes"].items()}
        report = auditor.verify([home / AUDIT for home in homes.values()])
        assert [f for f in report.findings if "never finished" not in f.text] == []
        for name, home in homes.items():
            sent = {line["step"]: line["reply"] for line in told[1:] if line["party"] == name}
            institution = open_institution(home)
            logged = {e.body["reply"] for e in institution.log.entries(kind="release")}
            assert set(sent.values()) <= logged
            if name.startswith("bank"):
                uses = institution.ledger.spent("simulated", 1e-5).uses
                performed = {c.charge.name: c.performed for use in uses for c in use.charges}
                assert all(c.performed <= c.reserved for use in uses for c in use.charges)
                for step in sent:
                    for release in Roster.released_in(step):
                        performed[release] -= 1
                assert all(left >= 0 for left in performed.values()), performed
            else:
                opened = sum(step.endswith("direction") or step == "score" for step in sent)
                assert len(institution.ledger.openings("simulated").calls) >= opened
            assert not sent or institution.jobs.all()[0].uses == 1
            institution.close()


# --- two jobs at once ------------------------------------------------------------------------------------------------


def test_two_processes_race_for_the_last_epsilon_and_exactly_one_gets_it(template: Template, tmp_path: Path) -> None:
    """Two jobs over one data set, whose budget has room for one; each in a process of its own, on the same home."""
    for number in range(8):
        homes = template.copy(tmp_path / str(number))
        institution = open_institution(homes[BANK])
        contracts = []
        for _ in range(2):
            contract = altered(template.contract, job=os.urandom(16).hex())
            contracts.append(sign_all(contract, template.identities, template.coordinator))
            admit(institution, contracts[-1])
        institution.close()
        told, done = [], []
        gate_reading, gate_writing = os.pipe()
        for place, signed in enumerate(contracts):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    driven = open_vault(template, homes[BANK], BANK, signed=signed)
                    joined = driven.vault.handle(request(template, "join", signed=signed))
                    assert refused(joined) is None
                    _WRITE(writing, b"r")
                    os.read(gate_reading, 1)
                    reply = driven.vault.handle(request(template, "roster", signed=signed))
                    _WRITE(writing, (refused(reply) or "").encode()[:4000])
                    code = 0
                finally:
                    os._exit(code)
            os.close(writing)
            told.append(reading)
            done.append((place, child))
        for reading in told:
            assert os.read(reading, 1) == b"r"
        _WRITE(gate_writing, b"gg")
        reasons = []
        for reading, (_, child) in zip(told, done, strict=True):
            with os.fdopen(reading, "rb") as pipe:
                reasons.append(pipe.read().decode())
            assert os.waitpid(child, 0)[1] == 0
        os.close(gate_reading)
        os.close(gate_writing)
        assert sorted(bool(reason) for reason in reasons) == [False, True], reasons
        assert "would have spent" in "".join(reasons)
        institution = open_institution(homes[BANK])
        spent = institution.ledger.spent(DATA_SET, template.data.budget.delta)
        assert len(spent.uses) == 1
        assert spent.epsilon <= EPSILON
        institution.close()
