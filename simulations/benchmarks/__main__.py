"""`make bench`: all benchmarks on this machine, each against a baseline that is measured in the same run.

It only parses, prints and writes; the other files measure. Exit code 1 when an encrypted figure is not exact; a missed
bar of speed or accuracy is printed, for a loaded machine is no fault of the program.
"""

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import typer
from rich.console import Console

from simulations import demo_federation
from simulations.benchmarks import horizontal, kernel, main_job, secure_sum

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
DEMO_ENTERPRISES = 2_000


class Part(Enum):
    """What can be measured alone."""

    KERNEL = "kernel"
    SECURE_SUM = "secure-sum"
    HORIZONTAL = "horizontal"
    MAIN_JOB = "main-job"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes and generated data: does everything run?")] = False,
    only: Annotated[list[Part] | None, typer.Option(help="Measure this part only; may be repeated.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with the data sets of the main job.")] = SHARED_DATA,
    out: Annotated[Path | None, typer.Option(help="Also write all figures to this JSON file.")] = None,
) -> None:
    """Measure kernel, secure sum, horizontal rounds and main job (about ten minutes; --quick: half a minute).

    Example: python -m simulations.benchmarks --only kernel --out out/bench.json
    """
    parts = only or list(Part)
    # a pipe has no width: keep the tables whole
    console = Console() if Console().is_terminal else Console(width=180)
    figures: dict[str, Any] = {"quick": quick, "machine": _machine()}
    console.print(
        "machine: " + ", ".join(f"{name} {value}" for name, value in figures["machine"].items()), markup=False
    )
    exact = True
    if Part.KERNEL in parts:
        kernels = kernel.measure(kernel.QUICK, repeats=1, sample_rows=20) if quick else kernel.measure()
        _print(console, kernel.tables(kernels))
        exact = exact and all(line.exact for line in kernels)
        figures["kernel"] = [asdict(line) | {"ours_seconds": line.ours.total} for line in kernels]
    if Part.SECURE_SUM in parts:
        size = secure_sum.QUICK if quick else secure_sum.FULL
        sums = secure_sum.measure(size)
        _print(console, secure_sum.tables(sums, size))
        exact = exact and all(line.exact for line in sums[1:])
        figures["secure_sum"] = [asdict(line) | {"bytes_per_parameter": line.bytes_per_parameter} for line in sums]
    if Part.HORIZONTAL in parts:
        pieces, rounds = horizontal.measure(quick)
        _print(console, horizontal.tables(pieces, rounds))
        exact = exact and pieces.exact
        figures["horizontal"] = {
            "pieces": asdict(pieces) | {"faster": pieces.faster, "smaller": pieces.smaller},
            "rounds": [asdict(line) | {"ratio": line.ratio} for line in rounds],
        }
    if Part.MAIN_JOB in parts:
        jobs = _quick_jobs() if quick else _jobs(console, data)
        if jobs:
            _print(console, main_job.tables(jobs))
        exact = exact and all(job.exact for job in jobs)
        figures["main_job"] = [asdict(job) | {"ratio": job.ratio} for job in jobs]
        figures["bars"] = [asdict(verdict) for verdict in main_job.verdicts(jobs)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        console.print(f"figures: {out}", markup=False)
    if not exact:
        console.print("NOT EXACT: an encrypted figure differs from the same figure in the clear", markup=False)
        raise typer.Exit(1)


def _jobs(console: Console, data: Path) -> list[main_job.Figures]:
    folders = [data / name for name in main_job.SETS]
    for folder in folders:
        if not (folder / "split.json").is_file():
            console.print(f"skipped: no {folder / 'split.json'}", markup=False)
    present = [folder for folder in folders if (folder / "split.json").is_file()]
    return main_job.measure(present, tell=lambda line: console.print(line, markup=False, highlight=False))


def _quick_jobs() -> list[main_job.Figures]:
    with tempfile.TemporaryDirectory() as folder:
        generated = demo_federation.generate(Path(folder) / "demo", seed=42, enterprises=DEMO_ENTERPRISES)
        return main_job.measure([generated], seeds=main_job.SEEDS[:1])


def _print(console: Console, tables: Sequence[Any]) -> None:
    for table in tables:
        console.print(table)


def _machine() -> dict[str, str]:
    packages = ("tenseal", "flwr", "numpy", "scikit-learn")
    return {
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    } | {name: version(name) for name in packages}


if __name__ == "__main__":
    app()
