"""A full or failing disk at each write of a vault, and a clock set back: nothing leaves, memory is clean."""

import errno
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from fl_clients.institution import open_institution
from fl_clients.vault import VaultFailedError
from privacy.errors import Refused
from tests.scripted_vault import (
    BANK,
    OWNER,
    Driven,
    Template,
    check_after,
    digest,
    make_template,
    open_vault,
    refused,
    request,
    steps,
)

_WRITE, _SYNC, _CONNECT = os.write, os.fdatasync, sqlite3.connect


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return make_template(tmp_path_factory.mktemp("disk") / "template")


class BadDisk:
    """Fails the `first`-th write and, if `lasting`, all after it; counts them all."""

    def __init__(self, first: int | None, code: int, lasting: bool) -> None:
        self.passed = 0
        self.failed = 0
        self.on = True
        self._first, self._code, self._lasting = first, code, lasting

    def is_bad(self) -> bool:
        self.passed += 1
        bad = self._first is not None and (self.passed >= self._first if self._lasting else self.passed == self._first)
        self.failed += bad and self.on
        return bad and self.on

    def write(self, descriptor: int, data: bytes) -> int:
        if self.is_bad():
            if self._code == errno.ENOSPC:  # a full disk takes a part first
                _WRITE(descriptor, data[: len(data) // 3])
            raise OSError(self._code, os.strerror(self._code))
        return _WRITE(descriptor, data)

    def sync(self, descriptor: int) -> None:
        if self.is_bad():
            raise OSError(self._code, os.strerror(self._code))
        _SYNC(descriptor)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        disk = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
                if sql.split()[0] in ("COMMIT", "INSERT", "UPDATE") and disk.is_bad():
                    raise sqlite3.OperationalError("database or disk is full")
                return super().execute(sql, *args)

        def connect(*args: Any, **options: Any) -> sqlite3.Connection:
            return _CONNECT(*args, factory=Connection, **options)

        with (
            patch("os.write", self.write),
            patch("os.fdatasync", self.sync),
            patch("sqlite3.connect", connect),
        ):
            yield


def run(template: Template, driven: Driven, name: str) -> tuple[dict[str, str], str]:
    """(what was sent, the first step that was not answered: "" if none). Goes on asking after a failure."""
    sent, failed = {}, ""
    for party, step in steps(template.contract):
        if party != name:
            continue
        try:
            reply = driven.vault.handle(request(template, name, step.name))
        except VaultFailedError:
            failed = failed or step.name
            continue
        if refused(reply) is None:
            assert not failed, f"{step.name} was answered after {failed} had failed"
            sent[step.name] = digest(reply)
        else:
            failed = failed or step.name
    return sent, failed


@pytest.mark.parametrize(("code", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)])
@pytest.mark.parametrize("name", [BANK, OWNER])
def test_nothing_leaves_when_a_write_fails(
    template: Template, tmp_path: Path, name: str, code: int, lasting: bool
) -> None:
    """Each write of a run in turn: log, ledger, job book."""
    first, disk = 0, BadDisk(None, code, lasting)
    while True:
        first += 1
        home = template.copy(tmp_path / str(first))[name]
        disk = BadDisk(first, code, lasting)
        disk.on = False
        with disk.mounted():
            driven = open_vault(template, home, name)
            disk.on, disk.passed = True, 0
            sent, failed = run(template, driven, name)
        if not disk.failed:
            break
        assert failed, f"write {first} failed and every step was answered"
        if failed != "close" or driven.role.performed[-1:] != ["close"]:
            assert driven.role.destroyed == 1, (first, failed)
        assert driven.vault._forgotten
        check_after(template, home, name, sent)
        again = open_vault(template, home, name)
        begun = again.institution.jobs.get(template.contract.job).uses
        reply = again.vault.handle(request(template, name, "join"))
        assert (refused(reply) is not None) == bool(begun)
        again.institution.close()
        driven.institution.close()
        shutil.rmtree(tmp_path / str(first))
    assert first > 20
    assert not failed


@pytest.mark.parametrize("name", [BANK, OWNER])
def test_a_step_that_breaks_on_a_full_disk_fails_without_an_answer(
    template: Template, tmp_path: Path, name: str
) -> None:
    """Two things at once: the role breaks, and its end cannot be written. Memory is cleaned all the same."""
    driven = open_vault(template, template.copy(tmp_path / "homes")[name], name)
    step = "roster"
    driven.role.breaks_in = step
    assert refused(driven.vault.handle(request(template, name, "join"))) is None
    with (
        patch.object(driven.institution.jobs, "destroy", side_effect=Refused("the job book cannot be written")),
        pytest.raises(VaultFailedError, match=r"^ZeroDivisionError$"),
    ):
        driven.vault.handle(request(template, name, step))
    assert driven.role.destroyed == 1
    assert "stopped this job" in str(refused(driven.vault.handle(request(template, name, "match.1"))))


def test_the_end_of_a_step_that_broke_is_in_the_log(template: Template, tmp_path: Path) -> None:
    """Destruction is an entry of the log, also where nobody gets an answer any more."""
    driven = open_vault(template, template.copy(tmp_path / "homes")[BANK], BANK)
    driven.role.breaks_in = "roster"
    assert refused(driven.vault.handle(request(template, BANK, "join"))) is None
    with pytest.raises(VaultFailedError):
        driven.vault.handle(request(template, BANK, "roster"))
    found = driven.institution.log.entries(kind="destruction")
    assert [entry.body["reason"] for entry in found] == ["ZeroDivisionError in step roster"]
    assert "must not leave" not in str(found)


@pytest.mark.parametrize("name", [BANK, OWNER])
def test_a_really_full_file_system(template: Template, tmp_path: Path, name: str) -> None:
    """A tmpfs of 600 kB, filled up after half of the run."""
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k,mode=0700", "tmpfs", str(mount)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    try:
        home = template.copy(mount / "homes")[name]
        driven = open_vault(template, home, name)
        own = [step.name for party, step in steps(template.contract) if party == name]
        sent = {}
        for step in own[: len(own) // 2]:
            reply = driven.vault.handle(request(template, name, step))
            assert refused(reply) is None
            sent[step] = digest(reply)
        filler = mount / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (65536, 4096, 512, 1):
                with suppress(OSError):  # until not one byte more fits
                    while True:
                        file.write(b"\0" * size)
        # the last page of the log may still have room for one small entry; no step has room for ever
        failed = 0
        for step in own[len(own) // 2 :]:
            try:
                reply = driven.vault.handle(request(template, name, step))
            except VaultFailedError:
                failed += 1
                continue
            if refused(reply) is None:
                assert not failed
                sent[step] = digest(reply)
            else:
                failed += 1
        assert failed
        assert driven.role.destroyed == 1
        driven.institution.close()
        filler.unlink()
        check_after(template, home, name, sent)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


# --- clock -----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that can be set."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now


def after_two_steps(template: Template, home: Path, name: str) -> tuple[Driven, Clock]:
    clock = Clock()
    driven = open_vault(template, home, name, clock=clock)
    for step in ("join", "roster"):
        assert refused(driven.vault.handle(request(template, name, step))) is None
    return driven, clock


@pytest.mark.parametrize("name", [BANK, OWNER])
def test_a_clock_set_back_between_two_steps_stops_the_vault(template: Template, tmp_path: Path, name: str) -> None:
    """By a minute, still within the contract: the log would have entries out of order, so nothing leaves."""
    home = template.copy(tmp_path / "homes")[name]
    clock = Clock()
    clock.now = template.contract.not_before + timedelta(hours=2)
    driven = open_vault(template, home, name, clock=clock)
    assert refused(driven.vault.handle(request(template, name, "join"))) is None
    clock.now -= timedelta(minutes=1)
    with pytest.raises(VaultFailedError, match="audit log"):
        driven.vault.handle(request(template, name, "roster"))
    assert driven.role.destroyed == 1
    clock.now += timedelta(minutes=2)
    assert "stopped this job" in str(refused(driven.vault.handle(request(template, name, "match.1"))))
    check_after(template, home, name, {})


@pytest.mark.parametrize("name", [BANK, OWNER])
def test_a_clock_before_the_last_entry_when_the_node_starts(template: Template, tmp_path: Path, name: str) -> None:
    home = template.copy(tmp_path / "homes")[name]
    clock = Clock()
    clock.now = template.contract.not_before + timedelta(hours=3)
    driven = open_vault(template, home, name, clock=clock)
    assert refused(driven.vault.handle(request(template, name, "join"))) is None
    driven.institution.close()
    clock.now -= timedelta(hours=2)
    again = open_vault(template, home, name, clock=clock)
    with pytest.raises(VaultFailedError, match="audit log"):
        again.vault.handle(request(template, name, "join", use=1))
    assert not again.role.performed


Moved = Callable[[Template], datetime]


@pytest.mark.parametrize(
    ("moved", "words"),
    [
        (lambda t: t.contract.expires, "expired at"),
        (lambda t: t.contract.expires + timedelta(days=400), "expired at"),
    ],
)
@pytest.mark.parametrize("name", [BANK, OWNER])
def test_after_expiry_nothing_but_the_end(
    template: Template, tmp_path: Path, name: str, moved: Moved, words: str
) -> None:
    """Expired between two steps: refused, destroyed and logged; and setting the clock right again opens nothing."""
    home = template.copy(tmp_path / "homes")[name]
    driven, clock = after_two_steps(template, home, name)
    before = clock.now
    clock.now = moved(template)
    assert words in str(refused(driven.vault.handle(request(template, name, "match.1"))))
    assert driven.role.destroyed == 1
    assert "match.1" not in driven.role.performed
    assert [e.body["reason"] for e in driven.institution.log.entries(kind="destruction")]
    clock.now = before
    with pytest.raises(VaultFailedError):
        driven.vault.handle(request(template, name, "match.2"))
    driven.institution.close()


@pytest.mark.parametrize("name", [BANK, OWNER])
def test_before_the_contract_begins_no_step_is_answered(template: Template, tmp_path: Path, name: str) -> None:
    """A fresh home whose log does not yet know a later time than the contract's first moment."""
    home = template.copy(tmp_path / "homes")[name]
    clock = Clock()
    clock.now = template.contract.not_before - timedelta(seconds=1, milliseconds=500)
    driven = open_vault(template, home, name, clock=clock)
    try:
        reply = driven.vault.handle(request(template, name, "join"))
    except VaultFailedError:
        reply = b""
    assert not reply or "valid from" in str(refused(reply))
    assert driven.role.performed == []
    assert driven.institution.jobs.get(template.contract.job).uses == 0
    assert open_institution(home).log.entries(kind="release") == []
