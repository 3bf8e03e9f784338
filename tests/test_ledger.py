"""The privacy ledger: reserves within the limits, never shows less than was released, and knows when it was altered."""

import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent, ZCDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accounting import epsilon_after, epsilon_of, plan_job, scorecard_releases
from privacy.chained_table import ChainedTable, Draft, Head, empty_head
from privacy.charges import (
    ORDERS,
    Budget,
    Charge,
    ExactCharge,
    SampledGaussianCharge,
    ZcdpCharge,
    charges_of,
    curve_of,
    epsilon_of_curve,
    from_json,
    to_json,
)
from privacy.errors import Refused
from privacy.ledger import Ledger, Reservation
from privacy.score_openings import OpeningCounts, enterprise_keys, pack, unpack

DELTA = 1e-6
NOW = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)
RHO = 0.01
KEY = bytes(range(32))
WIDE = Budget(epsilon_job=1e3, epsilon_total=1e6, delta=DELTA)
ROOT = os.geteuid() == 0
FORK = multiprocessing.get_context("fork")
SPAWN = multiprocessing.get_context("spawn")


def zcdp(rho: float = RHO, name: str = "sums", count: int = 1, **group: Any) -> ZcdpCharge:
    return ZcdpCharge(name=name, rho=rho, count=count, **group)


def reserve(
    ledger: Ledger,
    *charges: Charge,
    job: str = "ab",
    use: int = 1,
    data_set: str = "loans",
    budget: Budget = WIDE,
    now: datetime = NOW,
    exact_allowed: bool = False,
) -> Reservation:
    return ledger.reserve(
        data_set=data_set, job=job, use=use, charges=charges, budget=budget, now=now, exact_allowed=exact_allowed
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vault.sqlite"


# --- charges ----------------------------------------------------------------------------------------------------------


def test_charges_of_a_plan_cost_what_the_plan_costs() -> None:
    releases = scorecard_releases(
        features_bank=9, features_owners={"pboc": 8}, rounds=2, inner_steps=4, search_sensitivities=[(3e6, 9e7)] * 2
    )
    plan = plan_job(3.0, DELTA, releases)
    charges = charges_of(plan)
    assert {c.name: c.count for c in charges} == {r.name: r.count for r in releases}
    assert math.isclose(epsilon_of_curve(curve_of(charges), DELTA), epsilon_after(plan, {}), rel_tol=1e-12)
    assert epsilon_of_curve(curve_of(charges), DELTA) <= 3.0
    assert from_json(json.loads(json.dumps(to_json(charges)))) == charges


def test_groups_of_a_use_are_parallel_and_the_larger_counts_per_order() -> None:
    train = [zcdp(0.02, "a"), zcdp(0.03, "b", 2)]
    held_out = zcdp(0.05, "c", group="held-out")
    assert np.allclose(curve_of([*train, held_out]), 0.08 * ORDERS, rtol=1e-12)
    assert np.allclose(curve_of([*train, replace(held_out, count=2)]), 0.10 * ORDERS, rtol=1e-12)
    # DP-SGD beside zCDP: neither curve is above the other everywhere, the larger counts at each order
    sampled = SampledGaussianCharge(name="d", sampling_probability=0.01, noise_multiplier=0.8, steps=100)
    mixed = curve_of([sampled, held_out])
    alone = curve_of([sampled])
    assert (alone < 0.05 * ORDERS).any()
    assert (alone > 0.05 * ORDERS).any()
    assert (mixed == np.maximum(alone, curve_of([held_out]))).all()


@pytest.mark.parametrize(("probability", "multiplier", "steps"), [(0.01, 1.0, 1000), (0.05, 2.0, 300), (1.0, 5.0, 10)])
def test_dp_sgd_costs_a_little_more_than_the_accountants_own_orders(
    probability: float, multiplier: float, steps: int
) -> None:
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 257))
    event = SelfComposedDpEvent(PoissonSampledDpEvent(probability, GaussianDpEvent(multiplier)), steps)
    tight = RdpAccountant(orders).compose(event).get_epsilon(DELTA)
    charge = SampledGaussianCharge(
        name="steps", sampling_probability=probability, noise_multiplier=multiplier, steps=steps
    )
    assert charge.count == steps
    assert tight * 0.995 <= epsilon_of_curve(curve_of([charge]), DELTA) <= tight * 1.04
    assert from_json(to_json([charge])) == (charge,)


def exact_divergence(probability: float, multiplier: float, order: int) -> float:
    """Mironov, Talwar, Zhang 2019, section 3.3, for whole orders, with 60 digits."""
    with localcontext() as context:
        context.prec = 60
        q, variance, total = Decimal(probability), Decimal(multiplier) ** 2, Decimal(0)
        for k in range(order + 1):
            weight = math.comb(order, k) * (1 - q) ** (order - k) * q**k
            total += weight * (Decimal(k * k - k) / (2 * variance)).exp()
        return float(total.ln() / (order - 1))


@pytest.mark.parametrize(("probability", "multiplier"), [(1e-9, 50.0), (1e-7, 10.0), (1e-5, 5.0), (1e-3, 2.0)])
def test_dp_sgd_is_charged_no_less_than_the_exact_value(probability: float, multiplier: float) -> None:
    charge = SampledGaussianCharge(name="s", sampling_probability=probability, noise_multiplier=multiplier, steps=10**6)
    curve = curve_of([charge])
    assert (np.diff(curve[np.isfinite(curve)]) >= 0).all()
    for order in (2, 3, 10, 45, 300, 1000):
        # the greatest of the plan's orders that is charged as this one, if any is
        place = int(np.searchsorted(ORDERS, order, side="right")) - 1
        whole = math.ceil(ORDERS[place])
        exact = 10**6 * exact_divergence(probability, multiplier, whole)
        assert exact <= curve[place] <= exact * (1 + 1e-6) + 1.1e-6


def test_negative_or_missing_divergences_are_refused() -> None:
    for value in (-1e-9, math.nan):
        curve = curve_of([zcdp()])
        curve[3] = value
        with pytest.raises(Refused, match="Renyi"):
            epsilon_of_curve(curve, DELTA)


@pytest.mark.parametrize(
    "make",
    [
        lambda: zcdp(0.0),
        lambda: zcdp(math.inf),
        lambda: zcdp(math.nan),
        lambda: zcdp(count=0),
        lambda: zcdp(name=""),
        lambda: zcdp(group="all"),
        lambda: SampledGaussianCharge(name="s", sampling_probability=0.0, noise_multiplier=1.0, steps=1),
        lambda: SampledGaussianCharge(name="s", sampling_probability=0.1, noise_multiplier=0.0, steps=1),
        lambda: ExactCharge(name="s", count=-1),
        lambda: Budget(epsilon_job=math.inf, epsilon_total=1.0, delta=DELTA),
        lambda: Budget(epsilon_job=1.0, epsilon_total=0.0, delta=DELTA),
        lambda: Budget(epsilon_job=1.0, epsilon_total=1.0, delta=1.0),
        lambda: from_json([{"type": "free", "name": "s"}]),
        lambda: from_json([{"type": "zcdp", "name": "s", "rho": 1.0, "count": 1, "group": "train", "more": 1}]),
        lambda: from_json({}),
    ],
)
def test_senseless_charges_and_budgets_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(Refused):
        make()


# --- reserve, commit, spent -------------------------------------------------------------------------------------------


def test_jobs_add_up_to_the_limit_and_not_beyond(path: Path) -> None:
    total = epsilon_of(ZCDpEvent(3 * RHO), DELTA) * (1 + 1e-9)
    budget = Budget(epsilon_job=total, epsilon_total=total, delta=DELTA)
    with Ledger(path) as ledger:
        for job in ("a1", "a2", "a3"):
            reserve(ledger, zcdp(), job=job, budget=budget)
        with pytest.raises(Refused, match=r"data set 'loans' has spent .*left .*never comes back"):
            reserve(ledger, zcdp(RHO / 1000), job="a4", budget=budget)
        # another data set has its own account
        reserve(ledger, zcdp(), job="a4", data_set="leases", budget=budget)
        spent = ledger.spent("loans", DELTA)
        assert math.isclose(spent.epsilon, epsilon_of(ZCDpEvent(3 * RHO), DELTA), rel_tol=1e-12)
        assert [use.job for use in spent.uses] == ["a1", "a2", "a3"]
        assert all(math.isclose(use.epsilon, epsilon_of(ZCDpEvent(RHO), DELTA)) for use in spent.uses)
        assert ledger.data_sets() == ("leases", "loans")
        assert ledger.spent("unknown", DELTA).epsilon == 0


def test_held_out_in_one_job_and_training_in_the_next_add_up(path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, zcdp(group="train"), job="a1")
        reserve(ledger, zcdp(group="held-out"), job="a2")
        assert math.isclose(ledger.spent("loans", DELTA).epsilon, epsilon_of(ZCDpEvent(2 * RHO), DELTA), rel_tol=1e-12)


def test_all_uses_of_a_job_together_keep_its_limit(path: Path) -> None:
    limit = epsilon_of(ZCDpEvent(1.5 * RHO), DELTA)
    budget = Budget(epsilon_job=limit, epsilon_total=100.0, delta=DELTA)
    with Ledger(path) as ledger:
        reserve(ledger, zcdp(), job="a1", use=1, budget=budget)
        with pytest.raises(Refused, match="job a1 has spent"):
            reserve(ledger, zcdp(), job="a1", use=2, budget=budget)
        reserve(ledger, zcdp(), job="a2", use=1, budget=budget)


def test_a_use_is_reserved_once_whoever_asks(path: Path) -> None:
    with Ledger(path) as first, Ledger(path) as second:
        reservation = reserve(first, zcdp())
        for ledger in (first, second):
            for data_set in ("loans", "leases"):
                with pytest.raises(Refused, match="reserved before"):
                    reserve(ledger, zcdp(), data_set=data_set)
        assert second.reservation("ab", 1) == reservation
        with pytest.raises(Refused, match="nothing was reserved"):
            second.reservation("ab", 2)


def test_a_release_is_performed_as_often_as_reserved(path: Path) -> None:
    with Ledger(path) as ledger:
        reservation = reserve(ledger, zcdp(count=2), zcdp(name="bins"))
        ledger.commit(reservation, {"sums": 1, "bins": 1}, now=NOW)
        with Ledger(path) as other:
            other.commit(other.reservation("ab", 1), {"sums": 1}, now=NOW)
        before = ledger.head()
        with pytest.raises(Refused, match=r"3 times, 2 were paid for"):
            ledger.commit(reservation, {"sums": 1}, now=NOW)
        with pytest.raises(Refused, match="not reserved"):
            ledger.commit(reservation, {"metrics": 1}, now=NOW)
        with pytest.raises(Refused, match="not of this ledger"):
            ledger.commit(replace(reservation, data_set="leases"), {"sums": 1}, now=NOW)
        for senseless in ({}, {"sums": 0}, {"sums": -1}, {"sums": True}):
            with pytest.raises(Refused):
                ledger.commit(reservation, senseless, now=NOW)
        assert ledger.head() == before
        lines = ledger.spent("loans", DELTA).uses[0].charges
        assert [(c.charge.name, c.reserved, c.performed) for c in lines] == [("sums", 2, 2), ("bins", 1, 1)]


def test_releases_without_noise_are_infinite_and_never_hidden(path: Path) -> None:
    exact = ExactCharge(name="sums", count=3)
    with Ledger(path) as ledger:
        with pytest.raises(Refused, match="simulation only"):
            reserve(ledger, exact)
        assert ledger.head() == empty_head()
        reserve(ledger, exact, exact_allowed=True)
        assert ledger.spent("loans", DELTA).epsilon == math.inf
        with pytest.raises(Refused, match="inf"):
            reserve(ledger, zcdp(), job="cd")
        # the permission is for what is infinite: a finite job keeps its limit
        with pytest.raises(Refused, match="job ef"):
            reserve(ledger, zcdp(100.0), job="ef", budget=replace(WIDE, epsilon_job=1.0), exact_allowed=True)
    with Ledger(path) as ledger:
        assert ledger.spent("loans", DELTA).epsilon == math.inf


@given(
    data=st.lists(
        st.tuples(st.sampled_from(["train", "held-out"]), st.floats(1e-4, 1e-1), st.integers(1, 3)),
        min_size=1,
        max_size=8,
    )
)
@settings(derandomize=True, deadline=None, max_examples=15)
def test_a_ledger_opened_anew_knows_the_same(data: list[tuple[Any, float, int]], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("ledger") / "vault.sqlite"
    with Ledger(path) as ledger:
        for number, (group, rho, count) in enumerate(data):
            reservation = reserve(ledger, zcdp(rho, count=count, group=group), job=f"{number:x}")
            ledger.commit(reservation, {"sums": count}, now=NOW)
        before, head = ledger.spent("loans", DELTA), ledger.head()
    rho = math.fsum(rho * count for _, rho, count in data)
    assert math.isclose(before.epsilon, epsilon_of(ZCDpEvent(rho), DELTA), rel_tol=1e-9)
    with Ledger(path, head) as again:
        assert again.spent("loans", DELTA) == before
        assert again.head() == head


def test_a_clock_that_was_set_back_is_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        reservation = reserve(ledger, zcdp(count=9))
        ledger.commit(reservation, {"sums": 1}, now=NOW - timedelta(seconds=2))
        # many small steps back are a large one: the newest time counts, not the last
        with pytest.raises(Refused, match="set back"):
            ledger.commit(reservation, {"sums": 1}, now=NOW - timedelta(seconds=3))
        with pytest.raises(Refused, match="set back"):
            reserve(ledger, zcdp(), job="cd", now=NOW - timedelta(days=1))
        with pytest.raises(Refused, match="time zone"):
            reserve(ledger, zcdp(), job="cd", now=NOW.replace(tzinfo=None))
    with Ledger(path) as ledger, pytest.raises(Refused, match="set back"):
        reserve(ledger, zcdp(), job="cd", now=NOW - timedelta(seconds=3))


@pytest.mark.parametrize(
    ("job", "use", "data_set"), [("AB", 1, "loans"), ("", 1, "loans"), ("ab", -1, "loans"), ("ab", 1, "a\nb")]
)
def test_senseless_uses_are_refused(path: Path, job: str, use: int, data_set: str) -> None:
    with Ledger(path) as ledger:
        with pytest.raises(Refused):
            reserve(ledger, zcdp(), job=job, use=use, data_set=data_set)
        with pytest.raises(Refused, match="distinct"):
            reserve(ledger, zcdp(), zcdp())
        with pytest.raises(Refused, match="distinct"):
            reserve(ledger)


# --- several processes, kills -----------------------------------------------------------------------------------------


def race(path: Path, budget: Budget, name: int, start: Barrier, won: Any) -> None:
    with Ledger(path) as ledger:
        start.wait(30)
        for number in range(10):
            try:
                reserve(ledger, zcdp(), job=f"{name:x}0{number:x}", budget=budget)
            except Refused as error:
                if "never comes back" not in str(error):
                    raise
            else:
                won.put((name, number))


def test_processes_that_race_for_the_last_epsilon_cannot_overspend(path: Path) -> None:
    paid = 13
    total = epsilon_of(ZCDpEvent((paid + 0.5) * RHO), DELTA)
    budget = Budget(epsilon_job=total, epsilon_total=total, delta=DELTA)
    start, won = SPAWN.Barrier(3), SPAWN.Queue()
    racers = [SPAWN.Process(target=race, args=(path, budget, name, start, won)) for name in (1, 2, 3)]
    for racer in racers:
        racer.start()
    winners = [won.get(timeout=60) for _ in range(paid)]
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert won.empty()
    assert len(set(winners)) == paid
    with Ledger(path) as ledger:
        assert len(ledger.spent("loans", DELTA).uses) == paid
        assert ledger.spent("loans", DELTA).epsilon <= total


def work(path: Path, out: int, name: int) -> None:
    """Reserve and commit for ever; tell what was released only after the ledger's answer."""
    with Ledger(path) as ledger:
        keys = enterprise_keys([f"e{name}"], KEY)
        for number in range(10**6):
            job = f"{name:x}{number:06x}"
            reservation = reserve(ledger, zcdp(count=2), job=job)
            os.write(out, f"reserved {job}\n".encode())
            for _ in range(2):
                ledger.commit(reservation, {"sums": 1}, now=NOW)
                os.write(out, f"released {job}\n".encode())
            ledger.open_scores(
                data_set="tax", job=job, use=1, kind="score", keys=keys, times=1, most_total=None, now=NOW
            )
            os.write(out, f"opened {name}\n".encode())


def test_after_a_kill_at_any_point_the_ledger_shows_all_that_was_released(path: Path) -> None:
    pick = random.Random(4)
    head = empty_head()
    told: list[str] = []
    for name in range(1, 121):
        read_end, write_end = os.pipe()
        child = FORK.Process(target=work, args=(path, write_end, name))
        child.start()
        os.close(write_end)
        first = os.read(read_end, 1 << 16) if name % 10 else b""  # every tenth is killed while it opens the file
        time.sleep(pick.random() * 0.01)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        with os.fdopen(read_end, "rb") as pipe:
            told += (first + pipe.read()).decode().splitlines()
        with Ledger(path, head) as ledger:  # opens, and goes on from the head that was seen last
            head = ledger.head()
            spent, opened = ledger.spent("loans", DELTA), ledger.openings("tax")
        performed = {use.job: use.charges[0].performed for use in spent.uses}
        for line in set(told):
            kind, job = line.split()
            if kind == "released":
                assert told.count(line) <= performed[job] <= 2
            elif kind == "reserved":
                assert job in performed
        total = sum(times * number for times, number in opened.histogram.items())
        assert total >= sum(line.startswith("opened") for line in told)
        told = [] if name % 20 == 0 else told
    assert head.count > 500


def test_a_forked_child_must_open_its_own(path: Path) -> None:
    def child(ledger: Ledger, answers: Any) -> None:
        try:
            reserve(ledger, zcdp())
        except Refused as error:
            answers.put(str(error))

    with Ledger(path) as ledger:
        answers = FORK.Queue()
        process = FORK.Process(target=child, args=(ledger, answers))
        process.start()
        assert "after a fork" in answers.get(timeout=30)
        process.join(30)
        reserve(ledger, zcdp())


# --- a damaged, missing, full or unwritable file ----------------------------------------------------------------------


def filled(path: Path, jobs: int = 4) -> Head:
    with Ledger(path) as ledger:
        for number in range(jobs):
            reserve(ledger, zcdp(), job=f"a{number}")
        return ledger.head()


def tamper(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for trigger in ("ledger_keeps_rows", "ledger_keeps_values"):
        connection.execute(f"DROP TRIGGER {trigger}")
    for statement in statements:
        assert connection.execute(statement).rowcount == 1
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "statements",
    [
        ["UPDATE ledger SET body = replace(body, '0.01', '0.001') WHERE number = 2"],
        ["UPDATE ledger SET time = '2026-03-01T07:00:00.000000+00:00' WHERE number = 1"],
        ["UPDATE ledger SET job = 'ff' WHERE number = 4"],
        ["UPDATE ledger SET use = 2 WHERE number = 3"],
        ["UPDATE ledger SET data_set = 'x' WHERE number = 3"],
        ["UPDATE ledger SET kind = 'perform' WHERE number = 3"],
        ["UPDATE ledger SET blob = x'00' WHERE number = 3"],
        ["UPDATE ledger SET digest = zeroblob(32) WHERE number = 4"],
        ["DELETE FROM ledger WHERE number = 2"],
        ["DELETE FROM ledger WHERE number = 1"],
        ["DELETE FROM ledger WHERE number = 2", "UPDATE ledger SET number = 2 WHERE number = 4"],
        [
            "UPDATE ledger SET number = 9 WHERE number = 2",
            "UPDATE ledger SET number = 2 WHERE number = 3",
            "UPDATE ledger SET number = 3 WHERE number = 9",
        ],
        ["UPDATE ledger SET number = 0 WHERE number = 4"],
    ],
)
def test_an_altered_removed_or_reordered_row_is_found(path: Path, statements: Sequence[str]) -> None:
    filled(path)
    tamper(path, *statements)
    with pytest.raises(Refused, match=r"row|rows"):
        Ledger(path)


def test_a_shortened_or_exchanged_file_is_found_by_the_audit_logs_head(path: Path, tmp_path: Path) -> None:
    head = filled(path)
    Ledger(path, head).close()
    with Ledger(path) as ledger:
        reserve(ledger, zcdp(), job="bb")  # ahead of the audit log: killed between the two
        ledger.check(head)
    Ledger(path, head).close()
    tamper(path, "DELETE FROM ledger WHERE number = 5", "DELETE FROM ledger WHERE number = 4")
    Ledger(path).close()  # a chain cannot see that its end is gone
    with pytest.raises(Refused, match="has 3 rows, the audit log knows 4"):
        Ledger(path, head)
    other = tmp_path / "other.sqlite"
    with Ledger(other) as ledger:
        for number in range(4):
            reserve(ledger, zcdp(RHO / 100), job=f"a{number}")
        with pytest.raises(Refused, match="differs"):
            ledger.check(head)
    with pytest.raises(Refused, match="differs"):
        Ledger(other, head)


def test_a_missing_or_empty_file_is_refused_when_the_audit_log_knows_of_rows(path: Path) -> None:
    head = filled(path)
    path.unlink()
    with pytest.raises(Refused, match="is missing"):
        Ledger(path, head)
    assert not path.exists()
    path.touch(mode=0o600)
    with pytest.raises(Refused, match="has 0 rows, the audit log knows 4"):
        Ledger(path, head)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_vanishes_or_is_replaced_while_open_is_refused(path: Path, replaced: bool) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, zcdp())
        path.rename(path.with_suffix(".old"))
        if replaced:
            path.touch(mode=0o600)
        with pytest.raises(Refused, match="replaced" if replaced else "No such file"):
            reserve(ledger, zcdp(), job="cd")


def test_rows_removed_or_altered_while_open_are_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, zcdp())
        tamper(path, "DELETE FROM ledger WHERE number = 1")
        with pytest.raises(Refused, match="lacks row 1"):
            reserve(ledger, zcdp(), job="cd")


def test_other_modules_cannot_change_rows_by_a_slip(path: Path) -> None:
    filled(path)
    connection = sqlite3.connect(path)
    for statement in ("DELETE FROM ledger", "UPDATE ledger SET use = 9"):
        with pytest.raises(sqlite3.IntegrityError, match="never"):
            connection.execute(statement)
    connection.close()


def test_a_corrupt_file_is_refused(path: Path) -> None:
    filled(path, jobs=40)
    data = bytearray(path.read_bytes())
    path.write_bytes(b"not a database " * 400)
    with pytest.raises(Refused, match="not a database"):
        Ledger(path)
    # a bit of a row's text, then a page of zeros
    place = data.index(b"a17")
    data[place + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Refused):
        Ledger(path)
    data[4096:8192] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(Refused):
        Ledger(path)


def test_the_file_is_its_owners_alone(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, zcdp())
        for file in tmp_path.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    path.chmod(0o640)
    with pytest.raises(Refused, match="chmod 600"):
        Ledger(path)
    link = tmp_path / "link.sqlite"
    link.symlink_to(path)
    with pytest.raises(Refused, match="plain file"):
        Ledger(link)
    with pytest.raises(Refused, match="cannot be used"):
        Ledger(tmp_path / "no folder" / "vault.sqlite")


def in_child(target: Callable[..., None], *arguments: object) -> None:
    child = FORK.Process(target=target, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def use_full_disk(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Ledger(path) as ledger:
        reservation = reserve(ledger, zcdp(1e-6, count=10**4))
        size = path.with_name(path.name + "-wal").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20_000, resource.RLIM_INFINITY))
        done = 0
        refusal = None
        while refusal is None and done < 1000:
            try:
                ledger.commit(reservation, {"sums": 1}, now=NOW)
                done += 1
            except Refused as error:
                refusal = str(error)
        assert refusal is not None
        assert "cannot be used" in refusal
        with pytest.raises(Refused, match="cannot be used"):
            reserve(ledger, zcdp(), job="cd")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        # room again: it goes on, and counts neither more nor less
        ledger.commit(reservation, {"sums": 1}, now=NOW)
        assert ledger.spent("loans", DELTA).uses[0].charges[0].performed == done + 1
        assert done > 0


def test_a_full_disk_is_refused_and_leaves_the_ledger_whole(path: Path) -> None:
    in_child(use_full_disk, path)
    with Ledger(path) as ledger:
        assert len(ledger.spent("loans", DELTA).uses) == 1


def use_read_only(path: Path) -> None:
    if ROOT:
        os.setgid(65534)
        os.setuid(65534)
    with pytest.raises(Refused, match="cannot be used"):
        Ledger(path)


@pytest.mark.parametrize("empty", [True, False])
def test_a_read_only_file_is_refused(empty: bool) -> None:
    # not below pytest's folders: they are closed to the other user that root has to become to be refused anything
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, path = Path(name), Path(name) / "vault.sqlite"
        if empty:
            path.touch()
        else:
            filled(path)
        path.chmod(0o400)
        if ROOT:
            os.chown(path, 65534, 65534)
            os.chown(folder, 65534, 65534)
        in_child(use_read_only, path)


def test_a_closed_ledger_refuses_and_prints_no_secret(path: Path) -> None:
    ledger = Ledger(path)
    reserve(ledger, zcdp())
    assert repr(ledger) == f"Ledger(ChainedTable({str(path)!r}, 1 rows))"
    ledger.close()
    with pytest.raises(Refused, match="cannot be used"):
        reserve(ledger, zcdp(), job="cd")


def test_an_unknown_kind_of_row_is_refused(path: Path) -> None:
    table = ChainedTable(path, lambda row: None)
    table.append(NOW, lambda: Draft(kind="refund", data_set="loans", job="ab", use=1, body="{}"))
    table.close()
    with pytest.raises(Refused, match="another version"):
        Ledger(path)


# --- score openings ---------------------------------------------------------------------------------------------------


def open_scores(ledger: Ledger, ids: Sequence[str], times: int = 1, most: int | None = 3, job: str = "ab") -> Head:
    keys = enterprise_keys(ids, KEY)
    return ledger.open_scores(
        data_set="tax", job=job, use=1, kind="score", keys=keys, times=times, most_total=most, now=NOW
    )


def test_openings_are_counted_per_enterprise_over_all_jobs(path: Path) -> None:
    with Ledger(path) as ledger:
        open_scores(ledger, ["a", "b"], times=2)
        open_scores(ledger, ["b", "c"], job="cd")
        before = ledger.head()
        with pytest.raises(Refused, match="1 of 3 enterprises") as refusal:
            open_scores(ledger, ["a", "b", "d"], job="ef")
        assert str(int(enterprise_keys(["b"], KEY)[0])) not in str(refusal.value)
        assert ledger.head() == before  # nobody of a refused call is counted
        # an enterprise that was let above the limit before does not stand in the way of others
        open_scores(ledger, ["b"], most=None)
        open_scores(ledger, ["c", "a"])
        with pytest.raises(Refused, match="1 of 2"):
            open_scores(ledger, ["e", "e"], times=2)  # twice in one call is opened twice
        open_scores(ledger, [])
    with Ledger(path) as ledger:
        openings = ledger.openings("tax")
        assert openings.histogram == {3: 1, 4: 1, 2: 1}
        assert [(call.job, call.enterprises, call.times) for call in openings.calls][:2] == [("ab", 2, 2), ("cd", 2, 1)]
        assert ledger.openings("other").histogram == {}
        assert ledger.spent("tax", DELTA).epsilon == 0
        assert ledger.data_sets() == ("tax",)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.integers(1, 4)), max_size=6))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_counts_are_those_of_a_dictionary(calls: list[tuple[list[int], int]]) -> None:
    counts, plain = OpeningCounts.none(), dict[int, int]()
    for numbers, times in [*calls, *calls[:1]]:
        keys = np.array(numbers, np.uint64)
        assert (unpack(pack(keys)) == np.sort(keys)).all()
        after = {key: plain.get(key, 0) + numbers.count(key) * times for key in numbers}
        for limit in (0, 2, 5):
            assert counts.above(limit, keys, times) == sum(number > limit for number in after.values())
        counts, plain = counts.plus(keys, times), plain | after
        assert dict(zip(counts.keys.tolist(), counts.times.tolist(), strict=True)) == plain
        assert counts.keys.tolist() == sorted(plain)


def test_enterprise_keys_are_keyed_and_in_order() -> None:
    keys = enterprise_keys(["91350100M000100Y43", "x"], KEY)
    digest = hashlib.blake2b(b"91350100M000100Y43", digest_size=8, key=KEY, person=b"xinyi openings 1").digest()
    assert int(keys[0]) == int.from_bytes(digest, "little")
    assert keys.dtype == np.uint64
    assert (enterprise_keys(["x", "91350100M000100Y43"], KEY) == keys[::-1]).all()
    assert not set(enterprise_keys(["91350100M000100Y43", "x"], bytes(32))) & set(keys)
    with pytest.raises(Refused, match="expected 32"):
        enterprise_keys(["x"], b"short")


def test_senseless_openings_are_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        for arguments in ({"times": 0}, {"times": True}, {"times": 10**7}, {"most": 0}):
            with pytest.raises(Refused):
                open_scores(ledger, ["a"], **arguments)
        senseless: list[Any] = [np.zeros(2, np.int64), np.zeros((2, 2), np.uint64)]
        for keys in senseless:
            with pytest.raises(Refused, match="uint64"):
                ledger.open_scores(
                    data_set="tax", job="ab", use=1, kind="score", keys=keys, times=1, most_total=1, now=NOW
                )
        with pytest.raises(Refused, match="damaged"):
            unpack(b"nothing")
        assert ledger.head().count == 0
