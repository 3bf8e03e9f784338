"""A vault's state of one job on its own disk: written after every step and before the reply leaves, encrypted, atomic.

One SQLite file of parts. A step writes the parts that changed and its reply in one transaction with full
synchronisation, so a kill at any moment leaves the state before the step or after it. A part is sealed with
ChaCha20-Poly1305 (RFC 8439) under the job's key file (mode 0600) and bound to contract, party, name and generation;
the sealed manifest names the generation of every part, so parts of two moments cannot be mixed.
Guarantee: without the key file nothing is read and no changed byte is accepted. `destroy` removes the key: what is
left on disk stays closed. Against: who gets the disk, a backup of the database, or the job's folder after its end.
Not handled: who can read key file and database together; and a whole older copy of the folder put back in place
(the institution's privacy ledger, outside this folder, keeps what was spent).
"""

import hashlib
import os
import sqlite3
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fl_clients.frozen import decode, encode
from privacy.errors import Refused
from privacy.sealing import KEY_BYTES, encode_fields

DATABASE, KEY, CLOSED = "checkpoint.sqlite", "checkpoint.key", "closed"
_MANIFEST = "manifest"
_NONCE_BYTES = 12


class Checkpoint:
    """SECRET (holds the key). The parts of one party's state in one job. `folder`: the job's own, mode 0700."""

    def __init__(self, folder: Path, *, job: bytes, party: str) -> None:
        self._folder = folder
        self._context = encode_fields([b"xinyi checkpoint 1", job, party.encode()])
        self._party = party
        self._database: sqlite3.Connection | None = None
        self._seal: ChaCha20Poly1305 | None = None
        self._generations: dict[str, int] = {}
        self._digests: dict[str, bytes] = {}
        self._shapes: dict[str, object] = {}
        self._generation = 0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"Checkpoint({self._party!r}, generation {self._generation})"

    @property
    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return (self._folder / KEY).exists() and (self._folder / DATABASE).exists()

    def write(self, parts: Mapping[str, object], removed: tuple[str, ...] = ()) -> None:
        """Write the given parts where they changed since the last time, remove others; all or nothing."""
        database = self._open()
        generation = self._generation + 1
        changed: dict[str, bytes] = {}
        shapes: dict[str, object] = {}
        digests: dict[str, bytes] = {}
        for name, value in parts.items():
            shape = _shape(value)
            if name in self._shapes and _same(self._shapes[name], shape):
                continue
            encoded = encode(value)
            shapes[name] = shape
            digest = hashlib.sha256(encoded).digest()
            if self._digests.get(name) != digest:
                changed[name], digests[name] = encoded, digest
        generations = {name: at for name, at in self._generations.items() if name not in removed}
        generations |= dict.fromkeys(changed, generation)
        try:
            database.execute("BEGIN IMMEDIATE")
            for name in removed:
                database.execute("DELETE FROM part WHERE name = ?", (name,))
            for name, encoded in changed.items():
                self._put(database, name, generation, encoded)
            self._put(database, _MANIFEST, 0, encode((generation, generations)))
            database.execute("COMMIT")
        except sqlite3.Error as error:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise OSError(f"the checkpoint of {self._party} cannot be written: {error}; free disk space") from None
        self._generation, self._generations = generation, generations
        self._digests = {name: at for name, at in self._digests.items() if name not in removed} | digests
        self._shapes = {name: at for name, at in self._shapes.items() if name not in removed} | shapes

    def read(self) -> dict[str, Any]:
        """Every part; `Refused` when a byte was changed, a part is missing, or it is of another job or party."""
        database = self._open()
        row = database.execute("SELECT sealed FROM part WHERE name = ?", (_MANIFEST,)).fetchone()
        if row is None:
            return {}
        self._generation, self._generations = decode(self._unsealed(_MANIFEST, 0, row[0]))
        values: dict[str, Any] = {}
        for name, generation in self._generations.items():
            row = database.execute("SELECT sealed FROM part WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise Refused(f"the checkpoint of {self._party} lacks the part {name}; end the job, start a new one")
            encoded = self._unsealed(name, generation, row[0])
            self._digests[name] = hashlib.sha256(encoded).digest()
            values[name] = decode(encoded)
        return values

    def close(self, what: object) -> None:
        """The end of the job: `what` (no secret of other parties) is kept, key and state are destroyed."""
        data = encode(what)
        temporary = self._folder / f"{CLOSED}.new"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._folder / CLOSED)
        self._synchronise()
        self.destroy()

    def closed(self) -> Any:
        """What `close` kept, None before the end."""
        path = self._folder / CLOSED
        return decode(path.read_bytes()) if path.exists() else None

    def release(self) -> None:
        """Let go of the file, keep everything."""
        if self._database is not None:
            self._database.close()
            self._database = None
        self._seal = None

    def destroy(self) -> None:
        """Overwrite and remove the key, then the state. Flash memory may keep old blocks; they stay encrypted."""
        self.release()
        key = self._folder / KEY
        if key.exists():
            with key.open("r+b") as file:
                file.write(bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            key.unlink()
        for ending in ("", "-wal", "-shm"):
            (self._folder / f"{DATABASE}{ending}").unlink(missing_ok=True)
        self._synchronise()

    def _synchronise(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _open(self) -> sqlite3.Connection:
        if self._database is not None:
            return self._database
        self._seal = ChaCha20Poly1305(self._key())
        path = self._folder / DATABASE
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        # a vault answers on the worker thread of its socket, one step at a time
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("PRAGMA secure_delete = ON")
            database.execute("CREATE TABLE IF NOT EXISTS part (name TEXT PRIMARY KEY, sealed BLOB NOT NULL)")
        except sqlite3.DatabaseError:
            database.close()
            raise Refused(f"{path} is no checkpoint; end the job of {self._party} and start a new one") from None
        self._database = database
        return database

    def _key(self) -> bytes:
        path = self._folder / KEY
        if not path.exists():
            if (self._folder / DATABASE).exists():
                raise Refused(f"{path} is missing: the state of the job cannot be opened; end it and start a new one")
            temporary = self._folder / f"{KEY}.new"
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(os.urandom(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self._synchronise()
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise Refused(f"{path} has mode {mode:04o}, at most 0600 is safe; chmod 600 {path}")
        key = path.read_bytes()
        if len(key) != KEY_BYTES:
            raise Refused(f"{path} has {len(key)} bytes, a key has {KEY_BYTES}; end the job and start a new one")
        return key

    def _bound(self, name: str, generation: int) -> bytes:
        return encode_fields([self._context, name.encode(), generation.to_bytes(8, "big")])

    def _put(self, database: sqlite3.Connection, name: str, generation: int, encoded: bytes) -> None:
        if self._seal is None:
            raise Refused("the checkpoint is closed")
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._seal.encrypt(nonce, encoded, self._bound(name, generation))
        database.execute("INSERT OR REPLACE INTO part VALUES (?, ?)", (name, sealed))

    def _unsealed(self, name: str, generation: int, sealed: bytes) -> bytes:
        if self._seal is None:
            raise Refused("the checkpoint is closed")
        try:
            return self._seal.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], self._bound(name, generation))
        except (InvalidTag, ValueError):
            raise Refused(
                f"the checkpoint of {self._party} does not open (part {name}): it was changed, or key, job or party "
                "are others; end the job and start a new one"
            ) from None


def _shape(value: object) -> object:
    """What tells whether a part may have changed: the very objects in it, containers copied (they are mutated)."""
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    if isinstance(value, list):
        # a long list of ids is not mutated in place and is compared as one object
        return value if len(value) > 1000 else [_shape(item) for item in value]
    if isinstance(value, set):
        return frozenset(value)
    if isinstance(value, tuple):
        return tuple(_shape(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str | bytes | np.ndarray | frozenset):
        return value
    if getattr(type(value), "__dataclass_params__", None) is not None:
        return value
    return _CHANGING


_CHANGING = object()


def _same(old: object, new: object) -> bool:
    """Whether a part is surely unchanged; arrays and dataclasses are replaced by the roles, never written into."""
    if old is _CHANGING or new is _CHANGING:
        return False
    if old is new:
        return True
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return type(old) is type(new) and len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, bool | int | float | str | bytes | frozenset):
        return type(old) is type(new) and old == new
    return False
