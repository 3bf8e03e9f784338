"""Consent of each enterprise for each purpose: imported from a table, revoked at any time, asked before every step.

A consent is live at a moment if it was granted before, has not expired, and no revocation for the same enterprise and
purpose lies between grant and that moment: a revocation ends every grant made before it, whichever row it came with; a
later grant is a new consent. Purposes are compared as whole texts; there is no consent for everything and none without
an end. An import is all or nothing, and can be repeated: what is stored never becomes more permissive by an import that
only leaves a revocation out.

The store is an SQLite file of the institution, readable by its owner only; `live` reads it anew each time, so that a
revocation between alignment and training takes the row out before the next step (PIPL arts. 14-16, 23). Moments are UTC
seconds; a date without a time is a day in Beijing: granted and revoked at its beginning, expired at its end.
"""

import os
import re
import sqlite3
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fl_clients.mapping import are_valid_codes
from models import uscc
from models.errors import DataError

BEIJING = timezone(timedelta(hours=8))
SHOWN_ROWS = 5

_NAMES: Mapping[str, tuple[str, ...]] = {
    "uscc": ("uscc", "统一社会信用代码", "社会信用代码", "信用代码", "credit_code"),
    "purpose": ("purpose", "用途", "授权用途", "使用目的", "目的", "授权目的"),
    "granted": ("granted", "授权日期", "授权时间", "同意日期", "granted_at"),
    "expires": ("expires", "到期日期", "授权到期日", "有效期至", "失效日期", "expires_at"),
    "revoked": ("revoked", "撤回日期", "撤销日期", "撤回时间", "revoked_at"),
    "evidence": ("evidence", "evidence_sha256", "授权书哈希", "证据哈希", "存证哈希", "evidence_hash"),
}
_OPTIONAL = frozenset({"revoked"})
_EVERYTHING = frozenset({"*", "all", "any", "全部", "所有", "任意"})
_SHA256 = re.compile("[0-9a-f]{64}")
_DAY = re.compile(r"(\d{4})[-/.年]?(\d{1,2})[-/.月]?(\d{1,2})日?")

_TABLE = """
CREATE TABLE IF NOT EXISTS consent (
    code TEXT NOT NULL, purpose TEXT NOT NULL, granted INTEGER NOT NULL, expires INTEGER NOT NULL,
    revoked INTEGER, evidence TEXT NOT NULL, imported INTEGER NOT NULL,
    PRIMARY KEY (code, purpose, granted)
) WITHOUT ROWID
"""
_LIVE = """
    granted <= :now AND expires > :now AND NOT EXISTS (
        SELECT 1 FROM consent AS other
        WHERE other.code = consent.code AND other.purpose = consent.purpose
          AND other.revoked >= consent.granted AND other.revoked <= :now
    )
"""

Grant = tuple[str, str, int, int, int | None, str]
"""(code, purpose, granted, expires, revoked, evidence)"""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did: rows read, consents new to the store, revocations new to the store."""

    rows: int
    added: int
    revoked: int


@dataclass(frozen=True, kw_only=True)
class PurposeSummary:
    """Enterprises per purpose at one moment: with live consent, and with a consent that is not live (any more)."""

    purpose: str
    live: int
    not_live: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One consent for people: the code masked, moments in UTC."""

    masked_code: str
    purpose: str
    granted: datetime
    expires: datetime
    revoked: datetime | None
    live: bool
    evidence: str


def consent_columns(names: Sequence[str]) -> dict[str, str]:
    """Our name -> the table's column. DataError where one is missing: a consent without a purpose is none."""
    plain = {re.sub(r"[\s_]", "", unicodedata.normalize("NFKC", name)).lower(): name for name in names}
    found = {}
    for ours, aliases in _NAMES.items():
        for alias in aliases:
            if (column := plain.get(alias.replace("_", ""))) is not None:
                found[ours] = column
                break
        else:
            if ours not in _OPTIONAL:
                raise DataError(
                    f"the consent table has no column for {ours} (named {' or '.join(aliases[:3])}); "
                    "a consent counts only with enterprise, purpose, granted, expires and evidence"
                )
    return found


class ConsentStore:
    """The institution's consents. Methods take the present moment `now`, with a time zone (ValueError without)."""

    def __init__(self, path: Path) -> None:
        with suppress(FileExistsError):  # one that exists is not opened here: see privacy/private_file.py
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            # a vault answers on the worker thread of its socket; the lock keeps statements apart
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._lock = threading.RLock()
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._database.execute(_TABLE)
        except sqlite3.DatabaseError:
            raise DataError(f"{path.name}: is no consent store; restore it from a backup or import anew") from None

    def close(self) -> None:
        self._database.close()

    def import_table(self, batches: Iterable[pa.RecordBatch], columns: Mapping[str, str], now: datetime) -> Imported:
        """Take a table of consents. `columns`: from `consent_columns`. DataError, and nothing taken, for any bad row.

        A row that is stored already changes nothing but an earlier revocation; one that contradicts what is stored
        (same enterprise, purpose and grant, another end or evidence) is refused.
        """
        moment = _seconds(now)
        rows = added = revoked = 0
        wrong: dict[str, list[tuple[int, str]]] = {}
        counts: dict[str, int] = {}
        with self._transaction():
            for batch in batches:
                for number, grant, what in _grants(batch, columns, rows + 1, moment):
                    if what is None:
                        new, ended, what = self._store(grant, moment) if not counts else (0, 0, None)
                        added, revoked = added + new, revoked + ended
                    if what is not None:
                        counts[what] = counts.get(what, 0) + 1
                        if counts[what] <= SHOWN_ROWS:
                            wrong.setdefault(what, []).append((number, uscc.mask(grant[0])))
                rows += batch.num_rows
            if not rows:
                raise DataError("the consent table is empty; nothing was imported")
            if counts:
                raise DataError(f"{'; '.join(_lines(counts, wrong))}. Nothing was imported; mend the table")
        return Imported(rows=rows, added=added, revoked=revoked)

    def _store(self, grant: Grant, moment: int) -> tuple[int, int, str | None]:
        """(1 if new, 1 if a new or earlier revocation, what contradicts)."""
        code, purpose, granted, expires, revoked, evidence = grant
        key = (code, purpose, granted)
        old = self._database.execute(
            "SELECT expires, revoked, evidence FROM consent WHERE code = ? AND purpose = ? AND granted = ?", key
        ).fetchone()
        if old is None:
            self._database.execute("INSERT INTO consent VALUES (?, ?, ?, ?, ?, ?, ?)", (*grant, moment))
            return 1, int(revoked is not None), None
        if (old[0], old[2]) != (expires, evidence):
            return 0, 0, "with another end or evidence than the same consent in the store"
        if revoked is not None and (old[1] is None or revoked < old[1]):
            self._database.execute(
                "UPDATE consent SET revoked = ? WHERE code = ? AND purpose = ? AND granted = ?", (revoked, *key)
            )
            return 0, 1, None
        return 0, 0, None

    def revoke(self, code: str, purpose: str, now: datetime) -> None:
        """The enterprise withdraws its consent for the purpose from now on. DataError where none is live."""
        enterprise, aim, moment = uscc.parse(code).code, _purpose(purpose), _seconds(now)
        with self._transaction():
            done = self._database.execute(
                f"UPDATE consent SET revoked = :now WHERE code = :code AND purpose = :purpose AND {_LIVE}",  # noqa: S608
                {"now": moment, "code": enterprise, "purpose": aim},
            ).rowcount
            if not done:
                raise DataError(f"{uscc.mask(enterprise)} has no live consent for {aim!r}; see `consent list`")

    def live(self, codes: npt.NDArray[np.str_] | Sequence[str], purpose: str, now: datetime) -> npt.NDArray[np.bool_]:
        """bool[n]: which of the normalised codes have live consent for the purpose at this moment."""
        with self._lock:
            found = self._database.execute(
                f"SELECT DISTINCT code FROM consent WHERE purpose = :purpose AND {_LIVE}",  # noqa: S608
                {"now": _seconds(now), "purpose": _purpose(purpose)},
            )
            consenting = {row[0] for row in found}
        return np.fromiter((str(code) in consenting for code in codes), np.bool_, count=len(codes))

    def purposes(self, now: datetime) -> list[PurposeSummary]:
        """How many enterprises have consent, by purpose."""
        found = self._database.execute(
            f"""SELECT purpose, SUM(live), COUNT(*) - SUM(live) FROM (
                SELECT purpose, code, MAX({_LIVE}) AS live FROM consent GROUP BY purpose, code
            ) GROUP BY purpose ORDER BY purpose""",  # noqa: S608
            {"now": _seconds(now)},
        )
        return [PurposeSummary(purpose=purpose, live=live, not_live=rest) for purpose, live, rest in found]

    def entries(self, purpose: str, now: datetime, limit: int) -> list[Entry]:
        """The latest grants for a purpose, codes masked."""
        found = self._database.execute(
            f"""SELECT code, purpose, granted, expires, revoked, evidence, {_LIVE} FROM consent
                WHERE purpose = :purpose ORDER BY granted DESC, code LIMIT :limit""",  # noqa: S608
            {"now": _seconds(now), "purpose": _purpose(purpose), "limit": limit},
        )
        return [
            Entry(
                masked_code=uscc.mask(code),
                purpose=aim,
                granted=datetime.fromtimestamp(granted, UTC),
                expires=datetime.fromtimestamp(expires, UTC),
                revoked=None if revoked is None else datetime.fromtimestamp(revoked, UTC),
                live=bool(live),
                evidence=evidence,
            )
            for code, aim, granted, expires, revoked, evidence, live in found
        ]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, whatever is raised."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


def _lines(counts: Mapping[str, int], wrong: Mapping[str, list[tuple[int, str]]]) -> Iterator[str]:
    for what, count in counts.items():
        shown = ", ".join(f"{number:,} {masked}".strip() for number, masked in wrong[what])
        yield f"{count:,} consents {what} (row {shown}{' ...' if count > SHOWN_ROWS else ''})"


def _grants(
    batch: pa.RecordBatch, columns: Mapping[str, str], first_row: int, now: int
) -> Iterator[tuple[int, Grant, str | None]]:
    """(row number, grant, what is wrong with it) of each row."""
    cells = {ours: batch.column(theirs).to_pylist() for ours, theirs in columns.items()}
    codes = [uscc.normalise(str(code)) if code is not None else "" for code in cells["uscc"]]
    fixed = [code.encode() if code.isascii() and len(code) == uscc.LENGTH else b"" for code in codes]
    valid = are_valid_codes(np.array(fixed, f"S{uscc.LENGTH}"))
    revocations = cells.get("revoked", [None] * len(codes))
    rest = zip(cells["purpose"], cells["granted"], cells["expires"], revocations, cells["evidence"], strict=True)
    for place, (purpose, granted, expires, revoked, evidence) in enumerate(rest):
        grant, what = _grant(codes[place], bool(valid[place]), purpose, (granted, expires, revoked), evidence, now)
        yield first_row + place, grant, what


def _grant(
    code: str, valid: bool, purpose: Any, moments: tuple[Any, Any, Any], evidence: Any, now: int
) -> tuple[Grant, str | None]:
    """The row as a grant, and what is wrong with it."""
    none: Grant = (code, "", 0, 0, None, "")
    if not valid:
        return none, "with a malformed code"
    try:
        aim = _purpose(str(purpose or ""))
    except DataError:
        return none, "without a purpose (one stated purpose each)"
    try:
        granted = _moment(moments[0], end_of_day=False)
        expires = _moment(moments[1], end_of_day=True)
        revoked = _moment(moments[2], end_of_day=False)
    except ValueError:
        return none, "with a date that cannot be read (write YYYY-MM-DD)"
    if granted is None or expires is None:
        return none, "without a day of grant or an end"
    if granted > now:
        return none, "granted in the future"
    if expires <= granted:
        return none, "that expire before they are granted"
    if revoked is not None and revoked < granted - 86_400:
        return none, "revoked before they are granted"
    if revoked is not None:
        revoked = max(revoked, granted)  # both on one day: the revocation came second
    digest = str(evidence or "").strip().lower()
    if not _SHA256.fullmatch(digest):
        return none, "without evidence (SHA-256 of the signed form, 64 hex digits)"
    return (code, aim, granted, expires, revoked, digest), None


def _purpose(text: str) -> str:
    """The purpose as it is stored and compared. DataError for none, or for one that means everything."""
    purpose = " ".join(unicodedata.normalize("NFKC", text).split())
    if not purpose or purpose.lower() in _EVERYTHING:
        raise DataError(f"purpose {purpose!r}: consent is for one stated purpose; write it as the contract does")
    return purpose


def _seconds(now: datetime) -> int:
    if now.tzinfo is None:
        raise ValueError("now: has no time zone; pass datetime.now(UTC)")
    return int(now.timestamp())


def _moment(value: Any, *, end_of_day: bool) -> int | None:
    """UTC seconds of a date, timestamp or text; None for an empty cell. ValueError for what is none of these."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        text = unicodedata.normalize("NFKC", value).strip()
        if found := _DAY.fullmatch(text):
            value = date(int(found[1]), int(found[2]), int(found[3]))
        else:
            value = datetime.fromisoformat(text)
    elif isinstance(value, int):
        return _moment(str(value), end_of_day=end_of_day)
    if isinstance(value, datetime):
        return int((value if value.tzinfo is not None else value.replace(tzinfo=BEIJING)).timestamp())
    if not isinstance(value, date):
        raise ValueError("neither a date nor a text")
    day = datetime(value.year, value.month, value.day, tzinfo=BEIJING)
    return int(day.timestamp()) + (86_400 if end_of_day else 0)
