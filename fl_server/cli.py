"""`xinyi-server`: the coordinator's command. It only parses and prints."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fl_clients.contract import Contract
from fl_clients.invite import Role
from fl_clients.processes import running_supervisor
from fl_clients.protocol import schedule
from fl_clients.tls import certificate_fingerprint
from fl_server import enrolment, superlink, who_sees_what
from privacy.errors import Refused
from privacy.identity import fingerprint

app = typer.Typer(
    help="The coordinator: its federation, its SuperLink behind a guard, and what a job would do.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _xinyi() -> None:
    pass


Home = Annotated[
    Path | None,
    typer.Option(help="The coordinator's folder; default ~/.xinyi-server.", envvar=enrolment.HOME_VARIABLE),
]


@contextmanager
def _refusals() -> Iterator[None]:
    """A refusal is one line on stderr and exit code 2."""
    try:
        yield
    except Refused as refused:
        typer.echo(f"error: {refused}", err=True)
        raise typer.Exit(2) from None


@app.command()
def init(
    host: Annotated[str, typer.Argument(help="Name or address under which institutions reach this machine.")],
    home: Home = None,
    federation: Annotated[str, typer.Option(help="Name of the federation.")] = "xinyi",
    port: Annotated[int, typer.Option(help="Public port; the next three are the lane's and two on loopback.")] = 9443,
    certificate: Annotated[Path | None, typer.Option(help="PEM chain of the public port, of a CA of your own.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    root: Annotated[Path | None, typer.Option(help="Its root certificate.")] = None,
) -> None:
    """Make the coordinator's home: identity, CA, TLS certificate, database folder.

    Example: xinyi-server init coordinator.example.cn
    """
    given = (certificate, key, root)
    if any(given) and not all(given):
        typer.echo("error: give --certificate, --key and --root together, or none of them", err=True)
        raise typer.Exit(2)
    folder = enrolment.home_folder(home)
    with _refusals():
        try:
            settings = enrolment.Settings(
                federation=federation,
                host=host,
                fleet_port=port,
                lane_port=port + 1,
                private_port=port + 2,
                hub_port=port + 3,
            )
        except ValidationError as error:
            raise Refused(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None
        files = (certificate, key, root) if certificate and key and root else None
        enrolment.create(folder, settings, datetime.now(UTC), files)
        _show_fingerprints(folder)


def _show_fingerprints(home: Path) -> None:
    typer.echo(f"coordinator  {fingerprint(enrolment.identity_of(home).public)}")
    typer.echo(f"CA           {certificate_fingerprint((home / 'tls' / 'root.crt').read_bytes())}")


@app.command()
def invite(
    names: Annotated[list[str], typer.Argument(help="Institutions as NAME or NAME=ROLE (bank, pboc, public_credit).")],
    home: Home = None,
    days: Annotated[int, typer.Option(min=1, max=90, help="Days until the invitation expires.")] = 7,
) -> None:
    """Write one invitation file for each name; send it over a channel you trust, it lets its holder join once.

    Example: xinyi-server invite bank_a bank_b pboc=pboc
    """
    folder = enrolment.home_folder(home)
    roles: dict[str, Role] = {"bank": "bank", "pboc": "pboc", "public_credit": "public_credit"}
    with _refusals():
        for item in names:
            name, _, role = item.partition("=")
            if (role or "bank") not in roles:
                raise Refused(f"role {role!r} of {name!r}: a role is one of {', '.join(roles)}")
            typer.echo(str(enrolment.invite(folder, name, roles[role or "bank"], datetime.now(UTC), days)))
        _show_fingerprints(folder)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The member.")], home: Home = None) -> None:
    """Shut a member out: its keys are refused at the next call. Jobs that need it stop.

    Example: xinyi-server revoke bank_b
    """
    folder = enrolment.home_folder(home)
    with _refusals():
        member = enrolment.revoke(folder, name, datetime.now(UTC))
        typer.echo(f"{name} is revoked")
        if superlink.healthy(folder):
            superlink.unregister(folder, member.node_id)


@app.command()
def renew(home: Home = None) -> None:
    """Make a fresh TLS certificate of this host from the coordinator's CA; takes effect at the next start.

    Example: xinyi-server renew --home ~/.xinyi-server
    """
    folder = enrolment.home_folder(home)
    with _refusals():
        enrolment.renew(folder, enrolment.settings_of(folder), datetime.now(UTC))
    typer.echo("renewed; restart the coordinator: xinyi-server down, xinyi-server up")


@app.command()
def up(
    home: Home = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it is up; stop it with `down`.")] = False,
) -> None:
    """Run SuperLink, guard and SuperExec until stopped; what ends is started again.

    Example: xinyi-server up --detach
    """
    folder = enrolment.home_folder(home)
    with _refusals():
        settings = enrolment.settings_of(folder)
        if detach:
            pid = superlink.up_detached(folder)
            typer.echo(f"up: {settings.host}:{settings.fleet_port}, process {pid}, logs in {folder / 'logs'}")
        else:
            superlink.up(folder, lambda line: typer.echo(line))


@app.command()
def down(home: Home = None) -> None:
    """Stop the coordinator. Stop the nodes first where you can: Flower lets them return sooner then.

    Example: xinyi-server down --home ~/.xinyi-server
    """
    with _refusals():
        typer.echo("stopped" if superlink.down(enrolment.home_folder(home)) else "it did not run")


def _status(home: Path) -> list[Table]:
    """Members with their connection, open invitations, and runs."""
    book = enrolment.read_book(home)
    running = superlink.healthy(home)
    online = superlink.nodes(home) if running else {}
    members = Table("institution", "role", "identity", "connection", title="members")
    for member in book.members:
        if member.revoked:
            state = f"revoked {member.revoked:%Y-%m-%d %H:%M}"
        else:
            state = online.get(member.node_id, "not registered") if running else "coordinator is down"
        members.add_row(member.name, member.role, fingerprint(bytes.fromhex(member.identity)), state)
    joined = {member.name for member in book.current()}
    for invited in book.invited:
        if invited.name not in joined:
            late = invited.expires <= datetime.now(UTC)
            state = "invitation expired" if late else f"invited until {invited.expires:%Y-%m-%d %H:%M}"
            members.add_row(invited.name, invited.role, "", state)
    tables = [members]
    if running:
        listed = Table("run", "status", "started (UTC)", "what it said", title="runs")
        for run in superlink.runs(home):
            listed.add_row(
                str(run.get("run-id")),
                str(run.get("status")),
                str(run.get("starting-at", "")),
                str(run.get("status-details", "")),
            )
        tables.append(listed)
    return tables


@app.command()
def status(home: Home = None) -> None:
    """Who is a member, who is connected, which runs there are, and what the processes do.

    Example: xinyi-server status --home ~/.xinyi-server
    """
    folder = enrolment.home_folder(home)
    with _refusals():
        settings = enrolment.settings_of(folder)
        console = Console()
        pid = running_supervisor(folder / "superlink" / "processes.json")
        state = f"up, process {pid}" if pid else "down"
        console.print(f"{settings.federation} at {settings.host}:{settings.fleet_port}: {state}", markup=False)
        _show_fingerprints(folder)
        for table in _status(folder):
            console.print(table)


@app.command()
def watch(
    home: Home = None, every: Annotated[float, typer.Option(min=1.0, help="Seconds between two looks.")] = 3.0
) -> None:
    """Show the status again and again until Ctrl-C.

    Example: xinyi-server watch --every 10
    """
    from rich.console import Group
    from rich.live import Live

    folder = enrolment.home_folder(home)
    with _refusals(), Live(Group(*_status(folder)), refresh_per_second=2) as live:
        try:
            while True:
                time.sleep(every)
                live.update(Group(*_status(folder)))
        except KeyboardInterrupt:
            pass


@app.command()
def models(home: Home = None) -> None:
    """List the finished jobs of this coordinator and where their results are.

    Example: xinyi-server models --home ~/.xinyi-server
    """
    folder = enrolment.home_folder(home)
    with _refusals():
        enrolment.settings_of(folder)
    table = Table("job", "finished (UTC)", "folder")
    for result in sorted((folder / "jobs").rglob("result.json")):  # the run store writes it last
        moment = datetime.fromtimestamp(result.stat().st_mtime, UTC)
        job = result.relative_to(folder / "jobs").parts[0]
        table.add_row(job, f"{moment:%Y-%m-%d %H:%M}", str(result.parent))
    Console().print(table)


@app.command()
def explain(contract: Annotated[Path, typer.Argument(help="A contract.json, as a run writes it.")]) -> None:
    """Say in plain words what a contract's job does and who sees what.

    Example: xinyi-server explain out/demo/run/contract.json
    """
    try:
        terms = Contract.model_validate_json(contract.read_bytes())
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


def main() -> None:
    app()
