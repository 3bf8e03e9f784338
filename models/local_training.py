"""One bank's training in one round: some passes of Adam over its rows, from the shared parameters.

What it guarantees: a pure function of (parameters, rows, settings, seed): the same bits in the encrypted run and in its
plaintext twin on one machine. No privacy by itself: a trained vector shows its rows to whoever sees it.
Formula: mean binary cross-entropy + weight_decay (decoupled) + proximal / 2 |w - w_given|^2 over the shared parameters.
Sources: McMahan et al. 2017 (local passes); Li et al. 2020 (FedProx); Loshchilov and Hutter 2019 (AdamW).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from models.errors import DataError
from models.nets import NetSpec, from_vector, one_thread, to_vector
from models.standardising import Inputs

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """`passes` over the rows a round, in batches of `batch_rows`; `proximal`: FedProx strength, 0 for none."""

    passes: int = 1
    batch_rows: int = 128
    learning_rate: float = 0.002
    weight_decay: float = 0.01
    proximal: float = 0.0

    def __post_init__(self) -> None:
        if self.passes < 1 or self.batch_rows < 1:
            raise ValueError(f"passes={self.passes}, batch_rows={self.batch_rows}: both must be at least 1")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < 1 and 0 <= self.proximal < math.inf):
            raise ValueError(
                f"learning_rate={self.learning_rate}, weight_decay={self.weight_decay}, proximal={self.proximal}: "
                "expected a rate above 0, a decay in [0, 1) and a strength of 0 or more"
            )


def train(
    spec: NetSpec,
    vector: Float32,
    inputs: Inputs,
    label: Int8,
    settings: LocalSettings,
    *,
    seed: int,
    shared: int | None = None,
) -> Float32:
    """Parameters after the passes, float32 like `vector`.

    `label` int8[n] 0 or 1; `seed` orders the rows; `shared`: the proximal term holds the first so many parameters to
    where they were (None: all). Raises `DataError` without rows or for labels other than 0 and 1.
    """
    if len(inputs) == 0 or label.shape != (len(inputs),) or not np.isin(label, (0, 1)).all():
        raise DataError(f"{len(inputs)} rows with labels of shape {label.shape}; training needs rows, labels 0 and 1")
    with one_thread():
        return _passes(spec, vector, inputs, label, settings, seed, shared)


def _passes(
    spec: NetSpec, vector: Float32, inputs: Inputs, label: Int8, settings: LocalSettings, seed: int, shared: int | None
) -> Float32:
    net = from_vector(spec, vector)
    decayed = [part for part in net.parameters() if part.ndim > 1]
    plain = [part for part in net.parameters() if part.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
    )
    numbers, codes = torch.from_numpy(inputs.numbers), torch.from_numpy(inputs.codes)
    target = torch.from_numpy(label.astype(np.float32))
    given = torch.from_numpy(vector)[:shared]
    order = np.random.default_rng(seed)
    loss_of = nn.BCEWithLogitsLoss()
    for _ in range(settings.passes):
        rows = torch.from_numpy(order.permutation(len(inputs)))
        for batch in torch.split(rows, settings.batch_rows):
            optimiser.zero_grad()
            loss = loss_of(net(numbers[batch], codes[batch]), target[batch])
            if settings.proximal:
                now = torch.cat([part.reshape(-1) for part in net.parameters()])[:shared]
                loss = loss + settings.proximal / 2 * ((now - given) ** 2).sum()
            loss.backward()
            optimiser.step()
    return to_vector(net)
