"""`xinyi-server`: the coordinator's command. It only parses and prints."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fl_clients import who_sees_what
from fl_clients.contract import Contract, SignedContract
from fl_clients.protocol import schedule
from fl_server import federation_cli
from fl_server.job_cli import job_app

app = typer.Typer(
    help="The coordinator: its federation, drafts of contracts, signatures, jobs, and what a job would do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(job_app, name="job")
app.command()(federation_cli.init)
app.command()(federation_cli.invite)
app.command()(federation_cli.up)
app.command()(federation_cli.down)
app.command()(federation_cli.status)
app.command()(federation_cli.watch)
app.command()(federation_cli.models)
app.command()(federation_cli.revoke)
app.command()(federation_cli.renew)


@app.callback()
def _xinyi() -> None:
    pass


@app.command()
def explain(contract: Annotated[Path, typer.Argument(help="A contract.json, as a run writes it.")]) -> None:
    """Say in plain words what a contract's job does and who sees what.

    Example: xinyi-server explain out/demo/run/contract.json
    """
    try:
        terms = _read_contract(contract.read_bytes())
    except (OSError, ValidationError) as error:
        typer.echo(f"error: {contract} is no contract: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(2) from None
    console = Console()
    console.print(f"job {terms.job}, contract {terms.hash.hex()[:16]}, purpose: {terms.purpose}", markup=False)
    console.print(f"exchanges: {len(schedule(terms))} in {terms.model.rounds} rounds", markup=False)
    table = Table("what", "coordinator", "label holder", "feature owner", "others", show_lines=True)
    for row in who_sees_what.table(terms):
        table.add_row(*row.values())
    console.print(table)
    for line in who_sees_what.warnings(terms):
        console.print(f"warning: {line}", markup=False)


def _read_contract(data: bytes) -> Contract:
    """A contract, alone or with its signatures."""
    try:
        return SignedContract.model_validate_json(data).contract
    except ValidationError:
        return Contract.model_validate_json(data)


def main() -> None:
    app()
