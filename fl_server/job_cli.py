"""`xinyi-server job`: drafts, signatures, invitations. It only parses and prints."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fl_clients.contract import COORDINATOR, SignedContract
from fl_clients.courier import client_app, vault_at
from fl_server import deployed_job, enrolment, job_folder, superlink
from fl_server.coordinator import Coordinator, JobStoppedError, Watch
from fl_server.job_draft import contract_of
from fl_server.memory_grid import MemoryGrid
from fl_server.run_store import outcome_figures, write_outcome
from privacy.errors import Refused
from privacy.identity import fingerprint

job_app = typer.Typer(help="Jobs: draft a contract, collect signatures, invite.", no_args_is_help=True)

REFUSED = 2

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help=f"Home of the coordinator ({job_folder.HOME_VARIABLE}, else ~/.xinyi-server)."),
]
JobArgument = Annotated[str, typer.Argument(help="Number of the job, or an unambiguous beginning of it.")]


@contextmanager
def one_line() -> Iterator[None]:
    """What is refused ends in one line and exit code 2."""
    try:
        yield
    except (Refused, JobStoppedError, OSError) as error:
        text = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {text}", markup=False)
        raise typer.Exit(REFUSED) from None


def _say(text: str) -> None:
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


@job_app.command()
def new(
    file: Annotated[Path, typer.Argument(help="A draft (TOML) that names the parties' cards.")],
    home: HomeOption = None,
) -> None:
    """Make a contract from a draft, under a new number; nobody has signed it yet.

    Example: xinyi-server job new sme.toml
    """
    with one_line():
        folder = job_folder.server_home(home)
        identity = job_folder.coordinator_identity(folder)
        contract = contract_of(file, job=secrets.token_hex(16), coordinator=identity.public, now=datetime.now(UTC))
        job_folder.save(folder, SignedContract(contract=contract))
        _say(f"job {contract.job}, contract {contract.hash.hex()[:16]}")
        _say(f"valid until {contract.expires:%Y-%m-%d %H:%M} UTC")
        for party in contract.parties:
            _say(f"  {party.name} ({party.role}), {len(party.columns)} columns, key {_key(party.identity)}")
        _say(f"compare the fingerprints by telephone, then: xinyi-server job sign {contract.job[:8]}")


@job_app.command()
def sign(
    job: JobArgument,
    files: Annotated[list[Path] | None, typer.Argument(help="Signature files of the parties.")] = None,
    home: HomeOption = None,
) -> None:
    """Sign as the coordinator, and add the signatures that the parties sent back; each is checked.

    Example: xinyi-server job sign 5f0c 5f0c.bank1.signature.json 5f0c.pboc.signature.json
    """
    with one_line():
        folder = job_folder.server_home(home)
        signed = job_folder.load(folder, job)
        if COORDINATOR not in signed.signatures:
            signed = signed.signed(COORDINATOR, job_folder.coordinator_identity(folder))
        signed = job_folder.with_signatures(signed, files or ())
        job_folder.save(folder, signed)
        _say(_standing(signed))


@job_app.command()
def invite(
    job: JobArgument,
    out: Annotated[Path, typer.Option(help="Folder for one file per party.")],
    home: HomeOption = None,
) -> None:
    """Write one file per party: first to approve, and again when everyone signed.

    Example: xinyi-server job invite 5f0c --out invitations
    """
    with one_line():
        signed = job_folder.load(job_folder.server_home(home), job)
        for path in job_folder.invite(signed, out):
            _say(f"written {path}")
        _say(_standing(signed))


@job_app.command("list")
def list_jobs(home: HomeOption = None) -> None:
    """All jobs and whose signatures are missing.

    Example: xinyi-server job list
    """
    with one_line():
        every = job_folder.load_all(job_folder.server_home(home))
    shown = Table("job", "purpose", "expires (UTC)", "signatures missing")
    for signed in every:
        contract = signed.contract
        lacking = ", ".join(job_folder.missing(signed)) or "none"
        shown.add_row(contract.job[:8], contract.purpose, f"{contract.expires:%Y-%m-%d %H:%M}", lacking)
    Console().print(shown)


@job_app.command()
def show(job: JobArgument, home: HomeOption = None) -> None:
    """One job: its terms, parties and signatures.

    Example: xinyi-server job show 5f0c
    """
    with one_line():
        signed = job_folder.load(job_folder.server_home(home), job)
    contract = signed.contract
    epsilon = "none (simulation)" if contract.privacy.epsilon is None else f"{contract.privacy.epsilon:g}"
    _say(f"job {contract.job}, contract {contract.hash.hex()}")
    _say(f"purpose {contract.purpose}; scenario {contract.scenario}; label {contract.label.definition}")
    _say(f"epsilon {epsilon}, {contract.uses} uses, {contract.model.rounds} rounds")
    _say(f"valid {contract.not_before:%Y-%m-%d %H:%M} to {contract.expires:%Y-%m-%d %H:%M} UTC")
    table = Table("party", "role", "key", "columns", "signed")
    for party in contract.parties:
        columns = ", ".join(column.name for column in party.columns)
        table.add_row(
            party.name, party.role, _key(party.identity), columns, "yes" if party.name in signed.signatures else "no"
        )
    Console().print(table)
    _say(_standing(signed))


@job_app.command()
def start(
    job: JobArgument,
    vaults: Annotated[
        list[str] | None,
        typer.Option("--vault", help="party=socket of its vault, once for each party; without it, over the network."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Run a job that everyone signed: over Flower and the lanes of the connected institutions, or over sockets here.

    Example: xinyi-server job start 5f0c
    """
    with one_line():
        folder = job_folder.server_home(home)
        signed = job_folder.load(folder, job)
        signed.check_all()
        if vaults:
            use, out, metrics = _over_sockets(folder, signed, _sockets(signed, vaults))
        else:
            use, out, metrics = _over_the_network(folder, signed)
    if metrics is None:
        _say("pooled metrics: the noise of this epsilon drowns the held-out rows")
    else:
        _say(f"pooled AUC {metrics['auc']:.4f} (noise {metrics['auc_noise_std']:.4f}), KS {metrics['ks']:.4f}")
    _say(f"run {use} of {signed.contract.uses}: {out}")
    _say(f"next: xinyi-audit certificate {out / 'certificate.json'}")


_Finished = tuple[int, Path, dict[str, float] | None]
"""Number of the run, folder of its result, pooled metrics."""


def _over_sockets(folder: Path, signed: SignedContract, sockets: dict[str, str]) -> _Finished:
    identity = job_folder.coordinator_identity(folder)
    use, out = job_folder.begin_run(folder, signed)
    nodes = dict(enumerate(sockets.values(), start=1))
    courier = client_app(lambda context: vault_at(nodes[context.node_id]))
    grid = MemoryGrid(courier, {node: {} for node in nodes})
    with _progress() as watch:
        outcome = Coordinator(grid=grid, signed=signed, identity=identity, use=use, watch=watch).run()
    write_outcome(out, signed, outcome)
    return use, out, outcome_figures(signed.contract, outcome)["pooled_metrics"]


def _over_the_network(folder: Path, signed: SignedContract) -> _Finished:
    deployed_job.nodes_of(enrolment.read_book(folder), signed.contract)
    if not superlink.healthy(folder):
        raise Refused("the coordinator is down; start it with `xinyi-server up`, or name sockets with --vault")
    use, out = job_folder.begin_run(folder, signed)
    run = superlink.start_run(folder, job=signed.contract.job, use=use)
    with _progress() as watch:
        deployed_job.follow(folder, run, out, watch)
    return use, out, json.loads((out / "result.json").read_text(encoding="utf-8"))["pooled_metrics"]


def _sockets(signed: SignedContract, told: list[str]) -> dict[str, str]:
    """Party -> gRPC address of its vault; one for each party of the contract."""
    sockets: dict[str, str] = {}
    for text in told:
        party, separator, path = text.rpartition("=")
        if not separator or not path:
            raise Refused(f"--vault {text!r}: write it as party=socket")
        signed.contract.party(party)
        sockets[party] = path if ":" in path else f"unix:{Path(path).resolve()}"
    if lacking := [party.name for party in signed.contract.parties if party.name not in sockets]:
        raise Refused(f"no --vault for {', '.join(lacking)}")
    return sockets


@contextmanager
def _progress() -> Iterator[Watch]:
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("start", total=None)
        yield lambda done, total, step: progress.update(task, completed=done, total=total, description=step)


def _standing(signed: SignedContract) -> str:
    short, lacking = signed.contract.job[:8], job_folder.missing(signed)
    if COORDINATOR in lacking:
        return f"job {short} is a draft; next: xinyi-server job sign {short}"
    if lacking:
        return f"job {short} lacks the signatures of {', '.join(lacking)}; invite them: xinyi-server job invite {short}"
    return f"job {short} is signed by everyone; invite again so that each party has all signatures"


def _key(identity: str) -> str:
    return fingerprint(bytes.fromhex(identity))
