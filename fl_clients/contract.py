"""The contract of a job: who takes part, for what, with which columns, model, privacy and encryption, until when.

Its canonical JSON is hashed, the hash is signed (Ed25519) by the coordinator and by every institution and bound into
every seal and message of the job: a party whose contract differs by one byte can open nothing of the others. Outside
simulation a contract without epsilon is refused, since exact sums reveal the labels of pure bins (PROTOCOL, "What the
table must also say"). Canonical form: JSON, keys sorted, no spaces, ASCII; times are UTC.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from models.binning import ColumnSpec
from models.scorecard import ScorecardSettings
from privacy.errors import Refused
from privacy.identity import SigningIdentity, verify
from privacy.noise import default_colluding
from privacy.parameters import LEAST_HIDING_BITS

COORDINATOR = "coordinator"
"""The coordinator's name among signatures and receivers; no party may have it."""

MOST_EPSILON = 10.0
MOST_DELTA = 1e-4
MOST_DAYS = 3660
_SIGNATURE = b"xinyi contract 2"

Role = Literal["bank", "pboc", "public_credit"]
Receiver = Literal["coordinator", "banks", "owners"]
ReleaseName = Literal[
    "row_counts", "alignment", "bank_sums", "owner_sums", "directions", "scores", "score_histogram", "model_digest"
]


def _whole_second(moment: datetime) -> datetime:
    """UTC without fractions: one moment has one canonical form."""
    return moment.astimezone(UTC).replace(microsecond=0)


Moment = Annotated[AwareDatetime, AfterValidator(_whole_second)]

RELEASES: Mapping[ReleaseName, tuple[Receiver, ...]] = {
    "row_counts": ("coordinator", "banks", "owners"),
    "alignment": ("banks", "owners"),
    "bank_sums": ("banks",),
    "owner_sums": ("owners",),
    "directions": ("banks",),
    "scores": ("banks",),
    "score_histogram": ("coordinator", "banks"),
    "model_digest": ("coordinator",),
}
"""What the protocol of the scorecard lets out, and the most that may receive it. row_counts: a party's rows and keys;
alignment: which enterprises both sides of a pair know; bank_sums: bins, sums, line search of the bank columns;
owner_sums: S; directions: an owner's noised part of each round; scores: exact partial scores, summed blindly."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


class LabelTerms(_Frozen):
    """What 1 means, in words that every label holder must be able to check its own label against."""

    definition: str = Field(min_length=1)

    @property
    def hash(self) -> str:
        """SHA-256 of the definition, hex: what a policy lists."""
        return hashlib.sha256(self.definition.encode()).hexdigest()


class HETerms(_Frozen):
    """Floor of the encryption: a vault refuses parameters below it."""

    security_bits: int = Field(default=128, ge=128)
    flooding_bits: int = Field(default=LEAST_HIDING_BITS, ge=LEAST_HIDING_BITS)


class ReleaseTerms(_Frozen):
    """Who may receive one kind of release; a release or a receiver that is not listed is refused at the vault."""

    name: ReleaseName
    receivers: tuple[Receiver, ...]


def all_releases() -> tuple[ReleaseTerms, ...]:
    """The releases of the scorecard job, each to everyone that the protocol has it for."""
    return tuple(ReleaseTerms(name=name, receivers=receivers) for name, receivers in RELEASES.items())


class PrivacyTerms(_Frozen):
    """Differential privacy of the banks' records: adjacency zeroes out one enterprise's v and bank fields."""

    unit: Literal["enterprise"] = "enterprise"

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

    version: Literal[2] = 2
    job: str = Field(pattern="^[0-9a-f]{32}$")
    purpose: str = Field(min_length=1)
    """As the consents say it: only enterprises that consented to this purpose take part."""
    scenario: str = Field(min_length=1)
    """Entry of the scenario catalogue that the columns are asked for."""
    label: LabelTerms
    simulation: bool
    not_before: Moment
    expires: Moment
    uses: int = Field(ge=1, le=1000)
    """Times that the job may be run; each run pays epsilon in full."""
    retention_days: int = Field(ge=0, le=MOST_DAYS)
    """Days after `expires` that a party may keep its model of this job."""
    coordinator_identity: str = Field(pattern="^[0-9a-f]{64}$")
    parties: tuple[PartyTerms, ...]
    model: ModelTerms
    privacy: PrivacyTerms
    alignment: AlignmentTerms = AlignmentTerms()
    he: HETerms = HETerms()
    releases: tuple[ReleaseTerms, ...]
    least_banks: int = Field(ge=1)
    """Banks needed to go on when one dies; with fewer the run stops. Feature owners can never be left out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [party.name for party in self.parties]
        if len(set(names)) != len(names):
            raise ValueError("two parties have the same name; every party needs its own")
        if COORDINATOR in names:
            raise ValueError(f"a party is named {COORDINATOR!r}, which stands for the coordinator; name it otherwise")
        identities = [party.identity for party in self.parties]
        if len({*identities, self.coordinator_identity}) != len(identities) + 1:
            raise ValueError("two parties, or a party and the coordinator, have the same identity key")
        self._check_releases()
        if not self.not_before < self.expires:
            raise ValueError(f"not_before={self.not_before} is not before expires={self.expires}")
        if (self.expires - self.not_before).days > MOST_DAYS:
            raise ValueError(
                f"the job would be valid for {(self.expires - self.not_before).days} days, more than {MOST_DAYS}"
            )
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

    def _check_releases(self) -> None:
        listed = [release.name for release in self.releases]
        if len(set(listed)) != len(listed):
            raise ValueError("a release is listed twice; list each once with all its receivers")
        for release in self.releases:
            beyond = set(release.receivers) - set(RELEASES[release.name])
            if beyond or not release.receivers:
                raise ValueError(
                    f"release {release.name} to {sorted(release.receivers)}: the protocol has it for "
                    f"{list(RELEASES[release.name])} only"
                )

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

    def receivers(self, release: ReleaseName) -> tuple[Receiver, ...]:
        """Who may receive a release; nobody where the contract does not list it."""
        return next((terms.receivers for terms in self.releases if terms.name == release), ())

    def identity_of(self, signer: str) -> bytes:
        """Public key of a party or of the coordinator."""
        return bytes.fromhex(self.coordinator_identity if signer == COORDINATOR else self.party(signer).identity)

    @property
    def signers(self) -> tuple[str, ...]:
        """Everyone whose signature the contract needs."""
        return (COORDINATOR, *(party.name for party in self.parties))

    def colluding(self, banks: int) -> int:
        """How many banks may collude without weakening the noise, among `banks` participants."""
        wanted = self.privacy.colluding_banks
        return default_colluding(banks) if wanted is None else min(wanted, banks - 1)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy is hashed anew: pydantic would take the kept hash along with the changed fields."""
        copied = super().model_copy(update=update, deep=deep)
        vars(copied).pop("hash", None)
        return copied

    def canonical(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @cached_property
    def hash(self) -> bytes:
        """SHA-256 of the canonical form, 32 bytes. Computed once: every message of a job is bound to it."""
        return hashlib.sha256(b"xinyi contract 2\x00" + self.canonical()).digest()


class SignedContract(_Frozen):
    """A contract with the signatures it has so far: signer -> Ed25519 signature over the contract's hash (hex)."""

    contract: Contract
    signatures: dict[str, str] = Field(default_factory=dict)

    def signed(self, signer: str, identity: SigningIdentity) -> "SignedContract":
        """With one more signature; `Refused` if the contract names another key for this signer."""
        if self.contract.identity_of(signer) != identity.public:
            raise Refused(f"the contract names another identity key for {signer!r}; sign with the key that was agreed")
        return self.added(signer, identity.sign(_SIGNATURE, self.contract.hash).hex())

    def added(self, signer: str, signature: str) -> "SignedContract":
        """With a signature that somebody else made; `Refused` unless it is that signer's over this very contract."""
        checked = SignedContract(contract=self.contract, signatures={**self.signatures, signer: signature})
        checked.check(signer)
        return checked

    def check(self, *signers: str) -> None:
        """`Refused` unless each of `signers` signed."""
        for signer in signers:
            signature = self.signatures.get(signer)
            if signature is None:
                raise Refused(f"contract {self.contract.hash.hex()[:16]} lacks the signature of {signer}")
            try:
                verify(self.contract.identity_of(signer), _SIGNATURE, self.contract.hash, bytes.fromhex(signature))
            except ValueError:
                raise Refused(f"the signature of {signer} is not hexadecimal; ask for the contract again") from None
            except Refused:
                raise Refused(
                    f"the signature of {signer} does not fit contract {self.contract.hash.hex()[:16]}: it was altered "
                    "after signing, or signed by another key"
                ) from None

    def check_all(self) -> None:
        """`Refused` unless everyone signed, and nobody else."""
        self.check(*self.contract.signers)
        if extra := sorted(set(self.signatures) - set(self.contract.signers)):
            raise Refused(f"signatures of strangers to the contract: {', '.join(extra)}")
