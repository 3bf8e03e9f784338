"""Files that only their owner may read: SQLite stores of the vault and folders of keys, mode 0600 and 0700.

Guarantee: a file that somebody else may read or write, or a link, is `Refused`, not used. Against: other users of the
institution's machine. Not against: its administrator.
"""

import os
import secrets
import sqlite3
import stat
from contextlib import suppress
from pathlib import Path

from privacy.errors import Refused

_LARGEST_SECRET = 1 << 16


def private_folder(path: Path) -> Path:
    """The folder, made with mode 0700 where absent; `Refused` if others may enter it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise Refused(f"folder {path} has mode {mode:04o}, at most 0700 is safe; chmod 700 {path}")
    return path


def private_database(path: Path, busy_s: float) -> sqlite3.Connection:
    """An SQLite file of mode 0600: write-ahead log, every commit on disk before it returns; autocommit outside BEGIN.

    Waits up to `busy_s` seconds for another process. Threads share the connection: callers lock. `Refused` where it is
    no database, no plain file, or readable by others.
    """
    try:
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        # never opened here if it exists: closing it would drop the locks of this process's other connections to it,
        # and another process would then take away the log that they write to (sqlite.org/howtocorrupt.html, 2.2)
        status = os.lstat(path)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}; give a plain file in an existing folder") from None
    if not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise Refused(f"{path} has mode {mode:04o}, at most 0600 is safe; chmod 600 {path}")
    try:
        # a vault answers on the worker thread of its socket
        database = sqlite3.connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        raise Refused(f"{path}: {error}; restore the vault's files from a backup of one moment") from None
    return database


def write_private(path: Path, data: bytes) -> None:
    """Write a new file of mode 0600, on disk when it returns; an existing one is replaced whole or not at all."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_private(path: Path) -> bytes:
    """The bytes of a small secret file; `Refused` where it is absent, a link, or readable by others."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}; restore it from the backup") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode) or mode & 0o077:
            raise Refused(f"{path} has mode {mode:04o}, at most 0600 is safe; chmod 600 {path}")
        return file.read(_LARGEST_SECRET)
