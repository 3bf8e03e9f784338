"""`xinyi-node people`, `policy` and `card`: they only parse and print; rules.py, people.py and policy.py decide."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fl_clients import at_home, mapping
from fl_clients import rules as in_force
from fl_clients.at_home import AsOption, HomeOption, KeyOption, say
from fl_clients.checked_data import column_terms
from fl_clients.contract import PartyTerms
from fl_clients.people import Person, PersonRole
from fl_clients.policy import Policy, dump_policy, load_policy
from models.schema import load_schema
from privacy import passphrase
from privacy.errors import Refused
from privacy.identity import SigningIdentity, fingerprint

people_app = typer.Typer(help="Admins, approvers and auditors, each with an own key.", no_args_is_help=True)
policy_app = typer.Typer(help="The limits that no job may go beyond.", no_args_is_help=True)

USABLE = ("number", "integer", "flag", "code")
"""Types of fields that become columns of a card by themselves."""


@people_app.command("key")
def make_key(
    file: Annotated[Path, typer.Argument(help="A new key file, mode 0600.")],
    plain: Annotated[bool, typer.Option("--plain", help="Without a passphrase.")] = False,
) -> None:
    """Make a person's own key, under a passphrase, and print the public key for `people add`.

    Example: xinyi-node people key lina.key
    """
    with at_home.one_line():
        key = SigningIdentity.generate()
        key.save(file, None if plain else passphrase.for_new_key(file, passphrase.PERSON_VARIABLE))
    say(f"public key   {key.public.hex()}")
    say(f"fingerprint  {fingerprint(key.public)}")


@people_app.command()
def add(
    name: Annotated[str, typer.Argument(help="Name of the person.")],
    role: Annotated[PersonRole, typer.Option(help="admin, approver or auditor.")],
    key: KeyOption,
    public: Annotated[str | None, typer.Option(help="Public key of the new person (hex).")] = None,
    by: Annotated[str | None, typer.Option("--as", help="The admin who adds; left out for the first admin.")] = None,
    home: HomeOption = None,
) -> None:
    """Add a person, signed by an admin. The first admin signs with the own key: no --as, no --public.

    Example: xinyi-node people add "Li Na" --role approver --public 3b6a... --as "Wang Wei" --key wangwei.key
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        people = in_force.current_people(institution)
        if (by is None) != (people is None) or (by is None) != (public is None):
            need = "the first admin is added without --as and --public" if people is None else "give --as and --public"
            raise Refused(f"{institution.name} has {'no' if people is None else 'its'} people: {need}")
        signing = at_home.person_key(key)
        if people is None or by is None:
            in_force.found(institution, Person(name=name, role=role, key=signing.public.hex()), signing)
        else:
            person = Person(name=name, role=role, key=public or "")
            in_force.set_people(institution, people.added(person), by, signing)
        say(f"{name} is {role}")


@people_app.command()
def remove(
    name: Annotated[str, typer.Argument(help="Name of the person.")],
    by: AsOption,
    key: KeyOption,
    home: HomeOption = None,
) -> None:
    """Remove a person, signed by an admin; what the person decided stays in the log.

    Example: xinyi-node people remove "Li Na" --as "Wang Wei" --key wangwei.key
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        people = in_force.rules(institution).people
        in_force.set_people(institution, people.removed(name), by, at_home.person_key(key))
        say(f"{name} removed")


@people_app.command("list")
def list_people(home: HomeOption = None) -> None:
    """The people and their roles, as the audit log proves them.

    Example: xinyi-node people list
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        people = in_force.rules(institution).people
    shown = Table("name", "role", "fingerprint of the key")
    for person in people.people:
        shown.add_row(person.name, person.role, fingerprint(bytes.fromhex(person.key)))
    Console().print(shown)


@policy_app.command()
def draft(file: Annotated[Path, typer.Argument(help="A new TOML file.")]) -> None:
    """Write the strict default policy to a file, to be edited and then set.

    Example: xinyi-node policy draft new-policy.toml
    """
    with at_home.one_line():
        if file.exists():
            raise Refused(f"{file} exists already; choose another name")
        file.write_text(dump_policy(Policy()), encoding="utf-8")
    say(f"written {file}; edit it (docs/governance.md), then: xinyi-node policy set {file} --as NAME --key FILE")


@policy_app.command("set")
def set_policy(
    file: Annotated[Path, typer.Argument(help="The new policy (TOML).")],
    by: AsOption,
    key: KeyOption,
    home: HomeOption = None,
) -> None:
    """Put a policy in force, signed by an admin and logged.

    Example: xinyi-node policy set new-policy.toml --as "Wang Wei" --key wangwei.key
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        policy = load_policy(file.read_text(encoding="utf-8"), file.name)
        in_force.set_policy(institution, policy, by, at_home.person_key(key))
        say(f"policy of {institution.name} set by {by}")


@policy_app.command("show")
def show_policy(home: HomeOption = None) -> None:
    """The policy in force.

    Example: xinyi-node policy show
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        rules = in_force.rules(institution)
    if not rules.policy_is_set:
        say("# no policy was set: this is the strict default, which admits no job")
    say(dump_policy(rules.policy).rstrip())
    if not rules.policy.label_definitions:
        say("# label_definitions is empty: ANY label definition is accepted")


def card(
    map_file: Annotated[Path | None, typer.Option("--mapping", help="Mapping file: its features are offered.")] = None,
    column: Annotated[list[str] | None, typer.Option("--column", help="Offer these fields only; repeat.")] = None,
    most_enterprises: Annotated[int, typer.Option(min=1, help="Largest list brought to the alignment.")] = 1 << 23,
    out: Annotated[Path | None, typer.Option(help="A file; else it is printed.")] = None,
    home: HomeOption = None,
) -> None:
    """This institution's card for the coordinator: name, role, public key, columns that it offers. No secret, no data.

    Example: xinyi-node card --mapping loans.toml --out bank1.card.json
    """
    with at_home.one_line(), at_home.at_home(home) as institution:
        schema = load_schema(institution.role)
        names = list(column or ())
        if map_file is not None:
            mapped, schema = mapping.load_mapping(map_file)
            if schema.kind != institution.role:
                raise Refused(f"{map_file} maps onto the schema of {schema.kind}, this node is {institution.role}")
            offered = [field.name for field in schema.fields if field.name in mapped.columns and field.is_feature]
            names = names or [name for name in offered if schema.field(name).type in USABLE]
            if lacking := sorted(set(names) - set(offered)):
                raise Refused(f"{map_file} does not map {', '.join(lacking)} as a feature; map it first")
        if not names:
            raise Refused("no column to offer; give --mapping FILE or --column NAME")
        terms = PartyTerms(
            name=institution.name,
            role=institution.role,
            identity=institution.identity.public.hex(),
            columns=column_terms(schema, names),
            most_enterprises=most_enterprises,
        )
    text = json.dumps(terms.model_dump(mode="json"), ensure_ascii=False, indent=1)
    if out is None:
        say(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")
        say(f"written {out}; fingerprint {fingerprint(institution.identity.public)}")
