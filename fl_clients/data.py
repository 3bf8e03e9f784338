"""The tables that an institution's vault holds for one job, rows in the order of the alignment.

The alignment (who is whose customer, in a fresh random order per job and bank) is made outside; until private set
intersection lands it is made by the simulator and named as a stand-in in the report.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64] | npt.NDArray[np.object_]
Int8 = npt.NDArray[np.int8]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, repr=False)
class LabelledRows:
    """A bank's rows: `label` int8[n] in {0, 1}, `columns` by name, each of length n."""

    label: Int8
    columns: Mapping[str, Column]


@dataclass(frozen=True, kw_only=True, repr=False)
class BankData:
    """A label holder's table. Held-out rows are scored at the end and take no part in training."""

    training: LabelledRows
    held_out: LabelledRows


@dataclass(frozen=True, kw_only=True, repr=False)
class AlignedRows:
    """For one bank: this owner's row of each of the bank's rows, int64[n], -1 where the owner knows nothing."""

    training: Int64
    held_out: Int64


@dataclass(frozen=True, kw_only=True, repr=False)
class OwnerData:
    """A feature owner's table, all its enterprises, and its alignment with each bank."""

    columns: Mapping[str, Column]
    rows: int
    aligned: Mapping[str, AlignedRows] = field(default_factory=dict)
