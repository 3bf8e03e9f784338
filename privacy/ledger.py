"""The privacy ledger of an institution: what every job may cost and did, per data set, over all kinds of release.

Guarantee: everything that left under a reservation is within what `spent` shows, whatever crashes and whoever asks at
once: a use is reserved first, on the disk, in one transaction that composes all that was ever reserved for the data set
and refuses above the owner's limits; then released; then committed. A reservation is never given back, a rerun of a job
is a new use, and a release beyond what was reserved is refused. Against: a coordinator that starts jobs in parallel,
again, or one customer less. Unit: one enterprise; adjacency as in docs/privacy-accounting.md; over jobs everything adds
up (an enterprise may be in training once and held out next time).
Feature owners' features have no epsilon: their ledger counts score openings per enterprise.
Source: docs/privacy-accounting.md, "The ledger"; Rogers, Roth, Ullman, Vadhan 2016 (privacy filters).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from privacy.chained_table import ChainedTable, Draft, Head, Row
from privacy.charges import (
    Budget,
    Charge,
    Curve,
    check_charges,
    curve_of,
    epsilon_of_curve,
    from_json,
    no_cost,
    to_json,
)
from privacy.errors import Refused
from privacy.score_openings import MOST_TIMES, Keys, OpeningCounts, pack, unpack
from privacy.spending import ChargeSpent, Opening, Openings, Spent, UseSpent

_JOB = re.compile(r"[0-9a-f]{1,128}")
_LONGEST_NAME = 200


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """One use of a data set by a job that was paid for. `head`: the ledger up to it, for the audit log."""

    data_set: str
    job: str
    use: int
    charges: tuple[Charge, ...]
    head: Head


@dataclass
class _Use:
    reservation: Reservation
    time: datetime
    curve: Curve
    performed: Counter[str] = field(default_factory=Counter)


class Ledger:
    """An institution's ledger in its file. Threads may share one; several processes may have one each open."""

    def __init__(self, path: Path, expected: Head | None = None) -> None:
        """Open, and make it if absent (mode 0600). `expected`: the newest head that the audit log knows.

        `Refused`: the file cannot be written, is damaged, has an altered, removed or reordered row, or lacks what the
        audit log knows.
        """
        self._uses: dict[tuple[str, int], _Use] = {}
        self._totals: dict[str, Curve] = {}
        self._counts: dict[str, OpeningCounts] = {}
        self._calls: dict[str, list[Opening]] = {}
        self._table = ChainedTable(path, self._learn, expected)

    def __repr__(self) -> str:
        return f"Ledger({self._table!r})"

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Afterwards every call is `Refused`."""
        self._table.close()

    def head(self) -> Head:
        """How many rows, and their digest: for the audit log, which gives it back as `expected`."""
        return self._table.refresh()

    def check(self, expected: Head) -> None:
        """`Refused` unless the ledger has `expected` as its head or had it once."""
        self._table.check(expected)

    def reserve(
        self,
        *,
        data_set: str,
        job: str,
        use: int,
        charges: Sequence[Charge],
        budget: Budget,
        now: datetime,
        exact_allowed: bool = False,
    ) -> Reservation:
        """Pay for one use of `data_set` by `job` (hex), for good; on the disk when this returns.

        `exact_allowed`: SIMULATION ONLY, infinite charges pass and are shown as infinite; finite ones keep the limits.
        `Refused`: above a limit of `budget`, (job, use) was reserved before (for any data set), clock set back, disk.
        """
        _check_use(data_set, job, use)
        check_charges(charges)
        cost = curve_of(charges)  # slow for a new kind of DP-SGD: before others are kept waiting

        def decide() -> Draft:
            if (job, use) in self._uses:
                raise Refused(
                    f"use {use} of job {job} was reserved before, at {self._uses[job, use].time.isoformat()}; a job "
                    "that runs again is another use and pays again"
                )
            self._check_budget(data_set, job, cost, budget, exact_allowed)
            body = {
                "budget": [budget.epsilon_job, budget.epsilon_total, budget.delta],
                "charges": to_json(charges),
                "exact_allowed": exact_allowed,
            }
            return Draft(kind="reserve", data_set=data_set, job=job, use=use, body=_to_text(body))

        self._table.append(now, decide)
        return self._uses[job, use].reservation

    def reservation(self, job: str, use: int) -> Reservation:
        """What was reserved for a use. `Refused` if nothing was."""
        self._table.refresh()
        return self._use(job, use).reservation

    def commit(self, reservation: Reservation, performed: Mapping[str, int], *, now: datetime) -> Head:
        """Note that releases are performed (name -> times), before they leave; all of them or, `Refused`, none.

        `Refused`: a name that was not reserved, or more often than it was reserved.
        """
        job, use = reservation.job, reservation.use
        if not performed or not all(type(times) is int and times >= 1 for times in performed.values()):
            raise Refused(f"use {use} of job {job}: performed {dict(performed)}; give names, each 1 time or more")

        def decide() -> Draft:
            known = self._use(job, use)
            if known.reservation != reservation:
                raise Refused(f"the reservation of use {use} of job {job} is not of this ledger; reserve first")
            reserved = {charge.name: charge.count for charge in known.reservation.charges}
            for name, times in performed.items():
                if name not in reserved:
                    raise Refused(
                        f"release {name!r} of job {job} was not reserved; nothing may be released that was not paid for"
                    )
                if known.performed[name] + times > reserved[name]:
                    raise Refused(
                        f"release {name!r} of job {job} would be performed {known.performed[name] + times} times, "
                        f"{reserved[name]} were paid for; plan for more attempts in the next job"
                    )
            return Draft(
                kind="perform",
                data_set=reservation.data_set,
                job=job,
                use=use,
                body=_to_text({"performed": dict(performed)}),
            )

        return self._table.append(now, decide).head

    def spent(self, data_set: str, delta: float) -> Spent:
        """Everything that was reserved for a data set, at `delta`; 0 and no uses for one that is not known."""
        self._table.refresh()
        uses = [known for known in list(self._uses.values()) if known.reservation.data_set == data_set]
        return Spent(
            data_set=data_set,
            delta=delta,
            epsilon=epsilon_of_curve(self._totals.get(data_set, no_cost()), delta),
            uses=tuple(_use_spent(known, delta) for known in uses),
        )

    def data_sets(self) -> tuple[str, ...]:
        """Every data set that has a reservation or an opening, sorted."""
        self._table.refresh()
        return tuple(sorted({*self._totals, *self._counts}))

    def open_scores(
        self,
        *,
        data_set: str,
        job: str,
        use: int,
        kind: str,
        keys: Keys,
        times: int,
        most_total: int | None,
        now: datetime,
    ) -> Head:
        """Count `times` openings of the score of every enterprise in `keys` (uint64[n] of `enterprise_keys`).

        On the disk when this returns, before the scores leave. `Refused`: any enterprise would have more than
        `most_total` openings, of all kinds and over all jobs (how many, never which); None counts without a limit.
        """
        _check_use(data_set, job, use)
        _check_name("kind of opening", kind)
        if type(times) is not int or not 1 <= times <= MOST_TIMES:
            raise Refused(f"{times} openings at once; give a whole number between 1 and {MOST_TIMES}")
        if most_total is not None and most_total < 1:
            raise Refused(f"at most {most_total} openings per enterprise; give 1 or more, or refuse the job")
        blob = pack(keys)

        def decide() -> Draft:
            if most_total is not None:
                above = self._counts.get(data_set, OpeningCounts.none()).above(most_total, keys, times)
                if above:
                    raise Refused(
                        f"job {job} would open the scores of {above} of {len(keys)} enterprises of {data_set!r} more "
                        f"than {most_total} times in all; leave them out, or let the owner raise the limit"
                    )
            body = _to_text({"kind": kind, "enterprises": len(keys), "times": times, "most_total": most_total})
            return Draft(kind="open", data_set=data_set, job=job, use=use, body=body, blob=blob)

        return self._table.append(now, decide).head

    def openings(self, data_set: str) -> Openings:
        """The score openings of a data set; an empty histogram for one that is not known."""
        self._table.refresh()
        counts = self._counts.get(data_set, OpeningCounts.none())
        return Openings(data_set=data_set, histogram=counts.histogram(), calls=tuple(self._calls.get(data_set, ())))

    def _use(self, job: str, use: int) -> _Use:
        if (job, use) not in self._uses:
            raise Refused(f"nothing was reserved for use {use} of job {job}; reserve first")
        return self._uses[job, use]

    def _check_budget(self, data_set: str, job: str, cost: Curve, budget: Budget, exact_allowed: bool) -> None:
        before = self._totals.get(data_set, no_cost())
        of_job = sum(
            (u.curve for u in self._uses.values() if (u.reservation.data_set, u.reservation.job) == (data_set, job)),
            start=no_cost(),
        )
        delta = budget.delta
        for whose, spent, limit in (
            (f"job {job}", of_job, budget.epsilon_job),
            (f"data set {data_set!r}", before, budget.epsilon_total),
        ):
            epsilon, after = epsilon_of_curve(spent, delta), epsilon_of_curve(spent + cost, delta)
            if after <= limit or (math.isinf(after) and exact_allowed):
                continue
            left = max(0.0, limit - epsilon)
            raise Refused(
                f"job {job} asks epsilon {epsilon_of_curve(cost, delta):.4g} of {data_set!r}: {whose} has spent "
                f"{epsilon:.4g} and would have spent {after:.4g} of {limit:.4g} (left {left:.4g}), all at delta "
                f"{delta:.3g}; "
                + (
                    "a release without noise has no epsilon and is for simulation only"
                    if math.isinf(after)
                    else "ask for less, or let the owner raise the limit: what is spent never comes back"
                )
            )

    def _learn(self, row: Row) -> None:
        try:
            body = json.loads(row.body)
            match row.kind:
                case "reserve":
                    self._learn_reservation(row, from_json(body["charges"]))
                case "perform":
                    self._uses[row.job, row.use].performed.update(body["performed"])
                case "open":
                    self._learn_opening(row, body)
                case _:
                    raise ValueError(f"kind {row.kind!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(
                f"row {row.number} of the privacy ledger cannot be read ({error!r}); it was written by another version "
                "of this program, update it"
            ) from None

    def _learn_reservation(self, row: Row, charges: tuple[Charge, ...]) -> None:
        if (row.job, row.use) in self._uses:
            raise ValueError("a use that was reserved before")
        curve = curve_of(charges)
        reservation = Reservation(data_set=row.data_set, job=row.job, use=row.use, charges=charges, head=row.head)
        self._uses[row.job, row.use] = _Use(reservation, row.when, curve)
        self._totals[row.data_set] = self._totals.get(row.data_set, no_cost()) + curve

    def _learn_opening(self, row: Row, body: Mapping[str, Any]) -> None:
        keys, times = unpack(row.blob), int(body["times"])
        opening = Opening(
            job=row.job, use=row.use, time=row.when, kind=body["kind"], enterprises=len(keys), times=times
        )
        self._counts[row.data_set] = self._counts.get(row.data_set, OpeningCounts.none()).plus(keys, times)
        self._calls.setdefault(row.data_set, []).append(opening)


def _use_spent(known: _Use, delta: float) -> UseSpent:
    return UseSpent(
        job=known.reservation.job,
        use=known.reservation.use,
        time=known.time,
        epsilon=epsilon_of_curve(known.curve, delta),
        charges=tuple(
            ChargeSpent(charge=charge, reserved=charge.count, performed=known.performed[charge.name])
            for charge in known.reservation.charges
        ),
    )


def _check_use(data_set: str, job: str, use: int) -> None:
    _check_name("data set", data_set)
    if not _JOB.fullmatch(job):
        raise Refused(f"job {job[:80]!r} is no job id; give lower-case hex digits, at most 128")
    if type(use) is not int or not 0 <= use < 2**31:
        raise Refused(f"use {use} of job {job}; uses are counted from 0")


def _check_name(what: str, name: str) -> None:
    if not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
        raise Refused(f"{what} {name[:80]!r}; give a printable name of at most {_LONGEST_NAME} characters")


def _to_text(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
