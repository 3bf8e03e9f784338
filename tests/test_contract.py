"""The contract: what it refuses, that its hash covers every field, and that its canonical form does not drift."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from fl_clients.contract import RELEASES, Contract, SignedContract
from privacy.errors import Refused
from privacy.identity import SigningIdentity


def document() -> dict[str, Any]:
    """A valid contract as its JSON file says it."""
    column = {"name": "turnover", "kind": "numeric", "special_codes": [-99.0], "categories": []}
    return {
        "version": 2,
        "job": "0" * 32,
        "purpose": "risk model",
        "scenario": "working capital",
        "label": {"definition": "90 days overdue"},
        "simulation": True,
        "not_before": "2026-01-01T00:00:00Z",
        "expires": "2026-12-31T00:00:00Z",
        "uses": 2,
        "retention_days": 365,
        "coordinator_identity": "c0" * 32,
        "parties": [
            {"name": "bank1", "role": "bank", "identity": "b1" * 32, "columns": [column], "most_enterprises": 500},
            {
                "name": "bank2",
                "role": "bank",
                "identity": "b2" * 32,
                "columns": [dict(column)],
                "most_enterprises": 500,
            },
            {
                "name": "pboc",
                "role": "pboc",
                "identity": "a0" * 32,
                "columns": [{"name": "grade", "kind": "categorical", "special_codes": [], "categories": ["A", "B"]}],
                "most_enterprises": 900,
            },
        ],
        "model": {
            "rounds": 2,
            "max_bins_bank": 8,
            "max_bins_owner": 8,
            "least_count": 5,
            "ridge": 2.0,
            "smoothness": 20.0,
            "forward_noise": 1.0,
        },
        "privacy": {
            "unit": "enterprise",
            "epsilon": 3.0,
            "delta": 1e-6,
            "banks_per_enterprise": 1,
            "spare_attempts": 1,
            "colluding_banks": 1,
        },
        "alignment": {"bucket": 1024, "one_sided": True},
        "he": {"security_bits": 128, "flooding_bits": 40},
        "releases": [{"name": name, "receivers": list(receivers)} for name, receivers in RELEASES.items()],
        "least_banks": 1,
    }


def changed(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    found: Any = (whole := document())
    for key in path[:-1]:
        found = found[key]
    found[path[-1]] = value
    return whole


def leaves(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from leaves(value, (*path, key))


def test_the_example_is_valid_and_the_document_names_every_field() -> None:
    contract = Contract.model_validate(document())
    assert contract.model_dump(mode="json") == document()
    assert [bank.name for bank in contract.banks] == ["bank1", "bank2"]
    assert [owner.name for owner in contract.owners] == ["pboc"]
    assert Contract.model_validate_json(contract.canonical()).hash == contract.hash


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("parties", 1, "name"), "bank1", "same name"),
        (("parties", 0, "role"), "pboc", "honest"),
        (("privacy", "colluding_banks"), 0, "its own noise share"),
        (("parties", 2, "role"), "bank", "no feature owner|columns differ"),
        (("parties", 2, "role"), "coordinator", "role"),
        (("parties", 0, "name"), "", "name"),
        (("parties", 0, "name"), "x" * 65, "name"),
        (("parties", 0, "identity"), "b1" * 31, "identity"),
        (("parties", 0, "identity"), "B1" * 32, "identity"),
        (("parties", 2, "columns"), [], "no column"),
        (("parties", 1, "columns", 0, "name"), "other", "columns differ"),
        (("parties", 1, "columns", 0, "special_codes"), [], "columns differ"),
        (("parties", 0, "columns", 0, "kind"), "text", "kind"),
        (("parties",), [], "no bank"),
        (("job",), "0" * 31, "job"),
        (("job",), "G" * 32, "job"),
        (("version",), 1, "version"),
        (("coordinator_identity",), "", "coordinator_identity"),
        (("model", "rounds"), 0, "rounds"),
        (("model", "rounds"), 9, "rounds"),
        (("model", "max_bins_bank"), 1, "max_bins_bank"),
        (("model", "max_bins_owner"), 65, "max_bins_owner"),
        (("model", "least_count"), 0, "least_count"),
        (("model", "ridge"), 0.0, "ridge"),
        (("model", "smoothness"), -1.0, "smoothness"),
        (("model", "forward_noise"), -0.1, "forward_noise"),
        (("privacy", "epsilon"), 0.0, "epsilon"),
        (("privacy", "epsilon"), float("nan"), "epsilon"),
        (("privacy", "delta"), 1.0, "delta"),
        (("privacy", "colluding_banks"), 2, "honest"),
        (("privacy", "colluding_banks"), -1, "colluding_banks"),
        (("alignment", "bucket"), 0, "bucket"),
        (("least_banks",), 0, "least_banks"),
        (("least_banks",), 3, "least_banks"),
        (("unknown",), 1, "unknown"),
        (("parties", 0, "name"), "coordinator", "stands for the coordinator"),
        (("parties", 0, "identity"), "b2" * 32, "same identity key"),
        (("parties", 0, "identity"), "c0" * 32, "same identity key"),
        (("scenario",), "", "scenario"),
        (("label", "definition"), "", "definition"),
        (("not_before",), "2026-01-01T00:00:00", "timezone"),
        (("expires",), "2026-01-01T00:00:00Z", "not before"),
        (("expires",), "2099-01-01T00:00:00Z", "valid for"),
        (("uses",), 0, "uses"),
        (("retention_days",), -1, "retention_days"),
        (("he", "security_bits"), 127, "security_bits"),
        (("he", "flooding_bits"), 39, "flooding_bits"),
        (("privacy", "unit"), "loan", "unit"),
        (("releases", 0, "name"), "rows", "releases"),
        (("releases", 1, "name"), "row_counts", "listed twice"),
        (("releases", 5, "receivers"), ["banks", "coordinator"], "the protocol has it for"),
        (("releases", 5, "receivers"), [], "the protocol has it for"),
        (("model", "learning_rate"), 1, "learning_rate"),
    ],
)
def test_a_bad_contract_is_refused(path: tuple[str | int, ...], value: object, word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Contract.model_validate(changed(path, value))


def test_outside_simulation_epsilon_must_be_set() -> None:
    real = changed(("simulation",), False)
    assert not Contract.model_validate(real).simulation
    real["privacy"]["epsilon"] = None
    with pytest.raises(ValidationError, match="set epsilon"):
        Contract.model_validate(real)


def test_a_contract_cannot_be_changed_in_place() -> None:
    contract = Contract.model_validate(document())
    with pytest.raises(ValidationError, match="frozen"):
        contract.purpose = "another"
    with pytest.raises(ValidationError, match="frozen"):
        contract.model.rounds = 8


def test_the_hash_changes_with_every_field() -> None:
    whole = document()
    replacement: dict[type, Any] = {bool: lambda v: not v, float: lambda v: v * 0.5, int: lambda v: v + 1}
    known = {Contract.model_validate(whole).hash}
    tried = 0
    for path, value in leaves(whole):
        if path[-1] in ("version", "kind", "role", "colluding_banks", "unit") or path[0] == "releases":
            continue  # no other value is valid here, or tried below
        if path == ("job",) or path[-1] in ("identity", "coordinator_identity"):
            other: Any = value[:-1] + "e"
        elif path == ("least_banks",):
            other = 2
        elif path[0] in ("not_before", "expires"):
            other = value.replace("00:00:00", "00:00:01")
        elif isinstance(value, str):
            other = value + "x"
        else:
            other = replacement[type(value)](value)
        altered = changed(path, other)
        if path[:1] == ("parties",) and path[2] == "columns" and path[1] in (0, 1):
            both = 1 - int(path[1])
            altered["parties"][both]["columns"] = altered["parties"][int(path[1])]["columns"]
        digest = Contract.model_validate(altered).hash
        if path[:4] == ("parties", 1, "columns", 0):
            assert digest in known, "the banks' columns are the same; changing both from either side is one change"
        else:
            assert digest not in known, path
        known.add(digest)
        tried += 1
    assert tried > 25
    for path, other in (
        (("parties", 2, "role"), "public_credit"),
        (("parties", 2, "columns", 0, "kind"), "numeric"),
        (("parties", 2, "columns", 0, "categories"), ["B", "A"]),
        (("privacy", "epsilon"), None),
        (("privacy", "delta"), None),
        (("privacy", "colluding_banks"), None),
        (("releases",), document()["releases"][:-1]),
        (("releases", 0, "receivers"), ["coordinator"]),
    ):
        digest = Contract.model_validate(changed(path, other)).hash
        assert digest not in known, path
        known.add(digest)


def test_the_order_of_the_parties_counts_and_that_of_the_keys_does_not() -> None:
    whole = document()
    contract = Contract.model_validate(whole)
    assert Contract.model_validate(dict(reversed(whole.items()))).hash == contract.hash
    whole["parties"] = [whole["parties"][1], whole["parties"][0], whole["parties"][2]]
    assert Contract.model_validate(whole).hash != contract.hash


def test_the_canonical_form_is_pinned() -> None:
    """Parties of different versions must agree on it; a change here needs a new `version`."""
    contract = Contract.model_validate(document())
    assert contract.canonical().startswith(
        b'{"alignment":{"bucket":1024,"one_sided":true},"coordinator_identity":"c0c0'
    )
    assert contract.hash.hex() == PINNED


PINNED = "66c30f5f6b2254bba9da635628154dcb39b135358df0abc638b79f3441b81d1e"


def test_names_of_strangers_are_refused_and_collusion_follows_the_participants() -> None:
    contract = Contract.model_validate(document())
    assert contract.party("pboc").role == "pboc"
    with pytest.raises(Refused, match="no party"):
        contract.party("bank3")
    assert [contract.colluding(banks) for banks in (1, 2, 3)] == [0, 1, 1]
    default = Contract.model_validate(changed(("privacy", "colluding_banks"), None))
    assert default.settings.cross_tabs is False
    assert all(0 <= default.colluding(banks) < banks for banks in range(1, 10))
    exact = Contract.model_validate(changed(("privacy", "epsilon"), None))
    assert exact.settings.cross_tabs is True


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("privacy", "epsilon"), None, "no epsilon"),
        (("privacy", "epsilon"), 11.0, "epsilon=11.0"),
        (("privacy", "delta"), 0.01, "delta=0.01"),
        (("model", "forward_noise"), 0.5, "forward_noise=0.5"),
    ],
)
def test_outside_simulation_no_contract_is_without_privacy(
    path: tuple[str | int, ...], value: object, words: str
) -> None:
    deployed = changed(path, value) | {"simulation": False}
    with pytest.raises(ValidationError, match=words):
        Contract.model_validate(deployed)
    Contract.model_validate(document() | {"simulation": False})
    Contract.model_validate(changed(path, value))


# --- signatures ------------------------------------------------------------------------------------------------------

NAMES = ("coordinator", "bank1", "bank2", "pboc")


def keys_and_contract(**changes: Any) -> tuple[dict[str, SigningIdentity], Contract]:
    keys = {name: SigningIdentity.generate() for name in NAMES}
    whole = document() | changes
    whole["coordinator_identity"] = keys["coordinator"].public.hex()
    for party in whole["parties"]:
        party["identity"] = keys[party["name"]].public.hex()
    return keys, Contract.model_validate(whole)


def signed_by(keys: dict[str, SigningIdentity], contract: Contract, *names: str) -> SignedContract:
    signed = SignedContract(contract=contract)
    for name in names:
        signed = signed.signed(name, keys[name])
    return signed


def test_a_contract_holds_when_everyone_signed_it_and_not_before() -> None:
    keys, contract = keys_and_contract()
    assert contract.signers == NAMES
    for missing in NAMES:
        part = signed_by(keys, contract, *(name for name in NAMES if name != missing))
        with pytest.raises(Refused, match=f"lacks the signature of {missing}"):
            part.check_all()
    whole = signed_by(keys, contract, *NAMES)
    whole.check_all()
    assert SignedContract.model_validate_json(whole.model_dump_json()) == whole


def test_a_signature_fits_one_contract_one_signer_and_one_key() -> None:
    keys, contract = keys_and_contract()
    whole = signed_by(keys, contract, *NAMES)
    for change in ({"uses": 3}, {"purpose": "marketing"}, {"least_banks": 2}):
        other = SignedContract(contract=contract.model_copy(update=change), signatures=whole.signatures)
        with pytest.raises(Refused, match="does not fit"):
            other.check_all()
    swapped = whole.signatures | {"bank1": whole.signatures["bank2"]}
    with pytest.raises(Refused, match="bank1 does not fit"):
        SignedContract(contract=contract, signatures=swapped).check_all()
    with pytest.raises(Refused, match="not hexadecimal"):
        SignedContract(contract=contract, signatures=whole.signatures | {"pboc": "zz"}).check_all()
    with pytest.raises(Refused, match="another identity key"):
        SignedContract(contract=contract).signed("bank1", keys["bank2"])
    with pytest.raises(Refused, match="no party"):
        SignedContract(contract=contract).signed("bank9", keys["bank2"])
    with pytest.raises(Refused, match="strangers"):
        SignedContract(contract=contract, signatures=whole.signatures | {"bank9": "00" * 64}).check_all()
    with pytest.raises(Refused, match="does not fit"):
        SignedContract(contract=contract).added("bank1", whole.signatures["pboc"])


def test_a_copy_with_another_field_has_another_hash_although_the_hash_is_kept() -> None:
    contract = Contract.model_validate(document())
    before = contract.hash
    copied = contract.model_copy(update={"purpose": "marketing"})
    assert copied.hash == Contract.model_validate(document() | {"purpose": "marketing"}).hash != before
    assert contract.hash == before
    assert copied != contract
    assert Contract.model_validate(document()) == contract


def test_one_moment_has_one_hash() -> None:
    """The same expiry in another time zone, or with a fraction of a second, is the same contract."""
    contract = Contract.model_validate(document())
    beijing = Contract.model_validate(changed(("expires",), "2026-12-31T08:00:00.4+08:00"))
    assert beijing.hash == contract.hash
