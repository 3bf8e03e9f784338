"""What the privacy ledger shows: plain values for people, tables and certificates. No secret, no enterprise."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from privacy.charges import Charge


@dataclass(frozen=True, kw_only=True)
class ChargeSpent:
    """One kind of release of a use: how often it was reserved (and so counts as spent), how often performed."""

    charge: Charge
    reserved: int
    performed: int


@dataclass(frozen=True, kw_only=True)
class UseSpent:
    """One use of the data set. `epsilon`: of this use alone (uses add up to less than the sum of their epsilons)."""

    job: str
    use: int
    time: datetime
    epsilon: float
    charges: tuple[ChargeSpent, ...]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a data set has spent: `epsilon` at `delta` of everything reserved, `math.inf` after an exact release."""

    data_set: str
    delta: float
    epsilon: float
    uses: tuple[UseSpent, ...]


@dataclass(frozen=True, kw_only=True)
class Opening:
    """One call of `open_scores`: `enterprises` rows were opened `times` times each."""

    job: str
    use: int
    time: datetime
    kind: str
    enterprises: int
    times: int


@dataclass(frozen=True, kw_only=True)
class Openings:
    """A data set's score openings. `histogram`: openings -> how many enterprises have so many, over all jobs."""

    data_set: str
    histogram: Mapping[int, int]
    calls: tuple[Opening, ...]
