"""The auditor finds what was done to a log, and names the party: alone, through witnesses, between two copies."""

import ast
import json
import shutil
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from typer.testing import CliRunner

from fl_clients import audit_cli, auditor
from privacy.audit_format import Entry, countersign, entry_line, head_line, parse_line, sign_head
from privacy.audit_log import AuditLog
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.merkle import MerkleTree, leaf_hash

JOB, OTHER = "ab" * 16, "cd" * 16
NAMES = ("bank1", "bank2", "pboc")
START = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)


class World:
    """Three parties, their keys and logs, and a clock that moves a second an append."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = START
        self.keys = {name: SigningIdentity.generate() for name in NAMES}
        self.coordinator = SigningIdentity.generate()
        self.logs = {name: AuditLog(folder / name, self.keys[name], name, self.clock) for name in NAMES}

    def clock(self):
        self.now += timedelta(seconds=1)
        return self.now

    def path(self, name):
        return self.folder / name

    def contract(self):
        parties = [{"name": name, "identity": key.public.hex()} for name, key in self.keys.items()]
        plain = {
            "version": 2, "epsilon": 3.0, "purpose": "授信", "parties": parties,
            "coordinator_identity": self.coordinator.public.hex(),
        }  # fmt: skip
        text = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
        digest = sha256(b"xinyi contract 2\x00" + text).digest()
        signatures = {name: key.sign(b"xinyi contract 2", digest).hex() for name, key in self.keys.items()}
        signatures["coordinator"] = self.coordinator.sign(b"xinyi contract 2", digest).hex()
        return Entry(kind="contract", job=JOB, body={"contract": plain, "hash": digest.hex(), "signatures": signatures})

    def release(self, name, job=JOB):
        number = self.logs[name].size
        return self.logs[name].append([Entry(kind="release", job=job, body={"step": "train", "number": number})])

    def witness(self, name, of):
        """`name` logs the present head of `of`, and `of` its countersignature."""
        head = self.logs[of].head()
        self.logs[name].append([Entry(kind="witness", job=JOB, body={"heads": {of: head.to_json()}})])
        signature = countersign(self.keys[name], head).hex()
        body = {"head": head.to_json(), "by": {name: signature}}
        self.logs[of].append([Entry(kind="countersigned", job=JOB, body=body)])

    def verify(self, *names):
        return auditor.verify([self.path(name) for name in names or NAMES])

    def rewrite(self, name, change, into=None):
        """What a party can do to its own log: change the list of entries, renumber and sign all heads again."""
        folder = self.path(into or name)
        lines = (self.path(name) / "log.jsonl").read_bytes().splitlines()
        entries = change([parsed for parsed in map(parse_line, lines) if hasattr(parsed, "body")])
        tree, out = MerkleTree(), []
        for entry in entries:
            line = entry_line(Entry(kind=entry.kind, job=entry.job, body=entry.body), len(tree), entry.time)
            tree.append(leaf_hash(line))
            head = sign_head(self.keys[name], party=name, size=len(tree), root=tree.root(), time=entry.time)
            out += [line, head_line(head)]
        if into:
            shutil.copytree(self.path(name), folder)
        (folder / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in out))
        return folder


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    for name in NAMES:
        made.logs[name].append([made.contract()])
    for stage in range(3):
        for name in NAMES:
            made.release(name, JOB if stage else OTHER)
            made.release(name)
        for name in NAMES:
            for of in NAMES:
                if name != of:
                    made.witness(name, of)
    return made


def texts(report):
    return [f"{finding.party}: {finding.text}" for finding in report.findings]


def lines_of(world, name):
    return (world.path(name) / "log.jsonl").read_bytes().splitlines()


def put(world, name, lines):
    (world.path(name) / "log.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def at_entry(lines, index):
    return next(at for at, line in enumerate(lines) if f'"index":{index},'.encode() in line)


def test_honest_logs_are_clean_alone_and_together(world):
    report = world.verify()
    assert (report.findings, report.notes) == ((), ())
    assert {log.party: (len(log.lines), log.kinds["release"]) for log in report.logs} == dict.fromkeys(NAMES, (19, 6))
    for name in NAMES:
        alone = world.verify(name)
        assert alone.findings == ()


def test_an_altered_entry_is_named(world):
    lines = lines_of(world, "bank1")
    at = at_entry(lines, 9)
    lines[at] = lines[at].replace(b'"kind":"', b'"kind":"x')
    put(world, "bank1", lines)
    found = texts(world.verify("bank1"))
    assert found[0].startswith("bank1: entry 9 altered: the head signed on 2026-03-01T08:")
    # its own countersigned heads and the other parties say the same
    assert len(found) == 2
    assert found[1].startswith("bank1: log does not fit a head of")
    assert all(line.startswith("bank1: ") for line in texts(world.verify()))


def test_an_unreadable_entry_and_an_unreadable_head_are_named(world):
    lines = lines_of(world, "bank1")
    at = at_entry(lines, 9)
    put(world, "bank1", [*lines[:at], lines[at][:-1] + b" }", *lines[at + 1 :]])
    assert texts(world.verify("bank1"))[0].startswith(f"bank1: line {at + 1} (entry 9 altered) is unreadable")
    put(world, "bank1", [*lines[: at + 1], lines[at + 1].replace(b'"party"', b'"Party"'), *lines[at + 2 :]])
    assert texts(world.verify("bank1"))[0].startswith(f"bank1: line {at + 2} (a head) is unreadable")


def test_a_removed_and_a_reordered_entry_are_named(world):
    lines = lines_of(world, "pboc")
    at = at_entry(lines, 4)
    put(world, "pboc", lines[:at] + lines[at + 1 :])
    assert texts(world.verify("pboc"))[0].startswith("pboc: entry 4 removed: the head signed on 2026-03-01T08:")
    put(world, "pboc", lines[:at] + lines[at + 2 :])  # with its head
    assert texts(world.verify("pboc"))[0] == "pboc: entry 4 removed: entry 5 follows entry 3"
    put(world, "pboc", lines[:at] + lines[at + 4 :])  # with their heads
    assert texts(world.verify("pboc"))[0] == "pboc: entries 4 to 5 removed: entry 6 follows entry 3"
    first, second = lines[at], lines[at + 2]
    put(world, "pboc", [*lines[:at], second, lines[at + 1], first, *lines[at + 3 :]])
    found = texts(world.verify("pboc"))
    assert any("reordered" in text and text.startswith("pboc: ") for text in found)
    assert not world.verify("bank1", "bank2").findings


def test_a_stranger_who_signs_the_changed_log_again_is_found(world):
    kept, world.keys["bank1"] = world.keys["bank1"], SigningIdentity.generate()
    world.rewrite("bank1", lambda entries: entries[:5] + entries[6:])
    world.keys["bank1"] = kept
    found = texts(world.verify("bank1"))
    assert sum("is not signed by bank1" in text for text in found) == 18, found


def test_a_swapped_identity_file_disagrees_with_the_contracts(world):
    kept, world.keys["bank1"] = world.keys["bank1"], SigningIdentity.generate()
    world.rewrite("bank1", lambda entries: entries)
    about = world.path("bank1") / "party.json"
    about.write_text(about.read_text().replace(kept.public.hex(), world.keys["bank1"].public.hex()))
    assert any(text.startswith("bank1: more than one identity") for text in texts(world.verify("bank1", "pboc")))


@pytest.mark.parametrize("keep", [3, 10, 15])
def test_a_cut_tail_shows_through_the_other_parties_only(world, keep):
    world.rewrite("pboc", lambda entries: entries[:keep])
    assert world.verify("pboc").findings == (), "a log cut at a head is consistent in itself"
    found = texts(world.verify())
    assert [text.split(",")[0].rsplit(" on ", 1)[0] for text in found] == [
        f"pboc: log is shorter ({keep} entries) than a head of {found[0].split('a head of ')[1].split(' ')[0]} entries "
        "that it signed"
    ]
    assert "seen by bank" in found[0]


CHANGES = {
    "removed": lambda entries: entries[:6] + entries[7:],
    "reordered": lambda entries: [*entries[:5], entries[6], entries[5], *entries[7:]],
    "altered": lambda entries: [*entries[:6], changed(entries[6]), *entries[7:]],
    "inserted": lambda entries: [*entries[:6], entries[5], *entries[6:]],
}


def changed(entry):
    return type(entry)(
        index=entry.index, time=entry.time, kind="release", job=entry.job, body={"other": 1}, line=entry.line
    )


@pytest.mark.parametrize("name", CHANGES)
def test_a_history_rewritten_and_signed_again_shows_through_a_witness(world, name):
    # reordering keeps the order of times where the clock stood still, so nothing in the log itself is odd
    world.rewrite("bank2", lambda entries: same_times(CHANGES[name](entries)))
    assert not any("altered:" in text or "removed:" in text for text in texts(world.verify("bank2")))
    for witness in ("bank1", "pboc"):
        found = texts(world.verify("bank2", witness))
        assert any(text.startswith(("bank2: two histories", "bank2: log is shorter")) for text in found), found
        assert all(text.startswith("bank2: ") for text in found), found


def same_times(entries):
    times = sorted(entry.time for entry in entries)
    return [
        type(entry)(index=0, time=time, kind=entry.kind, job=entry.job, body=entry.body, line=entry.line)
        for entry, time in zip(entries, times, strict=True)
    ]


def test_a_fork_shows_between_two_copies_and_between_two_witnesses_without_any(world):
    """bank1 keeps two logs from a common prefix: one for bank2, the other for pboc."""
    second = shutil.copytree(world.path("bank1"), world.path("second"))
    other = AuditLog(second, world.keys["bank1"], "bank1", world.clock)
    size = world.logs["bank1"].size
    for log, number, witness in ((world.logs["bank1"], 1, "bank2"), (other, 2, "pboc")):
        head = log.append([Entry(kind="release", job=JOB, body={"secretly": number})])
        world.logs[witness].append([Entry(kind="witness", job=JOB, body={"heads": {"bank1": head.to_json()}})])
    assert texts(world.verify("bank1", "bank2")) == []
    assert texts(auditor.verify([second, world.path("pboc")])) == []

    found = texts(auditor.verify([world.path("bank1"), second]))
    assert found == [f"bank1: two histories: {world.path('bank1')} and {second} part at entry {size}, both are signed"]
    without = texts(world.verify("bank2", "pboc"))
    assert without == [f"bank1: two histories: it showed bank2 and pboc different logs of {size + 1} entries"]
    crossed = texts(world.verify("bank1", "pboc"))
    assert len(crossed) == 1
    assert crossed[0].startswith(f"bank1: two histories: one of the entries {size - 1} to {size} altered")


def test_an_older_copy_is_a_prefix_and_no_fork(world):
    older = shutil.copytree(world.path("bank1"), world.path("older"))
    world.release("bank1")
    assert auditor.verify([older, world.path("bank1")]).findings == ()


def test_a_forged_witness_is_the_witness_fault(world):
    """A party cannot accuse another with a head that the other never signed."""
    head = sign_head(world.keys["bank2"], party="bank1", size=3, root=b"x" * 32, time="2026-03-01T09:00:00.000000Z")
    world.logs["bank2"].append([Entry(kind="witness", job=JOB, body={"heads": {"bank1": head.to_json()}})])
    found = texts(world.verify())
    assert len(found) == 1
    assert found[0].startswith("bank2: witness in entry 19: ")


@pytest.mark.parametrize(
    ("kind", "body", "word"),
    [
        ("countersigned", {"head": None, "by": {"bank2": "00" * 64}}, "does not fit"),
        ("countersigned", {"head": None, "by": {"bank9": "00" * 64}}, "key of bank9 is in no given log"),
        ("countersigned", {"by": {}}, "malformed"),
        ("witness", {"heads": {"bank2": {"size": 1}}}, "not a signed head"),
        ("witness", {"heads": ["bank2"]}, "malformed"),
        ("contract", {"contract": {"version": 2}, "hash": "00" * 32}, "incomplete"),
        ("contract", {"edited": True}, "another hash"),
        ("contract", {"signed": "bank2"}, "does not fit"),
    ],
)
def test_wrong_evidence_is_told(world, kind, body, word):
    if "head" in body:
        body = {**body, "head": world.logs["bank1"].head().to_json()}
    if "edited" in body or "signed" in body:
        honest = json.loads(json.dumps(world.contract().body))
        if "edited" in body:
            honest["contract"]["epsilon"] = 9.0
        else:
            honest["signatures"]["bank2"] = honest["signatures"]["bank1"]
        body = honest
    world.logs["bank1"].append([Entry(kind=kind, job=JOB, body=body)])
    found = texts(world.verify("bank1"))
    assert len(found) == 1
    assert found[0].startswith("bank1: ")
    assert word in found[0]


def test_time_that_goes_back_is_found(world):
    world.rewrite("bank1", lambda entries: [*entries[:2], same_times(entries[:1])[0], *entries[2:]])
    assert any("time goes back from" in text for text in texts(world.verify("bank1")))


def test_an_interrupted_write_is_a_note_and_a_missing_witness_is_told(world):
    with open(world.path("bank1") / "log.jsonl", "ab") as file:
        file.write(b'{"body":{"torn')
    report = world.verify("bank1")
    assert report.findings == ()
    assert "unfinished (14 bytes)" in report.notes[0]
    lonely = AuditLog(world.path("tax"), SigningIdentity.generate(), "tax", world.clock)
    lonely.append([Entry(kind="people", job=None, body={})])
    notes = world.verify("bank2", "tax").notes
    assert "tax: no other given log holds a head of it, so a cut or rewritten end cannot show" in notes
    assert any(note.startswith("pboc: its log was not given") for note in notes)


def test_a_verifier_written_from_the_page_alone_agrees(world):
    """docs/audit.md with hashlib and Ed25519, nothing of ours: the page is exact."""

    def root(leaves):
        if len(leaves) < 2:
            return leaves[0] if leaves else sha256(b"").digest()
        k = 1 << (len(leaves) - 1).bit_length() - 1
        return sha256(b"\x01" + root(leaves[:k]) + root(leaves[k:])).digest()

    def fields(*parts):
        return len(parts).to_bytes(8, "big") + b"".join(len(part).to_bytes(8, "big") + part for part in parts)

    def signed(context, message):
        return b"xinyi signature 1\0" + len(context).to_bytes(8, "big") + context + message

    keys = {}
    for name in NAMES:
        about = json.loads((world.path(name) / "party.json").read_bytes())
        keys[about["party"]] = Ed25519PublicKey.from_public_bytes(bytes.fromhex(about["identity"]))
    heads, countersigned = 0, 0
    for name in NAMES:
        leaves = []
        for line in (world.path(name) / "log.jsonl").read_bytes().split(b"\n")[:-1]:
            value = json.loads(line)
            if "head" not in value:
                assert value["index"] == len(leaves)
                leaves.append(sha256(b"\x00" + line).digest())
                if value["kind"] == "countersigned":
                    head = value["body"]["head"]
                    size, mark = head["size"].to_bytes(8, "big"), bytes.fromhex(head["signature"])
                    text = fields(name.encode(), size, bytes.fromhex(head["root"]), head["time"].encode(), mark)
                    for by, signature in value["body"]["by"].items():
                        message = signed(b"xinyi audit countersignature 1", text)
                        keys[by].verify(bytes.fromhex(signature), message)
                        countersigned += 1
                continue
            head = value["head"]
            assert (head["party"], head["size"], head["root"]) == (name, len(leaves), root(leaves).hex())
            text = fields(name.encode(), head["size"].to_bytes(8, "big"), root(leaves), head["time"].encode())
            keys[name].verify(bytes.fromhex(head["signature"]), signed(b"xinyi audit head 1", text))
            heads += 1
    assert (heads, countersigned) == (57, 18)


# the commands

RUN = CliRunner()


def command(app, *words):
    return RUN.invoke(app, [str(word) for word in words])


@pytest.fixture
def home(world, tmp_path):
    """An institution's home as `xinyi-node` sees it."""
    place = tmp_path / "home"
    place.mkdir()
    shutil.copytree(world.path("bank1"), place / "audit")
    return place


def test_verify_exit_codes_and_words(world, tmp_path):
    clean = command(audit_cli.app, "verify", *(world.path(name) for name in NAMES))
    assert clean.exit_code == 0
    assert "clean" in clean.stdout
    assert all(name in clean.stdout for name in NAMES)
    world.rewrite("pboc", lambda entries: entries[:7])
    found = command(audit_cli.app, "verify", *(world.path(name) for name in NAMES))
    assert found.exit_code == 1
    assert "FOUND 发现问题: pboc: log is shorter (7 entries)" in found.stdout
    assert "clean" not in found.stdout
    for bad in (tmp_path / "nowhere", tmp_path, Path(__file__)):
        assert command(audit_cli.app, "verify", bad).exit_code == 2
    (world.path("bank1") / "log.jsonl").unlink()
    assert command(audit_cli.app, "verify", world.path("bank1")).exit_code == 2


def test_export_is_verified_like_the_log(world, home, tmp_path):
    with open(home / "audit" / "log.jsonl", "ab") as file:
        file.write(b'{"body":{},"index":19')  # the vault is in the middle of a write
    out = tmp_path / "export"
    assert command(audit_cli.audit_app, "export", "--out", out, "--home", home).exit_code == 0
    assert (out / "log.jsonl").read_bytes() == (world.path("bank1") / "log.jsonl").read_bytes()
    assert auditor.verify([out, world.path("bank2"), world.path("pboc")]).findings == ()
    again = command(audit_cli.audit_app, "export", "--out", out, "--home", home)
    assert again.exit_code == 2  # never written over
    own = command(audit_cli.audit_app, "verify", world.path("pboc"), "--home", home)
    assert own.exit_code == 0, own.stdout


def test_export_of_a_job_holds_its_entries_with_proofs_and_convicts_a_rewriter(world, home, tmp_path):
    out = tmp_path / "job.json"
    assert command(audit_cli.audit_app, "export", "--out", out, "--job", OTHER, "--home", home).exit_code == 0
    excerpt = auditor.read_excerpt(out)
    assert [proof.entry.job for proof in excerpt.proofs] == [OTHER]
    assert auditor.verify([out, world.path("bank1"), world.path("bank2")]).findings == ()
    # what was once handed out holds the party to it
    world.rewrite("bank1", lambda entries: entries[:-1])
    assert texts(auditor.verify([out, world.path("bank1")]))[0].startswith("bank1: log is shorter (18 entries)")
    assert command(audit_cli.audit_app, "export", "--out", tmp_path / "x", "--job", "ef", "--home", home).exit_code == 2


def test_prove_and_check_proof(world, home, tmp_path):
    out = tmp_path / "entry.json"
    assert command(audit_cli.audit_app, "prove", 3, "--out", out, "--home", home).exit_code == 0
    key = world.keys["bank1"].public.hex()
    good = command(audit_cli.app, "check-proof", out, "--identity", key)
    assert good.exit_code == 0
    assert "bank1 signed a log of 19 entries" in good.stdout
    other = command(audit_cli.app, "check-proof", out, "--identity", world.keys["pboc"].public.hex())
    assert other.exit_code == 1
    plain = json.loads(out.read_text("utf-8"))
    for change in ("entry", "path", "head", "identity"):
        forged = json.loads(json.dumps(plain))
        match change:
            case "entry":
                forged["entries"][0]["entry"] = forged["entries"][0]["entry"].replace('"index":3', '"index":4')
            case "path":
                forged["entries"][0]["path"].reverse()
            case "head":
                forged["head"]["size"] += 1
            case "identity":
                forged["identity"] = world.keys["pboc"].public.hex()
        file = tmp_path / f"{change}.json"
        file.write_text(json.dumps(forged, sort_keys=True, separators=(",", ":"), ensure_ascii=False), "utf-8")
        refused = command(audit_cli.app, "check-proof", file)
        assert refused.exit_code == 1, change
        assert "NOT PROVED" in refused.stdout
        assert command(audit_cli.app, "verify", file).exit_code == 1, change
    assert command(audit_cli.audit_app, "prove", 19, "--out", tmp_path / "y", "--home", home).exit_code == 2
    assert command(audit_cli.app, "check-proof", tmp_path / "nowhere").exit_code == 2


def test_nothing_is_proved_from_a_damaged_log(world, home, tmp_path):
    path = home / "audit" / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"number":2', b'"number":3'))
    refused = command(audit_cli.audit_app, "prove", 0, "--out", tmp_path / "out", "--home", home)
    assert refused.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert command(audit_cli.audit_app, "verify", "--home", home).exit_code == 1
    with pytest.raises(Refused, match="nothing can be proved"):
        auditor.excerpt_of(auditor.read_log(home / "audit"), [0])


def test_the_verifier_does_not_know_the_writer():
    for module in (auditor, audit_cli):
        names = {
            name
            for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text("utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        }
        assert not {"privacy.audit_log", "AuditLog", "audit_log", "SigningIdentity"} & names


def test_a_large_log_is_read_with_all_its_heads(world):
    for _ in range(300):
        world.release("bank1")
    log = world.verify("bank1").logs[0]
    assert (log.proved, len(log.heads)) == (319, 319)
