"""Secure sum at the coordinator: banks learn the sum of their integer vectors, the coordinator learns nothing.

Two locks. Lock 1: each bank encrypts under a consortium BFV key that only banks hold; the coordinator adds
ciphertexts. Lock 2: inside, pairwise masks modulo t (`privacy.masks`) that cancel over all participants, so that not
even a key holder (or the coordinator with a key holder) can open one bank's vector.

Guarantee (semi-honest): the coordinator sees BFV ciphertexts only; a bank sees the sum only, as long as two other banks
follow the protocol. Exact integers, packed several to a coefficient when they are small.
Not guaranteed: a coordinator may shift a sum on purpose; banks compare digests of what they opened, so it is found when
it lies to some banks only (PROTOCOL rule 9).
Assumes: RLWE at 128 bits (SEAL TC128); the key is fresh per job and its fingerprint is signed by its maker.
Source: BFV; masks of Bonawitz et al. 2017 without their key server; packing as BatchCrypt (Zhang et al. 2020), exact.
"""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import tenseal.sealapi as sealapi

from privacy import seal_bytes
from privacy.errors import Refused
from privacy.parameters import BFVParameters, slots_per_coefficient

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


def packed_length(values: int, largest_sum: int, parameters: BFVParameters) -> int:
    """Coefficients that `values` integers take (the length of the pairwise mask)."""
    slots, _ = slots_per_coefficient(parameters, largest_sum)
    return -(-values // slots)


def pack(values: Int64, largest_sum: int, parameters: BFVParameters) -> UInt64:
    """Pack int64[k] into residues modulo t, several to a coefficient: sum of v_j 2^(j width), so that packs add.

    `largest_sum` bounds the magnitude of every SUM over the parties; a single value beyond it is `Refused`.
    """
    slots, width = slots_per_coefficient(parameters, largest_sum)
    # not np.abs: that of the least int64 is negative; the value itself is a secret and stays out of the message
    if values.size and (int(values.max()) > largest_sum or int(values.min()) < -largest_sum):
        raise Refused(
            f"a value beyond the bound {largest_sum} goes into a secure sum; clip the values or raise the bound"
        )
    padded = np.zeros(-(-len(values) // slots) * slots, np.int64)
    padded[: len(values)] = values
    columns = padded.reshape(-1, slots)
    packed = np.zeros(len(columns), np.uint64)
    for slot in range(slots):
        packed += columns[:, slot].view(np.uint64) << np.uint64(slot * width)
    return packed & np.uint64(parameters.mask)


def unpack(packed: UInt64, length: int, largest_sum: int, parameters: BFVParameters) -> Int64:
    """The sums back, int64[length]; a sum beyond `largest_sum` means a damaged or shifted ciphertext: `Refused`.

    A shift that stays within the bound passes: banks compare digests of what they opened (PROTOCOL rule 9).
    """
    slots, width = slots_per_coefficient(parameters, largest_sum)
    if len(packed) != -(-length // slots):
        raise Refused(f"secure sum: {len(packed)} coefficients, {length} values take {-(-length // slots)}")
    remaining = parameters.log_t
    rest = packed & np.uint64(parameters.mask)
    columns = np.zeros((len(packed), slots), np.int64)
    for slot in range(slots):
        low = (rest & np.uint64((1 << width) - 1)).astype(np.int64)
        low = np.where(low >= 1 << (width - 1), low - (1 << width), low)
        columns[:, slot] = low
        rest = ((rest - low.view(np.uint64)) & np.uint64((1 << remaining) - 1)) >> np.uint64(width)
        remaining -= width
    sums = columns.reshape(-1)
    if np.any(rest) or np.any(sums[length:]) or (sums.size and int(np.abs(sums).max()) > largest_sum):
        raise Refused(
            f"the opened secure sum leaves its bound {largest_sum}: a ciphertext was damaged or the masks of the "
            "participants do not cancel; run the step again"
        )
    return sums[:length]


class ConsortiumKey:
    """SECRET. The banks' common BFV key of one job; never at the coordinator or a feature owner."""

    def __init__(self, parameters: BFVParameters, secret_bytes: bytes | None = None) -> None:
        self.parameters = parameters
        self._context = seal_bytes.make_context(parameters.degree, parameters.prime_bits, parameters.log_t)
        if secret_bytes is None:
            self._secret = sealapi.KeyGenerator(self._context).secret_key()
        else:
            self._secret = seal_bytes.load(sealapi.SecretKey(), self._context, secret_bytes, "consortium key")
        self._serialised = seal_bytes.dump(self._secret) if secret_bytes is None else bytes(secret_bytes)
        self._encryptor = sealapi.Encryptor(self._context, self._secret)
        self._decryptor = sealapi.Decryptor(self._context, self._secret)
        self._hash_keys: dict[bytes, bytes] = {}

    def __repr__(self) -> str:
        return "ConsortiumKey(secret)"

    def secret_bytes(self) -> bytes:
        """The key for another bank: only ever sealed to it (`privacy.sealing`). Everywhere its maker's bytes."""
        return self._serialised

    def check_value(self, context: bytes) -> int:
        """A number modulo t that only key holders can compute (HMAC-SHA256): each bank adds its own to its summand.

        The opened sum must show the sum of all participants' numbers for this step, attempt and list of participants;
        a coordinator that hands out the sum of another attempt is found before anybody uses it.
        """
        return int.from_bytes(self._keyed(b"check value", context)[:8]) & self.parameters.mask

    def digest(self, opened: bytes) -> bytes:
        """A keyed digest of what was opened, for the other key holders to compare: nobody else can test a guess."""
        return self._keyed(b"opened sum", opened)

    def _keyed(self, use: bytes, data: bytes) -> bytes:
        if use not in self._hash_keys:  # 64 KB to hash, and a thousand banks ask for a thousand values each
            self._hash_keys[use] = hashlib.sha256(b"xinyi " + use + b"|" + self._serialised).digest()
        return hmac.digest(self._hash_keys[use], data, "sha256")

    def fingerprint(self) -> str:
        """SHA-256 of the key's serialisation, bound to nothing else; whoever signs it binds it to a job.

        It lets a guess of the key be checked, and 4096 uniform ternary coefficients from a 512-bit seed cannot be
        guessed.
        """
        return hashlib.sha256(b"xinyi consortium key" + self.secret_bytes()).hexdigest()

    def encrypt(self, masked: UInt64) -> bytes:
        """Encrypt masked residues (seed-compressed: about 8 bytes a coefficient)."""
        degree = self.parameters.degree
        return bytes(
            msgpack.packb(
                [
                    seal_bytes.dump(
                        self._encryptor.encrypt_symmetric(
                            seal_bytes.plaintext(self._context, masked[start : start + degree])
                        )
                    )
                    for start in range(0, len(masked), degree)
                ]
            )
        )

    def open(self, summed: bytes, length: int) -> UInt64:
        """Decrypt a sum of ciphertexts: uint64[length] residues modulo t."""
        degree = self.parameters.degree
        parts = _ciphertexts(self._context, summed)
        if len(parts) != -(-length // degree):
            raise Refused(f"secure sum: {len(parts)} ciphertexts, expected {-(-length // degree)}")
        opened = []
        for index, part in enumerate(parts):
            if self._decryptor.invariant_noise_budget(part) < 1:
                raise Refused("secure sum: no noise budget left, a ciphertext is damaged; run the step again")
            polynomial = sealapi.Plaintext()
            self._decryptor.decrypt(part, polynomial)
            opened.append(seal_bytes.first_coefficients(polynomial, min(degree, length - index * degree)))
        return np.concatenate(opened) if opened else np.zeros(0, np.uint64)


def _ciphertexts(context: Any, data: bytes) -> list[Any]:
    try:
        parts = msgpack.unpackb(data, max_bin_len=1 << 24)
    except Exception:
        raise Refused("secure sum: not a list of ciphertexts; the message is damaged, send it again") from None
    if not isinstance(parts, list) or not all(isinstance(part, bytes) for part in parts):
        raise Refused("secure sum: not a list of ciphertexts; the message is damaged, send it again")
    level = context.first_parms_id()
    return [seal_bytes.load_ciphertext(context, level, part, "secure sum") for part in parts]


def add_ciphertexts(encrypted: Sequence[bytes], parameters: BFVParameters) -> bytes:
    """The coordinator's part: add the banks' ciphertexts. Needs public parameters only, no key."""
    context = seal_bytes.make_context(parameters.degree, parameters.prime_bits, parameters.log_t)
    evaluator = sealapi.Evaluator(context)
    total: list[Any] | None = None
    for data in encrypted:
        parts = _ciphertexts(context, data)
        if total is None:
            total = parts
            continue
        if len(parts) != len(total):
            raise Refused(
                f"secure sum: banks sent {len(total)} and {len(parts)} ciphertexts; they disagree on the step"
            )
        for mine, other in zip(total, parts, strict=True):
            try:
                evaluator.add_inplace(mine, other)
            except RuntimeError as error:  # SEAL stops on a transparent sum: somebody sent the negative of another's
                raise Refused(f"secure sum: the ciphertexts cancel ({error}); a bank deviates, stop the job") from None
    if total is None:
        raise Refused("secure sum: no bank sent anything")
    return bytes(msgpack.packb([seal_bytes.dump(part) for part in total]))


def secure_sum(vectors: Sequence[Int64], masks: Sequence[UInt64], largest_sum: int, parameters: BFVParameters) -> Int64:
    """The whole primitive among parties in one process; `masks` (packed length each) must cancel modulo t.

    Same signature as its plaintext twin `sum_in_the_clear`.
    """
    key = ConsortiumKey(parameters)
    modulus = np.uint64(parameters.mask)
    encrypted = [
        key.encrypt((pack(vector, largest_sum, parameters) + mask) & modulus)
        for vector, mask in zip(vectors, masks, strict=True)
    ]
    opened = key.open(add_ciphertexts(encrypted, parameters), packed_length(len(vectors[0]), largest_sum, parameters))
    return unpack(opened, len(vectors[0]), largest_sum, parameters)


def sum_in_the_clear(
    vectors: Sequence[Int64], masks: Sequence[UInt64], largest_sum: int, parameters: BFVParameters
) -> Int64:
    """Plaintext twin of `secure_sum`."""
    del masks, largest_sum, parameters
    total: Int64 = np.sum(np.stack(vectors), axis=0, dtype=np.int64)
    return total
