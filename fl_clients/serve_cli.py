"""`xinyi-node job data` and `job serve`: name a job's table, let its vault answer. They only parse and print."""

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from fl_clients import at_home, job_vault
from fl_clients.at_home import HomeOption, say
from fl_clients.job_vault import DataBinding
from fl_clients.vault_service import serve
from privacy.errors import Refused

JobArgument = Annotated[str, typer.Argument(help="Number of the job, or an unambiguous beginning of it.")]


def name_data(
    job: JobArgument,
    mapping: Annotated[Path, typer.Option(help="The mapping file of the table.")],
    check: Annotated[Path, typer.Option(help="Folder of its last `data check`.")],
    consents: Annotated[Path, typer.Option(help="The consent store.")],
    data_set: Annotated[str, typer.Option(help="Name of the table in the ledger, the same in every job.")],
    label: Annotated[str | None, typer.Option(help="Label field, of a bank.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of a bank's rows that are scored, never trained on.")] = 0.3,
    home: HomeOption = None,
) -> None:
    """Name the checked table that a job uses; it is loaded once to see that it fits the contract.

    Example: xinyi-node job data 5f0c --mapping loans.toml --check checks/loans --consents consent.sqlite
    --data-set loans --label bad12
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        binding = DataBinding(
            mapping=mapping.resolve(),
            receipt=(check / "receipt.json").resolve(),
            consents=consents.resolve(),
            data_set=data_set,
            label=label,
            held_out=held_out,
        )
        say(f"written {job_vault.bind(institution, job, binding)}; next: xinyi-node job serve {job}")


def serve_job(
    job: JobArgument,
    socket: Annotated[Path, typer.Option(help="Unix socket of the vault, mode 0600.")],
    home: HomeOption = None,
) -> None:
    """Let the vault of an approved job answer on a socket, until its run is closed or Ctrl-C.

    Example: xinyi-node job serve 5f0c --socket /run/xinyi/bank1.sock
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        vault = job_vault.job_vault(institution, job)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        if socket.exists() and not socket.is_socket():
            raise Refused(f"{socket} is a file; name a socket that this vault may replace")
        socket.unlink(missing_ok=True)
        with serve(institution.name, vault.handle, socket):
            say(f"{institution.name} answers for job {job} on {socket}")
            expires = vault.vault.contract.expires
            while not stop.wait(0.2) and not vault.vault.is_certified and institution.clock() < expires:
                pass
        vault.close("the contract expired" if institution.clock() >= expires else "the vault was stopped")
        socket.unlink(missing_ok=True)
    if vault.vault.is_closed:
        say(f"run {vault.vault.use} is closed; model: {vault.folder / f'model.{vault.vault.use}.json'}")
    else:
        say("stopped before the end of the run; what was reserved in the ledger stays spent")


def purge_models(home: HomeOption = None) -> None:
    """Erase the models of jobs whose retention is over; each is logged.

    Example: xinyi-node job purge
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        gone = job_vault.purge(institution)
    for path in gone:
        say(f"erased {path}")
    say(f"{len(gone)} models erased")
