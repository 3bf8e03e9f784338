"""Bytes in and out of SEAL objects (`tenseal.sealapi`), in bulk.

`sealapi` offers only file paths and one coefficient at a time; we write SEAL's own uncompressed serialisation into an
anonymous memory file (Linux `memfd`) and let SEAL load it: 0.06 ms instead of 7 ms for 8192 coefficients.
Guarantee: a self-test at import proves that this SEAL reads what we write (else `Refused`, nothing runs).
Assumption: SEAL 4.x serialisation (16-byte header: magic, header size, version, compression mode, total size).
Source: Microsoft SEAL 4 `serialization.h`, `plaintext.cpp`, `ciphertext.cpp`, `dynarray.h`.
"""

import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import tenseal.sealapi as sealapi

from privacy.errors import Refused

UInt64 = npt.NDArray[np.uint64]

_MAGIC = b"\x5e\xa1"
_HEADER = 16
_COMPRESSION = 5  # place of the compression mode in the header
_ZSTANDARD = 2
_PLAINTEXT_HEAD = 72  # 4 words of parameters' hash, coefficient count, scale, then the array's header and count


@contextmanager
def _memory_file() -> Iterator[int]:
    """A memory file for one transfer (8 microseconds): one that lived on would be shared with a forked process, which
    could then read another's secret key, and would leak a descriptor for every thread that ends."""
    descriptor = os.memfd_create("seal", os.MFD_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def dump(seal_object: Any) -> bytes:
    """SEAL's own serialisation of a plaintext, ciphertext or key (seed-compressed where SEAL can)."""
    with _memory_file() as descriptor:
        seal_object.save(f"/proc/self/fd/{descriptor}")
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def load(seal_object: Any, context: Any, data: bytes, what: str) -> Any:
    """Load `data` into `seal_object`; SEAL checks that it is valid for `context`.

    Raises `Refused` when the bytes are not a valid object of these parameters (cut, altered, other parameters).
    """
    if len(data) < _HEADER or data[:2] != _MAGIC or struct.unpack_from("<Q", data, 8)[0] != len(data):
        raise Refused(f"{what}: {len(data)} bytes are not a SEAL object; the message is damaged, send it again")
    with _memory_file() as descriptor:
        os.pwrite(descriptor, data, 0)
        try:
            seal_object.load(context, f"/proc/self/fd/{descriptor}")
        except (RuntimeError, ValueError) as error:
            raise Refused(f"{what}: SEAL refuses the bytes ({error}); the message is damaged, send it again") from None
    return seal_object


def load_ciphertext(context: Any, level: list[int], data: bytes, what: str) -> Any:
    """Load a ciphertext as this protocol sends it: two components, coefficient form, at `level`, not transparent.

    SEAL itself also admits none or three components, NTT form and any level; an evaluator would stop on them half-way,
    and a transparent one (second component zero) is a plaintext in disguise. All of these are `Refused`.
    """
    ciphertext = load(sealapi.Ciphertext(context), context, data, what)
    if (
        ciphertext.size() != 2
        or ciphertext.parms_id() != level
        or ciphertext.is_ntt_form()
        or ciphertext.is_transparent()
    ):
        raise Refused(
            f"{what}: not a ciphertext of this step (components: {ciphertext.size()}, expected 2 in coefficient form, "
            "encrypted, with the primes of the step); the sender is wrong or the message is damaged, stop the job"
        )
    return ciphertext


def _header(total: int) -> bytes:
    return _TEMPLATE[:5] + b"\x00" + _TEMPLATE[6:8] + struct.pack("<Q", total)


def _array(coefficients: UInt64) -> bytes:
    """SEAL `DynArray`: header, element count, elements."""
    payload = np.ascontiguousarray(coefficients, dtype="<u8").tobytes()
    return _header(_HEADER + 8 + len(payload)) + struct.pack("<Q", len(coefficients)) + payload


def plaintext(context: Any, coefficients: UInt64) -> Any:
    """A SEAL plaintext polynomial with these coefficients (uint64[<= N], each below the plaintext modulus)."""
    body = struct.pack("<4Q", 0, 0, 0, 0) + struct.pack("<Q", len(coefficients)) + struct.pack("<d", 1.0)
    body += _array(coefficients)
    return load(sealapi.Plaintext(), context, _header(_HEADER + len(body)) + body, "plaintext")


def trivial_ciphertext(context: Any, parms_id: list[int], residues: UInt64) -> Any:
    """The ciphertext (f, 0), f given by its residues modulo each prime of the level: uint64[primes, N].

    It hides nothing; it is what one adds to another ciphertext.
    """
    primes, degree = residues.shape
    data = np.concatenate([residues.reshape(-1), np.zeros(primes * degree, np.uint64)])
    body = struct.pack("<4Q", *parms_id) + b"\x00" + struct.pack("<3Q", 2, degree, primes)
    body += struct.pack("<d", 1.0) + struct.pack("<Q", 1) + _array(data)
    return load(sealapi.Ciphertext(context), context, _header(_HEADER + len(body)) + body, "flooding ciphertext")


def coefficients(polynomial: Any, indices: npt.NDArray[np.int64]) -> UInt64:
    """The coefficients of a SEAL plaintext at `indices` (beyond its degree: zero), uint64[len(indices)]."""
    count = polynomial.coeff_count()
    return np.array([polynomial.data(i) if i < count else 0 for i in indices.tolist()], dtype=np.uint64)


def first_coefficients(polynomial: Any, length: int) -> UInt64:
    """The coefficients of a SEAL plaintext from the constant term on (beyond its degree: zero), uint64[length].

    Read from SEAL's own serialisation, which `sealapi` compresses with Zstandard: a fifth of the time of
    `coefficients`, which asks for one at a time.
    """
    data = dump(polynomial)
    body = data[_HEADER:]
    if data[_COMPRESSION] == _ZSTANDARD:
        body = pyarrow.CompressedInputStream(pyarrow.BufferReader(body), "zstd").read()
    elif data[_COMPRESSION] != 0:
        raise Refused(f"SEAL writes compression {data[_COMPRESSION]}, we read Zstandard only; install tenseal==0.3.18")
    count = struct.unpack_from("<Q", body, 32)[0]
    if len(body) != _PLAINTEXT_HEAD + 8 * count or body[48:50] != _MAGIC:
        raise Refused("SEAL writes plaintexts in a form we do not know; install tenseal==0.3.18")
    found = np.zeros(length, np.uint64)
    used = min(length, count)
    found[:used] = np.frombuffer(body, "<u8", used, _PLAINTEXT_HEAD)
    return found


@lru_cache(maxsize=8)
def make_context(degree: int, prime_bits: tuple[int, ...], log_t: int) -> Any:
    """A BFV context with power-of-two plaintext modulus; SEAL enforces 128-bit security (TC128) or we refuse.

    Contexts hold public parameters only and never change, so each is made once per process (20 ms).
    """
    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
    try:
        parameters.set_poly_modulus_degree(degree)
        parameters.set_coeff_modulus(sealapi.CoeffModulus.Create(degree, list(prime_bits)))
        parameters.set_plain_modulus(1 << log_t)
    except (RuntimeError, ValueError) as error:
        raise Refused(f"BFV N={degree}, primes {prime_bits}, t=2^{log_t}: SEAL knows no such set ({error})") from None
    context = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    if not context.parameters_set():
        raise Refused(
            f"BFV N={degree}, primes {prime_bits}, t=2^{log_t}: {context.parameters_error_message()}; "
            "use parameters of at least 128-bit security"
        )
    return context


def _template() -> bytes:
    probe = dump(sealapi.Plaintext("3x^1 + 5"))
    if probe[:3] != _MAGIC + bytes([_HEADER]) or probe[3] != 4 or struct.unpack_from("<Q", probe, 8)[0] != len(probe):
        raise Refused(f"this SEAL writes the header {probe[:8].hex()}, we know version 4 only; install tenseal==0.3.18")
    return probe[:_HEADER]


_TEMPLATE = _template()


def self_test() -> None:
    """Prove on a small context that SEAL reads plaintexts and ciphertexts as we write them."""
    context = make_context(4096, (36, 36, 37), 20)
    keys = sealapi.KeyGenerator(context)
    encryptor = sealapi.Encryptor(context, keys.secret_key())
    decryptor = sealapi.Decryptor(context, keys.secret_key())
    values = (np.arange(4096, dtype=np.uint64) * np.uint64(2654435761)) & np.uint64((1 << 20) - 1)
    encrypted = sealapi.Ciphertext(context)
    encryptor.encrypt_symmetric(plaintext(context, values), encrypted)
    moduli = [int(m.value()) for m in context.first_context_data().parms().coeff_modulus()]
    # f = k floor(q / t) adds k to the message: k differs from place to place, so a lost or misplaced f shows
    step, added = math.prod(moduli) >> 20, np.arange(4096, dtype=np.uint64) % np.uint64(5)
    shift = np.array([[k * step % modulus for k in added.tolist()] for modulus in moduli], dtype=np.uint64)
    level = context.first_parms_id()
    sealapi.Evaluator(context).add_inplace(encrypted, trivial_ciphertext(context, level, shift))
    opened = sealapi.Plaintext()
    decryptor.decrypt(load_ciphertext(context, level, dump(encrypted), "self-test"), opened)
    expected = (values + added) & np.uint64((1 << 20) - 1)
    read = coefficients(opened, np.arange(4096)), first_coefficients(opened, 4096)
    if not all(np.array_equal(found, expected) for found in read):
        raise Refused("self-test: SEAL does not read our serialisation exactly; install tenseal==0.3.18")


self_test()
