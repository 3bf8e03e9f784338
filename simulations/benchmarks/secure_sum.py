"""Secure sum of model parameters over banks: our exact BFV sums against the CKKS of NVIDIA FLARE, in the same run.

Ours, for each bank: pack, add its pairwise masks, encrypt under the consortium key; then the coordinator adds, a bank
decrypts. A value takes as many bits as its SUM needs, so two readings of "24 bits" are measured: values of 24 bits each
(their sum over ten banks has 28), and sums of 24 bits (values clipped to a tenth of it).
Baseline: TenSEAL CKKSVector, N 8192, primes [60, 40, 40], scale 2^40, secret-key encryption (NVIDIA FLARE's HEBuilder
and its defaults). It adds no masks: whoever holds the key can open one client's update.
Both times include writing and reading the bytes that travel. Unit: seconds of one process, bytes per parameter.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt
import tenseal
from rich.table import Table

from privacy.masks import pairwise_mask
from privacy.parameters import choose_sum
from privacy.sealing import JobKeys
from privacy.secure_sum import ConsortiumKey, add_ciphertexts, pack, packed_length, unpack

CKKS_DEGREE = 8192
CKKS_PRIME_BITS = [60, 40, 40]
CKKS_SCALE_BITS = 40
LARGEST_CKKS_ERROR = 1e-5
"""CKKS is approximate: a sum of ten values in [-1, 1] that misses by more is not the sum."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A sum of `parameters` values over `banks` banks."""

    parameters: int
    banks: int

    def __post_init__(self) -> None:
        if self.parameters < 1 or self.banks < 2:
            raise ValueError(f"{self}: at least one parameter and two banks")


FULL = Size(parameters=1_000_000, banks=10)
QUICK = Size(parameters=20_000, banks=3)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One way to sum. Seconds: `mask` and `encrypt` of one bank (median over banks), `add` of all, `decrypt` of one.

    `error`: largest difference to the sum in the clear, in units of the largest value of one bank.
    """

    name: str
    mask: float
    encrypt: float
    add: float
    decrypt: float
    bytes_up: int
    parameters: int
    error: float
    exact: bool

    @property
    def bytes_per_parameter(self) -> float:
        return self.bytes_up / self.parameters


def measure(size: Size = FULL) -> list[Figures]:
    """CKKS first (the baseline), then ours: values and sums of 24 and of 16 bits."""
    return [
        measure_ckks(size),
        measure_ours("values of 24 bits", size, largest_value=(1 << 23) - 1),
        measure_ours("sums of 24 bits", size, largest_value=((1 << 23) - 1) // size.banks),
        measure_ours("values of 16 bits", size, largest_value=(1 << 15) - 1),
        measure_ours("sums of 16 bits", size, largest_value=((1 << 15) - 1) // size.banks),
    ]


def measure_ours(name: str, size: Size, *, largest_value: int) -> Figures:
    """The pieces of the vaults and the coordinator, pairwise masks included."""
    rng = np.random.default_rng(2)
    vectors = [
        rng.integers(-largest_value, largest_value, size.parameters, dtype=np.int64, endpoint=True)
        for _ in range(size.banks)
    ]
    parameters = choose_sum(parties=size.banks)
    largest_sum = size.banks * largest_value
    length = packed_length(size.parameters, largest_sum, parameters)
    banks = tuple(f"bank_{number}" for number in range(size.banks))
    keys = {bank: JobKeys.generate() for bank in banks}
    consortium = ConsortiumKey(parameters)
    modulus = np.uint64(parameters.mask)
    masking, encrypting, encrypted = [], [], []
    for bank, vector in zip(banks, vectors, strict=True):
        started = time.perf_counter()
        mask = pairwise_mask(
            bank,
            keys[bank],
            {other: keys[other].public for other in banks if other != bank},
            job=bytes(32),
            step="benchmark",
            attempt=0,
            participants=banks,
            receiver="consortium",
            length=length,
            modulus_bits=parameters.log_t,
        )
        masked = time.perf_counter()
        encrypted.append(consortium.encrypt((pack(vector, largest_sum, parameters) + mask) & modulus))
        encrypting.append(time.perf_counter() - masked)
        masking.append(masked - started)
    started = time.perf_counter()
    summed = add_ciphertexts(encrypted, parameters)
    added = time.perf_counter()
    total = unpack(consortium.open(summed, length), size.parameters, largest_sum, parameters)
    decrypt = time.perf_counter() - added
    difference = int(np.abs(total - np.sum(vectors, axis=0)).max())
    return Figures(
        name=name,
        mask=median(masking),
        encrypt=median(encrypting),
        add=added - started,
        decrypt=decrypt,
        bytes_up=len(encrypted[0]),
        parameters=size.parameters,
        error=difference / largest_value,
        exact=difference == 0,
    )


def measure_ckks(size: Size) -> Figures:
    """TenSEAL as NVIDIA FLARE sets it up. Approximate, so never `exact`; an error beyond its precision raises."""
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=CKKS_DEGREE,
        coeff_mod_bit_sizes=CKKS_PRIME_BITS,
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.global_scale = 2**CKKS_SCALE_BITS
    rng = np.random.default_rng(3)
    vectors = [rng.uniform(-1.0, 1.0, size.parameters) for _ in range(size.banks)]
    encrypting, encrypted = [], []
    for vector in vectors:
        started = time.perf_counter()
        with _silenced():
            encrypted.append(tenseal.ckks_vector(context, vector).serialize())
        encrypting.append(time.perf_counter() - started)
    started = time.perf_counter()
    total = tenseal.ckks_vector_from(context, encrypted[0])
    for data in encrypted[1:]:
        total += tenseal.ckks_vector_from(context, data)
    summed = total.serialize()
    added = time.perf_counter()
    opened = np.array(tenseal.ckks_vector_from(context, summed).decrypt())
    decrypt = time.perf_counter() - added
    error = float(np.abs(opened - np.sum(vectors, axis=0)).max())
    if error > LARGEST_CKKS_ERROR:
        raise ArithmeticError(f"CKKS baseline: a sum is off by {error:g}, the limit is {LARGEST_CKKS_ERROR:g}")
    return Figures(
        name="TenSEAL CKKS (NVFlare)",
        mask=0.0,
        encrypt=median(encrypting),
        add=added - started,
        decrypt=decrypt,
        bytes_up=len(encrypted[0]),
        parameters=size.parameters,
        error=error,
        exact=False,
    )


@contextmanager
def _silenced() -> Iterator[None]:
    """TenSEAL's C++ prints three lines of warning for every vector of more than 4096 values (matmul is disabled)."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def tables(figures: Sequence[Figures], size: Size) -> list[Table]:
    """A line for each way; ratios are of the baseline over ours."""
    table = Table(
        title=f"Secure sum: {size.parameters:,} parameters, {size.banks} banks",
        caption="Ratios: the CKKS baseline of this run over ours; the bank's time includes the pairwise masks.",
    )
    for name in (
        "",
        "masks s/bank",
        "encrypt s/bank",
        f"add {size.banks} s",
        "decrypt s",
        "bytes up/parameter",
        "bank faster",
        "bytes fewer",
        "largest error",
    ):
        table.add_column(name, justify="right" if name else "left")
    baseline = figures[0]
    for line in figures:
        table.add_row(
            line.name,
            f"{line.mask:.3f}",
            f"{line.encrypt:.3f}",
            f"{line.add:.3f}",
            f"{line.decrypt:.3f}",
            f"{line.bytes_per_parameter:.1f}",
            f"{(baseline.mask + baseline.encrypt) / (line.mask + line.encrypt):.1f}",
            f"{baseline.bytes_up / line.bytes_up:.1f}",
            "exact" if line.exact else f"{line.error:.0e}",
        )
    return [table]
