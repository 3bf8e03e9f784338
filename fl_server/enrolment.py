"""The coordinator's home and who belongs to the federation: CA, invitations, members, revocation.

    HOME    (job_folder.py)  server.toml  ca/{ca.crt,ca.key}  tls/{server.crt,server.key,root.crt}  members.json  logs/
Guarantee: a token lets one institution join once, under the invited name, before it expires; a revoked member is
refused at the next call. The book holds public keys and the hashes of tokens, never a token. Against: outsiders and
former members. Not against: the coordinator itself, which may enrol whom it likes: contracts name the identities.
Source: X.509 (RFC 5280) through `cryptography`.
"""

import fcntl
import hashlib
import hmac
import ipaddress
import os
import secrets
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import tomli_w
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_clients.app_bundle import Approval, bundle_hash
from fl_clients.contract import Role
from fl_clients.invite import NAME, Invite, JoinAnswer, JoinRequest, request_hash, sign
from fl_clients.tls import key_pem, new_key
from fl_server.job_folder import coordinator_identity, create_server_home
from privacy.errors import Refused
from privacy.private_file import private_folder, read_private, write_private

CA_DAYS, CERTIFICATE_DAYS, INVITE_DAYS = 3650, 397, 7
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"  # noqa: S104 the public port is meant to be public; the guard stands behind it


class Settings(BaseModel):
    """server.toml. Ports: `fleet` and `lane` are public, `private` and `hub` are on loopback."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: str = Field(min_length=1, max_length=80)
    host: str = Field(min_length=1, max_length=255)
    """The name or address under which the institutions reach the coordinator."""
    bind: str = EVERYWHERE
    fleet_port: int = Field(default=9443, ge=1, le=65535)
    lane_port: int = Field(default=9444, ge=1, le=65535)
    private_port: int = Field(default=9445, ge=1, le=65535)
    hub_port: int = Field(default=9446, ge=1, le=65535)


class Invited(BaseModel):
    """An open invitation: only the hash of its token is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME)
    role: Role
    token_hash: str
    expires: datetime


class Member(BaseModel):
    """An institution that joined. All of it is public."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME)
    role: Role
    identity: str
    node_key: str
    node_id: str
    certificate: str
    approval: Approval
    joined: datetime
    revoked: datetime | None = None


class Book(BaseModel):
    """members.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    invited: tuple[Invited, ...] = ()
    members: tuple[Member, ...] = ()

    def current(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.revoked is None)


def create(home: Path, settings: Settings, now: datetime, given: tuple[Path, Path, Path] | None = None) -> None:
    """Make a coordinator's home: identity, CA, TLS certificate of `settings.host`, SuperExec secret.

    `given`: (certificate chain, key, root) files of the public port, where the institution has a CA of its own. The
    lane's client certificates and the loopback port always come from the coordinator's CA.
    """
    if (home / "server.toml").exists():
        raise Refused(f"{home} is the home of a coordinator already; choose another folder")
    create_server_home(home)
    for folder in ("ca", "tls", "superlink", "logs", "invites"):
        private_folder(home / folder)
    ca_key = new_key()
    ca = _certificate(f"{settings.federation} CA", ca_key.public_key(), None, ca_key, now, CA_DAYS)
    write_private(home / "ca" / "ca.key", key_pem(ca_key))
    write_private(home / "ca" / "ca.crt", ca.public_bytes(Encoding.PEM))
    renew(home, settings, now)
    root = ca.public_bytes(Encoding.PEM)
    if given is not None:
        chain, key, root_file = (path.read_bytes() for path in given)
        _check_given(chain, key, settings.host, now)
        write_private(home / "tls" / "public.crt", chain)
        write_private(home / "tls" / "public.key", key)
        root = root_file
    write_private(home / "tls" / "root.crt", root)
    write_private(home / "superlink" / "superexec.secret", secrets.token_bytes(32))
    write_private(home / "members.json", Book().model_dump_json(indent=2).encode())
    write_private(home / "server.toml", tomli_w.dumps(settings.model_dump()).encode())


def renew(home: Path, settings: Settings, now: datetime, days: int = CERTIFICATE_DAYS) -> None:
    """A fresh certificate and key of the coordinator's host, from its CA; the running SuperLink takes it at restart."""
    key = new_key()
    certificate = _certificate(
        settings.host,
        key.public_key(),
        _ca(home),
        _ca_key(home),
        now,
        days,
        names=(settings.host, "localhost", LOOPBACK),
    )
    write_private(home / "tls" / "server.key", key_pem(key))
    write_private(home / "tls" / "server.crt", certificate.public_bytes(Encoding.PEM))


def public_certificate(home: Path) -> tuple[Path, Path]:
    """Certificate and key files of the public port: the given ones, else the CA's."""
    if (home / "tls" / "public.crt").exists():
        return home / "tls" / "public.crt", home / "tls" / "public.key"
    return home / "tls" / "server.crt", home / "tls" / "server.key"


def settings_of(home: Path) -> Settings:
    try:
        return Settings.model_validate(tomllib.loads((home / "server.toml").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise Refused(f"{home} is no home of a coordinator; make one with `xinyi-server init`") from None
    except (tomllib.TOMLDecodeError, ValidationError, UnicodeDecodeError) as error:
        raise Refused(f"{home / 'server.toml'}: {str(error).splitlines()[0]}; correct it") from None


def read_book(home: Path) -> Book:
    if not (home / "members.json").exists():
        raise Refused(f"{home} is no home of a coordinator; make one with `xinyi-server init`")
    try:
        return Book.model_validate_json((home / "members.json").read_bytes())
    except ValidationError as error:
        raise Refused(f"{home / 'members.json'} is damaged ({error.error_count()} errors); restore a backup") from None


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One writer of the book at a time, over processes."""
    descriptor = os.open(home / "members.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _save(home: Path, book: Book) -> None:
    write_private(home / "members.json", book.model_dump_json(indent=2).encode())


def invite(home: Path, name: str, role: Role, now: datetime, days: int = INVITE_DAYS) -> Path:
    """Write an invitation (SECRET until used) and return its file. It replaces an open one of the same name."""
    settings, identity = settings_of(home), coordinator_identity(home)
    token = secrets.token_hex(32)
    expires = now + timedelta(days=days)
    try:
        message = Invite(
            federation=settings.federation,
            name=name,
            role=role,
            host=settings.host,
            fleet_port=settings.fleet_port,
            lane_port=settings.lane_port,
            ca=(home / "tls" / "root.crt").read_text(),
            coordinator=identity.public.hex(),
            token=token,
            expires=expires,
        )
    except ValidationError:
        raise Refused(f"name {name!r}: lower-case letters, digits, - and _, at most 41, a letter first") from None
    with _locked(home):
        book = read_book(home)
        if any(member.name == name for member in book.current()):
            raise Refused(f"{name!r} is a member already; revoke it first: xinyi-server revoke {name}")
        invited = Invited(name=name, role=role, token_hash=_token_hash(token), expires=expires)
        others = tuple(item for item in book.invited if item.name != name and item.expires > now)
        _save(home, book.model_copy(update={"invited": (*others, invited)}))
    path = home / "invites" / f"{name}.invite"
    write_private(path, sign(message, identity).to_bytes())
    return path


def _token_hash(token: str) -> str:
    return hashlib.sha256(b"xinyi invite token\x00" + token.encode()).hexdigest()


def admit(home: Path, request: JoinRequest, register: Callable[[str, str], str], now: datetime) -> JoinAnswer:
    """Enrol the institution of a request (its signature is checked by `read_request`); `Refused` says why not.

    `register(node key, name) -> node id` makes the SuperNode's key known to the SuperLink. Asked again with the same
    keys (the answer was lost), it answers again: the token is used up only for others.
    """
    with _locked(home):
        book = read_book(home)
        known = next((member for member in book.current() if member.name == request.name), None)
        if known is not None:
            same = (known.identity, known.node_key) == (request.identity, request.node_key)
            used = any(item.name == request.name and _fits(item, request) for item in book.invited)
            if not same or not used:
                raise Refused(f"{request.name!r} has joined already, with other keys or another invitation")
            return _answer(home, request, known.node_id, now)
        invited = next((item for item in book.invited if item.name == request.name), None)
        if invited is None or not _fits(invited, request):
            raise Refused(f"no open invitation for {request.name!r} has this token; ask for a new one")
        if now >= invited.expires:
            raise Refused(
                f"the invitation of {request.name!r} expired {invited.expires.isoformat()}; ask for a new one"
            )
        if any(request.node_key == member.node_key or request.identity == member.identity for member in book.members):
            raise Refused(
                "a member, or a revoked one, has the same identity or node key; make new ones: xinyi-node init"
            )
        if request.approval.bundle != bundle_hash():
            raise Refused(
                f"{request.name!r} approves the app {request.approval.bundle[:16]}, this coordinator ships "
                f"{bundle_hash()[:16]}; install the same release on both sides"
            )
        _check_node_key(request.node_key)
        answer = _answer(home, request, "", now)  # a bad certificate request must not leave a registered node behind
        node_id = register(request.node_key, request.name)
        member = Member(
            name=request.name,
            role=invited.role,
            identity=request.identity,
            node_key=request.node_key,
            node_id=node_id,
            certificate=answer.certificate,
            approval=request.approval,
            joined=now,
        )
        _save(home, book.model_copy(update={"members": (*book.members, member)}))
    (home / "invites" / f"{request.name}.invite").unlink(missing_ok=True)
    return _answer(home, request, node_id, now)


def _fits(invited: Invited, request: JoinRequest) -> bool:
    return hmac.compare_digest(invited.token_hash, _token_hash(request.token))


def _check_node_key(text: str) -> None:
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise Refused("the node key is no P-384 key in OpenSSH form; make it with `xinyi-node init`")


def _answer(home: Path, request: JoinRequest, node_id: str, now: datetime) -> JoinAnswer:
    try:
        csr = x509.load_pem_x509_csr(request.lane_request.encode())
        public = csr.public_key()
        good = csr.is_signature_valid and isinstance(public, ec.EllipticCurvePublicKey)
    except ValueError:
        good = False
    if not good:
        raise Refused("the lane's certificate request is malformed or not signed by its own key; join again")
    assert isinstance(public, ec.EllipticCurvePublicKey)  # noqa: S101 checked above
    certificate = _certificate(request.name, public, _ca(home), _ca_key(home), now, CERTIFICATE_DAYS, client=True)
    answer = JoinAnswer(
        request=request_hash(request), node_id=node_id, certificate=certificate.public_bytes(Encoding.PEM).decode()
    )
    return sign(answer, coordinator_identity(home))


def revoke(home: Path, name: str, now: datetime) -> Member:
    """Mark a member revoked: the guard and the lane refuse its keys at the next call. Its node id is returned in it."""
    with _locked(home):
        book = read_book(home)
        member = next((item for item in book.current() if item.name == name), None)
        if member is None:
            known = ", ".join(item.name for item in book.current()) or "nobody"
            raise Refused(f"{name!r} is no member; members are {known}")
        gone = member.model_copy(update={"revoked": now})
        members = tuple(gone if item is member else item for item in book.members)
        invited = tuple(item for item in book.invited if item.name != name)
        _save(home, book.model_copy(update={"members": members, "invited": invited}))
    return gone


def _ca(home: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(read_private(home / "ca" / "ca.crt"))


def _ca_key(home: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(read_private(home / "ca" / "ca.key"), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Refused(f"{home / 'ca' / 'ca.key'} is no elliptic-curve key; restore it from the backup")
    return key


def _check_given(chain: bytes, key: bytes, host: str, now: datetime) -> None:
    certificate = x509.load_pem_x509_certificate(chain)
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        raise Refused(f"the given certificate is valid until {certificate.not_valid_after_utc}; give a valid one")
    public = load_pem_private_key(key, password=None).public_key()
    forms = [
        item.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for item in (public, certificate.public_key())
    ]
    if forms[0] != forms[1]:
        raise Refused("the given key is not the one of the given certificate; give the pair")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    known = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    if host not in known:
        raise Refused(f"the given certificate names {known}, not the host {host!r}; give the host it names")


def _certificate(
    name: str,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    days: int,
    *,
    names: tuple[str, ...] = (),
    client: bool = False,
) -> x509.Certificate:
    """A certificate: a CA's own without `issuer`, else a host's with `names`, or a client's."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    authority = issuer is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not authority,
                key_cert_sign=authority,
                crl_sign=authority,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if names:
        unique = dict.fromkeys(names)
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(item) for item in unique]), False)
    if not authority:
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(issuer_key, SHA384())


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
