"""An institution's home: who it is, and everything that must outlive a job. A vault decides by what is in it.

    HOME    institution.toml  identity.key  openings.key  policy.toml  people.toml  vault.sqlite  audit/  jobs/
The folder has mode 0700, its files 0600; the identity is encrypted where a passphrase is configured. None is ever sent.
"""

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import tomli_w

from fl_clients.contract import Role
from fl_clients.job_book import JobBook
from privacy.audit_log import AuditLog
from privacy.chained_table import Head
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.ledger import Ledger
from privacy.private_file import private_folder, read_private, write_private
from privacy.score_openings import KEY_BYTES

HOME_VARIABLE = "XINYI_HOME"
DEFAULT_HOME = Path("~/.xinyi")
SETTINGS, IDENTITY, OPENINGS_KEY, POLICY, PEOPLE, DATABASE, AUDIT, JOBS = (
    "institution.toml",
    "identity.key",
    "openings.key",
    "policy.toml",
    "people.toml",
    "vault.sqlite",
    "audit",
    "jobs",
)

Clock = Callable[[], datetime]
"""The present moment, with its time zone."""


def system_clock() -> datetime:
    """UTC now."""
    return datetime.now(UTC)


def home_folder(given: Path | None) -> Path:
    """The home that was asked for: the option, else the environment's, else ~/.xinyi."""
    return (given or Path(os.environ.get(HOME_VARIABLE, str(DEFAULT_HOME)))).expanduser()


@dataclass(frozen=True, kw_only=True, repr=False)
class Institution:
    """SECRET (identity, key). One institution: its name and role, log, ledger, job book, and the clock it goes by."""

    name: str
    role: Role
    home: Path
    identity: SigningIdentity
    openings_key: bytes
    """Digests of enterprises in the ledger's score openings are keyed by it; it must stay the same for good."""
    log: AuditLog
    ledger: Ledger
    jobs: JobBook
    clock: Clock

    def __repr__(self) -> str:
        return f"Institution({self.name!r})"

    def close(self) -> None:
        """Close the stores."""
        self.log.close()
        self.ledger.close()
        self.jobs.close()


Secrets = Literal["plain", "passphrase", "keyring"]
"""How the identity is kept: by mode 0600 alone, or encrypted, its passphrase typed, in a file or in a keyring."""


def create(home: Path, name: str, role: Role, secrets: Secrets = "plain", passphrase: bytes | None = None) -> None:
    """Make a home with a fresh identity, encrypted under `passphrase` unless `secrets` is "plain".

    A home that exists is `Refused`: its identity would be lost.
    """
    if (secrets == "plain") != (passphrase is None):
        raise Refused(f"secrets = {secrets!r} {'takes no' if secrets == 'plain' else 'needs a'} passphrase")
    if (home / SETTINGS).exists() or (home / IDENTITY).exists():
        raise Refused(f"{home} is the home of an institution already; choose another folder")
    private_folder(home)
    private_folder(home / JOBS)
    SigningIdentity.generate().save(home / IDENTITY, passphrase)
    write_private(home / OPENINGS_KEY, os.urandom(KEY_BYTES))
    write_private(home / SETTINGS, tomli_w.dumps({"name": name, "role": role, "secrets": secrets}).encode())


def open_institution(home: Path, passphrase: bytes | None = None, clock: Clock = system_clock) -> Institution:
    """Open a home: every hash of its log and its ledger is checked. `Refused` where anything does not fit."""
    try:
        settings = tomllib.loads((home / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"{home} is no home of an institution; make one with `xinyi-node init`") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{home / SETTINGS}: {error}") from None
    private_folder(home)
    name, role = settings.get("name"), settings.get("role")
    if not isinstance(name, str) or role not in ("bank", "pboc", "public_credit"):
        raise Refused(f"{home / SETTINGS}: name {name!r} and role {role!r}; role is bank, pboc or public_credit")
    identity = SigningIdentity.load(home / IDENTITY, passphrase)
    log = AuditLog(home / AUDIT, identity, name, clock)
    return Institution(
        name=name,
        role=role,
        home=home,
        identity=identity,
        openings_key=read_private(home / OPENINGS_KEY),
        log=log,
        ledger=Ledger(home / DATABASE, expected=ledger_head(log)),
        jobs=JobBook(home / DATABASE),
        clock=clock,
    )


def ledger_head(log: AuditLog) -> Head | None:
    """The newest state of the ledger that the log knows: a ledger put back to an older one is refused.

    What is reserved is logged before it is used, so the ledger has every reservation that the log knows.
    """
    for entry in reversed(log.entries()):
        if entry.kind == "reservation":
            return Head(count=int(entry.body["count"]), digest=str(entry.body["digest"]))
    return None
