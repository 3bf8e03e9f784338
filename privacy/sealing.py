"""Sealed letters between two parties of a job: only the receiver reads them, only in the place they were written for.

Guarantee: `open` returns what the peer sealed for this very job, step, attempt, participants, sender, receiver and
label; any other context, peer or a changed byte is `Refused`. Against: the coordinator and every other party.
Forward secrecy: job keys are fresh per job and forgotten at its end; an identity stolen later opens nothing.
Not hidden: sizes and times. Not prevented here: the same letter delivered twice (vaults answer a step once).
Assumes: the peer's public key came in an announcement signed by its identity (a signed post of the protocol's first
step).
Formula: key = HKDF-SHA256(X25519(mine, peer), salt = job, info = SHA-256(purpose, both public keys, context)),
sealed = nonce (12 random bytes) + ChaCha20-Poly1305(key, nonce, plaintext, associated data = context).
Source: RFC 7748, 5869, 8439, through `cryptography`.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privacy.errors import Refused

JOB_BYTES = 32
KEY_BYTES = 32
LARGEST_LETTER = (1 << 31) - 1 - 16
"""Bytes; the limit of one ChaCha20-Poly1305 call in `cryptography`."""

_NONCE_BYTES = 12
_TAG_BYTES = 16


def encode_fields(fields: Iterable[bytes]) -> bytes:
    """Byte strings as one, injectively: their count, then each with its length (8 bytes, big endian)."""
    parts = list(fields)
    encoded = [len(parts).to_bytes(8, "big")]
    for part in parts:
        encoded += [len(part).to_bytes(8, "big"), part]
    return b"".join(encoded)


@dataclass(frozen=True, kw_only=True)
class Context:
    """The one place a letter belongs to. `job`: contract hash, 32 bytes; `attempt` counts from 0."""

    job: bytes
    step: str
    attempt: int
    participants: tuple[str, ...]
    sender: str
    receiver: str
    label: str

    def __post_init__(self) -> None:
        check_job(self.job)
        check_exchange(self.step, self.attempt, self.participants)
        if not (self.sender and self.receiver and self.label):
            raise Refused(f"a context of step {self.step!r} lacks a sender, a receiver or a label; name all three")

    def encode(self) -> bytes:
        """Canonical bytes; two contexts that differ in any field never encode alike."""
        return encode_fields(
            [
                b"letter",
                self.job,
                self.step.encode(),
                self.attempt.to_bytes(8, "big"),
                encode_fields(name.encode() for name in self.participants),
                self.sender.encode(),
                self.receiver.encode(),
                self.label.encode(),
            ]
        )


def check_job(job: bytes) -> None:
    """`Refused` unless `job` has the form of a contract hash."""
    if not isinstance(job, bytes) or len(job) != JOB_BYTES:
        raise Refused(f"a job is named by its contract hash of {JOB_BYTES} bytes, not by {len(job)}")


def check_exchange(step: str, attempt: int, participants: tuple[str, ...]) -> None:
    """`Refused` unless these can be bound into keys: a step, an attempt from 0, distinct named participants."""
    if not step:
        raise Refused("a key or a seal without a step; name the step")
    if not 0 <= attempt < 1 << 32:
        raise Refused(f"step {step!r}: attempt {attempt} is outside 0..2^32-1")
    # a list would encode alike today, but could change under the frozen context
    if not isinstance(participants, tuple) or not participants or not all(participants):
        raise Refused(f"step {step!r}: the participants must be a tuple of names, at least one")
    if len(set(participants)) != len(participants):
        raise Refused(f"step {step!r}: a participant is listed twice in {participants}")


class JobKeys:
    """SECRET. A party's X25519 key of one job. `public` (32 bytes) is announced to the others."""

    def __init__(self, key: X25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return "JobKeys(secret)"

    @classmethod
    def generate(cls) -> "JobKeys":
        """A new key from the operating system's generator."""
        return cls(X25519PrivateKey.generate())

    @classmethod
    def restore(cls, secret: bytes) -> "JobKeys":
        """The keys whose `secret_bytes` a party kept in its own memory between two messages of a job."""
        if len(secret) != KEY_BYTES:
            raise Refused(f"a job key of {len(secret)} bytes cannot be restored, it has {KEY_BYTES}; join a new job")
        return cls(X25519PrivateKey.from_private_bytes(secret))

    def secret_bytes(self) -> bytes:
        """SECRET, 32 bytes: for the party's own memory between two messages, never for a message or a file."""
        return self._key.private_bytes_raw()

    def derive(self, peer_public: bytes, *, job: bytes, purpose: bytes, info: bytes) -> bytes:
        """32 secret bytes that this party and the peer share, and nobody else; another purpose or info, other bytes.

        The same on both sides. A peer key that is malformed or forces an all-zero secret is `Refused`.
        """
        check_job(job)
        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except (ValueError, TypeError):
            raise Refused(
                "a peer's job key is malformed or of small order: anybody could know the shared secret; stop the job"
            ) from None
        # both public keys are bound as well: X25519 alone lets different points lead to one secret
        keys = sorted((self.public, peer_public))
        bound = hashlib.sha256(encode_fields([b"xinyi derive 1", purpose, *keys, info])).digest()
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=job, info=bound).derive(shared)

    def seal(self, peer_public: bytes, context: Context, plaintext: bytes | bytearray | memoryview) -> bytes:
        """Encrypt for the holder of `peer_public`, in `context`. 28 bytes longer than the plaintext."""
        size = memoryview(plaintext).nbytes
        if size > LARGEST_LETTER:
            raise Refused(
                f"step {context.step!r}: a letter of {size} bytes exceeds {LARGEST_LETTER}; split it into several"
            )
        encoded = context.encode()
        key = self.derive(peer_public, job=context.job, purpose=b"seal", info=encoded)
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + ChaCha20Poly1305(key).encrypt(nonce, plaintext, encoded)

    def open(self, peer_public: bytes, context: Context, sealed: bytes | bytearray | memoryview) -> bytes:
        """Decrypt what the holder of `peer_public` sealed for this party in exactly this context; else `Refused`."""
        encoded = context.encode()
        view = memoryview(sealed)
        damaged = Refused(
            f"step {context.step!r}, letter of {context.sender!r}: it does not open; it was altered, is of another "
            "step, attempt or participants, or is not from that party; ask for it again"
        )
        if not _NONCE_BYTES + _TAG_BYTES <= view.nbytes <= LARGEST_LETTER + _NONCE_BYTES + _TAG_BYTES:
            raise damaged
        key = self.derive(peer_public, job=context.job, purpose=b"seal", info=encoded)
        try:
            return ChaCha20Poly1305(key).decrypt(bytes(view[:_NONCE_BYTES]), view[_NONCE_BYTES:], encoded)
        except InvalidTag:
            raise damaged from None
