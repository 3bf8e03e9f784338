"""ristretto255: a group of prime order in which hashed ids are raised to secret powers (private set intersection).

Points are their canonical 32-byte encodings, packed as uint8[n, 32]. What comes from outside is checked by the
multiplication itself: an encoding that is not canonical, no point or the identity is `Refused` with the number of such
points; nothing of the batch is returned then. The group has prime order, so there are no small subgroups.
`hash_to_group` is a random oracle into the group: expand_message_xmd with SHA-512 (two compressions more than a bare
hash, and a reviewed construction), then the one-way map of libsodium (two Elligator maps added).
Constant time in the secrets: libsodium's scalar multiplication. Assumes the hardness of DDH in this group (126 bits).
Fast enough without a compiler: libsodium is called through ctypes on addresses inside one packed buffer, which
costs about 1 microsecond a call, and calls release the interpreter lock, so threads use all cores and no secret is ever
pickled into another process.
Source: RFC 9496 (ristretto255); RFC 9380, section 5.3.1 and appendix B (hash to ristretto255); libsodium 1.0.18 as
carried by the wheel `rbcl`.
"""

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import rbcl  # type: ignore[import-untyped]

from privacy.errors import Refused

UInt8 = npt.NDArray[np.uint8]

POINT_BYTES = 32
SCALAR_BYTES = 32
HASH_BYTES = 64
ORDER = 2**252 + 27742317777372353535851937790883648493
"""Order of the group."""

_LONGEST_DOMAIN = 255
_SLICE = 512
"""Points that a thread takes at a time (about 20 ms): small, so that a busy core does not keep the others waiting."""


def _load() -> ctypes.CDLL:
    library: ctypes.CDLL = rbcl._sodium
    # rbcl unpacks libsodium (2.7 MB) into a new temporary file at every import and never removes it; once it is mapped
    # the file is not needed, and a node that restarts often would fill its disk.
    with contextlib.suppress(OSError):
        os.unlink(library._name)
    return library


_sodium = _load()
_multiply = _sodium.crypto_scalarmult_ristretto255
_multiply.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
_multiply.restype = ctypes.c_int
_invert = _sodium.crypto_core_ristretto255_scalar_invert
_invert.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_invert.restype = ctypes.c_int
# Keeps the interpreter lock: the map takes a fifth of a multiplication, and handing the lock over costs as much.
_map_to_group: Any = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(
    ("crypto_core_ristretto255_from_hash", _sodium)
)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))


def hash_to_group(messages: Sequence[bytes], domain: bytes) -> UInt8:
    """RFC 9380 hash of each message to a point, uint8[n, 32]. `domain`: the separation tag, 1 to 255 bytes."""
    points = np.empty((len(messages), POINT_BYTES), np.uint8)
    base = points.ctypes.data
    for index, uniform in enumerate(_expanded(messages, domain)):
        _map_to_group(base + POINT_BYTES * index, uniform)
    return points


class Scalar:
    """SECRET. A non-zero exponent. Not copied into messages, files or other processes; `erase` ends its use."""

    __slots__ = ("_buffer",)

    def __init__(self, value: bytes | None = None) -> None:
        """A fresh uniform scalar, or (for published test vectors) `value`, 32 bytes little-endian below the order."""
        if value is None:
            number = 1 + int.from_bytes(os.urandom(64), "little") % (ORDER - 1)
        else:
            number = int.from_bytes(value, "little")
            if len(value) != SCALAR_BYTES or not 0 < number < ORDER:
                raise Refused(f"a scalar has {SCALAR_BYTES} bytes and is between 1 and the group order - 1")
        self._buffer: ctypes.Array[ctypes.c_char] | None = ctypes.create_string_buffer(
            number.to_bytes(SCALAR_BYTES, "little"), SCALAR_BYTES
        )

    def __repr__(self) -> str:
        return "Scalar(secret)"

    def __reduce__(self) -> tuple[Any, ...]:
        raise Refused("a secret scalar is not pickled; use threads, not processes")

    def erase(self) -> None:
        """Overwrite and forget. Later use is `Refused`."""
        if self._buffer is not None:
            ctypes.memset(self._buffer, 0, SCALAR_BYTES)
            self._buffer = None

    def inverse(self) -> "Scalar":
        """The scalar that undoes this one."""
        result = Scalar()
        _invert(result._address(), self._address())
        return result

    def multiply(self, points: UInt8, what: str, workers: int | None = None) -> UInt8:
        """Each point times this scalar, uint8[n, 32]. `what` names the batch in a refusal."""
        if points.ndim != 2 or points.shape[1] != POINT_BYTES or points.dtype != np.uint8:
            raise Refused(f"{what}: {points.dtype} of shape {points.shape}, expected uint8[n, {POINT_BYTES}]")
        source = np.ascontiguousarray(points)
        result = np.empty_like(source)
        start, end, key = source.ctypes.data, result.ctypes.data, self._address()

        def work(first: int, last: int) -> int:
            return sum(
                _multiply(end + offset, key, start + offset) != 0
                for offset in range(POINT_BYTES * first, POINT_BYTES * last, POINT_BYTES)
            )

        _refuse_invalid(_spread(work, len(source), workers), len(source), what)
        return result

    def hash_and_multiply(self, messages: Sequence[bytes], domain: bytes, workers: int | None = None) -> UInt8:
        """`multiply(hash_to_group(messages, domain))` in one pass, uint8[n, 32]."""
        result = np.empty((len(messages), POINT_BYTES), np.uint8)
        end, key = result.ctypes.data, self._address()

        def work(first: int, last: int) -> int:
            point = ctypes.create_string_buffer(POINT_BYTES)
            at, failed = ctypes.addressof(point), 0
            for index, uniform in enumerate(_expanded(messages[first:last], domain), first):
                _map_to_group(at, uniform)
                failed += _multiply(end + POINT_BYTES * index, key, at) != 0
            return failed

        _refuse_invalid(_spread(work, len(messages), workers), len(messages), "hashed ids")
        return result

    def _address(self) -> int:
        if self._buffer is None:
            raise Refused("this secret scalar was erased; begin the exchange anew with a fresh one")
        return ctypes.addressof(self._buffer)


def _expanded(messages: Sequence[bytes], domain: bytes) -> Iterator[bytes]:
    """expand_message_xmd(message, domain, 64 bytes) with SHA-512, for each message."""
    if not 1 <= len(domain) <= _LONGEST_DOMAIN:
        raise Refused(f"a separation tag of {len(domain)} bytes; give 1 to {_LONGEST_DOMAIN}")
    tag = domain + bytes([len(domain)])
    start = hashlib.sha512(bytes(128))
    first = HASH_BYTES.to_bytes(2, "big") + b"\0" + tag
    second = b"\1" + tag
    sha512 = hashlib.sha512
    for message in messages:
        inner = start.copy()
        inner.update(message + first)
        yield sha512(inner.digest() + second).digest()


def _spread(work: Callable[[int, int], int], length: int, workers: int | None) -> int:
    """Run `work(first, last)` over slices of 0..length in threads; the sum of what it returns."""
    starts = range(0, length, _SLICE)
    threads = min(workers or cores(), len(starts))
    if threads <= 1:
        return work(0, length)
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda first: work(first, min(length, first + _SLICE)), starts))


def _refuse_invalid(failed: int, length: int, what: str) -> None:
    if failed:
        raise Refused(
            f"{what}: {failed} of {length} points are not canonical encodings of points other than the identity; "
            "the message is damaged or forged, ask for it again"
        )
