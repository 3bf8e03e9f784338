"""`xinyi-node job` and `xinyi-node budget`: they only parse and print; approval.py decides."""

from datetime import UTC
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fl_clients import approval, at_home, plain_words
from fl_clients.approval import own_objections, spent_epsilon
from fl_clients.at_home import AsOption, HomeOption, KeyOption, say
from fl_clients.contract import SignedContract
from fl_clients.decision import Decision, Verdict, decide
from fl_clients.institution import Institution
from fl_clients.job_book import JobEntry, JobState
from fl_clients.plain_words import Language
from fl_clients.policy import number
from fl_clients.rules import Rules, rules
from privacy.errors import Refused
from privacy.private_file import write_private

job_app = typer.Typer(help="Jobs that the institution was asked to take part in.", no_args_is_help=True)

JobArgument = Annotated[str, typer.Argument(help="Number of the job, or an unambiguous beginning of it.")]
DataSet = Annotated[
    str | None, typer.Option(help="Data set whose spent epsilon counts; else that of the one that spent most.")
]
Out = Annotated[Path, typer.Option(help="Folder for the signature file.")]


@job_app.command()
def receive(
    file: Annotated[Path, typer.Argument(help="A contract from the coordinator, or with everyone's signatures.")],
    data_set: DataSet = None,
    out: Out = Path("."),
    home: HomeOption = None,
) -> None:
    """Take in a contract; nothing is allowed by that, unless the policy approves such jobs by itself.

    Again, after approval: writes the signature file once more; with everyone's signatures: the job may be run.

    Example: xinyi-node job receive 5f0c.bank1.contract.json
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        _check_folder(out)
        signed = SignedContract.model_validate_json(file.read_bytes())
        in_force = rules(institution)
        spent = spent_epsilon(institution, in_force, data_set)
        entry = approval.receive(institution, in_force, signed, spent)
        job = entry.contract.job
        if entry.state is JobState.AUTHORISED and set(entry.signed.signatures) != set(entry.contract.signers):
            say(f"job {job} is approved here; send back {_write_signature(institution, entry, out)}")
        elif entry.state is JobState.NOTIFIED:
            for line in plain_words.describe_objections(
                own_objections(institution, in_force, entry.contract, spent), "en"
            ):
                say(line)
            say(f"received job {job}; next: xinyi-node job show {job[:8]}")
        else:
            signatures = f"{len(entry.signed.signatures)} signatures of {len(entry.contract.signers)}"
            say(f"job {job} is {entry.state}; {signatures}")


@job_app.command("list")
def list_jobs(home: HomeOption = None) -> None:
    """All jobs and where they stand.

    Example: xinyi-node job list
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        entries = institution.jobs.all()
    shown = Table("job", "state", "uses", "epsilon", "expires (UTC)", "signatures", "purpose")
    for entry in entries:
        contract = entry.contract
        epsilon = "none" if contract.privacy.epsilon is None else f"{contract.privacy.epsilon:g}"
        signatures = f"{len(entry.signed.signatures)} of {len(contract.signers)}"
        expires = f"{contract.expires.astimezone(UTC):%Y-%m-%d %H:%M}"
        uses = f"{entry.uses} of {contract.uses}"
        shown.add_row(contract.job[:8], entry.state, uses, epsilon, expires, signatures, contract.purpose)
    Console().print(shown)


@job_app.command()
def show(
    job: JobArgument,
    language: Annotated[Language, typer.Option(help="en or zh.")] = "en",
    data_set: DataSet = None,
    home: HomeOption = None,
) -> None:
    """Say in plain words what the job would use, what would leave, to whom, at what epsilon, and the known leaks.

    Example: xinyi-node job show 5f0c --language zh
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        in_force = rules(institution)
        entry = institution.jobs.get(job)
        spent = spent_epsilon(institution, in_force, data_set)
        lines = plain_words.describe(entry.contract, institution.name, in_force.policy, spent, language)
        found = own_objections(institution, in_force, entry.contract, spent)
    for line in (*lines, *plain_words.describe_objections(found, language)):
        say(line)
    state = f"状态：{entry.state}" if language == "zh" else f"State: {entry.state}"
    say(f"{state}{' (' + entry.reason + ')' if entry.reason else ''}")


@job_app.command()
def approve(
    job: JobArgument,
    name: AsOption,
    key: KeyOption,
    reason: Annotated[str, typer.Option(help="Goes into the audit log.")] = "",
    data_set: DataSet = None,
    out: Out = Path("."),
    home: HomeOption = None,
) -> None:
    """Approve a job as an approver, sign its contract, and write the signature for the coordinator.

    Example: xinyi-node job approve 5f0c --as "Li Na" --key lina.key
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        _check_folder(out)
        in_force = rules(institution)
        decision = _decision(institution, in_force, job, name, key, "approve", reason)
        spent = spent_epsilon(institution, in_force, data_set)
        entry = approval.approve(institution, in_force, decision, spent)
        say(f"approved by {name}; send back {_write_signature(institution, entry, out)}")


@job_app.command()
def refuse(
    job: JobArgument,
    name: AsOption,
    key: KeyOption,
    reason: Annotated[str, typer.Option(help="Why; goes into the audit log.")],
    home: HomeOption = None,
) -> None:
    """Refuse a job for good, as an approver; also one that was approved and has not begun.

    Example: xinyi-node job refuse 5f0c --as "Li Na" --key lina.key --reason "purpose not agreed"
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        in_force = rules(institution)
        decision = _decision(institution, in_force, job, name, key, "refuse", reason)
        entry = approval.refuse(institution, in_force, decision)
        say(f"job {entry.contract.job} refused by {name}: {entry.reason}")


def budget(home: HomeOption = None) -> None:
    """What every data set has spent, by job: epsilon at the policy's delta, and score openings.

    Example: xinyi-node budget
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        policy = rules(institution).policy
        ledger = institution.ledger
        spent = [ledger.spent(name, policy.delta) for name in ledger.data_sets()]
        openings = [ledger.openings(name) for name in ledger.data_sets()]
    limit = policy.total_limit
    shown = Table("data set", "job", "use", "time (UTC)", "epsilon", title=f"epsilon at delta {policy.delta:.3g}")
    for one in spent:
        for use in one.uses:
            when = f"{use.time.astimezone(UTC):%Y-%m-%d %H:%M}"
            shown.add_row(one.data_set, use.job[:8], str(use.use), when, number(use.epsilon))
        left = number(max(0.0, limit - one.epsilon)) if one.epsilon < limit else "0"
        total = f"{number(one.epsilon)} of {number(limit)}, left {left}"
        shown.add_row(one.data_set, "all jobs", str(len(one.uses)), "", total, end_section=True)
    Console().print(shown)
    opened = Table("data set", "openings", "enterprises", title=f"score openings, at most {policy.most_score_openings}")
    for counts in openings:
        for times, enterprises in sorted(counts.histogram.items()):
            opened.add_row(counts.data_set, str(times), f"{enterprises:,}")
    if opened.row_count:
        Console().print(opened)


def _decision(
    institution: Institution, in_force: Rules, job: str, name: str, key: Path, verdict: Verdict, reason: str
) -> Decision:
    in_force.people.with_role(name, "approver", "decide on jobs")  # before anybody types a passphrase
    return decide(
        institution.jobs.get(job).contract,
        institution=institution.name,
        person=name,
        key=at_home.person_key(key),
        verdict=verdict,
        reason=reason,
        now=institution.clock(),
    )


def _check_folder(out: Path) -> None:
    if not out.is_dir():
        raise Refused(f"{out} is no folder; make it, or give another --out")


def _write_signature(institution: Institution, entry: JobEntry, out: Path) -> Path:
    path = out / f"{entry.contract.job}.{institution.name}.signature.json"
    write_private(path, entry.signed.model_dump_json().encode())
    return path
