"""Masks that hide one party's vector inside a sum, and pads that hide a result from the party that decrypts it.

Guarantee: a masked vector is uniform modulo 2^bits for everyone who lacks at least one of its pair keys, and the masks
of all participants add up to zero, so the sum of the masked vectors is the sum of the vectors. Against: the
coordinator, the receiver and other participants, as long as two participants follow the protocol.
Fresh per job, step, attempt, participants and receiver (all bound into the key), so that no two sums share a mask.
Above 32 participants each one shares masks with `graph_degree` others only. With at most half of the participants
colluding, chosen without knowledge of the job keys, the honest ones stay connected except with probability 2^-40 per
job; if they fall apart, each group's sum shows, not one party's vector unless it is alone in its group.
Assumes: job keys announced under signed identities; every participant uses the same signed participant list.
Not handled: drop-outs. A step that lost a participant is run again as the next attempt with the shorter list.
Source: Bonawitz et al. 2017 (pairwise masks), without secret shares; Bell et al. 2020, section 3 (k-regular Harary
graph with permuted nodes); ChaCha20 (RFC 8439) as the generator.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from privacy.errors import Refused
from privacy.sealing import KEY_BYTES, JobKeys, check_exchange, check_job, encode_fields

UInt64 = npt.NDArray[np.uint64]

COMPLETE_UP_TO = 32
"""Up to so many participants every pair shares a mask."""

GRAPH_SECURITY_BITS = 40


@dataclass(frozen=True, kw_only=True)
class MaskContext:
    """The one sum that a mask belongs to. `job`: contract hash, 32 bytes; the order of `participants` is immaterial."""

    job: bytes
    step: str
    attempt: int
    participants: tuple[str, ...]
    receiver: str

    def __post_init__(self) -> None:
        check_job(self.job)
        check_exchange(self.step, self.attempt, self.participants)
        if not self.receiver:
            raise Refused(f"step {self.step!r}: a mask without a receiver; name who opens the sum")

    def encode(self) -> bytes:
        """Canonical bytes, injective up to the order of the participants."""
        return self._encoded

    @cached_property
    def _encoded(self) -> bytes:
        # once a sum, not once a pair: a thousand names take half a millisecond
        return encode_fields(
            [
                b"mask",
                self.job,
                self.step.encode(),
                self.attempt.to_bytes(8, "big"),
                encode_fields(name.encode() for name in sorted(self.participants)),
                self.receiver.encode(),
            ]
        )


def stream(key: bytes, length: int) -> UInt64:
    """uint64[length] of ChaCha20 key stream (nonce and counter zero). One key, one use. Read-only array."""
    if len(key) != KEY_BYTES:
        raise Refused(f"a mask key has {len(key)} bytes, expected {KEY_BYTES}")
    if length < 0:
        raise Refused(f"a mask of length {length}; give 0 or more")
    cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(8 * length)), dtype="<u8").astype(np.uint64, copy=False)


def uniform(key: bytes, length: int, modulus_bits: int) -> UInt64:
    """uint64[length], uniform in [0, 2^modulus_bits), from the key stream of `key`."""
    return stream(key, length) & _bit_mask(modulus_bits)


def pair_key(my_keys: JobKeys, peer_public: bytes, context: MaskContext, pair: tuple[str, str]) -> bytes:
    """The 32-byte key of an unordered pair of participants for one sum; the same on both sides."""
    info = encode_fields([context.encode(), *(name.encode() for name in sorted(pair))])
    return my_keys.derive(peer_public, job=context.job, purpose=b"mask", info=info)


def graph_degree(participants: int) -> int:
    """With how many others each participant shares masks: all, or k = 2 ceil((40 + 2 log2 n - 1) / 2) above 32.

    The honest fall apart only if two runs of k/2 neighbours on the circle collude entirely: at most n^2/2 pairs of
    runs, each with probability at most 2^-k when at most half collude.
    """
    everybody = participants - 1
    if participants <= COMPLETE_UP_TO:
        return everybody
    return min(everybody, 2 * math.ceil((GRAPH_SECURITY_BITS + 2 * math.log2(participants) - 1) / 2))


def neighbours(me: str, publics: Mapping[str, bytes], job: bytes) -> tuple[str, ...]:
    """With whom `me` shares masks. `publics`: job keys of all participants, `me` included. Symmetric.

    The circle is permuted by a hash of all job keys, which nobody knew when the contract fixed the parties, and is the
    same in every step, so that the risk is taken once per job and participant list.
    """
    names = sorted(publics)
    if me not in publics:
        raise Refused(f"{me!r} is not among the participants {names}")
    degree = graph_degree(len(names))
    if degree == len(names) - 1:
        return tuple(name for name in names if name != me)
    circle = _circle(job, tuple((name, publics[name]) for name in names))
    place = circle.index(me)
    steps = [step for distance in range(1, degree // 2 + 1) for step in (-distance, distance)]
    return tuple(sorted(circle[(place + step) % len(circle)] for step in steps))


@lru_cache(maxsize=4)
def _circle(job: bytes, publics: tuple[tuple[str, bytes], ...]) -> tuple[str, ...]:
    # public and the same in every step and at every participant
    fields = [b"xinyi mask graph 1", job, *(part for name, public in publics for part in (name.encode(), public))]
    seed = hashlib.sha256(encode_fields(fields)).digest()
    return tuple(sorted((name for name, _ in publics), key=lambda name: hashlib.sha256(seed + name.encode()).digest()))


def pairwise_mask(
    my_name: str,
    my_keys: JobKeys,
    peers: Mapping[str, bytes],
    *,
    job: bytes,
    step: str,
    attempt: int,
    participants: tuple[str, ...],
    receiver: str,
    length: int,
    modulus_bits: int,
    alone_is_visible: bool = False,
) -> UInt64:
    """My mask of one sum: uint64[length] in [0, 2^modulus_bits). All participants' masks add up to 0 modulo that.

    `peers`: job keys of exactly the other participants. One participant alone has no mask: zeros if the caller says
    `alone_is_visible=True` (the receiver sees the vector itself), else `Refused`.
    """
    context = MaskContext(job=job, step=step, attempt=attempt, participants=participants, receiver=receiver)
    bit_mask = _bit_mask(modulus_bits)
    if set(peers) != set(participants) - {my_name} or my_name not in participants:
        raise Refused(
            f"step {step!r}: {my_name!r} has job keys of {sorted(peers)} for the participants {sorted(participants)}; "
            "exactly the others are needed"
        )
    if length < 0:
        raise Refused(f"step {step!r}: a mask of length {length}; give 0 or more")
    if len(participants) == 1 and not alone_is_visible:
        raise Refused(
            f"step {step!r}: {my_name!r} is the only participant, so {receiver!r} would see its values unmasked; at "
            "least 2 are needed, or a contract that says so"
        )
    total = np.zeros(length, np.uint64)
    for peer in neighbours(my_name, {**peers, my_name: my_keys.public}, job):
        part = stream(pair_key(my_keys, peers[peer], context, (my_name, peer)), length)
        if my_name < peer:
            total += part
        else:
            total -= part
    return total & bit_mask


class OneTimePad:
    """SECRET. A feature owner's pads on what banks decrypt: random, one per (step, attempt, bank), never used twice.

    Guarantee: a pad is drawn from the operating system's generator, handed out for masking once, recalled for unmasking
    while its attempt lives, and gone after `erase`; a pad of an erased or older attempt is `Refused`, for two inputs
    under one pad leak their difference. Memory is released, not scrubbed: Python cannot promise more.
    """

    def __init__(self) -> None:
        self._pads: dict[tuple[str, str], tuple[int, UInt64]] = {}
        self._erased: dict[str, int] = {}

    def __repr__(self) -> str:
        return "OneTimePad(secret)"

    def take(self, step: str, attempt: int, bank: str, length: int, modulus_bits: int) -> UInt64:
        """Draw the pad of this bank in this attempt: uint64[length], uniform modulo 2^modulus_bits. Once only."""
        check_exchange(step, attempt, (bank,))
        if attempt <= self._erased.get(step, -1):
            raise Refused(
                f"step {step!r}: the pads of attempt {attempt} are erased; ask with an attempt after "
                f"{self._erased[step]}"
            )
        held = self._pads.get((step, bank))
        if held is not None:
            raise Refused(
                f"step {step!r}: the pad for {bank!r} was drawn in attempt {held[0]}; erase it before attempt {attempt}"
            )
        if length < 1:
            raise Refused(f"step {step!r}: a pad of length {length}; give 1 or more")
        pad = np.frombuffer(os.urandom(8 * length), dtype=np.uint64) & _bit_mask(modulus_bits)
        pad.flags.writeable = False
        self._pads[step, bank] = (attempt, pad)
        return pad

    def recall(self, step: str, bank: str) -> UInt64:
        """The pad that masked the living attempt's result for this bank."""
        held = self._pads.get((step, bank))
        if held is None:
            raise Refused(
                f"step {step!r}: no pad for {bank!r} is held; it was erased or never drawn, run the step again"
            )
        return held[1]

    def erase(self, step: str) -> None:
        """Forget the step's pads; their attempts can never draw or recall again."""
        for key in [key for key in self._pads if key[0] == step]:
            attempt, _ = self._pads.pop(key)
            self._erased[step] = max(attempt, self._erased.get(step, -1))


def _bit_mask(modulus_bits: int) -> np.uint64:
    if not 1 <= modulus_bits <= 64:
        raise Refused(f"masks modulo 2^{modulus_bits}; 1 to 64 bits are supported")
    return np.uint64((1 << modulus_bits) - 1)
