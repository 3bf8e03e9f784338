"""Blind sum: exact, each message uniform for whoever lacks a mask, and refused before a sum could wrap."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from privacy.blind_sum import (
    MODULUS_BITS,
    blind_sum,
    blind_sum_in_the_clear,
    masked_share,
    open_sum,
)
from privacy.errors import Refused
from privacy.masks import pairwise_mask
from privacy.sealing import JobKeys

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
HALF = 1 << (MODULUS_BITS - 1)
KEYS = {f"owner-{number}": JobKeys.generate() for number in range(5)}


def masks_of(owners: int, length: int, receiver: str = "bank-a") -> list[UInt64]:
    names = tuple(sorted(KEYS))[:owners]
    return [
        pairwise_mask(
            name,
            KEYS[name],
            {peer: KEYS[peer].public for peer in names if peer != name},
            job=bytes(32),
            step="r1.direction",
            attempt=0,
            participants=names,
            receiver=receiver,
            length=length,
            modulus_bits=MODULUS_BITS,
            alone_is_visible=owners == 1,
        )
        for name in names
    ]


def limit(owners: int) -> int:
    return HALF // owners - 1


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    owners=st.integers(1, 5),
    length=st.integers(0, 200),
    kind=st.sampled_from(["random", "largest", "least", "zeros", "small"]),
    seed=st.integers(0, 2**32),
)
def test_equal_to_its_plaintext_twin(owners: int, length: int, kind: str, seed: int) -> None:
    rng, top = np.random.default_rng(seed), limit(owners)
    parts = [
        {
            "random": rng.integers(-top, top + 1, length),
            "largest": np.full(length, top),
            "least": np.full(length, -top),
            "zeros": np.zeros(length, np.int64),
            "small": rng.integers(-3, 4, length),
        }[kind]
        for _ in range(owners)
    ]
    masks = masks_of(owners, length)
    total = blind_sum(parts, masks)
    assert total.dtype == np.int64
    assert np.array_equal(total, blind_sum_in_the_clear(parts, masks))


@pytest.mark.parametrize("owners", [1, 2, 3, 7])
def test_the_largest_sum_does_not_wrap_and_the_next_value_is_refused(owners: int) -> None:
    top, zero = limit(owners), np.zeros(1, np.uint64)
    for sign in (1, -1):
        share = masked_share(np.array([sign * top]), zero, owners)
        assert open_sum([share] * owners, 1).tolist() == [sign * top * owners]
        with pytest.raises(Refused, match=f"leaves the limit {top} of a sum over {owners} owners"):
            masked_share(np.array([sign * (top + 1)]), zero, owners)


@pytest.mark.parametrize("value", [np.iinfo(np.int64).min, np.iinfo(np.int64).min + 1, np.iinfo(np.int64).max, 1 << 32])
def test_overflow_is_refused_however_large(value: int) -> None:
    """The magnitude of the least int64 is negative in numpy: a check by `np.abs` let it pass as zero."""
    with pytest.raises(Refused, match="stop the job") as caught:
        masked_share(np.array([0, value]), np.zeros(2, np.uint64), 2)
    assert str(abs(int(value))) not in str(caught.value)  # a score is nobody else's business


def test_known_answer() -> None:
    """-1 + mask 0 is ffffffff, little-endian; 2 + (2^32 - 1) wraps to 1."""
    share = masked_share(np.array([-1, 2, 258]), np.array([0, (1 << 32) - 1, 0], np.uint64), 2)
    assert share.hex() == "ffffffff" + "01000000" + "02010000"
    assert open_sum([share], 3).tolist() == [-1, 1, 258]


def test_a_masked_share_is_uniform_and_an_unmasked_one_is_not() -> None:
    def p_value(share: bytes) -> float:
        counts = np.bincount(np.frombuffer(share, np.uint8), minlength=256)
        expected = len(share) / 256
        return float(chi2.sf(np.sum((counts - expected) ** 2) / expected, 255))

    values = np.random.default_rng(0).integers(-100_000, 100_000, 20_000)
    assert p_value(masked_share(values, masks_of(2, 20_000)[0], 2)) > 1e-6
    assert p_value(masked_share(values, np.zeros(20_000, np.uint64), 2)) < 1e-30


def test_masks_for_another_bank_do_not_open() -> None:
    parts = [np.arange(50), np.arange(50)]
    mixed = [masks_of(2, 50)[0], masks_of(2, 50, receiver="bank-b")[1]]
    assert np.count_nonzero(blind_sum(parts, mixed) == 2 * np.arange(50)) <= 1


def test_wrong_lengths_and_missing_owners() -> None:
    share = masked_share(np.arange(5), np.zeros(5, np.uint64), 2)
    for wrong in (share[:-1], share + b"\x00", b""):
        with pytest.raises(Refused, match="expected 20"):
            open_sum([share, wrong], 5)
    with pytest.raises(Refused, match="without owners"):
        open_sum([], 5)
    with pytest.raises(Refused, match="for a mask of"):
        masked_share(np.arange(5), np.zeros(4, np.uint64), 2)
