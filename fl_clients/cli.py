"""`xinyi-node`: the institution's command. It only parses and prints."""

from pathlib import Path
from typing import Annotated

import typer

from fl_clients import at_home, enrolment, institution, node_cli
from fl_clients.at_home import HomeOption
from fl_clients.audit_cli import audit_app
from fl_clients.contract import Role
from fl_clients.data_cli import consent_app, data_app
from fl_clients.institution import Secrets
from fl_clients.job_cli import budget, job_app
from fl_clients.people_cli import card, people_app, policy_app
from fl_clients.serve_cli import name_data, purge_models, serve_job
from privacy import passphrase
from privacy.errors import Refused
from privacy.identity import SigningIdentity, fingerprint

app = typer.Typer(
    help="An institution's node: identity, connection, people and policy, data and consents, jobs, budget, audit log.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(data_app, name="data")
app.add_typer(consent_app, name="consent")
app.add_typer(people_app, name="people")
app.add_typer(policy_app, name="policy")
app.add_typer(job_app, name="job")
app.add_typer(audit_app, name="audit")
app.command()(card)
app.command()(budget)
app.command()(node_cli.join)
app.command()(node_cli.check)
app.command()(node_cli.run)
app.command()(node_cli.down)
job_app.command("data")(name_data)
job_app.command("serve")(serve_job)
job_app.command("purge")(purge_models)


@app.callback()
def _xinyi() -> None:
    pass


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the institution, as contracts will have it.")],
    role: Annotated[Role, typer.Option(help="bank, pboc or public_credit.")],
    secrets: Annotated[Secrets, typer.Option(help="plain (mode 0600 alone), passphrase, or keyring.")] = "plain",
    home: HomeOption = None,
) -> None:
    """Make the institution's home: identity, node keys, ledger, job book, audit log; check disk and database.

    Example: xinyi-node init bank1 --role bank
    """
    with at_home.one_line():
        folder = institution.home_folder(home)
        key = folder / institution.IDENTITY
        phrase = None
        if secrets == "passphrase":
            phrase = passphrase.for_new_key(key, passphrase.FILE_VARIABLE)
        elif secrets == "keyring":
            phrase = passphrase.generated()
            passphrase.to_keyring(key, phrase)
        institution.create(folder, name, role, secrets, phrase)
        enrolment.make_node_keys(folder)
        with at_home.at_home(home) as opened:
            at_home.say(f"made {folder} of {name} ({role})")
            at_home.say(f"public key   {opened.identity.public.hex()}")
            at_home.say(f"fingerprint  {fingerprint(opened.identity.public)}")
        if not node_cli.print_checks(folder):
            raise typer.Exit(1)


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
