"""Private set intersection of a label holder's and a feature owner's enterprises (Diffie-Hellman on ristretto255).

The label holder learns which of its rows the owner knows; the owner learns, for each position in the label holder's
list, its own row or -1 (a left join). Whoever relays sees sealed chunks whose number and length depend on the list
sizes rounded up to the contract's bucket. Nobody learns an id that it did not bring.

Two-way (`TwoWaySide`, the same class on both sides, a and b their secret scalars, H a hash to the group):
1. `chunk` / `receive_chunk` - each sends H(id)^a for its list in its order. All of it, before any answer leaves.
2. `tag_chunk` / `receive_tag_chunk` - each raises the other's points and returns 16-byte hashes of H(id)^(ab), in the
   order it got them.
3. `known`, `rows_of_peer` - tags that are equal on both sides are the same id.
Costs 2 (n_b + n_o) multiplications and 48 bytes an id each way.

One-sided (`Publisher`, `Querier`), for lists of very different sizes: the large side sends a 16-byte keyed value of
each id once; the small side has its own ids raised under a blinding it takes off again (an oblivious pseudorandom
function, 2HashDH), finds them among the values, and claims each match with the value's secret second half, so that a
match cannot be claimed for an id that was never asked for. Costs n_large + 3 n_small multiplications, 16 bytes per id
of the large and 80 of the small side. What it leaks beyond the two-way form: see `Publisher`.

Guarantee (semi-honest parties): under DDH in ristretto255 and with H and SHA-256 as random oracles, each side's view
follows from its own list, the other's padded size and the intersection. Keys and orders are fresh per exchange and
bound to job, names and direction in the hash to the group, so the same id in two exchanges gives unrelated points.
Not promised: a side may bring ids that it does not have (consent lists and the contract's `largest` bound this), and
may answer falsely (then rows go missing; nothing leaks). USCC are enumerable: whoever holds a party's scalar can try
them all; `erase` when the alignment is done.
Fails closed: bytes that are no points, repeated points, wrong lengths and a step repeated with other bytes are
`Refused`.
Source: Meadows 1986; Huberman, Franklin, Hogg 1999 (two-way); Jarecki, Kiayias, Krawczyk 2014 (2HashDH); RFC 9497.
"""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from privacy.errors import Refused
from privacy.permutation import random_order
from privacy.ristretto import POINT_BYTES, Scalar, UInt8
from privacy.sealing import check_job, encode_fields

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

TAG_BYTES = 16
"""Two different ids share a tag with probability 2^-128: n_b n_o 2^-128 over all pairs, 2^-88 for a million each."""

CHUNK = 1 << 15
"""List entries in a chunk: 1 MiB of points, 512 KiB of tags. Part of the protocol, the same on both sides."""

BUCKET = 1024
"""Default rounding of list sizes: a training step's ciphertexts show the row count to about as much anyway."""

LARGEST_LIST = 1 << 23
"""Default limit on the other side's list: 8 million, 256 MiB of points."""

_ORDER_CHECKED_FROM = 32
"""A fresh order of so many rows is the file order with probability below 2^-117."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What one intersection is bound to. `job`: contract hash, 32 bytes; `form`: "two-way" or "one-sided".

    `first`: the label holder, or the publisher. `second`: the feature owner, or the querier; a publication that several
    queriers of the same job use names them all. `attempt` counts from 0; a new one has new keys.
    """

    job: bytes
    first: str
    second: tuple[str, ...]
    form: str
    attempt: int = 0

    def __post_init__(self) -> None:
        check_job(self.job)
        _check_form(self.form)
        names = (self.first, *self.second)
        if not self.second or not all(names) or len(set(names)) != len(names):
            raise Refused(f"private set intersection between {names}: distinct, named parties are needed")
        if self.form == "two-way" and len(self.second) != 1:
            raise Refused(f"two-way private set intersection among {names}: exactly two parties take part")
        if not 0 <= self.attempt < 1 << 32:
            raise Refused(f"private set intersection: attempt {self.attempt} is outside 0..2^32-1")

    def domain(self, use: str) -> bytes:
        """Separation tag for one use inside this exchange, 57 bytes or more."""
        fields = [self.job, self.first.encode(), *(name.encode() for name in self.second), self.attempt.to_bytes(4)]
        digest = hashlib.sha256(encode_fields([self.form.encode(), *fields])).digest()
        return b"xinyi private set intersection 1|" + use.encode() + b"|" + digest


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an exchange, agreed before it: padded list sizes in entries, and the bucket they are multiples of."""

    mine: int
    peer: int
    bucket: int = BUCKET
    largest: int = LARGEST_LIST

    def __post_init__(self) -> None:
        for whose, size in (("own", self.mine), ("other", self.peer)):
            if size != padded_size(size, self.bucket):
                raise Refused(f"the {whose} side's list has {size} entries, not a positive multiple of {self.bucket}")
            if size > self.largest:
                raise Refused(
                    f"the {whose} side's list has {size} entries, the contract's limit is {self.largest}; split the "
                    "job or agree on a higher limit"
                )


def padded_size(rows: int, bucket: int = BUCKET) -> int:
    """The size a list is padded to: the next multiple of `bucket`, at least one (an empty list looks like any)."""
    if bucket < 1 or rows < 0:
        raise Refused(f"{rows} rows in buckets of {bucket}; rows must be 0 or more and a bucket 1 or more")
    return max(1, -(-rows // bucket)) * bucket


def chunk_count(size: int) -> int:
    """How many chunks a list of `size` entries takes."""
    return -(-size // CHUNK)


def traffic(label_holder_size: int, owner_size: int, form: str) -> tuple[int, int]:
    """Bytes that the label holder and the owner send in one exchange, before sealing. Sizes are padded sizes."""
    _check_form(form)
    if form == "two-way":
        return (
            POINT_BYTES * label_holder_size + TAG_BYTES * owner_size,
            POINT_BYTES * owner_size + TAG_BYTES * label_holder_size,
        )
    large, small = max(label_holder_size, owner_size), min(label_holder_size, owner_size)
    from_publisher = TAG_BYTES * large + POINT_BYTES * small
    from_querier = (POINT_BYTES + TAG_BYTES) * small
    if label_holder_size >= owner_size:
        return from_publisher, from_querier
    return from_querier, from_publisher


class _List:
    """SECRET. One side's ids, padded with dummies, in the order in which the other side meets them.

    With `order` (a label holder's fresh order of the job, the same for all owners): rows in this order, then dummies.
    Without: a fresh random order over rows and dummies. A dummy starts with a byte that no UTF-8 text contains, so it
    can equal no id, and holds 256 random bits, so it equals no dummy of the other side.
    """

    def __init__(self, ids: Sequence[str], order: Int64 | None, size: int, bucket: int) -> None:
        self.rows = len(ids)
        if size != padded_size(self.rows, bucket):
            raise Refused(
                f"{self.rows} ids pad to {padded_size(self.rows, bucket)} entries, but the sizes agreed on say {size}; "
                "the table changed since, agree again"
            )
        encoded = _encode(ids)
        encoded += [b"\xff" + os.urandom(32) for _ in range(size - self.rows)]
        if order is None:
            self.source = random_order(size)
        else:
            _check_order(order, self.rows)
            self.source = np.concatenate([order.astype(np.int64), np.arange(self.rows, size)])
        self.messages = [encoded[at] for at in self.source]

    def known(self, mine: UInt8, theirs: UInt8) -> Bool:
        """bool[rows] by table row: whether the entry of `mine` (in my list's order) is among `theirs`."""
        found = self.source[_locate(mine, theirs) >= 0]
        self._refuse_dummies(found)
        known = np.zeros(self.rows, np.bool_)
        known[found] = True
        return known

    def rows_of_peer(self, mine: UInt8, theirs: UInt8, rows: int) -> Int64:
        """int64[rows]: my table row for each entry of `theirs` (in the other side's order), -1 for none."""
        if not 0 <= rows <= len(theirs):
            raise Refused(f"the other side says {rows} rows, its padded list has {len(theirs)} entries")
        found = _locate(theirs, mine)
        if (found[rows:] >= 0).any():
            raise Refused(f"the other side says {rows} rows, but entries after them match; its count or list is wrong")
        positions = found[:rows]
        result = np.where(positions >= 0, self.source[positions], -1)
        self._refuse_dummies(result)
        return result

    def _refuse_dummies(self, rows: Int64) -> None:
        if (rows >= self.rows).any():
            raise Refused("private set intersection: a dummy was matched; the other side's answer is forged or damaged")


class _Inbox:
    """Chunks of one list as they arrive: `entries` x `width` bytes; complete, distinct, never overwritten."""

    def __init__(self, what: str, entries: int, width: int) -> None:
        self.what = what
        self.entries = entries
        self._data: UInt8 = np.zeros((entries, width), np.uint8)
        self._seen: set[int] = set()
        self._checked = False

    def put(self, index: int, data: bytes) -> None:
        first, last = _bounds(index, len(self._data), self.what)
        place = self._data[first:last]
        if len(data) != place.size:
            raise Refused(
                f"{self.what}, chunk {index}: {len(data)} bytes, expected {place.size}; the message is damaged"
            )
        arrived = np.frombuffer(data, np.uint8).reshape(place.shape)
        if index in self._seen:
            if not np.array_equal(place, arrived):
                raise Refused(f"{self.what}, chunk {index}: repeated with other bytes; a list is given once")
            return
        place[:] = arrived
        self._seen.add(index)

    def all(self) -> UInt8:
        """The whole list; `Refused` while chunks are missing or if an entry occurs twice."""
        missing = chunk_count(len(self._data)) - len(self._seen)
        if missing:
            raise Refused(
                f"{self.what}: {missing} chunks have not arrived; nothing is answered before the list is whole"
            )
        if not self._checked:
            repeated = len(self._data) - len(np.unique(_comparable(self._data)))
            if repeated:
                raise Refused(f"{self.what}: {repeated} of {len(self._data)} entries are repeated; the list is forged")
            self._checked = True
        return self._data


class TwoWaySide:
    """SECRET. One side of a two-way exchange: its list, its scalar, what it received. For one exchange only.

    `order`: int64[n], a label holder's fresh order of its rows in this job (`privacy.permutation.random_order`; the
    same for all owners of the job). A feature owner gives None and gets a fresh one, with its dummies among the rows.
    """

    def __init__(
        self, ids: Sequence[str], order: Int64 | None, *, exchange: Exchange, sizes: Sizes, workers: int | None = None
    ) -> None:
        if exchange.form != "two-way":
            raise Refused(f"a two-way side in an exchange of form {exchange.form!r}; agree on the form first")
        self._list = _List(ids, order, sizes.mine, sizes.bucket)
        self._exchange = exchange
        self._sizes = sizes
        self._workers = workers
        self._scalar = Scalar()
        self._own: dict[int, bytes] = {}
        self._own_tags: dict[int, bytes] = {}
        self._points = _Inbox("points of the other side", sizes.peer, POINT_BYTES)
        self._tags = _Inbox("tags of the other side", sizes.mine, TAG_BYTES)

    def __repr__(self) -> str:
        return "TwoWaySide(secret)"

    def chunk(self, index: int) -> bytes:
        """Points of my list, 32 bytes an entry; the same bytes each time."""
        if index not in self._own:
            first, last = _bounds(index, self._sizes.mine, "own points")
            self._own[index] = self._scalar.hash_and_multiply(
                self._list.messages[first:last], self._exchange.domain("id"), self._workers
            ).tobytes()
        return self._own[index]

    def receive_chunk(self, index: int, data: bytes) -> None:
        """Points of the other side's list."""
        self._points.put(index, data)

    def tag_chunk(self, index: int) -> bytes:
        """Tags of the other side's points under both scalars, 16 bytes an entry; only once its whole list is here."""
        if index not in self._own_tags:
            first, last = _bounds(index, self._sizes.peer, self._points.what)
            raised = self._scalar.multiply(self._points.all()[first:last], self._points.what, self._workers)
            domain = self._exchange.domain("tag")
            self._own_tags[index] = b"".join(_digest(domain, point)[:TAG_BYTES] for point in _rows(raised))
        return self._own_tags[index]

    def receive_tag_chunk(self, index: int, data: bytes) -> None:
        """Tags of my points, as the other side computed them."""
        self._tags.put(index, data)

    def known(self) -> Bool:
        """bool[n], by row of my table: whether the other side knows it."""
        return self._list.known(self._tags.all(), self._peer_tags())

    def rows_of_peer(self, rows: int) -> Int64:
        """int64[rows]: my table row for each position of the other side, -1 for none. `rows`: its list, no dummies."""
        return self._list.rows_of_peer(self._tags.all(), self._peer_tags(), rows)

    def erase(self) -> None:
        """Forget the scalar; chunks already made can still be repeated, no new ones made."""
        self._scalar.erase()

    def _peer_tags(self) -> UInt8:
        data = b"".join(self.tag_chunk(index) for index in range(chunk_count(self._sizes.peer)))
        return np.frombuffer(data, np.uint8).reshape(-1, TAG_BYTES)


class Publisher:
    """SECRET. The large side of the one-sided form: publishes its keyed values, answers blinded queries.

    Leaks beyond the two-way form: the values are the same for every querier that `exchange.second` names, so queriers
    that pool what they got see which of their matches are the same id (a label holder's owners share its positions
    anyway); a querier that kept the values could look up more ids for as long as the scalar lives, hence one answered
    list per querier, the limit on its size, and `erase`; a publisher whose scalar gets out has its whole list open to
    enumeration, not only the part that matched. `order` as for `TwoWaySide`.
    """

    def __init__(
        self,
        ids: Sequence[str],
        order: Int64 | None,
        *,
        exchange: Exchange,
        size: int,
        bucket: int = BUCKET,
        largest: int = LARGEST_LIST,
        workers: int | None = None,
    ) -> None:
        _check_one_sided(exchange)
        self._list = _List(ids, order, size, bucket)
        self._exchange = exchange
        self._size, self._bucket, self._largest = size, bucket, largest
        self._workers = workers
        self._scalar = Scalar()
        self._values: dict[int, bytes] = {}
        self._claims: dict[int, bytes] = {}
        self._queries: dict[str, _Inbox] = {}
        self._answers: dict[tuple[str, int], bytes] = {}
        self._claimed: dict[str, _Inbox] = {}

    def __repr__(self) -> str:
        return "Publisher(secret)"

    def value_chunk(self, index: int) -> bytes:
        """Keyed values of my list, 16 bytes an entry; the same bytes for every querier and each time."""
        if index not in self._values:
            first, last = _bounds(index, self._size, "own keyed values")
            messages = self._list.messages[first:last]
            points = self._scalar.hash_and_multiply(messages, self._exchange.domain("id"), self._workers)
            digests = _keyed(self._exchange, messages, points)
            self._values[index] = b"".join(digest[:TAG_BYTES] for digest in digests)
            self._claims[index] = b"".join(digest[TAG_BYTES:] for digest in digests)
        return self._values[index]

    def expect(self, querier: str, size: int) -> None:
        """Open the one list of queries of `querier`, `size` entries after padding; repeating it changes nothing."""
        if querier not in self._exchange.second:
            raise Refused(f"{querier!r} is not among the queriers {self._exchange.second} of this publication")
        Sizes(mine=self._size, peer=size, bucket=self._bucket, largest=self._largest)
        if querier not in self._queries:
            self._queries[querier] = _Inbox(f"queries of {querier!r}", size, POINT_BYTES)
            self._claimed[querier] = _Inbox(f"claims of {querier!r}", size, TAG_BYTES)
        elif self._queries[querier].entries != size:
            raise Refused(f"{querier!r} announced another list of {size} entries; a querier has one list per exchange")

    def receive_query_chunk(self, querier: str, index: int, data: bytes) -> None:
        """Blinded points of a querier."""
        self._opened(self._queries, querier).put(index, data)

    def answer_chunk(self, querier: str, index: int) -> bytes:
        """The querier's points times my scalar, 32 bytes an entry; only once its whole list is here."""
        inbox = self._opened(self._queries, querier)
        if (querier, index) not in self._answers:
            points = inbox.all()
            first, last = _bounds(index, len(points), inbox.what)
            self._answers[querier, index] = self._scalar.multiply(
                points[first:last], inbox.what, self._workers
            ).tobytes()
        return self._answers[querier, index]

    def receive_claim_chunk(self, querier: str, index: int, data: bytes) -> None:
        """Second halves of the keyed values that the querier found, random bytes where it found none."""
        self._opened(self._claimed, querier).put(index, data)

    def known(self, querier: str) -> Bool:
        """bool[n], by row of my table: whether the querier knows it."""
        return self._list.known(self._own_claims(), self._opened(self._claimed, querier).all())

    def rows_of_peer(self, querier: str, rows: int) -> Int64:
        """int64[rows]: my table row for each position of the querier, -1 for none. `rows`: its list without dummies."""
        return self._list.rows_of_peer(self._own_claims(), self._opened(self._claimed, querier).all(), rows)

    def erase(self) -> None:
        """Forget the scalar; chunks already made can still be repeated, no new ones made."""
        self._scalar.erase()

    def _own_claims(self) -> UInt8:
        for index in range(chunk_count(self._size)):
            self.value_chunk(index)
        data = b"".join(self._claims[index] for index in range(chunk_count(self._size)))
        return np.frombuffer(data, np.uint8).reshape(-1, TAG_BYTES)

    @staticmethod
    def _opened(inboxes: dict[str, _Inbox], querier: str) -> _Inbox:
        if querier not in inboxes:
            raise Refused(f"{querier!r} has not announced its list in this exchange; `expect` it first")
        return inboxes[querier]


class Querier:
    """SECRET. The small side of the one-sided form, for one exchange. `order` as for `TwoWaySide`."""

    def __init__(
        self, ids: Sequence[str], order: Int64 | None, *, exchange: Exchange, sizes: Sizes, workers: int | None = None
    ) -> None:
        _check_one_sided(exchange)
        self._list = _List(ids, order, sizes.mine, sizes.bucket)
        self._exchange = exchange
        self._sizes = sizes
        self._workers = workers
        self._blind = Scalar()
        self._queries: dict[int, bytes] = {}
        self._values = _Inbox("keyed values of the publisher", sizes.peer, TAG_BYTES)
        self._answers = _Inbox("answers of the publisher", sizes.mine, POINT_BYTES)
        self._own: tuple[UInt8, UInt8] | None = None

    def __repr__(self) -> str:
        return "Querier(secret)"

    def query_chunk(self, index: int) -> bytes:
        """Blinded points of my list, 32 bytes an entry; the same bytes each time."""
        if index not in self._queries:
            first, last = _bounds(index, self._sizes.mine, "own queries")
            self._queries[index] = self._blind.hash_and_multiply(
                self._list.messages[first:last], self._exchange.domain("id"), self._workers
            ).tobytes()
        return self._queries[index]

    def receive_value_chunk(self, index: int, data: bytes) -> None:
        """Keyed values of the publisher's list."""
        self._values.put(index, data)

    def receive_answer_chunk(self, index: int, data: bytes) -> None:
        """My blinded points times the publisher's scalar."""
        self._answers.put(index, data)

    def claim_chunk(self, index: int) -> bytes:
        """For each entry of my list: the second half of its keyed value if it was found, else random bytes; 16 each."""
        claims = self._unblinded()[1]
        first, last = _bounds(index, len(claims), "own claims")
        return claims[first:last].tobytes()

    def known(self) -> Bool:
        """bool[n], by row of my table: whether the publisher knows it."""
        return self._list.known(self._unblinded()[0], self._values.all())

    def rows_of_peer(self, rows: int) -> Int64:
        """int64[rows]: my table row for each position of the publisher, -1 for none. `rows`: its list, no dummies."""
        return self._list.rows_of_peer(self._unblinded()[0], self._values.all(), rows)

    def erase(self) -> None:
        """Forget the blinding; chunks already made can still be repeated, no new ones made."""
        self._blind.erase()

    def _unblinded(self) -> tuple[UInt8, UInt8]:
        """Own keyed values, first halves and claims, each uint8[size, 16]; computed once."""
        if self._own is None:
            answers, values = self._answers.all(), self._values.all()
            inverse = self._blind.inverse()
            points = inverse.multiply(answers, self._answers.what, self._workers)
            inverse.erase()
            digests = np.frombuffer(b"".join(_keyed(self._exchange, self._list.messages, points)), np.uint8)
            halves = digests.reshape(-1, 2 * TAG_BYTES)
            first = np.ascontiguousarray(halves[:, :TAG_BYTES])
            missing = _locate(first, values) < 0
            claims = halves[:, TAG_BYTES:].copy()
            random = np.frombuffer(os.urandom(TAG_BYTES * int(missing.sum())), np.uint8)
            claims[missing] = random.reshape(-1, TAG_BYTES)
            self._own = first, claims
        return self._own


@dataclass(frozen=True, kw_only=True, repr=False)
class Alignment:
    """What the two sides hold afterwards, by position in the label holder's order.

    `known`: bool[n], the label holder's. `rows`: int64[n], the feature owner's table row or -1.
    """

    known: Bool
    rows: Int64


def intersect_two_way(
    label_holder_ids: Sequence[str], order: Int64, owner_ids: Sequence[str], *, job: bytes, bucket: int = BUCKET
) -> Alignment:
    """The whole two-way exchange between parties in one process (tests and benchmarks; vaults send the same pieces)."""
    exchange = Exchange(job=job, first="label holder", second=("feature owner",), form="two-way")
    size, owner_size = padded_size(len(label_holder_ids), bucket), padded_size(len(owner_ids), bucket)
    sizes = Sizes(mine=size, peer=owner_size, bucket=bucket)
    owner_sizes = Sizes(mine=owner_size, peer=size, bucket=bucket)
    holder = TwoWaySide(label_holder_ids, order, exchange=exchange, sizes=sizes)
    owner = TwoWaySide(owner_ids, None, exchange=exchange, sizes=owner_sizes)
    for index in range(chunk_count(size)):
        owner.receive_chunk(index, holder.chunk(index))
    for index in range(chunk_count(owner_size)):
        holder.receive_chunk(index, owner.chunk(index))
    for index in range(chunk_count(owner_size)):
        owner.receive_tag_chunk(index, holder.tag_chunk(index))
    for index in range(chunk_count(size)):
        holder.receive_tag_chunk(index, owner.tag_chunk(index))
    return Alignment(known=holder.known()[order], rows=owner.rows_of_peer(len(label_holder_ids)))


def intersect_one_sided(
    label_holder_ids: Sequence[str], order: Int64, owner_ids: Sequence[str], *, job: bytes, bucket: int = BUCKET
) -> Alignment:
    """The whole one-sided exchange in one process; the larger list publishes. Same result as `intersect_two_way`."""
    size, owner_size = padded_size(len(label_holder_ids), bucket), padded_size(len(owner_ids), bucket)
    holder_publishes = size >= owner_size
    names = ("label holder", "feature owner") if holder_publishes else ("feature owner", "label holder")
    exchange = Exchange(job=job, first=names[0], second=(names[1],), form="one-sided")
    small, large = min(size, owner_size), max(size, owner_size)
    sizes = Sizes(mine=small, peer=large, bucket=bucket)
    if holder_publishes:
        publisher = Publisher(label_holder_ids, order, exchange=exchange, size=large, bucket=bucket)
        querier = Querier(owner_ids, None, exchange=exchange, sizes=sizes)
    else:
        publisher = Publisher(owner_ids, None, exchange=exchange, size=large, bucket=bucket)
        querier = Querier(label_holder_ids, order, exchange=exchange, sizes=sizes)
    for index in range(chunk_count(large)):
        querier.receive_value_chunk(index, publisher.value_chunk(index))
    publisher.expect(names[1], small)
    for index in range(chunk_count(small)):
        publisher.receive_query_chunk(names[1], index, querier.query_chunk(index))
    for index in range(chunk_count(small)):
        querier.receive_answer_chunk(index, publisher.answer_chunk(names[1], index))
    for index in range(chunk_count(small)):
        publisher.receive_claim_chunk(names[1], index, querier.claim_chunk(index))
    rows = len(label_holder_ids)
    if holder_publishes:
        return Alignment(known=publisher.known(names[1])[order], rows=querier.rows_of_peer(rows))
    return Alignment(known=querier.known()[order], rows=publisher.rows_of_peer(names[1], rows))


def intersect_in_the_clear(
    label_holder_ids: Sequence[str], order: Int64, owner_ids: Sequence[str], *, job: bytes, bucket: int = BUCKET
) -> Alignment:
    """Plaintext twin of `intersect_two_way` and `intersect_one_sided`: the same result, no cryptography."""
    check_job(job)
    padded_size(0, bucket)
    _encode(label_holder_ids)
    _encode(owner_ids)
    _check_order(order, len(label_holder_ids))
    place = {name: row for row, name in enumerate(owner_ids)}
    rows = np.array([place.get(label_holder_ids[row], -1) for row in order], np.int64)
    return Alignment(known=rows >= 0, rows=rows)


def _encode(ids: Sequence[str]) -> list[bytes]:
    """Ids as UTF-8. Refuses, with counts and never an id, what two institutions could write differently."""
    unclean = sum(1 for name in ids if not name or name != name.strip() or not unicodedata.is_normalized("NFKC", name))
    if unclean:
        raise Refused(
            f"{unclean} of {len(ids)} ids are empty, have blanks around them or are not in Unicode form NFKC; "
            "normalise them first, both sides alike"
        )
    repeated = len(ids) - len(set(ids))
    if repeated:
        raise Refused(
            f"{repeated} of {len(ids)} ids are duplicates of another; keep one row for each enterprise (the mapping "
            "says which: latest or worst)"
        )
    try:
        return [name.encode() for name in ids]
    except UnicodeEncodeError:
        raise Refused("an id has a lone surrogate, which is no character; mend the table's encoding") from None


def _check_order(order: Int64, rows: int) -> None:
    """A permutation of 0..rows-1, and not the file order: that leaks dates and labels (PROTOCOL rule 11)."""
    straight = np.arange(rows)
    if order.shape != (rows,) or not np.array_equal(np.sort(order), straight):
        raise Refused(f"the order of {rows} rows has shape {order.shape} or is no permutation; draw a fresh one")
    if rows >= _ORDER_CHECKED_FROM and np.array_equal(order, straight):
        raise Refused(f"the order of {rows} rows is the order of the table; draw a fresh random one")


def _check_form(form: str) -> None:
    if form not in ("two-way", "one-sided"):
        raise Refused(f"form {form!r} of private set intersection; choose 'two-way' or 'one-sided'")


def _check_one_sided(exchange: Exchange) -> None:
    if exchange.form != "one-sided":
        raise Refused(f"a one-sided side in an exchange of form {exchange.form!r}; agree on the form first")


def _bounds(index: int, entries: int, what: str) -> tuple[int, int]:
    if not 0 <= index < chunk_count(entries):
        raise Refused(f"{what}: chunk {index} of {chunk_count(entries)}; the first is 0")
    return index * CHUNK, min(entries, (index + 1) * CHUNK)


def _rows(packed: UInt8) -> list[bytes]:
    data, width = packed.tobytes(), packed.shape[1]
    return [data[start : start + width] for start in range(0, len(data), width)]


def _digest(domain: bytes, data: bytes) -> bytes:
    return hashlib.sha256(domain + data).digest()


def _keyed(exchange: Exchange, messages: Sequence[bytes], points: UInt8) -> list[bytes]:
    """32-byte keyed values H(id, H(id)^k). Injective: the point at the end has a fixed length."""
    domain = exchange.domain("value")
    return [_digest(domain, message + point) for message, point in zip(messages, _rows(points), strict=True)]


def _comparable(packed: UInt8) -> npt.NDArray[np.bytes_]:
    """Rows as one fixed-width value each. numpy ignores trailing zero bytes, which is exact for equal widths."""
    width = packed.shape[1]
    return np.ascontiguousarray(packed).view(f"S{width}").reshape(-1)


def _locate(needles: UInt8, haystack: UInt8) -> Int64:
    """Index in `haystack` (distinct rows, at least one) of each needle, -1 where there is none."""
    wanted, stored = _comparable(needles), _comparable(haystack)
    order = np.argsort(stored, kind="stable")
    place = np.minimum(np.searchsorted(stored, wanted, sorter=order), len(stored) - 1)
    candidate = order[place]
    return np.where(stored[candidate] == wanted, candidate, -1).astype(np.int64)
