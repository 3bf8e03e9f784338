"""The roster of a job: every party's announcement, and what follows from it, the same at every party.

Row counts (declared public) and keys, signed by each party's identity, fix the BFV parameters and the noise plan. All
of it is public; the coordinator computes it too.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from fl_clients.contract import MOST_DELTA, Contract
from models.fixed_point import RESIDUAL_BITS
from models.line_search import INNER_STEPS, sensitivities
from models.scorecard import NoiseStds
from models.shared_bins import LEVELS
from privacy.accounting import Plan, default_delta, plan_job, scorecard_releases
from privacy.noise import share_std
from privacy.parameters import BFVParameters, choose_aggregate, choose_sum
from privacy.sealing import encode_fields

MatchingForm = Literal["two-way", "owners publish", "banks publish"]


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A party's word at the start: its key of this job and, of a bank, how many rows it brings (declared public)."""

    public: bytes
    list_size: int
    """Ids in its table, rounded up to the contract's bucket."""
    training_rows: int = 0
    held_out_rows: int = 0


@dataclass(frozen=True)
class Roster:
    """Everyone's announcement, and what follows from them."""

    contract: Contract
    announcements: Mapping[str, Announcement]

    def rows(self, banks: Iterable[str]) -> int:
        return sum(self.announcements[bank].training_rows for bank in banks)

    @cached_property
    def training_rows(self) -> int:
        return self.rows(bank.name for bank in self.contract.banks)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all announcements. It is in the check value of every secure sum: banks that were shown different
        rosters, and so planned different noise, open nothing.
        """
        plain = [
            [
                name.encode(),
                told.public,
                *(str(n).encode() for n in (told.list_size, told.training_rows, told.held_out_rows)),
            ]
            for name, told in sorted(self.announcements.items())
        ]
        return hashlib.sha256(encode_fields(encode_fields(fields) for fields in plain)).digest()

    @cached_property
    def delta(self) -> float:
        given = self.contract.privacy.delta
        if given is not None:
            return given
        default = default_delta(self.training_rows)
        return default if self.contract.simulation else min(default, MOST_DELTA)

    @cached_property
    def matching_form(self) -> MatchingForm:
        """The form of private set intersection with the fewest multiplications that the contract allows."""
        if not self.contract.alignment.one_sided:
            return "two-way"
        banks = [self.announcements[bank.name].list_size for bank in self.contract.banks]
        owners = [self.announcements[owner.name].list_size for owner in self.contract.owners]
        costs: dict[MatchingForm, int] = {
            "two-way": 2 * (len(owners) * sum(banks) + len(banks) * sum(owners)),
            "owners publish": sum(owners) + 3 * len(owners) * sum(banks),
            "banks publish": sum(banks) + 3 * len(banks) * sum(owners),
        }
        return min(costs, key=lambda form: costs[form])

    @cached_property
    def plan(self) -> Plan | None:
        """The noise of every release; None without epsilon (simulation only)."""
        epsilon = self.contract.privacy.epsilon
        if epsilon is None:
            return None
        rounds = self.contract.model.rounds
        releases = scorecard_releases(
            features_bank=len(self.contract.banks[0].columns),
            features_owners={owner.name: len(owner.columns) for owner in self.contract.owners},
            rounds=rounds,
            bin_levels=LEVELS,
            banks_per_enterprise=self.contract.privacy.banks_per_enterprise,
            honest_banks=len(self.contract.banks) - self.contract.colluding(len(self.contract.banks)),
            inner_steps=INNER_STEPS,
            search_sensitivities=[sensitivities(3 if number == 1 else 4) for number in range(1, rounds + 1)],
        )
        spare = self.contract.privacy.spare_attempts
        return plan_job(epsilon, self.delta, [replace(release, count=release.count + spare) for release in releases])

    @staticmethod
    def released_in(step: str) -> tuple[str, ...]:
        """The names of the releases that a bank's step makes; empty for the others."""
        match step.split("."):
            case ["bins", _]:
                return ("bins",)
            case [_, "residual"]:
                return ("sums",)
            case [number, "search", _]:
                return (f"search.{number[1:]}.gradient", f"search.{number[1:]}.curvature")
            case ["evaluate"]:
                return ("histogram",)
            case _:
                return ()

    def std(self, release: str) -> float:
        """Standard deviation that a release must have at least, in the units of its sensitivity; 0 without epsilon."""
        return 0.0 if self.plan is None else self.plan.stds[release]

    def share(self, std: float, banks: int) -> float:
        """One bank's share of it."""
        return share_std(std, banks, self.contract.colluding(banks)) if std else 0.0

    def total_std(self, std: float, banks: int) -> float:
        """What all shares make together: more than `std`, for the colluders' shares do not count."""
        return self.share(std, banks) * math.sqrt(banks)

    @cached_property
    def noise_stds(self) -> NoiseStds:
        """What all shares of the roster's banks make together, as the training loop takes it."""
        if self.plan is None:
            return NoiseStds()
        banks = len(self.contract.banks)
        return NoiseStds(
            bins=self.total_std(self.std("bins"), banks),
            gradient=self.total_std(self.std("sums"), banks),
            search=tuple(
                (
                    self.total_std(self.std(f"search.{number}.gradient"), banks),
                    self.total_std(self.std(f"search.{number}.curvature"), banks),
                )
                for number in range(1, self.contract.model.rounds + 1)
            ),
        )

    @cached_property
    def aggregate_parameters(self) -> BFVParameters:
        noise = self.noise_stds.gradient * (1 << RESIDUAL_BITS)
        return choose_aggregate(
            rows=self.training_rows,
            value_bits=RESIDUAL_BITS + 1,
            matrix_bits=1,
            features=max(len(owner.columns) + 1 for owner in self.contract.owners),
            noise_std=noise,
        )

    @cached_property
    def sum_parameters(self) -> BFVParameters:
        return choose_sum(parties=len(self.contract.banks))
