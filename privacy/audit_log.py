"""A party's audit log: what it appended stays, in order, under heads that it signs and others keep.

Guarantee: when `append` returns, its entries are on the disk and under a signed head; when it raises, none of them is,
so a caller that appends before it sends never sends what is not logged. On opening every hash, signature, index and
time is checked. Against: crashes, full disks, clocks set back, several writers; and, together with the heads that other
parties hold, against the party itself. A log cut at an earlier head opens here: only those heads can show it.
Formula: append = one write of the entries' lines and the head's line, then fdatasync, under an exclusive flock.
Source: format and tree in privacy/audit_format.py and privacy/merkle.py (RFC 6962); docs/audit.md.
"""

import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from privacy.audit_format import (
    LOG_FILE,
    PARTY_FILE,
    VERSION,
    Entry,
    InclusionProof,
    LoggedEntry,
    SignedHead,
    canonical,
    countersign,
    entry_line,
    head_line,
    parse_line,
    sign_head,
    utc_text,
    utc_time,
    verify_countersignature,
    verify_head,
)
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.merkle import MerkleTree, leaf_hash

__all__ = [
    "AuditFailed",
    "AuditLog",
    "Entry",
    "InclusionProof",
    "LoggedEntry",
    "SignedHead",
    "countersign",
    "verify_countersignature",
    "verify_head",
]

CLOCK_TOLERANCE = timedelta(seconds=2)


class AuditFailed(Refused):
    """Nothing was logged, so nothing may leave."""


class AuditLog:
    """The log of one party in one folder (mode 0700; files 0600). Threads and processes may append at once.

    `clock` gives the present time with its zone. The folder and an empty log are made where absent; a damaged log, one
    of another party or key, or a folder that others may read is `Refused` with the line of the damage.
    """

    def __init__(self, folder: Path, identity: SigningIdentity, party: str, clock: Callable[[], datetime]) -> None:
        if not 1 <= len(party) <= 64:
            raise Refused(f"a party's name has 1 to 64 characters, not {len(party)}")
        self._folder, self._identity, self._party, self._clock = folder, identity, party, clock
        self._path = folder / LOG_FILE
        self._thread_lock = threading.RLock()
        self._tree = MerkleTree()
        self._end = 0  # bytes of the file that are read and verified; always just after a head's line
        self._lines = 0
        self._time = ""
        self._last_head: SignedHead | None = None
        self._file_number: int | None = None
        self._unusable = ""
        self._prepare()
        with self._locked():
            pass

    def __repr__(self) -> str:
        return f"AuditLog({self._party!r}, {len(self._tree)} entries)"

    @property
    def party(self) -> str:
        return self._party

    @property
    def size(self) -> int:
        """Entries in the log, those of other processes included."""
        with self._locked():
            return len(self._tree)

    def append(self, entries: Sequence[Entry]) -> SignedHead:
        """Log the entries, in order, all or none; the new head. `AuditFailed` if they are not safely on the disk."""
        if not entries:
            raise AuditFailed("nothing to append to the audit log; give at least one entry")
        try:
            with self._locked() as descriptor:
                return self._write(descriptor, entries)
        except AuditFailed:
            raise
        except Refused as error:
            raise AuditFailed(str(error)) from None

    def head(self) -> SignedHead:
        """The newest head. Of an empty log: a fresh one of size 0, which is not written."""
        with self._locked():
            return self._head()

    def inclusion(self, index: int) -> InclusionProof:
        """The entry at `index` with its proof against the newest head."""
        with self._locked():
            head, end = self._head(), self._end
            path = self._tree.inclusion(index, head.size)
        line = next(entry.line for entry in self._read(end) if entry.index == index)
        return InclusionProof(line=line, path=tuple(path), head=head)

    def consistency(self, first_size: int, second_size: int | None = None) -> list[bytes]:
        """Hashes that prove the log of `first_size` entries to be a prefix of that of `second_size` (the newest)."""
        with self._locked():
            return self._tree.consistency(first_size, second_size)

    def entries(
        self, *, start: int = 0, stop: int | None = None, kind: str | None = None, job: str | None = None
    ) -> list[LoggedEntry]:
        """Entries with start <= index < stop, of one kind and of one job where given, in order."""
        with self._locked():
            end = self._end
        return [
            entry
            for entry in self._read(end)
            if start <= entry.index
            and (stop is None or entry.index < stop)
            and (kind is None or entry.kind == kind)
            and (job is None or entry.job == job)
        ]

    def close(self) -> None:
        """No more use of this object: every later call is `AuditFailed`. No file is held open between calls."""
        self._unusable = self._unusable or "was closed; open it again"

    def _prepare(self) -> None:
        """Make folder and files where absent; check the modes and whose log it is."""
        wanted = canonical({"identity": self._identity.public.hex(), "party": self._party, "version": VERSION}) + b"\n"
        about = self._folder / PARTY_FILE
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = stat.S_IMODE(self._folder.stat().st_mode)
            if mode & 0o077:
                raise Refused(f"audit folder {self._folder} has mode {mode:04o}, at most 0700 is safe; chmod it")
            if not about.exists():
                # the log first, the party file last and whole: a party file without a log is a log that was taken away
                _create(self._path, b"", may_exist=True)
                if self._path.stat().st_size and not about.exists():  # another process may have been first
                    raise Refused(f"audit folder {self._folder} has a log but no {PARTY_FILE}; restore it")
                fresh = self._folder / f".{PARTY_FILE}.{os.urandom(8).hex()}"
                _create(fresh, wanted, may_exist=False)
                os.replace(fresh, about)
                _sync_folder(self._folder)
            with open(os.open(about, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                _check_plain(file.fileno(), about)
                found = file.read(len(wanted) + 1)
        except OSError as error:
            raise Refused(f"audit folder {self._folder}: {error.strerror}; it must be a folder of this user") from None
        if found != wanted:
            raise Refused(f"audit folder {self._folder} is the log of another party or identity; open it with that one")

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, opened anew and locked against every other thread and process, with all that is in it verified.

        Opened anew, because a child made by fork would share the lock of an inherited file, and because a file that
        was put in the place of the log must be noticed.
        """
        with self._thread_lock:
            if self._unusable:
                raise AuditFailed(f"audit log {self._path} {self._unusable}")
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                raise AuditFailed(f"audit log {self._path}: {error.strerror}; nothing may leave without it") from None
            try:
                _check_plain(descriptor, self._path)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._catch_up(descriptor)
                yield descriptor
            except OSError as error:
                raise AuditFailed(f"audit log {self._path}: {error.strerror}; nothing may leave without it") from None
            finally:
                os.close(descriptor)

    def _catch_up(self, descriptor: int) -> None:
        """Verify what was appended since the last look; cut off a batch that was never finished, and log that."""
        status = os.fstat(descriptor)
        if self._file_number not in (None, status.st_ino) or status.st_size < self._end:
            raise Refused(f"audit log {self._path} was replaced or cut while open; restore it from the backup")
        self._file_number = status.st_ino
        if self._last_head is not None:
            # a file rewritten in place would need this very line at this very place
            last = head_line(self._last_head) + b"\n"
            if os.pread(descriptor, len(last), self._end - len(last)) != last:
                raise Refused(f"audit log {self._path} was rewritten while open; restore it from the backup")
        if status.st_size > self._end:
            torn = self._verify_from(descriptor)
            if torn is not None:
                os.ftruncate(descriptor, self._end)
                os.fdatasync(descriptor)
                body = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
                self._write(descriptor, [Entry(kind="recovered", job=None, body=body)])

    def _verify_from(self, descriptor: int) -> bytes | None:
        """Take in all lines after `_end`. Returns the bytes after the last head's line, None if there are none."""
        at, lines, time = self._end, self._lines, self._time
        with open(os.dup(descriptor), "rb") as file:
            file.seek(self._end)
            try:
                for raw in file:
                    at, lines = at + len(raw), lines + 1
                    if not raw.endswith(b"\n"):
                        break
                    parsed = parse_line(raw[:-1])
                    if parsed.time < time:
                        raise Refused(f"its time {parsed.time} is before that of an earlier line, {time}")
                    time = parsed.time
                    if isinstance(parsed, LoggedEntry):
                        if parsed.index != len(self._tree):
                            raise Refused(f"entry {parsed.index} stands where entry {len(self._tree)} belongs")
                        self._tree.append(parsed.leaf)
                    else:
                        self._check_head(parsed)
                        self._end, self._lines, self._time, self._last_head = at, lines, time, parsed
            except Refused as error:
                self._tree.truncate(0 if self._last_head is None else self._last_head.size)
                raise Refused(
                    f"audit log {self._path} is damaged in line {lines}: {error}; keep the file for the auditor and "
                    "restore it from the backup"
                ) from None
            self._tree.truncate(0 if self._last_head is None else self._last_head.size)
            file.seek(self._end)
            return file.read() or None

    def _check_head(self, head: SignedHead) -> None:
        if head.party != self._party:
            raise Refused(f"a head of {head.party!r} in the log of {self._party!r}")
        earlier = 0 if self._last_head is None else self._last_head.size
        if not earlier < head.size == len(self._tree):
            raise Refused(f"its head counts {head.size} entries after {earlier}, the log has {len(self._tree)}")
        if head.root != self._tree.root():
            raise Refused("its head has another Merkle root than the entries above it: one of them was altered")
        verify_head(self._identity.public, head)

    def _write(self, descriptor: int, entries: Sequence[Entry]) -> SignedHead:
        """Append to the locked, verified file; on any error file and tree are as before."""
        before = len(self._tree)
        time = self._now()
        lines = [entry_line(entry, before + number, time) for number, entry in enumerate(entries)]
        try:
            for line in lines:
                self._tree.append(leaf_hash(line))
            head = sign_head(self._identity, party=self._party, size=len(self._tree), root=self._tree.root(), time=time)
            data = b"".join(line + b"\n" for line in (*lines, head_line(head)))
            written = os.write(descriptor, data)
            if written != len(data):
                raise OSError(0, f"only {written} of {len(data)} bytes were written, the disk may be full")
            os.fdatasync(descriptor)
        except BaseException as error:
            self._tree.truncate(before)
            self._undo(descriptor)
            if isinstance(error, OSError):
                raise AuditFailed(
                    f"audit log {self._path}: {error.strerror}; nothing was logged and nothing may leave; free "
                    "space or mend the disk"
                ) from None
            raise
        self._end, self._lines = self._end + len(data), self._lines + len(lines) + 1
        self._time, self._last_head = time, head
        return head

    def _undo(self, descriptor: int) -> None:
        """Cut the file back to the last head. If that fails as well, this log is closed for good."""
        try:
            os.ftruncate(descriptor, self._end)
            os.fdatasync(descriptor)
        except OSError:
            self._unusable = "could not be restored after an error; restart the node"

    def _now(self) -> str:
        """The time of a new line: the clock's, never before the last line's."""
        now = self._clock()
        text = utc_text(now)
        if self._time and text < self._time:
            if now < utc_time(self._time) - CLOCK_TOLERANCE:
                raise AuditFailed(
                    f"clock set back: it says {text}, the last entry of the audit log is of {self._time}; set the "
                    "clock right, nothing may leave before"
                )
            return self._time
        return text

    def _head(self) -> SignedHead:
        if self._last_head is not None:
            return self._last_head
        return sign_head(self._identity, party=self._party, size=0, root=self._tree.root(), time=self._now())

    def _read(self, end: int) -> Iterator[LoggedEntry]:
        """The verified entries in the first `end` bytes, read again. Without the lock: nobody writes there any more."""
        left = end
        with open(self._path, "rb") as file:
            while left > 0:
                raw = file.readline()
                left -= len(raw)
                parsed = parse_line(raw[:-1])
                if isinstance(parsed, LoggedEntry):
                    if parsed.leaf != self._tree.leaf(parsed.index):
                        raise Refused(
                            f"audit log {self._path}: entry {parsed.index} was altered while the log was open"
                        )
                    yield parsed


def _create(path: Path, data: bytes, *, may_exist: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if may_exist else os.O_EXCL)
    descriptor = os.open(path, flags, 0o600)
    try:
        _check_plain(descriptor, path)
        if os.write(descriptor, data) != len(data):
            raise OSError(0, "a short write, the disk may be full")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_plain(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode) or mode & 0o077:
        raise Refused(f"{path} has mode {mode:04o}; it must be a plain file of at most 0600; chmod 600 {path}")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
