"""Pairwise masks cancel, bind everything, and refuse to leave anybody bare; pads are used once."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from privacy.errors import Refused
from privacy.masks import (
    COMPLETE_UP_TO,
    MaskContext,
    OneTimePad,
    graph_degree,
    neighbours,
    pair_key,
    pairwise_mask,
    stream,
    uniform,
)
from privacy.sealing import JobKeys

JOB = bytes(range(32))
POOL = {f"party-{number:02}": JobKeys.generate() for number in range(60)}
CONTEXT = MaskContext(job=JOB, step="r1.open", attempt=0, participants=("a", "b", "c"), receiver="pboc")


def masks_of(names: tuple[str, ...], **changes: Any) -> list[npt.NDArray[np.uint64]]:
    """Every participant's mask, as each computes it by itself."""
    arguments: dict[str, Any] = {
        "job": JOB,
        "step": "r1.open",
        "attempt": 0,
        "participants": names,
        "receiver": "pboc",
        "length": 5,
        "modulus_bits": 38,
        **changes,
    }
    return [
        pairwise_mask(name, POOL[name], {peer: POOL[peer].public for peer in names if peer != name}, **arguments)
        for name in names
    ]


# --- generator --------------------------------------------------------------------------------------------------------


def test_stream_is_chacha20() -> None:
    # RFC 8439, appendix A.1, test vectors 1 and 2: key, nonce zero; blocks 0 and 1
    expected = bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    assert stream(bytes(32), 16).astype("<u8").tobytes() == expected
    assert stream(bytes(32), 0).shape == (0,)


@pytest.mark.parametrize("bits", [1, 20, 32, 50, 64])
def test_uniform_fills_its_range_evenly(bits: int) -> None:
    values = uniform(bytes(31) + b"\1", 4000, bits)
    assert int(values.max()) < 1 << bits
    if bits == 1:
        assert abs(int(values.sum()) - 2000) < 200  # 6 standard deviations
        return
    shares = values.astype(np.float64) / 2.0**bits
    assert kstest(shares, "uniform").pvalue > 1e-6
    assert kstest(shares**1.2, "uniform").pvalue < 1e-6  # the test would notice


@pytest.mark.parametrize(
    ("key", "length", "bits"), [(b"short", 4, 8), (bytes(32), -1, 8), (bytes(32), 4, 0), (bytes(32), 4, 65)]
)
def test_generator_refuses_nonsense(key: bytes, length: int, bits: int) -> None:
    with pytest.raises(Refused):
        uniform(key, length, bits)


# --- pair keys --------------------------------------------------------------------------------------------------------


def test_pair_keys_agree_and_bind_every_field() -> None:
    a, b = JobKeys.generate(), JobKeys.generate()
    reference = pair_key(a, b.public, CONTEXT, ("a", "b"))
    assert reference == pair_key(b, a.public, CONTEXT, ("b", "a"))
    reordered = replace(CONTEXT, participants=("c", "a", "b"))
    assert reference == pair_key(a, b.public, reordered, ("a", "b"))
    contexts = [
        replace(CONTEXT, job=bytes(32)),
        replace(CONTEXT, step="r2.open"),
        replace(CONTEXT, attempt=1),
        replace(CONTEXT, participants=("a", "b")),
        replace(CONTEXT, participants=("ab", "c")),
        replace(CONTEXT, step="r1.openp", receiver="boc"),
        replace(CONTEXT, receiver="tax"),
    ]
    keys = [pair_key(a, b.public, context, ("a", "b")) for context in contexts]
    keys.append(pair_key(a, b.public, CONTEXT, ("a", "c")))
    keys.append(pair_key(a, JobKeys.generate().public, CONTEXT, ("a", "b")))
    assert len({reference, *keys}) == 1 + len(keys)


# --- masks ------------------------------------------------------------------------------------------------------------


@given(data=st.data(), length=st.integers(0, 40), bits=st.sampled_from([1, 17, 32, 38, 50, 64]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_masks_cancel_and_hide(data: st.DataObject, length: int, bits: int) -> None:
    names = tuple(data.draw(st.lists(st.sampled_from(sorted(POOL)), min_size=2, max_size=6, unique=True)))
    modulus = (1 << bits) - 1
    masks = masks_of(names, length=length, modulus_bits=bits)
    assert all(mask.shape == (length,) and mask.dtype == np.uint64 for mask in masks)
    assert all(int(mask.max(initial=0)) <= modulus for mask in masks)
    total = np.sum(np.stack(masks), axis=0, dtype=np.uint64) & np.uint64(modulus)
    assert not total.any()
    if length * bits >= 128:  # else zeros may happen by chance
        partial = np.sum(np.stack(masks[:-1]), axis=0, dtype=np.uint64) & np.uint64(modulus)
        assert partial.any()


def test_masks_cancel_whatever_order_each_party_lists() -> None:
    names = ("party-03", "party-01", "party-02")
    orders = [names, names[::-1], tuple(sorted(names))]
    masks = [masks_of(order)[order.index(name)] for name, order in zip(names, orders, strict=True)]
    assert not (np.sum(np.stack(masks), axis=0, dtype=np.uint64) & np.uint64((1 << 38) - 1)).any()


@pytest.mark.parametrize(
    "change",
    [{"job": bytes(32)}, {"step": "r2.open"}, {"attempt": 1}, {"receiver": "tax"}],
    ids=lambda c: next(iter(c)),
)
def test_masks_of_different_sums_have_nothing_in_common(change: dict[str, object]) -> None:
    names = ("party-00", "party-01", "party-02")
    first, second = masks_of(names, length=64), masks_of(names, length=64, **change)
    for mine, other in zip(first, second, strict=True):
        assert not np.isin(mine, other).any()
    assert np.array_equal(first[0], masks_of(names, length=64)[0])  # a repeated step gets the same mask


def test_masks_of_a_smaller_circle_are_new() -> None:
    full = masks_of(("party-00", "party-01", "party-02"), length=64)[0]
    survivors = masks_of(("party-00", "party-01"), length=64)[0]
    assert not np.isin(full, survivors).any()


def test_a_single_mask_is_uniform() -> None:
    mask = masks_of(("party-00", "party-01"), length=4000, modulus_bits=50)[0]
    assert kstest(mask.astype(np.float64) / 2.0**50, "uniform").pvalue > 1e-6


def test_nobody_stays_alone_unknowingly() -> None:
    with pytest.raises(Refused, match="only participant"):
        masks_of(("party-00",))
    visible = masks_of(("party-00",), alone_is_visible=True)[0]
    assert visible.shape == (5,)
    assert not visible.any()
    assert masks_of(("party-00", "party-01"), alone_is_visible=True)[0].any()


def test_masks_refuse_other_peers_than_the_participants() -> None:
    names = ("party-00", "party-01", "party-02")
    publics = {name: POOL[name].public for name in names}
    arguments: dict[str, Any] = {
        "job": JOB,
        "step": "s",
        "attempt": 0,
        "participants": names,
        "receiver": "r",
        "length": 1,
        "modulus_bits": 8,
    }
    mine = POOL["party-00"]
    missing = {"party-01": publics["party-01"]}
    stranger = {"party-01": publics["party-01"], "party-09": POOL["party-09"].public}
    extra = {name: POOL[name].public for name in ("party-01", "party-02", "party-09")}
    for peers in (missing, stranger, extra, publics):
        with pytest.raises(Refused, match="job keys"):
            pairwise_mask("party-00", mine, peers, **arguments)
    outsider = {name: publics[name] for name in names}
    with pytest.raises(Refused, match="job keys"):
        pairwise_mask("party-09", POOL["party-09"], outsider, **arguments)
    peers = {name: publics[name] for name in names[1:]}
    for change in (
        {"length": -1},
        {"modulus_bits": 0},
        {"modulus_bits": 65},
        {"receiver": ""},
        {"participants": (*names, "party-01")},
    ):
        with pytest.raises(Refused):
            pairwise_mask("party-00", mine, peers, **{**arguments, **change})
    with pytest.raises(Refused, match="job key"):
        pairwise_mask("party-00", mine, {**peers, "party-01": bytes(32)}, **arguments)


# --- the graph above 32 participants ----------------------------------------------------------------------------------


def test_degree_follows_its_formula() -> None:
    assert [graph_degree(n) for n in (1, 2, 20, COMPLETE_UP_TO)] == [0, 1, 19, 31]
    assert graph_degree(33) == 32  # k = 50 would be more than there are
    assert graph_degree(60) == 52
    assert graph_degree(1000) == 60
    for n in (60, 100, 1000, 10**6):
        k = graph_degree(n)
        assert k % 2 == 0
        assert n**2 / 2 * 2.0**-k <= 2.0**-40 < n**2 / 2 * 2.0 ** -(k - 2)


@pytest.mark.parametrize("n", [33, 60, 150])
def test_graph_is_regular_symmetric_and_moves_with_the_keys(n: int) -> None:
    publics = {f"p{number}": number.to_bytes(32, "big") for number in range(n)}
    graph = {name: neighbours(name, publics, JOB) for name in publics}
    for name, others in graph.items():
        assert len(set(others)) == len(others) == graph_degree(n)
        assert name not in others
        assert all(name in graph[other] for other in others)
    if graph_degree(n) < n - 1:
        rekeyed = {**publics, "p0": bytes(32)[:31] + b"\xff"}
        assert {name: neighbours(name, rekeyed, JOB) for name in publics} != graph
        assert {name: neighbours(name, publics, bytes(32)) for name in publics} != graph


def test_honest_half_stays_connected() -> None:
    publics = {f"p{number}": number.to_bytes(32, "big") for number in range(150)}
    graph = {name: neighbours(name, publics, JOB) for name in publics}
    honest = {f"p{number}" for number in range(0, 150, 2)}
    reached, frontier = {"p0"}, ["p0"]
    while frontier:
        new = (set(graph[frontier.pop()]) & honest) - reached
        reached |= new
        frontier += new
    assert reached == honest


def test_masks_cancel_on_the_graph() -> None:
    names = tuple(POOL)
    assert graph_degree(len(names)) < len(names) - 1
    masks = masks_of(names, length=3)
    assert not (np.sum(np.stack(masks), axis=0, dtype=np.uint64) & np.uint64((1 << 38) - 1)).any()
    assert all(mask.any() for mask in masks)


# --- pads -------------------------------------------------------------------------------------------------------------


def test_pads_are_random_held_and_erased() -> None:
    pads = OneTimePad()
    first = pads.take("r1.aggregate", 0, "bank-a", 4000, 38)
    assert int(first.max()) < 1 << 38
    assert kstest(first.astype(np.float64) / 2.0**38, "uniform").pvalue > 1e-6
    assert np.array_equal(pads.recall("r1.aggregate", "bank-a"), first)
    other_bank = pads.take("r1.aggregate", 0, "bank-b", 4000, 38)
    other_step = pads.take("r2.aggregate", 0, "bank-a", 4000, 38)
    pads.erase("r1.aggregate")
    for bank in ("bank-a", "bank-b"):
        with pytest.raises(Refused, match="no pad"):
            pads.recall("r1.aggregate", bank)
    assert np.array_equal(pads.recall("r2.aggregate", "bank-a"), other_step)
    again = pads.take("r1.aggregate", 1, "bank-a", 4000, 38)
    for one, two in ((first, other_bank), (first, other_step), (first, again)):
        assert np.mean(one == two) < 0.01


def test_a_pad_is_drawn_once() -> None:
    pads = OneTimePad()
    pads.take("s", 0, "bank-a", 4, 38)
    for attempt in (0, 1):  # again, and without erasing the attempt before
        with pytest.raises(Refused, match="drawn in attempt 0"):
            pads.take("s", attempt, "bank-a", 4, 38)
    pads.erase("s")
    with pytest.raises(Refused, match="erased"):
        pads.take("s", 0, "bank-a", 4, 38)
    with pytest.raises(Refused, match="erased"):
        pads.take("s", 0, "bank-b", 4, 38)
    pads.take("s", 2, "bank-a", 4, 38)
    pads.erase("s")
    pads.erase("s")
    with pytest.raises(Refused, match="erased"):
        pads.take("s", 1, "bank-a", 4, 38)


def test_pads_cannot_be_changed_and_show_nothing() -> None:
    pads = OneTimePad()
    pad = pads.take("s", 0, "bank-a", 2, 64)
    with pytest.raises(ValueError, match="read-only"):
        pad[0] = 0
    assert repr(pads) == "OneTimePad(secret)"
    assert str(int(pad[0])) not in f"{pads!r}{pads}"


@pytest.mark.parametrize(
    ("step", "attempt", "length", "bits"),
    [("", 0, 1, 8), ("s", -1, 1, 8), ("s", 0, 0, 8), ("s", 0, 1, 0), ("s", 0, 1, 65)],
)
def test_pads_refuse_nonsense(step: str, attempt: int, length: int, bits: int) -> None:
    pads = OneTimePad()
    with pytest.raises(Refused):
        pads.take(step, attempt, "bank-a", length, bits)
