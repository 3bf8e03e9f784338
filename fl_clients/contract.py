"""The contract of a job: who takes part, with which columns, model and privacy. Its hash is bound into every seal.

Stand-in until institutions countersign it: a local file that every party is given; its canonical JSON is hashed, and a
party whose file differs by one byte can open nothing of the others. Outside simulation a contract without epsilon is
refused, since exact sums reveal the labels of pure bins (PROTOCOL, "What the table must also say").
"""

import hashlib
import json
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.binning import ColumnSpec
from models.scorecard import ScorecardSettings
from privacy.errors import Refused
from privacy.noise import default_colluding

MOST_EPSILON = 10.0
MOST_DELTA = 1e-4

Role = Literal["bank", "pboc", "public_credit"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnTerms(_Frozen):
    """A column that the job may use. `categories`: the public code list, for categorical columns of label holders."""

    name: str = Field(min_length=1)
    kind: Literal["numeric", "categorical"]
    special_codes: tuple[float, ...] = ()
    categories: tuple[str, ...] = ()

    @property
    def spec(self) -> ColumnSpec:
        return ColumnSpec(name=self.name, kind=self.kind, codes=self.special_codes, categories=self.categories)


class PartyTerms(_Frozen):
    """An institution in the job. `identity`: its Ed25519 public key (hex)."""

    name: str = Field(min_length=1, max_length=64)
    role: Role
    identity: str = Field(pattern="^[0-9a-f]{64}$")
    columns: tuple[ColumnTerms, ...]
    most_enterprises: int = Field(default=1 << 23, ge=1)
    """Largest list that it may bring to the alignment: more could be a list of all published codes."""


class ModelTerms(_Frozen):
    """The model and its training."""

    rounds: int = Field(ge=1, le=8)
    max_bins_bank: int = Field(ge=2, le=64)
    max_bins_owner: int = Field(ge=2, le=64)
    least_count: int = Field(ge=1)
    """Categories with fewer rows are merged into one bin."""
    ridge: float = Field(gt=0)
    smoothness: float = Field(ge=0)
    forward_noise: float = Field(ge=0)
    """Noise on an owner's direction in training, in standard deviations of that direction."""


class PrivacyTerms(_Frozen):
    """Differential privacy of the banks' records: adjacency zeroes out one enterprise's v and bank fields."""

    epsilon: float | None = Field(default=None, gt=0)
    delta: float | None = Field(default=None, gt=0, lt=1)
    """None: 1 / (10 n), n the training rows of all banks."""
    banks_per_enterprise: int = Field(default=1, ge=1)
    """The privacy unit is the enterprise: at most so many banks may share one, and all noise is scaled by it."""
    spare_attempts: int = Field(default=0, ge=0, le=10)
    """Times that each kind of release may be run again after a bank's death, paid for in advance."""
    colluding_banks: int | None = Field(default=None, ge=0)
    """Banks that may subtract their own noise shares: at least the one that looks; None: all but two."""


class AlignmentTerms(_Frozen):
    """How enterprises are matched. `bucket`: list sizes are rounded up to a multiple of it before anybody sees them.

    `one_sided`: allows the faster form in which one side publishes keyed values of its whole list (its leak beyond the
    two-way form: docs/private-set-intersection.md).
    """

    bucket: int = Field(default=1024, ge=1, le=1 << 20)
    one_sided: bool = True


class Contract(_Frozen):
    """The terms of one job. `hash` identifies it everywhere."""

    version: Literal[1] = 1
    job: str = Field(pattern="^[0-9a-f]{32}$")
    purpose: str
    label: str
    simulation: bool
    coordinator_identity: str = Field(pattern="^[0-9a-f]{64}$")
    parties: tuple[PartyTerms, ...]
    model: ModelTerms
    privacy: PrivacyTerms
    alignment: AlignmentTerms = AlignmentTerms()
    least_banks: int = Field(ge=1)
    """Banks needed to go on when one dies; with fewer the run stops. Feature owners can never be left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [party.name for party in self.parties]
        if len(set(names)) != len(names):
            raise ValueError("two parties have the same name; every party needs its own")
        if not self.banks:
            raise ValueError("no bank in the contract; a job needs at least one label holder")
        if not self.owners:
            raise ValueError("no feature owner in the contract; this job needs at least one")
        if self.least_banks > len(self.banks):
            raise ValueError(f"least_banks={self.least_banks} of {len(self.banks)} banks; lower it")
        if len({bank.columns for bank in self.banks}) > 1:
            raise ValueError("the banks' columns differ; in one job all banks bring the same columns")
        if any(not party.columns for party in self.parties):
            raise ValueError("a party brings no column; leave it out of the contract")
        colluding = self.privacy.colluding_banks
        if colluding is not None and colluding >= len(self.banks):
            raise ValueError(f"colluding_banks={colluding} of {len(self.banks)} banks; at least one must be honest")
        if colluding == 0 and len(self.banks) > 1:
            raise ValueError("colluding_banks=0: a bank can always subtract its own noise share; give 1 or more")
        if self.privacy.banks_per_enterprise > len(self.banks):
            raise ValueError(f"banks_per_enterprise={self.privacy.banks_per_enterprise} of {len(self.banks)} banks")
        if not self.simulation:
            self._check_deployed()
        return self

    def _check_deployed(self) -> None:
        """What only a simulation may do."""
        privacy = self.privacy
        if privacy.epsilon is None:
            raise ValueError("no epsilon: outside simulation exact sums would reveal labels of pure bins; set epsilon")
        if privacy.epsilon > MOST_EPSILON:
            raise ValueError(
                f"epsilon={privacy.epsilon}: outside simulation at most {MOST_EPSILON}; more is no privacy"
            )
        if privacy.delta is not None and privacy.delta > MOST_DELTA:
            raise ValueError(
                f"delta={privacy.delta}: outside simulation at most {MOST_DELTA}; leave it out for 1 / (10 n)"
            )
        if self.model.forward_noise < 1:
            raise ValueError(f"forward_noise={self.model.forward_noise}: outside simulation at least 1")

    @property
    def banks(self) -> tuple[PartyTerms, ...]:
        return tuple(party for party in self.parties if party.role == "bank")

    @property
    def owners(self) -> tuple[PartyTerms, ...]:
        return tuple(party for party in self.parties if party.role != "bank")

    @property
    def settings(self) -> ScorecardSettings:
        """The model terms as the training loop takes them."""
        return ScorecardSettings(**self.model.model_dump(), cross_tabs=self.privacy.epsilon is None)

    def party(self, name: str) -> PartyTerms:
        for party in self.parties:
            if party.name == name:
                return party
        raise Refused(f"{name!r} is no party of job {self.job}; ask the coordinator for a contract that names it")

    def colluding(self, banks: int) -> int:
        """How many banks may collude without weakening the noise, among `banks` participants."""
        wanted = self.privacy.colluding_banks
        return default_colluding(banks) if wanted is None else min(wanted, banks - 1)

    def canonical(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def hash(self) -> bytes:
        """SHA-256 of the canonical form, 32 bytes."""
        return hashlib.sha256(b"xinyi contract 1\x00" + self.canonical()).digest()
