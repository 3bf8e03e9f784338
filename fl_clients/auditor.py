"""The auditor's reader of audit logs: independent of the program that writes them, needs only the files.

Guarantee: a log that `verify` finds clean is what its party signed, entry by entry, and every head of it that the
other given logs saw is a prefix of it. What is not: an entry removed, altered or reordered, a log shorter than what its
party signed, two histories; each finding names the party. Against: the party itself, its administrator, whoever had the
files on the way, the coordinator. Not against: a party whose heads no other given log holds, or keys that you never
compared (fingerprints are shown). That an entry is true, or that one is missing that was never written, no log proves.
Source: RFC 6962 (the tree and its heads); docs/audit.md.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privacy.audit_format import (
    LOG_FILE,
    PARTY_FILE,
    VERSION,
    InclusionProof,
    LoggedEntry,
    SignedHead,
    canonical,
    parse_canonical,
    parse_line,
    verify_countersignature,
    verify_head,
)
from privacy.errors import Refused
from privacy.identity import verify as verify_signature
from privacy.merkle import MerkleTree, leaf_hash

LARGEST_EXCERPT = 1 << 30
"""Bytes."""


class NotProved(Refused):
    """An excerpt whose head or proofs do not hold. `party`: whose log it says it is from."""

    def __init__(self, party: str, text: str) -> None:
        super().__init__(f"{party}: {text}")
        self.party, self.text = party, text


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is wrong, in one sentence, and with whose log."""

    party: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A head of a party, as another log holds it. `by`: whose log; `entry`: where in it."""

    head: SignedHead
    by: str
    entry: int


@dataclass(kw_only=True)
class Log:
    """A log as it was read. `proved`: entries under the party's own last head that fits them."""

    source: Path
    party: str
    public: bytes
    tree: MerkleTree = field(default_factory=MerkleTree)
    lines: list[bytes] = field(default_factory=list)
    heads: list[SignedHead] = field(default_factory=list)
    evidence: list[LoggedEntry] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    proved: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Log({self.party!r}, {len(self.lines)} entries)"

    def find(self, text: str) -> None:
        self.findings.append(Finding(party=self.party, text=text))


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """Single entries of a log, each proved against one head of it. Says nothing about entries that are not in it."""

    source: Path
    party: str
    public: bytes
    head: SignedHead
    proofs: tuple[InclusionProof, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the given logs say together; clean if `findings` is empty. `notes` are worth reading, and no damage."""

    logs: tuple[Log, ...]
    excerpts: tuple[Excerpt, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


EVIDENCE = ("contract", "witness", "countersigned")


def read_log(folder: Path) -> Log:
    """Read and check one log on its own. `Refused` only if there is no log to read; damage is in its findings."""
    about = _plain_json(folder / PARTY_FILE, 4096)
    match about:
        case {"party": str(party), "identity": str(identity), "version": int(version)}:
            if version != VERSION:
                raise Refused(f"{folder / PARTY_FILE}: version {version}, this program reads {VERSION}; update it")
            log = Log(source=folder, party=party, public=_key(identity, folder / PARTY_FILE))
        case _:
            raise Refused(f"{folder / PARTY_FILE} does not say party, identity and version; give an audit folder")
    try:
        with open(folder / LOG_FILE, "rb") as file:
            _read_lines(log, file)
    except OSError as error:
        raise Refused(f"{folder / LOG_FILE}: {error.strerror}; give an audit folder or an export of one") from None
    return log


def _read_lines(log: Log, file: Iterable[bytes]) -> None:
    """Entry by entry; after a first misfit only what is new is told, not everything that follows from it."""
    expected, time, headed, told = 0, "", 0, False
    number = 0
    for number, raw in enumerate(file, start=1):
        if not raw.endswith(b"\n"):
            log.notes.append(f"{log.party}: line {number} is unfinished ({len(raw)} bytes): a write was interrupted")
            break
        line = raw[:-1]
        try:
            parsed = parse_line(line)
        except Refused as error:
            is_head = line.startswith(b'{"head":')
            log.find(f"line {number} ({'a head' if is_head else f'entry {expected} altered'}) is unreadable: {error}")
            told = True
            if not is_head:
                log.tree.append(leaf_hash(line))
                log.lines.append(line)
                expected += 1
            continue
        if parsed.time < time:
            log.find(f"line {number}: time goes back from {time} to {parsed.time}")
        time = max(time, parsed.time)
        if isinstance(parsed, LoggedEntry):
            if parsed.index != expected:
                log.find(_misplaced(parsed.index, expected))
                told = True
            expected = max(expected, parsed.index + 1) if parsed.index >= expected else expected
            log.tree.append(parsed.leaf)
            log.lines.append(line)
            log.kinds[parsed.kind] += 1
            if parsed.kind in EVIDENCE:
                log.evidence.append(parsed)
        else:
            if parsed.size > expected:
                log.find(
                    _removed(expected, parsed.size, f"the head signed on {parsed.time} counts {parsed.size} entries")
                )
                expected, told = parsed.size, True
            told = _check_own_head(log, parsed, number, headed, told)
            headed = parsed.size
    if len(log.lines) > headed:
        log.notes.append(
            f"{log.party}: {len(log.lines) - headed} entries at the end are under no head: never confirmed"
        )


def _misplaced(index: int, expected: int) -> str:
    if index < expected:
        return f"entry {index} reordered or repeated: it stands after entry {expected - 1}"
    return _removed(expected, index, f"entry {index} follows entry {expected - 1}")


def _removed(start: int, end: int, why: str) -> str:
    return f"entry {start} removed: {why}" if end - start == 1 else f"entries {start} to {end - 1} removed: {why}"


def _check_own_head(log: Log, head: SignedHead, number: int, headed: int, told: bool) -> bool:
    """Take in a head of the log itself; whether a misfit of the entries above was told already."""
    try:
        if head.party != log.party:
            raise Refused(f"it is a head of {head.party}")
        verify_head(log.public, head)
    except Refused as error:
        log.find(f"line {number}: head of {head.size} entries is not signed by {log.party}: {error}")
        return told
    if headed >= head.size:
        log.find(f"line {number}: head of {head.size} entries follows one of {headed}")
        return told
    log.heads.append(head)
    if head.size == len(log.tree) and head.root == log.tree.root():
        log.proved = head.size
        return told
    if not told:
        if head.size != len(log.tree):
            log.find(
                f"line {number}: the head signed on {head.time} counts {head.size} entries, here are {len(log.tree)}"
            )
        else:
            log.find(f"{_entries(log.proved, head.size)} altered: the head signed on {head.time} does not fit")
    return True


def verify(paths: Sequence[Path]) -> Report:
    """Check every log (folder) and excerpt (file), then all of them against each other. `Refused`: bad input."""
    logs = tuple(read_log(path) for path in paths if path.is_dir())
    findings: list[Finding] = [finding for log in logs for finding in log.findings]
    excerpts: list[Excerpt] = []
    for path in paths:
        if not path.is_dir():
            try:
                excerpts.append(read_excerpt(path))
            except NotProved as error:
                findings.append(Finding(party=error.party, text=error.text))
    notes = [note for log in logs for note in log.notes]
    findings += _same_party(logs)
    keys, disagreements = _identities(logs, excerpts)
    findings += disagreements
    shown: dict[str, list[Shown]] = {}
    for log in logs:
        for entry in log.evidence:
            findings += _take_evidence(log, entry, keys, shown)
    for excerpt in excerpts:
        seen = Shown(head=excerpt.head, by=f"{excerpt.source.name}", entry=0)
        shown.setdefault(excerpt.party, []).append(seen)
    for party, heads in sorted(shown.items()):
        own = [log for log in logs if log.party == party]
        for log in own:
            findings += _against_witnesses(log, heads)
        findings += _two_roots(party, heads)
        if not own:
            notes.append(f"{party}: its log was not given; {len(heads)} of its heads are in the others'")
    for log in logs:
        if len(logs) + len(excerpts) > 1 and log.party not in shown:
            notes.append(f"{log.party}: no other given log holds a head of it, so a cut or rewritten end cannot show")
    return Report(logs=logs, excerpts=tuple(excerpts), findings=tuple(dict.fromkeys(findings)), notes=tuple(notes))


def _same_party(logs: Sequence[Log]) -> Iterator[Finding]:
    """Two copies of one party's log: the shorter must be a prefix of the longer."""
    for at, first in enumerate(logs):
        for second in logs[at + 1 :]:
            if first.party != second.party or first.public != second.public:
                continue
            common = min(first.proved, second.proved)
            if first.tree.root(common) != second.tree.root(common):
                parts = next(index for index in range(common) if first.tree.leaf(index) != second.tree.leaf(index))
                yield Finding(
                    party=first.party,
                    text=f"two histories: {first.source} and {second.source} part at entry {parts}, both are signed",
                )


def _identities(logs: Sequence[Log], excerpts: Sequence[Excerpt]) -> tuple[dict[str, bytes], list[Finding]]:
    """Every party's key, from the logs' own files and the contracts in all logs; and where they disagree."""
    said: dict[str, dict[bytes, str]] = {}
    found: list[Finding] = []
    given: tuple[Log | Excerpt, ...] = (*logs, *excerpts)
    for item in given:
        said.setdefault(item.party, {}).setdefault(item.public, str(item.source))
    for log in logs:
        for entry in log.evidence:
            if entry.kind == "contract":
                try:
                    for party, key in _contract_keys(entry.body).items():
                        where = f"the contract in entry {entry.index} of {log.party}"
                        said.setdefault(party, {}).setdefault(key, where)
                except Refused as error:
                    found.append(Finding(party=log.party, text=f"contract in entry {entry.index}: {error}"))
    for party, keys in said.items():
        if len(keys) > 1:
            listed = "; ".join(f"{hashlib.sha256(key).hexdigest()[:32]} in {where}" for key, where in keys.items())
            found.append(Finding(party=party, text=f"more than one identity: {listed}"))
    return {party: next(iter(keys)) for party, keys in said.items()}, found


def _contract_keys(body: Mapping[str, Any]) -> dict[str, bytes]:
    """The parties' keys; `Refused` unless the contract has the hash that was logged, and its signatures fit."""
    try:
        contract, logged = body["contract"], body["hash"]
        prefix = f"xinyi contract {int(contract['version'])}"
        text = json.dumps(contract, sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(prefix.encode() + b"\x00" + text).digest()
        keys = {str(party["name"]): bytes.fromhex(party["identity"]) for party in contract["parties"]}
        if digest.hex() != logged:
            raise Refused("it has another hash than was logged")
        signers = {**keys, "coordinator": bytes.fromhex(contract["coordinator_identity"])}
        for signer, signature in body.get("signatures", {}).items():
            verify_signature(signers[signer], prefix.encode(), digest, bytes.fromhex(signature))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Refused("it is incomplete or malformed") from None
    return keys


def _take_evidence(
    log: Log, entry: LoggedEntry, keys: Mapping[str, bytes], shown: dict[str, list[Shown]]
) -> Iterator[Finding]:
    """Heads that this log holds go into `shown`, if their party really signed them."""
    where = f"{entry.kind} in entry {entry.index}"
    try:
        if entry.kind == "witness":
            for party, plain in entry.body["heads"].items():
                head = SignedHead.from_json(plain)
                if party not in keys:
                    raise Refused(f"the key of {party} is in no given log or contract")
                if head.party != party:
                    raise Refused(f"the head of {party} is one of {head.party}")
                verify_head(keys[party], head)
                shown.setdefault(party, []).append(Shown(head=head, by=log.party, entry=entry.index))
        elif entry.kind == "countersigned":
            head = SignedHead.from_json(entry.body["head"])
            if head.party != log.party:
                raise Refused(f"it is a head of {head.party}")
            verify_head(log.public, head)
            for party, signature in entry.body["by"].items():
                if party not in keys:
                    raise Refused(f"the key of {party} is in no given log or contract")
                verify_countersignature(keys[party], head, bytes.fromhex(signature))
                shown.setdefault(log.party, []).append(Shown(head=head, by=party, entry=entry.index))
    except (KeyError, TypeError, ValueError, AttributeError):
        yield Finding(party=log.party, text=f"{where} is malformed")
    except Refused as error:
        yield Finding(party=log.party, text=f"{where}: {error}")


def _against_witnesses(log: Log, heads: Sequence[Shown]) -> Iterator[Finding]:
    """The heads of this party that others saw, smallest first: told is the first that its log contradicts."""
    agreed = 0
    for seen in sorted(heads, key=lambda item: item.head.size):
        size = seen.head.size
        if size <= len(log.tree) and log.tree.root(size) == seen.head.root:
            agreed = size
            continue
        saw = f"a head of {size} entries that it signed on {seen.head.time}, seen by {seen.by}"
        if size <= log.proved:
            text = f"two histories: {_entries(agreed, size)} altered, removed or reordered since {saw}; it signed both"
        elif size > len(log.tree):
            text = f"log is shorter ({len(log.tree)} entries) than {saw}"
        else:
            text = f"log does not fit {saw}: {_entries(agreed, size)} altered, removed or reordered"
        yield Finding(party=log.party, text=text)
        return


def _two_roots(party: str, heads: Sequence[Shown]) -> Iterator[Finding]:
    """Two heads of one size with two roots: a fork, proved without the party's log."""
    first: dict[int, Shown] = {}
    for seen in heads:
        other = first.setdefault(seen.head.size, seen)
        if other.head.root != seen.head.root:
            yield Finding(
                party=party,
                text=f"two histories: it showed {other.by} and {seen.by} different logs of {seen.head.size} entries",
            )
            return


def excerpt_of(log: Log, indices: Sequence[int]) -> bytes:
    """An excerpt file: these entries, each with its path to the newest head. A damaged log is `Refused`."""
    if log.findings or not log.heads:
        why = f"{log.findings[0].party}: {log.findings[0].text}" if log.findings else "it has no head yet"
        raise Refused(f"nothing can be proved from this log: {why}")
    head = log.heads[-1]
    items = []
    for index in indices:
        if not 0 <= index < head.size:
            raise Refused(f"no entry {index} in a log of {head.size} entries; indices count from 0")
        path = log.tree.inclusion(index, head.size)
        items.append({"entry": log.lines[index].decode(), "path": [item.hex() for item in path]})
    about = {"version": VERSION, "party": log.party, "identity": log.public.hex()}
    return canonical({**about, "head": head.to_json(), "entries": items}) + b"\n"


def of_job(log: Log, job: str) -> list[int]:
    """Indices of the entries of a job, in order; `Refused` if there are none."""
    found = []
    for index, line in enumerate(log.lines):
        parsed = parse_line(line)
        if isinstance(parsed, LoggedEntry) and parsed.job == job:
            found.append(index)
    if not found:
        raise Refused(f"no entry of job {job!r} in the log of {log.party}; give the job's id as contracts write it")
    return found


def read_excerpt(file: Path) -> Excerpt:
    """Read an excerpt and check every proof in it; `NotProved` if one does not hold, `Refused` if it is none."""
    value = _plain_json(file, LARGEST_EXCERPT)
    match value:
        case {
            "party": str(party),
            "identity": str(identity),
            "version": int(version),
            "head": head,
            "entries": list(raw),
        }:
            if version != VERSION:
                raise Refused(f"{file}: version {version}, this program reads {VERSION}; update it")
            public = _key(identity, file)
            try:
                proofs = tuple(InclusionProof.from_json({**item, "head": head}) for item in raw)
                signed = SignedHead.from_json(head)
                if signed.party != party:
                    raise Refused(f"the head is one of {signed.party}")
                verify_head(public, signed)
                for proof in proofs:
                    proof.check(public)
            except (TypeError, Refused) as error:
                raise NotProved(party, f"the excerpt {file} proves nothing: {error}") from None
            return Excerpt(source=file, party=party, public=public, head=signed, proofs=proofs)
        case _:
            raise Refused(f"{file} is no excerpt of an audit log; give a file that export --job or prove wrote")


def whole(log: Log) -> tuple[bytes, bytes]:
    """The contents of party.json and log.jsonl of a full export: everything up to the newest head."""
    about = canonical({"identity": log.public.hex(), "party": log.party, "version": VERSION}) + b"\n"
    data = (log.source / LOG_FILE).read_bytes()
    end = len(data)
    while end and not data[data.rfind(b"\n", 0, end - 1) + 1 : end].startswith(b'{"head":'):
        end = data.rfind(b"\n", 0, end - 1) + 1
    return about, data[:end]


def _entries(start: int, end: int) -> str:
    return f"entry {start}" if end - start == 1 else f"one of the entries {start} to {end - 1}"


def _plain_json(file: Path, most: int) -> Any:
    try:
        with open(file, "rb") as opened:
            data = opened.read(most + 1)
    except OSError as error:
        raise Refused(f"{file}: {error.strerror}; give an audit folder, an export or an excerpt") from None
    if len(data) > most:
        raise Refused(f"{file} has more than {most} bytes; it is none of an audit log's files")
    try:
        return parse_canonical(data.removesuffix(b"\n"))
    except Refused as error:
        raise Refused(f"{file}: {error}") from None


def _key(text: str, file: Path) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise Refused(f"{file}: the identity is no public key of 64 hex digits")
    return key
