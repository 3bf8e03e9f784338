"""The Merkle tree of the audit log: hashes, and proofs that anybody can check without the log.

Guarantee: two different sequences of leaves never have the same size and root; an accepted inclusion proof shows that
the leaf is at that index, an accepted consistency proof that the smaller tree is a prefix of the larger one.
Against: whoever keeps the log, as long as SHA-256 is collision resistant.
Formula: leaf = SHA-256(0x00, data), node = SHA-256(0x01, left, right), a tree of n > 1 leaves splits after the largest
power of two below n, the empty tree is SHA-256("").
Source: RFC 6962 section 2.1; the checks follow RFC 9162 sections 2.1.3.2 and 2.1.4.2.
"""

import hashlib
from collections.abc import Sequence

from privacy.errors import Refused

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(data: bytes) -> bytes:
    """32 bytes: the hash of an entry. The prefix keeps it apart from every node's hash."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """32 bytes: the hash of two subtrees."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class MerkleTree:
    """Leaf hashes and every complete subtree over them, about 2 hashes a leaf; holds no secret.

    `append` costs two hashes on average; a root or a proof, of the present or any earlier size, O(log n) of them.
    """

    def __init__(self) -> None:
        # _levels[k][i] is the subtree over leaves i * 2^k .. (i + 1) * 2^k
        self._levels: list[list[bytes]] = [[]]

    def __len__(self) -> int:
        return len(self._levels[0])

    def append(self, leaf: bytes) -> None:
        """Add a leaf hash (32 bytes)."""
        if len(leaf) != HASH_BYTES:
            raise Refused(f"a leaf hash of {len(leaf)} bytes; give the {HASH_BYTES} bytes of leaf_hash")
        self._levels[0].append(leaf)
        level = 0
        while len(self._levels[level]) % 2 == 0:
            if level + 1 == len(self._levels):
                self._levels.append([])
            left, right = self._levels[level][-2:]
            level += 1
            self._levels[level].append(node_hash(left, right))

    def truncate(self, size: int) -> None:
        """Forget all leaves from index `size` on."""
        self._check_size(size)
        for level, hashes in enumerate(self._levels):
            del hashes[size >> level :]

    def leaf(self, index: int) -> bytes:
        """The leaf hash at `index`."""
        self._check_index(index, len(self))
        return self._levels[0][index]

    def root(self, size: int | None = None) -> bytes:
        """32 bytes: the root of the first `size` leaves, of all if None."""
        wanted = len(self) if size is None else size
        self._check_size(wanted)
        return self._subtree(0, wanted) if wanted else EMPTY_ROOT

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """The path from leaf `index` to the root of the first `size` leaves, lowest hash first."""
        wanted = len(self) if size is None else size
        self._check_size(wanted)
        self._check_index(index, wanted)
        path = []
        start, end = 0, wanted
        while end - start > 1:
            middle = start + _split(end - start)
            if index < middle:
                path.append(self._subtree(middle, end))
                end = middle
            else:
                path.append(self._subtree(start, middle))
                start = middle
        return path[::-1]

    def consistency(self, first: int, second: int | None = None) -> list[bytes]:
        """The proof that the tree of `first` leaves is a prefix of that of `second` leaves (all if None)."""
        wanted = len(self) if second is None else second
        self._check_size(wanted)
        if not 0 <= first <= wanted:
            raise Refused(f"no proof from size {first} to {wanted}; the first must be the smaller one")
        if first in (0, wanted):
            return []
        proof = []
        start, end, known = 0, wanted, True
        while first != end:
            middle = start + _split(end - start)
            if first <= middle:
                proof.append(self._subtree(middle, end))
                end = middle
            else:
                proof.append(self._subtree(start, middle))
                start, known = middle, False
        if not known:
            proof.append(self._subtree(start, end))
        return proof[::-1]

    def _subtree(self, start: int, end: int) -> bytes:
        """The root over leaves start..end-1, where start is a multiple of the next power of two >= end - start."""
        size = end - start
        if size & (size - 1) == 0:
            level = size.bit_length() - 1
            return self._levels[level][start >> level]
        middle = start + _split(size)
        return node_hash(self._subtree(start, middle), self._subtree(middle, end))

    def _check_size(self, size: int) -> None:
        if not 0 <= size <= len(self):
            raise Refused(f"a tree of {len(self)} leaves has no size {size}; give 0..{len(self)}")

    @staticmethod
    def _check_index(index: int, size: int) -> None:
        if not 0 <= index < size:
            raise Refused(f"no leaf {index} in a tree of {size} leaves; indices count from 0")


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Raises `Refused` unless `path` shows that `leaf` (a leaf hash) is at `index` of the tree (`size`, `root`).

    | case | answer |
    | --- | --- |
    | index outside 0..size-1, or size 0 | refused |
    | size 1 | only the empty path, and leaf = root |
    | path too short or too long, a hash that is not 32 bytes | refused |
    """
    refusal = Refused(f"entry {index} is not proved to be in the log of size {size}; ask for the proof again")
    if not 0 <= index < size or not _are_hashes([leaf, root, *path]):
        raise refusal
    position, last, found = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise refusal
        if position % 2 or position == last:
            found = node_hash(sibling, found)
            while position % 2 == 0 and position:
                position, last = position >> 1, last >> 1
        else:
            found = node_hash(found, sibling)
        position, last = position >> 1, last >> 1
    if last or found != root:
        raise refusal


def verify_consistency(first: int, first_root: bytes, second: int, second_root: bytes, proof: Sequence[bytes]) -> None:
    """Raises `Refused` unless `proof` shows that the tree (`first`, `first_root`) is a prefix of the second one.

    | case | answer |
    | --- | --- |
    | first > second, or negative | refused |
    | first = second | only the empty proof and equal roots |
    | first = 0 | only the empty proof and the root of the empty tree; it is a prefix of every tree |
    """
    refusal = Refused(
        f"the log of size {first} is not proved to be a prefix of that of size {second}; it may have forked"
    )
    if not 0 <= first <= second or not _are_hashes([first_root, second_root, *proof]):
        raise refusal
    if first in (0, second):
        if proof or first_root != (second_root if first else EMPTY_ROOT) or (second == 0 and second_root != EMPTY_ROOT):
            raise refusal
        return
    hashes = list(proof)
    if first & (first - 1) == 0:  # then the first tree is itself a subtree of the second, and is left out of the proof
        hashes.insert(0, first_root)
    if not hashes:
        raise refusal
    position, last = first - 1, second - 1
    while position % 2:
        position, last = position >> 1, last >> 1
    of_first = of_second = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            raise refusal
        if position % 2 or position == last:
            of_first, of_second = node_hash(sibling, of_first), node_hash(sibling, of_second)
            while position % 2 == 0 and position:
                position, last = position >> 1, last >> 1
        else:
            of_second = node_hash(of_second, sibling)
        position, last = position >> 1, last >> 1
    if last or of_first != first_root or of_second != second_root:
        raise refusal


def _split(size: int) -> int:
    """The largest power of two below `size`, which is at least 2."""
    return 1 << ((size - 1).bit_length() - 1)


def _are_hashes(values: Sequence[bytes]) -> bool:
    return all(isinstance(value, bytes) and len(value) == HASH_BYTES for value in values)
