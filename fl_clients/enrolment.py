"""How an institution joins a federation: its keys of node and lane, and what it learns about the coordinator.

    HOME    (institution.py)  node/{node.key,node.pub}  tls/{root.crt,lane.crt,lane.key}
            trusted.yaml  federation.toml  logs/  run/
Guarantee: private keys are made here and never leave; the coordinator's certificate is checked against the CA of the
invitation, its answer against the identity of the invitation; the SuperNode will run one bundle (app_bundle.py).
Against: anyone on the network, and a coordinator that wants to run other code here.
Assumes: the invitation came over a channel that people trust, and they compared the fingerprints.
"""

import os
import shutil
import sqlite3
import tomllib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import tomli_w
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from pydantic import BaseModel, ConfigDict, ValidationError

from fl_clients import institution, tls
from fl_clients.app_bundle import Approval, approve, bundle_hash
from fl_clients.contract import Role
from fl_clients.institution import IDENTITY, SETTINGS
from fl_clients.invite import JOIN_PATH, LARGEST, JoinRequest, read_answer, read_invite, sign
from fl_clients.passphrase import institution_passphrase
from privacy.errors import Refused
from privacy.identity import SigningIdentity, fingerprint
from privacy.private_file import private_folder, read_private, write_private

LEAST_DISK = 2_000_000_000
"""Bytes that must be free in the home: audit log, ledger and Flower's own files grow in it."""


class Federation(BaseModel):
    """federation.toml: whom this institution joined. All of it is public."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str
    name: str
    role: Role
    host: str
    fleet_port: int
    lane_port: int
    coordinator: str
    """Its Ed25519 identity, hex."""
    node_id: str
    bundle: str
    """SHA-256 of the only app that the SuperNode may run."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What people compare by telephone."""

    federation: Federation
    own: str
    coordinator: str
    ca: str


def make_node_keys(home: Path) -> None:
    """Keys of the SuperNode and of the lane; existing ones stay."""
    for folder in ("node", "tls", "logs", "run"):
        private_folder(home / folder)
    if not (home / "node" / "node.key").exists():
        key = tls.new_key()
        write_private(home / "node" / "node.key", tls.key_openssh(key))
        write_private(home / "node" / "node.pub", tls.public_openssh(key).encode())
    if not (home / "tls" / "lane.key").exists():
        write_private(home / "tls" / "lane.key", tls.key_pem(tls.new_key()))


def name_and_role(home: Path) -> tuple[str, str]:
    """Of the institution of a home, without opening its stores."""
    try:
        settings = tomllib.loads((home / SETTINGS).read_text(encoding="utf-8"))
        return str(settings["name"]), str(settings["role"])
    except (FileNotFoundError, KeyError, tomllib.TOMLDecodeError):
        raise Refused(f"{home} is no home of an institution; make one with `xinyi-node init`") from None


def federation_of(home: Path) -> Federation:
    try:
        return Federation.model_validate(tomllib.loads((home / "federation.toml").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise Refused(
            f"{home} has not joined a federation; ask for an invitation, then `xinyi-node join FILE`"
        ) from None
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise Refused(f"{home / 'federation.toml'}: {str(error).splitlines()[0]}; join again") from None


def join(home: Path, invitation: bytes, now: datetime) -> Joined:
    """Join the federation of an invitation; makes the home where there is none. Asked again, it renews the answer."""
    invite = read_invite(invitation, now)
    if not (home / SETTINGS).exists():
        institution.create(home, invite.name, invite.role)
    name, role = name_and_role(home)
    if (name, role) != (invite.name, invite.role):
        raise Refused(
            f"the invitation is for {invite.name!r} ({invite.role}), this home is of {name!r} ({role}); use its own"
        )
    make_node_keys(home)
    identity = SigningIdentity.load(home / IDENTITY, institution_passphrase(home))
    lane_key = _lane_key(home)
    approval = approve(now)
    request = sign(
        JoinRequest(
            name=name,
            token=invite.token,
            identity=identity.public.hex(),
            node_key=(home / "node" / "node.pub").read_text(),
            lane_request=tls.signing_request(name, lane_key).decode(),
            approval=approval,
        ),
        identity,
    )
    status, body, _ = tls.post(invite.host, invite.fleet_port, invite.ca, JOIN_PATH, request.to_bytes(), LARGEST)
    if status != 200:
        words = "".join(letter for letter in body[:300].decode("utf-8", "replace") if letter.isprintable())
        raise Refused(f"the coordinator refused: {words}")
    answer = read_answer(body, request, invite.coordinator)
    _check_certificate(answer.certificate, lane_key, name)
    federation = Federation(
        federation=invite.federation,
        name=name,
        role=invite.role,
        host=invite.host,
        fleet_port=invite.fleet_port,
        lane_port=invite.lane_port,
        coordinator=invite.coordinator,
        node_id=answer.node_id,
        bundle=approval.bundle,
    )
    write_private(home / "tls" / "root.crt", invite.ca.encode())
    write_private(home / "tls" / "lane.crt", answer.certificate.encode())
    _trust(home, approval)
    write_private(home / "federation.toml", tomli_w.dumps(federation.model_dump()).encode())
    return Joined(
        federation=federation,
        own=fingerprint(identity.public),
        coordinator=fingerprint(bytes.fromhex(invite.coordinator)),
        ca=tls.certificate_fingerprint(invite.ca.encode()),
    )


def _trust(home: Path, approval: Approval) -> None:
    """Flower's list of trusted entities: one key, which signed one hash and is gone."""
    write_private(home / "trusted.yaml", f"{approval.key_id}: {approval.public_key}\n".encode())


def _lane_key(home: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(read_private(home / "tls" / "lane.key"), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Refused(f"{home / 'tls' / 'lane.key'} is no elliptic-curve key; remove it and join again")
    return key


def _check_certificate(pem: str, key: ec.EllipticCurvePrivateKey, name: str) -> None:
    """The certificate must be for our key and our name. (The lane's server checks who issued it.)"""
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        ours = certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)
        named = certificate.subject.rfc4514_string() == f"CN={name}"
    except (ValueError, InvalidSignature):
        ours = named = False
    if not (ours and named):
        raise Refused("the coordinator sent a lane certificate that is not for this institution's key; ask it")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the self-check."""

    what: str
    good: bool
    words: str


def self_check(home: Path, now: datetime) -> list[Check]:
    """Disk, database, node key, and where the institution has joined: pinned app, TLS and clock."""
    checks = [_check_disk(home), _check_database(home), _check_node_key(home)]
    if not (home / "federation.toml").exists():
        return checks
    federation = federation_of(home)
    same = federation.bundle == bundle_hash()
    words = f"{federation.bundle[:16]} is the one of this installation"
    if not same:
        words = f"{federation.bundle[:16]} was approved, this installation has {bundle_hash()[:16]}; join again"
    checks.append(Check(what="app", good=same, words=words))
    root = (home / "tls" / "root.crt").read_text()
    wrong = tls.check_connection(federation.host, federation.fleet_port, root, now)
    where = f"{federation.host}:{federation.fleet_port} answers, certificate good, clocks agree"
    checks.append(Check(what="tls, clock", good=wrong is None, words=wrong or where))
    return checks


def _check_disk(home: Path) -> Check:
    free = shutil.disk_usage(home).free
    return Check(
        what="disk",
        good=free >= LEAST_DISK,
        words=f"{free / 1e9:.1f} GB free at {home}, at least {LEAST_DISK / 1e9:.0f} GB are needed",
    )


def _check_database(home: Path) -> Check:
    """An SQLite file can be written, synced and read back here."""
    path = home / "run" / "check.sqlite"
    try:
        path.unlink(missing_ok=True)
        database = sqlite3.connect(path)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            with database:
                database.execute("CREATE TABLE probe (value INTEGER)")
                database.execute("INSERT INTO probe VALUES (7)")
            good = database.execute("SELECT value FROM probe").fetchone() == (7,)
        finally:
            database.close()
    except (sqlite3.Error, OSError) as error:
        return Check(what="database", good=False, words=f"{path}: {error}; the home must be on a local disk")
    finally:
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    return Check(what="database", good=good, words="SQLite writes and syncs in the home")


def _check_node_key(home: Path) -> Check:
    try:
        key = load_ssh_private_key(read_private(home / "node" / "node.key"), password=None)
        good = isinstance(key, ec.EllipticCurvePrivateKey) and tls.public_openssh(key) == (
            home / "node" / "node.pub"
        ).read_text(encoding="utf-8")
        words = "node key and its public half fit" if good else "node.key and node.pub do not fit; restore the backup"
    except (Refused, ValueError, OSError) as error:
        good, words = False, str(error)
    return Check(what="node key", good=good, words=words)


def socket_path(home: Path) -> Path:
    """The vault's Unix socket. `Refused` where the system's limit of 107 bytes is passed."""
    path = home.absolute() / "run" / "vault.sock"
    if len(os.fsencode(path)) > 107:
        raise Refused(f"{path} is longer than the 107 bytes that a Unix socket may have; choose a shorter --home")
    return path
