"""`xinyi-sim`: the researcher's command. It only parses and prints; `simulations.run` works."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fl_server.coordinator import JobStoppedError, Watch
from fl_server.horizontal_report import console_table
from fl_server.report import console_tables
from fl_server.run_store import check_folder, write_run
from fl_server.secure_strategy import RoundStoppedError
from models.errors import DataError
from privacy.errors import Refused
from simulations import demo_federation
from simulations.federation_folder import load
from simulations.horizontal import make_plan, run_horizontal
from simulations.job import Wire
from simulations.run import Options, Run, run_job, write

app = typer.Typer(
    help="Simulate a federation of banks, PBOC and public-credit platforms on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
BAD_INPUT = 2
MOST_ROUNDS = 8  # of the scorecard: each is a privacy cost


@contextmanager
def _one_line() -> Iterator[None]:
    """Whatever is the user's to mend ends in one line and exit code 2."""
    try:
        yield
    except (DataError, Refused, JobStoppedError, RoundStoppedError, OSError, ValidationError) as error:
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
    logging.getLogger("flwr").setLevel(logging.WARNING)  # it reports every round


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Federation folder: a directory with split.json and its files.")],
    split: Annotated[str, typer.Option(help="Name of the split file in the folder.")] = "split.json",
    rounds: Annotated[
        int | None, typer.Option(min=1, max=500, help="Training rounds; default 3 (at most 8), with --model 20.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy of the banks' records; none = exact sums.")] = None,
    delta: Annotated[float | None, typer.Option(help="Default 1 / (10 n), n training rows.")] = None,
    model: Annotated[
        str | None, typer.Option(help="logistic, mlp or resnet: horizontal training of the banks' own columns.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="With --model: fedavg, fedprox, fedadam or fedyogi.")] = "fedavg",
    personalised: Annotated[
        bool, typer.Option("--personalised", help="With --model: each bank keeps a last layer of its own.")
    ] = False,
    banks: Annotated[int, typer.Option(min=1, help="Banks to cut at random where split.json names none.")] = 3,
    wire: Annotated[str, typer.Option(help="memory (in this process) or ray (Flower's simulation engine).")] = "memory",
    seed: Annotated[int, typer.Option(help="Reaches data splits only, never keys, masks or noise.")] = 42,
    out: Annotated[Path, typer.Option(help="Folder for result.json, report.html and the model files.")] = Path("out"),
) -> None:
    """Train the additive scorecard over a federation (with --model: a network of the banks), encrypted; write a report.

    Example: xinyi-sim run ../shared/data/sba_loans --epsilon 3 --out out/sba
    """
    with _one_line():
        wires: dict[str, Wire] = {"memory": "memory", "ray": "ray"}
        if wire not in wires:
            raise DataError(f"--wire {wire}: there are memory and ray")
        if model is not None and (epsilon is not None or delta is not None or wire != "memory"):
            raise DataError(
                "--model has no differential privacy and runs in memory: leave --epsilon, --delta, --wire out"
            )
        if model is None and (strategy != "fedavg" or personalised):
            raise DataError("--strategy and --personalised are for horizontal training; give --model, too")
        check_folder(out)
        federation = load(folder, split=split, banks=banks, seed=seed)
        if model is not None:
            chosen = {"net": model, "strategy": strategy, "personalised": personalised, "seed": seed}
            trained = run_horizontal(
                federation, make_plan(federation, **chosen, **({"rounds": rounds} if rounds else {}))
            )
            write_run(out, trained.files)
            _print_horizontal(trained.result, out)
            return
        if rounds is not None and rounds > MOST_ROUNDS:
            raise DataError(f"--rounds {rounds}: the scorecard takes at most {MOST_ROUNDS}; more only with --model")
        options = Options(rounds=rounds or 3, epsilon=epsilon, delta=delta, wire=wires[wire])
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


def _print_horizontal(result: Mapping[str, Any], out: Path) -> None:
    console = Console()
    console.print(console_table(result))
    seconds, size = result["seconds"], result["bytes"]
    console.print(
        f"exact: {'yes' if result['exact'] else 'NO'} (every parameter and opened sum against the rounded twin)   "
        f"encrypted {seconds['total']:.1f} s, twin {seconds['twin']:.1f} s, {size['up'] / 1e6:.1f} MB up   "
        f"best round {result['best_round']} of {len(result['by_round'])}"
    )
    console.print("epsilon: none (exact sums, simulation only)")
    for line in result["warnings"]:
        console.print(f"warning: {line}", markup=False)
    for line in result["stand_ins"]:
        console.print(f"stand-in: {line}", markup=False)
    console.print(f"report: {out / 'report.html'}", markup=False)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
