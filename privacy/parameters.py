"""The chooser of BFV parameters: everything follows from rows, bit widths and number of parties.

Guarantee: what it returns decrypts exactly, has 128-bit security (the homomorphic encryption standard's table, enforced
by SEAL as TC128) and, for a blind aggregate, hides the feature owner's matrix by at least 40 statistical bits;
anything else is `Refused`. Nothing is ever weakened to make a job fit.
Units: rows are counted over ALL banks (one plaintext modulus t = 2^log_t for all, else the banks' masks do not cancel);
bit widths include the sign.
Source: PROTOCOL "BFV parameters"; homomorphicencryption.org standard (2018), table for ternary secrets.

    log2 t  >= 1 + log2(rows * max|v| * max|A| + 12 sigma)
    noise    = 21.5 * rows * max|A| * features         (largest fresh noise plus rounding, times the L1 norm of A)
    hiding   = 100 - log2(noise) - 20                  (flooding by uniform 100-bit integers)
The 20 bits: a round releases N = 2^13 coefficients for each group of rows of A; each shifts its flood by at most 21.5
times the L1 norm of its group, and the norms of the groups add up to that of A. So all groups together are within
2^13 noise / 2^100 of uniform, and a job may have 2^7 rounds.
"""

import math
from dataclasses import dataclass

from privacy.errors import Refused

FLOODING_BITS = 100
LEAST_HIDING_BITS = 40
_RELEASED_COEFFICIENTS_BITS = 20
_FRESH_NOISE = 21.5  # SEAL 4 draws a centred binomial of 42 bits: |e| <= 21 always; the encoding rounds by one half
_AFTER_SWITCH_NOISE_BITS = 8  # rounding times a ternary secret at N = 8192: twelve sigma is 2^8


@dataclass(frozen=True, kw_only=True)
class BFVParameters:
    """A parameter set, as it is written into the contract, the result and the report."""

    degree: int
    prime_bits: tuple[int, ...]
    log_t: int
    hiding_bits: int
    """Statistical bits that hide the feature owner's matrix from the key holder; 0 where nothing is multiplied."""

    @property
    def log_q(self) -> int:
        """Bits of the whole coefficient modulus, the special prime included (this is what security is about)."""
        return sum(self.prime_bits)

    @property
    def security_bits(self) -> int:
        return 128

    @property
    def mask(self) -> int:
        return (1 << self.log_t) - 1


def choose_aggregate(*, rows: int, value_bits: int, matrix_bits: int, features: int, noise_std: float) -> BFVParameters:
    """Parameters of a blind aggregate S = sum of A v over `rows` rows.

    `value_bits` and `matrix_bits` are widths of the entries of v and A with sign (a 0/1 matrix: 1), |v| up to
    2^(value_bits - 1) included; `features` is the largest number of non-zero entries of A that one sample has;
    `noise_std` is the standard deviation of all banks' noise together, in the integer units of v.
    """
    if rows < 1 or value_bits < 2 or matrix_bits < 1 or features < 1 or not 0 <= noise_std < math.inf:
        raise Refused(f"no parameters for {rows=} {value_bits=} {matrix_bits=} {features=} {noise_std=}")
    matrix_max = 1 << (matrix_bits - 1)
    # in integers: a logarithm in floating point loses the one that keeps +t/2 out
    largest = rows * (1 << (value_bits - 1)) * matrix_max + math.ceil(12 * noise_std)
    log_t = 1 + largest.bit_length()
    if log_t > 50:
        raise Refused(
            f"a sum over {rows} rows of {value_bits}-bit values times {matrix_bits}-bit entries needs t=2^{log_t}, the "
            "limit is 2^50; use fewer bits, fewer rows or less noise"
        )
    worst = math.log2(_FRESH_NOISE * rows * matrix_max * features)
    hiding = math.floor(FLOODING_BITS - worst - _RELEASED_COEFFICIENTS_BITS)
    if hiding < LEAST_HIDING_BITS:
        raise Refused(
            f"a matrix of {matrix_bits} bits over {rows} rows would be hidden by {hiding} bits only, the limit is "
            f"{LEAST_HIDING_BITS}; use fewer bits or fewer rows"
        )
    prime_bits = (60, 60, 60, 18)
    if 180 - log_t - 1 - (FLOODING_BITS + 1) < 1 or 60 - log_t - 1 - _AFTER_SWITCH_NOISE_BITS < 0:
        raise Refused(f"t=2^{log_t} leaves no noise budget with primes {prime_bits}; use fewer bits or fewer rows")
    return BFVParameters(degree=8192, prime_bits=prime_bits, log_t=log_t, hiding_bits=hiding)


def choose_sum(*, parties: int) -> BFVParameters:
    """Parameters of a sum of fresh ciphertexts of `parties` banks under one key: t as large as stays exact."""
    if parties < 1:
        raise Refused(f"a sum needs at least one party, got {parties}")
    noise = min(12 * 3.3 * math.sqrt(parties), _FRESH_NOISE * parties)
    log_t = min(48, 60 - 1 - 1 - math.ceil(math.log2(noise)))
    if log_t < 40:
        raise Refused(f"a sum over {parties} parties leaves t=2^{log_t}, the limit is 2^40; sum in groups")
    return BFVParameters(degree=4096, prime_bits=(60, 18), log_t=log_t, hiding_bits=0)


def slots_per_coefficient(parameters: BFVParameters, largest_sum: int) -> tuple[int, int]:
    """(slots, bits of a slot) with which signed sums of magnitude at most `largest_sum` are packed."""
    if largest_sum < 0:
        raise Refused(f"a bound of {largest_sum} for magnitudes; give 0 or more")
    width = 1 + max(1, largest_sum.bit_length())
    if width > parameters.log_t:
        raise Refused(
            f"sums up to {largest_sum} need {width} bits, a coefficient has {parameters.log_t}; scale the values down"
        )
    return parameters.log_t // width, width


def rows_per_ciphertext(*, bank_rows: int, matrix_rows: int, owners: int) -> int:
    """How many rows of A share one ciphertext (a power of two): the balance of upload n c / N and download R / c.

    An upload ciphertext travels to the coordinator and to every owner (seeded: 1.5 result ciphertexts of three primes
    against one), a result travels twice; the work of the kernel does not depend on it.
    """
    ratio = matrix_rows * 8192 * 2.0 / (max(bank_rows, 1) * 1.5 * (1 + max(owners, 1)))
    return 1 << min(5, max(0, round(math.log2(math.sqrt(max(ratio, 1.0))))))
