"""`xinyi-node`: the institution's command. It only parses and prints."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fl_clients import enrolment, node
from fl_clients.data_cli import consent_app, data_app
from fl_clients.invite import LARGEST, Role
from privacy.errors import Refused
from privacy.identity import SigningIdentity, fingerprint

app = typer.Typer(
    help="An institution's node: its identity, its connection, its own data and consents.",
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


Home = Annotated[Path | None, typer.Option(help="The institution's folder; default ~/.xinyi.", envvar="XINYI_HOME")]


def _home(given: Path | None) -> Path:
    return (given or Path(os.environ.get("XINYI_HOME", "~/.xinyi"))).expanduser().absolute()


@contextmanager
def _refusals() -> Iterator[None]:
    """A refusal is one line on stderr and exit code 2."""
    try:
        yield
    except Refused as refused:
        typer.echo(f"error: {refused}", err=True)
        raise typer.Exit(2) from None


def _print_checks(home: Path) -> bool:
    checks = enrolment.self_check(home, datetime.now(UTC))
    for check in checks:
        typer.echo(f"{'ok  ' if check.good else 'FAIL'} {check.what}: {check.words}")
    return all(check.good for check in checks)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The institution's name in contracts: lower-case letters, digits, - _.")],
    role: Annotated[str, typer.Argument(help="bank, pboc or public_credit.")] = "bank",
    home: Home = None,
) -> None:
    """Make the institution's home with its identity and node keys, and check disk and database.

    Example: xinyi-node init bank_a bank
    """
    roles: dict[str, Role] = {"bank": "bank", "pboc": "pboc", "public_credit": "public_credit"}
    folder = _home(home)
    with _refusals():
        if role not in roles:
            raise Refused(f"role {role!r}: a role is one of {', '.join(roles)}")
        enrolment.make_home(folder, name, roles[role])
        public = SigningIdentity.load(folder / "identity.key").public
        typer.echo(f"public key   {public.hex()}")
        typer.echo(f"fingerprint  {fingerprint(public)}")
        if not _print_checks(folder):
            raise typer.Exit(1)


@app.command()
def join(file: Annotated[Path, typer.Argument(help="The invitation.")], home: Home = None) -> None:
    """Join the federation of an invitation; makes the home where there is none. Compare the fingerprints by telephone.

    Example: xinyi-node join bank_a.invite
    """
    folder = _home(home)
    with _refusals():
        try:
            with file.open("rb") as opened:
                invitation = opened.read(LARGEST + 1)
        except OSError as error:
            raise Refused(f"{file}: {error.strerror}; give the invitation's file") from None
        joined = enrolment.join(folder, invitation, datetime.now(UTC))
        typer.echo(f"joined {joined.federation.federation} as {joined.federation.name} ({joined.federation.role})")
        typer.echo(f"own identity {joined.own}  (the coordinator sees it with: xinyi-server status)")
        typer.echo(f"coordinator  {joined.coordinator}  (it sees it with: xinyi-server status)")
        typer.echo(f"CA           {joined.ca}")
        typer.echo(f"pinned app   {joined.federation.bundle}")
        if not _print_checks(folder):
            raise typer.Exit(1)


@app.command()
def check(home: Home = None) -> None:
    """Check disk, database, node key, pinned app, TLS and clock.

    Example: xinyi-node check --home ~/.xinyi
    """
    with _refusals():
        if not _print_checks(_home(home)):
            raise typer.Exit(1)


@app.command()
def run(
    home: Home = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it runs; stop it with `down`.")] = False,
) -> None:
    """Run the vault and the SuperNode until stopped; what ends is started again. All connections go outward.

    Example: xinyi-node run --detach
    """
    folder = _home(home)
    with _refusals():
        if detach:
            typer.echo(f"runs: process {node.run_detached(folder)}, logs in {folder / 'logs'}")
        else:
            node.run(folder, node.vault_command(folder), lambda line: typer.echo(line), lambda: datetime.now(UTC))


@app.command()
def down(home: Home = None) -> None:
    """Stop vault and SuperNode in order; Flower then lets the node return at once.

    Example: xinyi-node down --home ~/.xinyi
    """
    with _refusals():
        typer.echo("stopped" if node.down(_home(home)) else "it did not run")


def main() -> None:
    app()
