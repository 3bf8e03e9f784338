"""`xinyi-sim`: the researcher's command. It only parses and prints; `simulations.run` works."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fl_server.coordinator import JobStoppedError, Watch
from fl_server.report import console_tables
from fl_server.run_store import check_folder
from models.errors import DataError
from privacy.errors import Refused
from simulations import demo_federation
from simulations.federation_folder import load
from simulations.job import Wire
from simulations.run import Options, Run, run_job, write

app = typer.Typer(
    help="Simulate a federation of banks, PBOC and public-credit platforms on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
BAD_INPUT = 2


@contextmanager
def _one_line() -> Iterator[None]:
    """Whatever is the user's to mend ends in one line and exit code 2."""
    try:
        yield
    except (DataError, Refused, JobStoppedError, OSError, ValidationError) as error:
        text = _terms(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {text}", markup=False)
        raise typer.Exit(BAD_INPUT) from None


def _terms(error: ValidationError) -> str:
    """Terms that no contract may have: the first of them in words."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where} {first.get('input')}: {first['msg']}" if where else str(first["msg"])


@app.callback()
def _xinyi() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Federation folder: a directory with split.json and its files.")],
    split: Annotated[str, typer.Option(help="Name of the split file in the folder.")] = "split.json",
    rounds: Annotated[int, typer.Option(min=1, max=8, help="Training rounds; each is a privacy cost.")] = 3,
    epsilon: Annotated[float | None, typer.Option(help="Privacy of the banks' records; none = exact sums.")] = None,
    delta: Annotated[float | None, typer.Option(help="Default 1 / (10 n), n training rows.")] = None,
    banks: Annotated[int, typer.Option(min=1, help="Banks to cut at random where split.json names none.")] = 3,
    wire: Annotated[str, typer.Option(help="memory (in this process) or ray (Flower's simulation engine).")] = "memory",
    seed: Annotated[int, typer.Option(help="Reaches data splits only, never keys, masks or noise.")] = 42,
    out: Annotated[Path, typer.Option(help="Folder for result.json, report.html and the model files.")] = Path("out"),
) -> None:
    """Train the additive scorecard over a federation, encrypted end to end, and write a report.

    Example: xinyi-sim run ../shared/data/sba_loans --epsilon 3 --out out/sba
    """
    with _one_line():
        wires: dict[str, Wire] = {"memory": "memory", "ray": "ray"}
        if wire not in wires:
            raise DataError(f"--wire {wire}: there are memory and ray")
        check_folder(out)
        federation = load(folder, split=split, banks=banks, seed=seed)
        options = Options(rounds=rounds, epsilon=epsilon, delta=delta, wire=wires[wire])
        finished = _with_progress(lambda watch: run_job(federation, options, watch))
        write(finished, out)
        _print(finished, out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the generated federation and the results.")] = Path("out/demo"),
    enterprises: Annotated[int, typer.Option(min=500, help="Enterprises to generate.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the generated data.")] = 42,
    rounds: Annotated[int, typer.Option(min=1, max=8, help="Training rounds.")] = 3,
    epsilon: Annotated[float | None, typer.Option(help="Privacy of the banks' records; none = exact sums.")] = None,
    delta: Annotated[float | None, typer.Option(help="Default 1 / (10 n), n training rows.")] = None,
    wire: Annotated[str, typer.Option(help="memory or ray.")] = "memory",
) -> None:
    """Generate a small federation (3 banks, PBOC, two public-credit owners; all relations invented) and train over it.

    Example: xinyi-sim demo --epsilon 3
    """
    with _one_line():
        check_folder(out / "run")
        folder = demo_federation.generate(out / "federation", seed, enterprises)
    run(folder, rounds=rounds, epsilon=epsilon, delta=delta, wire=wire, seed=seed, out=out / "run")


def _with_progress(work: Callable[[Watch], Run]) -> Run:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("start", total=None)
        return work(lambda done, total, step: progress.update(task, completed=done, total=total, description=step))


def _print(finished: Run, out: Path) -> None:
    console = Console()
    result = finished.result
    for table in console_tables(result, finished.sections):
        console.print(table)
    seconds, he, privacy = result["seconds"], result["privacy"]["he"], result["privacy"]
    ratio = seconds["encrypted_over_twin"]
    console.print(
        f"exact: {'yes' if result['exact'] else 'NO'} (every weight of every party against the plaintext twin)   "
        f"encrypted {seconds['total']:.1f} s, twin {seconds['twin']:.2f} s, ratio {ratio:.0f}"
    )
    alignment = result["alignment"]
    console.print(
        f"alignment: private set intersection ({alignment['form']}), {alignment['seconds']:.1f} s, "
        f"{alignment['bytes'] / 1e6:.1f} MB; not counted in the seconds of training"
    )
    epsilon = "none (exact sums, simulation only)" if privacy["epsilon"] is None else f"{privacy['epsilon']:g}"
    console.print(
        f"epsilon: {epsilon}   {he['scheme']} N={he['n']}, log q={he['log_q']}, log t={he['log_t']}, "
        f"{he['security_bits']}-bit security, {he['flooding_bits']} bits flooding   "
        f"peak memory {result['peak_memory_mb']:.0f} MB"
    )
    if result["data"]["synthetic"]:
        console.print("data: SYNTHETIC, every relation in it is invented", markup=False)
    for line in result["warnings"]:
        console.print(f"warning: {line}", markup=False)
    for line in result["stand_ins"]:
        console.print(f"stand-in: {line}", markup=False)
    console.print(f"report: {out / 'report.html'}", markup=False)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
