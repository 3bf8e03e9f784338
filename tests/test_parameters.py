"""The chooser of BFV parameters: the protocol's table, exact at its limits, monotone, never weaker than promised."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tenseal.sealapi as sealapi
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import seal_bytes
from privacy.errors import Refused
from privacy.parameters import (
    FLOODING_BITS,
    LEAST_HIDING_BITS,
    BFVParameters,
    choose_aggregate,
    choose_sum,
    rows_per_ciphertext,
    slots_per_coefficient,
)

ROWS = st.integers(1, 4_000_000)
VALUE_BITS = st.integers(2, 24)
MATRIX_BITS = st.integers(1, 14)
FEATURES = st.integers(1, 60)
NOISE = st.floats(0, 1e9)


def choose(rows: int, value_bits: int, matrix_bits: int, features: int, noise_std: float) -> BFVParameters | None:
    try:
        return choose_aggregate(
            rows=rows, value_bits=value_bits, matrix_bits=matrix_bits, features=features, noise_std=noise_std
        )
    except Refused:
        return None


# --- the table of PROTOCOL.md -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "value_bits", "matrix_bits", "table_log_t", "table_hiding"),
    [
        (150_000, 20, 1, 38, 58),
        (1_000_000, 20, 1, 42, 55),
        (150_000, 20, 12, 50, 47),
        (1_000_000, 20, 10, 50, 46),
    ],
)
def test_the_table_of_the_protocol(
    rows: int, value_bits: int, matrix_bits: int, table_log_t: int, table_hiding: int
) -> None:
    chosen = choose(rows, value_bits, matrix_bits, 1, 0.0)
    assert chosen is not None
    assert (chosen.degree, chosen.prime_bits) == (8192, (60, 60, 60, 18))
    # the table rounds t up by as much as two bits; the chooser takes the least t that is exact
    assert table_log_t - 2 <= chosen.log_t <= table_log_t
    assert chosen.hiding_bits == table_hiding
    assert chosen.security_bits == 128
    assert chosen.log_q == 198


def test_what_the_table_refuses() -> None:
    with pytest.raises(Refused, match=r"needs t=2\^51, the limit is 2\^50"):
        choose_aggregate(rows=1_000_000, value_bits=20, matrix_bits=12, features=1, noise_std=0.0)


def test_horizontal_row_of_the_table() -> None:
    chosen = choose_sum(parties=10)
    assert (chosen.degree, chosen.prime_bits, chosen.log_t, chosen.hiding_bits) == (4096, (60, 18), 48, 0)
    assert slots_per_coefficient(chosen, (1 << 23) - 1) == (2, 24)
    assert slots_per_coefficient(chosen, (1 << 15) - 1) == (3, 16)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rows": 0},
        {"value_bits": 1},
        {"matrix_bits": 0},
        {"features": 0},
        {"noise_std": -1.0},
        {"noise_std": math.nan},
        {"noise_std": math.inf},
    ],
)
def test_nonsense_is_refused(arguments: dict[str, float]) -> None:
    given_arguments = {"rows": 10, "value_bits": 20, "matrix_bits": 1, "features": 1, "noise_std": 0.0} | arguments
    with pytest.raises(Refused, match="no parameters for"):
        choose_aggregate(**given_arguments)  # type: ignore[arg-type]


def test_too_little_hiding_is_refused() -> None:
    """2^36 of noise would be hidden by 100 - 36 - 20 = 44 bits; 2^41 by 39."""
    assert choose(1 << 16, 4, 17, 1, 0.0) is not None
    with pytest.raises(Refused, match=f"limit is {LEAST_HIDING_BITS}"):
        choose_aggregate(rows=1 << 16, value_bits=4, matrix_bits=17, features=64, noise_std=0.0)


def test_too_much_noise_is_refused() -> None:
    with pytest.raises(Refused, match=r"the limit is 2\^50"):
        choose_aggregate(rows=1000, value_bits=20, matrix_bits=1, features=1, noise_std=2.0**47)


def test_too_many_parties_are_refused() -> None:
    assert choose_sum(parties=10_000).log_t >= 40
    with pytest.raises(Refused, match="sum in groups"):
        choose_sum(parties=10**8)
    with pytest.raises(Refused, match="at least one party"):
        choose_sum(parties=0)


# --- laws -------------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=300)
@given(ROWS, VALUE_BITS, MATRIX_BITS, FEATURES, NOISE)
def test_what_is_chosen_keeps_every_promise(
    rows: int, value_bits: int, matrix_bits: int, features: int, noise_std: float
) -> None:
    chosen = choose(rows, value_bits, matrix_bits, features, noise_std)
    if chosen is None:
        return
    matrix_max = 1 << (matrix_bits - 1)
    largest = rows * (1 << (value_bits - 1)) * matrix_max + math.ceil(12 * noise_std)
    half = 1 << (chosen.log_t - 1)
    assert largest < half <= 2 * max(largest, 1)  # exact, and not larger than needed: +largest is below t/2
    noise = 43 * rows * matrix_max * features  # twice the bound of 21.5 for one entry
    # all coefficients of 2^7 rounds together are within 2^-hiding of uniform
    assert noise << (13 + 7 + chosen.hiding_bits - 1) <= 1 << FLOODING_BITS
    assert chosen.hiding_bits >= LEAST_HIDING_BITS
    # flood, kernel noise and the encryption of zero stay below q / 2t; after the switch twelve sigma do
    assert (1 << FLOODING_BITS) + noise + (1 << 20) < 1 << (179 - chosen.log_t - 1)
    assert 60 - chosen.log_t >= 8 + 1


@settings(derandomize=True, deadline=None, max_examples=300)
@given(ROWS, VALUE_BITS, MATRIX_BITS, FEATURES, NOISE, st.integers(0, 4), st.integers(1, 1000))
def test_monotone_in_every_argument(
    rows: int, value_bits: int, matrix_bits: int, features: int, noise_std: float, which: int, more: int
) -> None:
    """A harder job never gets a smaller t, never claims more hiding, and never becomes possible."""
    easier = choose(rows, value_bits, matrix_bits, features, noise_std)
    harder = choose(
        rows + more * (which == 0),
        value_bits + min(more, 4) * (which == 1),
        matrix_bits + min(more, 4) * (which == 2),
        features + more * (which == 3),
        noise_std + 1e6 * more * (which == 4),
    )
    if easier is None:
        assert harder is None
    elif harder is not None:
        assert harder.log_t >= easier.log_t
        assert harder.hiding_bits <= easier.hiding_bits


@pytest.mark.parametrize("power", [10, 20, 30])
def test_the_largest_sum_stays_below_half_of_t(power: int) -> None:
    """rows x max|v| an exact power of two: the sum +2^k needs t/2 > 2^k. At 2^49 a logarithm in floating point gives
    t=2^50, and +2^49 would come out as -2^49."""
    chosen = choose(1 << power, 20, 1, 1, 0.0)
    if power == 30:
        assert chosen is None
    else:
        assert chosen is not None
        assert 1 << (chosen.log_t - 1) > 1 << (power + 19)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_choose_sum_is_monotone(parties: int, more: int) -> None:
    assert choose_sum(parties=parties + more).log_t <= choose_sum(parties=parties).log_t <= 48


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(0, (1 << 47) - 1), st.integers(40, 48))
def test_slots_hold_both_signs_of_the_bound(largest_sum: int, log_t: int) -> None:
    parameters = replace(choose_sum(parties=2), log_t=log_t)
    if largest_sum >= 1 << (log_t - 1):
        with pytest.raises(Refused, match="scale the values down"):
            slots_per_coefficient(parameters, largest_sum)
        return
    slots, width = slots_per_coefficient(parameters, largest_sum)
    assert largest_sum < 1 << (width - 1)
    assert width == 2 or 1 << (width - 2) <= largest_sum  # not a bit more than needed
    assert slots * width <= log_t < (slots + 1) * width


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(Refused, match="magnitudes"):
        slots_per_coefficient(choose_sum(parties=2), -1)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 5000), st.integers(0, 10))
def test_rows_per_ciphertext_divides_the_degree(bank_rows: int, matrix_rows: int, owners: int) -> None:
    chosen = rows_per_ciphertext(bank_rows=bank_rows, matrix_rows=matrix_rows, owners=owners)
    assert chosen in {1, 2, 4, 8, 16, 32}
    fewer = rows_per_ciphertext(bank_rows=10 * bank_rows + 1, matrix_rows=matrix_rows, owners=owners)
    assert fewer <= chosen or bank_rows == 0  # more uploads: pack less


# --- SEAL agrees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parameters",
    [
        choose_aggregate(rows=1_000_000, value_bits=20, matrix_bits=1, features=26, noise_std=0.0),
        choose_aggregate(rows=150_000, value_bits=20, matrix_bits=12, features=26, noise_std=0.0),
        choose_sum(parties=10),
        choose_sum(parties=10_000),
    ],
)
def test_seal_holds_what_is_chosen_for_128_bits(parameters: BFVParameters) -> None:
    context = seal_bytes.make_context(parameters.degree, parameters.prime_bits, parameters.log_t)
    assert context.parameters_set()
    bits = [int(m.value()).bit_length() for m in context.key_context_data().parms().coeff_modulus()]
    assert tuple(bits) == parameters.prime_bits
    assert parameters.log_q <= sealapi.CoeffModulus.MaxBitCount(parameters.degree, sealapi.SEC_LEVEL_TYPE.TC128)


def test_a_weaker_set_is_refused_by_seal() -> None:
    chosen = choose_aggregate(rows=1000, value_bits=20, matrix_bits=1, features=1, noise_std=0.0)
    with pytest.raises(Refused, match="128-bit security"):
        seal_bytes.make_context(4096, chosen.prime_bits, chosen.log_t)


def test_fresh_noise_is_below_the_bound_of_the_chooser() -> None:
    """|e| + 1/2 <= 21.5 for every one of 2^17 coefficients, read off the phase by a decryptor of the largest t."""
    parameters = choose_sum(parties=1)
    context = seal_bytes.make_context(parameters.degree, parameters.prime_bits, parameters.log_t)
    secret = sealapi.KeyGenerator(context).secret_key()
    encryptor, decryptor = sealapi.Encryptor(context, secret), sealapi.Decryptor(context, secret)
    budgets = []
    for _ in range(32):
        ciphertext = sealapi.Ciphertext(context)
        encryptor.encrypt_symmetric(seal_bytes.plaintext(context, np.zeros(4096, np.uint64)), ciphertext)
        budgets.append(decryptor.invariant_noise_budget(ciphertext))
    # budget = floor(log2(q / 2 t e)): 60 - 48 - 1 - log2(21) > 6.6; and the noise is really there
    assert min(budgets) >= 6
    assert max(budgets) <= 8
