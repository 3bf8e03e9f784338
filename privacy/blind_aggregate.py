"""Blind aggregate: a feature owner learns S = sum over banks b of A_b v_b (+ noise), and nobody anything else.

A_b (R x n_b integers, here: 0/1 given by cells) is the owner's, v_b (n_b signed integers) is bank b's.

1. `BankKey.encrypt` - bank b encrypts v_b under its own fresh BFV key.
2. `OwnerDesign.multiply` - the owner multiplies by its plaintext A_b, adds uniform masks on every coefficient (its pad
   s_b on the R results; uniform values elsewhere, which would be cross-correlations), floods, drops to one prime.
3. `BankKey.open` - bank b decrypts R values that are uniform modulo t; it adds its noise share and its pairwise masks.
4. `unmask` - the owner adds the banks' answers, subtracts its pads, and holds S.

Guarantee (semi-honest parties): the bank sees uniform values, and a ciphertext that it cannot tell from one that does
not depend on A: its phase c0 + c1 s is uniform up to 2^-hiding_bits (mask and flood), and its c1 is hidden by the fresh
encryption of zero (RLWE; the c1 of the bare product is a known linear function of A). The switch to one prime comes
last: public arithmetic on what is hidden already. The owner sees only the sum over the banks, single banks being
protected by their pairwise masks; whoever relays sees BFV ciphertexts.
Exact: integers modulo t = 2^log_t, t from the chooser, never a wrong or rounded sum.
NOT guaranteed against a party that deviates, for nobody proves what it multiplied or encrypted:
* an owner with entries of A larger than 1 drowns the banks' DP noise and reads single residuals; with crafted
  ciphertexts it uses the bank as a decryption oracle on the bank's own key;
* a bank with a false public key, or with encryptions of noise above 2^100, reads A.
Assumes: RLWE at 128 bits (SEAL TC128), masks from a cryptographic generator, each key for one job only.
Source: BFV (Brakerski 2012; Fan, Vercauteren 2012); packing of a matrix-vector product in polynomial coefficients
(Cheetah, Huang et al. 2022; Iron, Hao et al. 2022); noise flooding (Gentry 2009).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import tenseal.sealapi as sealapi

from privacy import seal_bytes
from privacy.errors import Refused
from privacy.parameters import FLOODING_BITS, BFVParameters

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

MASK_CACHE_BYTES = 256 << 20
"""Cap on a design's cache of transformed matrix polynomials; beyond it they are built anew in each round."""


def to_residues(values: Int64, parameters: BFVParameters) -> UInt64:
    """Signed integers as residues modulo t."""
    return values.astype(np.int64).view(np.uint64) & np.uint64(parameters.mask)


def from_residues(residues: UInt64, parameters: BFVParameters) -> Int64:
    """Residues modulo t as signed integers in [-t/2, t/2)."""
    signed = (residues & np.uint64(parameters.mask)).astype(np.int64)
    return np.where(signed >= 1 << (parameters.log_t - 1), signed - (1 << parameters.log_t), signed)


def uniform_residues(length: int, parameters: BFVParameters) -> UInt64:
    """Uniform values modulo t from the operating system's generator."""
    return np.frombuffer(os.urandom(8 * length), dtype=np.uint64) & np.uint64(parameters.mask)


def _parts(data: bytes, what: str) -> list[bytes]:
    try:
        parts = msgpack.unpackb(data, max_bin_len=1 << 24)
    except Exception:
        raise Refused(f"{what}: not a list of ciphertexts; the message is damaged, send it again") from None
    if not isinstance(parts, list) or not all(isinstance(part, bytes) for part in parts):
        raise Refused(f"{what}: not a list of ciphertexts; the message is damaged, send it again")
    return parts


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How n samples and R rows are cut: m = N / rows_per_ciphertext samples a block."""

    samples: int
    rows: int
    rows_per_ciphertext: int
    degree: int

    def __post_init__(self) -> None:
        if not 1 <= self.rows_per_ciphertext <= self.degree or self.degree % self.rows_per_ciphertext:
            raise Refused(
                f"{self.rows_per_ciphertext} rows in a ciphertext of {self.degree} coefficients; give a divisor of it"
            )
        if self.samples < 1 or self.rows < 1:
            raise Refused(
                f"a matrix of {self.rows} rows over {self.samples} samples; there must be one of each at least"
            )

    @property
    def block(self) -> int:
        return self.degree // self.rows_per_ciphertext

    @property
    def blocks(self) -> int:
        return -(-self.samples // self.block)

    @property
    def groups(self) -> int:
        return -(-self.rows // self.rows_per_ciphertext)

    def targets(self) -> Int64:
        """Coefficients of a product that hold inner products, in the order of the rows."""
        return np.arange(self.rows_per_ciphertext, dtype=np.int64) * self.block + self.block - 1


class BankKey:
    """SECRET. A bank's BFV key pair of one job. `public` is what owners need to flood."""

    def __init__(self, parameters: BFVParameters) -> None:
        self.parameters = parameters
        self._context = seal_bytes.make_context(parameters.degree, parameters.prime_bits, parameters.log_t)
        generator = sealapi.KeyGenerator(self._context)
        secret = generator.secret_key()
        public = sealapi.PublicKey()
        generator.create_public_key(public)
        self.public = seal_bytes.dump(public)
        self._encryptor = sealapi.Encryptor(self._context, secret)
        self._decryptor = sealapi.Decryptor(self._context, secret)

    def __repr__(self) -> str:
        return "BankKey(secret)"

    def encrypt(self, values: Int64, rows_per_ciphertext: int) -> bytes:
        """Encrypt int64[n] in blocks of N / rows_per_ciphertext (seed-compressed: 24 bytes a coefficient).

        `Refused` when a sum of these values could leave t: the chooser was told of smaller ones.
        """
        degree = self.parameters.degree
        block = Layout(samples=len(values), rows=1, rows_per_ciphertext=rows_per_ciphertext, degree=degree).block
        # not np.abs: that of the least int64 is negative
        largest = max(int(values.max()), -int(values.min())) if values.size else 0
        if largest * len(values) >= 1 << (self.parameters.log_t - 1):
            raise Refused(
                f"the sum of {len(values)} values could leave t=2^{self.parameters.log_t}: a value is larger than the "
                "parameters were chosen for; clip the values or choose the parameters anew"
            )
        residues = to_residues(values, self.parameters)
        return bytes(
            msgpack.packb(
                [
                    seal_bytes.dump(
                        self._encryptor.encrypt_symmetric(
                            seal_bytes.plaintext(self._context, residues[start : start + block])
                        )
                    )
                    for start in range(0, len(residues), block)
                ]
            )
        )

    def open(self, result: bytes, layout: Layout) -> UInt64:
        """Decrypt an owner's answer: uint64[R], uniform modulo t as long as the owner masks."""
        parts = _parts(result, "result of the blind aggregate")
        if len(parts) != layout.groups:
            raise Refused(f"result of the blind aggregate: {len(parts)} ciphertexts, expected {layout.groups}")
        targets = layout.targets()
        opened = []
        for part in parts:
            ciphertext = seal_bytes.load_ciphertext(
                self._context, self._context.last_parms_id(), part, "result of the blind aggregate"
            )
            polynomial = sealapi.Plaintext()
            if self._decryptor.invariant_noise_budget(ciphertext) < 1:
                raise Refused("result of the blind aggregate: no noise budget left, the ciphertext is damaged")
            self._decryptor.decrypt(ciphertext, polynomial)
            opened.append(seal_bytes.coefficients(polynomial, targets))
        return np.concatenate(opened)[: layout.rows]


class OwnerDesign:
    """A feature owner's 0/1 matrix for one bank's rows, cut for the kernel. Reused in every round.

    `cells`: int32[n, F], the row of A that holds a one for this sample, -1 for none. A row named twice by one sample is
    `Refused`: it would be a two, which the parameters were not chosen for.
    """

    def __init__(self, cells: Int32, layout: Layout, parameters: BFVParameters, bank_public: bytes) -> None:
        if cells.ndim != 2 or cells.shape[0] != layout.samples:
            raise Refused(f"design has the shape {cells.shape}, the layout {layout.samples} samples")
        if cells.size and (int(cells.max()) >= layout.rows or int(cells.min()) < -1):
            raise Refused(f"design names rows outside -1..{layout.rows - 1}, which the layout has; place the rows anew")
        ordered = np.sort(cells, axis=1)
        if np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)):
            raise Refused("design names a row twice for one sample; every feature needs rows of its own")
        self.layout = layout
        self.parameters = parameters
        self._context = seal_bytes.make_context(parameters.degree, parameters.prime_bits, parameters.log_t)
        self._evaluator = sealapi.Evaluator(self._context)
        public = seal_bytes.load(sealapi.PublicKey(), self._context, bank_public, "bank's public key")
        self._encryptor = sealapi.Encryptor(self._context, public)
        self._level = self._context.first_parms_id()
        moduli = self._context.first_context_data().parms().coeff_modulus()
        self._moduli = np.array([int(m.value()) for m in moduli], dtype=np.uint64)
        self._positions, self._bounds = _cut(cells, layout)
        self._cache: dict[tuple[int, int], Any] = {}
        self._cache_limit = MASK_CACHE_BYTES // (8 * parameters.degree * len(self._moduli))

    def __repr__(self) -> str:
        return f"OwnerDesign(samples={self.layout.samples}, rows={self.layout.rows})"

    def multiply(self, encrypted: bytes, pad: UInt64) -> bytes:
        """Enc(v) -> masked, flooded Enc(A v + pad) on one prime. `pad`: uint64[R], uniform modulo t, used once."""
        layout = self.layout
        parts = _parts(encrypted, "encrypted residuals")
        if len(parts) != layout.blocks:
            raise Refused(f"encrypted residuals: {len(parts)} ciphertexts, expected {layout.blocks}")
        if pad.shape != (layout.rows,):
            raise Refused(f"pad has {pad.shape} values, expected {layout.rows}")
        blocks = []
        for part in parts:
            ciphertext = seal_bytes.load_ciphertext(self._context, self._level, part, "encrypted residuals")
            self._evaluator.transform_to_ntt_inplace(ciphertext)
            blocks.append(ciphertext)
        padded = np.zeros(layout.groups * layout.rows_per_ciphertext, np.uint64)
        padded[: layout.rows] = pad
        targets = layout.targets()
        results = []
        for group in range(layout.groups):
            product = self._product(group, blocks)
            mask = uniform_residues(layout.degree, self.parameters).copy()
            wanted = padded[group * layout.rows_per_ciphertext : (group + 1) * layout.rows_per_ciphertext]
            used = min(layout.rows_per_ciphertext, layout.rows - group * layout.rows_per_ciphertext)
            mask[targets[:used]] = wanted[:used]
            results.append(self._blind(product, mask))
        return bytes(msgpack.packb(results))

    def _product(self, group: int, blocks: list[Any]) -> Any | None:
        total: Any | None = None
        for index, block in enumerate(blocks):
            polynomial = self._polynomial(group, index)
            if polynomial is None:
                continue
            term = sealapi.Ciphertext(self._context)
            self._evaluator.multiply_plain(block, polynomial, term)
            if total is None:
                total = term
            else:
                self._evaluator.add_inplace(total, term)
        if total is not None:
            self._evaluator.transform_from_ntt_inplace(total)
        return total

    def _polynomial(self, group: int, block: int) -> Any | None:
        key = (group, block)
        if key in self._cache:
            return self._cache[key]
        at = group * self.layout.blocks + block
        positions = self._positions[self._bounds[at] : self._bounds[at + 1]]
        if len(positions) == 0:
            return None
        values = np.zeros(self.parameters.degree, np.uint64)
        values[positions] = 1
        polynomial = seal_bytes.plaintext(self._context, values)
        self._evaluator.transform_to_ntt_inplace(polynomial, self._level)
        if len(self._cache) < self._cache_limit:
            self._cache[key] = polynomial
        return polynomial

    def _blind(self, product: Any | None, mask: UInt64) -> bytes:
        result = sealapi.Ciphertext(self._context)
        self._encryptor.encrypt_zero(self._level, result)
        if product is not None:
            self._evaluator.add_inplace(result, product)
        self._evaluator.add_plain_inplace(result, seal_bytes.plaintext(self._context, mask))
        flood = seal_bytes.trivial_ciphertext(
            self._context, self._level, flooding_residues(self.parameters.degree, self._moduli)
        )
        self._evaluator.add_inplace(result, flood)
        for _ in range(len(self._moduli) - 1):
            self._evaluator.mod_switch_to_next_inplace(result)
        return seal_bytes.dump(result)


def _cut(cells: Int32, layout: Layout) -> tuple[npt.NDArray[np.uint16], Int64]:
    """Positions of the ones in the polynomial of each (group, block), concatenated, and their bounds."""
    sample, feature = np.nonzero(cells >= 0)
    row = cells[sample, feature].astype(np.int64)
    group, row_inside = np.divmod(row, layout.rows_per_ciphertext)
    block, sample_inside = np.divmod(sample, layout.block)
    position = row_inside * layout.block + (layout.block - 1 - sample_inside)
    key = group * layout.blocks + block
    order = np.argsort(key, kind="stable")
    bounds = np.searchsorted(key[order], np.arange(layout.groups * layout.blocks + 1))
    return position[order].astype(np.uint16), bounds.astype(np.int64)


def flooding_residues(degree: int, moduli: UInt64) -> UInt64:
    """Uniform integers of FLOODING_BITS bits from the operating system modulo each prime: uint64[primes, N]."""
    if int(moduli.max()) >= 1 << 60:
        raise Refused(f"primes of {int(moduli.max()).bit_length()} bits; this arithmetic in 64 bits holds up to 60")
    half = FLOODING_BITS // 2
    low, high = (np.frombuffer(os.urandom(8 * degree), dtype=np.uint64) & np.uint64((1 << half) - 1) for _ in range(2))
    residues = np.empty((len(moduli), degree), np.uint64)
    for index, modulus in enumerate(moduli):
        # 50 bits up in steps that stay below 2^64; quotient and product are three times faster than numpy's remainder
        value = high << np.uint64(10)
        value -= value // modulus * modulus
        for _ in range((half - 10) // 4):
            value <<= np.uint64(4)
            value -= value // modulus * modulus
        value += low
        value -= value // modulus * modulus
        residues[index] = value
    return residues


def unmask(answers: Sequence[UInt64], pads: Sequence[UInt64], parameters: BFVParameters) -> Int64:
    """The owner's last step: S = sum of the banks' answers - sum of its pads, as signed integers."""
    if len(answers) != len(pads) or not answers:
        raise Refused(f"{len(answers)} answers for {len(pads)} pads; every bank of the attempt must answer")
    if len({array.shape for array in (*answers, *pads)}) != 1:
        raise Refused("answers and pads have different lengths; every bank must answer every row")
    total = np.zeros_like(answers[0])
    for answer, pad in zip(answers, pads, strict=True):
        total = total + answer - pad
    return from_residues(total, parameters)


def blind_aggregate(
    vectors: Sequence[Int64],
    cells: Sequence[Int32],
    rows: int,
    noises: Sequence[Int64],
    parameters: BFVParameters,
    rows_per_ciphertext: int = 8,
) -> Int64:
    """The whole primitive among parties in one process: sum over banks of (A_b v_b + noise_b), int64[R].

    The vaults run the same pieces over the wire; tests and benchmarks call this. The banks' pairwise masks are left to
    `privacy.masks` (they cancel). Same signature as its plaintext twin `aggregate_in_the_clear`.
    """
    answers, pads = [], []
    for values, bank_cells, noise in zip(vectors, cells, noises, strict=True):
        key = BankKey(parameters)
        layout = Layout(
            samples=len(values), rows=rows, rows_per_ciphertext=rows_per_ciphertext, degree=parameters.degree
        )
        pad = uniform_residues(rows, parameters)
        design = OwnerDesign(bank_cells, layout, parameters, key.public)
        opened = key.open(design.multiply(key.encrypt(values, rows_per_ciphertext), pad), layout)
        answers.append(opened + to_residues(noise, parameters))
        pads.append(pad)
    return unmask(answers, pads, parameters)


def aggregate_in_the_clear(
    vectors: Sequence[Int64],
    cells: Sequence[Int32],
    rows: int,
    noises: Sequence[Int64],
    parameters: BFVParameters,
    rows_per_ciphertext: int = 8,
) -> Int64:
    """Plaintext twin of `blind_aggregate`: the same integers, no cryptography."""
    del parameters, rows_per_ciphertext
    total = np.zeros(rows, np.int64)
    for values, bank_cells, noise in zip(vectors, cells, noises, strict=True):
        sample, feature = np.nonzero(bank_cells >= 0)
        np.add.at(total, bank_cells[sample, feature], values[sample])
        total += noise
    return total
