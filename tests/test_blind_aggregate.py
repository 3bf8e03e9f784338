"""Blind aggregate: exact for every shape, uniform at the bank, refused when damaged, and what it does not promise."""

import itertools
import json
from functools import cache, partial
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

from privacy import blind_aggregate as primitive
from privacy import seal_bytes
from privacy.blind_aggregate import (
    BankKey,
    Layout,
    OwnerDesign,
    aggregate_in_the_clear,
    blind_aggregate,
    flooding_residues,
    from_residues,
    to_residues,
    uniform_residues,
    unmask,
)
from privacy.errors import Refused
from privacy.masks import pairwise_mask
from privacy.parameters import FLOODING_BITS, BFVParameters, choose_aggregate
from privacy.sealing import JobKeys

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
DEGREE = 8192
VALUE_MAX = 1 << 19
VECTORS = json.loads((Path(__file__).parent / "vectors" / "kernel.json").read_text())


def choose(rows: int, features: int = 6, noise_std: float = 0.0, matrix_bits: int = 1) -> BFVParameters:
    return choose_aggregate(rows=rows, value_bits=20, matrix_bits=matrix_bits, features=features, noise_std=noise_std)


PARAMETERS = choose(4096)


def random_cells(rng: np.random.Generator, samples: int, rows: int, features: int) -> Int32:
    """Different rows for the features of one sample, a fifth missing, the upper third of the rows often empty."""
    picked = np.argsort(rng.random((samples, rows)), axis=1)[:, :features].astype(np.int32)
    picked[rng.random(picked.shape) < 0.2] = -1
    if rng.random() < 0.5:
        picked[picked >= 2 * rows // 3] = -1
    return picked


def values_of(kind: str, rng: np.random.Generator, samples: int) -> Int64:
    extremes = {"largest": VALUE_MAX, "least": -VALUE_MAX, "zeros": 0, "minus one": -1}
    if kind in extremes:
        return np.full(samples, extremes[kind], np.int64)
    return rng.integers(-VALUE_MAX, VALUE_MAX + 1, samples)


class Pair:
    """One bank, one owner, one matrix: both ends of the primitive."""

    def __init__(self, cells: Int32, rows: int, packing: int, parameters: BFVParameters = PARAMETERS) -> None:
        self.parameters = parameters
        self.key = BankKey(parameters)
        self.layout = Layout(samples=len(cells), rows=rows, rows_per_ciphertext=packing, degree=parameters.degree)
        self.design = OwnerDesign(cells, self.layout, parameters, self.key.public)
        self.context = self.key._context

    def encrypt(self, values: Int64) -> bytes:
        return self.key.encrypt(values, self.layout.rows_per_ciphertext)

    def answer(self, values: Int64, pad: UInt64 | None = None) -> bytes:
        pad = uniform_residues(self.layout.rows, self.parameters) if pad is None else pad
        return self.design.multiply(self.encrypt(values), pad)

    def ciphertexts(self, result: bytes) -> list[Any]:
        return [
            seal_bytes.load(sealapi.Ciphertext(self.context), self.context, part, "test")
            for part in msgpack.unpackb(result)
        ]

    def every_coefficient(self, result: bytes) -> UInt64:
        """What the bank could decrypt if it looked at more than its targets: uint64[groups, N]."""
        opened = []
        for ciphertext in self.ciphertexts(result):
            polynomial = sealapi.Plaintext()
            self.key._decryptor.decrypt(ciphertext, polynomial)
            opened.append(seal_bytes.coefficients(polynomial, np.arange(self.parameters.degree, dtype=np.int64)))
        return np.array(opened)


def small_pair(samples: int = 50, rows: int = 20, packing: int = 8, seed: int = 1) -> tuple[Pair, Int64, Int32]:
    rng = np.random.default_rng(seed)
    cells = random_cells(rng, samples, rows, 3)
    return Pair(cells, rows, packing), values_of("random", rng, samples), cells


def words(ciphertext: Any) -> UInt64:
    array = ciphertext.dyn_array()
    return np.array([array.at(index) for index in range(array.size())], np.uint64)


def raw_ciphertext(level: list[int], polynomials: UInt64, ntt: bool = False) -> bytes:
    """SEAL's uncompressed ciphertext of uint64[components, primes, N], as an attacker would write it."""
    components, primes, degree = polynomials.shape
    body = np.array(level, "<u8").tobytes() + bytes([ntt]) + np.array([components, degree, primes], "<u8").tobytes()
    body += np.array([1.0], "<f8").tobytes() + np.array([1], "<u8").tobytes()
    body += seal_bytes._array(polynomials.reshape(-1))
    return seal_bytes._header(16 + len(body)) + body


def swap_first(message: bytes, part: bytes) -> bytes:
    return bytes(msgpack.packb([part, *msgpack.unpackb(message)[1:]]))


# --- exactness --------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    samples=st.lists(st.integers(1, 600), min_size=1, max_size=3),
    rows=st.integers(1, 200),
    features=st.integers(1, 6),
    packing=st.sampled_from([8, 16, 32]),
    kind=st.sampled_from(["random", "largest", "least", "zeros", "minus one"]),
    noise_std=st.sampled_from([0.0, 1.5, 1e7]),
    seed=st.integers(0, 2**32),
)
def test_equal_to_its_plaintext_twin(
    samples: list[int], rows: int, features: int, packing: int, kind: str, noise_std: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    parameters = choose(sum(samples), features, noise_std)
    vectors = [values_of(kind, rng, count) for count in samples]
    cells = [random_cells(rng, count, rows, min(features, rows)) for count in samples]
    # the noise of all banks together reaches the twelve sigma that the chooser provides for
    limit = int(12 * noise_std) // len(samples)
    noises = [rng.choice([-limit, limit, 0], rows).astype(np.int64) for _ in samples]
    arguments = (vectors, cells, rows, noises, parameters, packing)
    blind = blind_aggregate(*arguments)
    assert blind.dtype == np.int64
    assert np.array_equal(blind, aggregate_in_the_clear(*arguments))


@settings(derandomize=True, deadline=None, max_examples=8)
@given(
    packing=st.sampled_from([1, 2, 4]), samples=st.sampled_from([1, 2, 4095, 4096, 4097, 8193]), rows=st.integers(1, 4)
)
def test_equal_to_its_twin_with_few_rows_a_ciphertext(packing: int, samples: int, rows: int) -> None:
    rng = np.random.default_rng(samples)
    parameters = choose(samples)
    arguments = (
        [values_of("random", rng, samples)],
        [random_cells(rng, samples, rows, 1)],
        rows,
        [np.zeros(rows, np.int64)],
        parameters,
        packing,
    )
    assert np.array_equal(blind_aggregate(*arguments), aggregate_in_the_clear(*arguments))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_possible_sum(sign: int) -> None:
    """Every sample at the limit, every sample in one row, twelve sigma of noise on top: the edge of t, not beyond."""
    samples, noise_std = 512, 3e6
    parameters = choose(samples, 1, noise_std)
    assert samples * VALUE_MAX + 12 * noise_std > 1 << (parameters.log_t - 2)  # one bit less would wrap
    arguments = (
        [np.full(samples, sign * VALUE_MAX)],
        [np.zeros((samples, 1), np.int32)],
        3,
        [np.array([sign * 36_000_000, 0, -sign * 36_000_000])],
        parameters,
        32,
    )
    result = blind_aggregate(*arguments)
    assert result.tolist() == [sign * (512 * VALUE_MAX + 36_000_000), 0, -sign * 36_000_000]


def test_over_the_wire_with_pairwise_masks_of_three_banks() -> None:
    rng = np.random.default_rng(5)
    names = ("bank-a", "bank-b", "bank-c")
    keys = {name: JobKeys.generate() for name in names}
    rows, sizes = 30, (40, 1, 300)
    answers, pads, shown = [], [], []
    vectors = [values_of("random", rng, size) for size in sizes]
    cells = [random_cells(rng, size, rows, 4) for size in sizes]
    for name, values, own in zip(names, vectors, cells, strict=True):
        pair = Pair(own, rows, 16)
        pad = uniform_residues(rows, PARAMETERS)
        opened = pair.key.open(pair.answer(values, pad), pair.layout)
        mask = pairwise_mask(
            name,
            keys[name],
            {peer: keys[peer].public for peer in names if peer != name},
            job=bytes(32),
            step="r1.open",
            attempt=0,
            participants=names,
            receiver="pboc",
            length=rows,
            modulus_bits=PARAMETERS.log_t,
        )
        answers.append((opened + mask) & np.uint64(PARAMETERS.mask))
        pads.append(pad)
        shown.append(from_residues(answers[-1] - pad, PARAMETERS))
    clear = aggregate_in_the_clear(vectors, cells, rows, [np.zeros(rows, np.int64)] * 3, PARAMETERS)
    assert np.array_equal(unmask(answers, pads, PARAMETERS), clear)
    # the owner alone cannot take a bank's answer apart
    for values, own, single in zip(vectors, cells, shown, strict=True):
        alone = aggregate_in_the_clear([values], [own], rows, [np.zeros(rows, np.int64)], PARAMETERS)
        assert not np.any(single == alone)


def test_a_design_is_used_in_every_round_and_beyond_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitive, "MASK_CACHE_BYTES", 2 * 8 * DEGREE * 3)  # room for two polynomials of six
    pair, values, cells = small_pair(samples=1500, rows=20)
    for number in range(3):
        pad = uniform_residues(20, PARAMETERS)
        opened = pair.key.open(pair.answer(values + number, pad), pair.layout)
        clear = aggregate_in_the_clear([values + number], [cells], 20, [np.zeros(20, np.int64)], PARAMETERS)
        assert np.array_equal(unmask([opened], [pad], PARAMETERS), clear)
    assert len(pair.design._cache) == 2


# --- known answers of the kernel --------------------------------------------------------------------------------------


def negacyclic(a: Int64, b: Int64) -> Int64:
    """Schoolbook product modulo X^N + 1."""
    full = np.convolve(a, b)
    product = np.zeros(len(a), np.int64)
    product[: len(full[: len(a)])] += full[: len(a)]
    product[: len(full[len(a) :])] -= full[len(a) :]
    return product


@pytest.mark.parametrize("case", VECTORS["cuts"], ids=[case["name"] for case in VECTORS["cuts"]])
def test_kernel_vectors(case: dict[str, Any]) -> None:
    cells = np.array(case["cells"], np.int32)
    layout = Layout(
        samples=len(cells),
        rows=case["rows"],
        rows_per_ciphertext=case["rows_per_ciphertext"],
        degree=case["degree"],
    )
    positions, bounds = primitive._cut(cells, layout)
    assert positions.tolist() == case["positions"]
    assert bounds.tolist() == case["bounds"]
    assert layout.targets().tolist() == case["targets"]
    # and the positions mean what they should: the products of the polynomials hold the sums at the targets
    values = np.zeros(layout.blocks * layout.block, np.int64)
    values[: len(cells)] = case["values"]
    sums: list[int] = []
    for group in range(layout.groups):
        total = np.zeros(layout.degree, np.int64)
        for block in range(layout.blocks):
            at = group * layout.blocks + block
            matrix, vector = np.zeros(layout.degree, np.int64), np.zeros(layout.degree, np.int64)
            matrix[positions[bounds[at] : bounds[at + 1]]] = 1
            vector[: layout.block] = values[block * layout.block : (block + 1) * layout.block]
            total += negacyclic(matrix, vector)
        sums += total[layout.targets()].tolist()
    assert sums[: layout.rows] == case["sums"]
    assert not any(sums[layout.rows :])


@pytest.mark.parametrize("case", VECTORS["failures"], ids=[case["name"] for case in VECTORS["failures"]])
def test_named_failures_of_a_design(case: dict[str, Any]) -> None:
    layout = Layout(samples=2, rows=case["rows"], rows_per_ciphertext=8, degree=DEGREE)
    with pytest.raises(Refused, match=case["refused"]):
        OwnerDesign(np.array(case["cells"], np.int32), layout, PARAMETERS, BankKey(PARAMETERS).public)


# --- what the bank sees -----------------------------------------------------------------------------------------------


def uniformity(residues: UInt64, bits: int, low: bool) -> float:
    """p-value of a chi-square test over 64 cells of the highest (or lowest) six bits."""
    six = residues & np.uint64(63) if low else residues >> np.uint64(bits - 6)
    counts = np.bincount(six.astype(np.int64).ravel(), minlength=64)
    expected = residues.size / 64
    return float(chi2.sf(np.sum((counts - expected) ** 2) / expected, 63))


def many_rows() -> tuple[Pair, Int64]:
    """1024 rows, 32 to a ciphertext: 32 ciphertexts with 32 targets each, cells in all of them."""
    rng = np.random.default_rng(3)
    return Pair(random_cells(rng, 256, 1024, 6), 1024, 32), values_of("random", rng, 256)


def off_target(coefficients: UInt64, layout: Layout) -> UInt64:
    return np.delete(coefficients, layout.targets(), axis=1)


def test_the_bank_decrypts_uniform_values_on_every_coefficient() -> None:
    """All N coefficients, not only the targets: the others hold cross-correlations of v with the owner's matrix."""
    pair, values = many_rows()
    opened = pair.every_coefficient(pair.answer(values))
    for low in (False, True):
        assert uniformity(opened, PARAMETERS.log_t, low) > 1e-6
        assert uniformity(opened[:, pair.layout.targets()], PARAMETERS.log_t, low) > 1e-6
        assert uniformity(off_target(opened, pair.layout), PARAMETERS.log_t, low) > 1e-6


def test_the_same_test_rejects_without_the_pad() -> None:
    pair, values = many_rows()
    opened = pair.every_coefficient(pair.answer(values, np.zeros(1024, np.uint64)))
    assert uniformity(opened[:, pair.layout.targets()], PARAMETERS.log_t, False) < 1e-30
    assert uniformity(off_target(opened, pair.layout), PARAMETERS.log_t, False) > 1e-6


def test_the_same_test_rejects_without_the_blinding_off_target(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, values = many_rows()
    pad = uniform_residues(1024, PARAMETERS)
    monkeypatch.setattr(primitive, "uniform_residues", lambda length, _: np.zeros(length, np.uint64))
    opened = pair.every_coefficient(pair.answer(values, pad))
    assert uniformity(opened[:, pair.layout.targets()], PARAMETERS.log_t, False) > 1e-6
    assert uniformity(opened, PARAMETERS.log_t, False) < 1e-30
    assert uniformity(off_target(opened, pair.layout), PARAMETERS.log_t, False) < 1e-30


def test_unused_targets_of_the_last_group_are_blinded() -> None:
    pair, values, _ = small_pair(rows=17, packing=8)
    last = np.array([pair.every_coefficient(pair.answer(values))[-1][pair.layout.targets()][1:] for _ in range(4)])
    # 28 values that would be zero; a uniform one is zero with probability 2^-32
    assert np.all(last)


def bare_second_component(pair: Pair, message: bytes) -> UInt64:
    """c1 of the product alone, switched to one prime like a result: what a result's c1 would be without Enc(0)."""
    evaluator = pair.design._evaluator
    block = seal_bytes.load(sealapi.Ciphertext(pair.context), pair.context, msgpack.unpackb(message)[0], "test")
    evaluator.transform_to_ntt_inplace(block)
    product = pair.design._product(0, [block])
    for _ in range(2):
        evaluator.mod_switch_to_next_inplace(product)
    return words(product)[DEGREE:]


class WithoutEncryptionOfZero:
    """An owner that forgets to re-randomise: Enc(0) replaced by nothing."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def encrypt_zero(self, level: list[int], into: Any) -> None:
        seal_bytes.load(into, self.context, raw_ciphertext(level, np.zeros((2, 3, DEGREE), np.uint64)), "test")


def test_results_are_re_randomised() -> None:
    """Same message, same matrix, same pad, twice: nothing in common, and c1 is not the known function of A."""
    pair, values, _ = small_pair()
    message, pad = pair.encrypt(values), uniform_residues(20, PARAMETERS)
    one, two = (pair.design.multiply(message, pad) for _ in range(2))
    for first, second in zip(pair.ciphertexts(one), pair.ciphertexts(two), strict=True):
        assert not np.any(words(first) == words(second))  # an equal pair anywhere: probability 2^-46
    bare = bare_second_component(pair, message)
    assert not np.any(words(pair.ciphertexts(one)[0])[DEGREE:] == bare)


def test_without_the_encryption_of_zero_c1_gives_a_away() -> None:
    """So that the test above can fail: the bank recomputes c1 of the product for a guess of A and compares."""
    pair, values, _ = small_pair(rows=8)
    message, pad = pair.encrypt(values), uniform_residues(8, PARAMETERS)
    pair.design._encryptor = WithoutEncryptionOfZero(pair.context)
    one, two = (pair.design.multiply(message, pad) for _ in range(2))
    bare = bare_second_component(pair, message)
    assert np.array_equal(words(pair.ciphertexts(one)[0])[DEGREE:], bare)
    assert np.array_equal(words(pair.ciphertexts(two)[0])[DEGREE:], bare)


def test_two_uploads_and_two_keys_share_nothing() -> None:
    pair, values, _ = small_pair()
    one, two = (pair.ciphertexts(pair.encrypt(values))[0] for _ in range(2))
    assert not np.any(words(one) == words(two))
    assert BankKey(PARAMETERS).public[200:] != pair.key.public[200:]


def test_flooding_is_one_integer_of_100_uniform_bits() -> None:
    """The residues agree (Chinese remainder), the integers fill 100 bits and no more, high and low bits uniform."""
    pair, _, _ = small_pair()
    moduli = [int(modulus) for modulus in pair.design._moduli]
    residues = flooding_residues(DEGREE, pair.design._moduli)
    assert residues.shape == (3, DEGREE)
    assert [modulus.bit_length() for modulus in moduli] == [60, 60, 60]
    product = moduli[0] * moduli[1] * moduli[2]
    weights = [product // modulus * pow(product // modulus, -1, modulus) for modulus in moduli]
    flood = [sum(int(r) * w for r, w in zip(column, weights, strict=True)) % product for column in residues.T]
    assert max(flood).bit_length() == FLOODING_BITS  # else 2^-8192
    for shift in (0, 47, FLOODING_BITS - 6):  # lowest, across the seam of the two halves, highest
        assert uniformity(np.array([value >> shift & 63 for value in flood], np.uint64), 6, True) > 1e-6
    assert not np.any(residues == flooding_residues(DEGREE, pair.design._moduli))


def test_every_result_is_flooded(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counting(degree: int, moduli: UInt64) -> UInt64:
        drawn.append(flooding_residues(degree, moduli))
        return drawn[-1]

    monkeypatch.setattr(primitive, "flooding_residues", counting)
    pair, values, _ = small_pair(rows=20, packing=8)
    pair.answer(values)
    assert len(drawn) == pair.layout.groups == 3
    assert not np.any(drawn[0] == drawn[1])


def test_the_flood_is_added_at_full_size_before_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real flood is below 2^-20 after the switch and cannot be seen; one of 3 floor(q/t) adds 3 to every result."""

    def visible(degree: int, moduli: UInt64) -> UInt64:
        primes = [int(modulus) for modulus in moduli]
        step = primes[0] * primes[1] * primes[2] >> PARAMETERS.log_t
        return np.array([[3 * step % prime] * degree for prime in primes], np.uint64)

    pair, values, cells = small_pair()
    pad = uniform_residues(20, PARAMETERS)
    monkeypatch.setattr(primitive, "flooding_residues", visible)
    opened = pair.key.open(pair.answer(values, pad), pair.layout)
    clear = aggregate_in_the_clear([values], [cells], 20, [np.zeros(20, np.int64)], PARAMETERS)
    assert np.array_equal(unmask([opened], [pad], PARAMETERS), clear + 3)


# --- noise budget -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "hiding"),
    [
        (choose(150_000), 55),
        (choose(1_000_000), 53),
        (choose(1_000_000, 1, 2.0**45), 55),  # t = 2^50, the largest
        (choose(150_000, 1, 0.0, 12), 47),
        (choose(1_000_000, 1, 0.0, 10), 46),
    ],
)
def test_budget_at_the_parameters_of_the_table(parameters: BFVParameters, hiding: int) -> None:
    """Small data under large parameters, the kernel noise raised to the bound of the chooser: exact, a bit to spare."""
    assert parameters.hiding_bits == hiding
    rng = np.random.default_rng(1)
    cells = random_cells(rng, 300, 12, 3)
    pair = Pair(cells, 12, 32, parameters)
    values = values_of("largest", rng, 300)
    # the noise that the worst job could have: 2^(100 - 20 - hiding) on every coefficient, after a row of ones at most 1
    worst = np.full((3, DEGREE), 1 << (FLOODING_BITS - 20 - hiding), np.uint64)
    noisy = pair.ciphertexts(pair.encrypt(values))
    assert pair.layout.blocks == len(noisy) == 2
    evaluator = sealapi.Evaluator(pair.context)
    for ciphertext in noisy:
        trivial = seal_bytes.trivial_ciphertext(pair.context, pair.context.first_parms_id(), worst)
        evaluator.add_inplace(ciphertext, trivial)
    pad = uniform_residues(12, parameters)
    message = bytes(msgpack.packb([seal_bytes.dump(ciphertext) for ciphertext in noisy]))
    result = pair.design.multiply(message, pad)
    for ciphertext in pair.ciphertexts(result):
        assert ciphertext.coeff_modulus_size() == 1
        budget = pair.key._decryptor.invariant_noise_budget(ciphertext)
        assert budget >= 1
        assert budget >= 60 - parameters.log_t - 1 - 8  # after the switch only its rounding is left
    opened = pair.key.open(result, pair.layout)
    clear = aggregate_in_the_clear([values], [cells], 12, [np.zeros(12, np.int64)], parameters)
    assert np.array_equal(unmask([opened], [pad], parameters), clear)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [0, -8, 3, 16384])
def test_layouts_that_cut_nothing(packing: int) -> None:
    """The number comes from a bank's message: zero must be refused, not divide by it."""
    with pytest.raises(Refused, match="give a divisor"):
        Layout(samples=5, rows=5, rows_per_ciphertext=packing, degree=DEGREE)
    with pytest.raises(Refused, match="give a divisor"):
        BankKey(PARAMETERS).encrypt(np.ones(3, np.int64), packing)


@pytest.mark.parametrize(("samples", "rows"), [(0, 5), (5, 0), (-1, 5)])
def test_empty_matrices(samples: int, rows: int) -> None:
    with pytest.raises(Refused, match="at least"):
        Layout(samples=samples, rows=rows, rows_per_ciphertext=8, degree=DEGREE)


@pytest.mark.parametrize("value", [1 << 31, -(1 << 31), np.iinfo(np.int64).min, np.iinfo(np.int64).max])
def test_values_that_could_leave_t(value: int) -> None:
    """A residual that exploded must not come out as a wrong sum."""
    key = BankKey(PARAMETERS)
    assert PARAMETERS.log_t == 33
    with pytest.raises(Refused, match="clip the values"):
        key.encrypt(np.array([0, value, 0]), 8)
    assert key.encrypt(np.full(4096, VALUE_MAX), 8)


def test_wrong_numbers_of_ciphertexts_and_rows() -> None:
    pair, values, cells = small_pair(samples=1500)
    message, pad = pair.encrypt(values), uniform_residues(20, PARAMETERS)
    parts = msgpack.unpackb(message)
    for wrong in (parts[:-1], [*parts, parts[0]], []):
        with pytest.raises(Refused, match="expected 2"):
            pair.design.multiply(msgpack.packb(wrong), pad)
    result = pair.design.multiply(message, pad)
    parts = msgpack.unpackb(result)
    for wrong in (parts[:-1], [*parts, parts[0]], []):
        with pytest.raises(Refused, match="expected 3"):
            pair.key.open(msgpack.packb(wrong), pair.layout)
    for bad_pad in (pad[:-1], np.zeros((20, 1), np.uint64)):
        with pytest.raises(Refused, match="pad has"):
            pair.design.multiply(message, bad_pad)
    with pytest.raises(Refused, match="plaintext"):
        pair.design.multiply(message, np.full(20, 1 << PARAMETERS.log_t, np.uint64))
    with pytest.raises(Refused, match="2 answers for 1 pads"):
        unmask([pad, pad], [pad], PARAMETERS)
    with pytest.raises(Refused, match="0 answers"):
        unmask([], [], PARAMETERS)
    with pytest.raises(Refused, match="different lengths"):
        unmask([pad, pad[:1]], [pad, pad], PARAMETERS)
    with pytest.raises(Refused, match="shape"):
        OwnerDesign(cells[:-1], pair.layout, PARAMETERS, pair.key.public)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x01", b"\x91\x01", b"\x81\x01\x02", b"\x91\xc4\x03abc"])
def test_messages_that_are_no_ciphertexts(data: bytes) -> None:
    pair, _, _ = small_pair()
    with pytest.raises(Refused, match="damaged"):
        pair.design.multiply(data, uniform_residues(20, PARAMETERS))
    pair, _, _ = small_pair(rows=8)
    with pytest.raises(Refused, match="damaged"):
        pair.key.open(data, pair.layout)


@cache
def one_result() -> tuple[Pair, bytes]:
    pair, values, _ = small_pair()
    return pair, pair.answer(values)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_stays_a_residue(at: int, flip: int) -> None:
    """Nothing but `Refused` escapes. BFV is malleable, so damage may pass here: the seal of the letter finds it."""
    pair, result = one_result()
    message = bytearray(result)
    message[at % len(message)] ^= flip
    try:
        opened = pair.key.open(bytes(message), pair.layout)
    except Refused:
        return
    assert opened.shape == (20,)
    assert int(opened.max()) <= PARAMETERS.mask


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 10**9))
def test_a_cut_message_is_refused(at: int) -> None:
    pair, result = one_result()
    with pytest.raises(Refused, match=r"damaged|expected 3"):
        pair.key.open(result[: at % len(result)], pair.layout)


def test_damage_that_is_no_multiple_of_a_step_never_decrypts() -> None:
    """One coefficient of c1 off by half of q/t: the secret key spreads it over the whole polynomial."""
    pair, result = one_result()
    coefficients = words(pair.ciphertexts(result)[0]).reshape(2, 1, DEGREE)
    level = pair.context.last_parms_id()
    same = swap_first(result, raw_ciphertext(level, coefficients))
    assert np.array_equal(pair.key.open(same, pair.layout), pair.key.open(result, pair.layout))
    for component in (0, 1):
        damaged = coefficients.copy()
        damaged[component, 0, 77] ^= np.uint64(1 << (60 - PARAMETERS.log_t - 1))
        with pytest.raises(Refused, match="no noise budget left"):
            pair.key.open(swap_first(result, raw_ciphertext(level, damaged)), pair.layout)


def test_swapped_results_do_not_unmask() -> None:
    """Two ciphertexts of one result exchanged: the pads no longer fit."""
    pair, values, _ = small_pair(rows=16)
    pad = uniform_residues(16, PARAMETERS)
    parts = msgpack.unpackb(pair.answer(values, pad))
    opened = pair.key.open(msgpack.packb(parts[::-1]), pair.layout)
    assert np.abs(unmask([opened], [pad], PARAMETERS)).max() > len(values) * VALUE_MAX  # owners refuse beyond this


def test_another_jobs_key_opens_nothing() -> None:
    pair, values, _ = small_pair()
    other = BankKey(PARAMETERS)
    with pytest.raises(Refused, match="no noise budget left"):
        other.open(pair.answer(values), pair.layout)
    # residuals under another key than the public key the owner floods with: the mixture decrypts under neither
    mixed = pair.design.multiply(other.encrypt(values, 8), uniform_residues(20, PARAMETERS))
    for key in (pair.key, other):
        with pytest.raises(Refused, match="no noise budget left"):
            key.open(mixed, pair.layout)


def test_another_jobs_parameters_are_refused() -> None:
    pair, values, cells = small_pair()
    other = choose(1_000_000)
    stranger = Pair(cells, 20, 8, other)
    with pytest.raises(Refused, match="SEAL refuses"):
        pair.design.multiply(stranger.encrypt(values), uniform_residues(20, PARAMETERS))
    with pytest.raises(Refused, match="SEAL refuses"):
        pair.key.open(stranger.answer(values), pair.layout)
    with pytest.raises(Refused, match="public key"):
        OwnerDesign(cells, pair.layout, PARAMETERS, stranger.key.public)
    with pytest.raises(Refused, match="public key"):
        OwnerDesign(cells, pair.layout, PARAMETERS, pair.key.public[:-1])


def test_crafted_forms_are_refused_by_both_sides() -> None:
    pair, values, _ = small_pair()
    message, pad = pair.encrypt(values), uniform_residues(20, PARAMETERS)
    result = pair.design.multiply(message, pad)
    levels = {0: pair.context.first_parms_id(), 1: pair.context.last_parms_id()}
    fresh = words(pair.ciphertexts(message)[0]).reshape(2, 3, DEGREE)
    switched = words(pair.ciphertexts(result)[0]).reshape(2, 1, DEGREE)
    for level, polynomials in ((levels[0], fresh), (levels[1], switched)):
        transparent = polynomials.copy()
        transparent[1] = 0
        crafted = [
            raw_ciphertext(level, polynomials, ntt=True),
            raw_ciphertext(level, np.concatenate([polynomials, polynomials[:1]])),
            raw_ciphertext(level, polynomials[:0]),
            raw_ciphertext(level, transparent),
        ]
        for part in crafted:
            receive = (
                partial(pair.design.multiply, swap_first(message, part), pad)
                if level == levels[0]
                else partial(pair.key.open, swap_first(result, part), pair.layout)
            )
            with pytest.raises(Refused, match="not a ciphertext of this step"):
                receive()
    # a result that was not switched down, and a result sent back as if it were residuals
    with pytest.raises(Refused, match="not a ciphertext of this step"):
        pair.key.open(swap_first(result, raw_ciphertext(levels[0], fresh)), pair.layout)
    with pytest.raises(Refused, match="not a ciphertext of this step"):
        pair.design.multiply(swap_first(message, raw_ciphertext(levels[1], switched)), pad)


def test_secrets_do_not_show() -> None:
    pair, _, _ = small_pair()
    assert repr(pair.key) == "BankKey(secret)"
    assert repr(pair.design) == "OwnerDesign(samples=50, rows=20)"


# --- residues ---------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(st.integers(-(1 << 32), (1 << 32) - 1), min_size=1, max_size=50))
def test_residues_are_a_round_trip(values: list[int]) -> None:
    signed = np.array(values, np.int64)
    residues = to_residues(signed, PARAMETERS)
    assert int(residues.max()) < 1 << PARAMETERS.log_t
    assert [int(r) for r in residues] == [value % (1 << PARAMETERS.log_t) for value in values]
    assert np.array_equal(from_residues(residues, PARAMETERS), signed)


# --- what is NOT promised: deviating parties (the module says so) -----------------------------------------------------


def test_epsilon_does_not_bind_an_owner_that_deviates() -> None:
    """LIMIT. An owner that multiplies by 2^11 instead of 1 reads one residual through noise of 8 residuals.

    t must hold a sum over all rows, so a single row has log2(rows) bits of room. The bank cannot see it: what it
    decrypts is uniform either way. DP noise binds an owner only as far as it multiplies by a 0/1 matrix.
    """
    rng = np.random.default_rng(9)
    rows, scale, noise_std = 4096, 1 << 11, 8.0 * VALUE_MAX
    parameters = choose(rows, 1, noise_std)
    values = values_of("random", rng, rows)
    victim = 1234
    cells = np.full((rows, 1), -1, np.int32)
    cells[victim] = 0
    pair = Pair(cells, 1, 1, parameters)
    message = pair.ciphertexts(pair.encrypt(values))[0]
    evaluator = sealapi.Evaluator(pair.context)
    evaluator.multiply_plain_inplace(message, seal_bytes.plaintext(pair.context, np.array([scale], np.uint64)))
    pad = uniform_residues(1, parameters)
    opened = pair.key.open(pair.design.multiply(msgpack.packb([seal_bytes.dump(message)]), pad), pair.layout)
    noise = np.round(rng.normal(0, noise_std, 1)).astype(np.int64)
    stolen = unmask([opened + to_residues(noise, parameters)], [pad], parameters)[0] / scale
    assert abs(stolen - values[victim]) < VALUE_MAX / 16
    assert abs(noise[0]) > VALUE_MAX  # honest use would have drowned it


def test_a_crafted_result_reads_the_banks_key() -> None:
    """LIMIT. An owner that adds q/4 to one coefficient of c1 gets a coefficient of the secret key at every row.

    Nothing at the bank shows it: the noise budget is untouched, the values are masked by the owner's own pad.
    """
    pair, values, _ = small_pair(samples=200, rows=32, packing=32)
    pad = uniform_residues(32, PARAMETERS)
    result = pair.answer(values, pad)
    honest = unmask([pair.key.open(result, pair.layout)], [pad], PARAMETERS)
    level, prime = pair.context.last_parms_id(), pair.design._moduli[0]
    crafted = []
    for part in pair.ciphertexts(result):
        coefficients = words(part).reshape(2, 1, DEGREE)
        coefficients[1, 0, 0] = (coefficients[1, 0, 0] + prime // np.uint64(4)) % prime
        crafted.append(raw_ciphertext(level, coefficients))
    shifted = unmask([pair.key.open(msgpack.packb(crafted), pair.layout)], [pad], PARAMETERS)
    key_at_targets = np.round((shifted - honest) / (1 << (PARAMETERS.log_t - 2))).astype(int)
    quarter = 1 << (PARAMETERS.log_t - 2)
    assert np.array_equal(np.abs(shifted - honest), np.abs(key_at_targets) * quarter)
    # 32 coefficients of a ternary key: one value only has probability 3^-31
    assert len(set(key_at_targets.tolist())) > 1
    assert set(key_at_targets.tolist()) <= {-1, 0, 1}


def test_a_bank_that_encrypts_with_large_noise_sees_where_a_has_ones() -> None:
    """LIMIT. Noise of 2^130 survives a flood of 2^100: the budget of a result tells whether its group has any cell."""
    cells = np.array([[0], [9], [-1]], np.int32)
    pair = Pair(cells, 24, 8)
    noisy = pair.ciphertexts(pair.encrypt(np.ones(3, np.int64)))[0]
    residues = np.array([[pow(2, 134, int(m))] + [0] * (DEGREE - 1) for m in pair.design._moduli], np.uint64)
    level = pair.context.first_parms_id()
    sealapi.Evaluator(pair.context).add_inplace(noisy, seal_bytes.trivial_ciphertext(pair.context, level, residues))
    message = bytes(msgpack.packb([seal_bytes.dump(noisy)]))
    result = pair.design.multiply(message, uniform_residues(24, PARAMETERS))
    budgets = [pair.key._decryptor.invariant_noise_budget(part) for part in pair.ciphertexts(result)]
    # groups 0 and 1 hold a customer, group 2 does not
    assert all(budgets[2] >= budget + 4 for budget in itertools.islice(budgets, 2))
