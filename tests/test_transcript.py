"""Who sees what (DESIGN section 4), cell by cell, on whole recorded runs: what the coordinator handled, what each party
saw in plaintext. Every detector has a positive control: the leak that it looks for, planted."""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import pytest
import tenseal.sealapi as sealapi

from fl_clients.protocol import Letter, Reply, Request, decode_reply, decode_request
from models.scorecard import gather
from privacy import blind_aggregate, seal_bytes, secure_sum
from privacy.errors import Refused
from privacy.sealing import Context, JobKeys
from privacy.secure_sum import ConsortiumKey
from simulations.federation_folder import locate
from tests.small_federation import RecordedRun, Seen, record, small_federation, small_parties

SEAL_HEADER = 128
"""Bytes of SEAL's format before the first coefficient: sizes, parameters, generator."""


# --- detectors of leaks in what the coordinator handled --------------------------------------------------------------


LEAST_WINDOW = 4
LONGEST_WINDOW = 128
LEAST_BITS = 30.0
"""Surprise that a piece of a vector must have to count as a leak; runs of zeros and ones are everywhere."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Overlapping pieces of one encoded vector, buffer[starts[i] : ends[i]], each at least 4 values and 30 bits."""

    buffer: bytes
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def needle(self, i: int) -> bytes:
        return self.buffer[self.starts[i] : self.ends[i]]


class Haystack:
    """Byte strings, searched for many needles at once: an index of all 8-byte windows, then an exact comparison."""

    def __init__(self, parts: Sequence[bytes]) -> None:
        self._bytes = (b"\x00" * 16).join(parts) + b"\x00" * 8
        raw = np.frombuffer(self._bytes, np.uint8)
        keys = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(raw, 8)).view(np.uint64).ravel()
        self._keys = np.sort(keys)

    def _holds(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.asarray(self._keys[at] == keys)

    def first(self, needles: Sequence[bytes]) -> bytes | None:
        """Any of the needles (each at least 8 bytes) that occurs."""
        keys = np.array([struct.unpack("<Q", n[len(n) // 2 - 4 : len(n) // 2 + 4])[0] for n in needles], np.uint64)
        return next((needles[i] for i in np.flatnonzero(self._holds(keys)) if needles[i] in self._bytes), None)

    def first_of(self, windows: Windows) -> bytes | None:
        """Any piece of an encoded vector that occurs and tells something."""
        if len(windows.starts) == 0 or len(windows.buffer) < 8:
            return None
        raw = np.frombuffer(windows.buffer, np.uint8)
        every = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(raw, 8)).view(np.uint64).ravel()
        places = (windows.starts, (windows.starts + windows.ends) // 2 - 4, windows.ends - 8)
        possible = np.all([self._holds(every[np.clip(place, 0, len(every) - 1)]) for place in places], axis=0)
        for i in np.flatnonzero(possible):
            if windows.needle(i) in self._bytes:
                return windows.needle(i)
        return None


NUMBER_TYPES = ("<f8", ">f8", "<f4", ">f4", "<i8", ">i8", "<i4", ">i4", "<i2", ">i2", "<u1")
TEXT_FORMS: dict[str, tuple[Callable[[float], bytes], bytes]] = {
    "msgpack": (msgpack.packb, b""),
    "msgpack float32": (lambda value: bytes(msgpack.packb(value, use_single_float=True)), b""),
    "json": (lambda value: json.dumps(value).encode(), b", "),
    "csv": (lambda value: f"{value:g}".encode(), b","),
    "lines": (lambda value: repr(value).encode(), b"\n"),
}
ALL_FORMS = (*NUMBER_TYPES, *TEXT_FORMS)


def _bits(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What each value tells: by its frequency in the vector (the commonest nothing, small counts little: they are
    everywhere), and at least 10 bits for large and for broken numbers."""
    _, group, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    by_frequency = -np.log2(counts / len(numbers))[group]
    rare = (np.abs(numbers) >= 4096) | (numbers != np.rint(numbers))
    told = np.where(rare, np.maximum(by_frequency, 10.0), np.minimum(by_frequency, 1 + np.log2(np.abs(numbers) + 2)))
    return np.where((group == np.argmax(counts)) & (counts.max() > 3), 0.0, told)


def encoded(values: npt.NDArray[Any], form: str) -> Windows | None:
    """From every value on, as many values in one encoding as tell 30 bits, at least 4 and at least 12 bytes.

    None where the encoding cannot hold them. Missing cells are left out: a leak would skip them or write a code.
    """
    numbers = values.astype(np.float64)
    numbers = numbers[~np.isnan(numbers)]
    if len(numbers) < LEAST_WINDOW:
        return None
    whole = bool(np.all(numbers == np.rint(numbers)))
    if form in TEXT_FORMS:
        encode, separator = TEXT_FORMS[form]
        pieces = [encode(int(v) if whole else float(v)) + separator for v in numbers]
        bounds = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
        buffer, last = b"".join(pieces), len(separator)
    else:
        kind = np.dtype(form)
        if kind.kind in "iu":
            limits = np.iinfo(kind)
            if not whole or numbers.max() > limits.max or numbers.min() < limits.min:
                return None
        bounds = np.arange(len(numbers) + 1, dtype=np.int64) * kind.itemsize
        with np.errstate(over="ignore"):
            buffer, last = numbers.astype(kind).tobytes(), 0
    told = np.concatenate([[0.0], np.cumsum(_bits(numbers))])
    starts = np.arange(len(numbers))
    ends = np.maximum(np.searchsorted(told, told[:-1] + LEAST_BITS), starts + LEAST_WINDOW)
    ends = np.maximum(ends, np.searchsorted(bounds, bounds[:-1] + 12 + last))
    # from one telling value to another, not too far apart: long runs of zeros are everywhere
    fits = (ends <= np.minimum(len(numbers), starts + LONGEST_WINDOW)) & (np.diff(told) > 0)
    return Windows(buffer=buffer, starts=bounds[starts[fits]], ends=bounds[ends[fits]] - last)


def bitmap_needles(label: npt.NDArray[np.int8]) -> list[bytes]:
    """Labels as bits, at any offset of rows, both bit orders, 96 rows long."""
    return [
        np.packbits(label[offset : offset + 96].astype(np.uint8), bitorder=order).tobytes()
        for order in ("big", "little")
        for offset in range(len(label) - 96)
    ]


def id_needles(ids: Sequence[str]) -> list[bytes]:
    """Ids as text, as UTF-16, as their bare hashes (all published codes hash in minutes)."""
    needles = []
    for text in ids:
        raw = text.encode()
        needles += [raw, text.encode("utf-16-le"), text.lower().encode(), raw.hex().encode()]
        for name in ("md5", "sha1", "sha256", "sha512", "blake2b"):
            digest = hashlib.new(name, raw).digest()
            needles += [digest, digest.hex().encode()]
    return needles


def numbers_in(tree: object) -> list[float]:
    """Every number in a JSON-like model: its bin edges and codes."""
    match tree:
        case bool() | None | str():
            return []
        case int() | float():
            return [float(tree)]
        case dict():
            return [number for value in tree.values() for number in numbers_in(value)]
        case list() | tuple():
            return [number for value in tree for number in numbers_in(value)]
        case _:
            raise AssertionError(f"unknown part of a model: {type(tree)}")


def private_vectors(run: RecordedRun) -> dict[str, npt.NDArray[Any]]:
    """Everything numeric that must not reach the coordinator, by name, in the order of the table and of the vault."""
    found: dict[str, npt.NDArray[Any]] = {}
    for table in run.federation.banks:
        orders = {"table": (table.label, table.columns)}
        for part, rows in (("training", run.training[table.name]), ("held out", run.held_out[table.name])):
            orders[part] = (rows.label, rows.columns)
        for order, (label, columns) in orders.items():
            found[f"{table.name} labels, {order}"] = label
            for name, values in columns.items():
                if values.dtype != object:
                    found[f"{table.name}.{name}, {order}"] = values
    for owner in run.federation.owners:
        for name, values in owner.columns.items():
            if values.dtype == object:
                continue
            found[f"{owner.name}.{name}, table"] = values
            for bank in run.parties.banks:
                index = run.aligned[owner.name][bank]
                found[f"{owner.name}.{name}, rows of {bank}"] = values[index[index >= 0]]
    for number, seen in enumerate(run.seen):
        if seen.kind in ("v", "part", "S", "z", "total", "summand", "opened"):
            if seen.kind == "total" and seen.step == "release":
                continue  # the pooled histogram is what the contract releases
            if seen.kind in ("total", "summand") and len(seen.content) < LEAST_WINDOW:
                continue
            found[f"{seen.party} {seen.kind} of {seen.step} ({number})"] = np.asarray(seen.content)
        if seen.kind == "cells":
            for column in range(seen.content.shape[1]):
                found[f"{seen.party} cells {column} for {seen.sender} ({number})"] = seen.content[:, column]
    for name, role in {**run.parties.banks, **run.parties.owners}.items():
        model = role.model()
        found[f"{name} weights"] = np.asarray(model["weights"])
        found[f"{name} edges"] = np.asarray(numbers_in(model["tower"]))
    return found


def leaks(haystack: Haystack, vectors: dict[str, npt.NDArray[Any]]) -> list[str]:
    """ "name as form" of every vector of which a part is found."""
    found, seen = [], set()
    for name, values in vectors.items():
        if (same := (values.dtype.str, values.tobytes())) in seen:
            continue
        seen.add(same)
        for form in ALL_FORMS:
            windows = encoded(values, form)
            if windows is not None and (piece := haystack.first_of(windows)) is not None:
                found.append(f"{name} as {form}: {piece.hex()[:64]}")
    return found


# --- what the coordinator handled ------------------------------------------------------------------------------------


def replies_of(run: RecordedRun) -> Iterator[tuple[Request, Reply]]:
    contract = run.parties.contract
    for item in run.exchanged:
        request = decode_request(item.request, contract)
        yield request, decode_reply(item.reply, contract, item.party, request)


def handled(run: RecordedRun) -> list[bytes]:
    """Every byte that the coordinator handled, mail only once (it relays it as it came, which is asserted)."""
    sent = {item.request for item in run.exchanged} | {item.reply for item in run.exchanged}
    assert set(run.transcript) == sent
    parts, mail = [], set()
    for item, (request, reply) in zip(run.exchanged, replies_of(run), strict=True):
        parts.append(item.reply)
        assert all(entry in mail for entry in (*request.letters, *request.posts)), "mail of unknown origin"
        mail |= {*reply.letters, *reply.posts}
        parts.append(msgpack.packb(vars(replace(request, letters=(), posts=()))))
    return parts


@pytest.fixture(scope="module", params=["exact_run", "private_run"])
def run(request: pytest.FixtureRequest) -> RecordedRun:
    found: RecordedRun = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def haystack(run: RecordedRun) -> Haystack:
    return Haystack(handled(run))


def test_the_coordinator_sees_no_value_label_residual_score_edge_or_weight(
    run: RecordedRun, haystack: Haystack
) -> None:
    vectors = private_vectors(run)
    assert len(vectors) > 150
    assert leaks(haystack, vectors) == []


def test_the_coordinator_sees_no_id_and_no_label_bitmap(run: RecordedRun, haystack: Haystack) -> None:
    for table in (*run.federation.banks, *run.federation.owners):
        assert haystack.first(id_needles([str(value) for value in table.ids])) is None, table.name
    for table in run.federation.banks:
        orders = (table.label, run.training[table.name].label, run.held_out[table.name].label)
        assert all(haystack.first(bitmap_needles(label)) is None for label in orders)
    columns = [b"late_filings", b"overdue_days", b"utilisation"]
    named = {item.step for item in run.exchanged if any(name in item.request + item.reply for name in columns)}
    assert named == {"certify"}, "nor column names, but in the certificate, which quotes the contract"


def test_the_coordinator_sees_row_counts_sizes_and_what_the_contract_releases(run: RecordedRun) -> None:
    """The positive side of the table: all it gets in plaintext, by step."""
    released: dict[str, set[str]] = {}
    for request, reply in replies_of(run):
        released.setdefault(request.step, set()).update(reply.released)
    assert {step: names for step, names in released.items() if names} == {
        "release": {"histogram"},
        "close": {"model", "receipt"},
        "certify": {"signature"},
    }
    allowed = {
        "join": [
            {"public", "training_rows", "held_out_rows"},
            {"public", "training_rows", "held_out_rows", "list_size"},
        ],
        "roster": [{"bank_key"}, {"fingerprint", "maker"}, {"bins"}],
        "prepare": [{"bins"}],
    }
    for _, reply in replies_of(run):
        for post in reply.posts:
            names = set(msgpack.unpackb(post.content, max_bin_len=1 << 31))
            fitting = [*allowed.get(post.step, []), {"opened", "digest"}, {"residual", "rows_per_ciphertext"}]
            assert names in fitting, (post.step, names)
    totals = np.array(run.outcome.histogram)
    held_out = sum(int(bank.held_out.sum()) for bank in run.federation.banks)
    if run.parties.contract.privacy.epsilon is None:
        assert totals.sum() == held_out
    else:
        assert np.any(run.parties.noise.tape["sum/evaluate.0/0/bank1"]), "the released histogram carries noise"


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_detector_finds_a_planted_leak(form: str, exact_run: RecordedRun) -> None:
    """The fewest values that count as a leak, from start, middle and end, between random bytes, in each encoding."""
    rng = np.random.default_rng(3)
    noise = rng.bytes(60_000)
    training = exact_run.training["bank1"]
    vectors = {
        "labels": training.label,
        "bins": rng.integers(0, 30, 300),
        "scores": rng.integers(-30_000, 30_000, 200),
        "turnover": training.columns["turnover"],
    }
    tried = 0
    for name, values in vectors.items():
        windows = encoded(values, form)
        if windows is None:
            assert name in ("turnover", "scores"), "only what does not fit the type may be left out"
            continue
        assert len(windows.starts) > len(values) // 8
        for i in (0, len(windows.starts) // 2, len(windows.starts) - 1):
            planted = Haystack([b"".join([noise[:30_001], windows.needle(i), noise[30_001:]])])
            assert leaks(planted, {name: values}), name
            tried += 1
        assert leaks(Haystack([noise]), {name: values}) == [], "no false alarm on noise"
    assert tried >= 6


def test_the_detectors_of_ids_and_bitmaps_find_planted_leaks(exact_run: RecordedRun) -> None:
    noise = np.random.default_rng(4).bytes(50_000)
    table = exact_run.federation.banks[1]
    ids = [str(value) for value in table.ids]
    for leak in (ids[17].encode(), hashlib.sha256(ids[3].encode()).digest(), ids[-1].encode("utf-16-le")):
        assert Haystack([noise, b"x" + leak + noise]).first(id_needles(ids)) is not None
    for order in ("big", "little"):
        bits = np.packbits(table.label.astype(np.uint8), bitorder=order).tobytes()  # type: ignore[call-overload]
        assert Haystack([noise, bits, noise]).first(bitmap_needles(table.label)) is not None
    assert Haystack([noise]).first([*id_needles(ids), *bitmap_needles(table.label)]) is None


def test_a_leak_planted_in_one_message_of_the_run_is_found(exact_run: RecordedRun) -> None:
    """Eight residuals inside a released field, as a careless bank might send them."""
    [seen] = exact_run.of("v", "bank2", "r1.residual")
    [seen_two] = exact_run.of("v", "bank2", "r2.residual")
    for content in (seen.content, seen_two.content):
        leak = msgpack.packb({"debug": content[40:90].tolist()})
        vectors = {"v": content}
        assert leaks(Haystack([exact_run.exchanged[0].reply, leak]), vectors)


# --- keys ------------------------------------------------------------------------------------------------------------


def consortium_secret(run: RecordedRun) -> bytes:
    """The banks' common key, as bank1 sealed it to bank2."""
    [secret] = {seen.content["secret"] for seen in run.of("letter", "bank2") if "secret" in plain_names(seen)}
    assert isinstance(secret, bytes)
    return secret


def test_no_secret_key_passes_the_coordinator(run: RecordedRun, haystack: Haystack) -> None:
    keys = [session.keys._key.private_bytes_raw() for session in run.sessions.values()]
    [secret] = {
        seen.content["secret"] for seen in run.seen if seen.kind == "letter" and "secret" in str(seen.content)[:20]
    }
    assert len(keys) == 5
    assert len(secret) > 1000
    needles = [key[start : start + 16] for key in keys for start in (0, 8, 16)]
    needles += [secret[start : start + 24] for start in range(SEAL_HEADER, len(secret) - 24)]
    needles += [run.parties.coordinator._key.private_bytes_raw()]
    assert haystack.first(needles) is None
    assert Haystack([b"abc" + keys[2] + b"def"]).first(needles) is not None
    assert Haystack([b"abc" + secret]).first(needles) is not None


def context_of(letter: Letter, job: bytes, receiver: str) -> Context:
    return Context(
        job=job,
        step=letter.step,
        attempt=letter.attempt,
        participants=letter.participants,
        sender=letter.sender,
        receiver=receiver,
        label="letter",
    )


def test_every_letter_opens_at_its_receiver_and_nowhere_else(run: RecordedRun) -> None:
    """Third parties, whatever receiver they pretend to be; and the coordinator with keys of its own."""
    stranger, job = JobKeys.generate(), run.parties.contract.hash
    publics = {name: session.keys.public for name, session in run.sessions.items()}
    letters = [letter for _, reply in replies_of(run) for letter in reply.letters]
    assert len(letters) > 40
    for letter in letters:
        own = context_of(letter, job, letter.receiver)
        opened = run.sessions[letter.receiver].keys.open(publics[letter.sender], own, letter.sealed)
        assert msgpack.unpackb(opened, max_bin_len=1 << 31)
        for name, session in run.sessions.items():
            if name in (letter.sender, letter.receiver):
                continue  # the writer of a letter knows what it wrote
            for pretended in {name, letter.receiver}:
                with pytest.raises(Refused):
                    session.keys.open(publics[letter.sender], context_of(letter, job, pretended), letter.sealed)
        with pytest.raises(Refused):
            stranger.open(publics[letter.sender], own, letter.sealed)


def test_ciphertexts_do_not_open_under_a_key_of_the_coordinators_making(run: RecordedRun) -> None:
    roster = run.outcome.roster
    consortium, bank_key = ConsortiumKey(roster.sum_parameters), blind_aggregate.BankKey(roster.aggregate_parameters)
    sums = [part for request, _ in replies_of(run) if request.summed for part in msgpack.unpackb(request.summed)]
    residuals = [
        part
        for _, reply in replies_of(run)
        for post in reply.posts
        for part in msgpack.unpackb(msgpack.unpackb(post.content, max_bin_len=1 << 31).get("residual", b"\x90"))
    ]
    assert len(sums) > 10
    assert len(residuals) > 5
    for key, own, foreign in (
        (consortium, consortium.encrypt(np.zeros(3, np.uint64)), sums),
        (bank_key, bank_key.encrypt(np.zeros(3, np.int64), 8), residuals),
    ):
        budgets = []
        for part in (msgpack.unpackb(own)[0], *foreign):
            ciphertext = seal_bytes.load(sealapi.Ciphertext(key._context), key._context, part, "test")
            budgets.append(key._decryptor.invariant_noise_budget(ciphertext))
        assert budgets[0] > 0, "control: what was encrypted under the key opens"
        assert not any(budgets[1:])


def test_a_bank_cannot_open_another_banks_summand_even_with_the_consortium_key(run: RecordedRun) -> None:
    """Lock 2: inside the ciphertext the pairwise masks; the control is the sum, which the same key does open."""
    parameters = run.outcome.roster.sum_parameters
    secret = consortium_secret(run)
    key = ConsortiumKey(parameters, secret)
    checked = 0
    for request, reply in replies_of(run):
        if reply.summand is None or reply.party != "bank3":
            continue
        [seen] = run.of("summand", "bank3", request.step)
        if seen.content.size == 0:
            continue
        parts = msgpack.unpackb(reply.summand)
        opened = key.open(reply.summand, 1 + parameters.degree * (len(parts) - 1))
        plain = secure_sum.pack(seen.content, int(np.abs(seen.content).max()) or 1, parameters)
        assert opened[0] != plain[0], request.step
        checked += 1
    assert checked > 10


# --- freshness and form of what is relayed ---------------------------------------------------------------------------


def windows_of(blobs: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """64-bit fingerprints of 32-byte windows, sorted, repeated where they repeat. Only those divisible by 8 are kept:
    the choice depends on the content, so that what is equal on both sides is kept on both."""
    multipliers = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)
    found = []
    for blob in blobs:
        if len(blob) < 32:
            continue
        raw = np.frombuffer(blob, np.uint8)
        words = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(raw, 8)).view(np.uint64).ravel()
        total = np.zeros(len(blob) - 31, np.uint64)
        for place, multiplier in enumerate(multipliers):
            total += words[8 * place : len(words) - 24 + 8 * place] * np.uint64(multiplier)
        total ^= total >> np.uint64(29)
        found.append(total[total % np.uint64(8) == 0])
    return np.sort(np.concatenate(found))


def bodies_of(reply: Reply) -> list[bytes]:
    """Sealed letters, and the bodies of all ciphertexts without SEAL's constant header."""
    blobs: list[bytes] = [] if reply.summand is None else msgpack.unpackb(reply.summand)
    for post in reply.posts:
        content = msgpack.unpackb(post.content, max_bin_len=1 << 31)
        blobs += msgpack.unpackb(content["residual"]) if "residual" in content else []
    return [letter.sealed for letter in reply.letters] + [blob[SEAL_HEADER:] for blob in blobs]


def secret_bodies(run: RecordedRun) -> list[bytes]:
    return [body for _, reply in replies_of(run) for body in bodies_of(reply)]


def test_two_runs_of_the_same_job_share_no_ciphertext_and_no_mask() -> None:
    """Same tables, same terms: everything that is relayed is fresh."""
    federation = small_federation(banks=2, owners=2, enterprises=500)
    runs = [record(federation, small_parties(federation, rounds=1)) for _ in range(2)]
    first, second = (secret_bodies(one) for one in runs)
    assert sum(map(len, first)) > 300_000
    assert len(np.intersect1d(windows_of(first), windows_of(second))) == 0
    # control: a piece of a ciphertext of the first run, sent again in the second, is found
    longest = max(first, key=len)
    assert len(np.intersect1d(windows_of(first), windows_of([*second, longest[500:900]]))) > 20


def test_no_ciphertext_or_letter_occurs_twice_in_a_run(run: RecordedRun) -> None:
    windows = windows_of(secret_bodies(run))
    assert len(windows) > 100_000
    assert not np.any(windows[1:] == windows[:-1])


def compressibility(data: bytes) -> float:
    return len(zlib.compress(data, 9)) / len(data)


def test_sealed_letters_look_random(run: RecordedRun) -> None:
    sealed = b"".join(letter.sealed for _, reply in replies_of(run) for letter in reply.letters)
    assert len(sealed) > 100_000
    assert compressibility(sealed) > 0.999
    counts = np.bincount(np.frombuffer(sealed, np.uint8), minlength=256)
    expected = len(sealed) / 256
    assert float(np.sum((counts - expected) ** 2) / expected) < 255 + 8 * (2 * 255) ** 0.5
    assert compressibility(sealed[:50_000] + bytes(2_000)) < 0.99, "control: a hole of zeros is seen"


# --- what a feature owner sees ---------------------------------------------------------------------------------------


def plain_names(seen: Seen) -> frozenset[str]:
    return frozenset(seen.content) if isinstance(seen.content, dict) else frozenset({type(seen.content).__name__})


def test_an_owner_gets_only_the_mail_that_the_table_allows(run: RecordedRun) -> None:
    letters = {frozenset({"positives"}), frozenset({"alphas"}), frozenset({"answer"}), frozenset({"list"})}
    posts = {
        frozenset({"public", "training_rows", "held_out_rows"}),
        frozenset({"public", "training_rows", "held_out_rows", "list_size"}),
        frozenset({"bank_key"}),
        frozenset({"residual", "rows_per_ciphertext"}),
    }
    for owner in run.parties.owners:
        for seen in run.of("letter", owner):
            assert plain_names(seen) in letters, seen.step
            assert "list" not in plain_names(seen) or seen.step.startswith(("match", "prepare"))
            assert seen.sender in run.parties.banks, "owners write no letters to owners"
        assert {plain_names(seen) for seen in run.of("post", owner)} <= posts
        assert run.of("total", owner) == run.of("z", owner) == []


def exact_parts(run: RecordedRun, owner: str, number: int) -> dict[str, npt.NDArray[np.int64]]:
    """A_b v_b of every bank in one round."""
    parts = {}
    for bank in run.parties.banks:
        [cells] = [s.content for s in run.of("cells", owner, f"r{number}.direction") if s.sender == bank]
        [residuals] = run.of("v", bank, f"r{number}.residual")
        rows = int(run.of("S", owner, f"r{number}.direction")[0].content.size)
        parts[bank] = gather(cells, residuals.content, rows)
    return parts


def test_an_owner_gets_the_sum_over_banks_and_no_banks_part(run: RecordedRun) -> None:
    roster = run.outcome.roster
    tape, parameters = run.parties.noise.tape, roster.aggregate_parameters
    for owner in run.parties.owners:
        outer: list[npt.NDArray[np.bool_]] = []
        for number in (1, 2):
            parts = exact_parts(run, owner, number)
            noise = sum(tape.get(f"sum/r{number}.owner.{owner}/0/{bank}", np.int64(0)) for bank in parts)
            [total] = run.of("S", owner, f"r{number}.direction")
            assert np.array_equal(total.content, sum(parts.values()) + noise)
            assert np.any(noise) == (run.parties.contract.privacy.epsilon is not None)
            # what it could make of each bank's answer alone, with its own pads
            [seen] = run.of("answers", owner, f"r{number}.direction")
            answers, pads = seen.content
            for answer, pad, (bank, part) in zip(answers, pads, parts.items(), strict=True):
                alone = blind_aggregate.from_residues(answer - pad, parameters)
                assert not np.any(alone == part), bank
                outer.append(np.abs(alone) > 1 << (parameters.log_t - 2))
        # uniform modulo t: half of the values lie in the outer half
        assert 0.2 < np.mean(np.concatenate(outer)) < 0.8


def test_with_one_bank_the_sum_is_that_banks_and_the_test_above_would_see_it() -> None:
    """The control, and what DESIGN says of a job with one bank: nothing hides it from the owner."""
    federation = small_federation(banks=1, owners=1, enterprises=400)
    run = record(federation, small_parties(federation, rounds=1))
    [part] = exact_parts(run, "pboc", 1).values()
    [seen] = run.of("answers", "pboc", "r1.direction")
    [answer], [pad] = seen.content
    alone = blind_aggregate.from_residues(answer - pad, run.outcome.roster.aggregate_parameters)
    assert np.array_equal(alone, part)
    [z] = run.of("z", "bank1", "r1.search.1")
    [own] = run.of("part", "pboc", "r1.direction")
    assert np.array_equal(z.content, own.content), "and with one owner the bank sees that owner's part"


# --- what a bank sees ------------------------------------------------------------------------------------------------


def test_a_bank_gets_only_the_mail_that_the_table_allows(run: RecordedRun) -> None:
    letters = {
        frozenset({"secret"}),
        frozenset({"product"}),
        frozenset({"share"}),
        frozenset({"list"}),
        frozenset({"bins"}),
    }
    posts = {
        frozenset({"public", "training_rows", "held_out_rows"}),
        frozenset({"public", "training_rows", "held_out_rows", "list_size"}),
        frozenset({"fingerprint", "maker"}),
        frozenset({"opened", "digest"}),
    }
    for bank in run.parties.banks:
        for seen in run.of("letter", bank):
            assert plain_names(seen) in letters, seen.step
            assert (seen.sender in run.parties.banks) == (plain_names(seen) == {"secret"})
        assert {plain_names(seen) for seen in run.of("post", bank)} <= posts
        assert run.of("S", bank) == []


def test_a_bank_gets_the_sum_over_owners_and_no_owners_part(run: RecordedRun) -> None:
    steps = [("r1.direction", "r1.search.1"), ("r2.direction", "r2.search.1"), ("score", "evaluate")]
    for bank in run.parties.banks:
        for written, opened in steps:
            parts = {
                owner: next(s.content for s in run.of("part", owner, written) if s.sender == bank)
                for owner in run.parties.owners
            }
            [z] = run.of("z", bank, opened)
            assert np.array_equal(z.content, sum(parts.values()))
            shares = {s.sender: s.content["share"] for s in run.of("letter", bank, opened)}
            assert set(shares) == set(parts)
            for owner, part in parts.items():
                alone = np.frombuffer(shares[owner], "<u4").view(np.int32).astype(np.int64)
                assert np.mean(alone == part) < 0.01, owner
                assert abs(np.corrcoef(alone, part)[0, 1]) < 0.6, owner
                assert np.abs(alone).max() > 1 << 28, "uniform modulo 2^32, far beyond any score"
                assert not np.array_equal(z.content, part)


def test_in_training_the_parts_carry_forward_noise_and_in_scoring_none(run: RecordedRun) -> None:
    """Rows with the same bins have the same exact part; what differs in training is the noise of the tape."""
    for owner in run.parties.owners:
        for number in (1, 2):
            noise = run.parties.forward_noise.tape[f"forward/r{number}/{owner}"]
            for bank in run.parties.banks:
                [cells] = [s.content for s in run.of("cells", owner, f"r{number}.direction") if s.sender == bank]
                [part] = [s.content for s in run.of("part", owner, f"r{number}.direction") if s.sender == bank]
                index = run.aligned[owner][bank][: len(cells)]
                known = index >= 0
                values = part[:-1][known]
                clean = values - noise[index[known]]
                _, group = np.unique(cells[known], axis=0, return_inverse=True)
                order = np.argsort(group.ravel(), kind="stable")
                pairs = [(a, b) for a, b in pairwise(order) if group.ravel()[a] == group.ravel()[b]]
                assert len(pairs) > 50
                assert all(clean[a] == clean[b] for a, b in pairs)
                assert np.mean([values[a] != values[b] for a, b in pairs]) > 0.99
                spread = float(part[-1])
                assert 0.6 < float(np.std(noise[index[known]])) / spread < 1.6, "one standard deviation of noise"


def test_an_enterprise_of_two_banks_gets_the_same_forward_noise(run: RecordedRun) -> None:
    """PROTOCOL 2: the noise is a function of (job, round, row of the owner); the tape has one number per row."""
    for owner in run.federation.owners:
        for number in (1, 2):
            assert len(run.parties.forward_noise.tape[f"forward/r{number}/{owner.name}"]) == len(owner.ids)
    first, second = (run.parties.forward_noise.tape[f"forward/r{number}/tax"] for number in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.2


def test_banks_open_pooled_sums_only(run: RecordedRun) -> None:
    """Every total is the sum over the banks of what each put in, and no bank's own part."""
    banks = tuple(run.parties.banks)
    for bank in banks:
        pending = ""
        totals = 0
        for seen in run.seen:
            if seen.party != bank or seen.kind not in ("summand", "total"):
                continue
            if seen.kind == "summand":
                pending = seen.step
                continue
            parts = [run.of("summand", other, pending)[0].content for other in banks]
            assert np.array_equal(seen.content, np.sum(parts, axis=0)), pending
            if np.any(seen.content):
                assert not any(np.array_equal(seen.content, part) for part in parts), pending
            totals += 1
        assert totals >= 14


def test_a_bank_learns_which_of_its_own_customers_an_owner_knows_and_of_no_others(run: RecordedRun) -> None:
    """The alignment: an owner's index covers exactly the bank's rows, -1 where it knows nothing."""
    for owner in run.federation.owners:
        for table in run.federation.banks:
            index = run.aligned[owner.name][table.name]
            assert len(index) == len(table.ids)
            known = locate(table.ids, owner.ids) >= 0
            assert int((index >= 0).sum()) == int(known.sum())


def test_the_order_of_the_rows_is_not_that_of_the_table(run: RecordedRun) -> None:
    """PROTOCOL 11: file order leaks dates and labels."""
    for table in run.federation.banks:
        label = run.training[table.name].label
        assert label.sum() == table.label[~table.held_out].sum()
        assert not np.array_equal(label, table.label[~table.held_out])
        turnover = run.training[table.name].columns["turnover"]
        assert np.nanmean(turnover == table.columns["turnover"][~table.held_out]) < 0.1
