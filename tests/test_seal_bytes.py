"""Bytes in and out of SEAL: exact, refused when damaged, and a SEAL that writes otherwise stops the import."""

import importlib.util
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as sealapi
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import seal_bytes
from privacy.errors import Refused

UInt64 = npt.NDArray[np.uint64]
DEGREE = 4096
PRIMES = (36, 36, 37)
LOG_T = 20
NAMED_FAILURES = json.loads((Path(__file__).parent / "vectors" / "seal_bytes.json").read_text())


@cache
def context() -> Any:
    return seal_bytes.make_context(DEGREE, PRIMES, LOG_T)


@cache
def keys() -> Any:
    return sealapi.KeyGenerator(context())


@cache
def decryptor() -> Any:
    return sealapi.Decryptor(context(), keys().secret_key())


def encrypt(values: UInt64) -> Any:
    """A fresh ciphertext in memory (not seed-compressed)."""
    ciphertext = sealapi.Ciphertext(context())
    encryptor = sealapi.Encryptor(context(), keys().secret_key())
    encryptor.encrypt_symmetric(seal_bytes.plaintext(context(), values), ciphertext)
    return ciphertext


def decrypt(ciphertext: Any) -> UInt64:
    opened = sealapi.Plaintext()
    decryptor().decrypt(ciphertext, opened)
    return seal_bytes.coefficients(opened, np.arange(DEGREE, dtype=np.int64))


def words(ciphertext: Any) -> UInt64:
    """Every coefficient of a ciphertext, residues of the first component first."""
    array = ciphertext.dyn_array()
    return np.array([array.at(index) for index in range(array.size())], np.uint64)


def serialise(polynomials: UInt64, *, ntt: bool = False, level: list[int] | None = None) -> bytes:
    """SEAL's uncompressed ciphertext of uint64[components, primes, N], as an attacker would write it."""
    components, primes, degree = polynomials.shape
    body = struct.pack("<4Q", *(level or context().first_parms_id())) + bytes([ntt])
    body += struct.pack("<3Q", components, degree, primes) + struct.pack("<d", 1.0) + struct.pack("<Q", 1)
    body += seal_bytes._array(polynomials.reshape(-1))
    return seal_bytes._header(16 + len(body)) + body


def load(data: bytes) -> Any:
    return seal_bytes.load_ciphertext(context(), context().first_parms_id(), data, "test")


# --- round trips ------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.integers(0, (1 << LOG_T) - 1), max_size=60), st.sampled_from([0, 1, DEGREE - 60]))
def test_plaintext_round_trip(values: list[int], zeros_in_front: int) -> None:
    written = np.array([0] * zeros_in_front + values, np.uint64)
    polynomial = seal_bytes.plaintext(context(), written)
    read = seal_bytes.coefficients(polynomial, np.arange(DEGREE, dtype=np.int64))
    assert np.array_equal(read[: len(written)], written)
    assert not read[len(written) :].any()


def test_coefficients_in_the_order_asked_for() -> None:
    polynomial = seal_bytes.plaintext(context(), np.array([5, 6, 7], np.uint64))
    assert seal_bytes.coefficients(polynomial, np.array([2, 0, 4000, 2])).tolist() == [7, 5, 0, 7]


@pytest.mark.parametrize("values", [[], [5], [0, 0, 7], [1] * DEGREE])
def test_first_coefficients_are_the_coefficients(values: list[int]) -> None:
    polynomial = seal_bytes.plaintext(context(), np.array(values, np.uint64))
    for length in (0, 1, 3, DEGREE):
        expected = seal_bytes.coefficients(polynomial, np.arange(length, dtype=np.int64))
        assert np.array_equal(seal_bytes.first_coefficients(polynomial, length), expected)


def test_ciphertext_round_trip_seeded_and_full() -> None:
    values = np.arange(DEGREE, dtype=np.uint64)
    encryptor = sealapi.Encryptor(context(), keys().secret_key())
    seeded = seal_bytes.dump(encryptor.encrypt_symmetric(seal_bytes.plaintext(context(), values)))
    full = seal_bytes.dump(load(seeded))
    assert len(seeded) < 0.55 * len(full)
    assert np.array_equal(decrypt(load(seeded)), values)
    assert np.array_equal(decrypt(load(full)), values)


def test_trivial_ciphertext_adds_its_polynomial_and_nothing_else() -> None:
    # f = k floor(q/t) adds k to the message, modulo t
    moduli = [int(m.value()) for m in context().first_context_data().parms().coeff_modulus()]
    step = moduli[0] * moduli[1] >> LOG_T
    added = np.arange(DEGREE) % 7
    residues = np.array([[int(k) * step % modulus for k in added] for modulus in moduli], np.uint64)
    values = np.full(DEGREE, (1 << LOG_T) - 3, np.uint64)
    ciphertext = encrypt(values)
    before = words(ciphertext)
    trivial = seal_bytes.trivial_ciphertext(context(), context().first_parms_id(), residues)
    sealapi.Evaluator(context()).add_inplace(ciphertext, trivial)
    assert np.array_equal(decrypt(ciphertext), (values + added.astype(np.uint64)) % np.uint64(1 << LOG_T))
    half = len(before) // 2
    assert np.array_equal(words(ciphertext)[half:], before[half:])  # the second component is untouched
    assert not np.array_equal(words(ciphertext)[:half], before[:half])


def test_two_encryptions_share_nothing() -> None:
    # 2 components x 2 primes x 4096 coefficients of 36 bits: an equal one somewhere has probability 2^-22
    values = np.zeros(DEGREE, np.uint64)
    assert not np.any(words(encrypt(values)) == words(encrypt(values)))
    encryptor = sealapi.Encryptor(context(), keys().secret_key())
    one, two = (seal_bytes.dump(encryptor.encrypt_symmetric(seal_bytes.plaintext(context(), values))) for _ in range(2))
    # seed-compressed too: seeds differ, so the expanded second components differ everywhere
    assert not np.any(words(load(one)) == words(load(two)))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NAMED_FAILURES, ids=[case["name"] for case in NAMED_FAILURES])
def test_named_failures(case: dict[str, str]) -> None:
    with pytest.raises(Refused, match=case["refused"]):
        seal_bytes.load(sealapi.Ciphertext(context()), context(), bytes.fromhex(case["bytes"]), "test")


def test_values_that_are_no_plaintext() -> None:
    with pytest.raises(Refused, match="plaintext"):
        seal_bytes.plaintext(context(), np.array([1 << LOG_T], np.uint64))
    with pytest.raises(Refused, match="plaintext"):
        seal_bytes.plaintext(context(), np.zeros(DEGREE + 1, np.uint64))


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.integers(0, 200), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_a_valid_ciphertext(position: int, flip: int) -> None:
    """Nothing but `Refused` escapes, whatever the metadata says; changed coefficients are for other checks to find."""
    data = bytearray(serialise(words(sample()).reshape(2, 2, DEGREE)))
    data[position] ^= flip
    try:
        loaded = load(bytes(data))
    except Refused:
        return
    assert words(loaded).shape == words(sample()).shape
    assert np.count_nonzero(words(loaded) != words(sample())) <= 1


@cache
def sample() -> Any:
    return encrypt(np.arange(DEGREE, dtype=np.uint64))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.booleans())
def test_a_cut_message_is_refused(cut: int, size_follows: bool) -> None:
    data = bytearray(seal_bytes.dump(sample()))
    data = data[: cut % len(data)]
    if size_follows and len(data) >= 16:
        data[8:16] = struct.pack("<Q", len(data))
    with pytest.raises(Refused):
        load(bytes(data))


def test_a_lengthened_message_is_refused() -> None:
    with pytest.raises(Refused, match="not a SEAL object"):
        load(seal_bytes.dump(sample()) + b"\x00")


def test_swapped_objects_are_refused() -> None:
    secret = seal_bytes.dump(keys().secret_key())
    plain = seal_bytes.dump(seal_bytes.plaintext(context(), np.array([1, 2], np.uint64)))
    for data in (secret, plain):
        with pytest.raises(Refused):
            load(data)
    with pytest.raises(Refused):
        seal_bytes.load(sealapi.SecretKey(), context(), seal_bytes.dump(sample()), "test")
    with pytest.raises(Refused):
        seal_bytes.load(sealapi.PublicKey(), context(), secret, "test")


@pytest.mark.parametrize("other", [(4096, (36, 36, 37), 21), (4096, (36, 35, 37), 20), (8192, (36, 36, 37), 20)])
def test_a_ciphertext_of_other_parameters_is_refused(other: tuple[int, tuple[int, ...], int]) -> None:
    stranger = seal_bytes.make_context(*other)
    encryptor = sealapi.Encryptor(stranger, sealapi.KeyGenerator(stranger).secret_key())
    data = seal_bytes.dump(encryptor.encrypt_symmetric(seal_bytes.plaintext(stranger, np.ones(9, np.uint64))))
    with pytest.raises(Refused, match="SEAL refuses"):
        load(data)


def test_forms_that_this_protocol_never_sends() -> None:
    """SEAL admits all of these; an evaluator would stop on them half-way or, worse, treat them as something else."""
    polynomials = words(sample()).reshape(2, 2, DEGREE)
    transparent = polynomials.copy()
    transparent[1] = 0
    lower = encrypt(np.ones(4, np.uint64))
    sealapi.Evaluator(context()).mod_switch_to_next_inplace(lower)
    crafted = {
        "NTT form": serialise(polynomials, ntt=True),
        "three components": serialise(np.concatenate([polynomials, polynomials[:1]])),
        "none": serialise(polynomials[:0]),
        "transparent": serialise(transparent),
        "another level": seal_bytes.dump(lower),
    }
    assert np.array_equal(decrypt(load(serialise(polynomials))), np.arange(DEGREE))
    for data in crafted.values():
        seal_bytes.load(sealapi.Ciphertext(context()), context(), data, "test")
        with pytest.raises(Refused, match="not a ciphertext of this step"):
            load(data)


@pytest.mark.parametrize(
    ("degree", "primes", "log_t"),
    [
        (2048, (60,), 20),  # 60 bits where the standard allows 54
        (4096, (60, 60), 20),  # 120 for 109
        (8192, (60, 60, 60, 60), 38),  # 240 for 218
        (4096, (60, 18), 61),
        (1000, (60,), 20),
        (8192, (61, 60), 20),
    ],
)
def test_parameters_below_128_bits_or_impossible(degree: int, primes: tuple[int, ...], log_t: int) -> None:
    with pytest.raises(Refused, match=f"BFV N={degree}"):
        seal_bytes.make_context(degree, primes, log_t)


# --- the memory file --------------------------------------------------------------------------------------------------


def test_no_memory_file_outlives_its_transfer() -> None:
    """One that did would be shared with forked processes (a secret key in it) and leak with every thread."""
    data = seal_bytes.dump(sample())
    before = sorted(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, [data] * 16))
    with pytest.raises(Refused):
        load(data[:-1])
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert all(np.array_equal(decrypt(ciphertext), np.arange(DEGREE)) for ciphertext in loaded)


# --- import -----------------------------------------------------------------------------------------------------------


def import_afresh() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seal_bytes_afresh", seal_bytes.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rewriting(original: Any, change: Any) -> Any:
    """A SEAL plaintext whose `save` passes its bytes through `change`."""

    class Rewritten:
        def __init__(self, text: str | None = None) -> None:
            self.inner = original(text) if text else original()

        def save(self, path: str) -> None:
            self.inner.save(path)
            data = Path(path).read_bytes()
            Path(path).write_bytes(change(data))

        def load(self, seal_context: Any, path: str) -> None:
            self.inner.load(seal_context, path)

    return Rewritten


def test_import_is_fine_with_the_seal_that_is_installed() -> None:
    assert import_afresh().dump(sealapi.Plaintext("1x^1"))[:2] == b"\x5e\xa1"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:3] + b"\x05" + data[4:],  # another major version
        lambda data: b"\x00\x00" + data[2:],  # another magic
        lambda data: data[:2] + b"\x20" + data[3:],  # a longer header
        lambda data: data + b"\x00",  # another size
    ],
)
def test_import_fails_on_a_seal_that_writes_another_header(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    monkeypatch.setattr(sealapi, "Plaintext", rewriting(sealapi.Plaintext, change))
    with pytest.raises(Refused, match=r"install tenseal==0\.3\.18"):
        import_afresh()


@pytest.mark.parametrize("lost", ["everything", "order"])
def test_self_test_fails_when_seal_misreads_us(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """The flood would be lost or misplaced: nothing downstream would notice, so the import must."""

    def misread(context: Any, level: list[int], residues: UInt64) -> Any:
        return genuine(context, level, residues * np.uint64(0) if lost == "everything" else residues[:, ::-1].copy())

    genuine = seal_bytes.trivial_ciphertext
    monkeypatch.setattr(seal_bytes, "trivial_ciphertext", misread)
    with pytest.raises(Refused, match="self-test"):
        seal_bytes.self_test()
