"""`xinyi-audit` for an auditor, offline, and `xinyi-node audit` for a party: they only parse and print.

Exit code 0: clean. 1: something is wrong with a log, the party is named. 2: bad input.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fl_clients import auditor
from fl_clients import certificate as certificates
from fl_clients.auditor import NotProved, Report
from privacy.audit_format import LOG_FILE, PARTY_FILE
from privacy.errors import Refused
from privacy.identity import fingerprint

FOUND, BAD_INPUT = 1, 2

app = typer.Typer(
    help="Verify audit logs of parties, offline, without their programs. 离线核验各方审计日志。",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
audit_app = typer.Typer(
    help="This institution's audit log: verify, export, prove. 本机构审计日志。", no_args_is_help=True
)

Home = Annotated[Path, typer.Option(envvar="XINYI_HOME", help="The institution's folder.")]
Out = Annotated[Path, typer.Option(help="Must not exist yet.")]
DEFAULT_HOME = Path("~/.xinyi")


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (Refused, OSError) as error:
        text = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {text}", markup=False)
        raise typer.Exit(BAD_INPUT) from None


def _say(text: str) -> None:
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


@app.callback()
def _xinyi() -> None:
    pass


@app.command()
def verify(paths: Annotated[list[Path], typer.Argument(help="Audit folders, exports or excerpts.")]) -> None:
    """Check logs on their own and against each other; names the party whose log was changed or forked.

    Example: xinyi-audit verify bank1-audit bank2-audit pboc-audit
    """
    with _one_line():
        report = auditor.verify(paths)
    _print(report)


@app.command("check-proof")
def check_proof(
    file: Annotated[Path, typer.Argument(help="Written by `xinyi-node audit prove` or `export --job`.")],
    identity: Annotated[str | None, typer.Option(help="The party's public key (hex), as you know it.")] = None,
) -> None:
    """Check that the entries in a file are in the log that its party signed.

    Example: xinyi-audit check-proof entry17.json --identity 8d1f...
    """
    with _one_line():
        try:
            excerpt = auditor.read_excerpt(file)
            if identity is not None and excerpt.public.hex() != identity.strip().lower():
                raise NotProved(excerpt.party, f"signed by the key {excerpt.public.hex()}, not by the one you gave")
        except NotProved as error:
            _say(f"NOT PROVED 未证明: {error}")
            raise typer.Exit(FOUND) from None
    head = excerpt.head
    _say(f"{excerpt.party} signed a log of {head.size} entries on {head.time} that has these {len(excerpt.proofs)}:")
    for proof in excerpt.proofs:
        entry = proof.entry
        body = json.dumps(entry.body, ensure_ascii=False, sort_keys=True)
        _say(f"{entry.index:>8}  {entry.time}  {entry.kind}  {entry.job or '-'}  {body}")
    _say(f"identity fingerprint {fingerprint(excerpt.public)}: compare it with the one you know 请核对身份指纹")


@app.command()
def certificate(
    file: Annotated[Path, typer.Argument(help="certificate.json of a run.")],
    known: Annotated[
        list[str] | None, typer.Option("--identity", help="name=public key (hex), as you know it.")
    ] = None,
) -> None:
    """Verify a privacy certificate from its file alone: signatures, receipts, heads, and epsilon composed again.

    Example: xinyi-audit certificate certificate.json --identity pboc=8d1f...
    """
    with _one_line():
        try:
            whole = json.loads(file.read_bytes())
        except ValueError:
            raise Refused(f"{file} is no JSON file; give the certificate.json of a run") from None
        wanted = dict(_pair(text) for text in known or [])
        try:
            body = certificates.check(whole if isinstance(whole, dict) else {})
            contract = body.signed.contract
            for name, key in wanted.items():
                if contract.identity_of(name).hex() != key:
                    raise Refused(f"the contract has another key for {name} than the one you gave")
        except Refused as error:
            _say(f"NOT VALID 无效: {error}")
            raise typer.Exit(FOUND) from None
    privacy = body.facts["privacy"]
    spent = "none: exact sums, simulation only" if privacy["epsilon"] is None else f"{privacy['epsilon']:.6g}"
    shown = Table("party 机构", "role", "identity fingerprint 身份指纹", "log entries", "ledger after the run")
    for name, receipt in body.receipts.items():
        party = body.facts["parties"][name]
        ledger = receipt["spent"]
        after = f"epsilon {ledger['epsilon']}" if "epsilon" in ledger else f"openings {ledger['score_openings']}"
        shown.add_row(name, party["role"], party["identity"], str(body.heads[name].size), after)
    Console().print(shown)
    _say(f"job {contract.job}, run {body.use} of {contract.uses}, contract {contract.hash.hex()}")
    _say(
        f"epsilon {spent}" + ("" if privacy["epsilon"] is None else f" at delta {privacy['delta']:.3g}, composed again")
    )
    for line in (privacy["covers"], privacy["owners"], privacy["assumes"]):
        _say(line)
    _say(f"valid 有效: signed by {', '.join(['the coordinator', *body.receipts])}; compare the fingerprints you know")


def _pair(text: str) -> tuple[str, str]:
    name, _, key = text.rpartition("=")
    if not name:
        raise Refused(f"--identity {text!r}: write it as name=public key")
    return name, key.strip().lower()


@audit_app.command("verify")
def verify_own(
    paths: Annotated[list[Path] | None, typer.Argument(help="Exports of other parties, to compare with.")] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Check this institution's log, also against exports of other parties.

    Example: xinyi-node audit verify
    """
    with _one_line():
        report = auditor.verify([_folder(home), *(paths or [])])
    _print(report)


@audit_app.command()
def export(
    out: Out,
    job: Annotated[str | None, typer.Option(help="Only the entries of this job, each with its proof.")] = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Write a copy of the log for an auditor (a folder), or the proved entries of one job (a file).

    Example: xinyi-node audit export --out bank1-audit
    """
    with _one_line():
        log = auditor.read_log(_folder(home))
        if job is not None:
            data = auditor.excerpt_of(log, auditor.of_job(log, job))
            _write(out, data)
        else:
            about, lines = auditor.whole(log)
            out.mkdir(mode=0o700)
            _write(out / PARTY_FILE, about)
            _write(out / LOG_FILE, lines)
    _say(f"wrote {out}")


@audit_app.command()
def prove(
    index: Annotated[int, typer.Argument(help="The entry's index, from 0.")], out: Out, home: Home = DEFAULT_HOME
) -> None:
    """Write one entry with the proof that it is in the log.

    Example: xinyi-node audit prove 17 --out entry17.json
    """
    with _one_line():
        log = auditor.read_log(_folder(home))
        _write(out, auditor.excerpt_of(log, [index]))
    _say(f"wrote {out}; anybody can check it: xinyi-audit check-proof {out}")


def _folder(home: Path) -> Path:
    return home.expanduser() / "audit"


def _write(path: Path, data: bytes) -> None:
    """A new file of mode 0600; an existing one is never written over."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(data)


def _print(report: Report) -> None:
    """The table, notes and findings; leaves with exit code 1 if there are findings."""
    table = Table(
        "party 机构", "entries 条目", "signed heads", "last head", "releases", "refusals", "identity fingerprint"
    )
    for log in report.logs:
        last = log.heads[-1].time if log.heads else "-"
        counts = (len(log.lines), len(log.heads), last, log.kinds["release"], log.kinds["refusal"])
        table.add_row(log.party, *map(str, counts), fingerprint(log.public))
    for excerpt in report.excerpts:
        told = f"{len(excerpt.proofs)} of {excerpt.head.size}"
        table.add_row(excerpt.party, told, "1", excerpt.head.time, "-", "-", fingerprint(excerpt.public))
    Console(width=160).print(table)
    for note in report.notes:
        _say(f"note 提示: {note}")
    for finding in report.findings:
        _say(f"FOUND 发现问题: {finding.party}: {finding.text}")
    if report.findings:
        raise typer.Exit(FOUND)
    _say("clean 无异常: every entry is as its party signed it, and fits what the other given logs saw")


def main() -> None:
    app()
