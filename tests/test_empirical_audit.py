"""An empirical audit of the banks' noised sums: what an attacker really learns about a canary, against the claim.

The canary is the enterprise that changes a release most; it is in or out of many releases, all else equal, and the
attacker sees the sum less the shares of the colluding banks. The best threshold on its likelihood ratio is chosen on
one half of the releases and judged on the other: with 95 % confidence (Clopper and Pearson 1934)

    epsilon >= ln((true positive rate - delta) / false positive rate).

A bound above the claim would prove a fault; with the noise switched off, or an eighth of it, the audit must prove one.
Sources: Jagielski, Ullman, Oprea 2020; Nasr et al. 2021; for audits within one training run Steinke, Nasr, Jagielski
2023, which this sum does not need: a release takes microseconds, so it is repeated.
"""

import math
import os
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import beta

from fl_clients.contract import PrivacyTerms
from fl_clients.roster import Announcement, Roster
from models.fixed_point import RESIDUAL_BITS
from models.scorecard import ScorecardSettings
from privacy.accounting import Plan
from privacy.charges import ZcdpCharge, curve_of, epsilon_of_curve
from privacy.noise import SystemNoise, discrete_gaussian
from simulations.job import make_parties
from tests.small_federation import small_federation

EPSILON = 3.0
RUNS = {"bins": 12_000, "sums": 3_000}
"""Jobs with the canary, and as many without; a weaker signal needs more of them."""
CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]
Draw = Callable[[float, int], npt.NDArray[np.int64]]


@cache
def roster() -> Roster:
    """Of a real contract: 3 banks, of which 1 may collude, and 2 owners."""
    settings = ScorecardSettings(rounds=2, max_bins_bank=6, max_bins_owner=6, forward_noise=1.0, cross_tabs=False)
    parties = make_parties(small_federation(enterprises=60), settings, PrivacyTerms(epsilon=EPSILON))
    contract = parties.contract
    banks = {
        bank.name: Announcement(public=os.urandom(32), list_size=8192, training_rows=4000, held_out_rows=1000)
        for bank in contract.banks
    }
    owners = {owner.name: Announcement(public=os.urandom(32), list_size=8192) for owner in contract.owners}
    return Roster(contract, {**banks, **owners})


def plan() -> Plan:
    """The noise plan of the contract."""
    found = roster().plan
    assert found is not None
    return found


def canary(name: str) -> npt.NDArray[np.int64]:
    """What the canary adds to the cells that it touches, in grid units, in every time that the job makes this release.

    As far as one enterprise may, and no further.
    """
    release = next(item for item in plan().releases if item.name == name)
    grid = 1 << RESIDUAL_BITS if name == "sums" else 1
    change = np.full(round(release.l2_sensitivity**2), grid, np.int64)
    assert math.isclose(float(np.linalg.norm(change)), release.l2_sensitivity * grid)
    return np.tile(change, release.count)


def total_rho(name: str) -> float:
    """zCDP of all times of a release in the job."""
    return plan().rho(name) * next(item.count for item in plan().releases if item.name == name)


def claimed(name: str) -> float:
    """Epsilon that plan and ledger state for all times of this release in the job."""
    return epsilon_of_curve(curve_of([ZcdpCharge(name=name, rho=total_rho(name), count=1)]), plan().delta)


def attacks(release: str, draw: Draw, runs: int | None = None) -> tuple[Floats, Floats]:
    """The attacker's statistic over `runs` jobs without the canary, and over as many with it."""
    contract, change = roster().contract, canary(release)
    runs = RUNS[release] if runs is None else runs
    banks = len(contract.banks)
    grid = 1 << RESIDUAL_BITS if release == "sums" else 1
    share = roster().share(roster().std(release) * grid, banks)
    honest = banks - contract.colluding(banks)

    def statistic(present: bool) -> Floats:
        noise = sum(draw(share, runs * len(change)).reshape(runs, len(change)) for _ in range(honest))
        seen = (noise + change * present).astype(np.float64)
        found: Floats = seen @ change / float(np.linalg.norm(change))
        return found

    return statistic(False), statistic(True)


def lower_bound(absent: Floats, present: Floats, delta: float) -> float:
    """Epsilon that is at least spent, at CONFIDENCE: the threshold from one half, the rates from the other."""
    half = len(absent) // 2

    def bound(threshold: float, out: Floats, into: Floats) -> float:
        n, tail = len(out), (1 - CONFIDENCE) / 2
        hits, alarms = int((into > threshold).sum()), int((out > threshold).sum())
        least_hits = beta.ppf(tail, hits, n - hits + 1) if hits else 0.0
        most_alarms = beta.ppf(1 - tail, alarms + 1, n - alarms) if alarms < n else 1.0
        return math.log((least_hits - delta) / most_alarms) if least_hits > delta else 0.0

    candidates = np.quantile(np.concatenate([absent[:half], present[:half]]), np.linspace(0.02, 0.999, 200))
    best = max(candidates, key=lambda threshold: bound(float(threshold), absent[:half], present[:half]))
    return max(0.0, bound(float(best), absent[half:], present[half:]))


def secret_draw() -> Draw:
    """The noise of a bank as it runs: a fresh tag for each share."""
    source, number = SystemNoise(), iter(range(10**6))
    return lambda std, size: source.gaussian(f"audit/{next(number)}", std, size)


@cache
def honest_attacks(release: str) -> tuple[Floats, Floats]:
    """Under the noise as the banks draw it."""
    return attacks(release, secret_draw())


@pytest.mark.parametrize("release", ["bins", "sums"])
def test_the_canary_is_hidden_as_well_as_claimed_and_not_perfectly(release: str) -> None:
    found, claim = lower_bound(*honest_attacks(release), plan().delta), claimed(release)
    print(f"{release}: epsilon at least {found:.3f} (95 %), claimed {claim:.3f}")
    assert found <= claim, "the release tells more about an enterprise than the ledger says"
    assert claim < EPSILON
    assert found > 0.02 * claim, "the audit is too weak to find anything"


@pytest.mark.parametrize("release", ["bins", "sums"])
def test_without_noise_the_audit_proves_that_the_claim_is_false(release: str) -> None:
    found = lower_bound(*attacks(release, lambda std, size: np.zeros(size, np.int64), 20_000), plan().delta)
    print(f"{release} without noise: epsilon at least {found:.3f}, claimed {claimed(release):.3f}")
    assert found > 2 * EPSILON, "far above the claim of the whole job, not only of this release"


@pytest.mark.parametrize("release", ["bins", "sums"])
def test_with_an_eighth_of_the_noise_too(release: str) -> None:
    """A share drawn with the wrong standard deviation, or in the wrong unit, would be found."""
    weak = attacks(release, lambda std, size: discrete_gaussian(std / 8, size), runs=1500)
    found = lower_bound(*weak, plan().delta)
    print(f"{release} with 1/8 of the noise: epsilon at least {found:.3f}, claimed {claimed(release):.3f}")
    assert found > 1.2 * claimed(release)


@pytest.mark.parametrize("release", ["bins", "sums"])
def test_the_noise_is_as_strong_as_planned_against_colluders(release: str) -> None:
    """The attack's strength has a closed form: distance of both means in standard deviations = sqrt(2 rho)."""
    absent, present = honest_attacks(release)
    distance = (present.mean() - absent.mean()) / math.sqrt((absent.var() + present.var()) / 2)
    assert distance == pytest.approx(math.sqrt(2 * total_rho(release)), abs=5 * math.sqrt(2 / len(absent)))


def test_the_bound_itself_holds_for_a_mechanism_of_known_epsilon() -> None:
    """Laplace noise of scale 1/epsilon on a count: pure epsilon, which the bound comes near and does not exceed."""
    rng = np.random.default_rng(5)
    for epsilon in (0.5, 1.0, 2.0):
        absent, present = rng.laplace(0, 1 / epsilon, 40_000), rng.laplace(1, 1 / epsilon, 40_000)
        assert 0.7 * epsilon < lower_bound(absent, present, 0.0) <= epsilon
