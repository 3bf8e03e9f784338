"""Charges: what one use of a data set may cost one enterprise, as plain data, and how charges become epsilon.

Guarantee: `epsilon_of_curve(curve_of(charges), delta)` is an upper bound on what those releases tell about one
enterprise's records, at that delta, if each is made at most `count` times with at least its noise.
Adjacency: one enterprise's v and bank fields are zeroed out (docs/privacy-accounting.md).
Formula: a Renyi curve is R(a) at every order a; curves add up; train and held-out are disjoint enterprises, so a use
costs max(R_train(a), R_held_out(a)) per order; zCDP rho is R(a) = a rho; epsilon is converted by `dp-accounting`.
Source: Bun, Steinke 2016; Mironov, Talwar, Zhang 2019 (sampled Gaussian); Canonne, Kamath, Steinke 2020.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    NeighboringRelation,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    ZCDpEvent,
)
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from privacy.accounting import GROUPS, ORDERS, Group, Plan
from privacy.errors import Refused

"""Renyi orders of every curve: the plan's, so that plan and ledger agree to the last digit."""

Curve = npt.NDArray[np.float64]
"""Renyi divergence at every order of ORDERS; infinite where nothing is known or nothing hides."""

MOST_TIMES = 10**9
"""Largest count of one charge; more is a slip of the pen."""

_LARGEST_SAMPLED_ORDER = 1024
_ROUNDING = 1e-12  # dp-accounting is up to 2e-15 (0.5 % of 1e-22) below the exact value of a step


@dataclass(frozen=True, kw_only=True)
class ZcdpCharge:
    """`count` releases with Gaussian noise, each `rho`-zCDP for one enterprise of `group`."""

    name: str
    rho: float
    count: int
    group: Group = "train"

    def __post_init__(self) -> None:
        _check(self.name, self.count, self.group)
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise Refused(
                f"charge {self.name!r}: rho {self.rho} is not finite and above 0; use ExactCharge for no noise"
            )


@dataclass(frozen=True, kw_only=True)
class SampledGaussianCharge:
    """`steps` steps of DP-SGD: Poisson sampling of enterprises, Gaussian noise of `noise_multiplier` clip norms."""

    name: str
    sampling_probability: float
    noise_multiplier: float
    steps: int
    group: Group = "train"

    def __post_init__(self) -> None:
        _check(self.name, self.steps, self.group)
        if not 0 < self.sampling_probability <= 1:
            raise Refused(f"charge {self.name!r}: sampling probability {self.sampling_probability} is outside (0, 1]")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise Refused(
                f"charge {self.name!r}: noise multiplier {self.noise_multiplier} is not finite and above 0; use "
                "ExactCharge for no noise"
            )

    @property
    def count(self) -> int:
        return self.steps


@dataclass(frozen=True, kw_only=True)
class ExactCharge:
    """`count` releases without noise (exact sums, simulation only): no epsilon, the cost is infinite."""

    name: str
    count: int
    group: Group = "train"

    def __post_init__(self) -> None:
        _check(self.name, self.count, self.group)


Charge = ZcdpCharge | SampledGaussianCharge | ExactCharge

_TYPES: Mapping[str, type[Charge]] = {
    "zcdp": ZcdpCharge,
    "sampled gaussian": SampledGaussianCharge,
    "exact": ExactCharge,
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The owner's limits, at the owner's `delta`: all uses of one job together, and all jobs of the data set."""

    epsilon_job: float
    epsilon_total: float
    delta: float

    def __post_init__(self) -> None:
        for name, epsilon in (("epsilon_job", self.epsilon_job), ("epsilon_total", self.epsilon_total)):
            if not (math.isfinite(epsilon) and epsilon > 0):
                raise Refused(f"a budget's {name} is {epsilon}; it must be finite and above 0")
        check_delta(self.delta)


def check_delta(delta: float) -> None:
    """`Refused` outside (0, 1)."""
    if not 0 < delta < 1:
        raise Refused(f"delta {delta} is outside (0, 1); the default is 1 / (10 n)")


def check_charges(charges: Sequence[Charge]) -> None:
    """`Refused` when empty or when two charges share a name."""
    names = [charge.name for charge in charges]
    if not names or len(set(names)) != len(names):
        raise Refused(f"a reservation needs charges with distinct names, got {names}")


def charges_of(plan: Plan) -> tuple[Charge, ...]:
    """What the ledger reserves for a plan: every kind of release as often as planned, spare attempts included."""
    return tuple(
        ZcdpCharge(
            name=release.name,
            rho=plan.rho(release.name),
            count=release.count,
            group=release.group,
        )
        for release in plan.releases
    )


def to_json(charges: Sequence[Charge]) -> list[dict[str, Any]]:
    """JSON data; floats keep all their digits."""
    names = {kind: name for name, kind in _TYPES.items()}
    return [{"type": names[type(charge)], **asdict(charge)} for charge in charges]


def from_json(data: object) -> tuple[Charge, ...]:
    """Inverse of `to_json`. `Refused` for anything else."""
    try:
        if not isinstance(data, list):
            raise TypeError("no list")
        return tuple(_TYPES[item["type"]](**{k: v for k, v in item.items() if k != "type"}) for item in data)
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"charges {json.dumps(data)[:200]} are not of a known form ({error!r}); update this program"
        ) from None


def curve_of(charges: Sequence[Charge]) -> Curve:
    """What one use costs one enterprise: charges of a group add up, of the two groups the larger counts, per order."""
    train, held_out = (_group_curve([charge for charge in charges if charge.group == group]) for group in GROUPS)
    return np.maximum(train, held_out)


def no_cost() -> Curve:
    """The curve of no release at all."""
    return np.zeros(len(ORDERS))


def epsilon_of_curve(curve: Curve, delta: float) -> float:
    """epsilon at `delta`; `math.inf` when no order is finite (a release without noise)."""
    check_delta(delta)
    if np.isnan(curve).any() or (curve < 0).any():
        raise Refused("a Renyi curve has values below 0 or none at all; this cost is not to be trusted")
    return float(compute_epsilon(ORDERS, curve, delta)[0])


def _group_curve(charges: Sequence[Charge]) -> Curve:
    curve = no_cost()
    events = []
    for charge in charges:
        match charge:
            case ZcdpCharge():
                events.append(SelfComposedDpEvent(ZCDpEvent(charge.rho), charge.count))
            case ExactCharge():
                events.append(NonPrivateDpEvent())
            case SampledGaussianCharge():
                curve = curve + charge.steps * _sampled_step(charge.sampling_probability, charge.noise_multiplier)
    if not events:
        return curve
    composed: Curve = curve + RdpAccountant(ORDERS).compose(ComposedDpEvent(events)).rdp
    return composed


@lru_cache(maxsize=256)
def _sampled_step(sampling_probability: float, noise_multiplier: float) -> Curve:
    """One step of DP-SGD, an upper bound at every order.

    dp-accounting's formula for fractional orders takes 4 s over ORDERS, that for whole ones 0.1 s. A Renyi divergence
    never falls with its order, so a fractional order is charged as the next whole one; orders above 1024 are not used.
    """
    if sampling_probability == 1:
        everyone: Curve = np.asarray(RdpAccountant(ORDERS).compose(GaussianDpEvent(noise_multiplier)).rdp)
        return everyone
    whole = np.ceil(ORDERS).astype(np.int64)
    known = whole <= _LARGEST_SAMPLED_ORDER
    grid = np.unique(whole[known])
    event = PoissonSampledDpEvent(sampling_probability, GaussianDpEvent(noise_multiplier))
    # zeroing out one enterprise is this relation; a Poisson-sampled Gaussian costs the same as for adding one
    accountant = RdpAccountant(grid.tolist(), NeighboringRelation.REPLACE_SPECIAL).compose(event)
    values = np.asarray(accountant.rdp, dtype=np.float64)
    # an upper bound despite rounding; and the conversion would read a divergence below 0 as epsilon 0
    values = np.where(values >= 0, values, np.inf) + _ROUNDING
    curve = np.full(len(ORDERS), np.inf)
    curve[known] = values[np.searchsorted(grid, whole[known])]
    curve.setflags(write=False)
    return curve


def _check(name: str, count: int, group: str) -> None:
    if not name or not name.isprintable():
        raise Refused(f"a charge is named {name!r}; give it a printable name")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_TIMES:
        raise Refused(f"charge {name!r}: {count} times; give a whole number between 1 and 10^9")
    if group not in GROUPS:
        raise Refused(f"charge {name!r}: group {group!r} is neither 'train' nor 'held-out'")
