"""What a job costs: zero-concentrated differential privacy (zCDP) of its releases, through `dp-accounting`.

Unit: one enterprise at one bank. Adjacency: its v and bank fields are zeroed out (membership is known from alignment);
replacement costs four times the rho, k banks or m loans k^2 and m^2 (docs/privacy-accounting.md).
Guarantee: for the plan's standard deviations, the composition of all releases is (epsilon, delta)-differentially
private towards everyone who sees them, as `dp-accounting` recomputes it from the deviations themselves.
Formula: rho of a Gaussian release = l2^2 / (2 std^2); releases compose by adding rho; held-out rows are disjoint from
training rows, so the job costs the larger of the two groups.
Source: Bun, Steinke 2016; Canonne, Kamath, Steinke 2020 (discrete Gaussian satisfies the same rho); PROTOCOL Accounting.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import dp_accounting
from dp_accounting import rdp

from privacy.errors import Refused

Group = Literal["training", "held-out"]

WEIGHTS = {"sums": 0.75, "bins": 0.10, "search": 0.15}
"""How the budget of the training rows is split between the kinds of release."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """`count` releases of vectors with this L2 sensitivity; `weight`: their part of the group's rho, together."""

    name: str
    l2: float
    count: int
    weight: float
    group: Group = "training"

    def __post_init__(self) -> None:
        if not (self.l2 > 0 and self.count >= 1 and self.weight > 0):
            raise Refused(
                f"release {self.name}: l2={self.l2}, count={self.count}, weight={self.weight} must be positive"
            )


def epsilon_of_rho(rho: float, delta: float) -> float:
    """The epsilon of rho-zCDP at delta, by the RDP accountant of `dp-accounting`."""
    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.ZCDpEvent(rho))
    return float(accountant.get_epsilon(delta))


def rho_of_epsilon(epsilon: float, delta: float) -> float:
    """The largest rho (to 10 digits) whose epsilon at delta does not exceed `epsilon`; never rounded up."""
    if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
        raise Refused(f"epsilon={epsilon}, delta={delta}: epsilon must be positive and delta between 0 and 1")
    low, high = 0.0, 1.0
    while epsilon_of_rho(high, delta) <= epsilon:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if epsilon_of_rho(middle, delta) <= epsilon else (low, middle)
    if low <= 0:
        raise Refused(f"epsilon={epsilon} at delta={delta} leaves no budget; raise epsilon")
    return low


@dataclass(frozen=True)
class Plan:
    """The noise of every release of a job. `stds` are totals over banks that nobody may fall below."""

    epsilon: float
    delta: float
    releases: tuple[Release, ...]
    rho: float

    @cached_property
    def stds(self) -> Mapping[str, float]:
        """Standard deviation by release name, in the units of its sensitivity."""
        return {release.name: release.l2 / math.sqrt(2 * self._rho_each(release)) for release in self.releases}

    def _rho_each(self, release: Release) -> float:
        group = sum(other.weight for other in self.releases if other.group == release.group)
        return self.rho * release.weight / group / release.count

    def rho_spent(self, extra_attempts: Mapping[str, int] | None = None) -> float:
        """rho of the job from the standard deviations themselves; an extra attempt of a release costs it once more."""
        extra = extra_attempts or {}
        unknown = set(extra) - {release.name for release in self.releases}
        if unknown:
            raise Refused(f"attempts of {sorted(unknown)}, which are no releases of this plan")
        groups: dict[str, float] = {}
        for release in self.releases:
            times = release.count + extra.get(release.name, 0)
            cost = times * release.l2**2 / (2 * self.stds[release.name] ** 2)
            groups[release.group] = groups.get(release.group, 0.0) + cost
        return max(groups.values())

    def epsilon_spent(self, extra_attempts: Mapping[str, int] | None = None) -> float:
        return epsilon_of_rho(self.rho_spent(extra_attempts), self.delta)


def plan_job(epsilon: float, delta: float, releases: Sequence[Release]) -> Plan:
    """Standard deviations such that all releases together stay within (epsilon, delta); checked, else `Refused`."""
    names = [release.name for release in releases]
    if not releases or len(set(names)) != len(names):
        raise Refused(f"a plan needs releases with different names, got {names}")
    # a hair below, so that the recomputation from rounded deviations cannot exceed epsilon
    plan = Plan(epsilon, delta, tuple(releases), rho_of_epsilon(epsilon, delta) * (1 - 1e-9))
    if plan.epsilon_spent() > epsilon:
        raise Refused(f"the plan spends epsilon {plan.epsilon_spent()}, more than {epsilon}")
    return plan


def scorecard_releases(
    *,
    features_bank: int,
    features_owners: Mapping[str, int],
    rounds: int,
    levels: int,
    inner_steps: int,
    search_sensitivities: Sequence[tuple[float, float]],
) -> tuple[Release, ...]:
    """Every release of the main job (PROTOCOL, Accounting).

    "bins": `levels` releases of the bank columns' counts, the number of defaults among them: L2 = sqrt(F_bank + 1).
    "sums": per round all S_o and S_bank together, |v| <= 1 and one bin per feature: L2 = sqrt(sum F_o + F_bank).
    "search.t.gradient", ".curvature": per round `inner_steps` times, sensitivities in the integer units given.
    "histogram": held-out rows, disjoint: L2 = 1.
    """
    if len(search_sensitivities) != rounds:
        raise Refused(f"{len(search_sensitivities)} search sensitivities for {rounds} rounds; one pair per round")
    features = features_bank + sum(features_owners.values())
    half = WEIGHTS["search"] / (2 * rounds)
    search = [
        Release(name=f"search.{number}.{part}", l2=l2, count=inner_steps, weight=half)
        for number, pair in enumerate(search_sensitivities, 1)
        for part, l2 in zip(("gradient", "curvature"), pair, strict=True)
    ]
    return (
        Release(name="bins", l2=math.sqrt(features_bank + 1), count=levels, weight=WEIGHTS["bins"]),
        Release(name="sums", l2=math.sqrt(features), count=rounds, weight=WEIGHTS["sums"]),
        *search,
        Release(name="histogram", l2=1.0, count=1, weight=1.0, group="held-out"),
    )
