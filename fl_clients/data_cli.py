"""`xinyi-node data` and `xinyi-node consent`: they only parse, ask and print.

The node's command mounts `data_app` and `consent_app`. Bad input ends in one line and exit code 2, a table that the
check refuses in exit code 1.
"""

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fl_clients import data_check, mapping, sources
from fl_clients.at_home import at_home
from fl_clients.consent import ConsentStore, consent_columns
from fl_clients.institution import SETTINGS, home_folder
from fl_clients.mapping import ColumnMapping, TableMapping
from fl_clients.sources import Source
from models import schema as schemas
from models.errors import DataError
from models.schema import Schema
from privacy.audit_format import Entry
from privacy.errors import Refused

SURE = 0.8
BAD_INPUT, REFUSED = 2, 1

data_app = typer.Typer(help="Connect the institution's own table, map its columns, check it.", no_args_is_help=True)
consent_app = typer.Typer(help="Consents of enterprises, by purpose.", no_args_is_help=True)

MappingFile = Annotated[Path, typer.Argument(help="The mapping file (TOML).")]
Store = Annotated[Path, typer.Option(help="The consent store of this node.")]
Purpose = Annotated[str, typer.Option(help="The purpose, as the contract writes it.")]


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (DataError, Refused, OSError) as error:
        text = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {text}", markup=False)
        raise typer.Exit(BAD_INPUT) from None


def _say(text: str) -> None:
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


@data_app.command()
def connect(
    file: MappingFile,
    schema: Annotated[str, typer.Option(help="bank, pboc or public_credit.")],
    path: Annotated[Path | None, typer.Option(help="A CSV or Parquet file.")] = None,
    url: Annotated[str | None, typer.Option(help="postgresql://user@host/db or mysql://user@host/db")] = None,
    table: Annotated[str | None, typer.Option(help="Table (schema.table) in the database.")] = None,
    query: Annotated[str | None, typer.Option(help="Or one SELECT.")] = None,
    password_env: Annotated[str | None, typer.Option(help="Environment variable that has the password.")] = None,
    encoding: Annotated[str, typer.Option(help="Of CSV: auto, utf-8 or gb18030.")] = "auto",
) -> None:
    """Try the connection, show the columns, and begin a mapping file.

    Example: xinyi-node data connect loans.toml --schema bank --url postgresql://reader@db/credit --table public.loans
    """
    with _one_line():
        if file.exists():
            raise DataError(f"{file} exists already; choose another name, or delete it")
        kind = _source_kind(path, url)
        named = {"path": path.resolve() if path else None, "url": url, "table": table, "query": query}
        source = _source({"kind": kind, **named, "password_env": password_env, "encoding": encoding})
        known = schemas.load_schema(schema)
        columns = sources.columns(source)
        begun = TableMapping(schema=known.kind, schema_version=known.version, source=source)
        file.write_text(mapping.dump_mapping(begun), encoding="utf-8")
        shown = Table("column", "type", title=source.describe())
        for name, kind_text in columns.items():
            shown.add_row(name, kind_text)
        Console().print(shown)
        _say(f"written {file}; next: xinyi-node data map {file}")


@data_app.command("map")
def map_columns(
    file: MappingFile,
    yes: Annotated[bool, typer.Option("--yes", help="Take the sure proposals without asking.")] = False,
) -> None:
    """Propose a schema field for each column by its Chinese or English name, and ask.

    Example: xinyi-node data map loans.toml
    """
    with _one_line():
        try:
            begun = mapping.parse_mapping(tomllib.loads(file.read_text(encoding="utf-8")), file.name)
        except (FileNotFoundError, tomllib.TOMLDecodeError) as error:
            raise DataError(f"{file}: no mapping file ({error}); make one with `data connect`") from None
        schema = schemas.load_schema(begun.schema_kind)
        located = begun.source
        if located.path is not None and not located.path.is_absolute():
            located = located.model_copy(update={"path": file.parent / located.path})
        done = {item.source for item in begun.columns.values()}
        names = [name for name in sources.columns(located) if name not in done]
        chosen = dict(begun.columns)
        for proposal in mapping.propose(schema, names):
            if proposal.field is not None and proposal.field in chosen:
                continue
            target = _choose(proposal, schema, chosen, yes)
            if target is not None:
                chosen[target] = ColumnMapping.model_validate(
                    {"from": proposal.column, "unit": _unit(proposal.column, target, schema, yes)}
                )
        finished = begun.model_copy(update={"columns": chosen})
        file.write_text(mapping.dump_mapping(finished), encoding="utf-8")
        _say(f"{len(chosen)} fields mapped in {file}")
        try:
            mapping.check_mapping(finished, schema)
        except DataError as error:
            _say(f"still to do: {error}")
        else:
            _say(f"next: xinyi-node data check {file}")


@data_app.command()
def check(
    file: MappingFile,
    out: Annotated[Path, typer.Option(help="Folder for data-check.html and receipt.json.")] = Path("data-check"),
) -> None:
    """Check the mapped table and write a local report; nothing is sent anywhere.

    Example: xinyi-node data check loans.toml --out checks/loans
    """
    with _one_line():
        mapped, schema = mapping.load_mapping(file)
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        receipt_file = out / "receipt.json"
        last = data_check.load_receipt(receipt_file) if receipt_file.exists() else None
        batches = sources.batches(mapped.source, mapped.source_columns)
        receipt = data_check.check_table(mapped, schema, batches, last=last, today=date.today())
        page = out / "data-check.html"
        page.write_text(data_check.render(receipt), encoding="utf-8")
        page.chmod(0o600)
        data_check.save_receipt(receipt, receipt_file)
    for finding in receipt.findings:
        _say(f"{finding.severity}: {finding.text}")
    verdict = "refused" if receipt.refused else "passed"
    _say(f"{verdict}: {receipt.rows:,} rows, {receipt.enterprises:,} enterprises; report: {page}")
    if receipt.refused:
        raise typer.Exit(REFUSED)


@data_app.command()
def catalogue(out: Annotated[Path, typer.Option(help="Markdown file.")] = Path("docs/data-catalogue.md")) -> None:
    """Write the catalogue page of the schema.

    Example: xinyi-node data catalogue --out data-catalogue.md
    """
    with _one_line():
        out.write_text(schemas.catalogue(), encoding="utf-8")
    _say(f"written {out}")


@consent_app.command("import")
def import_consents(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet file, or a TOML file with a [source] section.")],
    store: Store = Path("consent.sqlite"),
) -> None:
    """Take consents from a table: enterprise, purpose, granted, expires, revoked, evidence (SHA-256). All or nothing.

    Example: xinyi-node consent import consents.csv --store consent.sqlite
    """
    with _one_line():
        source = _consent_source(table)
        names = consent_columns(list(sources.columns(source)))
        opened = ConsentStore(store)
        try:
            batches = sources.batches(source, list(names.values()))
            done = opened.import_table(batches, names, datetime.now(UTC))
        finally:
            opened.close()
        _log_consent({"change": "import", "rows": done.rows, "added": done.added, "revoked": done.revoked})
    _say(f"{done.rows:,} rows read, {done.added:,} consents new, {done.revoked:,} revocations new")


@consent_app.command("list")
def list_consents(
    store: Store = Path("consent.sqlite"),
    purpose: Annotated[
        str | None, typer.Option(help="Show the latest consents for this purpose, codes masked.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
) -> None:
    """How many enterprises consent, by purpose.

    Example: xinyi-node consent list --purpose "小微企业信用贷款 贷前风险评估"
    """
    now = datetime.now(UTC)
    with _one_line():
        opened = _existing(store)
        try:
            if purpose is None:
                shown = Table("purpose", "live", "not live", title=str(store))
                for row in opened.purposes(now):
                    shown.add_row(row.purpose, f"{row.live:,}", f"{row.not_live:,}")
            else:
                shown = Table(title=purpose)
                for heading in ("enterprise", "granted", "expires", "revoked", "live"):
                    shown.add_column(heading, no_wrap=heading == "enterprise")
                for entry in opened.entries(purpose, now, limit):
                    days = (entry.granted, entry.expires, entry.revoked)
                    texts = [day.strftime("%Y-%m-%d %H:%MZ") if day else "" for day in days]
                    shown.add_row(entry.masked_code, *texts, "yes" if entry.live else "no")
        finally:
            opened.close()
    Console().print(shown)


@consent_app.command()
def revoke(purpose: Purpose, store: Store = Path("consent.sqlite")) -> None:
    """Withdraw an enterprise's consent for a purpose, from now on. The code is asked for, so that no shell keeps it.

    Example: xinyi-node consent revoke --purpose "小微企业信用贷款 贷前风险评估"
    """
    with _one_line():
        opened = _existing(store)
        try:
            opened.revoke(typer.prompt("unified social credit code"), purpose, datetime.now(UTC))
        finally:
            opened.close()
        _log_consent({"change": "revoke", "purpose": purpose, "revoked": 1})
    _say("revoked; the enterprise takes part in no step from now on")


def _log_consent(change: dict[str, Any]) -> None:
    """Counts, no codes, into the audit log of the institution whose home this is; without a home there is no log.

    After the change: a revocation counts even where the log cannot be written, and then the command fails aloud.
    """
    if (home_folder(None) / SETTINGS).exists():
        with at_home(None) as institution:
            institution.log.append([Entry(kind="consent", job=None, body=change)])


def _existing(store: Path) -> ConsentStore:
    if not store.exists():
        raise DataError(f"no consent store {store}; make one with `consent import`")
    return ConsentStore(store)


def _source_kind(path: Path | None, url: str | None) -> str:
    if (path is None) == (url is None):
        raise DataError("give --path (a file) or --url (a database), one of them")
    if url is not None:
        return "mysql" if url.startswith("mysql:") else "postgresql"
    return "parquet" if path is not None and path.suffix.lower() in (".parquet", ".pq") else "csv"


def _source(document: dict[str, Any]) -> Source:
    try:
        return Source.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise DataError(f"source: {first['msg'].removeprefix('Value error, ')}") from None


def _consent_source(table: Path) -> Source:
    if table.suffix.lower() != ".toml":
        return _source({"kind": _source_kind(table, None), "path": table.resolve()})
    try:
        document = tomllib.loads(table.read_text(encoding="utf-8"))
    except (FileNotFoundError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{table}: cannot be read ({error})") from None
    if set(document) != {"source"}:
        raise DataError(f"{table}: has one section, [source], and nothing else")
    return _source(document["source"])


def _choose(proposal: mapping.Proposal, schema: Schema, chosen: dict[str, ColumnMapping], yes: bool) -> str | None:
    if yes:
        return proposal.field if proposal.score >= SURE else None
    if proposal.field is None:
        _say(f"{proposal.column}: {proposal.reason}")
        if mapping.is_barred(proposal.column):
            return None
    else:
        _say(f"{proposal.column} -> {proposal.field} {schema.field(proposal.field).zh} ({proposal.reason})")
    while True:
        answer = typer.prompt("field (Enter: as proposed, -: leave out)", default=proposal.field or "-").strip()
        if answer == "-":
            return None
        if not schema.has(answer):
            _say(
                f"no field {answer}; near: {', '.join(schemas.nearest(answer, [item.name for item in schema.fields]))}"
            )
        elif answer in chosen:
            _say(f"{answer} is mapped from {chosen[answer].source} already")
        else:
            return answer


def _unit(column: str, target: str, schema: Schema, yes: bool) -> str | None:
    wanted = schema.field(target)
    if wanted.unit is None or not schemas.must_state_unit(wanted):
        return None
    units = schemas.units_like(wanted.unit)
    named = mapping.unit_in_name(column)
    if named not in units:
        named = None
    if yes:
        return named
    while True:
        shown = ", ".join(f"{unit} {schemas.unit_zh(unit)}" for unit in units)
        answer: str = typer.prompt(f"unit of {column} ({shown})", default=named).strip()
        if answer in units:
            return answer
        _say(f"{answer} is none of {', '.join(units)}")
