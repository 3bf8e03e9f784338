"""Horizontal training: what the secure sum costs a round, against Flower's plain FedAvg in the same run.

Kernel: a million parameters over ten banks, piece by piece, beside TenSEAL CKKSVector as NVIDIA FLARE sets it up.
Rounds: the same ClientApp (an MLP of 20-32-1 on 256 rows a bank, torch, one thread, `EPOCHS` epochs) with Flower's
FedAvg and with `SecureStrategy` and `secure_mod`, in memory and on Flower's Ray engine. The plain run sends models
in clear.
Units: seconds of wall time, bytes, megabytes of all processes of the run.
"""

import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tenseal.sealapi as sealapi
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from rich.table import Table

from fl_clients.secure_mod import secure_mod
from fl_server.memory_grid import MemoryGrid
from fl_server.secure_strategy import SecureStrategy
from privacy import seal_bytes, secure_sum
from privacy.gaussian_table import discrete_gaussian_vector
from privacy.masks import pairwise_mask
from privacy.sealing import JobKeys
from privacy.update_sum import Contribution, choose_update, packed, quantise, sum_updates_in_the_clear, unpacked
from simulations.benchmarks.secure_sum import FULL, QUICK, Size, measure_ckks
from simulations.horizontal_parties import HorizontalParties, make_horizontal

EPOCHS = 5
FEATURES, HIDDEN, ROWS, BATCH = 20, 32, 256, 32

Engine = Literal["memory", "ray"]


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Seconds of one bank (quantise, noise, mask, encrypt), of the coordinator (load all, add all, write the sum) and
    of a bank that opens the sum (read it, decrypt and unpack)."""

    parameters: int
    banks: int
    quantise: float
    noise: float
    mask: float
    encrypt: float
    load: float
    add: float
    write: float
    read: float
    decrypt: float
    bytes_up: int
    bytes_down: int
    exact: bool
    ckks_encrypt: float
    ckks_add: float
    ckks_decrypt: float
    ckks_bytes_up: int

    @property
    def bytes_per_parameter(self) -> float:
        return self.bytes_up / self.parameters

    @property
    def faster(self) -> float:
        """The bank's part: CKKS encryption over ours with quantisation and masks, noise left out (CKKS adds none)."""
        return self.ckks_encrypt / (self.quantise + self.mask + self.encrypt)

    @property
    def smaller(self) -> float:
        return self.ckks_bytes_up / self.bytes_up


def measure_pieces(size: Size = FULL) -> Pieces:
    """Two values a coefficient; the times of a bank are those of the last one (the first warms up)."""
    plan = choose_update(banks=size.banks, length=size.parameters, clip=1.0, largest_weight=1_000)
    rng = np.random.default_rng(4)
    banks = tuple(f"bank_{place}" for place in range(size.banks))
    keys = {bank: JobKeys.generate() for bank in banks}
    consortium = secure_sum.ConsortiumKey(plan.parameters)
    modulus = np.uint64(plan.parameters.mask)
    parts, encrypted = [], []
    clock = _Clock()
    for bank in banks:
        update = rng.uniform(-1.0, 1.0, size.parameters)
        with clock("quantise"):
            values = quantise(update, 1_000, plan, rng.bytes(32))
        part = Contribution(values=values, weight=1_000, counts=np.zeros(0, np.int64))
        with clock("mask"):
            mask = pairwise_mask(
                bank,
                keys[bank],
                {other: keys[other].public for other in banks if other != bank},
                job=bytes(32),
                step="train.1",
                attempt=0,
                participants=banks,
                receiver="consortium",
                length=plan.coefficients,
                modulus_bits=plan.parameters.log_t,
            )
        with clock("encrypt"):
            encrypted.append(consortium.encrypt((packed(part, plan) + mask) & modulus))
        parts.append(part)
    with clock("noise"):
        discrete_gaussian_vector(20.0, size.parameters)
    summed = secure_sum.add_ciphertexts(encrypted, plan.parameters)
    context = consortium._context
    with clock("load"):
        loaded = [secure_sum._ciphertexts(context, data) for data in encrypted]
    evaluator = sealapi.Evaluator(context)
    with clock("add"):
        for others in loaded[1:]:
            for mine, other in zip(loaded[0], others, strict=True):
                evaluator.add_inplace(mine, other)
    with clock("write"):
        for part_sum in loaded[0]:
            seal_bytes.dump(part_sum)
    with clock("read"):
        secure_sum._ciphertexts(context, summed)
    with clock("decrypt"):
        opened = unpacked(consortium.open(summed, plan.coefficients), plan)
    clock.seconds["decrypt"] -= clock.seconds["read"]
    ckks = measure_ckks(size)
    clear = sum_updates_in_the_clear(parts, [], plan)
    return Pieces(
        parameters=size.parameters,
        banks=size.banks,
        **clock.seconds,
        bytes_up=len(encrypted[0]),
        bytes_down=len(summed),
        exact=np.array_equal(opened.values, clear.values) and opened.weight == clear.weight,
        ckks_encrypt=ckks.encrypt,
        ckks_add=ckks.add,
        ckks_decrypt=ckks.decrypt,
        ckks_bytes_up=ckks.bytes_up,
    )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """One engine and number of banks: seconds a round (mean of all rounds but the first, whose cost is apart)."""

    engine: Engine
    banks: int
    rounds: int
    parameters: int
    plain_first: float
    plain: float
    plain_megabytes: float
    set_up: float
    secure_first: float
    secure: float
    secure_megabytes: float
    kilobytes_up: float

    @property
    def ratio(self) -> float:
        return self.secure / self.plain

    @property
    def milliseconds_a_bank(self) -> float:
        """What the secure sum adds to a round, a bank."""
        return 1_000 * (self.secure - self.plain) / self.banks


def _net() -> torch.nn.Sequential:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 1))


def _train(message: Message, context: Context) -> Message:
    """A bank's local training, the same in both runs."""
    torch.set_num_threads(1)
    net = _net()
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    source = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    rows = torch.randn(ROWS, FEATURES, generator=source)
    labels = (rows[:, :1] + rows[:, 1:2] > 0).float()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(EPOCHS):
        for start in range(0, ROWS, BATCH):
            optimiser.zero_grad()
            part = slice(start, start + BATCH)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(rows[part]), labels[part])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    metrics = MetricRecord({"num-examples": ROWS})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


class _PlainAverage(FedAvg):
    """Flower's FedAvg with the times at which its rounds begin and end."""

    def __init__(self, banks: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=banks, min_available_nodes=banks)
        self.began: list[float] = []
        self.ended: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.began.append(time.perf_counter())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        made = super().aggregate_train(server_round, replies)
        if made[0] is None:
            raise RuntimeError(f"round {server_round} of plain FedAvg lost its banks")
        self.ended.append(time.perf_counter())
        return made


class _SecureAverage(SecureStrategy):
    """`SecureStrategy` with the times at which its rounds begin and end."""

    def __init__(self, parties: HorizontalParties) -> None:
        super().__init__(terms=parties.terms, identity=parties.coordinator)
        self.began: list[float] = []
        self.ended: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.began.append(time.perf_counter())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        made = super().aggregate_train(server_round, replies)
        self.ended.append(time.perf_counter())
        return made


def measure_rounds(engine: Engine, banks: int, rounds: int = 4) -> Rounds:
    """Plain first, then ours. On Ray each gets its own runtime; two actors of one core each on two cores."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    initial = ArrayRecord(_net().state_dict())
    size = sum(array.numpy().size for array in initial.values())
    parties = make_horizontal(
        tuple(f"bank_{place}" for place in range(banks)), parameters=size, clip=5.0, largest_weight=ROWS
    )
    plain, secure = _PlainAverage(banks), _SecureAverage(parties)
    plain_app = ClientApp()
    plain_app.train()(_train)
    _, plain_megabytes = _drive(engine, plain, plain_app, parties, initial, rounds)
    with tempfile.TemporaryDirectory(prefix="xinyi-") as folder:
        bank_of = parties.save(Path(folder) / "identities") if engine == "ray" else parties.bank_of
        secure_app = ClientApp(mods=[secure_mod(parties.terms, bank_of)])
        secure_app.train()(_train)
        started, secure_megabytes = _drive(engine, secure, secure_app, parties, initial, rounds)
    if secure.failed:
        raise RuntimeError(f"banks failed in the measured run: {secure.failed}")
    trained = [cost for cost in secure.costs if cost.step.startswith("train.")]
    return Rounds(
        engine=engine,
        banks=banks,
        rounds=rounds,
        parameters=size,
        plain_first=plain.ended[0] - plain.began[0],
        plain=_mean(plain.began, plain.ended),
        plain_megabytes=plain_megabytes,
        set_up=secure.began[0] - started,
        secure_first=secure.ended[0] - secure.began[0],
        secure=_mean(secure.began, secure.ended),
        secure_megabytes=secure_megabytes,
        kilobytes_up=trained[-1].bytes_up / banks / 1_000,
    )


def _mean(began: Sequence[float], ended: Sequence[float]) -> float:
    seconds = [end - begin for begin, end in zip(began, ended, strict=True)][1:]
    return sum(seconds) / len(seconds)


def _drive(
    engine: Engine,
    strategy: _PlainAverage | _SecureAverage,
    app: ClientApp,
    parties: HorizontalParties,
    initial: ArrayRecord,
    rounds: int,
) -> tuple[float, float]:
    """(when the strategy started, most megabytes of all processes while it ran)."""
    started: list[float] = []

    def start(grid: Grid) -> None:
        started.append(time.perf_counter())
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds, timeout=1_200)

    with _memory() as megabytes:
        if engine == "memory":
            start(MemoryGrid(app, parties.nodes()))
        else:
            _on_ray(start, app, len(parties.identities))
    return started[0], max(megabytes)


def _on_ray(start: Callable[[Grid], None], app: ClientApp, banks: int) -> None:
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from flwr.simulation import run_simulation

    failed: list[Exception] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        try:
            start(grid)
        except Exception as error:
            failed.append(error)

    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": environment},
    )
    try:
        run_simulation(
            server_app=server,
            client_app=app,
            num_supernodes=banks,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    finally:
        ray.shutdown()
    if failed:
        raise failed[0]


@contextmanager
def _memory() -> Iterator[list[float]]:
    """Megabytes of this process and all that it started, sampled twice a second."""
    samples: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.5):
            samples.append(_resident(os.getpid()) / 1e6)
        samples.append(_resident(os.getpid()) / 1e6)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _resident(root: int) -> int:
    """Resident bytes of a process and all its descendants, shared pages counted once a process (Linux)."""
    parents, pages = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parents[int(stat.parent.name)], pages[int(stat.parent.name)] = int(fields[1]), int(fields[21])
    family = {root}
    for process in sorted(parents):  # a child has a higher number than its parent, but for wrap-around
        if parents[process] in family:
            family.add(process)
    return sum(pages[process] for process in family if process in pages) * os.sysconf("SC_PAGE_SIZE")


def measure(quick: bool) -> tuple[Pieces, list[Rounds]]:
    """Everything: a million parameters, 10 and 173 banks in memory, 173 banks on Ray; quick: tiny and in memory."""
    if quick:
        return measure_pieces(QUICK), [measure_rounds("memory", 3, rounds=2)]
    return measure_pieces(), [
        measure_rounds("memory", 10),
        measure_rounds("memory", 173),
        measure_rounds("ray", 173),
    ]


def tables(pieces: Pieces, rounds: Sequence[Rounds]) -> list[Table]:
    """The kernel beside CKKS, and the rounds beside plain FedAvg."""
    kernel = Table(
        title=f"Update sum: {pieces.parameters:,} parameters, {pieces.banks} banks"
        f"{'' if pieces.exact else ', NOT EXACT'}",
        caption=f"A bank's part {pieces.faster:.1f} times faster, {pieces.smaller:.1f} times smaller than CKKS. "
        f"Noise shares (only where the terms say so): {pieces.noise:.3f} s more.",
    )
    for name in (
        "",
        "quantise",
        "masks",
        "encrypt",
        "load all",
        "add all",
        "write",
        "read",
        "decrypt",
        "bytes up/param",
    ):
        kernel.add_column(name, justify="right" if name else "left")
    ours = ("quantise", "mask", "encrypt", "load", "add", "write", "read", "decrypt")
    kernel.add_row("ours", *(f"{getattr(pieces, name):.3f}" for name in ours), f"{pieces.bytes_per_parameter:.2f}")
    ckks_bytes = f"{pieces.ckks_bytes_up / pieces.parameters:.1f}"
    kernel.add_row(
        "TenSEAL CKKS (load, add, write; read, decrypt in one)",
        *(
            "-",
            "-",
            f"{pieces.ckks_encrypt:.3f}",
            "-",
            f"{pieces.ckks_add:.3f}",
            "-",
            "-",
            f"{pieces.ckks_decrypt:.3f}",
        ),
        ckks_bytes,
    )
    table = Table(title=f"A round against plain Flower FedAvg (MLP 20-32-1, {ROWS} rows, {EPOCHS} epochs)")
    for name in (
        *("engine", "banks", "plain s/round", "secure s/round", "ratio", "ms/bank more"),
        *("set-up s", "first round plain/secure s", "peak MB plain/secure", "kB up/bank"),
    ):
        table.add_column(name, justify="right")
    for line in rounds:
        table.add_row(
            line.engine,
            str(line.banks),
            f"{line.plain:.2f}",
            f"{line.secure:.2f}",
            f"{line.ratio:.2f}",
            f"{line.milliseconds_a_bank:.1f}",
            f"{line.set_up:.1f}",
            f"{line.plain_first:.1f} / {line.secure_first:.1f}",
            f"{line.plain_megabytes:.0f} / {line.secure_megabytes:.0f}",
            f"{line.kilobytes_up:.0f}",
        )
    return [kernel, table]
