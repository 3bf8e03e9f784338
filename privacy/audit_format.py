"""The file format of the audit log: entries and signed heads, each one line of JSON. Shared by writer and verifiers.

Guarantee: `parse_line` accepts a line in one form only, so that two readers never understand it differently; a head
that `verify_head` accepts was signed by that party for exactly this size, root and time. Bodies that look as if they
held secrets or rows are refused before they reach a file.
Against: whoever can alter the file or the heads on their way. The check of bodies is a net under the code that writes
entries, not a proof: a number can still be somebody's.
Formula: line = canonical JSON (keys sorted by code point, no blanks, UTF-8, no escapes that are not needed, finite
numbers); leaf of the tree = the bytes of an entry's line, without its newline.
Source: RFC 6962 for the tree (privacy/merkle.py), RFC 8032 for signatures; docs/audit.md says it in full.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from privacy.errors import Refused
from privacy.identity import SigningIdentity, verify
from privacy.merkle import HASH_BYTES, leaf_hash, verify_inclusion
from privacy.sealing import encode_fields

LOG_FILE, PARTY_FILE = "log.jsonl", "party.json"
VERSION = 1
LARGEST_LINE = 4 << 20
"""Bytes of one line."""
LARGEST_TEXT = 64 << 10
"""Bytes of one string in a body: no hash, name or sentence is longer, a table is."""
LONGEST_LIST = 4096
"""Items of one list or object in a body."""
LARGEST_INTEGER = (1 << 53) - 1
"""What every JSON reader keeps exactly; larger ones are written as text."""

_HEAD_CONTEXT = b"xinyi audit head 1"
_COUNTERSIGNATURE_CONTEXT = b"xinyi audit countersignature 1"
_DEEPEST = 16
_KIND = re.compile(r"[a-z][a-z_]{0,31}")
_JOB = re.compile(r"[0-9A-Za-z._-]{1,64}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{6}Z")
_HEX = re.compile(r"[0-9a-f]+")
# unified social credit codes (GB 32100) and citizens' numbers (GB 11643) both have this shape
_PERSONAL_CODE = re.compile(r"(?<![0-9A-Z])[0-9A-HJ-NP-RTUW-Y]{2}[0-9]{6}[0-9A-HJ-NP-RTUW-Y]{10}(?![0-9A-Z])")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is to be logged. `body`: JSON data (hashes, counts, names); `job`: the job's id, None outside any job."""

    kind: str
    job: str | None
    body: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not _KIND.fullmatch(self.kind):
            raise Refused(f"audit entry of kind {self.kind!r}; a kind is a lower-case word")
        if self.job is not None and (not isinstance(self.job, str) or not _JOB.fullmatch(self.job)):
            raise Refused(f"audit entry {self.kind!r} of job {self.job!r}; a job id has 1 to 64 letters, digits, ._-")


@dataclass(frozen=True, kw_only=True)
class LoggedEntry:
    """An entry as it stands in a log. `time`: UTC text, ordered like the times themselves; `line`: the leaf's bytes."""

    index: int
    time: str
    kind: str
    job: str | None
    body: dict[str, Any]
    line: bytes

    @property
    def leaf(self) -> bytes:
        """32 bytes: its hash in the tree."""
        return leaf_hash(self.line)


@dataclass(frozen=True, kw_only=True)
class SignedHead:
    """A party's word: at `time` (UTC text) my log had `size` entries with this Merkle root."""

    party: str
    size: int
    root: bytes
    time: str
    signature: bytes

    def to_json(self) -> dict[str, Any]:
        """As it stands in a log or in a body: root and signature in hex."""
        return {
            "party": self.party,
            "size": self.size,
            "root": self.root.hex(),
            "time": self.time,
            "signature": self.signature.hex(),
        }

    @classmethod
    def from_json(cls, value: object) -> "SignedHead":
        """The inverse of `to_json`; anything else is `Refused`. The signature is not checked here."""
        match value:
            case {"party": str(party), "size": int(size), "root": str(root), "time": str(time), "signature": str(sign)}:
                known = isinstance(value, dict) and len(value) == 5
                known = known and not isinstance(size, bool) and 0 <= size <= LARGEST_INTEGER
                if (
                    known
                    and 1 <= len(party) <= 64
                    and _is_hex(root, HASH_BYTES)
                    and _is_hex(sign, 64)
                    and _is_time(time)
                ):
                    return cls(
                        party=party, size=size, root=bytes.fromhex(root), time=time, signature=bytes.fromhex(sign)
                    )
        raise Refused("not a signed head: it needs exactly party, size, root (64 hex), time (UTC), signature (128 hex)")


def sign_head(identity: SigningIdentity, *, party: str, size: int, root: bytes, time: str) -> SignedHead:
    """A head of the party's own log."""
    signature = identity.sign(_HEAD_CONTEXT, encode_fields(_head_fields(party, size, root, time)))
    return SignedHead(party=party, size=size, root=root, time=time, signature=signature)


def verify_head(public_key: bytes, head: SignedHead) -> None:
    """Raises `Refused` unless the head was signed by `public_key` (32 bytes)."""
    fields = _head_fields(head.party, head.size, head.root, head.time)
    verify(public_key, _HEAD_CONTEXT, encode_fields(fields), head.signature)


def countersign(identity: SigningIdentity, head: SignedHead) -> bytes:
    """64 bytes: this party has seen that head of another party. Sign only what `verify_head` accepted."""
    return identity.sign(_COUNTERSIGNATURE_CONTEXT, _countersigned(head))


def verify_countersignature(public_key: bytes, head: SignedHead, signature: bytes) -> None:
    """Raises `Refused` unless the holder of `public_key` countersigned exactly this head."""
    verify(public_key, _COUNTERSIGNATURE_CONTEXT, _countersigned(head), signature)


@dataclass(frozen=True, kw_only=True)
class InclusionProof:
    """One entry, and that it is in the log a signed head speaks of. `path`: hashes of 32 bytes, lowest first."""

    line: bytes
    path: tuple[bytes, ...]
    head: SignedHead

    @property
    def entry(self) -> LoggedEntry:
        """The entry, parsed; a line that is no entry is `Refused`."""
        parsed = parse_line(self.line)
        if not isinstance(parsed, LoggedEntry):
            raise Refused("the proof shows a head, not an entry")
        return parsed

    def check(self, public_key: bytes) -> LoggedEntry:
        """The proved entry; `Refused` unless the head is by `public_key` and the path leads from the entry to it."""
        verify_head(public_key, self.head)
        entry = self.entry
        verify_inclusion(entry.leaf, entry.index, self.head.size, self.path, self.head.root)
        return entry

    def to_json(self) -> dict[str, Any]:
        """As in a proof file: the entry's line as text, the path in hex."""
        return {
            "entry": self.line.decode(),
            "path": [item.hex() for item in self.path],
            "head": self.head.to_json(),
        }

    @classmethod
    def from_json(cls, value: object) -> "InclusionProof":
        """The inverse of `to_json`; anything else is `Refused`. Nothing is proved before `check`."""
        match value:
            case {"entry": str(line), "path": list(path), "head": head}:
                known = isinstance(value, dict) and len(value) == 3 and len(path) <= 64
                if known and all(isinstance(item, str) and _is_hex(item, HASH_BYTES) for item in path):
                    return cls(
                        line=line.encode(errors="surrogatepass"),
                        path=tuple(bytes.fromhex(item) for item in path),
                        head=SignedHead.from_json(head),
                    )
        raise Refused("not an inclusion proof: it needs exactly entry (a line), path (a list of 64 hex digits), head")


def canonical(value: object) -> bytes:
    """The one JSON text of a value, as bytes."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError):
        raise Refused("an audit line holds what JSON cannot: only text, finite numbers, lists and objects") from None


def entry_line(entry: Entry, index: int, time: str) -> bytes:
    """The line of an entry, without the newline. A body that may hold secrets or rows is `Refused`."""
    check_body(entry.kind, entry.body)
    line = canonical({"body": entry.body, "index": index, "job": entry.job, "kind": entry.kind, "time": time})
    if len(line) > LARGEST_LINE:
        raise Refused(f"audit entry {entry.kind!r} has {len(line)} bytes, at most {LARGEST_LINE}; log its hash instead")
    return line


def head_line(head: SignedHead) -> bytes:
    """The line of a head, without the newline."""
    return canonical({"head": head.to_json()})


def parse_line(line: bytes) -> LoggedEntry | SignedHead:
    """A line (without its newline) of a log. Anything but the canonical form is `Refused`; no signature is checked."""
    if len(line) > LARGEST_LINE:
        raise Refused(f"a line of {len(line)} bytes, at most {LARGEST_LINE}")
    value = parse_canonical(line)
    if isinstance(value, dict) and value.keys() == {"head"}:
        return SignedHead.from_json(value["head"])
    match value:
        case {
            "body": dict(body),
            "index": int(index),
            "job": None | str() as job,
            "kind": str(kind),
            "time": str(time),
        }:
            if len(value) == 5 and not isinstance(index, bool) and 0 <= index <= LARGEST_INTEGER and _is_time(time):
                Entry(kind=kind, job=job, body={})  # its checks of kind and job
                return LoggedEntry(index=index, time=time, kind=kind, job=job, body=body, line=line)
    raise Refused("neither an entry (body, index, job, kind, time) nor a head")


def parse_canonical(text: bytes) -> Any:
    """JSON of exactly the canonical form; a repeated key, a blank or another spelling of a number is `Refused`."""
    try:
        value = json.loads(text)
        if canonical(value) == text:
            return value
    except (ValueError, RecursionError):
        pass
    raise Refused("not canonical JSON")


def check_body(kind: str, body: object) -> None:
    """`Refused` if a body holds what an audit log must not: bytes, arrays, tables, long texts, codes of enterprises.

    Messages name the place and never the content.
    """
    if not isinstance(body, Mapping):
        raise Refused(f"audit entry {kind!r}: the body must be an object of JSON data")
    _check_value(dict(body), f"audit entry {kind!r}, body", 0)


def utc_text(time: datetime) -> str:
    """2026-11-25T05:48:16.000123Z; a time without zone is `Refused`."""
    if time.tzinfo is None:
        raise Refused("the clock gave a time without zone; give datetime.now(UTC)")
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def utc_time(text: str) -> datetime:
    """The inverse of `utc_text`."""
    if not _is_time(text):
        raise Refused(f"{text[:40]!r} is no UTC time of the form 2026-11-25T05:48:16.000123Z")
    return datetime.fromisoformat(text)


def _check_value(value: object, where: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise Refused(f"{where} is nested deeper than {_DEEPEST}; log a hash instead")
    # exact types: a numpy scalar or array is a kind of row
    if value is None or type(value) is bool:
        return
    if type(value) is str:
        _check_text(value, where)
    elif type(value) is int:
        if abs(value) > LARGEST_INTEGER:
            raise Refused(f"{where} holds an integer beyond 2^53; write it as text")
    elif type(value) is float:
        if not math.isfinite(value):
            raise Refused(f"{where} holds a number that is not finite; leave it out")
    elif type(value) is dict:
        _check_length(len(value), where)
        for key, item in value.items():
            if type(key) is not str:
                raise Refused(f"{where} has a key of type {type(key).__name__}; JSON keys are text")
            _check_text(key, where)
            _check_value(item, f"{where}.{key[:40]}", depth + 1)
    elif type(value) is list or type(value) is tuple:
        _check_length(len(value), where)
        for number, item in enumerate(value):
            _check_value(item, f"{where}[{number}]", depth + 1)
    else:
        raise Refused(f"{where} holds a {type(value).__name__}; log its hash and size instead")


def _check_length(length: int, where: str) -> None:
    if length > LONGEST_LIST:
        raise Refused(
            f"{where} has {length} items, at most {LONGEST_LIST}; that looks like rows, log a hash and a count"
        )


def _check_text(text: str, where: str) -> None:
    if len(text) > LARGEST_TEXT or len(text.encode(errors="surrogatepass")) > LARGEST_TEXT:
        raise Refused(f"{where} holds a text above {LARGEST_TEXT} bytes; log its hash and size instead")
    plain = text if text.isascii() else unicodedata.normalize("NFKC", text)
    if len(plain) >= 18 and _PERSONAL_CODE.search(plain.upper()):
        raise Refused(f"{where} holds what looks like the code of an enterprise or a person; log counts, no codes")


def _head_fields(party: str, size: int, root: bytes, time: str) -> list[bytes]:
    return [party.encode(errors="surrogatepass"), size.to_bytes(8, "big"), root, time.encode()]


def _countersigned(head: SignedHead) -> bytes:
    return encode_fields([*_head_fields(head.party, head.size, head.root, head.time), head.signature])


def _is_hex(text: str, length: int) -> bool:
    return len(text) == 2 * length and _HEX.fullmatch(text) is not None


def _is_time(text: str) -> bool:
    if not _TIME.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
