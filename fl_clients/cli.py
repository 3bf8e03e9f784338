"""`xinyi-node`: the institution's command. It only parses and prints."""

from pathlib import Path
from typing import Annotated

import typer

from fl_clients.data_cli import consent_app, data_app
from privacy.errors import Refused
from privacy.identity import SigningIdentity, fingerprint

app = typer.Typer(
    help="An institution's node: its identity, its own data and consents. Deployment comes with a later release.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(data_app, name="data")
app.add_typer(consent_app, name="consent")


@app.callback()
def _xinyi() -> None:
    pass


@app.command()
def identity(file: Annotated[Path, typer.Argument(help="Key file; created with mode 0600 where absent.")]) -> None:
    """Create or read the institution's Ed25519 identity and print its public key for contracts.

    Example: xinyi-node identity ~/.xinyi/identity.key
    """
    try:
        if file.exists():
            signing = SigningIdentity.load(file)
        else:
            signing = SigningIdentity.generate()
            signing.save(file)
    except (OSError, Refused) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"public key   {signing.public.hex()}")
    typer.echo(f"fingerprint  {fingerprint(signing.public)}")


def main() -> None:
    app()
