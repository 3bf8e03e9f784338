"""Merkle tree: the vectors of Certificate Transparency, the RFC's recursion as twin, forged proofs refused."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import Refused
from privacy.merkle import EMPTY_ROOT, MerkleTree, leaf_hash, verify_consistency, verify_inclusion

VECTORS = json.loads((Path(__file__).parent / "vectors" / "merkle.json").read_text("utf-8"))
LEAVES = [leaf_hash(bytes.fromhex(text)) for text in VECTORS["leaves"]]
ROOTS = [bytes.fromhex(text) for text in VECTORS["roots"]]
MOST = 70


def tree_of(leaves):
    tree = MerkleTree()
    for leaf in leaves:
        tree.append(leaf)
    return tree


def twin_root(leaves):
    """MTH of RFC 6962 section 2.1, word for word, over leaf hashes."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + twin_root(leaves[:k]) + twin_root(leaves[k:])).digest()


def unhex(texts):
    return [bytes.fromhex(text) for text in texts]


def test_roots_of_the_vectors_at_every_size():
    tree = tree_of(LEAVES)
    assert [tree.root(size) for size in range(9)] == ROOTS
    assert tree.root() == ROOTS[8]
    assert MerkleTree().root() == EMPTY_ROOT == ROOTS[0]


@pytest.mark.parametrize("case", VECTORS["inclusion"], ids=lambda case: f"{case['index']} of {case['size']}")
def test_inclusion_vectors(case):
    path = unhex(case["path"])
    assert tree_of(LEAVES).inclusion(case["index"], case["size"]) == path
    verify_inclusion(LEAVES[case["index"]], case["index"], case["size"], path, ROOTS[case["size"]])


@pytest.mark.parametrize("case", VECTORS["consistency"], ids=lambda case: f"{case['first']} to {case['second']}")
def test_consistency_vectors(case):
    proof = unhex(case["proof"])
    first, second = case["first"], case["second"]
    assert tree_of(LEAVES).consistency(first, second) == proof
    verify_consistency(first, ROOTS[first], second, ROOTS[second], proof)


@pytest.mark.parametrize("case", VECTORS["refused_inclusion"], ids=lambda case: case["why"])
def test_refused_inclusion_vectors(case):
    path = unhex(VECTORS["inclusion"][case["path_of"]]["path"])
    with pytest.raises(Refused, match="not proved"):
        verify_inclusion(LEAVES[case["leaf"]], case["index"], case["size"], path, ROOTS[8])


def test_every_size_agrees_with_the_recursion_and_truncation_forgets():
    leaves = [leaf_hash(bytes([k])) for k in range(MOST)]
    tree = tree_of(leaves)
    assert [tree.root(size) for size in range(MOST + 1)] == [twin_root(leaves[:size]) for size in range(MOST + 1)]
    for size in (MOST, 64, 33, 32, 7, 1, 0):
        tree.truncate(size)
        assert len(tree) == size
        assert tree.root() == twin_root(leaves[:size])
    tree.append(leaves[5])
    assert tree.root() == leaves[5]


def test_all_proofs_of_all_sizes_verify_and_only_where_they_belong():
    leaves = [leaf_hash(bytes([k])) for k in range(20)]
    tree = tree_of(leaves)
    for size in range(1, 21):
        for index in range(size):
            path = tree.inclusion(index, size)
            verify_inclusion(leaves[index], index, size, path, tree.root(size))
            for other in range(size + 1):
                if other != index:
                    with pytest.raises(Refused):
                        verify_inclusion(leaves[index], other, size, path, tree.root(size))
        for first in range(size + 1):
            proof = tree.consistency(first, size)
            verify_consistency(first, tree.root(first), size, tree.root(size), proof)
            for other in range(1, size + 1):
                if other != first:
                    with pytest.raises(Refused):
                        verify_consistency(other, tree.root(first), size, tree.root(size), proof)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.data())
def test_a_changed_proof_is_refused(data):
    size = data.draw(st.integers(2, MOST))
    leaves = [leaf_hash(bytes([k])) for k in range(size)]
    tree = tree_of(leaves)
    index = data.draw(st.integers(0, size - 1))
    first = data.draw(st.integers(1, size - 1))

    def changed(proof):
        broken = list(proof)
        at = data.draw(st.integers(0, len(proof) - 1))
        match data.draw(st.sampled_from(["bit", "drop", "add", "swap", "short"])):
            case "bit":
                flipped = bytearray(broken[at])
                flipped[data.draw(st.integers(0, 31))] ^= 1 << data.draw(st.integers(0, 7))
                broken[at] = bytes(flipped)
            case "drop":
                del broken[at]
            case "add":
                broken.insert(at, leaf_hash(b"more"))
            case "swap":
                broken[at - 1], broken[at] = broken[at], broken[at - 1]
                if broken == proof:  # a single hash
                    broken.append(proof[0])
            case "short":
                broken[at] = broken[at][:31]
        return broken

    with pytest.raises(Refused):
        verify_inclusion(leaves[index], index, size, changed(tree.inclusion(index)), tree.root())
    with pytest.raises(Refused):
        verify_consistency(first, tree.root(first), size, tree.root(), changed(tree.consistency(first)))


def test_edge_cases_of_the_tables():
    tree = tree_of(LEAVES)
    verify_consistency(0, EMPTY_ROOT, 8, ROOTS[8], [])
    verify_consistency(0, EMPTY_ROOT, 0, EMPTY_ROOT, [])
    for case in (
        (0, ROOTS[1], 8, ROOTS[8], []),
        (0, EMPTY_ROOT, 8, ROOTS[8], [ROOTS[1]]),
        (0, EMPTY_ROOT, 0, ROOTS[1], []),
        (8, ROOTS[8], 8, ROOTS[7], []),
        (8, ROOTS[8], 8, ROOTS[8], [ROOTS[8]]),
        (9, ROOTS[8], 8, ROOTS[8], []),
        (-1, EMPTY_ROOT, 8, ROOTS[8], []),
        (4, ROOTS[4], 8, ROOTS[8], []),
    ):
        with pytest.raises(Refused, match="not proved"):
            verify_consistency(*case)
    with pytest.raises(Refused, match="no size 9"):
        tree.root(9)
    with pytest.raises(Refused, match="no leaf 8"):
        tree.inclusion(8)
    with pytest.raises(Refused, match="the first must be the smaller"):
        tree.consistency(8, 7)
    with pytest.raises(Refused, match="31 bytes"):
        tree.append(b"x" * 31)
    assert len(tree) == 8


def test_a_leaf_can_never_pass_for_a_node():
    """Without the two prefixes the concatenation of two hashes would be a leaf with the same root."""
    pair = tree_of(LEAVES[:2])
    assert tree_of([leaf_hash(LEAVES[0] + LEAVES[1])]).root() != pair.root()
