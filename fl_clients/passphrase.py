"""The passphrase of an institution's identity, from where its institution.toml says: `secrets`.

    secrets = "passphrase"   of the file that XINYI_PASSPHRASE_FILE names, else asked for (the default for an encrypted
                             identity); secrets = "keyring": the operating system's keyring, and nothing else;
    secrets = "plain"        the identity is not encrypted, mode 0600 alone protects it.
Guarantee: an identity that is plain where a passphrase is configured, or the other way round, is `Refused`.
"""

import tomllib
from pathlib import Path

from fl_clients.institution import IDENTITY, SETTINGS
from privacy import passphrase
from privacy.errors import Refused

SECRETS = ("plain", "passphrase", "keyring")


def institution_passphrase(home: Path, ask: passphrase.Ask = passphrase.ask_at_terminal) -> bytes | None:
    """The passphrase of the identity in `home`; None where it has none. To be given to `open_institution`."""
    try:
        settings = tomllib.loads((home / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise Refused(f"{home} is no home of an institution; make one with `xinyi-node init`") from None
    key = home / IDENTITY
    encrypted = passphrase.is_encrypted(key)
    match settings.get("secrets"):
        case "keyring":
            return passphrase.from_keyring(key)
        case "passphrase" if not encrypted:
            raise Refused(f'{key} is not encrypted, but {home / SETTINGS} says secrets = "passphrase"; restore it')
        case "plain" if encrypted:
            raise Refused(f'{key} is encrypted, but {home / SETTINGS} says secrets = "plain"; correct the settings')
        case "passphrase" | "plain" | None:
            return passphrase.for_key(key, passphrase.FILE_VARIABLE, ask)
        case other:
            raise Refused(f"{home / SETTINGS}: secrets = {other!r}; it is one of {', '.join(SECRETS)}")
