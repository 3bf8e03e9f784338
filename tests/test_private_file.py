"""Private files and databases: a database stays whole when several processes and connections share it."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from privacy.errors import Refused
from privacy.private_file import private_database

ROOT = Path(__file__).resolve().parents[1]
VISITOR = (
    "import sys; from pathlib import Path; from privacy.private_file import private_database as open_it\n"
    "database = open_it(Path(sys.argv[1]), 5.0)\n"
    "database.execute('INSERT INTO item (value) VALUES (1)')\n"
    "database.close()\n"
)


def visit(path: Path) -> None:
    """Another process opens the database, writes a row and closes it, as a command beside a running vault does."""
    subprocess.run([sys.executable, "-c", VISITOR, str(path)], cwd=ROOT, check=True, timeout=60)


def test_two_connections_of_one_process_keep_their_locks_while_other_processes_come_and_go(tmp_path: Path) -> None:
    """A vault has ledger and job book in one file. Whoever is last to close a database takes its log away."""
    path = tmp_path / "vault.sqlite"
    first = private_database(path, 5.0)
    first.execute("CREATE TABLE item (value INTEGER)")
    second = private_database(path, 5.0)
    for visits in range(1, 4):
        visit(path)
        assert path.with_name("vault.sqlite-wal").exists(), "the visitor believed to be the last one"
        for database in (first, second):
            database.execute("INSERT INTO item (value) VALUES (2)")
        assert first.execute("SELECT count(*) FROM item").fetchone() == (3 * visits,)
    for database in (first, second):
        assert database.execute("SELECT count(*) FROM item").fetchone() == (9,)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        database.close()


def test_a_database_is_its_owners_alone_and_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    private_database(path, 1.0).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(Refused, match="mode 0640"):
        private_database(path, 1.0)
    path.chmod(0o600)
    link = tmp_path / "link.sqlite"
    os.symlink(path, link)
    with pytest.raises(Refused, match="mode"):
        private_database(link, 1.0)
    with pytest.raises(Refused, match="existing folder"):
        private_database(tmp_path / "absent" / "a.sqlite", 1.0)
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(Refused, match="restore"):
        private_database(path, 1.0)
