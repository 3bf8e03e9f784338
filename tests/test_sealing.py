"""Identities, announcements and sealed letters: what opens, and that nothing else does."""

import copy
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import Refused
from privacy.identity import SigningIdentity, fingerprint, verify
from privacy.sealing import Context, JobKeys, encode_fields

JOB = bytes(range(32))
CONTEXT = Context(
    job=JOB,
    step="r1.aggregate",
    attempt=0,
    participants=("bank-a", "bank-b"),
    sender="pboc",
    receiver="bank-a",
    label="letter",
)
OTHER_CONTEXTS = {
    "job": replace(CONTEXT, job=bytes(32)),
    "step": replace(CONTEXT, step="r2.aggregate"),
    "attempt": replace(CONTEXT, attempt=1),
    "fewer participants": replace(CONTEXT, participants=("bank-a",)),
    "order of participants": replace(CONTEXT, participants=("bank-b", "bank-a")),
    "border between participants": replace(CONTEXT, participants=("bank-abank", "-b")),
    "sender": replace(CONTEXT, sender="tax"),
    "receiver": replace(CONTEXT, receiver="bank-b"),
    "label": replace(CONTEXT, label="key"),
    "sender and receiver swapped": replace(CONTEXT, sender="bank-a", receiver="pboc"),
}
PLAINTEXT = b"one bank's sums, nobody else's business"


@pytest.fixture(scope="module")
def owner() -> JobKeys:
    return JobKeys.generate()


@pytest.fixture(scope="module")
def bank() -> JobKeys:
    return JobKeys.generate()


# --- letters ----------------------------------------------------------------------------------------------------------


@given(plaintext=st.binary(max_size=300))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_a_letter_opens_at_its_receiver(plaintext: bytes) -> None:
    writer, reader = JobKeys.generate(), JobKeys.generate()
    sealed = writer.seal(reader.public, CONTEXT, plaintext)
    assert reader.open(writer.public, CONTEXT, sealed) == plaintext
    assert len(sealed) == len(plaintext) + 28


def test_restored_keys_are_the_same_keys(owner: JobKeys, bank: JobKeys) -> None:
    restored = JobKeys.restore(owner.secret_bytes())
    assert restored.public == owner.public
    derived = [keys.derive(bank.public, job=bytes(32), purpose=b"p", info=b"i") for keys in (owner, restored)]
    assert derived[0] == derived[1]
    with pytest.raises(Refused, match="31 bytes"):
        JobKeys.restore(bytes(31))


def test_a_letter_takes_any_bytes_like_object(owner: JobKeys, bank: JobKeys) -> None:
    for form in (bytes, bytearray, memoryview):
        sealed = owner.seal(bank.public, CONTEXT, form(PLAINTEXT))
        assert bank.open(owner.public, CONTEXT, form(sealed)) == PLAINTEXT


@pytest.mark.parametrize("field", OTHER_CONTEXTS)
def test_a_letter_opens_in_no_other_context(owner: JobKeys, bank: JobKeys, field: str) -> None:
    sealed = owner.seal(bank.public, CONTEXT, PLAINTEXT)
    other = OTHER_CONTEXTS[field]
    with pytest.raises(Refused, match="does not open") as refusal:
        bank.open(owner.public, other, sealed)
    message = str(refusal.value)
    assert other.step in message
    assert other.sender in message
    assert "business" not in message


def test_every_changed_byte_is_refused(owner: JobKeys, bank: JobKeys) -> None:
    sealed = owner.seal(bank.public, CONTEXT, PLAINTEXT)
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(Refused):
            bank.open(owner.public, CONTEXT, changed)
    for size in (0, 11, 12, 27, len(sealed) - 1):
        with pytest.raises(Refused):
            bank.open(owner.public, CONTEXT, sealed[:size])
    with pytest.raises(Refused):
        bank.open(owner.public, CONTEXT, sealed + b"\0")


def test_only_the_two_of_them_can_open(owner: JobKeys, bank: JobKeys) -> None:
    sealed = owner.seal(bank.public, CONTEXT, PLAINTEXT)
    third = JobKeys.generate()
    with pytest.raises(Refused):
        third.open(owner.public, CONTEXT, sealed)
    with pytest.raises(Refused):
        bank.open(third.public, CONTEXT, sealed)


def test_equal_letters_look_different(owner: JobKeys, bank: JobKeys) -> None:
    letters = {owner.seal(bank.public, CONTEXT, PLAINTEXT) for _ in range(20)}
    assert len({letter[:12] for letter in letters}) == 20
    assert all(PLAINTEXT not in letter for letter in letters)


@pytest.mark.parametrize(
    "public",
    [
        bytes(32),  # order 1 and 2: the shared secret would be zero
        (1).to_bytes(32, "little"),
        bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
        b"short",
        b"",
    ],
)
def test_peer_keys_that_force_a_known_secret_are_refused(owner: JobKeys, public: bytes) -> None:
    with pytest.raises(Refused, match="job key"):
        owner.seal(public, CONTEXT, PLAINTEXT)
    with pytest.raises(Refused, match="job key"):
        owner.open(public, CONTEXT, bytes(64))


def test_another_encoding_of_a_peer_key_opens_nothing(owner: JobKeys, bank: JobKeys) -> None:
    # X25519 ignores the top bit, so the shared secret is the same; the bound public keys are not
    alias = bank.public[:31] + bytes([bank.public[31] ^ 0x80])
    with pytest.raises(Refused):
        bank.open(owner.public, CONTEXT, owner.seal(alias, CONTEXT, PLAINTEXT))


def test_derived_keys_agree_and_depend_on_everything(owner: JobKeys, bank: JobKeys) -> None:
    def key(mine: JobKeys, peer: JobKeys, job: bytes = JOB, purpose: bytes = b"p", info: bytes = b"i") -> bytes:
        return mine.derive(peer.public, job=job, purpose=purpose, info=info)

    assert key(owner, bank) == key(bank, owner)
    third = JobKeys.generate()
    keys = [
        key(owner, bank),
        key(owner, bank, job=bytes(32)),
        key(owner, bank, purpose=b"q"),
        key(owner, bank, info=b"j"),
        key(owner, bank, purpose=b"pi", info=b""),
        key(owner, third),
        key(third, bank),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(k) == 32 for k in keys)


# --- contexts ---------------------------------------------------------------------------------------------------------

_NAMES = st.text(alphabet="ab.|", min_size=1, max_size=3)
_CONTEXTS = st.builds(
    Context,
    job=st.sampled_from([JOB, bytes(32)]),
    step=_NAMES,
    attempt=st.integers(0, 2),
    participants=st.lists(_NAMES, min_size=1, max_size=3, unique=True).map(tuple),
    sender=_NAMES,
    receiver=_NAMES,
    label=_NAMES,
)


@given(first=_CONTEXTS, second=_CONTEXTS)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_contexts_encode_injectively(first: Context, second: Context) -> None:
    assert (first.encode() == second.encode()) == (first == second)
    assert first.encode() == copy.deepcopy(first).encode()


@given(first=st.lists(st.binary(max_size=3), max_size=4), second=st.lists(st.binary(max_size=3), max_size=4))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_field_lists_encode_injectively(first: list[bytes], second: list[bytes]) -> None:
    assert (encode_fields(first) == encode_fields(second)) == (first == second)


@pytest.mark.parametrize(
    "change",
    [
        {"job": b"short"},
        {"step": ""},
        {"attempt": -1},
        {"attempt": 1 << 32},
        {"participants": ()},
        {"participants": ("a", "a")},
        {"participants": ("a", "")},
        {"participants": ["a", "b"]},
        {"sender": ""},
        {"receiver": ""},
        {"label": ""},
    ],
)
def test_contexts_without_a_place_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(Refused):
        replace(CONTEXT, **change)


# --- identities -------------------------------------------------------------------------------------------------------


def test_signatures_hold_for_one_context_and_message() -> None:
    identity = SigningIdentity.generate()
    signature = identity.sign(b"context", b"message")
    verify(identity.public, b"context", b"message", signature)
    flipped = bytes([signature[0] ^ 1]) + signature[1:]
    wrong = [
        (identity.public, b"contexts", b"message", signature),
        (identity.public, b"context", b"messages", signature),
        (identity.public, b"contextm", b"essage", signature),  # the border between them counts
        (identity.public, b"", b"contextmessage", signature),
        (SigningIdentity.generate().public, b"context", b"message", signature),
        (b"no key", b"context", b"message", signature),
        (identity.public, b"context", b"message", flipped),
        (identity.public, b"context", b"message", b""),
    ]
    for public, context, message, given_signature in wrong:
        with pytest.raises(Refused, match="signature"):
            verify(public, context, message, given_signature)


def test_an_identity_survives_its_file(tmp_path: Path) -> None:
    identity, path = SigningIdentity.generate(), tmp_path / "identity.pem"
    before = os.umask(0)
    try:
        identity.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = SigningIdentity.load(path)
    assert loaded.public == identity.public
    verify(identity.public, b"c", b"m", loaded.sign(b"c", b"m"))


def test_identity_files_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    SigningIdentity.generate().save(path)
    before = path.read_bytes()
    with pytest.raises(Refused, match="exists"):
        SigningIdentity.generate().save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o644])
def test_identity_files_that_others_may_touch_are_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    SigningIdentity.generate().save(path)
    path.chmod(mode)
    with pytest.raises(Refused, match=f"{mode:04o}"):
        SigningIdentity.load(path)


def test_what_is_no_identity_file_is_refused(tmp_path: Path) -> None:
    good, link, damaged = tmp_path / "good.pem", tmp_path / "link.pem", tmp_path / "damaged.pem"
    SigningIdentity.generate().save(good)
    link.symlink_to(good)
    damaged.write_bytes(good.read_bytes()[:60])
    damaged.chmod(0o600)
    for path in (link, damaged, tmp_path / "missing.pem"):
        with pytest.raises(Refused, match="identity file"):
            SigningIdentity.load(path)


def test_secrets_show_nothing(tmp_path: Path) -> None:
    identity = SigningIdentity.generate()
    path = tmp_path / "identity.pem"
    identity.save(path)
    pem_body = path.read_text().splitlines()[1]
    assert pem_body not in repr(identity)
    assert repr(identity) == f"SigningIdentity({fingerprint(identity.public)})"
    raw = X25519PrivateKey.generate()
    keys = JobKeys(raw)
    assert raw.private_bytes_raw().hex() not in f"{keys!r} {keys} {[keys]}"
    assert repr(keys) == "JobKeys(secret)"
