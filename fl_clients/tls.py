"""TLS material of the lane and the control plane: X.509 keys, requests, certificates; a connection checked in words.

Guarantee: `check_connection` fails, with its reason in one line, unless the peer shows a certificate that chains to the
given root, is valid now and names the host. Against: anyone on the network. TLS 1.3 only.
Source: RFC 5280, RFC 8446 through `cryptography` and OpenSSL. Keys: ECDSA P-384 (Flower's node keys must be such too).
"""

import socket
import ssl
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from privacy.errors import Refused

CONNECT_S = 10.0
CLOCK_LIMIT_S = 60.0
"""Flower accepts signatures whose time is off by about 300 s; warn long before."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """SECRET. A P-384 key from the operating system's generator."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """SECRET. PKCS #8, for TLS."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def key_openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """SECRET. OpenSSH form, for Flower's SuperNode."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_openssh(key: ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def signing_request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """PEM request for a client certificate of this common name."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA384()).public_bytes(Encoding.PEM)


def certificate_fingerprint(pem: bytes) -> str:
    """32 hex digits (128 bits of SHA-256) of the first certificate in a PEM file."""
    return x509.load_pem_x509_certificate(pem).fingerprint(SHA256()).hex()[:32]


def client_context(root_pem: str, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """TLS 1.3 towards a host of this root only (not the system's roots); with a client certificate where given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=root_pem)
    if certificate is not None and key is not None:
        context.load_cert_chain(certificate, key)
    return context


def _why(error: OSError, host: str, port: int) -> str:
    """One line: what is wrong with the connection, and what to do."""
    where = f"{host}:{port}"
    match error:
        case ssl.SSLCertVerificationError(verify_code=10):
            return f"TLS: the certificate of {where} has expired; the coordinator must renew it"
        case ssl.SSLCertVerificationError(verify_code=9):
            return f"TLS: the certificate of {where} is not valid yet; compare the clocks of both machines"
        case ssl.SSLCertVerificationError(verify_code=62 | 64):
            return f"TLS: the certificate of {where} is for another name; use the host name of the invitation"
        case ssl.SSLCertVerificationError():
            return (
                f"TLS: the certificate of {where} is not from the CA of the invitation ({error.verify_message}); "
                "somebody is in between, or the coordinator changed its CA: ask it by telephone"
            )
        case ssl.SSLError():
            return f"TLS: {where} does not speak TLS 1.3 as expected ({error.reason}); check host and port"
        case socket.gaierror():
            return f"network: the name {host} is unknown; check the invitation's host and the DNS"
        case TimeoutError():
            return f"network: {where} does not answer within {CONNECT_S:g} s; check address and firewall"
        case _:
            return f"network: {where}: {error.strerror or type(error).__name__}; is the coordinator up?"


def post(host: str, port: int, root_pem: str, path: str, body: bytes, limit: int) -> tuple[int, bytes, datetime | None]:
    """POST over checked TLS: status, at most `limit` bytes of the answer, the peer's clock. `Refused` says why not."""
    connection = HTTPSConnection(host, port, timeout=CONNECT_S, context=client_context(root_pem))
    try:
        connection.request("POST", path, body=body, headers={"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read(limit + 1)
        date = answer.getheader("Date")
        status = answer.status
    except OSError as error:
        raise Refused(_why(error, host, port)) from None
    except HTTPException as error:
        raise Refused(
            f"network: {host}:{port} is no coordinator ({type(error).__name__}); check host and port"
        ) from None
    finally:
        connection.close()
    if len(data) > limit:
        raise Refused(f"{host}:{port} answered more than {limit} bytes; it is no coordinator of this release")
    return status, data, parsedate_to_datetime(date) if date else None


def check_connection(host: str, port: int, root_pem: str, now: datetime) -> str | None:
    """None when the coordinator's public port answers over good TLS and the clocks agree; else the reason."""
    try:
        _, _, theirs = post(host, port, root_pem, "/v1/xinyi/ping", b"", 4096)
    except Refused as refusal:
        return str(refusal)
    if theirs is not None:
        apart = abs((now - theirs.astimezone(UTC)).total_seconds())
        if apart > CLOCK_LIMIT_S:
            return f"clock: {apart:.0f} s apart from the coordinator's, at most {CLOCK_LIMIT_S:g}; run a time service"
    return None
