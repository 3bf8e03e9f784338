"""Passphrases: from a private file, a real keyring or a person, and from nowhere weaker; never shown."""

from pathlib import Path

import keyring
import keyring.backend
import keyring.errors
import pytest
import tomli_w

from fl_clients import institution as institutions
from fl_clients.passphrase import institution_passphrase
from privacy import passphrase
from privacy.errors import Refused
from privacy.identity import SigningIdentity

SECRET = "correct horse battery"


class Safe(keyring.backend.KeyringBackend):
    """A keyring in memory that counts as a protecting one."""

    priority = 5.0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[tuple[str, str], str] = {}
        self.locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise keyring.errors.KeyringLocked("locked")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        if self.locked:
            raise keyring.errors.KeyringLocked("locked")
        self.kept[service, username] = password


class Plain(Safe):
    """As `keyrings.alt` has it: a store in a plain file."""

    priority = 0.5


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(passphrase.FILE_VARIABLE, raising=False)
    monkeypatch.delenv(passphrase.PERSON_VARIABLE, raising=False)


@pytest.fixture
def safe(monkeypatch: pytest.MonkeyPatch) -> Safe:
    backend = Safe()
    monkeypatch.setattr(keyring.core, "_keyring_backend", backend)
    return backend


def key_file(folder: Path, secret: str | None = SECRET) -> Path:
    path = folder / "identity.key"
    SigningIdentity.generate().save(path, secret.encode() if secret else None)
    return path


def secret_file(folder: Path, text: str = SECRET, mode: int = 0o600) -> Path:
    path = folder / "passphrase"
    path.write_text(text)
    path.chmod(mode)
    return path


def never(question: str) -> str:
    raise AssertionError(f"asked: {question}")


def home(folder: Path, secret: str | None, secrets: str | None) -> Path:
    made = folder / "home"
    institutions.create(made, "bank1", "bank", "passphrase" if secret else "plain", secret.encode() if secret else None)
    settings = {"name": "bank1", "role": "bank"} | ({"secrets": secrets} if secrets else {})
    (made / institutions.SETTINGS).write_text(tomli_w.dumps(settings))
    return made


def test_a_file_of_mode_0600_is_read_and_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_file(tmp_path)
    monkeypatch.setenv(passphrase.FILE_VARIABLE, str(secret_file(tmp_path, SECRET + "\n")))
    found = passphrase.for_key(key, passphrase.FILE_VARIABLE, never)
    assert found == SECRET.encode()
    SigningIdentity.load(key, found)


@pytest.mark.parametrize(
    ("text", "mode", "words"), [(SECRET, 0o640, "0640"), (SECRET, 0o604, "0604"), ("\n", 0o600, "empty")]
)
def test_a_file_that_others_read_or_an_empty_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, mode: int, words: str
) -> None:
    monkeypatch.setenv(passphrase.FILE_VARIABLE, str(secret_file(tmp_path, text, mode)))
    with pytest.raises(Refused, match=words) as caught:
        passphrase.for_key(key_file(tmp_path), passphrase.FILE_VARIABLE, never)
    assert SECRET not in str(caught.value)


def test_a_file_that_is_absent_or_a_link_is_refused_and_nothing_is_asked_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_file(tmp_path)
    monkeypatch.setenv(passphrase.FILE_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(Refused, match=passphrase.FILE_VARIABLE):
        passphrase.for_key(key, passphrase.FILE_VARIABLE, never)
    (tmp_path / "link").symlink_to(secret_file(tmp_path))
    monkeypatch.setenv(passphrase.FILE_VARIABLE, str(tmp_path / "link"))
    with pytest.raises(Refused, match=passphrase.FILE_VARIABLE):
        passphrase.for_key(key, passphrase.FILE_VARIABLE, never)


def test_a_persons_passphrase_is_another_than_the_institutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(passphrase.FILE_VARIABLE, str(secret_file(tmp_path)))
    asked = []

    def person(question: str) -> str:
        asked.append(question)
        return "another of the person"

    found = passphrase.for_key(key_file(tmp_path), passphrase.PERSON_VARIABLE, person)
    assert (found, len(asked)) == (b"another of the person", 1)


def test_a_person_is_asked_for_encrypted_keys_only(tmp_path: Path) -> None:
    assert passphrase.for_key(key_file(tmp_path), passphrase.FILE_VARIABLE, lambda _: SECRET) == SECRET.encode()
    (tmp_path / "plain").mkdir()
    assert passphrase.for_key(key_file(tmp_path / "plain", None), passphrase.FILE_VARIABLE, never) is None
    with pytest.raises(Refused, match="empty"):
        passphrase.for_key(tmp_path / "identity.key", passphrase.FILE_VARIABLE, lambda _: "")


def test_a_new_passphrase_is_long_and_typed_twice_alike(tmp_path: Path) -> None:
    answers = iter([SECRET, SECRET, SECRET, SECRET + "!", "short", "short"])

    def ask(_: str) -> str:
        return next(answers)

    key = tmp_path / "new.key"
    assert passphrase.for_new_key(key, passphrase.FILE_VARIABLE, ask) == SECRET.encode()
    with pytest.raises(Refused, match="differ"):
        passphrase.for_new_key(key, passphrase.FILE_VARIABLE, ask)
    with pytest.raises(Refused, match="fewer than 12"):
        passphrase.for_new_key(key, passphrase.FILE_VARIABLE, ask)


def test_without_a_terminal_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(Refused, match="no terminal"):
        passphrase.ask_at_terminal("passphrase: ")


def test_a_terminal_that_would_show_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass
    import warnings

    def showing(question: str) -> str:
        warnings.warn(f"cannot hide {question}", getpass.GetPassWarning, stacklevel=2)
        return SECRET

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(getpass, "getpass", showing)
    with pytest.raises(Refused, match="would show"):
        passphrase.ask_at_terminal("passphrase: ")


# --- the keyring -----------------------------------------------------------------------------------------------------


def test_the_keyring_gives_back_what_it_was_given_for_that_key_only(tmp_path: Path, safe: Safe) -> None:
    key = key_file(tmp_path)
    passphrase.to_keyring(key, SECRET.encode())
    assert passphrase.from_keyring(key) == SECRET.encode()
    with pytest.raises(Refused, match="has no passphrase"):
        passphrase.from_keyring(tmp_path / "other.key")
    safe.locked = True
    with pytest.raises(Refused, match="unlock"):
        passphrase.from_keyring(key)
    with pytest.raises(Refused, match="unlock"):
        passphrase.to_keyring(key, SECRET.encode())


def test_a_keyring_in_a_plain_file_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Plain()
    monkeypatch.setattr(keyring.core, "_keyring_backend", backend)
    with pytest.raises(Refused, match="no keyring that protects"):
        passphrase.to_keyring(tmp_path / "a.key", SECRET.encode())
    assert backend.kept == {}
    with pytest.raises(Refused, match="no keyring that protects"):
        passphrase.from_keyring(tmp_path / "a.key")


# --- the institution's settings --------------------------------------------------------------------------------------


def test_the_settings_say_where_the_passphrase_is(tmp_path: Path, safe: Safe) -> None:
    made = home(tmp_path, SECRET, "keyring")
    with pytest.raises(Refused, match="has no passphrase"):
        institution_passphrase(made, never)
    passphrase.to_keyring(made / institutions.IDENTITY, SECRET.encode())
    institutions.open_institution(made, institution_passphrase(made, never)).close()


@pytest.mark.parametrize(("secret", "secrets"), [(SECRET, "passphrase"), (SECRET, None), (None, "plain"), (None, None)])
def test_plain_and_encrypted_homes_open_as_configured(tmp_path: Path, secret: str | None, secrets: str | None) -> None:
    made = home(tmp_path, secret, secrets)
    found = institution_passphrase(made, (lambda _: SECRET) if secret else never)
    assert found == (SECRET.encode() if secret else None)
    institutions.open_institution(made, found).close()


@pytest.mark.parametrize(
    ("secret", "secrets", "words"),
    [
        (None, "passphrase", "is not encrypted"),
        (SECRET, "plain", "is encrypted"),
        (SECRET, "keychain", "one of plain, passphrase, keyring"),
    ],
)
def test_a_home_that_is_not_as_configured_is_refused(
    tmp_path: Path, secret: str | None, secrets: str, words: str
) -> None:
    with pytest.raises(Refused, match=words):
        institution_passphrase(home(tmp_path, secret, secrets), lambda _: SECRET)


def test_a_plain_identity_is_refused_where_a_keyring_is_configured(tmp_path: Path, safe: Safe) -> None:
    made = home(tmp_path, None, "keyring")
    passphrase.to_keyring(made / institutions.IDENTITY, SECRET.encode())
    with pytest.raises(Refused, match="should be"):
        institutions.open_institution(made, institution_passphrase(made, never))


def test_no_home_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="xinyi-node init"):
        institution_passphrase(tmp_path, never)
