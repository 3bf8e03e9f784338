"""The commands as people run them: from cards and a draft to a contract that everyone signed, and what they refuse."""

import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from fl_clients import institution as institutions
from fl_clients.cli import app as node
from fl_clients.contract import SignedContract
from fl_clients.policy import dump_policy
from fl_server import job_folder
from fl_server.cli import app as server
from privacy import passphrase
from privacy.audit_log import AuditLog
from privacy.charges import Budget, ExactCharge, ZcdpCharge
from privacy.identity import SigningIdentity
from tests.small_institution import COLUMNS, POLICY, ROLES

RUNNER = CliRunner()
SECRET = "a long passphrase of the node"


class World:
    """A coordinator and five institutions on one disk; only files pass between them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = folder / "server"
        self.draft = folder / "draft.toml"

    def make(self) -> None:
        job_folder.create_server_home(self.server)
        for party, role in ROLES.items():
            secrets, phrase = ("passphrase", SECRET.encode()) if party == "bank1" else ("plain", None)
            institutions.create(self.home(party), party, role, secrets, phrase)
            self.admin(party)
        self.write_draft()

    def home(self, party: str) -> Path:
        return self.folder / party

    def key(self, party: str, person: str) -> Path:
        return self.folder / f"{party}.{person}.key"

    def node(self, party: str, *arguments: str) -> Result:
        return RUNNER.invoke(node, [*arguments, "--home", str(self.home(party))], catch_exceptions=False)

    def done(self, party: str, *arguments: str) -> str:
        result = self.node(party, *arguments)
        assert result.exit_code == 0, result.output
        return result.output

    def refused(self, party: str, *arguments: str) -> str:
        """The one line of a refusal, exit code 2; the log is as it was."""
        before = self.log(party)
        result = self.node(party, *arguments)
        assert result.exit_code == 2, result.output
        assert self.log(party) == before
        [line] = result.stderr.splitlines()
        assert line.startswith("error: ")
        return line

    def log(self, party: str) -> bytes:
        return (self.home(party) / "audit" / "log.jsonl").read_bytes()

    def coordinator(self, *arguments: str, code: int = 0) -> str:
        result = RUNNER.invoke(server, ["job", *arguments, "--home", str(self.server)], catch_exceptions=False)
        assert result.exit_code == code, result.output
        return result.output

    def admin(self, party: str) -> None:
        """People and policy, as the commands make them."""
        for person in ("admin", "approver", "auditor"):
            RUNNER.invoke(node, ["people", "key", str(self.key(party, person)), "--plain"], catch_exceptions=False)
            who = ("people", "add", person, "--role", person)
            if person == "admin":
                self.done(party, *who, "--key", str(self.key(party, "admin")))
            else:
                public = SigningIdentity.load(self.key(party, person)).public.hex()
                self.done(party, *who, "--public", public, *self.as_("admin", party))
        policy = self.folder / f"{party}.policy.toml"
        policy.write_text(dump_policy(POLICY))
        self.done(party, "policy", "set", str(policy), *self.as_("admin", party))

    def as_(self, person: str, party: str) -> tuple[str, ...]:
        return ("--as", person, "--key", str(self.key(party, person)))

    def write_draft(self, **changes: str) -> None:
        """cards and draft.toml"""
        for party, role in ROLES.items():
            columns = [word for column in COLUMNS[role] for word in ("--column", column)]
            self.done(party, "card", *columns, "--out", str(self.folder / f"{party}.card.json"))
        values = {
            "purpose": '"risk model"',
            "scenario": '"working capital"',
            "label": '"90 days overdue"',
            "days": "30",
            "retention_days": "365",
            "least_banks": "3",
            "parties": json.dumps([f"{party}.card.json" for party in ROLES]),
        } | changes
        tables = '[privacy]\nepsilon = 2.0\n[columns]\nbanks = ["requested_amount"]\n'
        self.draft.write_text("".join(f"{key} = {value}\n" for key, value in values.items()) + tables)

    def new_job(self) -> str:
        match = re.search(r"job ([0-9a-f]{32})", self.coordinator("new", str(self.draft)))
        assert match
        return match[1]

    def invited(self) -> tuple[str, Path]:
        """A job's number, signed by the coordinator, and the folder of invitations."""
        job, out = self.new_job(), self.folder / "invitations"
        self.coordinator("sign", job[:8])
        self.coordinator("invite", job[:8], "--out", str(out))
        return job, out


def one_passphrase_file(patch: pytest.MonkeyPatch, secret: Path) -> None:
    """One process plays all machines: the variable is set for the identity of bank1 only."""
    real = passphrase.for_key

    def for_key(key: Path, variable: str, ask: passphrase.Ask = passphrase.ask_at_terminal) -> bytes | None:
        with pytest.MonkeyPatch.context() as inner:
            if key.parent.name == "bank1":
                inner.setenv(passphrase.FILE_VARIABLE, str(secret))
            return real(key, variable, ask)

    patch.setattr(passphrase, "for_key", for_key)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a world, to be copied."""
    folder = tmp_path_factory.mktemp("made") / "world"
    folder.mkdir()
    secret = folder / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        one_passphrase_file(patch, secret)
        World(folder).make()
    return folder


@pytest.fixture
def world(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    folder = tmp_path / "world"
    shutil.copytree(made, folder)
    one_passphrase_file(monkeypatch, folder / "secret")
    monkeypatch.setenv("COLUMNS", "200")
    return World(folder)


def test_from_cards_to_a_contract_that_everyone_signed(world: World) -> None:
    job, invitations = world.invited()
    signatures = []
    for party in ROLES:
        sent = world.folder / f"from-{party}"
        sent.mkdir()
        assert "no objection" in world.done(
            party, "job", "receive", str(invitations / f"{job[:8]}.{party}.contract.json")
        )
        assert "notified" in world.done(party, "job", "list")
        approve = ("job", "approve", job[:6], *world.as_("approver", party), "--out", str(sent))
        assert "approved by approver" in world.done(party, *approve, "--reason", "agreed in the committee")
        signatures.append(str(sent / f"{job}.{party}.signature.json"))
    assert "lacks the signatures of pboc, tax" in world.coordinator("sign", job[:8], *signatures[:3])
    assert "signed by everyone" in world.coordinator("sign", job[:8], *signatures)
    signed = job_folder.load(world.server, job)
    signed.check_all()
    assert [column.name for column in signed.contract.party("bank2").columns] == ["requested_amount"]
    world.coordinator("invite", job[:8], "--out", str(invitations))
    for party in ROLES:
        final = str(invitations / f"{job[:8]}.{party}.contract.json")
        assert "authorised; 6 signatures of 6" in world.done(party, "job", "receive", final)
        assert "6 of 6" in world.done(party, "job", "list")
    assert "none" in world.coordinator("list")
    shown = world.coordinator("show", job[:8])
    assert shown.count("yes") == 5
    text = world.done("pboc", "job", "show", job[:4])
    assert "YOUR FEATURES HAVE NO EPSILON" in text
    assert "State: authorised" in text
    chinese = world.done("bank1", "job", "show", job[:4], "--language", "zh")
    assert "本机构策略没有异议" in chinese
    assert "状态：authorised" in chinese


def test_only_approvers_decide_and_every_refusal_is_one_line(world: World) -> None:
    job, invitations = world.invited()
    world.done("pboc", "job", "receive", str(invitations / f"{job[:8]}.pboc.contract.json"))
    for person in ("admin", "auditor"):
        for verb in (("approve",), ("refuse", "--reason", "no")):
            assert "only an approver may decide" in world.refused(
                "pboc", "job", *verb, job[:6], *world.as_(person, "pboc")
            )
    wrong_key = ("--as", "approver", "--key", str(world.key("pboc", "admin")))
    assert "not signed by the key" in world.refused("pboc", "job", "approve", job[:6], *wrong_key)
    other_house = ("--as", "approver", "--key", str(world.key("tax", "approver")))
    assert "not signed by the key" in world.refused("pboc", "job", "approve", job[:6], *other_house)
    assert "needs a reason" in world.refused(
        "pboc", "job", "refuse", job[:6], *world.as_("approver", "pboc"), "--reason", ""
    )
    assert "unknown here" in world.refused("pboc", "job", "approve", "ffff", *world.as_("approver", "pboc"))
    refuse = ("job", "refuse", job[:6], *world.as_("approver", "pboc"), "--reason", "not agreed")
    assert "refused by approver: not agreed" in world.done("pboc", *refuse)
    assert "State: refused (not agreed)" in world.done("pboc", "job", "show", job[:6])


def test_only_admins_change_people_and_policy(world: World) -> None:
    policy = str(world.folder / "tax.policy.toml")
    for person in ("approver", "auditor"):
        assert "only an admin may" in world.refused("tax", "policy", "set", policy, *world.as_(person, "tax"))
        assert "only an admin may" in world.refused("tax", "people", "remove", "auditor", *world.as_(person, "tax"))
    add = ("people", "add", "Eve", "--role", "admin")
    assert "give --as and --public" in world.refused("tax", *add, "--key", str(world.key("tax", "auditor")))
    same = SigningIdentity.load(world.key("tax", "approver")).public.hex()
    assert "occurs twice" in world.refused("tax", *add, "--public", same, *world.as_("admin", "tax"))
    assert "no admin" in world.refused("tax", "people", "remove", "admin", *world.as_("admin", "tax"))
    (world.folder / "loose.toml").write_text('most_epsilon_job = "none"\n')
    loose = world.refused("tax", "policy", "set", str(world.folder / "loose.toml"), *world.as_("admin", "tax"))
    assert "no epsilon limit" in loose
    assert "ANY label definition" in world.done("tax", "policy", "show")
    assert world.done("tax", "people", "list").count("a") > 3


def test_a_changed_contract_a_strangers_and_another_partys_signature_are_refused(world: World) -> None:
    job, invitations = world.invited()
    file = invitations / f"{job[:8]}.bank2.contract.json"
    document = json.loads(file.read_text())
    document["contract"]["uses"] = 3
    altered = world.folder / "altered.json"
    altered.write_text(json.dumps(document))
    assert "does not fit contract" in world.refused("bank2", "job", "receive", str(altered))
    world.done("bank2", "job", "receive", str(file))
    world.done("bank2", "job", "approve", job[:6], *world.as_("approver", "bank2"), "--out", str(world.folder))
    sent = world.folder / f"{job}.bank2.signature.json"
    stolen = json.loads(sent.read_text())
    stolen["signatures"]["bank3"] = stolen["signatures"]["bank2"]
    (world.folder / "stolen.json").write_text(json.dumps(stolen))
    output = world.coordinator("sign", job[:8], str(world.folder / "stolen.json"), code=2)
    assert "signature of bank3 does not fit" in output
    assert job_folder.missing(job_folder.load(world.server, job)) == tuple(ROLES)
    other = world.new_job()
    assert "ask for one of this" in world.coordinator("sign", other[:8], str(sent), code=2)
    (world.folder / "junk.json").write_text("{}")
    assert "no signed contract" in world.coordinator("sign", job[:8], str(world.folder / "junk.json"), code=2)
    world.refused("bank2", "job", "receive", str(world.folder / "junk.json"))


def test_a_signature_file_that_was_lost_is_written_again(world: World) -> None:
    job, invitations = world.invited()
    file = str(invitations / f"{job[:8]}.tax.contract.json")
    world.done("tax", "job", "receive", file)
    nowhere = ("--out", str(world.folder / "nowhere"))
    assert "is no folder" in world.refused("tax", "job", "approve", job[:6], *world.as_("approver", "tax"), *nowhere)
    world.done("tax", "job", "approve", job[:6], *world.as_("approver", "tax"), "--out", str(world.folder))
    sent = world.folder / f"{job}.tax.signature.json"
    first = sent.read_bytes()
    sent.unlink()
    world.done("tax", "job", "receive", file, "--out", str(world.folder))
    assert sent.read_bytes() == first
    SignedContract.model_validate_json(first).check("coordinator", "tax")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"purpose": "7"}, "purpose"),
        ({"days": "0"}, "days"),
        ({"least_banks": "4"}, "least_banks=4 of 3 banks"),
        ({"parties": '["bank1.card.json", "nobody.card.json"]'}, "nobody.card.json"),
        ({"parties": '["bank1.card.json", "draft.toml"]'}, "no card"),
        ({"colour": '"blue"'}, "colour"),
    ],
)
def test_a_draft_that_is_wrong_is_refused_in_one_line(world: World, changes: dict[str, str], words: str) -> None:
    world.write_draft(**changes)
    output = world.coordinator("new", str(world.draft), code=2)
    assert words in output
    assert len(output.splitlines()) == 1
    assert job_folder.load_all(world.server) == ()


def test_a_draft_asks_only_for_columns_that_cards_offer(world: World) -> None:
    text = world.draft.read_text()
    for old, new, words in (
        ('["requested_amount"]', '["term_months"]', "bank1 does not offer term_months"),
        ("\nbanks =", "\nnobody =", "[columns] names nobody"),
        ("epsilon = 2.0", "epsilon = 20.0", "at most 10"),
        ("epsilon = 2.0", "", "no epsilon"),
    ):
        world.draft.write_text(text.replace(old, new))
        assert words in world.coordinator("new", str(world.draft), code=2)


def test_a_card_shows_what_is_public_and_nothing_else(world: World) -> None:
    shown = json.loads((world.folder / "bank1.card.json").read_text())
    assert set(shown) == {"name", "role", "identity", "columns", "most_enterprises"}
    assert [column["name"] for column in shown["columns"]] == list(COLUMNS["bank"])
    assert shown["columns"][1]["categories"], "a coded field brings its public code list"
    assert "no column to offer" in world.refused("bank1", "card")
    assert "no feature" in world.refused("bank1", "card", "--column", "uscc")


def test_a_party_named_like_a_path_is_not_invited(world: World) -> None:
    path = world.folder / "tax.card.json"
    path.write_text(path.read_text().replace('"tax"', '"../../tax"'))
    job = world.new_job()
    world.coordinator("sign", job[:8])
    out = world.folder / "deep" / "invitations"
    assert "cannot be the name of a file" in world.coordinator("invite", job[:8], "--out", str(out), code=2)
    assert not out.exists()


def test_invitations_need_the_coordinators_signature(world: World) -> None:
    job = world.new_job()
    out = str(world.folder / "early")
    assert "lacks the signature of coordinator" in world.coordinator("invite", job[:8], "--out", out, code=2)
    assert "is a draft" in world.coordinator("show", job[:8])
    assert "unknown" in world.coordinator("show", "ffffffff", code=2)


def test_the_budget_table_shows_what_is_spent_and_left(world: World) -> None:
    now = datetime.now(UTC) - timedelta(hours=1)
    opened = institutions.open_institution(world.home("tax"), clock=lambda: now)
    limits = Budget(epsilon_job=5.0, epsilon_total=5.0, delta=1e-6)
    charge = ZcdpCharge(name="sums", rho=0.1, count=1)
    opened.ledger.reserve(data_set="loans", job="ab" * 16, use=1, charges=(charge,), budget=limits, now=now)
    exact = (ExactCharge(name="exact sums", count=1),)
    opened.ledger.reserve(
        data_set="test", job="cd" * 16, use=1, charges=exact, budget=limits, now=now, exact_allowed=True
    )
    spent = opened.ledger.spent("loans", 1e-6).epsilon
    opened.close()
    text = world.done("tax", "budget")
    assert "abababab" in text
    assert f"{spent:.4g} of 6, left {6 - spent:.4g}" in text
    assert "infinite of 6, left 0" in text


def test_no_command_shortens_or_rewrites_the_log_and_nothing_secret_is_shown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of the three roles, with every role: what was in the log stays its beginning."""
    job, invitations = world.invited()
    file = str(invitations / f"{job[:8]}.bank1.contract.json")
    shown, before = "", world.log("bank1")
    commands: list[tuple[str, ...]] = [
        ("people", "list"),
        ("policy", "show"),
        ("budget",),
        ("card", "--column", "requested_amount"),
        ("job", "receive", file),
        ("job", "list"),
        ("job", "show", job[:6]),
        ("audit", "verify"),
        ("audit", "export", "--out", str(world.folder / "export")),
        ("audit", "prove", "0", "--out", str(world.folder / "entry0.json")),
    ]
    for person in ("auditor", "admin", "approver"):
        who = world.as_(person, "bank1")
        commands += [
            (
                "people",
                "add",
                f"new {person}",
                "--role",
                "auditor",
                "--public",
                person.encode().hex().ljust(64, "0"),
                *who,
            ),
            ("people", "remove", "auditor", *who),
            ("policy", "set", str(world.folder / "bank1.policy.toml"), *who),
            ("job", "approve", job[:6], "--out", str(world.folder), *who),
            ("job", "refuse", job[:6], "--reason", "no", *who),
        ]
    named = {command[:2] if command[0] in ("people", "policy", "job", "audit") else command[:1] for command in commands}
    root = typer.main.get_command(node)
    every = {
        (group, leaf) if leaf else (group,)
        for group, command in root.commands.items()  # type: ignore[attr-defined]
        for leaf in getattr(command, "commands", {"": None})
    }
    homeless = {("people", "key"), ("policy", "draft"), ("identity",)}
    # tested where they are defined
    others = {("init",), ("join",), ("check",), ("run",), ("down",)}
    others |= {("job", "data"), ("job", "serve"), ("job", "purge")}
    assert {one for one in every if one[0] not in ("data", "consent")} - named == homeless | others
    done = 0
    for command in commands:
        result = world.node("bank1", *command)
        assert result.exit_code in (0, 2), result.output
        done += result.exit_code == 0
        shown += result.output
        after = world.log("bank1")
        assert after.startswith(before), command
        before = after
    assert done > 10
    secrets = [SECRET, *(path.read_text().splitlines()[1] for path in world.folder.glob("bank1.*.key"))]
    everything = shown.encode() + before
    assert not [secret for secret in secrets if secret.encode() in everything]
    identity = SigningIdentity.load(world.home("bank1") / "identity.key", SECRET.encode())
    AuditLog(world.home("bank1") / "audit", identity, "bank1", lambda: datetime.now(UTC)).close()


def test_a_wrong_or_missing_passphrase_opens_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passphrase, "for_key", lambda *_: b"another passphrase")
    assert "passphrase does not fit" in world.refused("bank1", "job", "list")
    monkeypatch.setattr(passphrase, "for_key", lambda *_: None)
    assert "is encrypted; give its passphrase" in world.refused("bank1", "job", "list")


def test_a_persons_key_is_made_under_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    monkeypatch.setenv(passphrase.PERSON_VARIABLE, str(secret))
    made = RUNNER.invoke(node, ["people", "key", str(tmp_path / "a.key")], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    assert SigningIdentity.load(tmp_path / "a.key", SECRET.encode()).public.hex() in made.output
    assert passphrase.is_encrypted(tmp_path / "a.key")
    assert SECRET not in made.output
    again = RUNNER.invoke(node, ["people", "key", str(tmp_path / "a.key")], catch_exceptions=False)
    assert again.exit_code == 2


def test_a_policy_draft_is_the_strict_default(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    assert RUNNER.invoke(node, ["policy", "draft", str(file)], catch_exceptions=False).exit_code == 0
    assert "most_epsilon_job = 1.0" in file.read_text()
    assert RUNNER.invoke(node, ["policy", "draft", str(file)], catch_exceptions=False).exit_code == 2
