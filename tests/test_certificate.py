"""The certificate of a run: signed by all, verified from the file alone; not one value of it can be altered.

A vault refuses to sign whatever does not follow from what it knows, even if the coordinator signs the request.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest

from fl_clients import certificate
from fl_clients.protocol import decode_request
from fl_clients.vault import Vault
from fl_server.coordinator import Outcome
from privacy.audit_format import canonical, parse_canonical
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from simulations.job import Parties
from tests.json_leaves import changed, leaves, maps
from tests.scripted_vault import refused
from tests.small_federation import resigned, run_tapped, run_until, small_federation, small_parties

FEDERATION = small_federation(banks=2, owners=1, enterprises=300)
Run = tuple[Parties, Outcome]


@pytest.fixture(scope="module")
def finished() -> Run:
    parties = small_parties(FEDERATION, rounds=1, epsilon=3.0)
    return parties, run_tapped(parties)


@pytest.fixture(scope="module")
def waiting() -> tuple[Parties, dict[str, bytes]]:
    """Every party waits for the last step; nobody has signed."""
    parties = small_parties(FEDERATION, rounds=1, epsilon=3.0)
    requests = run_until(parties, "certify")
    for party, data in requests.items():  # as the vault does before it looks at the certificate
        parties.vaults[party]._witness.take(decode_request(data, parties.contract).heads)
    return parties, requests


def alterations(value: Any) -> list[Any]:
    """Other values of the same type, and one of another."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, str(value)]
        case float():
            return [value * 1.01, value * (1 - 1e-3)]
        case None:
            return [1]
        case str():
            flipped = ("0" if value[:1] != "0" else "1") + value[1:]
            return [flipped, value + "0", ""] if value else ["x"]
    raise AssertionError(value)


def altered(plain: Any) -> Iterator[tuple[str, Any]]:
    """Each value altered, each key of each map taken away, a key added to each map."""
    for path, value in leaves(plain):
        for other in alterations(value):
            yield f"{path}: {value!r} -> {other!r}", changed(plain, path, other)
    for path in maps(plain):
        yield f"{path}: added", changed(plain, (*path, "zz"), "1")
        inner = plain
        for step in path:
            inner = inner[step]
        for key in inner:
            without = changed(plain, (*path, key), None)
            target = without
            for step in path:
                target = target[step]
            del target[key]
            yield f"{path}: without {key}", without


def test_everybody_signed_and_the_file_alone_is_enough(finished: Run) -> None:
    parties, outcome = finished
    text = json.dumps(outcome.certificate)
    body = certificate.check(json.loads(text))
    names = set(parties.vaults)
    assert set(json.loads(text)["signatures"]) == names | {"coordinator"}
    assert body.signed.contract == parties.contract
    assert body.participants == ("bank1", "bank2")
    assert body.facts["privacy"]["epsilon"] == pytest.approx(3.0, rel=1e-6)
    assert body.facts["privacy"]["epsilon"] <= 3.0
    assert {release["name"] for release in body.facts["privacy"]["releases"]} == {
        "bins", "sums", "search.1.gradient", "search.1.curvature", "histogram",
    }  # fmt: skip
    for name, receipt in body.receipts.items():
        log = parties.institutions[name].log
        head = body.heads[name]
        entry = next(e for e in log.entries(kind="destruction"))
        assert entry.body["receipt"] == dict(receipt), "the receipt that was logged is the one in the certificate"
        assert entry.index < head.size, "and under the head in the certificate"
        assert [e.body["hash"] for e in log.entries(kind="certificate")] == [
            sha256(canonical(json.loads(text)["body"])).hexdigest()
        ]
        model = parties.banks[name].model_digest() if name in parties.banks else parties.owners[name].model_digest()
        assert receipt["model"] == model
    assert all(parties.vaults[name].is_certified for name in names)


def test_not_one_value_of_the_file_can_be_altered(finished: Run) -> None:
    _, outcome = finished
    plain = json.loads(json.dumps(outcome.certificate))
    certificate.check(plain)
    tried = 0
    for what, other in altered(plain):
        try:
            certificate.check(other)
        except Refused:
            tried += 1
            continue
        raise AssertionError(f"accepted: {what}")
    assert tried > 500


def test_signing_again_with_other_keys_does_not_help(finished: Run) -> None:
    """An outsider puts own identities into the contract: then every signature is missing under those."""
    parties, outcome = finished
    plain = json.loads(json.dumps(outcome.certificate))
    stranger = SigningIdentity.generate()
    data = canonical(plain["body"])
    for signer in plain["signatures"]:
        with pytest.raises(Refused, match=f"signature of {signer}"):
            certificate.check(changed(plain, ("signatures", signer), certificate.sign_body(data, stranger)))
    other = parties.institutions["bank1"].identity
    with pytest.raises(Refused, match="signature of bank2"):
        certificate.check(changed(plain, ("signatures", "bank2"), certificate.sign_body(data, other)))


@pytest.mark.parametrize("party", ["bank1", "bank2", "pboc"])
def test_no_vault_signs_an_altered_certificate(waiting: tuple[Parties, dict[str, bytes]], party: str) -> None:
    """Epsilon, noise, receipts, heads, participants, announcements, keys: the coordinator alters, every vault sees it.

    `finished` is the coordinator's own word on the time, which no party knows better.
    """
    parties, requests = waiting
    asked = decode_request(requests[party], parties.contract)
    assert asked.certificate is not None
    plain = parse_canonical(asked.certificate)
    vault, tried = parties.vaults[party], 0
    for what, other in altered(plain):
        if what.startswith("('finished',)"):
            continue
        try:
            vault._certify(replace(asked, certificate=canonical(other)))
        except Refused:
            tried += 1
            continue
        raise AssertionError(f"{party} signed: {what}")
    assert tried > 500
    vault._entries.clear()
    assert vault._certify(asked).released


def test_each_altered_part_is_refused_with_its_name() -> None:
    """Through the vault's one call; afterwards it does not sign the true one either."""
    cases: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
        "bank1": (("facts", "privacy", "epsilon"), 1.0, "facts.privacy.epsilon"),
        "bank2": (("receipts", "bank2", "bytes_out"), 7, "receipt of bank2"),
        "pboc": (("announcements", "bank1", "training_rows"), 10**6, "announcements|facts"),
    }
    parties = small_parties(FEDERATION, rounds=1, epsilon=3.0)
    for party, data in run_until(parties, "certify").items():
        path, value, words = cases[party]
        true = decode_request(data, parties.contract)
        assert true.certificate is not None
        forged = canonical(changed(parse_canonical(true.certificate), path, value))
        vault: Vault = parties.vaults[party]
        reason = str(refused(vault.handle(resigned(parties, data, certificate=forged))))
        assert any(word in reason for word in words.split("|")), reason
        assert "other content" in str(refused(vault.handle(data)))
        assert not parties.institutions[party].log.entries(kind="certificate"), "nothing was signed"


def test_an_older_head_of_ones_own_is_refused_by_those_who_saw_the_newer(
    waiting: tuple[Parties, dict[str, bytes]],
) -> None:
    """A true head, truly signed, but not the last: a certificate over it would leave out the destruction."""
    parties, requests = waiting
    older = parties.vaults["pboc"]._witness._shown[0]
    for party in ("bank1", "bank2"):
        asked = decode_request(requests[party], parties.contract)
        assert asked.certificate is not None
        forged = canonical(changed(parse_canonical(asked.certificate), ("heads", "pboc"), older.to_json()))
        with pytest.raises(Refused, match="head of pboc in the certificate is not the last one"):
            parties.vaults[party]._certify(replace(asked, certificate=forged))
