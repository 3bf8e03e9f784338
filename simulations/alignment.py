"""STAND-IN for private set intersection: the simulator matches ids in plaintext. Named so in every report.

What stays true: each bank's rows come in a fresh random order per job (file order leaks dates and labels, PROTOCOL 11),
an owner learns which of its enterprises are whose customers and how many are unknown to it, nothing else.
"""

import numpy as np
import numpy.typing as npt

from fl_clients.data import AlignedRows, BankData, LabelledRows, OwnerData
from models.errors import DataError
from privacy.permutation import random_order
from simulations.federation_folder import BankTable, Federation, locate

STAND_IN = (
    "Alignment: ids are matched inside the simulator, in plaintext; private set intersection is not part of this run."
)

Int64 = npt.NDArray[np.int64]
Order = tuple[Int64, Int64]


def align(federation: Federation) -> tuple[dict[str, BankData], dict[str, OwnerData]]:
    """Every party's table for one job, training and held-out rows in fresh random orders."""
    orders = {bank.name: _order(bank) for bank in federation.banks}
    banks = {bank.name: _bank_data(bank, orders[bank.name]) for bank in federation.banks}
    owners = {}
    for owner in federation.owners:
        aligned = {}
        for bank in federation.banks:
            index = locate(bank.ids, owner.ids)
            training, held_out = orders[bank.name]
            aligned[bank.name] = AlignedRows(training=index[training], held_out=index[held_out])
        owners[owner.name] = OwnerData(columns=owner.columns, rows=len(owner.ids), aligned=aligned)
    return banks, owners


def _order(bank: BankTable) -> Order:
    training, held_out = np.flatnonzero(~bank.held_out), np.flatnonzero(bank.held_out)
    if training.size == 0:
        raise DataError(f"bank {bank.name!r} has no training rows; use fewer banks or another seed")
    return training[random_order(len(training))], held_out[random_order(len(held_out))]


def _bank_data(bank: BankTable, order: Order) -> BankData:
    def rows(index: Int64) -> LabelledRows:
        return LabelledRows(
            label=bank.label[index], columns={name: values[index] for name, values in bank.columns.items()}
        )

    return BankData(training=rows(order[0]), held_out=rows(order[1]))
