"""The main job on the open data sets: accuracy against pooled models, exactness, seconds, bytes, memory.

Each job runs in a fresh process (several seeds, one after the other; seeds reach the cut into banks and the hold-out
where the folder fixes none, nothing else), so that its peak memory is its own: the job, its plaintext twin and the
loaded tables of all parties, which a deployment would spread over machines. Baselines run in another process.
Seconds: from the first message to the last, all parties in one process; the twin is the same loop in the clear.
"""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import ParamSpec, TypeVar

from rich.table import Table
from threadpoolctl import threadpool_limits

from simulations import baselines
from simulations.federation_folder import load
from simulations.run import Options, run_job

P = ParamSpec("P")
R = TypeVar("R")

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
    bars: Mapping[str, Bars] = SETS,
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


def pooled_models(task: Task) -> Pooled:
    """The two baselines that have bars."""
    federation = load(task.folder, banks=BANKS, seed=task.seed)
    # one thread: on shared machines the many small parallel loops of boosting are several times slower
    with threadpool_limits(limits=1):
        measured = baselines.measure(federation)
    lr, boosting = measured.pooled_lr, measured.pooled_boosting
    return Pooled(auc_lr=lr.auc, ks_lr=lr.ks, auc_boosting=boosting.auc, ks_boosting=boosting.ks)


def run(task: Task, pooled: Pooled) -> Figures:
    """One job in this process, without baselines (their memory is not the job's)."""
    federation = load(task.folder, banks=BANKS, seed=task.seed)
    result = run_job(federation, Options(epsilon=task.epsilon, with_baselines=False)).result
    return Figures(
        name=task.name,
        seed=task.seed,
        epsilon=task.epsilon,
        banks=len(federation.banks),
        owners=len(federation.owners),
        training_rows=result["rows"]["training"],
        auc=result["auc"]["federated"],
        ks=result["ks"]["federated"],
        pooled=pooled,
        exact=result["exact"],
        seconds=result["seconds"]["total"],
        twin_seconds=result["seconds"]["twin"],
        megabytes_sent=result["bytes"]["total"] / 1e6,
        megabytes_peak=_peak_megabytes(),
    )


def _peak_megabytes() -> float:
    # not getrusage: its peak is inherited from the process that started this one
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status has no VmHWM line; peak memory is measured on Linux only")


def _in_fresh_process(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args, **kwargs).result()


def verdicts(figures: Sequence[Figures], bars: Mapping[str, Bars] = SETS) -> list[Verdict]:
    """Every bar of every data set that was measured (a set without bars has none, not even pooled LR)."""
    found = []
    for name, bar in bars.items():
        jobs = [line for line in figures if line.name == name and line.epsilon is None]
        noisy = {line.seed: line.auc for line in figures if line.name == name and line.epsilon == EPSILON}
        if not jobs:
            continue
        # every figure is written so that smaller is better and the limit is an upper one
        found.append(_verdict(name, "pooled LR - AUC", [job.pooled.auc_lr - job.auc for job in jobs], 0.0))
        beyond = [job.pooled.auc_boosting - job.auc for job in jobs]
        if bar.boosting is not None:
            found.append(_verdict(name, "pooled boosting - AUC", beyond, bar.boosting))
        if bar.seconds is not None:
            found.append(_verdict(name, "seconds", [job.seconds for job in jobs], bar.seconds))
        if bar.megabytes is not None:
            found.append(_verdict(name, "peak MB", [job.megabytes_peak for job in jobs], bar.megabytes))
        if bar.epsilon_loss is not None:
            lost = [job.auc - noisy[job.seed] for job in jobs]
            found.append(_verdict(name, f"AUC lost at epsilon {EPSILON:g}", lost, bar.epsilon_loss))
    return found


def _verdict(name: str, bar: str, values: list[float], limit: float) -> Verdict:
    return Verdict(
        name=name,
        bar=bar,
        mean=mean(values),
        worst=max(values),
        limit=limit,
        seeds_met=sum(value <= limit for value in values),
        seeds=len(values),
    )


def tables(figures: Sequence[Figures], bars: Mapping[str, Bars] = SETS) -> list[Table]:
    """A line for each data set (means over seeds, AUC with its range), and one for each bar."""
    jobs = Table(
        title="Main job: federated and encrypted against pooled in the clear (means over seeds)",
        caption="KS in brackets. Ratio: encrypted over its plaintext twin. Peak: the whole federation, one process.",
    )
    for column in _JOB_COLUMNS:
        jobs.add_column(column, justify="left" if column == "data" else "right")
    for name, epsilon in dict.fromkeys((line.name, line.epsilon) for line in figures):
        group = [line for line in figures if (line.name, line.epsilon) == (name, epsilon)]
        spread = max(line.auc for line in group) - min(line.auc for line in group)
        jobs.add_row(
            name + ("" if epsilon is None else f", epsilon {epsilon:g}"),
            f"{group[0].training_rows:,}",
            f"{group[0].banks}+{group[0].owners}",
            f"{mean(line.auc for line in group):.4f} ({mean(line.ks for line in group):.3f})",
            f"{spread:.4f}",
            f"{mean(line.pooled.auc_lr for line in group):.4f} ({mean(line.pooled.ks_lr for line in group):.3f})",
            f"{mean(line.pooled.auc_boosting for line in group):.4f} "
            f"({mean(line.pooled.ks_boosting for line in group):.3f})",
            f"{sum(line.exact for line in group)}/{len(group)}",
            f"{mean(line.seconds for line in group):.1f}",
            f"{mean(line.twin_seconds for line in group):.2f}",
            f"{mean(line.ratio for line in group):.0f}",
            f"{mean(line.megabytes_sent for line in group):.0f}",
            f"{max(line.megabytes_peak for line in group):.0f}",
        )
    promised = Table(title="Bars", caption="Smaller is better; met: seeds that meet the limit.")
    for column in ("data", "figure", "mean", "worst seed", "limit", "met"):
        promised.add_column(column, justify="left" if column in ("data", "figure") else "right")
    for verdict in verdicts(figures, bars):
        digits = 4 if verdict.limit < 1 else 1
        promised.add_row(
            verdict.name,
            verdict.bar,
            f"{verdict.mean:.{digits}f}",
            f"{verdict.worst:.{digits}f}",
            f"{verdict.limit:.{3 if digits == 4 else 0}f}",
            f"{verdict.seeds_met}/{verdict.seeds}" + ("" if verdict.seeds_met == verdict.seeds else " MISSED"),
        )
    return [jobs, promised]


_JOB_COLUMNS = (
    "data",
    "training rows",
    "banks+owners",
    "AUC (KS)",
    "range",
    "pooled LR",
    "pooled boosting",
    "exact",
    "seconds",
    "twin s",
    "ratio",
    "MB sent",
    "MB peak",
)


def _line(job: Figures) -> str:
    budget = "" if job.epsilon is None else f", epsilon {job.epsilon:g}"
    return (
        f"{job.name}{budget}, seed {job.seed}: AUC {job.auc:.4f} (pooled LR {job.pooled.auc_lr:.4f}, boosting "
        f"{job.pooled.auc_boosting:.4f}), {'exact' if job.exact else 'NOT EXACT'}, {job.seconds:.1f} s"
    )
