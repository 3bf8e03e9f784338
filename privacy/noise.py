"""Noise: the discrete Gaussian of differential privacy, its shares among banks, and the owners' forward noise.

Guarantee: `discrete_gaussian` is an exact sampler (no floating-point gap), so a sum of integers with L2 sensitivity D
plus noise of standard deviation s is D^2 / (2 s^2)-zCDP. Against: whoever sees the noised sum, colluding banks included
up to the number that `share_std` was given.
A sum of shares is not exactly a discrete Gaussian; with at least LEAST_SHARE_STD grid units per share its log density
is within 1e-16 per further share (Kairouz et al. 2021, theorem 1), which is neglected; smaller shares are `Refused`.
`forward_noise` is a heuristic and carries NO epsilon.
Assumes: OpenDP's generator, which in its wheels is OpenSSL's; no seed ever reaches it.
Source: Canonne, Kamath, Steinke 2020 (discrete Gaussian) through OpenDP; Kairouz, Liu, Steinke 2021 (distributed).
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import opendp.prelude as opendp
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from scipy.special import ndtri

from privacy.errors import Refused
from privacy.masks import stream
from privacy.sealing import KEY_BYTES

Int64 = npt.NDArray[np.int64]

LEAST_SHARE_STD = 2.0
"""Grid units. Least standard deviation of one share, so that shares add up to a discrete Gaussian."""

LARGEST_STD = 2.0**55
"""Grid units; 12 standard deviations of several shares still fit in 64 bits."""

_UNIFORM_BITS = 52

opendp.enable_features("contrib")  # OpenDP asks every caller to opt in to mechanisms proved by its contributors


@lru_cache(maxsize=64)
def _measurement(std: float) -> Any:
    space = opendp.vector_domain(opendp.atom_domain(T="i64")), opendp.l2_distance(T=float)
    return opendp.m.make_gaussian(*space, scale=std)


def discrete_gaussian(std: float, size: int) -> Int64:
    """int64[size] of the discrete Gaussian with parameter `std`, in grid units (1 = the last bit of the integers).

    Edge cases: std 0, negative, not finite or above 2^55: `Refused` (no noise is a decision of the contract, made where
    the caller leaves this call out). About 10 microseconds a value.
    """
    if not (math.isfinite(std) and 0 < std <= LARGEST_STD):
        raise Refused(f"noise of standard deviation {std}; it must be above 0 and at most 2^55 grid units")
    if size < 0:
        raise Refused(f"noise for {size} values; give 0 or more")
    if size == 0:
        return np.zeros(0, np.int64)
    return np.asarray(_measurement(float(std))([0] * size), dtype=np.int64)


def share_std(total_std: float, banks: int, colluding: int) -> float:
    """One bank's share of noise: total_std / sqrt(banks - colluding), in the units of `total_std`.

    Whatever `colluding` banks subtract of their own, the others' shares still make `total_std`. All shares together
    make more: share * sqrt(banks). A bank that sees the sum knows its own share, so it counts as colluding by itself:
    with `colluding` 0 the total holds against feature owners and the coordinator, not against another bank.
    """
    if not (math.isfinite(total_std) and total_std > 0):
        raise Refused(f"noise of standard deviation {total_std} cannot be shared; it must be finite and above 0")
    if banks < 1 or not 0 <= colluding <= banks - 1:
        raise Refused(f"{colluding} colluding of {banks} banks; between 0 and {banks - 1} can be tolerated")
    return total_std / math.sqrt(banks - colluding)


def default_colluding(banks: int) -> int:
    """All but two, and at least the one bank that looks at the sum: 0, 1, 1, 2, 3, ... for 1, 2, 3, 4, 5, ... banks.

    With one bank there is no other bank to hide from.
    """
    if banks < 1:
        raise Refused(f"colluding banks among {banks}; at least 1 bank takes part")
    return min(banks - 1, max(1, banks - 2))


class NoiseSource(Protocol):
    """Where a bank gets its noise shares. A tag names one share of one attempt of one release.

    The same tag gives the same draw, never fresh noise (the mean of repetitions would take it off); a known tag with
    another std or size is `Refused`.
    """

    def gaussian(self, tag: str, std: float, size: int) -> Int64:
        """int64[size], std in grid units, at least LEAST_SHARE_STD."""
        ...


class SystemNoise:
    """SECRET. The noise shares of one bank in one job, drawn by OpenDP, kept until the job is destroyed."""

    def __init__(self) -> None:
        self._drawn: dict[str, tuple[float, Int64]] = {}

    def __repr__(self) -> str:
        return f"SystemNoise({len(self._drawn)} shares, secret)"

    def gaussian(self, tag: str, std: float, size: int) -> Int64:
        if tag in self._drawn:
            known_std, noise = self._drawn[tag]
            if (known_std, len(noise)) != (std, size):
                raise Refused(
                    f"noise {tag!r} was drawn for {len(noise)} values with std {known_std:g}, now asked for {size} "
                    f"with {std:g}; another release needs another tag"
                )
            return noise.copy()
        if not std >= LEAST_SHARE_STD:
            raise Refused(
                f"noise {tag!r}: a share of standard deviation {std:g} grid units is below {LEAST_SHARE_STD:g}, shares "
                "would not add up to a discrete Gaussian; lower epsilon or use a finer grid"
            )
        noise = discrete_gaussian(std, size)
        self._drawn[tag] = (std, noise)
        return noise.copy()


class RecordedNoise:
    """SIMULATION ONLY. Passes on another source's shares and keeps a tape of them, for the plaintext twin's replay."""

    def __init__(self, source: NoiseSource) -> None:
        self._source = source
        self._tape: dict[str, Int64] = {}

    def __repr__(self) -> str:
        return f"RecordedNoise({len(self._tape)} shares)"

    @property
    def tape(self) -> Mapping[str, Int64]:
        """Tag -> share, of everything drawn so far."""
        return dict(self._tape)

    def gaussian(self, tag: str, std: float, size: int) -> Int64:
        noise = self._source.gaussian(tag, std, size)
        self._tape[tag] = noise.copy()
        return noise


def forward_noise(secret: bytes, tag: str, rows: int, std: int) -> Int64:
    """An owner's noise on its partial scores in training: int64[rows], std in score units. NO epsilon, a heuristic.

    A function of (secret, tag, row) scaled by std: drawn once per (job, round, enterprise), so reruns and several banks
    that share an enterprise cannot average it away (PROTOCOL rule 2). `secret`: 32 bytes of the operating system's
    generator, per job; `tag` names the round; row = the owner's row of the enterprise. std 0 (a zero direction, or a
    contract without forward noise) gives zeros.
    """
    if len(secret) != KEY_BYTES:
        raise Refused(f"the secret of the forward noise has {len(secret)} bytes, expected {KEY_BYTES}")
    if not 0 <= std <= LARGEST_STD:
        raise Refused(f"forward noise {tag!r} of standard deviation {std}; it must be between 0 and 2^55")
    info = b"xinyi forward noise 1\x00" + tag.encode()
    key = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)
    # 52 bits and not 53: (u + 1/2) / 2^52 is exact and never 1, whose quantile would be infinite
    uniforms = (stream(key, rows) >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float64)
    quantiles = ndtri((uniforms + 0.5) / 2.0**_UNIFORM_BITS)
    noise: Int64 = np.rint(quantiles * std).astype(np.int64)
    return noise


class ForwardNoise(Protocol):
    """Where an owner gets its forward noise. The same tag gives the same noise, up to its scale."""

    def draw(self, tag: str, rows: int, std: int) -> Int64:
        """int64[rows], std in score units."""
        ...


class KeyedForwardNoise:
    """SECRET. `forward_noise` under the secret of one owner and one job."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise Refused(f"the secret of the forward noise has {len(secret)} bytes, expected {KEY_BYTES}")
        self._secret = secret

    def __repr__(self) -> str:
        return "KeyedForwardNoise(secret)"

    def draw(self, tag: str, rows: int, std: int) -> Int64:
        return forward_noise(self._secret, tag, rows, std)


class RecordedForwardNoise:
    """SIMULATION ONLY. Passes on another source's forward noise and keeps a tape of it, for the plaintext twin.

    A rerun after a bank was lost has another direction, so the same noise at another scale: the tape keeps the last.
    """

    def __init__(self, source: ForwardNoise) -> None:
        self._source = source
        self._tape: dict[str, Int64] = {}

    def __repr__(self) -> str:
        return f"RecordedForwardNoise({len(self._tape)} draws)"

    @property
    def tape(self) -> Mapping[str, Int64]:
        """Tag -> forward noise, of everything drawn so far."""
        return dict(self._tape)

    def draw(self, tag: str, rows: int, std: int) -> Int64:
        noise = self._source.draw(tag, rows, std)
        self._tape[tag] = noise.copy()
        return noise
