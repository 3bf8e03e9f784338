"""The form of messages and the schedule: what is signed is what is read, and a step has one place."""

from dataclasses import replace
from typing import Any

import msgpack
import pytest

from fl_clients.contract import Contract
from fl_clients.protocol import (
    Letter,
    Post,
    Reply,
    Request,
    StepKind,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    reply_body,
    schedule,
    sign_post,
    verify_post,
)
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from simulations.job import Parties
from tests.small_federation import small_federation, small_parties


@pytest.fixture(scope="module")
def parties() -> Parties:
    return small_parties(small_federation(enterprises=200), rounds=2)


LETTER = Letter(
    sender="bank1", receiver="tax", step="r1.open", attempt=1, participants=("bank1", "bank2"), sealed=b"\x00sealed\xff"
)


def request_of(contract: Contract) -> Request:
    return Request(
        job=contract.hash,
        step="r1.direction",
        attempt=0,
        participants=("bank1", "bank2"),
        letters=(LETTER,),
        summed=b"s",
    )


def identity_of(parties: Parties, name: str) -> SigningIdentity:
    return parties.vaults[name]._identity


def test_requests_and_replies_survive_the_wire_as_they_were(parties: Parties) -> None:
    contract = parties.contract
    post = sign_post(
        Post(sender="bank1", audience="owners", step="x", attempt=2, content=b"c", signature=b""),
        contract,
        identity_of(parties, "bank1"),
    )
    request = replace(request_of(contract), posts=(post,))
    assert decode_request(encode_request(request, parties.coordinator), contract) == request
    reply = Reply(
        job=contract.hash,
        step=request.step,
        attempt=0,
        party="tax",
        letters=(LETTER,),
        posts=(post,),
        summand=b"\x01",
        released={"rows": 3, "histogram": [1, 2]},
    )
    read = decode_reply(encode_reply(reply_body(reply), identity_of(parties, "tax")), contract, "tax", request)
    assert replace(read, released={}) == replace(reply, released={})
    assert read.released["rows"] == 3


@pytest.mark.parametrize("changes", [{"job": bytes(32)}, {"step": "r2.direction"}, {"attempt": 1}, {"party": "pboc"}])
def test_a_reply_to_something_else_is_refused(parties: Parties, changes: dict[str, Any]) -> None:
    request = request_of(parties.contract)
    reply = Reply(job=parties.contract.hash, step=request.step, attempt=0, party="tax")
    own = identity_of(parties, "tax")
    assert decode_reply(encode_reply(reply_body(reply), own), parties.contract, "tax", request) == reply
    with pytest.raises(Refused):
        decode_reply(encode_reply(reply_body(replace(reply, **changes)), own), parties.contract, "tax", request)
    with pytest.raises(Refused, match="signature"):
        decode_reply(encode_reply(reply_body(reply), identity_of(parties, "pboc")), parties.contract, "tax", request)


def test_a_vault_that_could_not_read_a_request_is_heard_and_still_must_sign(parties: Parties) -> None:
    request = request_of(parties.contract)
    refusal = Reply(job=parties.contract.hash, step="", attempt=0, party="tax", refused="not readable")
    read = decode_reply(
        encode_reply(reply_body(refusal), identity_of(parties, "tax")), parties.contract, "tax", request
    )
    assert read.refused == "not readable"
    for wrong in (replace(refusal, refused=None), replace(refusal, party="pboc"), replace(refusal, step="r1.open")):
        with pytest.raises(Refused):
            decode_reply(encode_reply(reply_body(wrong), identity_of(parties, "tax")), parties.contract, "tax", request)


def test_a_request_is_no_reply_and_a_reply_no_request(parties: Parties) -> None:
    """The same key, another kind of message: the context is signed."""
    request = request_of(parties.contract)
    _, body, signature, head = msgpack.unpackb(encode_request(request, identity_of(parties, "tax")))
    with pytest.raises(Refused, match="signature"):
        decode_reply(msgpack.packb([2, body, signature, head]), parties.contract, "tax", request)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\x93\x01\x02\x03",
        msgpack.packb([2, b"body"]),
        msgpack.packb([2, b"body", b"x" * 64]),
        msgpack.packb([2, "body", b"x" * 64, None]),
        msgpack.packb([2, b"body", None, None]),
        msgpack.packb({"a": 1}),
        b"\xdf\xff\xff\xff\xff",
    ],
)
def test_what_is_no_message_is_refused(parties: Parties, data: bytes) -> None:
    with pytest.raises(Refused, match="no protocol message"):
        decode_request(data, parties.contract)


def test_another_protocol_version_is_named(parties: Parties) -> None:
    _, body, signature, head = msgpack.unpackb(encode_request(request_of(parties.contract), parties.coordinator))
    with pytest.raises(Refused, match="version 3, we speak 2"):
        decode_request(msgpack.packb([3, body, signature, head]), parties.contract)


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"letters": [], "posts": []},
        {"letters": [1], "posts": []},
        {"letters": None, "posts": []},
        {"job": b"", "step": "s", "attempt": 0, "participants": [], "letters": [], "posts": [], "extra": 1},
        {"job": b"", "step": "s", "attempt": 0, "participants": [None], "letters": [], "posts": []},
    ],
)
def test_a_signed_body_of_another_form_is_refused(parties: Parties, body: object) -> None:
    import hashlib

    packed = msgpack.packb(body)
    digests = hashlib.sha256(packed).digest() + hashlib.sha256(msgpack.packb(None)).digest()
    signature = parties.coordinator.sign(b"xinyi request", digests)
    with pytest.raises(Refused, match="lacks fields"):
        decode_request(msgpack.packb([2, packed, signature, None]), parties.contract)


@pytest.mark.parametrize(
    "changes",
    [
        {"sender": "bank2"},
        {"audience": "banks"},
        {"step": "r2.residual"},
        {"attempt": 1},
        {"content": b"other"},
        {"signature": bytes(64)},
        {"signature": b""},
    ],
)
def test_a_post_is_bound_to_every_field(parties: Parties, changes: dict[str, Any]) -> None:
    post = sign_post(
        Post(sender="bank1", audience="owners", step="r1.residual", attempt=0, content=b"c", signature=b""),
        parties.contract,
        identity_of(parties, "bank1"),
    )
    assert verify_post(post, parties.contract) == b"c"
    with pytest.raises(Refused):
        verify_post(replace(post, **changes), parties.contract)
    other = parties.contract.model_copy(update={"purpose": "another job"})
    with pytest.raises(Refused):
        verify_post(post, other)


def test_the_schedule_names_every_step_once_and_grows_with_the_rounds(parties: Parties) -> None:
    steps = [item.step for exchange in schedule(parties.contract) for item in exchange]
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert (names[0], names[-1]) == ("join", "certify")
    assert {step.kind for step in steps} == set(StepKind)
    longer = parties.contract.model_copy(update={"model": parties.contract.model.model_copy(update={"rounds": 3})})
    added = [i.step.name for e in schedule(longer) for i in e if i.step.name not in names]
    assert added
    assert all(name.startswith("r3.") for name in added)


def test_with_epsilon_cross_tabs_are_left_out_for_they_would_be_one_more_release() -> None:
    private = small_parties(small_federation(enterprises=200), rounds=1, epsilon=1.0).contract
    kinds = {item.step.kind for exchange in schedule(private) for item in exchange}
    assert set(StepKind) - kinds == {StepKind.CROSS_TAB}


def test_the_masked_results_of_a_round_are_one_exchange(parties: Parties) -> None:
    """Residuals, products and answers are voided together: a rerun begins with fresh residual ciphertexts."""
    exchanges = {
        exchange[0].step.name: [item.step.name for item in exchange] for exchange in schedule(parties.contract)
    }
    assert exchanges["r1.residual"] == ["r1.residual", "r1.aggregate", "r1.open"]
    assert exchanges["r1.direction"] == ["r1.direction"]
