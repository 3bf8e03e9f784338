"""Score openings: how often each enterprise's score was opened. Feature owners' features have NO epsilon.

Guarantee: the counts kept are of keyed digests, so who was scored cannot be read (nor tried out: every unified social
credit code can be hashed in minutes) by someone who has the ledger and not the key. Two enterprises share a digest with
probability n^2 / 2^65 (3e-8 for a million), and then are counted together: too many, never too few.
Assumes: the key (32 bytes of the operating system's generator, per institution) is kept by the caller, for good: with
another key the counts begin again.
Source: BLAKE2b keyed (RFC 7693), 64 bits of output.
"""

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privacy.errors import Refused

Keys = npt.NDArray[np.uint64]

KEY_BYTES = 32
MOST_TIMES = 10**6

_DOMAIN = b"xinyi openings 1"
_WORD = 8


@dataclass(frozen=True)
class OpeningCounts:
    """Openings by enterprise: `keys` uint64[m] ascending and distinct, `times` int64[m]."""

    keys: Keys
    times: npt.NDArray[np.int64]

    @classmethod
    def none(cls) -> "OpeningCounts":
        return cls(np.zeros(0, np.uint64), np.zeros(0, np.int64))

    def plus(self, keys: Keys, times: int) -> "OpeningCounts":
        """After `times` more openings of every key; a key given twice is opened twice as often."""
        new_keys, repeats = np.unique(keys, return_counts=True)
        unknown = new_keys[self._of(new_keys) == 0]
        places = np.searchsorted(self.keys, unknown)
        # both are sorted: inserting is linear, where a union would sort them again
        merged = np.insert(self.keys, places, unknown)
        total = np.insert(self.times, places, 0)
        total[np.searchsorted(merged, new_keys)] += repeats * times
        return OpeningCounts(merged, total)

    def above(self, limit: int, keys: Keys, times: int) -> int:
        """Of the enterprises in `keys`, those with more than `limit` openings after `times` more of each."""
        new_keys, repeats = np.unique(keys, return_counts=True)
        return int(np.count_nonzero(self._of(new_keys) + repeats * times > limit))

    def histogram(self) -> dict[int, int]:
        """Openings -> how many enterprises have so many."""
        values, numbers = np.unique(self.times, return_counts=True)
        return {int(value): int(number) for value, number in zip(values, numbers, strict=True)}

    def _of(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Openings so far of every key."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.times[places], 0)


def enterprise_keys(ids: Iterable[str], key: bytes) -> Keys:
    """uint64[n]: the keyed digest of every enterprise id, in the order given. `key`: 32 secret bytes."""
    if len(key) != KEY_BYTES:
        raise Refused(f"the key of score openings has {len(key)} bytes, expected {KEY_BYTES}; make it with os.urandom")
    start = hashlib.blake2b(digest_size=_WORD, key=key, person=_DOMAIN)

    def digest(enterprise: str) -> bytes:
        state = start.copy()
        state.update(enterprise.encode())
        return state.digest()

    return np.frombuffer(b"".join([digest(enterprise) for enterprise in ids]), "<u8").astype(np.uint64)


def check_keys(keys: Keys) -> None:
    """`Refused` unless uint64[n]."""
    if keys.dtype != np.uint64 or keys.ndim != 1:
        raise Refused(f"keys of score openings are {keys.dtype}{keys.shape}, expected uint64[n]; use enterprise_keys")


def pack(keys: Keys) -> bytes:
    """The keys as compressed bytes, sorted (who stood where in the file is nobody's business)."""
    check_keys(keys)
    gaps = np.diff(np.sort(keys), prepend=np.uint64(0)).astype("<u8")
    # byte by byte of significance: the high bytes of the gaps are zeros and compress, the low ones are random
    return zlib.compress(gaps.view(np.uint8).reshape(-1, _WORD).T.tobytes(), level=1)


def unpack(packed: bytes) -> Keys:
    """The sorted keys of `pack`. `Refused` for anything else."""
    try:
        planes = np.frombuffer(zlib.decompress(packed), np.uint8)
        gaps = np.ascontiguousarray(planes.reshape(_WORD, -1).T).view("<u8").reshape(-1)
    except (zlib.error, ValueError):
        raise Refused("a row of score openings is damaged; restore the ledger from its backup") from None
    return np.cumsum(gaps, dtype=np.uint64)
