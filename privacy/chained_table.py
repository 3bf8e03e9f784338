"""An append-only table in an SQLite file, whose rows are chained by SHA-256; several processes may append.

Guarantee: a row is on the disk when `append` returns (WAL, synchronous FULL), or nothing was written and it raises. A
row that was altered, removed or put elsewhere is found on opening, and a shortened or exchanged file when its `Head` of
earlier (kept elsewhere, in the audit log) is given. Whoever may write the file can rewrite all of it consistently: only
such a head shows that.
Formula: digest(n) = SHA-256(digest(n - 1) | number, time, kind, data set, job, use, body, blob, length-prefixed).
Source: SQLite write-ahead log (sqlite.org/wal.html); Schneier, Kelsey 1999 (hash-chained logs).
"""

import hashlib
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from privacy.errors import Refused
from privacy.sealing import encode_fields

CLOCK_TOLERANCE = timedelta(seconds=2)
"""A clock may step back by so much without being called set back."""

_BUSY_S = 30.0
_GENESIS = hashlib.sha256(b"xinyi privacy ledger 1").digest()
_COLUMNS = "number, time, kind, data_set, job, use, body, blob, digest"
_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS ledger (
        number INTEGER PRIMARY KEY, time TEXT NOT NULL, kind TEXT NOT NULL, data_set TEXT NOT NULL, job TEXT NOT NULL,
        use INTEGER NOT NULL, body TEXT NOT NULL, blob BLOB NOT NULL, digest BLOB NOT NULL) STRICT""",
    # against slips of other modules in the same file; against malice there is the chain
    """CREATE TRIGGER IF NOT EXISTS ledger_keeps_rows BEFORE DELETE ON ledger
        BEGIN SELECT RAISE(ABORT, 'rows of the privacy ledger are never removed'); END""",
    """CREATE TRIGGER IF NOT EXISTS ledger_keeps_values BEFORE UPDATE ON ledger
        BEGIN SELECT RAISE(ABORT, 'rows of the privacy ledger are never changed'); END""",
)


@dataclass(frozen=True, kw_only=True)
class Head:
    """The table up to a row: how many rows, and the digest (hex) of the last. Safe to log and to show."""

    count: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A row to append. `body`: JSON text."""

    kind: str
    data_set: str
    job: str
    use: int
    body: str
    blob: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Row(Draft):
    """A row of the table."""

    number: int
    time: str
    digest: bytes

    @property
    def head(self) -> Head:
        return Head(count=self.number, digest=self.digest.hex())

    @property
    def when(self) -> datetime:
        return datetime.fromisoformat(self.time)


class ChainedTable:
    """One connection to the table. `learn` is given every row once, in order, by whichever process it was written.

    Threads may share it; a forked child must open its own (an SQLite connection does not survive a fork).
    """

    def __init__(self, path: Path, learn: Callable[[Row], None], expected: Head | None = None) -> None:
        self._path = path
        self._learn = learn
        self._count, self._digest = 0, _GENESIS
        self._latest = datetime(1970, 1, 1, tzinfo=UTC)
        self._lock = threading.Lock()
        self._process = os.getpid()
        with self._refusing():
            if expected is not None and expected.count and not os.path.lexists(path):
                raise self._damaged(f"is missing, the audit log knows {expected.count} rows of it")
            self._file = _own_file(path)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._refusing():
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = FULL")
                with self._transaction():
                    for statement in _SCHEMA:
                        self._connection.execute(statement)
                    self._catch_up()
                    rows = self._connection.execute("SELECT count(*) FROM ledger").fetchone()[0]
                    if rows != self._count:
                        raise self._damaged(f"has {rows} rows, {self._count} of them in order")
                    if expected is not None:
                        self._check(expected)
        except BaseException:
            self._connection.close()
            raise

    def __repr__(self) -> str:
        return f"ChainedTable({str(self._path)!r}, {self._count} rows)"

    def close(self) -> None:
        """Afterwards every call is `Refused`."""
        with self._lock:
            self._connection.close()

    def refresh(self) -> Head:
        """Learn what other processes appended; the head."""
        with self._lock, self._refusing():
            # a read transaction would do; this one also says at once when the file cannot be written
            with self._transaction():
                self._catch_up()
            return Head(count=self._count, digest=self._digest.hex())

    def check(self, expected: Head) -> None:
        """`Refused` unless the table has `expected` as its head or had it once."""
        with self._lock, self._refusing(), self._transaction():
            self._catch_up()
            self._check(expected)

    def append(self, now: datetime, decide: Callable[[], Draft]) -> Row:
        """Append the row of `decide`, which is called when everything before was learned and nobody else can write.

        What it raises leaves the table as it was. `Refused`: the clock was set back, or the file cannot be written.
        """
        if now.tzinfo is None:
            raise Refused(f"time {now.isoformat()} has no time zone; give it in UTC")
        now = now.astimezone(UTC)
        with self._lock, self._refusing():
            with self._transaction():
                self._catch_up()
                if now < self._latest - CLOCK_TOLERANCE:
                    raise Refused(
                        f"the clock was set back: it is {now.isoformat()}, the privacy ledger's last row is of "
                        f"{self._latest.isoformat()}; set the clock right, nothing is released until then"
                    )
                draft = decide()
                number, time = self._count + 1, now.isoformat(timespec="microseconds")
                digest = _chain(self._digest, number, time, draft)
                self._connection.execute(
                    f"INSERT INTO ledger ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                    (
                        *(number, time, draft.kind, draft.data_set, draft.job, draft.use),
                        *(draft.body, draft.blob, digest),
                    ),
                )
            # through the same door as other processes' rows: what was written is what counts
            row = self._read(number)
            self._accept(row)
            return row

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise Refused(
                f"the privacy ledger {self._path} cannot be used ({error}); nothing is released until it can: free the "
                "disk, restore the file or its rights"
            ) from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if os.getpid() != self._process:
            raise Refused(f"the privacy ledger {self._path} was opened by another process; open it anew after a fork")
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            # SQLite would go on writing into a file that has no name any more
            if _identity(os.lstat(self._path)) != self._file:
                raise Refused(
                    f"the privacy ledger {self._path} was replaced while in use; nothing is released, put the file back"
                )
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def _catch_up(self) -> None:
        if self._count:
            self._read(self._count, self._digest)
        query = f"SELECT {_COLUMNS} FROM ledger WHERE number > ? ORDER BY number"  # noqa: S608
        for values in self._connection.execute(query, (self._count,)):
            self._accept(_row(values))

    def _accept(self, row: Row) -> None:
        if row.number != self._count + 1:
            raise self._damaged(f"lacks row {self._count + 1}")
        if row.digest != _chain(self._digest, row.number, row.time, row):
            raise self._damaged(f"was altered at row {row.number}, or a row before it was removed")
        self._learn(row)
        self._count, self._digest, self._latest = row.number, row.digest, max(self._latest, row.when)

    def _read(self, number: int, digest: bytes | None = None) -> Row:
        query = f"SELECT {_COLUMNS} FROM ledger WHERE number = ?"  # noqa: S608
        values = self._connection.execute(query, (number,)).fetchone()
        if values is None:
            raise self._damaged(f"lacks row {number}")
        row = _row(values)
        if digest is not None and row.digest != digest:
            raise self._damaged(f"was altered at row {number} while in use")
        return row

    def _check(self, expected: Head) -> None:
        if expected.count > self._count:
            raise self._damaged(f"has {self._count} rows, the audit log knows {expected.count}: rows were removed")
        known = self._read(expected.count).digest if expected.count else _GENESIS
        if known.hex() != expected.digest:
            raise self._damaged(f"is not the one that the audit log knows: row {expected.count} differs")

    def _damaged(self, what: str) -> Refused:
        return Refused(
            f"the privacy ledger {self._path} {what}; nothing is released: restore the newest backup that the audit "
            "log agrees with"
        )


def empty_head() -> Head:
    """The head of a table without rows."""
    return Head(count=0, digest=_GENESIS.hex())


def _row(values: tuple[int, str, str, str, str, int, str, bytes, bytes]) -> Row:
    number, time, kind, data_set, job, use, body, blob, digest = values
    return Row(
        number=number, time=time, kind=kind, data_set=data_set, job=job, use=use, body=body, blob=blob, digest=digest
    )


def _chain(before: bytes, number: int, time: str, draft: Draft) -> bytes:
    texts = (str(number), time, draft.kind, draft.data_set, draft.job, str(draft.use), draft.body)
    fields = [before, *(text.encode() for text in texts), draft.blob]
    return hashlib.sha256(encode_fields(fields)).digest()


def _own_file(path: Path) -> tuple[int, int]:
    """Device and inode of the file, made with mode 0600 if absent."""
    # never open and close an existing database here: that would drop this process's locks on it
    if not os.path.lexists(path):
        with suppress(FileExistsError):  # another process was first
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    status = os.lstat(path)
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"the privacy ledger {path} is no plain file; give the path of the file itself")
    if mode & 0o077:
        raise Refused(f"the privacy ledger {path} has mode {mode:04o}, at most 0600 is safe; chmod 600 {path}")
    if not os.access(path, os.R_OK | os.W_OK):
        # SQLite would open it for reading and say so at the first release only
        raise Refused(f"the privacy ledger {path} cannot be used (read-only); nothing is released until it can")
    return _identity(status)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
