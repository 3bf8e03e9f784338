"""The plan of a job: composes to what was promised, never more; every release and attempt is charged."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from dp_accounting import ComposedDpEvent, ZCDpEvent, get_epsilon_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from models.line_search import INNER_STEPS, sensitivities
from models.shared_bins import LEVELS
from privacy.accounting import (
    BIN_LEVELS,
    Plan,
    Release,
    default_delta,
    epsilon_after,
    epsilon_of,
    plan_job,
    rho_of,
    scorecard_releases,
)
from privacy.errors import Refused
from privacy.noise import LEAST_SHARE_STD, share_std

DELTA = 1e-6
ROUNDS = 3
RELEASES = scorecard_releases(
    features_bank=9,
    features_owners={"pboc": 8, "tax": 7},
    rounds=ROUNDS,
    inner_steps=INNER_STEPS,
    search_sensitivities=[sensitivities(3 if number == 1 else 4) for number in range(1, ROUNDS + 1)],
)
BY_NAME = {release.name: release for release in RELEASES}


def closed_form(rho: float, delta: float) -> float:
    """Bun and Steinke 2016, proposition 1.3: looser than the accountant's conversion."""
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def converted(rho: float, delta: float) -> float:
    """Canonne, Kamath, Steinke 2020, proposition 12, minimised over the order without dp-accounting."""

    def at(log_order: float) -> float:
        order = 1 + math.exp(log_order)
        return order * rho + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)

    return float(minimize_scalar(at, bounds=(-7, 15), method="bounded").fun)


# --- rho and epsilon --------------------------------------------------------------------------------------------------


@given(exponent=st.floats(-5, 2), delta=st.sampled_from([1e-4, 1e-6, 1e-9]))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_epsilon_lies_between_the_exact_gaussian_and_the_closed_form(exponent: float, delta: float) -> None:
    rho = 10**exponent
    epsilon = epsilon_of(ZCDpEvent(rho), delta)
    assert get_epsilon_gaussian(math.sqrt(1 / (2 * rho)), delta) <= epsilon * (1 + 1e-9)
    assert epsilon <= closed_form(rho, delta)


@given(epsilon=st.floats(0.01, 50), delta=st.sampled_from([1e-4, 1e-6, 1e-9]))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_rho_is_the_inverse_of_epsilon(epsilon: float, delta: float) -> None:
    reached = epsilon_of(ZCDpEvent(rho_of(epsilon, delta)), delta)
    assert reached <= epsilon
    assert math.isclose(reached, epsilon, rel_tol=1e-6)


def test_epsilon_rises_with_rho_and_falls_with_delta() -> None:
    epsilons = [epsilon_of(ZCDpEvent(10**exponent), DELTA) for exponent in (-4, -3, -2, -1, 0, 1, 2)]
    assert epsilons == sorted(set(epsilons))
    assert epsilon_of(ZCDpEvent(0.1), 1e-9) > epsilon_of(ZCDpEvent(0.1), 1e-6) > epsilon_of(ZCDpEvent(0.1), 1e-3)
    assert rho_of(1, DELTA) < rho_of(2, DELTA) < rho_of(3, DELTA)


def test_zcdp_adds_up() -> None:
    parts = ComposedDpEvent([ZCDpEvent(0.03), ZCDpEvent(0.05), ZCDpEvent(0.02)])
    assert math.isclose(epsilon_of(parts, DELTA), epsilon_of(ZCDpEvent(0.1), DELTA), rel_tol=1e-12)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-6, math.nan])
def test_deltas_outside_their_range_are_refused(delta: float) -> None:
    with pytest.raises(Refused, match="delta"):
        epsilon_of(ZCDpEvent(0.1), delta)
    with pytest.raises(Refused, match="delta"):
        plan_job(3.0, delta, RELEASES)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_epsilons_outside_their_range_are_refused(epsilon: float) -> None:
    with pytest.raises(Refused, match="epsilon"):
        plan_job(epsilon, DELTA, RELEASES)


def test_default_delta() -> None:
    assert default_delta(150_000) == 1 / 1_500_000
    with pytest.raises(Refused):
        default_delta(0)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0])
def test_a_plan_keeps_its_promise_and_wastes_little(epsilon: float) -> None:
    plan = plan_job(epsilon, DELTA, RELEASES)
    # composed here from the standard deviations alone, by the formula and a search over all orders
    rho = sum(r.count * (r.l2_sensitivity / plan.stds[r.name]) ** 2 / 2 for r in RELEASES if r.group == "train")
    assert math.isclose(converted(rho, DELTA), epsilon, rel_tol=1e-3)
    assert epsilon_of(plan.events("train"), DELTA) <= epsilon
    assert epsilon_of(plan.events("held-out"), DELTA) <= epsilon
    assert epsilon * (1 - 1e-6) <= epsilon_after(plan, {}) <= epsilon
    assert math.isclose(plan.job_rho, plan.rho_total, rel_tol=1e-6)
    assert plan.job_rho <= plan.rho_total


def test_the_budget_is_split_by_weight() -> None:
    plan = plan_job(3.0, DELTA, RELEASES)
    shares = {name: BY_NAME[name].count * plan.rho(name) / plan.rho_total for name in plan.stds}
    assert math.isclose(shares["sums"], 0.75, rel_tol=1e-6)
    assert math.isclose(shares["bins"], 0.10, rel_tol=1e-6)
    assert math.isclose(sum(share for name, share in shares.items() if name.startswith("search")), 0.15, rel_tol=1e-6)
    # std = L2 / sqrt(2 rho): by hand for the sums
    rho_once = 0.75 * plan.rho_total / ROUNDS
    assert math.isclose(plan.stds["sums"], math.sqrt(24) / math.sqrt(2 * rho_once), rel_tol=1e-6)


def test_less_epsilon_is_more_noise() -> None:
    loose, tight = plan_job(3.0, DELTA, RELEASES), plan_job(1.0, DELTA, RELEASES)
    assert all(tight.stds[name] > loose.stds[name] for name in loose.stds)


def test_held_out_rows_are_charged_in_parallel() -> None:
    plan = plan_job(1.0, DELTA, RELEASES)
    only_training = plan_job(1.0, DELTA, [release for release in RELEASES if release.group == "train"])
    assert all(only_training.stds[name] == plan.stds[name] for name in only_training.stds)
    assert plan.group_rho("held-out") <= plan.rho_total
    assert math.isclose(plan.group_rho("held-out"), plan.rho_total, rel_tol=1e-6)
    # the same release on training rows would add to the others, not run beside them
    together = [replace(release, group="train") for release in RELEASES]
    with pytest.raises(Refused, match="add up"):
        plan_job(1.0, DELTA, together)


def test_counts_keep_a_noise_whose_shares_fit_the_grid() -> None:
    for honest in (1, 2, 4):
        releases = scorecard_releases(
            features_bank=9,
            features_owners={"pboc": 8},
            rounds=1,
            inner_steps=1,
            search_sensitivities=[(1.0, 1.0)],
            honest_banks=honest,
        )
        plan = plan_job(100.0, DELTA, releases)
        for name in ("bins", "histogram"):
            assert share_std(plan.stds[name], honest + 3, 3) >= LEAST_SHARE_STD * (1 - 1e-12)
        assert epsilon_after(plan, {}) <= 100.0


@given(
    epsilon=st.floats(0.05, 20),
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    counts=st.lists(st.integers(1, 30), min_size=5, max_size=5),
    scale=st.floats(1e-3, 1e9),
)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_no_plan_passes_its_promise(epsilon: float, weights: list[float], counts: list[int], scale: float) -> None:
    total = sum(weights)
    releases = [
        Release(name=f"r{i}", l2_sensitivity=scale * (i + 1), count=counts[i], weight=weight / total)
        for i, weight in enumerate(weights)
    ]
    plan = plan_job(epsilon, DELTA, releases)
    assert epsilon * (1 - 1e-5) <= epsilon_of(plan.events("train"), DELTA) <= epsilon


def test_a_plan_with_less_noise_is_noticed() -> None:
    plan = plan_job(3.0, DELTA, RELEASES)
    for name in ("bins", "sums", "search.2.curvature", "histogram"):
        weaker = replace(plan, stds={**plan.stds, name: plan.stds[name] / 3})
        assert epsilon_after(weaker, {}) > 3.0


# --- attempts ---------------------------------------------------------------------------------------------------------


def test_every_attempt_is_charged() -> None:
    plan = plan_job(3.0, DELTA, RELEASES)
    once = plan.group_rho("train") + plan.rho("sums")
    assert math.isclose(epsilon_after(plan, {"sums": 1}), epsilon_of(ZCDpEvent(once), DELTA), rel_tol=1e-9)
    assert epsilon_after(plan, {"sums": 2}) > epsilon_after(plan, {"sums": 1}) > epsilon_after(plan, {})
    # training again leaves the held-out enterprises where they were
    held_out = epsilon_of(plan.events("held-out", {"sums": 2}), DELTA)
    assert held_out == epsilon_of(plan.events("held-out", {}), DELTA)
    doubled = epsilon_after(plan, {release.name: release.count for release in RELEASES})
    assert math.isclose(doubled, epsilon_of(ZCDpEvent(2 * plan.job_rho), DELTA), rel_tol=1e-6)


def test_unplanned_releases_and_refunds_are_refused() -> None:
    plan = plan_job(3.0, DELTA, RELEASES)
    with pytest.raises(Refused, match="not in the plan"):
        plan.rho("crosstab")
    with pytest.raises(Refused, match="not in the plan"):
        epsilon_after(plan, {"crosstab": 1})
    with pytest.raises(Refused, match="refunded"):
        epsilon_after(plan, {"sums": -1})


# --- releases ---------------------------------------------------------------------------------------------------------


def test_scorecard_releases_name_and_bound_everything() -> None:
    search = [f"search.{number}.{part}" for number in range(1, ROUNDS + 1) for part in ("gradient", "curvature")]
    assert [release.name for release in RELEASES] == ["bins", "sums", *search, "histogram"]
    assert math.isclose(BY_NAME["bins"].l2_sensitivity, math.sqrt(10))
    assert math.isclose(BY_NAME["sums"].l2_sensitivity, math.sqrt(8 + 7 + 9))
    assert BY_NAME["histogram"].l2_sensitivity == 1
    assert (BY_NAME["search.1.gradient"].l2_sensitivity, BY_NAME["search.1.curvature"].l2_sensitivity) == sensitivities(
        3
    )
    assert (BY_NAME["search.3.gradient"].l2_sensitivity, BY_NAME["search.3.curvature"].l2_sensitivity) == sensitivities(
        4
    )
    counts = {name: BY_NAME[name].count for name in ("bins", "sums", "search.1.gradient", "histogram")}
    assert counts == {"bins": LEVELS, "sums": ROUNDS, "search.1.gradient": INNER_STEPS, "histogram": 1}
    assert {release.name for release in RELEASES if release.group == "held-out"} == {"histogram"}
    assert math.isclose(sum(release.weight for release in RELEASES if release.group == "train"), 1)


def test_as_many_bin_levels_are_charged_as_are_released() -> None:
    assert BIN_LEVELS == LEVELS


def test_the_documented_example_is_what_the_plan_gives() -> None:
    text = Path(__file__).parents[1].joinpath("docs", "privacy-accounting.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.split("after one round's `sums` twice |")[1].splitlines()]
    rows = [row for row in rows if len(row) == 6 and row[0][0].isdigit()]
    assert [row[0] for row in rows] == ["0.5", "1", "3", "8"]
    releases = scorecard_releases(
        features_bank=10,
        features_owners={"pboc": 8, "tax": 7},
        rounds=3,
        inner_steps=INNER_STEPS,
        search_sensitivities=[sensitivities(4)] * 3,
    )
    for epsilon, rho, bins, sums, histogram, again in rows:
        plan = plan_job(float(epsilon), DELTA, releases)
        assert float(rho) == pytest.approx(plan.job_rho, rel=0.005)
        assert float(bins) == pytest.approx(plan.stds["bins"], abs=0.051)
        assert float(sums) == pytest.approx(plan.stds["sums"], abs=0.051)
        assert float(histogram.split()[0]) == pytest.approx(plan.stds["histogram"], abs=0.051)
        assert float(again) == pytest.approx(epsilon_after(plan, {"sums": 1}), abs=0.00051)


@pytest.mark.parametrize(
    "change",
    [
        {"features_bank": 0},
        {"features_owners": {}},
        {"features_owners": {"pboc": 0}},
        {"rounds": 0, "search_sensitivities": []},
        {"rounds": 2},
        {"inner_steps": 0},
        {"bin_levels": 0},
        {"honest_banks": 0},
        {"search_sensitivities": [(1.0, math.inf)]},
        {"search_sensitivities": [(0.0, 1.0)]},
    ],
)
def test_scorecard_releases_refuse_nonsense(change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "features_bank": 2,
        "features_owners": {"pboc": 3},
        "rounds": 1,
        "inner_steps": 1,
        "search_sensitivities": [(1.0, 1.0)],
    }
    assert scorecard_releases(**arguments)  # type: ignore[arg-type]
    with pytest.raises(Refused):
        scorecard_releases(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"l2_sensitivity": 0.0},
        {"l2_sensitivity": math.inf},
        {"l2_sensitivity": math.nan},
        {"count": 0},
        {"weight": 0.0},
        {"weight": 1.1},
        {"group": "everybody"},
        {"least_std": -1.0},
        {"least_std": math.nan},
    ],
)
def test_releases_refuse_nonsense(change: dict[str, object]) -> None:
    release = Release(name="r", l2_sensitivity=1.0, count=1, weight=0.5)
    with pytest.raises(Refused):
        replace(release, **change)


def test_plans_refuse_missing_noise_and_double_names() -> None:
    release = Release(name="r", l2_sensitivity=1.0, count=1, weight=0.5)
    with pytest.raises(Refused, match="distinct"):
        plan_job(1.0, DELTA, [release, release])
    with pytest.raises(Refused, match="distinct"):
        plan_job(1.0, DELTA, [])
    for stds in ({}, {"r": 0.0}, {"r": math.inf}, {"r": 1.0, "other": 1.0}):
        with pytest.raises(Refused, match="standard deviation"):
            Plan(epsilon=1.0, delta=DELTA, rho_total=0.1, releases=(release,), stds=stds)
