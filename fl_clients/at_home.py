"""What the commands of `xinyi-node` share: opening the home, a person's key, one line for an error, printing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from fl_clients.institution import HOME_VARIABLE, Institution, home_folder, open_institution
from fl_clients.passphrase import institution_passphrase
from models.errors import DataError
from privacy import passphrase
from privacy.errors import Refused
from privacy.identity import SigningIdentity

REFUSED = 2

HomeOption = Annotated[
    Path | None, typer.Option("--home", help=f"Home of the institution ({HOME_VARIABLE}, else ~/.xinyi).")
]
AsOption = Annotated[str, typer.Option("--as", help="Name of the person who does this, as in people.toml.")]
KeyOption = Annotated[Path, typer.Option("--key", help="That person's own key file.")]


@contextmanager
def one_line() -> Iterator[None]:
    """What is refused ends in one line and exit code 2."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        _stop(f"{place + ': ' if place else ''}{first['msg']}")
    except (Refused, DataError, OSError) as error:
        _stop(str(error))


@contextmanager
def at_home(home: Path | None) -> Iterator[Institution]:
    """The institution, open; its passphrase comes from where its settings say."""
    folder = home_folder(home)
    institution = open_institution(folder, institution_passphrase(folder))
    try:
        yield institution
    finally:
        institution.close()


def person_key(key: Path) -> SigningIdentity:
    """A person's key; asks for its passphrase where it has one."""
    return SigningIdentity.load(key, passphrase.for_key(key, passphrase.PERSON_VARIABLE))


def say(text: str) -> None:
    """One line, as it is."""
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


def _stop(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {' '.join(text.split())}", markup=False)
    raise typer.Exit(REFUSED) from None
