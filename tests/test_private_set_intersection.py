"""Private set intersection: exact, closed to forged bytes, silent about ids; its group against published vectors."""

import hashlib
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import privacy.private_set_intersection as psi
from privacy.errors import Refused
from privacy.permutation import random_order
from privacy.private_set_intersection import (
    Exchange,
    Publisher,
    Querier,
    Sizes,
    TwoWaySide,
    chunk_count,
    intersect_in_the_clear,
    intersect_one_sided,
    intersect_two_way,
    padded_size,
    traffic,
)
from privacy.ristretto import ORDER, Scalar, hash_to_group

JOB = bytes(range(32))
FORMS = [intersect_two_way, intersect_one_sided]
TWO_WAY = Exchange(job=JOB, first="bank", second=("owner",), form="two-way")
ONE_SIDED = Exchange(job=JOB, first="bank", second=("owner",), form="one-sided")
BUCKET = 8
# RFC 9496, appendix A.2: encodings that decoding must reject
REJECTED = [
    "00ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "f3ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "01ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "ed57ffd8c914fb201471d1c3d245ce3c746fcbe63a3679d51b6a516ebebe0e20",
    "26948d35ca62e643e26a83177332e6b6afeb9d08e4268b650f1f5bbd8d81d371",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "00" * 32,  # a valid encoding, of the identity
]


def ids(rows: int, start: int = 0) -> list[str]:
    return [f"91{row:016d}" for row in range(start, start + rows)]


def order_of(rows: int) -> np.ndarray:
    return random_order(rows)


def pair(holder_ids: list[str], owner_ids: list[str]) -> tuple[TwoWaySide, TwoWaySide]:
    holder_size, owner_size = padded_size(len(holder_ids), BUCKET), padded_size(len(owner_ids), BUCKET)
    holder = TwoWaySide(
        holder_ids,
        order_of(len(holder_ids)),
        exchange=TWO_WAY,
        sizes=Sizes(mine=holder_size, peer=owner_size, bucket=BUCKET),
    )
    owner = TwoWaySide(owner_ids, None, exchange=TWO_WAY, sizes=Sizes(mine=owner_size, peer=holder_size, bucket=BUCKET))
    return holder, owner


# --- the group -------------------------------------------------------------------------------------------------------


def test_hash_and_powers_give_the_vector_of_rfc_9497() -> None:
    # OPRF(ristretto255, SHA-512), A.1.1 vector 1: hash to group, blind, evaluate
    domain = b"HashToGroup-OPRFV1-\x00-ristretto255-SHA512"
    blind = Scalar(bytes.fromhex("64d37aed22a27f5191de1c1d69fadb899d8862b58eb4220029e036ec4c1f6706"))
    secret = Scalar(bytes.fromhex("5ebcea5ee37023ccb9fc2d2019f9d7737be85591ae8652ffa9ef0f4d37063b0e"))
    blinded = blind.multiply(hash_to_group([b"\x00"], domain), "vector")
    assert blinded.tobytes().hex() == "609a0ae68c15a3cf6903766461307e5c8bb2f95e7e6550e1ffa2dc99e412803c"
    evaluated = secret.multiply(blinded, "vector")
    assert evaluated.tobytes().hex() == "7ec6578ae5120958eb2db1745758ff379e77cb64fe77b0b2d8cc917ea0869c7e"
    output = hashlib.sha512(
        b"\x00\x01\x00\x00\x20" + blind.inverse().multiply(evaluated, "vector").tobytes() + b"Finalize"
    )
    assert output.hexdigest().startswith("527759c3d9366f277d8c6020418d96bb393ba2afb20ff90df23fb7708264e2f3")


def test_one_way_map_gives_the_vector_of_rfc_9496(monkeypatch: pytest.MonkeyPatch) -> None:
    label = b"Ristretto is traditionally a short shot of espresso coffee"
    monkeypatch.setattr("privacy.ristretto._expanded", lambda messages, domain: [hashlib.sha512(messages[0]).digest()])
    point = hash_to_group([label], b"-")
    assert point.tobytes().hex() == "3066f82a1a747d45120d1740f14358531a8f04bbffe6a819f86dfe50f44a0a46"


def test_powers_commute_and_invert_and_threads_change_nothing() -> None:
    messages = [os.urandom(20) for _ in range(1500)]
    a, b = Scalar(), Scalar()
    points = hash_to_group(messages, b"test")
    assert np.array_equal(a.hash_and_multiply(messages, b"test", workers=3), a.multiply(points, "points", workers=1))
    assert np.array_equal(a.multiply(b.multiply(points, "x"), "x"), b.multiply(a.multiply(points, "x"), "x"))
    assert np.array_equal(a.inverse().multiply(a.multiply(points, "x"), "x"), points)
    assert not (hash_to_group(messages[:50], b"other") == points[:50]).all(axis=1).any()


@pytest.mark.parametrize("encoding", REJECTED)
def test_forged_points_are_refused_with_their_number(encoding: str) -> None:
    points = hash_to_group([b"a", b"b", b"c"], b"test")
    points[1] = np.frombuffer(bytes.fromhex(encoding), np.uint8)
    with pytest.raises(Refused, match=r"1 of 3 points are not canonical"):
        Scalar().multiply(points, "points of the other side")


def test_scalars_are_checked_and_stay_where_they_are() -> None:
    for value in (bytes(32), ORDER.to_bytes(32, "little"), b"\x01"):
        with pytest.raises(Refused, match="between 1 and the group order"):
            Scalar(value)
    scalar = Scalar()
    assert repr(scalar) == "Scalar(secret)"
    with pytest.raises(Refused, match="not pickled"):
        pickle.dumps(scalar)
    scalar.erase()
    with pytest.raises(Refused, match="erased"):
        scalar.multiply(hash_to_group([b"a"], b"test"), "x")


def test_batches_of_another_shape_are_refused() -> None:
    with pytest.raises(Refused, match=r"expected uint8\[n, 32\]"):
        Scalar().multiply(np.zeros((2, 31), np.uint8), "points")
    with pytest.raises(Refused, match="separation tag of 0 bytes"):
        hash_to_group([b"a"], b"")


# --- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intersect", FORMS)
@given(
    holder=st.sets(st.integers(0, 60), max_size=40),
    owner=st.sets(st.integers(0, 60), max_size=40),
    shuffle=st.randoms(use_true_random=False),
)
@settings(derandomize=True, deadline=None, max_examples=15)
def test_equals_set_intersection(intersect, holder, owner, shuffle) -> None:
    holder_ids, owner_ids = [f"编号{n}" for n in holder], [f"编号{n}" for n in owner]
    shuffle.shuffle(owner_ids)
    order = order_of(len(holder_ids))
    result = intersect(holder_ids, order, owner_ids, job=JOB, bucket=BUCKET)
    in_order = [holder_ids[row] for row in order]
    assert {name for name, known in zip(in_order, result.known, strict=True) if known} == set(in_order) & set(owner_ids)
    assert [owner_ids[row] if row >= 0 else None for row in result.rows] == [
        name if name in owner_ids else None for name in in_order
    ]
    twin = intersect_in_the_clear(holder_ids, order, owner_ids, job=JOB, bucket=BUCKET)
    assert np.array_equal(result.rows, twin.rows)
    assert np.array_equal(result.known, twin.known)


@pytest.mark.parametrize("intersect", FORMS)
@pytest.mark.parametrize(
    ("holder_rows", "owner_rows", "start", "common"),
    [
        (0, 0, 0, 0),
        (0, 5, 0, 0),
        (5, 0, 0, 0),
        (1, 1, 0, 1),
        (1, 1, 1, 0),
        (40, 40, 0, 40),
        (40, 40, 40, 0),
        (40, 3, 38, 2),
    ],
)
def test_edges(intersect, holder_rows: int, owner_rows: int, start: int, common: int) -> None:
    order = order_of(holder_rows)
    result = intersect(ids(holder_rows), order, ids(owner_rows, start), job=JOB, bucket=BUCKET)
    assert result.known.shape == result.rows.shape == (holder_rows,)
    assert int(result.known.sum()) == int((result.rows >= 0).sum()) == common


@pytest.mark.parametrize("intersect", FORMS)
def test_lists_of_several_chunks(intersect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psi, "CHUNK", 7)
    order = order_of(45)
    result = intersect(ids(45), order, ids(30, 20), job=JOB, bucket=BUCKET)
    assert np.array_equal(result.rows, intersect_in_the_clear(ids(45), order, ids(30, 20), job=JOB).rows)
    assert int(result.known.sum()) == 25


@pytest.mark.parametrize("intersect", [*FORMS, intersect_in_the_clear])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["a", "b", "a", "a"], "2 of 4 ids are duplicates"),
        (["a", "９１"], "1 of 2 ids are empty, have blanks"),
        (["a", "b "], "1 of 2 ids are empty, have blanks"),
        (["", "e\u0301"], "2 of 2 ids are empty, have blanks"),
        (["a", "\ud800"], "lone surrogate"),
    ],
)
def test_ids_that_two_sides_could_write_differently_are_refused(intersect, bad: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        intersect(ids(3), order_of(3), bad, job=JOB, bucket=BUCKET)
    with pytest.raises(Refused, match=message):
        intersect(bad, order_of(len(bad)), ids(3), job=JOB, bucket=BUCKET)


@pytest.mark.parametrize("intersect", [*FORMS, intersect_in_the_clear])
def test_orders_that_are_no_fresh_permutation_are_refused(intersect) -> None:
    for order in (np.arange(5), np.zeros(40, np.int64), np.arange(1, 41)):
        with pytest.raises(Refused, match="no permutation"):
            intersect(ids(40), order, ids(3), job=JOB)
    with pytest.raises(Refused, match="is the order of the table"):
        intersect(ids(40), np.arange(40), ids(3), job=JOB)


# --- what the wire shows ---------------------------------------------------------------------------------------------


def test_the_same_list_in_two_exchanges_gives_unrelated_points() -> None:
    first, second = pair(ids(40), ids(40)), pair(ids(40), ids(40))
    for one in (*first, *second):
        for other in (*first, *second):
            if one is not other:
                mine, theirs = (np.frombuffer(side.chunk(0), np.uint8).reshape(-1, 32) for side in (one, other))
                assert not set(map(bytes, mine)) & set(map(bytes, theirs))


@pytest.mark.parametrize(
    "change",
    [
        {"job": bytes(32)},
        {"first": "bank 2"},
        {"second": ("owner 2",)},
        {"first": "owner", "second": ("bank",)},
        {"form": "one-sided"},
        {"attempt": 1},
    ],
)
def test_the_hash_is_bound_to_job_pair_direction_form_and_attempt(change: dict) -> None:
    other = Exchange(**{"job": JOB, "first": "bank", "second": ("owner",), "form": "two-way", **change})
    points = [hash_to_group([b"91"], exchange.domain("id")).tobytes() for exchange in (TWO_WAY, other)]
    assert points[0] != points[1]


def test_an_owner_meets_its_own_list_in_a_new_order_each_time() -> None:
    sides = [pair(ids(64), ids(64))[1] for _ in range(3)]
    orders = [tuple(side._list.source) for side in sides]
    assert len(set(orders)) == 3
    assert tuple(range(64)) not in orders
    dummies = [
        row for side in (pair([], ids(57))[1] for _ in range(40)) for row in np.flatnonzero(side._list.source >= 57)
    ]
    assert min(dummies) < 20  # dummies are among the rows: the last match does not show how many there are


def test_ids_and_scalars_are_nowhere_in_the_messages_or_representations() -> None:
    holder, owner = pair(ids(20), ids(20))
    sent = b"".join((holder.chunk(0), owner.chunk(0)))
    for side, other in ((holder, owner), (owner, holder)):
        side.receive_chunk(0, other.chunk(0))
    sent += holder.tag_chunk(0) + owner.tag_chunk(0)
    secrets = [name.encode() for name in ids(20)] + [bytes(side._scalar._buffer) for side in (holder, owner)]
    assert not [secret for secret in secrets if secret in sent]
    unsalted = hash_to_group([name.encode() for name in ids(20)], TWO_WAY.domain("id"))
    assert not [point for point in unsalted if point.tobytes() in sent]
    assert repr(holder) == "TwoWaySide(secret)"


def test_list_sizes_show_only_up_to_the_bucket() -> None:
    assert [padded_size(rows, 1024) for rows in (0, 1, 1024, 1025)] == [1024, 1024, 1024, 2048]
    lengths = {len(pair(ids(rows), ids(3))[0].chunk(0)) for rows in (0, 1, 7, 8)}
    assert lengths == {32 * BUCKET}
    with pytest.raises(Refused, match="multiple of 1024"):
        Sizes(mine=1024, peer=1000)
    with pytest.raises(Refused, match="limit is 2048"):
        Sizes(mine=1024, peer=4096, largest=2048)
    with pytest.raises(Refused, match="pad to 16 entries"):
        TwoWaySide(ids(9), order_of(9), exchange=TWO_WAY, sizes=Sizes(mine=8, peer=8, bucket=8))


def test_traffic_is_what_is_sent() -> None:
    holder, owner = pair(ids(20), ids(5))
    for side, other in ((holder, owner), (owner, holder)):
        side.receive_chunk(0, other.chunk(0))
    sent = [len(side.chunk(0)) + len(side.tag_chunk(0)) for side in (holder, owner)]
    assert tuple(sent) == traffic(24, 8, "two-way")
    publisher, querier = one_sided(ids(20), ids(5))
    sent = [
        len(publisher.value_chunk(0)) + len(publisher.answer_chunk("owner", 0)),
        len(querier.query_chunk(0)) + len(querier.claim_chunk(0)),
    ]
    assert tuple(sent) == traffic(24, 8, "one-sided")
    assert traffic(8, 24, "one-sided") == traffic(24, 8, "one-sided")[::-1]


# --- steps repeated, forged, out of order ----------------------------------------------------------------------------


def test_a_repeated_step_gives_the_same_bytes_even_after_erasing() -> None:
    holder, owner = pair(ids(20), ids(20))
    for side, other in ((holder, owner), (owner, holder)):
        side.receive_chunk(0, other.chunk(0))
        side.receive_chunk(0, other.chunk(0))
    before = holder.chunk(0), holder.tag_chunk(0)
    holder.erase()
    assert (holder.chunk(0), holder.tag_chunk(0)) == before
    owner.erase()
    with pytest.raises(Refused, match="erased"):
        owner.tag_chunk(0)


def test_the_same_step_with_other_bytes_is_refused() -> None:
    holder, owner = pair(ids(20), ids(20))
    owner.receive_chunk(0, holder.chunk(0))
    with pytest.raises(Refused, match="repeated with other bytes"):
        owner.receive_chunk(0, pair(ids(20), ids(20))[0].chunk(0))


def test_nothing_is_answered_before_the_list_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psi, "CHUNK", 10)
    holder, owner = pair(ids(20), ids(20))
    assert chunk_count(24) == 3
    owner.receive_chunk(2, holder.chunk(2))
    owner.receive_chunk(0, holder.chunk(0))
    with pytest.raises(Refused, match="1 chunks have not arrived"):
        owner.tag_chunk(0)
    owner.receive_chunk(1, holder.chunk(1))
    assert len(owner.tag_chunk(2)) == 4 * 16
    with pytest.raises(Refused, match="chunk 3 of 3"):
        owner.tag_chunk(3)


def test_damaged_and_forged_lists_are_refused() -> None:
    holder, owner = pair(ids(20), ids(20))
    good = holder.chunk(0)
    with pytest.raises(Refused, match="767 bytes, expected 768"):
        owner.receive_chunk(0, good[:-1])
    for forged, message in (
        (bytes(32) + good[32:], "1 of 24 points are not canonical"),
        (good[:32] * 2 + good[64:], "1 of 24 entries are repeated"),
        (b"\xff" * len(good), "23 of 24 entries are repeated"),
    ):
        _, victim = pair(ids(20), ids(20))
        victim.receive_chunk(0, forged)
        with pytest.raises(Refused, match=message):
            victim.tag_chunk(0)


def test_tags_of_unknown_ids_and_foreign_tags_match_nothing() -> None:
    holder, owner = pair(ids(20), ids(20))
    owner.receive_chunk(0, holder.chunk(0))
    owner.receive_tag_chunk(0, os.urandom(24 * 16))
    assert (owner.rows_of_peer(20) == -1).all()
    assert not owner.known().any()


def test_a_count_below_the_matches_is_refused() -> None:
    holder, owner = pair(ids(20), ids(20))
    for side, other in ((holder, owner), (owner, holder)):
        side.receive_chunk(0, other.chunk(0))
    owner.receive_tag_chunk(0, holder.tag_chunk(0))
    assert len(owner.rows_of_peer(20)) == 20
    with pytest.raises(Refused, match="says 19 rows, but entries after them match"):
        owner.rows_of_peer(19)
    with pytest.raises(Refused, match="padded list has 24"):
        owner.rows_of_peer(25)


def test_a_matched_dummy_is_refused() -> None:
    holder, owner = pair(ids(20), ids(20))
    holder.receive_chunk(0, owner.chunk(0))
    # a forger sends back the holder's own tags of the owner's list as the tags of the holder's list, dummies included
    holder.receive_tag_chunk(0, holder.tag_chunk(0))
    with pytest.raises(Refused, match="a dummy was matched"):
        holder.known()


# --- one-sided -------------------------------------------------------------------------------------------------------


def one_sided(holder_ids: list[str], owner_ids: list[str]) -> tuple[Publisher, Querier]:
    """Label holder publishes; run up to and without the claims."""
    size, small = padded_size(len(holder_ids), BUCKET), padded_size(len(owner_ids), BUCKET)
    publisher = Publisher(holder_ids, order_of(len(holder_ids)), exchange=ONE_SIDED, size=size, bucket=BUCKET)
    querier = Querier(owner_ids, None, exchange=ONE_SIDED, sizes=Sizes(mine=small, peer=size, bucket=BUCKET))
    publisher.expect("owner", small)
    querier.receive_value_chunk(0, publisher.value_chunk(0))
    publisher.receive_query_chunk("owner", 0, querier.query_chunk(0))
    querier.receive_answer_chunk(0, publisher.answer_chunk("owner", 0))
    return publisher, querier


def test_a_match_cannot_be_claimed_with_what_is_published() -> None:
    publisher, querier = one_sided(ids(20), ids(5))
    publisher.receive_claim_chunk("owner", 0, publisher.value_chunk(0)[: 8 * 16])
    assert not publisher.known("owner").any()
    assert int((querier.rows_of_peer(20) >= 0).sum()) == 5


def test_claims_are_repeatable_and_reach_the_publisher() -> None:
    publisher, querier = one_sided(ids(20), ids(5, 18))
    assert querier.claim_chunk(0) == querier.claim_chunk(0)
    publisher.receive_claim_chunk("owner", 0, querier.claim_chunk(0))
    assert list(np.flatnonzero(publisher.known("owner"))) == [18, 19]
    assert publisher.value_chunk(0) == publisher.value_chunk(0)
    assert (repr(publisher), repr(querier)) == ("Publisher(secret)", "Querier(secret)")


def test_one_publication_serves_several_queriers_of_one_job_and_nobody_else() -> None:
    exchange = Exchange(job=JOB, first="bank", second=("pboc", "tax"), form="one-sided")
    order = order_of(30)
    publisher = Publisher(ids(30), order, exchange=exchange, size=32, bucket=BUCKET)
    for name, own in (("pboc", ids(10, 5)), ("tax", ids(6, 28))):
        size = padded_size(len(own), BUCKET)
        querier = Querier(own, None, exchange=exchange, sizes=Sizes(mine=size, peer=32, bucket=BUCKET))
        publisher.expect(name, size)
        querier.receive_value_chunk(0, publisher.value_chunk(0))
        publisher.receive_query_chunk(name, 0, querier.query_chunk(0))
        querier.receive_answer_chunk(0, publisher.answer_chunk(name, 0))
        publisher.receive_claim_chunk(name, 0, querier.claim_chunk(0))
        expected = intersect_in_the_clear(ids(30), order, own, job=JOB)
        assert np.array_equal(publisher.known(name)[order], expected.known)
        assert np.array_equal(querier.rows_of_peer(30), expected.rows)
    with pytest.raises(Refused, match="not among the queriers"):
        publisher.expect("court", 8)
    with pytest.raises(Refused, match="one list per exchange"):
        publisher.expect("tax", 16)


def test_one_sided_steps_fail_closed() -> None:
    publisher = Publisher(ids(20), order_of(20), exchange=ONE_SIDED, size=24, bucket=BUCKET, largest=24)
    with pytest.raises(Refused, match="has not announced its list"):
        publisher.receive_query_chunk("owner", 0, bytes(256))
    with pytest.raises(Refused, match="limit is 24"):
        publisher.expect("owner", 32)
    publisher.expect("owner", 8)
    with pytest.raises(Refused, match="1 chunks have not arrived"):
        publisher.answer_chunk("owner", 0)
    publisher.receive_query_chunk("owner", 0, REJECTED_LIST)
    with pytest.raises(Refused, match="1 of 8 points are not canonical"):
        publisher.answer_chunk("owner", 0)
    publisher.erase()
    with pytest.raises(Refused, match="erased"):
        publisher.value_chunk(0)
    querier = Querier(ids(5), None, exchange=ONE_SIDED, sizes=Sizes(mine=8, peer=24, bucket=BUCKET))
    with pytest.raises(Refused, match="answers of the publisher: 1 chunks"):
        querier.known()


REJECTED_LIST = bytes(32) + hash_to_group([bytes([n]) for n in range(7)], b"test").tobytes()


def test_exchanges_are_checked() -> None:
    for change, message in (
        ({"form": "hidden"}, "form 'hidden'"),
        ({"second": ("bank",)}, "distinct, named parties"),
        ({"second": ("a", "b")}, "exactly two parties"),
        ({"job": b"short"}, "contract hash"),
        ({"attempt": -1}, "attempt -1"),
    ):
        with pytest.raises(Refused, match=message):
            Exchange(**{"job": JOB, "first": "bank", "second": ("owner",), "form": "two-way", **change})
    with pytest.raises(Refused, match="agree on the form"):
        Querier(ids(3), None, exchange=TWO_WAY, sizes=Sizes(mine=8, peer=8, bucket=BUCKET))
    with pytest.raises(Refused, match="agree on the form"):
        TwoWaySide(ids(3), None, exchange=ONE_SIDED, sizes=Sizes(mine=8, peer=8, bucket=BUCKET))
