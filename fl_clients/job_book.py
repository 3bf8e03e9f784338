"""The job book of one institution: where every job stands, in one SQLite table that survives a kill.

States follow notify - authorise - collect - apply - destroy (告知、授权、归集、应用、销毁); none can be skipped:

    notified -> authorised -> collecting -> applying -> destroyed      (each run begins with collecting: one use)
        \\-> refused                \\-----------\\----> destroyed      (stopped, expired, or the process died)
    destroyed -> collecting                                             while uses are left

Guarantee: a transition that this picture does not have is `Refused`, whoever asks and however many processes do; a use
is counted in the same transaction that begins it. Against: a coordinator that asks out of order, too often or too late.
The table is in `vault.sqlite`, beside the privacy ledger.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from fl_clients.contract import Contract, SignedContract
from privacy.errors import Refused
from privacy.private_file import private_database

BUSY_S = 30.0

_TABLE = """
CREATE TABLE IF NOT EXISTS job (
    job TEXT PRIMARY KEY, hash TEXT NOT NULL, contract TEXT NOT NULL, state TEXT NOT NULL,
    uses INTEGER NOT NULL DEFAULT 0, reason TEXT NOT NULL DEFAULT '', updated TEXT NOT NULL
) WITHOUT ROWID
"""


class JobState(StrEnum):
    """Where a job stands at this institution."""

    NOTIFIED = "notified"
    AUTHORISED = "authorised"
    REFUSED = "refused"
    COLLECTING = "collecting"
    APPLYING = "applying"
    DESTROYED = "destroyed"


_MAY_FOLLOW = {
    JobState.NOTIFIED: {JobState.AUTHORISED, JobState.REFUSED},
    JobState.AUTHORISED: {JobState.COLLECTING, JobState.REFUSED, JobState.DESTROYED},
    JobState.REFUSED: set[JobState](),
    JobState.COLLECTING: {JobState.APPLYING, JobState.DESTROYED},
    JobState.APPLYING: {JobState.DESTROYED},
    JobState.DESTROYED: {JobState.COLLECTING},
}


@dataclass(frozen=True, kw_only=True)
class JobEntry:
    """One job as the book has it. `uses`: runs begun so far. `reason`: of a refusal or an early end."""

    signed: SignedContract
    state: JobState
    uses: int
    reason: str
    updated: str

    @property
    def contract(self) -> Contract:
        return self.signed.contract


class JobBook:
    """The jobs of one institution. Methods that change something take the present moment `now` (aware)."""

    def __init__(self, path: Path) -> None:
        self._database = private_database(path, BUSY_S)
        self._lock = threading.RLock()
        self._database.execute(_TABLE)

    def close(self) -> None:
        self._database.close()

    def receive(self, signed: SignedContract, now: datetime) -> JobEntry:
        """Notify: enter a contract that the coordinator signed. The same one again changes nothing; another contract
        under a known job number is `Refused`.
        """
        signed.check("coordinator")
        contract = signed.contract
        with self._transaction():
            known = self._find(contract.job)
            if known is None:
                self._database.execute(
                    "INSERT INTO job (job, hash, contract, state, updated) VALUES (?, ?, ?, ?, ?)",
                    (contract.job, contract.hash.hex(), signed.model_dump_json(), JobState.NOTIFIED, _text(now)),
                )
            elif known.contract.hash != contract.hash:
                raise Refused(
                    f"job {contract.job} is known with contract {known.contract.hash.hex()[:16]}, now comes "
                    f"{contract.hash.hex()[:16]}: a changed contract is a new job, ask for one with its own number"
                )
        return self.get(contract.job)

    def get(self, job: str) -> JobEntry:
        """The job, by its number or an unambiguous beginning of it."""
        found = self._database.execute(
            "SELECT contract, state, uses, reason, updated FROM job WHERE substr(job, 1, ?) = ?", (len(job), job)
        ).fetchall()
        if len(found) != 1 or not job:
            raise Refused(f"job {job!r}: {'unknown here' if not found else 'ambiguous'}; see `xinyi-node job list`")
        return _entry(found[0])

    def with_contract(self, contract_hash: bytes) -> JobEntry | None:
        """The job whose contract has this hash."""
        row = self._database.execute(
            "SELECT contract, state, uses, reason, updated FROM job WHERE hash = ?", (contract_hash.hex(),)
        ).fetchone()
        return None if row is None else _entry(row)

    def all(self) -> tuple[JobEntry, ...]:
        """Every job, newest change first."""
        rows = self._database.execute("SELECT contract, state, uses, reason, updated FROM job ORDER BY updated DESC")
        return tuple(_entry(row) for row in rows)

    def authorise(self, signed: SignedContract, now: datetime) -> None:
        """Authorise, with the contract as this institution signed it."""
        self._move(signed.contract, JobState.AUTHORISED, now, signed=signed)

    def sign_all(self, signed: SignedContract, now: datetime) -> None:
        """Keep the contract with everyone's signatures; the state stays."""
        signed.check_all()
        with self._transaction():
            known = self._known(signed.contract)
            self._update(signed.contract.job, known.state, now, signed=signed)

    def refuse(self, contract: Contract, reason: str, now: datetime) -> None:
        """Refuse for good."""
        self._move(contract, JobState.REFUSED, now, reason=reason)

    def begin_use(self, contract: Contract, use: int, now: datetime) -> None:
        """Collect: begin run number `use` (from 1), if the contract is valid now, allows so many, and it is a new one.

        A run that was begun and never destroyed (its process died) counts as a use, and so does one that was skipped.
        """
        with self._transaction():
            known = self._known(contract)
            if known.state in (JobState.NOTIFIED, JobState.REFUSED):
                raise Refused(f"job {contract.job} is {known.state} here, not authorised; a person must approve it")
            if known.state in (JobState.COLLECTING, JobState.APPLYING):
                raise Refused(f"run {known.uses} of job {contract.job} is not over; one at a time")
            check_valid(contract, now)
            if use > contract.uses:
                raise Refused(
                    f"run {use} of job {contract.job}: its contract allows {contract.uses}; a further run needs a new "
                    "contract"
                )
            if use <= known.uses:
                raise Refused(
                    f"run {use} of job {contract.job} was begun here already; the next one is {known.uses + 1}"
                )
            self._update(contract.job, JobState.COLLECTING, now, uses=use)

    def apply(self, contract: Contract, now: datetime) -> None:
        """Apply: from here on sums are released."""
        check_valid(contract, now)
        self._move(contract, JobState.APPLYING, now)

    def destroy(self, contract: Contract, reason: str, now: datetime) -> None:
        """Destroy: keys, pads, rows and alignments of the run are gone."""
        self._move(contract, JobState.DESTROYED, now, reason=reason)

    def _move(
        self, contract: Contract, to: JobState, now: datetime, reason: str = "", signed: SignedContract | None = None
    ) -> None:
        with self._transaction():
            known = self._known(contract)
            if to not in _MAY_FOLLOW[known.state]:
                raise Refused(
                    f"job {contract.job} is {known.state}; {to} cannot follow (notify, authorise, collect, apply, "
                    "destroy: none is skipped)"
                )
            self._update(contract.job, to, now, reason=reason, signed=signed)

    def _update(
        self,
        job: str,
        state: JobState,
        now: datetime,
        uses: int | None = None,
        reason: str = "",
        signed: SignedContract | None = None,
    ) -> None:
        self._database.execute(
            "UPDATE job SET state = ?, updated = ?, reason = ?, uses = coalesce(?, uses), "
            "contract = coalesce(?, contract) WHERE job = ?",
            (state, _text(now), reason, uses, signed.model_dump_json() if signed else None, job),
        )

    def _known(self, contract: Contract) -> JobEntry:
        known = self._find(contract.job)
        if known is None:
            raise Refused(f"job {contract.job} is unknown here; receive its contract first")
        if known.contract.hash != contract.hash:
            raise Refused(f"job {contract.job} has another contract here ({known.contract.hash.hex()[:16]})")
        return known

    def _find(self, job: str) -> JobEntry | None:
        row = self._database.execute(
            "SELECT contract, state, uses, reason, updated FROM job WHERE job = ?", (job,)
        ).fetchone()
        return None if row is None else _entry(row)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield
                self._database.execute("COMMIT")
            except BaseException as error:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise Refused(f"the job book cannot be written ({error}); nothing was changed") from None
                raise


def check_valid(contract: Contract, now: datetime) -> None:
    """`Refused` before the contract begins or after it expires."""
    if now < contract.not_before:
        raise Refused(f"the contract is valid from {contract.not_before.isoformat()} on, now is {_text(now)}")
    if now >= contract.expires:
        raise Refused(f"the contract expired at {contract.expires.isoformat()}, now is {_text(now)}; ask for a new one")


def _entry(row: tuple[str, str, int, str, str]) -> JobEntry:
    contract, state, uses, reason, updated = row
    return JobEntry(
        signed=SignedContract.model_validate_json(contract),
        state=JobState(state),
        uses=uses,
        reason=reason,
        updated=updated,
    )


def _text(now: datetime) -> str:
    if now.tzinfo is None:
        raise ValueError("now: has no time zone; pass datetime.now(UTC)")
    return now.isoformat()
