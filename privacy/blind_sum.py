"""Blind sum: bank b learns z = sum over owners of z_o for its own customers, never one owner's part.

Owners add pairwise masks modulo 2^32 (`privacy.masks`, keyed by each pair of owners, fresh per bank and step) and seal
the result end to end to b. The masks cancel in the sum.

Guarantee: b sees the sum only, as long as two owners take part and do not collude with it; with ONE owner the sum is
that owner's part (the caller must have said so: `privacy.masks` refuses otherwise). Exact: integers modulo 2^32.
Assumes: masks from a cryptographic generator keyed per job, step, attempt, participants, receiver.
Source: Bonawitz et al. 2017 (pairwise masks), PROTOCOL rules 1, 6, 7.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from privacy.errors import Refused

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

MODULUS_BITS = 32
_HALF = 1 << (MODULUS_BITS - 1)


def masked_share(values: Int64, mask: UInt64, owners: int) -> bytes:
    """An owner's message: (values + mask) modulo 2^32 as little-endian uint32[n].

    Each |value| must be below 2^31 / owners, so that the sum cannot wrap; else `Refused`.
    """
    limit = _HALF // max(owners, 1) - 1
    # not np.abs: that of the least int64 is negative; the score itself is a secret and stays out of the message
    if values.size and (int(values.max()) > limit or int(values.min()) < -limit):
        raise Refused(
            f"a partial score leaves the limit {limit} of a sum over {owners} owners modulo 2^32; a weight or the "
            "noise has exploded, stop the job"
        )
    if values.shape != mask.shape:
        raise Refused(f"{values.shape} partial scores for a mask of {mask.shape}")
    return (values.view(np.uint64) + mask).astype("<u4").tobytes()


def open_sum(shares: Sequence[bytes], length: int) -> Int64:
    """The bank's part: the sum over all owners' messages as signed integers, int64[length]."""
    total = np.zeros(length, np.uint32)
    for share in shares:
        if len(share) != 4 * length:
            raise Refused(f"a partial-score message has {len(share)} bytes, expected {4 * length}; send it again")
        total = total + np.frombuffer(share, dtype="<u4")
    if not shares:
        raise Refused("a blind sum without owners")
    return total.view(np.int32).astype(np.int64)


def blind_sum(parts: Sequence[Int64], masks: Sequence[UInt64]) -> Int64:
    """The whole primitive among parties in one process; `masks` must cancel. Twin: `blind_sum_in_the_clear`."""
    shares = [masked_share(part, mask, len(parts)) for part, mask in zip(parts, masks, strict=True)]
    return open_sum(shares, len(parts[0]))


def blind_sum_in_the_clear(parts: Sequence[Int64], masks: Sequence[UInt64]) -> Int64:
    """Plaintext twin of `blind_sum`."""
    del masks
    total: Int64 = np.sum(np.stack(parts), axis=0, dtype=np.int64)
    return total
