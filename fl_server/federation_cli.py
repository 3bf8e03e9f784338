"""`xinyi-server`: the federation and its processes (init, invite, up, status, revoke...). It only parses and prints."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fl_clients.contract import Role
from fl_clients.processes import running_supervisor
from fl_clients.tls import certificate_fingerprint
from fl_server import enrolment, job_folder, superlink
from fl_server.job_cli import HomeOption, one_line
from privacy.errors import Refused
from privacy.identity import fingerprint


def init(
    host: Annotated[
        str, typer.Argument(help="Name or address under which institutions reach this machine; else this machine only.")
    ] = "localhost",
    home: HomeOption = None,
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
    folder = job_folder.server_home(home)
    with one_line():
        try:
            settings = enrolment.Settings(
                federation=federation,
                host=host,
                bind=enrolment.LOOPBACK if host in ("localhost", enrolment.LOOPBACK) else enrolment.EVERYWHERE,
                fleet_port=port,
                lane_port=port + 1,
                private_port=port + 2,
                hub_port=port + 3,
            )
        except ValidationError as error:
            raise Refused(f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from None
        files = (certificate, key, root) if certificate and key and root else None
        enrolment.create(folder, settings, datetime.now(UTC), files)
        typer.echo(f"made {folder}, public key {job_folder.coordinator_identity(folder).public.hex()}")
        _show_fingerprints(folder)


def _show_fingerprints(home: Path) -> None:
    typer.echo(f"coordinator  {fingerprint(job_folder.coordinator_identity(home).public)}")
    typer.echo(f"CA           {certificate_fingerprint((home / 'tls' / 'root.crt').read_bytes())}")


def invite(
    names: Annotated[list[str], typer.Argument(help="Institutions as NAME or NAME=ROLE (bank, pboc, public_credit).")],
    home: HomeOption = None,
    days: Annotated[int, typer.Option(min=1, max=90, help="Days until the invitation expires.")] = 7,
) -> None:
    """Write one invitation file for each name; send it over a channel you trust, it lets its holder join once.

    Example: xinyi-server invite bank_a bank_b pboc=pboc
    """
    folder = job_folder.server_home(home)
    roles: dict[str, Role] = {"bank": "bank", "pboc": "pboc", "public_credit": "public_credit"}
    with one_line():
        for item in names:
            name, _, role = item.partition("=")
            if (role or "bank") not in roles:
                raise Refused(f"role {role!r} of {name!r}: a role is one of {', '.join(roles)}")
            typer.echo(str(enrolment.invite(folder, name, roles[role or "bank"], datetime.now(UTC), days)))
        _show_fingerprints(folder)


def revoke(name: Annotated[str, typer.Argument(help="The member.")], home: HomeOption = None) -> None:
    """Shut a member out: its keys are refused at the next call. Jobs that need it stop.

    Example: xinyi-server revoke bank_b
    """
    folder = job_folder.server_home(home)
    with one_line():
        member = enrolment.revoke(folder, name, datetime.now(UTC))
        typer.echo(f"{name} is revoked")
        if superlink.healthy(folder):
            superlink.unregister(folder, member.node_id)


def renew(home: HomeOption = None) -> None:
    """Make a fresh TLS certificate of this host from the coordinator's CA; takes effect at the next start.

    Example: xinyi-server renew --home ~/.xinyi-server
    """
    folder = job_folder.server_home(home)
    with one_line():
        enrolment.renew(folder, enrolment.settings_of(folder), datetime.now(UTC))
    typer.echo("renewed; restart the coordinator: xinyi-server down, xinyi-server up")


def up(
    home: HomeOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it is up; stop it with `down`.")] = False,
) -> None:
    """Run SuperLink, guard and SuperExec until stopped; what ends is started again.

    Example: xinyi-server up --detach
    """
    folder = job_folder.server_home(home)
    with one_line():
        settings = enrolment.settings_of(folder)
        if detach:
            pid = superlink.up_detached(folder)
            typer.echo(f"up: {settings.host}:{settings.fleet_port}, process {pid}, logs in {folder / 'logs'}")
        else:
            superlink.up(folder, lambda line: typer.echo(line))


def down(home: HomeOption = None) -> None:
    """Stop the coordinator. Stop the nodes first where you can: Flower lets them return sooner then.

    Example: xinyi-server down --home ~/.xinyi-server
    """
    with one_line():
        typer.echo("stopped" if superlink.down(job_folder.server_home(home)) else "it did not run")


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


def status(home: HomeOption = None) -> None:
    """Who is a member, who is connected, which runs there are, and what the processes do.

    Example: xinyi-server status --home ~/.xinyi-server
    """
    folder = job_folder.server_home(home)
    with one_line():
        settings = enrolment.settings_of(folder)
        console = Console()
        pid = running_supervisor(folder / "superlink" / "processes.json")
        state = f"up, process {pid}" if pid else "down"
        console.print(f"{settings.federation} at {settings.host}:{settings.fleet_port}: {state}", markup=False)
        _show_fingerprints(folder)
        for table in _status(folder):
            console.print(table)


def watch(
    home: HomeOption = None, every: Annotated[float, typer.Option(min=1.0, help="Seconds between two looks.")] = 3.0
) -> None:
    """Show the status again and again until Ctrl-C.

    Example: xinyi-server watch --every 10
    """
    from rich.console import Group
    from rich.live import Live

    folder = job_folder.server_home(home)
    with one_line(), Live(Group(*_status(folder)), refresh_per_second=2) as live:
        try:
            while True:
                time.sleep(every)
                live.update(Group(*_status(folder)))
        except KeyboardInterrupt:
            pass


def models(home: HomeOption = None) -> None:
    """List the finished jobs of this coordinator and where their results are.

    Example: xinyi-server models --home ~/.xinyi-server
    """
    folder = job_folder.server_home(home)
    with one_line():
        enrolment.settings_of(folder)
    table = Table("job", "finished (UTC)", "folder")
    for result in sorted((folder / "jobs").rglob("result.json")):  # the run store writes it last
        moment = datetime.fromtimestamp(result.stat().st_mtime, UTC)
        job = result.relative_to(folder / "jobs").parts[0]
        table.add_row(job, f"{moment:%Y-%m-%d %H:%M}", str(result.parent))
    Console().print(table)
