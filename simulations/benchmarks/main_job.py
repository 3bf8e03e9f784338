"""The main job on the open data sets: accuracy against pooled models, exactness, seconds, bytes, memory.

Each job runs in a fresh process (several seeds, one after the other; seeds reach the cut into banks and the hold-out
where the folder fixes none, nothing else), so that its peak memory is its own: the job, its plaintext twin and the
loaded tables of all parties, which a deployment would spread over machines. Baselines run in another process.
Seconds: from the first message to the last, all parties in one process; the twin is the same loop in the clear.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.table import Table
from threadpoolctl import threadpool_limits

from simulations import baselines
from simulations.federation_folder import load
from simulations.run import Options, run_job

BANKS = 3
"""Banks to cut where a data set names none."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """What the project promised for one data set; None: report only. Differences in AUC, seconds, megabytes."""

    boosting: float | None = None
    seconds: float | None = None
    megabytes: float | None = None
    epsilon_loss: float | None = None


SETS = {
    "sba_loans": Bars(boosting=0.022),
    "fate_default_credit": Bars(boosting=0.015, seconds=15.0),
    "fate_give_credit": Bars(boosting=0.015, seconds=60.0, megabytes=2000.0, epsilon_loss=0.01),
    "hmeq": Bars(),
    "lendingclub2018": Bars(boosting=0.015),
    "slovak_sme": Bars(boosting=0.015),
}
EPSILON = 3.0
SEEDS = (42, 43, 44)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One job to run: a federation folder, a seed, a budget."""

    folder: Path
    seed: int
    epsilon: float | None = None

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Held-out AUC and KS of models trained on all rows and columns in the clear."""

    auc_lr: float
    ks_lr: float
    auc_boosting: float
    ks_boosting: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One finished job. `megabytes_sent`: all messages; `megabytes_peak`: resident memory of its process."""

    name: str
    seed: int
    epsilon: float | None
    banks: int
    owners: int
    training_rows: int
    auc: float
    ks: float
    pooled: Pooled
    exact: bool
    seconds: float
    twin_seconds: float
    megabytes_sent: float
    megabytes_peak: float

    @property
    def ratio(self) -> float:
        return self.seconds / max(self.twin_seconds, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A bar beside its figure: the mean over seeds, the worst seed, and how many seeds meet the limit."""

    name: str
    bar: str
    mean: float
    worst: float
    limit: float
    seeds_met: int
    seeds: int


def measure(
    folders: Sequence[Path],
    *,
    seeds: Sequence[int] = SEEDS,
    bars: dict[str, Bars] = SETS,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Figures]:
    """All folders, all seeds; folders whose bars name an epsilon loss run again with EPSILON."""
    figures = []
    for folder in folders:
        for seed in seeds:
            plain = Task(folder=folder, seed=seed)
            pooled = _in_fresh_process(pooled_models, plain)
            budgets = [None, EPSILON] if bars.get(folder.name, Bars()).epsilon_loss is not None else [None]
            for epsilon in budgets:
                figures.append(_in_fresh_process(run, Task(folder=folder, seed=seed, epsilon=epsilon), pooled))
                tell(_line(figures[-1]))
    return figures


def _in_fresh_process[**P, R](work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(work, *args, **kwargs).result()
