"""From an institution's checked table to what its vault takes into a job.

The contract's columns come from the schema: a coded field brings its public code list, so that banks agree on
categories without showing each other theirs. Rows without a label (neither bad nor good) take no part.
"""

from collections.abc import Callable, Sequence
from datetime import datetime

import numpy as np

from fl_clients.consent import ConsentStore
from fl_clients.contract import ColumnTerms
from fl_clients.data import BankData, Bool, Consent, LabelledRows, OwnerData, everyone
from fl_clients.data_check import CheckedTable
from models.errors import DataError
from models.schema import Schema


def column_terms(schema: Schema, names: Sequence[str]) -> tuple[ColumnTerms, ...]:
    """The contract's terms of these fields. Raises DataError for a field that is no feature."""
    terms = []
    for name in names:
        wanted = schema.field(name)
        if not wanted.is_feature:
            raise DataError(f"{wanted.zh} {name!r} ({wanted.time}) is no feature; leave it out of the contract")
        if wanted.type == "code":
            categories = () if wanted.codes is None else wanted.codes.codes
            terms.append(ColumnTerms(name=name, kind="categorical", categories=categories))
        else:
            terms.append(ColumnTerms(name=name, kind="numeric"))
    return tuple(terms)


def consent_of(store: ConsentStore, purpose: str, clock: Callable[[], datetime]) -> Consent:
    """Asks the institution's register anew at every step; `clock` gives the present with its time zone."""
    return lambda ids: store.live(ids, purpose, clock())


def owner_data(table: CheckedTable, consent: Consent = everyone) -> OwnerData:
    """A feature owner's vault table: every enterprise it has a record of."""
    return OwnerData(ids=table.codes.tolist(), columns=table.columns, consent=consent)


def bank_data(table: CheckedTable, label: str, held_out: Bool, consent: Consent = everyone) -> BankData:
    """A bank's vault table. `label`: the outcome field, 1 = bad, 0 = good, empty = neither; `held_out`: bool[n]."""
    outcome = np.asarray(table.columns[label], np.float64)
    if not np.isin(outcome[~np.isnan(outcome)], (0.0, 1.0)).all():
        raise DataError(f"label {label!r} has values other than 0 and 1; map it as a flag")
    if held_out.shape != outcome.shape or held_out.dtype != np.bool_:
        raise DataError(f"held_out is {held_out.dtype}{held_out.shape}, must be bool{outcome.shape}")
    features = {name: cells for name, cells in table.columns.items() if name != label}

    def rows(mask: Bool) -> LabelledRows:
        columns = {name: cells[mask] for name, cells in features.items()}
        return LabelledRows(ids=table.codes[mask].tolist(), label=outcome[mask].astype(np.int8), columns=columns)

    labelled = ~np.isnan(outcome)
    return BankData(training=rows(labelled & ~held_out), held_out=rows(labelled & held_out), consent=consent)
