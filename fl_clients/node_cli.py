"""`xinyi-node join`, `check`, `run`, `down`: connection and processes. They only parse and print."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fl_clients import enrolment, node
from fl_clients.at_home import HomeOption, one_line
from fl_clients.institution import home_folder
from fl_clients.invite import LARGEST
from privacy.errors import Refused


def print_checks(home: Path) -> bool:
    checks = enrolment.self_check(home, datetime.now(UTC))
    for check in checks:
        typer.echo(f"{'ok  ' if check.good else 'FAIL'} {check.what}: {check.words}")
    return all(check.good for check in checks)


def join(file: Annotated[Path, typer.Argument(help="The invitation.")], home: HomeOption = None) -> None:
    """Join the federation of an invitation; makes the home where there is none. Compare the fingerprints by telephone.

    Example: xinyi-node join bank_a.invite
    """
    folder = home_folder(home).absolute()
    with one_line():
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
        if not print_checks(folder):
            raise typer.Exit(1)


def check(home: HomeOption = None) -> None:
    """Check disk, database, node key, pinned app, TLS and clock.

    Example: xinyi-node check --home ~/.xinyi
    """
    with one_line():
        if not print_checks(home_folder(home).absolute()):
            raise typer.Exit(1)


def run(
    home: HomeOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it runs; stop it with `down`.")] = False,
) -> None:
    """Run the vault and the SuperNode until stopped; what ends is started again. All connections go outward.

    Example: xinyi-node run --detach
    """
    folder = home_folder(home).absolute()
    with one_line():
        if detach:
            typer.echo(f"runs: process {node.run_detached(folder)}, logs in {folder / 'logs'}")
        else:
            node.run(folder, node.vault_command(folder), lambda line: typer.echo(line), lambda: datetime.now(UTC))


def down(home: HomeOption = None) -> None:
    """Stop vault and SuperNode in order; Flower then lets the node return at once.

    Example: xinyi-node down --home ~/.xinyi
    """
    with one_line():
        typer.echo("stopped" if node.down(home_folder(home).absolute()) else "it did not run")
