"""The kernel of training: a blind aggregate of g and h (two vectors, never packed together) by (feature, bin).

Measured: the bank's encryption, the feature owner's matrix (cut and built once per job) and product (every round, with
masks and flooding), the bank's opening. Every sum is compared with the same sums in the clear.
Baseline in the same run: python-paillier, 2048 bit (about 112-bit security, ours has 128), which encrypts every g and
h, adds ciphertexts by bin and decrypts the sums, without any masks. It is measured on a few rows and scaled linearly in
rows (encryption, additions) and in bins (decryption): each of these costs the same for every row.
Unit: seconds of one process. Source: Paillier 1999; the protocol of SecureBoost (Cheng et al. 2021).
"""

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from types import ModuleType

import numpy as np
import numpy.typing as npt
from rich.table import Table

from models.fixed_point import RESIDUAL_BITS
from privacy.blind_aggregate import BankKey, Layout, OwnerDesign, aggregate_in_the_clear, uniform_residues, unmask
from privacy.parameters import choose_aggregate, rows_per_ciphertext

LEAST_RATIO = 100.0
"""The bar: so many times faster than python-paillier."""

PAILLIER_BITS = 2048
DECRYPTIONS = 32

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Size:
    """rows x features x bins of the histogram."""

    rows: int
    features: int
    bins: int

    def __post_init__(self) -> None:
        if min(self.rows, self.features, self.bins) < 1:
            raise ValueError(f"{self}: every size must be at least 1")

    @property
    def sums(self) -> int:
        return self.features * self.bins

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.features} x {self.bins}"


FULL = (Size(rows=30_000, features=10, bins=32), Size(rows=150_000, features=10, bins=32))
QUICK = (Size(rows=2_000, features=3, bins=8),)


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Seconds for both vectors together (median of `repeats`), bytes for both.

    `build` is what the matrix costs once per job: cutting, and what the first product took longer than the second.
    `multiply` is twice the second product.
    """

    repeats: int
    encrypt: float
    build: float
    multiply: float
    open: float
    bytes_up: int
    bytes_down: int
    log_t: int
    hiding_bits: int
    rows_per_ciphertext: int
    exact: bool

    @property
    def total(self) -> float:
        return self.encrypt + self.build + self.multiply + self.open


@dataclass(frozen=True, kw_only=True)
class Paillier:
    """Seconds of single operations, measured on `sample_rows` rows."""

    sample_rows: int
    encryption: float
    addition: float
    decryption: float
    exact: bool

    def total(self, size: Size) -> float:
        """Both vectors, scaled linearly: 2 n encryptions, 2 (n F - R) additions, 2 R decryptions."""
        additions = max(size.rows * size.features - size.sums, 0)
        return 2 * (size.rows * self.encryption + additions * self.addition + size.sums * self.decryption)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One size. `ratio`: python-paillier over ours; `ratio_if_packed`: had that put g and h in one plaintext."""

    size: Size
    ours: Ours
    paillier: Paillier
    paillier_seconds: float
    ratio: float
    ratio_if_packed: float

    @property
    def exact(self) -> bool:
        return self.ours.exact and self.paillier.exact


def measure(sizes: Sequence[Size] = FULL, *, repeats: int = 3, sample_rows: int = 200) -> list[Figures]:
    """All sizes; python-paillier is measured once, on `sample_rows` rows of the first size."""
    baseline = measure_paillier(sizes[0], sample_rows)
    figures = []
    for size in sizes:
        ours = measure_ours(size, repeats)
        seconds = baseline.total(size)
        figures.append(
            Figures(
                size=size,
                ours=ours,
                paillier=baseline,
                paillier_seconds=seconds,
                ratio=seconds / ours.total,
                ratio_if_packed=seconds / 2 / ours.total,
            )
        )
    return figures


def measure_ours(size: Size, repeats: int) -> Ours:
    """One bank, one feature owner, fresh keys and pads in every repetition."""
    vectors, cells = _data(size)
    parameters = choose_aggregate(
        rows=size.rows, value_bits=RESIDUAL_BITS + 1, matrix_bits=1, features=size.features, noise_std=0.0
    )
    packing = rows_per_ciphertext(bank_rows=size.rows, matrix_rows=size.sums, owners=1)
    layout = Layout(samples=size.rows, rows=size.sums, rows_per_ciphertext=packing, degree=parameters.degree)
    no_noise = np.zeros(size.sums, np.int64)
    expected = [aggregate_in_the_clear([v], [cells], size.sums, [no_noise], parameters) for v in vectors]
    spent: list[tuple[float, float, float, float]] = []
    exact = True
    bytes_up = bytes_down = 0
    for _ in range(repeats):
        key = BankKey(parameters)
        at = [time.perf_counter()]
        encrypted = [key.encrypt(v, packing) for v in vectors]
        at.append(time.perf_counter())
        design = OwnerDesign(cells, layout, parameters, key.public)
        at.append(time.perf_counter())
        pads, products = [], []
        for part in encrypted:
            pads.append(uniform_residues(size.sums, parameters))
            products.append(design.multiply(part, pads[-1]))
            at.append(time.perf_counter())
        opened = [key.open(product, layout) for product in products]
        at.append(time.perf_counter())
        encrypt, cut, first, second, opening = np.diff(at).tolist()
        spent.append((encrypt, cut + max(first - second, 0.0), first + second - max(first - second, 0.0), opening))
        sums = [unmask([answer], [pad], parameters) for answer, pad in zip(opened, pads, strict=True)]
        exact = exact and all(np.array_equal(s, e) for s, e in zip(sums, expected, strict=True))
        bytes_up, bytes_down = sum(map(len, encrypted)), sum(map(len, products))
    encrypt, build, multiply, opening = (median(part) for part in zip(*spent, strict=True))
    return Ours(
        repeats=repeats,
        encrypt=encrypt,
        build=build,
        multiply=multiply,
        open=opening,
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        log_t=parameters.log_t,
        hiding_bits=parameters.hiding_bits,
        rows_per_ciphertext=packing,
        exact=exact,
    )


def measure_paillier(size: Size, sample_rows: int) -> Paillier:
    """g of `sample_rows` rows: encrypt each, add by bin, decrypt up to 32 sums and compare them."""
    paillier = _python_paillier()
    sample = Size(rows=min(sample_rows, size.rows), features=size.features, bins=size.bins)
    (values, _), cells = _data(sample)
    public, private = paillier.generate_paillier_keypair(n_length=PAILLIER_BITS)
    started = time.perf_counter()
    encrypted = [public.encrypt(value) for value in values.tolist()]
    encryption = (time.perf_counter() - started) / sample.rows
    sums: dict[int, object] = {}
    additions = 0
    started = time.perf_counter()
    for ciphertext, row in zip(encrypted, cells.tolist(), strict=True):
        for cell in row:
            if cell in sums:
                sums[cell] = sums[cell] + ciphertext
                additions += 1
            else:
                sums[cell] = ciphertext
    addition = (time.perf_counter() - started) / max(additions, 1)
    chosen = sorted(sums)[:DECRYPTIONS]
    started = time.perf_counter()
    opened = [private.decrypt(sums[cell]) for cell in chosen]
    decryption = (time.perf_counter() - started) / len(chosen)
    expected = [int(values[(cells == cell).any(axis=1)].sum()) for cell in chosen]
    return Paillier(
        sample_rows=sample.rows,
        encryption=encryption,
        addition=addition,
        decryption=decryption,
        exact=opened == expected,
    )


def _python_paillier() -> ModuleType:
    # only this baseline needs it, and only the dev extra brings it
    try:
        paillier, util = importlib.import_module("phe.paillier"), importlib.import_module("phe.util")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: the kernel's baseline needs python-paillier; pip install phe gmpy2"
        ) from None
    if not util.HAVE_GMP:
        raise ModuleNotFoundError("python-paillier without gmpy2 is an unfairly slow baseline; pip install gmpy2")
    return paillier


def tables(figures: Sequence[Figures]) -> list[Table]:
    """Ours and the baseline, a line a size."""
    table = Table(
        title="Kernel: blind aggregate of g and h, seconds for both vectors",
        caption=(
            f"python-paillier {PAILLIER_BITS} bit: measured on {figures[0].paillier.sample_rows} rows, scaled linearly "
            f"(no masks, no flooding); ratio in brackets: had it packed g and h together. Bar: {LEAST_RATIO:.0f} times."
        ),
    )
    for name in (
        "rows x features x bins",
        "encrypt",
        "cut + build (once)",
        "multiply",
        "open",
        "total",
        "MB up",
        "MB down",
        "python-paillier",
        "ratio",
        "exact",
    ):
        table.add_column(name, justify="left" if name.startswith("rows") else "right")
    for line in figures:
        ours = line.ours
        table.add_row(
            str(line.size),
            f"{ours.encrypt:.3f}",
            f"{ours.build:.3f}",
            f"{ours.multiply:.3f}",
            f"{ours.open:.3f}",
            f"{ours.total:.3f}",
            f"{ours.bytes_up / 1e6:.1f}",
            f"{ours.bytes_down / 1e6:.1f}",
            f"{line.paillier_seconds:.0f}",
            f"{line.ratio:.0f} ({line.ratio_if_packed:.0f})",
            "yes" if line.exact else "NO",
        )
    return [table]


def _data(size: Size) -> tuple[tuple[Int64, Int64], Int32]:
    """g in [-1/2, 1/2], h in [0, 1/4] in units of 2^-19, and the bin of every feature: invented, seeded."""
    rng = np.random.default_rng(1)
    half = 1 << (RESIDUAL_BITS - 1)
    g = rng.integers(-half, half, size.rows, dtype=np.int64, endpoint=True)
    h = rng.integers(0, half // 2, size.rows, dtype=np.int64, endpoint=True)
    bins = rng.integers(0, size.bins, (size.rows, size.features))
    return (g, h), (bins + np.arange(size.features) * size.bins).astype(np.int32)
