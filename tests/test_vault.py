"""The vault as a state machine: order, repetition, attempts, participants, signatures, refusals, destruction."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fl_clients.protocol import Request, Step, StepKind, decode_reply, decode_request, encode_request, schedule
from fl_clients.roster import Roster
from fl_clients.vault import Vault, VaultFailedError
from fl_server.coordinator import JobStoppedError
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from simulations.job import Parties, data_terms
from tests.small_federation import (
    Call,
    RecordedRun,
    assert_equals_twin,
    refusal_of,
    resigned,
    run_tapped,
    run_until,
    small_federation,
    small_parties,
)

BANKS = ("bank1", "bank2", "bank3")


def tiny_parties(**options: Any) -> Parties:
    options.setdefault("rounds", 1)
    return small_parties(small_federation(enterprises=400), **options)


def ask(parties: Parties, party: str, data: bytes) -> str | None:
    """The refusal of `party`, or None if it answered."""
    return refusal_of(parties, party, parties.vaults[party].handle(data))


# --- repetition ------------------------------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_same_bytes_and_another_content_a_refusal_in_every_step() -> None:
    """Each step of a whole run is asked twice, then with other content, then everything before it once more."""
    federation = small_federation(enterprises=600)
    parties = small_parties(federation, rounds=1, epsilon=3.0)
    answered: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in parties.vaults}
    steps = set()

    def tap(party: str, data: bytes, call: Call) -> bytes:
        first = call(data)
        step = decode_request(data, parties.contract).step
        steps.add(step)
        assert call(data) == first, step
        other = call(resigned(parties, data, summed=b"other"))
        assert "other content" in str(refusal_of(parties, party, other)), step
        if step in ("close", "certify"):  # what was stored before is erased
            return first
        answered[party].append((data, first))
        for request, reply in answered[party]:
            assert call(request) == reply, step
        return first

    outcome = run_tapped(parties, tap)
    assert steps == {item.step.name for exchange in schedule(parties.contract) for item in exchange}
    assert_equals_twin(federation, parties, outcome)


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reached", ["join", "bins.2", "r1.residual", "r1.search.2", "evaluate"])
def test_a_bank_refuses_every_step_but_the_next(reached: str) -> None:
    parties = tiny_parties()
    waiting = run_until(parties, reached)["bank1"]
    names = [item.step.name for exchange in schedule(parties.contract) for item in exchange]
    asked = 0
    for name in [*names, "r2.residual", "r1.search.5", "bins.4", "", "Join", "join "]:
        if name == reached:
            continue
        data = resigned(parties, waiting, step=name)
        assert ask(parties, "bank1", data) is not None, name
        asked += 1
    assert asked > 15
    assert ask(parties, "bank1", waiting) is None, "refusals must not have changed anything"


def test_an_owner_refuses_every_step_but_the_next_and_those_of_banks() -> None:
    parties = tiny_parties()
    waiting = run_until(parties, "r1.direction")["tax"]
    for exchange in schedule(parties.contract):
        for item in exchange:
            if item.step.name != "r1.direction":
                assert ask(parties, "tax", resigned(parties, waiting, step=item.step.name)) is not None
    assert ask(parties, "tax", waiting) is None


# --- attempts --------------------------------------------------------------------------------------------------------


def test_an_exchange_is_run_again_only_with_a_later_attempt_from_its_first_step() -> None:
    parties = tiny_parties(least_banks=2)
    opening = run_until(parties, "r1.open")["bank1"]
    # the residual step was answered in attempt 0: the same attempt with other participants is no rerun
    fewer = BANKS[:2]
    residual = resigned(parties, opening, step="r1.residual", letters=(), posts=(), summed=None)
    assert "other content" in str(ask(parties, "bank1", resigned(parties, residual, participants=fewer)))
    # within the exchange the attempt cannot change
    for attempt in (1, 2):
        assert "out of order" in str(ask(parties, "bank1", resigned(parties, opening, attempt=attempt)))
    # again from its first step, with a later attempt
    again = resigned(parties, residual, attempt=2, participants=fewer)
    assert ask(parties, "bank1", again) is None
    # the mail of attempt 0 is void now, and attempt 1 never comes
    assert "out of order" in str(ask(parties, "bank1", opening))
    assert "out of order" in str(ask(parties, "bank1", resigned(parties, residual, attempt=1, participants=fewer)))
    # and who was left out stays out
    assert "no subset" in str(ask(parties, "bank1", resigned(parties, residual, attempt=3)))


def test_an_exchange_whose_sum_was_opened_is_never_run_again() -> None:
    """bank1 opened the sum of r1.search.1 in r1.search.2; a second subset of it would give one bank's part."""
    parties = tiny_parties(least_banks=2)
    waiting = run_until(parties, "r1.search.2")["bank1"]
    first = resigned(parties, waiting, step="r1.search.1", attempt=1, participants=BANKS[:2], summed=None)
    assert ask(parties, "bank1", waiting) is None
    for attempt in (1, 2, 99):
        assert "out of order" in str(ask(parties, "bank1", resigned(parties, first, attempt=attempt)))


def test_an_owner_never_unmasks_a_step_twice() -> None:
    """After r1.direction neither the aggregate nor the direction is run again, whatever the attempt."""
    parties = tiny_parties(least_banks=2)
    waiting = run_until(parties, "r1.direction")["tax"]
    aggregate = resigned(parties, waiting, step="r1.aggregate", attempt=1, participants=BANKS[:2], letters=())
    assert ask(parties, "tax", waiting) is None
    assert "out of order" in str(ask(parties, "tax", aggregate))
    again = resigned(parties, waiting, attempt=1, participants=BANKS[:2])
    assert ask(parties, "tax", again) is not None, "the pads are gone: a second opening has nothing to open"


# --- participants ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("participants", "word"),
    [
        (("bank1", "bank9"), "no subset"),
        (("bank1", "tax"), "no subset"),
        (("bank2", "bank1", "bank3"), "order"),
        (("bank1", "bank1", "bank2"), "no subset"),
        (("bank1",), "needs 2"),
        ((), "needs 2"),
        (("bank2", "bank3"), "left out"),
    ],
)
def test_participants_that_are_not_the_survivors_are_refused(participants: tuple[str, ...], word: str) -> None:
    parties = tiny_parties(least_banks=2)
    waiting = run_until(parties, "bins.1")["bank1"]
    assert word in str(ask(parties, "bank1", resigned(parties, waiting, participants=participants)))
    assert ask(parties, "bank1", waiting) is None


def test_by_default_no_bank_may_be_left_out() -> None:
    parties = tiny_parties()
    waiting = run_until(parties, "bins.1")["bank1"]
    assert "needs 3" in str(ask(parties, "bank1", resigned(parties, waiting, participants=BANKS[:2])))


def test_one_bank_alone_is_never_summed_even_if_the_contract_would_go_on_with_one() -> None:
    """The participants trick: a coordinator that declares all others dead would read one bank's part."""
    parties = tiny_parties(least_banks=1)
    waiting = run_until(parties, "bins.1")["bank1"]
    assert "only participant" in str(ask(parties, "bank1", resigned(parties, waiting, participants=("bank1",))))


# --- whose request ---------------------------------------------------------------------------------------------------


def test_a_request_of_another_contract_or_coordinator_is_refused() -> None:
    parties = tiny_parties()
    waiting = run_until(parties, "roster")["bank1"]
    other = parties.contract.model_copy(update={"purpose": "another purpose"})
    assert other.hash != parties.contract.hash
    assert "contract differs" in str(ask(parties, "bank1", resigned(parties, waiting, job=other.hash)))
    stranger = encode_request(decode_request(waiting, parties.contract), SigningIdentity.generate())
    assert "signature" in str(ask(parties, "bank1", stranger))
    # a reply is signed too, by a party of the contract, and still is no request
    reply = parties.vaults["bank2"].handle(resigned(parties, waiting, step="nothing"))
    assert ask(parties, "bank1", reply) is not None
    assert ask(parties, "bank1", waiting) is None


def test_a_request_with_one_flipped_bit_is_never_accepted() -> None:
    parties = tiny_parties()
    requests = run_until(parties, "join")
    data = requests["bank1"]
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            assert ask(parties, "bank1", bytes(damaged)) is not None, (position, bit)
    for length in range(len(data)):
        assert ask(parties, "bank1", data[:length]) is not None, length
    assert ask(parties, "bank1", data + b"\x00") is not None
    assert ask(parties, "bank1", data) is None


def test_a_long_request_with_one_flipped_byte_is_never_accepted() -> None:
    """One with letters and a sum; every 97th byte and the first and last 300."""
    parties = tiny_parties()
    data = run_until(parties, "r1.search.1")["bank1"]
    request = decode_request(data, parties.contract)
    assert request.letters
    assert request.summed
    for position in {*range(300), *range(0, len(data), 97), *range(len(data) - 300, len(data))}:
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        assert ask(parties, "bank1", bytes(damaged)) is not None, position
    assert ask(parties, "bank1", data) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"attempt": True},
        {"attempt": 0.0},
        {"attempt": "0"},
        {"attempt": -1},
        {"step": b"join"},
        {"participants": (1, 2, 3)},
        {"summed": "text"},
        {"job": "text"},
    ],
)
def test_a_signed_request_with_a_mistyped_field_is_refused_not_crashed_on(changes: dict[str, Any]) -> None:
    """True == 1 == 1.0 in Python: an attempt of another type would find stored replies of the integer."""
    parties = tiny_parties()
    waiting = run_until(parties, "join")["bank1"]
    request = decode_request(waiting, parties.contract)
    mistyped = object.__new__(Request)
    for name, value in {**vars(request), **changes}.items():
        object.__setattr__(mistyped, name, value)
    assert "mistyped" in str(ask(parties, "bank1", encode_request(mistyped, parties.coordinator)))
    assert ask(parties, "bank1", waiting) is None


def test_a_vault_needs_the_identity_that_the_contract_names() -> None:
    parties = tiny_parties()
    terms = data_terms(parties.contract, 100)
    for change, word in (({"identity": SigningIdentity.generate()}, "identity key"), ({"name": "bank9"}, "no party")):
        institution = replace(parties.institutions["bank1"], **change)
        with pytest.raises(Refused, match=word):
            Vault(institution=institution, signed=parties.signed, role=parties.banks["bank1"], data=terms)


# --- a step that fails -----------------------------------------------------------------------------------------------


def test_a_step_that_fails_ends_the_job_at_this_vault() -> None:
    """Otherwise the coordinator could ask with one altered sum after the other and read the key from the refusals."""
    parties = tiny_parties()
    waiting = run_until(parties, "bins.2")["bank1"]
    # one bank's ciphertext in place of the sum: it opens to masked, uniform values
    _, stored = parties.vaults["bank2"]._stored["bins.1", 0]
    summand = decode_reply(
        stored,
        parties.contract,
        "bank2",
        Request(job=parties.contract.hash, step="bins.1", attempt=0, participants=BANKS),
    ).summand
    altered = resigned(parties, waiting, summed=summand)
    reason = ask(parties, "bank1", altered)
    assert "is not that of attempt 0" in str(reason)
    assert ask(parties, "bank1", altered) == reason, "the same question, the same answer"
    assert "other content" in str(ask(parties, "bank1", waiting))
    for changes in ({"attempt": 1}, {"step": "bins.1", "attempt": 1}, {"step": "bins.3"}, {"step": "close"}):
        later = str(ask(parties, "bank1", resigned(parties, waiting, **changes)))
        assert "stopped this job" in later
        assert "is not that" not in later, "not even the kind of failure is told for further mail"


def test_the_sum_of_another_attempt_is_refused_before_anybody_uses_it() -> None:
    """A bank's feigned death must not let the coordinator open two different subsets of one step."""
    parties = tiny_parties(least_banks=2)
    waiting = run_until(parties, "bins.2")["bank1"]
    first = decode_request(waiting, parties.contract)
    again = encode_request(
        replace(first, step="bins.1", attempt=1, participants=("bank1", "bank2"), summed=None), parties.coordinator
    )
    assert ask(parties, "bank1", again) is None
    mixed = resigned(parties, waiting, attempt=1, participants=("bank1", "bank2"))
    assert "is not that of attempt 1 and banks ['bank1', 'bank2']" in str(ask(parties, "bank1", mixed))


def test_banks_that_were_shown_different_rosters_open_nothing() -> None:
    """Row counts set the noise: a bank that tells one of them another number is found at the first sum."""
    parties = tiny_parties()

    def tap(party: str, data: bytes, call: Call) -> bytes:
        if party == "bank1" and decode_request(data, parties.contract).step == "bins.1":
            session = parties.banks["bank1"]._session
            told = dict(session.roster.announcements)
            told["bank2"] = replace(told["bank2"], held_out_rows=told["bank2"].held_out_rows + 1)
            session._roster = Roster(parties.contract, told)
        return call(data)

    with pytest.raises(JobStoppedError, match=r"bank1 refused step bins.2: the sum of bins.1 is not that of"):
        run_tapped(parties, tap)


def test_an_unexpected_exception_ends_the_job_at_this_vault_too(monkeypatch: pytest.MonkeyPatch) -> None:
    parties = tiny_parties()
    waiting = run_until(parties, "bins.2")["bank1"]
    with monkeypatch.context() as patched:
        patched.setattr(parties.banks["bank1"], "_open_sum", lambda request: 1 // 0)
        with pytest.raises(VaultFailedError, match=r"^ZeroDivisionError$"):
            parties.vaults["bank1"].handle(waiting)
    assert "stopped this job" in str(ask(parties, "bank1", waiting))


# --- the end ---------------------------------------------------------------------------------------------------------


def test_after_the_end_only_the_repeated_last_step_is_answered(exact_run: RecordedRun) -> None:
    run, refused = exact_run, 0
    for item in run.exchanged:
        reply = run.parties.vaults[item.party].handle(item.request)
        if item.step == "certify":
            assert reply == item.reply
        else:
            assert refusal_of(run.parties, item.party, reply) is not None, item.step
            refused += 1
    assert refused > 60
    for exchange in schedule(run.parties.contract):
        for party in run.parties.vaults:
            for scheduled in exchange:
                if scheduled.step.name == "certify":
                    continue
                for attempt in (0, 1, 7):
                    request = Request(
                        job=run.parties.contract.hash, step=scheduled.step.name, attempt=attempt, participants=BANKS
                    )
                    data = encode_request(request, run.parties.coordinator)
                    assert ask(run.parties, party, data) is not None


def test_at_the_end_keys_pads_and_rows_are_gone_from_memory() -> None:
    parties = tiny_parties()
    secrets: dict[str, weakref.ref[Any]] = {}

    def watch(name: str, thing: Any) -> None:
        secrets[name] = weakref.ref(thing)

    def tap(party: str, data: bytes, call: Call) -> bytes:
        if decode_request(data, parties.contract).step == "r1.direction":
            role = parties.owners[party]
            for name, thing in {
                "session": role._session,
                "job keys": role._session.keys,
                "pads": role._pads,
                "rows": role._data,
                "column": next(iter(role._data.columns.values())),
                "cells": next(iter(role._cells.values())),
                "design": next(iter(role._designs.values())),
            }.items():
                watch(f"{party} {name}", thing)
        if decode_request(data, parties.contract).step == "evaluate":
            bank = parties.banks[party]
            assert bank._bank_key is not None
            assert bank._consortium is not None
            for name, thing in {
                "session": bank._session,
                "job keys": bank._session.keys,
                "bank key": bank._bank_key,
                "consortium key": bank._consortium,
                "labels": bank._training.label,
                "rows": bank._training,
                "score": bank._score,
                "previous step": bank._row_step,
                "owners' direction": bank._directions[1],
            }.items():
                watch(f"{party} {name}", thing)
        return call(data)

    run_tapped(parties, tap)
    gc.collect()
    assert len(secrets) == 2 * 7 + 3 * 9
    assert [name for name, alive in secrets.items() if alive() is not None] == []
    assert parties.banks["bank1"].model()["weights"], "the model stays"
    assert parties.owners["tax"].model()["weights"]


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_representations_show_no_secret() -> None:
    parties = tiny_parties(epsilon=3.0)
    run_until(parties, "r1.open")
    bank, owner = parties.banks["bank1"], parties.owners["tax"]
    shown = {
        type(thing).__name__: repr(thing)
        for thing in (
            parties.vaults["bank1"],
            bank,
            owner,
            bank._session,
            bank._session.keys,
            bank._bank_key,
            bank._consortium,
            bank._training,
            owner._data,
            owner._pads,
            owner._designs["bank1"],
            owner._noise,
            bank._noise,
            parties.coordinator,
        )
    }
    assert len(shown) == 14
    key = bank._session.keys._key.private_bytes_raw()
    pad = owner._pads.recall("r1.aggregate", "bank1")
    for name, text in shown.items():
        assert len(text) < 200, name
        assert "array" not in text, name
        assert key.hex() not in text, name
        assert repr(key) not in text, name
        assert not any(str(value) in text for value in pad[:20]), name


def test_refusals_quote_no_cell_and_no_id() -> None:
    """Reasons go to the coordinator: none of this run's quotes a cell, a label or an id."""
    parties = tiny_parties()
    waiting = run_until(parties, "r1.search.2")["bank1"]
    ids = {str(value) for bank in small_federation(enterprises=400).banks for value in bank.ids}
    values = {repr(float(v)) for v in parties.banks["bank1"]._training.columns["turnover"] if not np.isnan(v)}
    for changes in ({"summed": b"\x90"}, {"summed": None}, {"letters": ()}, {"posts": ()}, {"participants": ("x",)}):
        reason = str(ask(parties, "bank1", resigned(parties, waiting, **changes)))
        assert not any(text in reason for text in ids | values)


def test_no_release_is_run_again_while_every_bank_is_there_and_none_beyond_what_is_paid_for() -> None:
    """Fresh noise for the asking would let a coordinator and one bank average it away."""
    parties = tiny_parties(epsilon=3.0, least_banks=1)
    waiting = decode_request(run_until(parties, "bins.2")["bank1"], parties.contract)

    def again(attempt: int, participants: tuple[str, ...]) -> str | None:
        request = replace(waiting, step="bins.1", attempt=attempt, participants=participants, summed=None)
        return ask(parties, "bank1", encode_request(request, parties.coordinator))

    assert "no bank dropped" in str(again(1, BANKS))
    assert again(1, BANKS[:2]) is None
    assert "no bank dropped" in str(again(2, BANKS[:2]))
    unpaid = tiny_parties(epsilon=3.0)
    terms = unpaid.contract.privacy
    assert terms.spare_attempts == 0
    bank = unpaid.banks["bank1"]
    run_until(unpaid, "bins.2")
    with pytest.raises(Refused, match="the contract pays for 0"):
        bank._charge_again(Step(kind=StepKind.BINS, index=1))
