"""The discrete Gaussian by the million: inversion of a cumulative table of 128-bit fixed-point numbers, vectorised.

Guarantee: one value is within 2^-110 in statistical distance of the discrete Gaussian of its `std` (a million values:
2^-90, which may be added to delta and is neglected), for everyone who does not hold the operating system's entropy of
this draw. Not exact as OpenDP's sampler is (`privacy.noise`), but 100 times faster; used for vectors of model updates.
Formula: P(k) ~ exp(-k^2 / (2 std^2)), by |k| and a sign; tail beyond 13.4 std (probability below 2^-128) cut off.
    table[j] = floor(2^128 P(|X| <= j)), uniform u in [0, 2^128): |X| = number of entries <= u
Distance: each of at most 13.4 * 2^14 entries is rounded by 2^-128, and the tail: together below 2^-110.
Source: Peikert 2010 (inversion), Canonne, Kamath, Steinke 2020 (why discrete); uniforms from ChaCha20 (RFC 8439) under
a fresh key of the operating system's generator. No seed reaches it.
Not constant-time: the time of a draw is not hidden.
"""

import math
import os
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from privacy.errors import Refused
from privacy.masks import stream
from privacy.noise import LEAST_SHARE_STD
from privacy.sealing import KEY_BYTES

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

LARGEST_STD = 2.0**14
"""Grid units; a table of 220,000 entries (3.5 MB, made once in 0.3 s)."""

_TAIL = 13.4
"""Standard deviations: exp(-13.4^2 / 2) is below 2^-129."""

_BITS = 128
_WORKING_BITS = 256


@lru_cache(maxsize=8)
def _table(std: float) -> tuple[UInt64, tuple[int, ...]]:
    """The cumulative table of |X|: upper 64 bits as an array, and all 128 bits as integers."""
    size = math.ceil(_TAIL * std)
    one = 1 << _WORKING_BITS
    with localcontext() as context:
        context.prec = 100  # decimal digits, above 256 bits; the float std is taken as the exact rational it is
        ratio = int((-1 / (2 * Decimal(std) ** 2)).exp() * one)  # exp(-1 / (2 std^2))
    # weight(k + 1) = weight(k) ratio^(2k + 1)
    weights = [one]
    step, square = ratio, (ratio * ratio) >> _WORKING_BITS
    for _ in range(size):
        weights.append((weights[-1] * step) >> _WORKING_BITS)
        step = (step * square) >> _WORKING_BITS
    total = 2 * sum(weights) - weights[0]
    cumulative, so_far = [], 0
    for index, weight in enumerate(weights[:-1]):
        so_far += weight if index == 0 else 2 * weight
        cumulative.append((so_far << _BITS) // total)
    high = np.array([entry >> 64 for entry in cumulative], np.uint64)
    high.flags.writeable = False
    return high, tuple(cumulative)


def discrete_gaussian_vector(std: float, size: int) -> Int64:
    """int64[size] of the discrete Gaussian with parameter `std`, in grid units (1 = the last bit of the integers).

    Edge cases: std below 0.5, not finite or above 2^14: `Refused`; negative size: `Refused`. About 0.1 microseconds a
    value for small std.
    """
    if not (math.isfinite(std) and 0.5 <= std <= LARGEST_STD):
        raise Refused(
            f"noise of standard deviation {std:g} grid units; the table serves 0.5 to {LARGEST_STD:g}: use a coarser "
            "grid (fewer bits a value) or another epsilon"
        )
    if size < 0:
        raise Refused(f"noise for {size} values; give 0 or more")
    high, cumulative = _table(float(std))
    uniforms = stream(os.urandom(KEY_BYTES), size)
    magnitude = np.searchsorted(high, uniforms, side="right").astype(np.int64)
    # an entry counts when it is <= u; where the upper halves are equal (2^-46 a value) the lower halves decide
    for place in np.flatnonzero((magnitude > 0) & (high[magnitude - 1] == uniforms)).tolist():
        whole = (int(uniforms[place]) << 64) | int.from_bytes(os.urandom(8))
        magnitude[place] = sum(entry <= whole for entry in cumulative)
    sign_bytes = np.frombuffer(os.urandom(-(-size // 8)), np.uint8)
    negative = np.unpackbits(sign_bytes)[:size].astype(bool)
    return np.where(negative, -magnitude, magnitude)


class TableNoise:
    """SECRET while it lives. The noise shares of one bank, drawn by `discrete_gaussian_vector`.

    Keeps nothing: whoever asks twice under one tag gets `Refused`, for the mean of two draws would be less noise.
    """

    def __init__(self) -> None:
        self._drawn: set[str] = set()

    def __repr__(self) -> str:
        return f"TableNoise({len(self._drawn)} shares)"

    def gaussian(self, tag: str, std: float, size: int) -> Int64:
        """int64[size], std in grid units, at least LEAST_SHARE_STD."""
        if tag in self._drawn:
            raise Refused(f"noise {tag!r} was drawn already; another release needs another tag")
        if not std >= LEAST_SHARE_STD:
            raise Refused(
                f"noise {tag!r}: a share of standard deviation {std:g} grid units is below {LEAST_SHARE_STD:g}, shares "
                "would not add up to a discrete Gaussian; use a finer grid (more bits a value) or more noise"
            )
        noise = discrete_gaussian_vector(std, size)
        self._drawn.add(tag)
        return noise
