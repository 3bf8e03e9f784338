"""Secure sum: exact for every length and packing, blind for coordinator and key holders, refused when damaged."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as sealapi
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from privacy import seal_bytes
from privacy.blind_aggregate import uniform_residues
from privacy.errors import Refused
from privacy.masks import pairwise_mask
from privacy.parameters import BFVParameters, choose_sum, slots_per_coefficient
from privacy.sealing import JobKeys
from privacy.secure_sum import (
    ConsortiumKey,
    add_ciphertexts,
    pack,
    packed_length,
    secure_sum,
    sum_in_the_clear,
    unpack,
)

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
DEGREE = 4096
PARAMETERS = choose_sum(parties=10)
MODULUS = np.uint64(PARAMETERS.mask)
VECTORS = json.loads((Path(__file__).parent / "vectors" / "packing.json").read_text())


def with_log_t(log_t: int) -> BFVParameters:
    return BFVParameters(degree=DEGREE, prime_bits=(60, 18), log_t=log_t, hiding_bits=0)


def cancelling_masks(parties: int, length: int, parameters: BFVParameters = PARAMETERS) -> list[UInt64]:
    drawn = [uniform_residues(length, parameters) for _ in range(parties - 1)]
    last = np.zeros(length, np.uint64)
    for mask in drawn:
        last -= mask
    return [*drawn, last & np.uint64(parameters.mask)]


def bounded(rng: np.random.Generator, parties: int, length: int, largest_sum: int) -> list[Int64]:
    """Vectors whose sums stay within the bound; about one place in four is at the bound, of either sign."""
    share = largest_sum // parties
    vectors = [rng.integers(-share, share + 1, length) for _ in range(parties)]
    edge = rng.random(length)
    for vector in vectors:
        vector[edge < 0.25] = 0
    vectors[0][edge < 0.12] = largest_sum
    vectors[-1][(edge >= 0.12) & (edge < 0.25)] = -largest_sum
    return vectors


@cache
def key() -> ConsortiumKey:
    return ConsortiumKey(PARAMETERS)


def words(ciphertext: Any) -> UInt64:
    array = ciphertext.dyn_array()
    return np.array([array.at(index) for index in range(array.size())], np.uint64)


def loaded(message: bytes, consortium: ConsortiumKey | None = None) -> list[Any]:
    context = (consortium or key())._context
    return [seal_bytes.load(sealapi.Ciphertext(context), context, part, "test") for part in msgpack.unpackb(message)]


def raw_ciphertext(polynomials: UInt64, ntt: bool = False) -> bytes:
    """SEAL's uncompressed ciphertext of uint64[components, 1, N], as an attacker would write it."""
    components, primes, degree = polynomials.shape
    body = np.array(key()._context.first_parms_id(), "<u8").tobytes() + bytes([ntt])
    body += np.array([components, degree, primes], "<u8").tobytes()
    body += np.array([1.0], "<f8").tobytes() + np.array([1], "<u8").tobytes()
    body += seal_bytes._array(polynomials.reshape(-1))
    return seal_bytes._header(16 + len(body)) + body


def message_of(part: bytes) -> bytes:
    return bytes(msgpack.packb([part]))


# --- exactness --------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    length=st.sampled_from([0, 1, 2, 23, 24, 25, 100]) | st.integers(0, 300),
    largest_sum=st.sampled_from([0, 1, 2, 3, 7, 8, (1 << 23) - 1, 1 << 23, (1 << 47) - 1]) | st.integers(0, 1 << 46),
    parties=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_equal_to_its_plaintext_twin(length: int, largest_sum: int, parties: int, seed: int) -> None:
    vectors = bounded(np.random.default_rng(seed), parties, length, largest_sum)
    masks = cancelling_masks(parties, packed_length(length, largest_sum, PARAMETERS))
    total = secure_sum(vectors, masks, largest_sum, PARAMETERS)
    assert total.dtype == np.int64
    assert total.shape == (length,)
    assert np.array_equal(total, sum_in_the_clear(vectors, masks, largest_sum, PARAMETERS))


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 8192, 8193])
@pytest.mark.parametrize("largest_sum", [(1 << 47) - 1, (1 << 23) - 1])
def test_around_the_size_of_a_ciphertext(length: int, largest_sum: int) -> None:
    """One slot a coefficient, and two: so that the packed length crosses 4096 too."""
    vectors = bounded(np.random.default_rng(length), 3, length, largest_sum)
    masks = cancelling_masks(3, packed_length(length, largest_sum, PARAMETERS))
    total = secure_sum(vectors, masks, largest_sum, PARAMETERS)
    assert np.array_equal(total, sum_in_the_clear(vectors, masks, largest_sum, PARAMETERS))


@pytest.mark.parametrize("slots", range(1, 25))
def test_every_number_of_slots(slots: int) -> None:
    """1 to 24 slots in 48 bits, sums at both ends of the bound in every slot, next to each other."""
    width = 48 // slots
    largest_sum = (1 << (width - 1)) - 1
    assert slots_per_coefficient(PARAMETERS, largest_sum) == (48 // width, width)
    edges = np.array([largest_sum, -largest_sum, -1, 0, 1, -largest_sum, largest_sum] * slots, np.int64)
    half = edges // 2
    masks = cancelling_masks(2, packed_length(len(edges), largest_sum, PARAMETERS))
    assert np.array_equal(secure_sum([half, edges - half], masks, largest_sum, PARAMETERS), edges)


def test_with_the_pairwise_masks_of_four_banks_and_the_key_of_one() -> None:
    names = ("a", "b", "c", "d")
    keys = {name: JobKeys.generate() for name in names}
    rng = np.random.default_rng(2)
    largest_sum = 100_000
    vectors = bounded(rng, 4, 50, largest_sum)
    length = packed_length(50, largest_sum, PARAMETERS)
    messages = []
    for name, vector in zip(names, vectors, strict=True):
        mine = key() if name == "a" else ConsortiumKey(PARAMETERS, key().secret_bytes())
        assert mine.fingerprint() == key().fingerprint()
        mask = pairwise_mask(
            name,
            keys[name],
            {peer: keys[peer].public for peer in names if peer != name},
            job=bytes(32),
            step="cross_tab",
            attempt=0,
            participants=names,
            receiver="consortium",
            length=length,
            modulus_bits=PARAMETERS.log_t,
        )
        messages.append(mine.encrypt((pack(vector, largest_sum, PARAMETERS) + mask) & MODULUS))
    opened = ConsortiumKey(PARAMETERS, key().secret_bytes()).open(add_ciphertexts(messages, PARAMETERS), length)
    assert np.array_equal(unpack(opened, 50, largest_sum, PARAMETERS), np.sum(vectors, axis=0))


def test_the_sum_of_as_many_banks_as_the_parameters_are_for() -> None:
    parameters = choose_sum(parties=200)
    consortium = ConsortiumKey(parameters)
    messages = [consortium.encrypt(np.full(7, parameters.mask, np.uint64)) for _ in range(200)]
    opened = consortium.open(add_ciphertexts(messages, parameters), 7)
    assert opened.tolist() == [200 * parameters.mask % (parameters.mask + 1)] * 7


# --- known answers of the packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VECTORS["packs"], ids=[case["name"] for case in VECTORS["packs"]])
def test_packing_vectors(case: dict[str, Any]) -> None:
    parameters, values = with_log_t(case["log_t"]), np.array(case["values"], np.int64)
    packed = pack(values, case["largest_sum"], parameters)
    assert packed.tolist() == case["packed"]
    assert len(packed) == packed_length(len(values), case["largest_sum"], parameters)
    assert unpack(packed, len(values), case["largest_sum"], parameters).tolist() == case["values"]


@pytest.mark.parametrize("case", VECTORS["pack_failures"], ids=[case["name"] for case in VECTORS["pack_failures"]])
def test_named_failures_of_packing(case: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=case["refused"]):
        pack(np.array(case["values"], np.int64), case["largest_sum"], with_log_t(case["log_t"]))


@pytest.mark.parametrize("case", VECTORS["unpack_failures"], ids=[case["name"] for case in VECTORS["unpack_failures"]])
def test_named_failures_of_unpacking(case: dict[str, Any]) -> None:
    packed = np.array(case["packed"], np.uint64)
    with pytest.raises(Refused, match=case["refused"]):
        unpack(packed, case["length"], case["largest_sum"], with_log_t(case["log_t"]))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.integers(40, 48),
    st.integers(0, 1 << 39).map(lambda bound: bound - 1 if bound else 0),
    st.integers(0, 80),
    st.integers(0, 2**32),
)
def test_packs_add(log_t: int, largest_sum: int, length: int, seed: int) -> None:
    """pack(a) + pack(b) modulo t = pack(a + b): the law that makes it fit for a sum of ciphertexts."""
    parameters = with_log_t(log_t)
    one, two = bounded(np.random.default_rng(seed), 2, length, largest_sum)
    added = (pack(one, largest_sum, parameters) + pack(two, largest_sum, parameters)) & np.uint64(parameters.mask)
    assert np.array_equal(added, pack(one + two, largest_sum, parameters))
    assert np.array_equal(unpack(added, length, largest_sum, parameters), one + two)


def test_a_refusal_does_not_tell_the_value() -> None:
    with pytest.raises(Refused) as caught:
        pack(np.array([123_456]), 10, PARAMETERS)
    assert "123456" not in str(caught.value)


# --- bytes on the wire ------------------------------------------------------------------------------------------------


def test_a_packed_24_bit_sum_takes_at_most_four_and_a_half_bytes_a_parameter() -> None:
    values = np.random.default_rng(4).integers(-(1 << 20), 1 << 20, 8192)
    largest_sum = (1 << 23) - 1
    assert slots_per_coefficient(PARAMETERS, largest_sum) == (2, 24)
    mask = uniform_residues(packed_length(8192, largest_sum, PARAMETERS), PARAMETERS)
    message = key().encrypt((pack(values, largest_sum, PARAMETERS) + mask) & MODULUS)
    assert len(message) <= 4.5 * 8192
    # 48 bits a coefficient must be there at least: less would not be a masked vector
    assert len(message) > 3 * 8192


# --- what the others see ----------------------------------------------------------------------------------------------


def uniformity(residues: UInt64, bits: int) -> float:
    """p-value of a chi-square test over 64 cells of the highest six bits."""
    counts = np.bincount((residues >> np.uint64(bits - 6)).astype(np.int64), minlength=64)
    expected = len(residues) / 64
    return float(chi2.sf(np.sum((counts - expected) ** 2) / expected, 63))


def test_a_key_holder_that_opens_one_banks_message_sees_its_mask_only() -> None:
    """Lock 2. The same test rejects when the mask is left out, so it can fail."""
    values = np.random.default_rng(4).integers(-1000, 1000, 4096)
    packed = pack(values, 1 << 46, PARAMETERS)
    masked = (packed + uniform_residues(4096, PARAMETERS)) & MODULUS
    assert uniformity(key().open(key().encrypt(masked), 4096), 48) > 1e-6
    assert uniformity(key().open(key().encrypt(packed), 4096), 48) < 1e-30


def test_the_coordinator_sees_ciphertexts_that_share_nothing() -> None:
    zeros = np.zeros(4096, np.uint64)
    one, two = loaded(key().encrypt(zeros))[0], loaded(key().encrypt(zeros))[0]
    assert not np.any(words(one) == words(two))
    for component in (words(one)[:4096], words(one)[4096:]):
        assert uniformity(component, 60) > 1e-6


def test_secrets_do_not_show() -> None:
    assert repr(key()) == "ConsortiumKey(secret)"
    assert ConsortiumKey(PARAMETERS).fingerprint() != key().fingerprint()
    assert len(bytes.fromhex(key().fingerprint())) == 32


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_another_key_is_refused() -> None:
    """Without the check a wrong key opens random residues, which a wide bound would take for sums."""
    message = key().encrypt(np.arange(5, dtype=np.uint64))
    with pytest.raises(Refused, match="no noise budget left"):
        ConsortiumKey(PARAMETERS).open(message, 5)
    mixed = add_ciphertexts([message, ConsortiumKey(PARAMETERS).encrypt(np.arange(5, dtype=np.uint64))], PARAMETERS)
    with pytest.raises(Refused, match="no noise budget left"):
        key().open(mixed, 5)


def test_other_parameters_are_refused() -> None:
    other = ConsortiumKey(with_log_t(47))
    message = other.encrypt(np.arange(5, dtype=np.uint64))
    with pytest.raises(Refused, match="SEAL refuses"):
        key().open(message, 5)
    with pytest.raises(Refused, match="SEAL refuses"):
        add_ciphertexts([message], PARAMETERS)
    with pytest.raises(Refused, match="consortium key"):
        ConsortiumKey(PARAMETERS, other.secret_bytes())
    with pytest.raises(Refused, match="consortium key"):
        ConsortiumKey(PARAMETERS, key().secret_bytes()[:-1])


def test_wrong_numbers_of_ciphertexts() -> None:
    one, two = key().encrypt(np.zeros(4096, np.uint64)), key().encrypt(np.zeros(4097, np.uint64))
    with pytest.raises(Refused, match="expected 2"):
        key().open(one, 4097)
    with pytest.raises(Refused, match="expected 1"):
        key().open(two, 4096)
    with pytest.raises(Refused, match="banks sent 1 and 2"):
        add_ciphertexts([one, two], PARAMETERS)
    with pytest.raises(Refused, match="no bank sent anything"):
        add_ciphertexts([], PARAMETERS)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x01", b"\x91\x01", b"\x81\x01\x02", b"\x91\xc4\x03abc"])
def test_messages_that_are_no_ciphertexts(data: bytes) -> None:
    with pytest.raises(Refused, match="damaged"):
        key().open(data, 5)
    with pytest.raises(Refused, match="damaged"):
        add_ciphertexts([data], PARAMETERS)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_flipped_or_cut_byte_is_refused_or_stays_a_residue(at: int, flip: int) -> None:
    """Nothing but `Refused` escapes, at the coordinator and at a bank. What passes is a shift: see the next tests."""
    message = bytearray(key().encrypt(np.arange(100, dtype=np.uint64)))
    at %= len(message)
    if flip:
        message[at] ^= flip
    else:
        message = message[:at]
    try:
        opened = key().open(add_ciphertexts([bytes(message)], PARAMETERS), 100)
    except Refused:
        return
    assert flip
    assert opened.shape == (100,)
    assert int(opened.max()) <= PARAMETERS.mask


def test_crafted_forms_are_refused_by_coordinator_and_banks() -> None:
    good = words(loaded(key().encrypt(np.arange(9, dtype=np.uint64)))[0]).reshape(2, 1, DEGREE)
    assert key().open(message_of(raw_ciphertext(good)), 9).tolist() == list(range(9))
    transparent = good.copy()
    transparent[1] = 0
    for part in (
        raw_ciphertext(good, ntt=True),
        raw_ciphertext(np.concatenate([good, good[:1]])),
        raw_ciphertext(good[:0]),
        raw_ciphertext(transparent),
    ):
        with pytest.raises(Refused, match="not a ciphertext of this step"):
            add_ciphertexts([message_of(part)], PARAMETERS)
        with pytest.raises(Refused, match="not a ciphertext of this step"):
            key().open(message_of(part), 9)


def test_a_bank_that_cancels_another_is_refused() -> None:
    message = key().encrypt(np.arange(9, dtype=np.uint64))
    negated = loaded(message)[0]
    sealapi.Evaluator(key()._context).negate_inplace(negated)
    with pytest.raises(Refused, match="cancel"):
        add_ciphertexts([message, message_of(seal_bytes.dump(negated))], PARAMETERS)


def test_masks_that_do_not_cancel_are_refused() -> None:
    """20 sums bounded by 1000 in slots of 11 bits: a random residue passes with probability below 2^-20."""
    vectors = bounded(np.random.default_rng(1), 3, 20, 1000)
    masks = cancelling_masks(3, packed_length(20, 1000, PARAMETERS))
    masks[1] = uniform_residues(len(masks[1]), PARAMETERS)
    with pytest.raises(Refused, match="leaves its bound 1000"):
        secure_sum(vectors, masks, 1000, PARAMETERS)


def test_a_lost_bank_is_noticed() -> None:
    vectors = bounded(np.random.default_rng(1), 3, 40, 1000)
    length = packed_length(40, 1000, PARAMETERS)
    masks = cancelling_masks(3, length)
    messages = [
        key().encrypt((pack(vector, 1000, PARAMETERS) + mask) & MODULUS)
        for vector, mask in zip(vectors, masks, strict=True)
    ]
    opened = key().open(add_ciphertexts(messages[:2], PARAMETERS), length)
    with pytest.raises(Refused, match="leaves its bound 1000"):
        unpack(opened, 40, 1000, PARAMETERS)


# --- what is NOT promised (the module says so) ------------------------------------------------------------------------


def test_a_coordinator_can_shift_a_sum_within_its_bound() -> None:
    """LIMIT. It adds a plaintext to a ciphertext it cannot read. Beyond the bound it is refused; within, it is not."""
    message = key().encrypt(pack(np.array([5, -5]), 1 << 46, PARAMETERS))

    def shifted(by: int) -> Int64:
        ciphertext = loaded(message)[0]
        plain = seal_bytes.plaintext(key()._context, np.array([by & PARAMETERS.mask], np.uint64))
        sealapi.Evaluator(key()._context).add_plain_inplace(ciphertext, plain)
        opened = key().open(message_of(seal_bytes.dump(ciphertext)), 2)
        return unpack(opened, 2, 1 << 46, PARAMETERS)

    assert shifted(1000).tolist() == [1005, -5]
    with pytest.raises(Refused, match="leaves its bound"):
        shifted(-(1 << 46) - 6)


def test_check_values_are_equal_for_every_key_holder_and_differ_by_context() -> None:
    maker = ConsortiumKey(choose_sum(parties=3))
    other = ConsortiumKey(choose_sum(parties=3), maker.secret_bytes())
    assert other.fingerprint() == maker.fingerprint()
    values = {maker.check_value(context) for context in (b"bins.1|0|bank1", b"bins.1|1|bank1", b"bins.1|0|bank2")}
    assert len(values) == 3
    assert all(0 <= value < 1 << maker.parameters.log_t for value in values)
    assert other.check_value(b"bins.1|0|bank1") == maker.check_value(b"bins.1|0|bank1")
    stranger = ConsortiumKey(choose_sum(parties=3))
    assert stranger.check_value(b"bins.1|0|bank1") != maker.check_value(b"bins.1|0|bank1")
