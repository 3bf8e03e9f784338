"""The tables that an institution's vault holds for one job."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64] | npt.NDArray[np.object_]
Int8 = npt.NDArray[np.int8]
Int64 = npt.NDArray[np.int64]


Bool = npt.NDArray[np.bool_]

Consent = Callable[[Sequence[str]], Bool]
"""Which of these enterprises have live consent for the job's purpose, now: bool[n]. Asked before every use."""


def everyone(ids: Sequence[str]) -> Bool:
    """A table without a consent register (simulation): everybody takes part."""
    return np.ones(len(ids), np.bool_)


@dataclass(frozen=True, kw_only=True, repr=False)
class LabelledRows:
    """A bank's rows: distinct `ids` of its enterprises, `label` int8[n] in {0, 1}, `columns` by name of length n."""

    ids: Sequence[str]
    label: Int8
    columns: Mapping[str, Column]


@dataclass(frozen=True, kw_only=True, repr=False)
class BankData:
    """A label holder's table. Held-out rows are scored at the end and take no part in training."""

    training: LabelledRows
    held_out: LabelledRows
    consent: Consent = everyone


@dataclass(frozen=True, kw_only=True, repr=False)
class AlignedRows:
    """What alignment gives an owner for one bank: its own row of each of the bank's rows, int64[n], -1 = unknown."""

    training: Int64
    held_out: Int64


@dataclass(frozen=True, kw_only=True, repr=False)
class OwnerData:
    """A feature owner's table: all its enterprises, by distinct id."""

    ids: Sequence[str]
    columns: Mapping[str, Column]
    consent: Consent = everyone
