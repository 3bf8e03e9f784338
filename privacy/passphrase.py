"""Where the passphrase of a key file comes from: a private file, the operating system's keyring, or a person.

Guarantee: a passphrase is never an argument of a command, never in an environment variable (only the path of a file of
mode 0600 is), never shown while it is typed, and never in an error. What is configured is used or the key stays shut:
nothing falls back to a weaker way. Against: other users of the machine, process lists, shell histories, logs.
Not against: the machine's administrator, who reads memory.
Source: PKCS #8 encryption of privacy/identity.py; `keyring` (Secret Service, KWallet, macOS and Windows stores).
"""

import getpass
import os
import secrets
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import keyring
import keyring.errors

from privacy.errors import Refused
from privacy.private_file import read_private

FILE_VARIABLE = "XINYI_PASSPHRASE_FILE"
"""Path of the passphrase of an institution's, or the coordinator's, identity."""
PERSON_VARIABLE = "XINYI_KEY_PASSPHRASE_FILE"
"""Path of the passphrase of the key of a person (admin, approver, auditor)."""

LEAST_LENGTH = 12
_SERVICE = "xinyi"
_LEAST_KEYRING = 1.0  # `keyring` gives stores in plain files less than 1, and 0 or less to none at all

Ask = Callable[[str], str]
"""Asks a person for a passphrase without showing it."""


def is_encrypted(key: Path) -> bool:
    """Whether a key file needs a passphrase. `Refused` where it cannot be read by its owner only."""
    return b"BEGIN ENCRYPTED PRIVATE KEY" in read_private(key)


def ask_at_terminal(question: str) -> str:
    """Ask at the terminal. `Refused` where there is none, or where what is typed would be seen."""
    if not sys.stdin.isatty():
        raise Refused(
            f"{question.rstrip(': ')}: there is no terminal to ask at; put it in a file of mode 0600 and name "
            f"that in {FILE_VARIABLE} ({PERSON_VARIABLE} for a person's key)"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return getpass.getpass(question)
        except getpass.GetPassWarning:
            raise Refused("this terminal would show the passphrase; use another, or a passphrase file") from None


def for_key(key: Path, variable: str, ask: Ask = ask_at_terminal) -> bytes | None:
    """Passphrase of an existing key file: of the file that `variable` names, else asked for; None for a plain key.

    A plain key is refused later, by `SigningIdentity.load`, where a passphrase file is named.
    """
    if (path := os.environ.get(variable)) is not None:
        return _from_file(Path(path), variable)
    return _checked(ask(f"passphrase of {key}: ").encode()) if is_encrypted(key) else None


def for_new_key(key: Path, variable: str, ask: Ask = ask_at_terminal) -> bytes:
    """Passphrase for a key that is to be made: of the file that `variable` names, else asked for twice."""
    if (path := os.environ.get(variable)) is not None:
        passphrase = _from_file(Path(path), variable)
    else:
        passphrase = _checked(ask(f"new passphrase of {key}: ").encode())
        if ask("the same again: ").encode() != passphrase:
            raise Refused("the two passphrases differ; begin again")
    if len(passphrase.decode(errors="replace")) < LEAST_LENGTH:
        raise Refused(f"a passphrase of fewer than {LEAST_LENGTH} characters is found by trying; take a longer one")
    return passphrase


def generated() -> bytes:
    """A passphrase that nobody has to remember, for a keyring: 256 bits of the operating system's generator."""
    return secrets.token_hex(32).encode()


def from_keyring(key: Path) -> bytes:
    """Passphrase of a key from the operating system's keyring; `Refused` where it, or a real keyring, is absent."""
    _check_keyring()
    try:
        found = keyring.get_password(_SERVICE, _entry(key))
    except keyring.errors.KeyringError as error:
        raise Refused(f"the keyring does not answer ({type(error).__name__}); unlock it") from None
    if not found:
        raise Refused(f"the keyring has no passphrase of {key}; it is stored there when the key is made")
    return found.encode()


def to_keyring(key: Path, passphrase: bytes) -> None:
    """Store the passphrase of a key in the operating system's keyring."""
    _check_keyring()
    try:
        keyring.set_password(_SERVICE, _entry(key), passphrase.decode())
    except keyring.errors.KeyringError as error:
        raise Refused(f"the keyring takes no passphrase ({type(error).__name__}); unlock it") from None


def _check_keyring() -> None:
    backend = keyring.get_keyring()
    priority = float(getattr(backend, "priority", 0))
    if priority < _LEAST_KEYRING:
        raise Refused(
            f"this machine has no keyring that protects what it keeps (found: {type(backend).__module__}); set "
            'secrets = "passphrase" instead'
        )


def _entry(key: Path) -> str:
    return str(key.expanduser().resolve())


def _from_file(path: Path, variable: str) -> bytes:
    try:
        return _checked(read_private(path.expanduser()).rstrip(b"\r\n"))
    except Refused as error:
        raise Refused(f"{variable}: {error}") from None


def _checked(passphrase: bytes) -> bytes:
    if not passphrase:
        raise Refused("an empty passphrase protects nothing; give one")
    return passphrase
