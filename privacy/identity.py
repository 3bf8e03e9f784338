"""Who a party is: its long-term Ed25519 identity, named in every contract.

Guarantee: what `verify` accepts was signed by the holder of that identity key, for this context and no other (domain
separation: the context is length-prefixed in what is signed, so a signature of one kind of message never fits another).
Against: anyone who does not hold the key file, including the coordinator.
Assumes: the identity file stays with its party (mode 0600, refused otherwise); public keys are exchanged out of band.
Source: Ed25519 (RFC 8032) through `cryptography`.
"""

import hashlib
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from privacy.errors import Refused

_DOMAIN = b"xinyi signature 1\x00"
_LARGEST_FILE = 4096


class SigningIdentity:
    """SECRET. A party's Ed25519 key. `public` (32 bytes) is what contracts name."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"SigningIdentity({fingerprint(self.public)})"

    @classmethod
    def generate(cls) -> "SigningIdentity":
        """A new identity from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None = None) -> "SigningIdentity":
        """Read an identity file, encrypted where `passphrase` is given.

        `Refused` if anybody but its owner may read or write it, it is no Ed25519 key, or the passphrase does not fit: a
        plain file is refused as well when a passphrase is configured, for it is not the one that was made with it.
        """
        try:
            # no following of links: the mode that is checked must be the mode of the file that is read
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise Refused(
                f"identity file {path}: {error.strerror}; give the path of a plain file made by save"
            ) from None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            mode = stat.S_IMODE(status.st_mode)
            if not stat.S_ISREG(status.st_mode) or mode & 0o077:
                raise Refused(f"identity file {path} has mode {mode:04o}, at most 0600 is safe; chmod 600 {path}")
            data = file.read(_LARGEST_FILE)
        try:
            key = load_pem_private_key(data, password=passphrase)
        except TypeError:
            need = "is encrypted; give its passphrase" if passphrase is None else "is not encrypted, but should be"
            raise Refused(f"identity file {path} {need}") from None
        except ValueError:
            if passphrase is not None and b"ENCRYPTED" in data:
                raise Refused(f"identity file {path}: the passphrase does not fit") from None
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise Refused(f"identity file {path} holds no Ed25519 private key; restore it from the backup")
        return cls(key)

    def save(self, path: Path, passphrase: bytes | None = None) -> None:
        """Write the identity, mode 0600, encrypted where a passphrase is given (PKCS #8, scrypt or PBKDF2 and AES-256).

        An existing file is `Refused`: an overwritten identity is lost for good. So is an empty passphrase.
        """
        if passphrase == b"":
            raise Refused("an empty passphrase protects nothing; give one, or none at all")
        encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise Refused(f"identity file {path}: {error.strerror}; choose a new file in an existing folder") from None
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # the umask may have asked for less, never for more
            file.write(pem)
            file.flush()
            os.fsync(descriptor)

    def sign(self, context: bytes, message: bytes) -> bytes:
        """64 bytes: the signature of `message` in `context` (what kind of message this is, in which job)."""
        return self._key.sign(_signed_bytes(context, message))


def verify(public_key: bytes, context: bytes, message: bytes, signature: bytes) -> None:
    """Raises `Refused` unless `signature` is by `public_key` over exactly this context and message."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, _signed_bytes(context, message))
    except (InvalidSignature, ValueError, TypeError):
        raise Refused(
            f"a signature does not fit the identity {fingerprint(public_key)}; the message was altered or is not from "
            "that party, drop it"
        ) from None


def fingerprint(public_key: bytes) -> str:
    """32 hex digits (128 bits of SHA-256) of a public key, to be compared by people."""
    return hashlib.sha256(public_key).hexdigest()[:32]


def _signed_bytes(context: bytes, message: bytes) -> bytes:
    return _DOMAIN + len(context).to_bytes(8, "big") + context + message
