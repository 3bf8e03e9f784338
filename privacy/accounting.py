"""What a job's releases cost in privacy, and how much noise they need to stay within the contract's epsilon.

Guarantee: what a plan's releases tell about one enterprise's records at the banks is (epsilon, delta)-DP, against
whoever sees the noised sums, if each release happens as often as planned, with at least its standard deviation.
Adjacency (unit of privacy): one enterprise's v and bank fields are zeroed out; who takes part is known from alignment.
|v| <= 1. NOT covered: the feature owners' features (forward noise is a heuristic, the final score is exact).
Formula: one release of L2 sensitivity D with noise of standard deviation s is rho-zCDP, rho = D^2 / (2 s^2); rho adds
up over releases, rounds and attempts; over disjoint groups of enterprises (training, held-out) the largest counts.
epsilon(rho, delta) = min over orders a of a rho + log((a-1)/a) - (log delta + log a)/(a-1), by `dp-accounting`.
Source: Bun, Steinke 2016 (zCDP); Mironov 2017, Canonne, Kamath, Steinke 2020 (conversion); dp-accounting 0.6.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from dp_accounting import ComposedDpEvent, SelfComposedDpEvent, ZCDpEvent
from dp_accounting.rdp import RdpAccountant

from privacy.errors import Refused
from privacy.noise import LEAST_SHARE_STD

Group = Literal["train", "held-out"]

GROUPS: tuple[Group, ...] = ("train", "held-out")

BIN_LEVELS = 3
"""Rounds of shared bin counts, each charged; all of one standard deviation."""

SUMS_WEIGHT, BINS_WEIGHT, SEARCH_WEIGHT = 0.75, 0.10, 0.15
"""Shares of the training budget. The sums of v make the model, so they get most; the bins need only rough counts, and
the line search is a few scalars. The same in every job: a contract sets epsilon only."""

ORDERS = 1 + np.geomspace(1e-2, 1e6, 800)  # the best order is about 1 + sqrt(log(1/delta) / rho)
_WEIGHT_SLACK = 1e-9
_BISECTIONS = 100


@dataclass(frozen=True, kw_only=True)
class Release:
    """One kind of release, `count` times with the same noise.

    `l2_sensitivity`: most that one enterprise changes it by, in the release's own units. `weight`: its part of its
    group's rho, for all `count` times together. `least_std`: floor of its standard deviation (the plan then spends
    less).
    """

    name: str
    l2_sensitivity: float
    count: int
    weight: float
    group: Group = "train"
    least_std: float = 0.0

    def __post_init__(self) -> None:
        if not self.name:
            raise Refused("a release without a name cannot be charged; name it")
        if not (math.isfinite(self.l2_sensitivity) and self.l2_sensitivity > 0):
            raise Refused(
                f"release {self.name!r}: L2 sensitivity {self.l2_sensitivity} is not finite and above 0; clip its rows"
            )
        if self.count < 1:
            raise Refused(f"release {self.name!r}: planned {self.count} times; give 1 or more, or leave it out")
        if not 0 < self.weight <= 1:
            raise Refused(
                f"release {self.name!r}: weight {self.weight} is outside (0, 1]; every release must be paid for"
            )
        if self.group not in GROUPS:
            raise Refused(f"release {self.name!r}: group {self.group!r} is neither 'train' nor 'held-out'")
        if not (math.isfinite(self.least_std) and self.least_std >= 0):
            raise Refused(
                f"release {self.name!r}: least standard deviation {self.least_std}; give a finite one, 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The noise of every release of a job. `stds`: by release name, in its units, of the noise that must remain after
    colluding banks took theirs off."""

    epsilon: float
    delta: float
    rho_total: float
    releases: tuple[Release, ...]
    stds: Mapping[str, float]

    def __post_init__(self) -> None:
        names = [release.name for release in self.releases]
        if set(self.stds) != set(names) or not all(math.isfinite(std) and std > 0 for std in self.stds.values()):
            raise Refused(
                f"a plan needs one finite standard deviation above 0 for each of {names}, got {dict(self.stds)}"
            )

    def rho(self, name: str) -> float:
        """zCDP of performing the release `name` once."""
        release = next((release for release in self.releases if release.name == name), None)
        if release is None:
            raise Refused(f"release {name!r} is not in the plan; nothing may be released that was not planned")
        return (release.l2_sensitivity / self.stds[name]) ** 2 / 2

    def group_rho(self, group: Group) -> float:
        """zCDP of everything that is planned to be released about the enterprises of a group."""
        return math.fsum(release.count * self.rho(release.name) for release in self.releases if release.group == group)

    @property
    def job_rho(self) -> float:
        """What every bank's ledger pays: the largest group's rho, for nobody is in two groups."""
        return max(self.group_rho(group) for group in GROUPS)

    def events(self, group: Group, attempts: Mapping[str, int]) -> Any:
        """Everything that is released about the enterprises of a group, as a dp_accounting event.

        `attempts`: release name -> times beyond the plan.
        """
        return ComposedDpEvent(
            [
                SelfComposedDpEvent(ZCDpEvent(self.rho(release.name)), release.count + attempts.get(release.name, 0))
                for release in self.releases
                if release.group == group
            ]
        )


def default_delta(rows: int) -> float:
    """1 / (10 n), n the training rows of all banks: under one expected catastrophic failure in ten such jobs."""
    if rows < 1:
        raise Refused(f"delta for {rows} training rows; at least 1 is needed")
    return 1 / (10 * rows)


def epsilon_of(events: Any, delta: float) -> float:
    """epsilon of a dp_accounting event at `delta`, by the RDP accountant (an upper bound)."""
    if not 0 < delta < 1:
        raise Refused(f"delta {delta} is outside (0, 1); the default is 1 / (10 n)")
    return float(RdpAccountant(ORDERS).compose(events).get_epsilon(delta))


@lru_cache(maxsize=64)  # the parties of a simulation, and a vault's certificate, ask for the same
def rho_of(epsilon: float, delta: float) -> float:
    """The largest rho (to 1e-9 of it) whose epsilon at `delta` is at most `epsilon`; inverse of `epsilon_of`."""
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise Refused(f"epsilon {epsilon} cannot be planned for; it must be finite and above 0")
    low, high = 0.0, epsilon
    while epsilon_of(ZCDpEvent(high), delta) <= epsilon:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if epsilon_of(ZCDpEvent(middle), delta) <= epsilon:
            low = middle
        else:
            high = middle
        if high - low <= 1e-12 * high:
            break
    # a last part in 10^9 given away, so that rounding in the composition cannot pass the promise
    rho = low * (1 - 1e-9)
    if rho <= 0:
        raise Refused(f"no noise reaches epsilon {epsilon} at delta {delta}; raise epsilon or delta")
    return rho


def plan_job(epsilon: float, delta: float, releases: Sequence[Release]) -> Plan:
    """Split the rho of (epsilon, delta) over the releases by weight, each group by itself; std = D / sqrt(2 rho_i).

    The composed epsilon is computed again from the resulting standard deviations; above the promise is `Refused`.
    """
    names = [release.name for release in releases]
    if not names or len(set(names)) != len(names):
        raise Refused(f"a plan needs releases with distinct names, got {names}")
    for group in GROUPS:
        weight = math.fsum(release.weight for release in releases if release.group == group)
        if weight > 1 + _WEIGHT_SLACK:
            raise Refused(f"the weights of the {group} releases add up to {weight}, more than 1; lower them")
    rho_total = rho_of(epsilon, delta)
    stds = {
        release.name: max(
            release.least_std,
            release.l2_sensitivity / math.sqrt(2 * rho_total * release.weight / (1 + _WEIGHT_SLACK) / release.count),
        )
        for release in releases
    }
    plan = Plan(epsilon=epsilon, delta=delta, rho_total=rho_total, releases=tuple(releases), stds=stds)
    reached = epsilon_after(plan, {})
    if reached > epsilon:
        raise Refused(f"the planned noise composes to epsilon {reached}, promised is {epsilon}; this plan is not used")
    return plan


def epsilon_after(plan: Plan, attempts: Mapping[str, int]) -> float:
    """epsilon of the plan when `attempts` more attempts (release name -> number) are added: each is charged again."""
    _check_attempts(attempts, plan.stds)
    groups = {release.group for release in plan.releases}
    # disjoint enterprises: nobody is in both groups, so nobody pays for both
    return max(epsilon_of(plan.events(group, attempts), plan.delta) for group in groups)


def scorecard_releases(
    *,
    features_bank: int,
    features_owners: Mapping[str, int],
    rounds: int,
    inner_steps: int,
    search_sensitivities: Sequence[tuple[float, float]],
    bin_levels: int = BIN_LEVELS,
    honest_banks: int = 2,
    banks_per_enterprise: int = 1,
) -> tuple[Release, ...]:
    """Everything the main job releases about the banks' records (derivations: docs/privacy-accounting.md).

    "bins": counts of the banks' rows per cell, per level, base rate included; one row is in one cell per feature.
    "sums": S of the bank tower and of every owner, per round, one std in units of v (-1..1) for all of them jointly.
    "search.<round>.gradient", "search.<round>.curvature": per inner step, `search_sensitivities[round - 1]` are their
    L2 sensitivities, in whose units the stds are.
    "histogram": one count per held-out row; disjoint from the training rows, so in parallel.
    `banks_per_enterprise`: one enterprise that is a customer of k banks changes every sum by up to k rows, so every
    sensitivity is k times that of one row (k^2 in rho).
    `honest_banks`: banks whose noise shares remain (n - c); each share of a count must stay a discrete Gaussian.
    """
    if features_bank < 1 or not features_owners or min(features_owners.values()) < 1:
        raise Refused(f"{features_bank} bank features and owners' {dict(features_owners)}; every party needs 1 or more")
    if min(rounds, inner_steps, bin_levels, honest_banks, banks_per_enterprise) < 1:
        raise Refused(
            f"{rounds} rounds, {inner_steps} inner steps, {bin_levels} bin levels, {honest_banks} honest banks, "
            f"{banks_per_enterprise} banks per enterprise; each must be 1 or more"
        )
    if len(search_sensitivities) != rounds:
        raise Refused(f"{len(search_sensitivities)} line-search sensitivities for {rounds} rounds; give one per round")
    least_count_std = LEAST_SHARE_STD * math.sqrt(honest_banks)
    releases = [
        Release(
            name="bins",
            l2_sensitivity=math.sqrt(features_bank + 1),
            count=bin_levels,
            weight=BINS_WEIGHT,
            least_std=least_count_std,
        ),
        Release(
            name="sums",
            l2_sensitivity=math.sqrt(sum(features_owners.values()) + features_bank),
            count=rounds,
            weight=SUMS_WEIGHT,
        ),
    ]
    for number, (gradient, curvature) in enumerate(search_sensitivities, start=1):
        for part, sensitivity in (("gradient", gradient), ("curvature", curvature)):
            releases.append(
                Release(
                    name=f"search.{number}.{part}",
                    l2_sensitivity=sensitivity,
                    count=inner_steps,
                    weight=SEARCH_WEIGHT / (2 * rounds),
                )
            )
    releases.append(
        Release(name="histogram", l2_sensitivity=1.0, count=1, weight=1.0, group="held-out", least_std=least_count_std)
    )
    return tuple(replace(release, l2_sensitivity=release.l2_sensitivity * banks_per_enterprise) for release in releases)


def _check_attempts(attempts: Mapping[str, int], names: Sequence[str] | Mapping[str, float]) -> None:
    for name, number in attempts.items():
        if name not in names:
            raise Refused(f"release {name!r} is not in the plan; nothing may be released that was not planned")
        if number < 0:
            raise Refused(f"release {name!r}: {number} extra attempts; what was released cannot be refunded")
