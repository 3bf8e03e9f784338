"""Tampering, replay, deaths and timeouts in whole runs: the run stops with one line that names a party, or it goes on
without the dead bank and stays exact; nothing is opened twice."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as sealapi

from fl_clients.protocol import (
    Letter,
    Post,
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    reply_body,
)
from fl_server.coordinator import JobStoppedError, Outcome
from models.scorecard import gather
from privacy import seal_bytes
from privacy.parameters import choose_sum
from simulations.job import Parties
from tests.small_federation import (
    SILENT,
    Call,
    RecordedRun,
    Tap,
    assert_equals_twin,
    record,
    run_tapped,
    run_until,
    small_federation,
    small_parties,
    weights_of,
)
from tests.test_transcript import bodies_of, replies_of, windows_of

FEDERATION = small_federation(banks=3, owners=2, enterprises=500)
ROUND_ONE = ("r1.residual", "r1.open", "r1.search.1", "r1.search.4")
BANK_STEPS = ("bins.1", "bins.3", "cross_tab", *ROUND_ONE, "finish", "evaluate", "release", "close")
AFTER_TRAINING = ("finish", "evaluate", "release", "close")


def parties_of(**options: Any) -> Parties:
    options.setdefault("rounds", 1)
    return small_parties(FEDERATION, **options)


def stopped(parties: Parties, tap: Tap) -> str:
    """The one line with which a run stops."""
    with pytest.raises(JobStoppedError) as caught:
        run_tapped(parties, tap)
    line = str(caught.value)
    assert "\n" not in line
    return line


def on_request(parties: Parties, party: str, step: str, change: Callable[[Request], Request]) -> Tap:
    """A malicious coordinator: what `party` gets in `step` is changed and signed anew."""
    changed = []

    def tap(name: str, data: bytes, call: Call) -> bytes:
        request = decode_request(data, parties.contract)
        if name != party or request.step != step:
            return call(data)
        altered = change(request)
        assert altered != request, "the test changed nothing"
        changed.append(step)
        return call(encode_request(altered, parties.coordinator))

    return tap


def on_reply(parties: Parties, party: str, step: str, change: Callable[[Reply], Reply]) -> Tap:
    """A malicious party: what it answers in `step` is changed and signed with its own identity."""

    def tap(name: str, data: bytes, call: Call) -> bytes:
        reply = call(data)
        request = decode_request(data, parties.contract)
        if name != party or request.step != step:
            return reply
        altered = change(decode_reply(reply, parties.contract, party, request))
        return encode_reply(reply_body(altered), parties.vaults[party]._identity)

    return tap


def flipped(data: bytes, position: int) -> bytes:
    damaged = bytearray(data)
    damaged[position] ^= 0x80
    return bytes(damaged)


def flip_letter(request: Request, sender: str) -> Request:
    def flip(letter: Letter) -> Letter:
        return replace(letter, sealed=flipped(letter.sealed, len(letter.sealed) // 2))

    return replace(request, letters=tuple(flip(x) if x.sender == sender else x for x in request.letters))


def flip_post(request: Request, sender: str) -> Request:
    def flip(post: Post) -> Post:
        return replace(post, content=flipped(post.content, len(post.content) // 2))

    return replace(request, posts=tuple(flip(x) if x.sender == sender else x for x in request.posts))


def shifted(summed: bytes, banks: int = 3) -> bytes:
    """A sum with 1 added to its first number: everybody who relays a BFV ciphertext can do that, without a key."""
    import msgpack

    parameters = choose_sum(parties=banks)
    context = seal_bytes.make_context(parameters.degree, parameters.prime_bits, parameters.log_t)
    first, *rest = msgpack.unpackb(summed)
    ciphertext = seal_bytes.load(sealapi.Ciphertext(context), context, first, "sum")
    sealapi.Evaluator(context).add_plain_inplace(ciphertext, seal_bytes.plaintext(context, np.array([1], np.uint64)))
    return bytes(msgpack.packb([seal_bytes.dump(ciphertext), *rest]))


# --- tampering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("party", "step", "change", "words"),
    [
        ("bank2", "r1.open", lambda r: flip_letter(r, "tax"), ("bank2 refused step r1.open", "'tax'")),
        ("bank2", "match.1", lambda r: flip_letter(r, "bank1"), ("bank2 refused step match.1", "'bank1'")),
        ("tax", "r1.direction", lambda r: flip_letter(r, "bank3"), ("tax refused step r1.direction", "'bank3'")),
        ("pboc", "r1.aggregate", lambda r: flip_post(r, "bank3"), ("pboc refused step r1.aggregate", "signature")),
        ("bank1", "roster", lambda r: flip_post(r, "bank2"), ("bank1 refused step roster", "signature")),
        ("bank3", "bins.2", lambda r: replace(r, summed=shifted(r.summed or b"")), ("opened another sum of bins.1",)),
        ("bank3", "bins.2", lambda r: replace(r, summed=b"\x90"), ("bank3 refused step bins.2", "0 ciphertexts")),
        ("bank1", "r1.search.2", lambda r: replace(r, summed=None), ("bank1 refused step r1.search.2", "missing")),
        ("bank1", "bins.3", lambda r: replace(r, posts=()), ("bank1 refused step bins.3", "did not confirm")),
        ("tax", "r1.direction", lambda r: replace(r, letters=r.letters[1:]), ("tax refused", "bank1")),
        ("bank1", "r1.open", lambda r: replace(r, letters=(*r.letters, r.letters[0])), ("bank1 refused", "unexpected")),
    ],
)
def test_a_coordinator_that_alters_mail_stops_the_run(
    party: str, step: str, change: Callable[[Request], Request], words: tuple[str, ...]
) -> None:
    parties = parties_of()
    line = stopped(parties, on_request(parties, party, step, change))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("party", "step", "change", "words"),
    [
        ("bank2", "bins.1", lambda r: replace(r, summand=b"\x91\xc4\x02no"), ("bank2",)),
        ("bank2", "bins.1", lambda r: replace(r, summand=b"\x90"), ("bank2", "ciphertexts")),
        ("bank2", "release", lambda r: replace(r, released={}), ("bank2", "release")),
        ("bank2", "close", lambda r: replace(r, released={}), ("bank2", "close")),
        ("bank2", "release", lambda r: replace(r, released={"histogram": [1, 2]}), ("different pooled histograms",)),
        ("tax", "r1.aggregate", lambda r: replace(r, attempt=5), ("tax", "attempt 5")),
        ("tax", "r1.aggregate", lambda r: replace(r, party="pboc"), ("tax",)),
        (
            "bank2",
            "r1.open",
            lambda r: replace(r, letters=tuple(replace(x, sender="bank1") for x in r.letters)),
            ("bank2", "mail of bank1"),
        ),
    ],
)
def test_a_party_that_answers_nonsense_stops_the_run_under_its_name(
    party: str, step: str, change: Callable[[Reply], Reply], words: tuple[str, ...]
) -> None:
    parties = parties_of()
    line = stopped(parties, on_reply(parties, party, step, change))
    assert all(word in line for word in words), line


@pytest.mark.parametrize("where", ["request", "reply"])
def test_a_byte_altered_on_the_wire_stops_the_run(where: str) -> None:
    """Somebody between coordinator and vault, without any key."""
    parties = parties_of()

    def tap(name: str, data: bytes, call: Call) -> bytes:
        if name != "bank2" or decode_request(data, parties.contract).step != "r1.search.1":
            return call(data)
        if where == "request":
            return call(flipped(data, len(data) // 2))
        reply = call(data)
        return flipped(reply, len(reply) // 2)

    line = stopped(parties, tap)
    assert "bank2" in line
    assert "signature" in line


def test_a_bank_that_lies_in_its_confirmation_is_found() -> None:
    """bank2 confirms another sum than it opened; the others stop, before anything more leaves them."""
    parties = parties_of()
    last = []

    def tap(name: str, data: bytes, call: Call) -> bytes:
        last.append((name, decode_request(data, parties.contract).step))
        return call(data)

    parties.banks["bank2"]._remember = (  # type: ignore[method-assign]
        lambda step, opened: type(parties.banks["bank2"])._remember(parties.banks["bank2"], step, b"other" + opened)
    )
    assert "opened another sum of roster" in stopped(parties, tap)
    assert last[-1][1] in ("match.2", "match.3"), "the key is confirmed before anything is encrypted under it"


def test_a_sum_shifted_for_all_banks_alike_is_not_found() -> None:
    """The limit that PROTOCOL rule 9 states. If this test fails, the protocol became stronger: change its text."""
    parties = parties_of(forward_noise=0.0)

    def tap(name: str, data: bytes, call: Call) -> bytes:
        request = decode_request(data, parties.contract)
        if request.step != "finish":
            return call(data)
        assert request.summed is not None
        return call(encode_request(replace(request, summed=sums.setdefault("x", shifted(request.summed))), coordinator))

    sums: dict[str, bytes] = {}
    coordinator = parties.coordinator
    run_tapped(parties, tap)
    weights = weights_of(parties)
    assert weights["bank1"] == weights["bank2"] == weights["bank3"]


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("renamed", [False, True])
def test_a_letter_of_an_earlier_round_is_refused(renamed: bool) -> None:
    parties = parties_of(rounds=2)
    old: list[Letter] = []

    def tap(name: str, data: bytes, call: Call) -> bytes:
        request = decode_request(data, parties.contract)
        if name == "bank2" and request.step == "r1.open":
            old.extend(request.letters)
        if name != "bank2" or request.step != "r2.open":
            return call(data)
        assert old
        replayed = tuple(replace(letter, step="r2.aggregate") if renamed else letter for letter in old)
        return call(encode_request(replace(request, letters=replayed), parties.coordinator))

    line = stopped(parties, tap)
    assert "bank2 refused step r2.open" in line
    assert ("does not open" if renamed else "missing") in line


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("kind", ["letters", "posts"])
def test_mail_of_a_voided_attempt_is_refused_in_the_next(kind: str, forged: bool) -> None:
    """bank3 dies in r1.open; in attempt 1 the owner gets the residuals or the news of attempt 0."""
    parties = parties_of(least_banks=2)
    old: dict[str, Any] = {}

    def tap(name: str, data: bytes, call: Call) -> bytes:
        request = decode_request(data, parties.contract)
        if name == "bank3" and request.step == "r1.open":
            raise ConnectionError
        if name == "tax" and request.step == "r1.aggregate":
            if request.attempt == 0:
                old.update(vars(request))
            else:
                mail = tuple(item for item in old[kind] if item.sender != "bank3")
                if forged:
                    now = {"attempt": 1, **({"participants": request.participants} if kind == "letters" else {})}
                    mail = tuple(replace(item, **now) if item.step == "r1.residual" else item for item in mail)
                data = encode_request(replace(request, **{kind: mail}), parties.coordinator)
        return call(data)

    line = stopped(parties, tap)
    assert "tax refused step r1.aggregate" in line
    expected = {
        ("letters", False): "belongs to attempt 0",
        ("posts", False): "belongs to attempt 0",
        ("letters", True): "does not open",
        ("posts", True): "signature",
    }
    assert expected[kind, forged] in line


def test_answers_of_two_attempts_are_not_mixed() -> None:
    """In r1.direction the letters need not be of the request's own exchange; but of one attempt they must be."""
    parties = parties_of(least_banks=2)
    first: list[Letter] = []

    def tap(name: str, data: bytes, call: Call) -> bytes:
        request = decode_request(data, parties.contract)
        if name == "bank3" and request.step == "r1.open":
            raise ConnectionError
        if name == "tax" and request.step == "r1.direction":
            mixed = (first[0], *(letter for letter in request.letters if letter.sender != first[0].sender))
            return call(encode_request(replace(request, letters=mixed), parties.coordinator))
        reply = call(data)
        if name == "bank1" and (request.step, request.attempt) == ("r1.open", 0):
            letters = decode_reply(reply, parties.contract, name, request).letters
            first.extend(letter for letter in letters if letter.receiver == "tax")
        return reply

    line = stopped(parties, tap)
    assert "tax refused step r1.direction" in line
    assert "attempts [0, 1]" in line


@pytest.mark.parametrize("relabelled", [False, True])
def test_letters_swapped_between_receivers_are_refused(relabelled: bool) -> None:
    parties = parties_of()
    letters: dict[str, tuple[Letter, ...]] = {}

    def tap(name: str, data: bytes, call: Call) -> bytes:
        request = decode_request(data, parties.contract)
        if request.step == "r1.open" and name == "bank1":
            letters["bank1"] = request.letters
        if request.step == "r1.open" and name == "bank2":
            foreign = letters["bank1"]
            if relabelled:
                foreign = tuple(replace(letter, receiver="bank2") for letter in foreign)
            data = encode_request(replace(request, letters=foreign), parties.coordinator)
        return call(data)

    line = stopped(parties, tap)
    assert "bank2 refused step r1.open" in line
    assert ("does not open" if relabelled else "delivered to bank2") in line


# --- a bank that dies ------------------------------------------------------------------------------------------------


def dying(parties: Parties, victim: str, step: str, how: str = "dead") -> Tap:
    """The victim dies in `step`: at once, after it did the step (its reply is lost), or by silence; and stays dead."""
    dead: list[str] = []

    def tap(name: str, data: bytes, call: Call) -> bytes:
        if name != victim:
            return call(data)
        if not dead and decode_request(data, parties.contract).step == step:
            dead.append(step)
            if how == "reply lost":
                call(data)
        if dead:
            if how == "silent":
                return SILENT
            raise ConnectionError("dead")
        return call(data)

    return tap


def last_participants(outcome: Outcome) -> dict[str, tuple[str, ...]]:
    return {record.step: record.participants for record in outcome.steps}


def assert_sums_are_those_of_the_survivors(run: RecordedRun) -> None:
    """Every opened number is the exact sum over the participants of the attempt that counted, noise included; nobody
    opened a step twice."""
    counted = last_participants(run.outcome)
    attempts = {item.step: item.attempt for item in run.outcome.steps}
    opened = 0
    for bank in run.outcome.participants:
        mine = [seen for seen in run.seen if seen.party == bank and seen.kind in ("summand", "total")]
        sums_opened: list[str] = []
        pending = ""
        for seen in mine:
            if seen.kind == "summand":
                pending = seen.step
                continue
            summands = [run.of("summand", other, pending)[-1].content for other in counted[pending]]
            assert np.array_equal(seen.content, np.sum(summands, axis=0)), (bank, pending)
            sums_opened.append(pending)
            opened += 1
        assert len(set(sums_opened)) == len(sums_opened), "a step was opened twice"
    assert opened >= 9 * len(run.outcome.participants)
    for owner in run.parties.owners:
        for number in range(1, run.parties.contract.model.rounds + 1):
            [seen] = run.of("S", owner, f"r{number}.direction")
            total = np.zeros(len(seen.content), np.int64)
            for bank in counted[f"r{number}.open"]:
                [own] = [s.content for s in run.of("cells", owner, seen.step) if s.sender == bank]
                total += gather(own, run.of("v", bank, f"r{number}.residual")[-1].content, len(total))
                tag = f"sum/r{number}.owner.{owner}/{attempts[f'r{number}.open']}/{bank}"
                total += run.parties.noise.tape.get(tag, np.int64(0))
            assert np.array_equal(seen.content, total), (owner, number)


@pytest.mark.parametrize("step", BANK_STEPS)
def test_the_job_goes_on_exactly_without_a_bank_that_dies(step: str) -> None:
    parties = parties_of(least_banks=2, epsilon=None if step == "cross_tab" or BANK_STEPS.index(step) % 2 else 3.0)
    run = record(FEDERATION, parties, dying(parties, "bank2", step))
    assert run.outcome.participants == ("bank1", "bank3")
    assert_sums_are_those_of_the_survivors(run)
    weights = weights_of(parties) if step in ("release", "close") else None
    assert parties.banks["bank1"].model()["weights"] == parties.banks["bank3"].model()["weights"]
    assert parties.banks["bank1"].model()["intercept"] == parties.banks["bank3"].model()["intercept"]
    assert any(parties.banks["bank1"].model()["weights"])  # type: ignore[call-overload]
    if weights is not None:
        assert weights["bank1"] == weights["bank2"]
    if step in AFTER_TRAINING and step != "finish":
        assert_equals_twin(FEDERATION, parties, run.outcome)


@pytest.mark.parametrize("how", ["reply lost", "silent"])
@pytest.mark.parametrize("step", ["r2.residual", "r2.open", "r2.search.3"])
def test_a_lost_reply_and_a_timeout_count_as_dead(step: str, how: str) -> None:
    parties = parties_of(least_banks=2, rounds=2)
    run = record(FEDERATION, parties, dying(parties, "bank1", step, how))
    assert run.outcome.participants == ("bank2", "bank3")
    assert_sums_are_those_of_the_survivors(run)
    attempts = {(item.step, item.attempt) for item in run.outcome.steps if item.step == step}
    assert attempts == {(step, 0), (step, 1)}


def test_a_vault_that_raises_counts_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    parties = parties_of(least_banks=2)
    monkeypatch.setattr(parties.banks["bank3"], "_search", lambda step, request: 1 // 0)
    assert run_tapped(parties).participants == ("bank1", "bank2")


@pytest.mark.parametrize(
    ("step", "how"),
    [("join", "silent"), ("roster", "dead"), ("match.2", "dead"), ("bins.1", "silent"), ("r1.open", "dead")],
)
def test_the_job_stops_with_the_name_of_a_bank_that_it_cannot_do_without(step: str, how: str) -> None:
    parties = parties_of()
    line = stopped(parties, dying(parties, "bank2", step, how))
    assert line.startswith("bank2 died")
    assert "bank1" not in line
    assert "start again" in line


def test_two_deaths_leave_too_few() -> None:
    parties = parties_of(least_banks=2)
    taps = [dying(parties, "bank1", "bins.2"), dying(parties, "bank3", "r1.search.2")]

    def tap(name: str, data: bytes, call: Call) -> bytes:
        return taps[0](name, data, lambda passed: taps[1](name, passed, call))

    line = stopped(parties, tap)
    assert line.startswith("bank3 died in step r1.search.2")
    assert "1 banks are left" in line


def test_the_last_bank_standing_refuses_to_be_summed_alone() -> None:
    parties = parties_of(least_banks=1)
    taps = [dying(parties, "bank1", "bins.2"), dying(parties, "bank3", "bins.2")]

    def tap(name: str, data: bytes, call: Call) -> bytes:
        return taps[0](name, data, lambda passed: taps[1](name, passed, call))

    assert "bank2 refused step bins.2" in stopped(parties, tap)


@pytest.mark.parametrize("step", ["join", "roster", "r1.aggregate", "r1.direction", "score", "close"])
def test_an_owner_that_dies_stops_the_job_with_its_name(step: str) -> None:
    parties = parties_of(least_banks=1)
    line = stopped(parties, dying(parties, "tax", step))
    assert line.startswith("tax died")


def test_a_refusal_stops_the_job_and_nobody_is_asked_again() -> None:
    parties = parties_of(least_banks=2)
    asked: list[str] = []
    inner = on_request(parties, "bank2", "r1.open", lambda r: flip_letter(r, "tax"))

    def tap(name: str, data: bytes, call: Call) -> bytes:
        asked.append(decode_request(data, parties.contract).step)
        return inner(name, data, call)

    stopped(parties, tap)
    assert asked.count("r1.open") == 3, "no further attempt without the refusing bank"
    assert "r1.direction" not in asked


# --- what a rerun reveals --------------------------------------------------------------------------------------------


def test_a_rerun_has_fresh_ciphertexts_masks_pads_and_noise() -> None:
    parties = parties_of(least_banks=2, epsilon=3.0)
    pads: dict[int, bytes] = {}
    inner = dying(parties, "bank3", "r1.open")

    def tap(name: str, data: bytes, call: Call) -> bytes:
        reply = inner(name, data, call)
        request = decode_request(data, parties.contract)
        if name == "tax" and request.step == "r1.aggregate":
            pads[request.attempt] = parties.owners["tax"]._pads.recall("r1.aggregate", "bank1").tobytes()
        return reply

    run = record(FEDERATION, parties, tap)
    bodies: dict[int, list[bytes]] = {0: [], 1: []}
    for request, reply in replies_of(run):
        if reply.party != "bank3" and request.step in ("r1.residual", "r1.aggregate", "r1.open"):
            bodies[request.attempt] += bodies_of(reply)
    assert all(sum(map(len, found)) > 100_000 for found in bodies.values())
    assert len(np.intersect1d(windows_of(bodies[0]), windows_of(bodies[1]))) == 0
    assert pads[0] != pads[1]
    tape = parties.noise.tape
    for bank in ("bank1", "bank2"):
        for release in ("r1.owner.tax", "r1.owner.pboc", "r1.residual.0"):
            assert f"sum/{release}/1/{bank}" in tape
            if f"sum/{release}/0/{bank}" in tape:
                assert not np.array_equal(tape[f"sum/{release}/0/{bank}"], tape[f"sum/{release}/1/{bank}"])
    assert "sum/r1.residual.0/0/bank1" in tape, "attempt 0 had drawn, and its draw was not used again"


def test_forward_noise_is_one_draw_per_job_round_and_enterprise() -> None:
    """Asking again, for other banks or after a death, gives the same noise; another round or job another."""
    parties = parties_of()
    run_tapped(parties)
    drawn = parties.forward_noise.tape["forward/r1/tax"]
    rows = len(FEDERATION.owners[1].ids)
    assert len(drawn) == rows
    # the scale is that of the direction; the shape is a function of (job, round, row)
    noise = {
        name: parties.forward_noise.draw(name, rows, 1000)
        for name in ("forward/r1/tax", "forward/r2/tax", "forward/r1/pboc")
    }
    assert np.corrcoef(drawn, noise["forward/r1/tax"])[0, 1] > 0.999
    assert np.array_equal(noise["forward/r1/tax"], parties.forward_noise.draw("forward/r1/tax", rows, 1000))
    assert abs(np.corrcoef(drawn, noise["forward/r2/tax"])[0, 1]) < 0.35
    assert abs(np.corrcoef(drawn, noise["forward/r1/pboc"])[0, 1]) < 0.35
    other = parties_of().forward_noise.draw("forward/r1/tax", rows, 1000)
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.35


def test_a_stopped_run_leaves_no_open_vault() -> None:
    """After a refusal in the middle, the refusing vault answers nothing but what it answered before."""
    parties = parties_of()
    waiting = run_until(parties, "r1.search.1")
    altered = encode_request(
        replace(decode_request(waiting["bank1"], parties.contract), summed=b"\x90"), parties.coordinator
    )
    parties.vaults["bank1"].handle(altered)
    request = decode_request(waiting["bank1"], parties.contract)
    reply = decode_reply(parties.vaults["bank1"].handle(waiting["bank1"]), parties.contract, "bank1", request)
    assert reply.refused is not None
