"""A whole job by the commands alone: homes, people, policies, data, consents, contract, approval, run, proof.

Three banks, PBOC and a coordinator; every vault is a process of its own that listens on a Unix socket.
"""

import os
import subprocess
import sys
import time
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import typer
from typer.testing import CliRunner

from fl_clients.cli import app as node_app
from fl_server.cli import app as server_app
from models.schema import load_schema
from tests.test_data_check import codes

PURPOSE = "小微企业信用贷款 贷前风险评估"
SCENARIO = "working capital"
PARTIES = {"bank1": "bank", "bank2": "bank", "bank3": "bank", "pboc": "pboc"}
ADMIN, APPROVER = "Wang Wei", "Li Na"

POLICY = f"""
version = 1
purposes = ["{PURPOSE}"]
most_level = 4
least_cell = 5
most_epsilon_job = 10.0
most_epsilon_total = 12.0
delta = 1e-4

[scenarios]
"{SCENARIO}" = []
"""
DRAFT = f"""
purpose = "{PURPOSE}"
scenario = "{SCENARIO}"
label = "90 days overdue within 12 months"
days = 30
uses = 1
retention_days = 30
least_banks = 3
parties = ["bank1.card.json", "bank2.card.json", "bank3.card.json", "pboc.card.json"]

[privacy]
epsilon = 8.0
delta = 1e-4

[model]
rounds = 2
max_bins_bank = 4
max_bins_owner = 4
least_count = 5
"""


PROGRAM = "from fl_clients.cli import main; main()"


def command(app: typer.Typer, *words: str | Path, home: Path, expect: int = 0) -> str:
    """Run a command as a user would; its output. `expect`: the exit code."""
    environment = {"XINYI_HOME": str(home), "XINYI_SERVER_HOME": str(home), "COLUMNS": "200"}
    done = CliRunner().invoke(app, [str(word) for word in words], env=environment)
    assert done.exit_code == expect, (words, done.output, done.exception)
    return done.output


def node(home: Path, *words: str | Path, expect: int = 0) -> str:
    return command(node_app, *words, home=home, expect=expect)


def server(home: Path, *words: str | Path, expect: int = 0) -> str:
    return command(server_app, *words, home=home, expect=expect)


def write_tables(folder: Path, enterprises: int = 3000) -> None:
    """CSV, mapping (TOML) and consents of every party; a tenth of the enterprises consents to nothing."""
    rng = np.random.default_rng(2)
    names = np.array(codes(enterprises))
    risk = rng.normal(size=enterprises)
    bad = rng.random(enterprises) < 1 / (1 + np.exp(1.2 - 1.5 * risk))
    revenue = np.round(np.exp(15 - 0.5 * risk + rng.normal(size=enterprises) * 0.5), 2)
    modes = load_schema("bank").field("guarantee_mode").codes
    assert modes is not None
    mode = rng.choice(np.array(modes.codes[:3]), enterprises)
    today = date.today()
    cut_off = today.replace(day=1) - timedelta(days=1)
    consenting = rng.random(enterprises) < 0.9
    for number, name in enumerate(list(PARTIES)[:3]):
        mine = np.arange(enterprises) % 3 == number
        rows = int(mine.sum())
        cells: dict[str, object] = {
            "code": names[mine].tolist(),
            "applied": [today] * rows,
            "asof": [cut_off] * rows,
            "revenue": revenue[mine].tolist(),
            "mode": mode[mine].tolist(),
            "bad": bad[mine].astype(int).tolist(),
        }
        columns = (
            'uscc = {from = "code"}\napplication_date = {from = "applied"}\nsnapshot_date = {from = "asof"}\n'
            'revenue_12m = {from = "revenue", unit = "yuan"}\nguarantee_mode = {from = "mode"}\nbad12 = {from = "bad"}'
        )
        _write(folder, name, "bank", cells, columns)
        _write_consents(folder, name, names[mine & consenting])
    known = rng.random(enterprises) < 0.85
    rows = int(known.sum())
    cells = {
        "code": names[known].tolist(),
        "asof": [cut_off] * rows,
        "hit": [1] * rows,
        "bal": np.round(np.exp(5 + 0.8 * risk[known] + rng.normal(size=rows) * 0.5), 2).tolist(),
        "lenders": rng.poisson(np.exp(0.4 * risk[known] + 0.5)).tolist(),
    }
    columns = (
        'uscc = {from = "code"}\nsnapshot_date = {from = "asof"}\npboc_hit = {from = "hit"}\n'
        'loan_bal = {from = "bal", unit = "wan_yuan"}\nopen_lender_cnt = {from = "lenders"}'
    )
    _write(folder, "pboc", "pboc", cells, columns, f"\n[rows]\ncut_off = {cut_off.isoformat()}\n")
    _write_consents(folder, "pboc", names[known & consenting])


def _write(folder: Path, name: str, kind: str, cells: dict[str, object], columns: str, rows: str = "") -> None:
    pacsv.write_csv(pa.table(cells), folder / f"{name}.csv")
    (folder / f"{name}.toml").write_text(
        f'schema = "{kind}"\nschema_version = "1.0"\n\n[source]\nkind = "csv"\npath = "{folder / name}.csv"\n{rows}\n'
        f"[columns]\n{columns}\n",
        encoding="utf-8",
    )


def _write_consents(folder: Path, name: str, names: "np.ndarray[tuple[int], np.dtype[np.str_]]") -> None:
    today = date.today()
    lines = ["uscc,purpose,granted,expires,evidence"]
    lines += [
        f"{code},{PURPOSE},{today - timedelta(days=9)},{today + timedelta(days=90)},{'ab' * 32}" for code in names
    ]
    (folder / f"{name}.consents.csv").write_text("\n".join(lines), encoding="utf-8")


def prepare(folder: Path) -> dict[str, Path]:
    """Homes with people, policy, checked data and consents; cards in `folder`. Returns the homes."""
    write_tables(folder)
    homes = {name: folder / f"home-{name}" for name in PARTIES}
    for name, role in PARTIES.items():
        home = homes[name]
        node(home, "init", name, "--role", role)
        keys = {}
        for person in ("admin", "approver"):
            said = node(home, "people", "key", folder / f"{name}.{person}.key", "--plain")
            keys[person] = said.split()[2]
        admin = folder / f"{name}.admin.key"
        node(home, "people", "add", ADMIN, "--role", "admin", "--key", admin)
        by = ("--as", ADMIN, "--key", admin)
        node(home, "people", "add", APPROVER, "--role", "approver", "--public", keys["approver"], *by)
        (folder / "policy.toml").write_text(POLICY, encoding="utf-8")
        node(home, "policy", "set", folder / "policy.toml", *by)
        node(home, "data", "check", folder / f"{name}.toml", "--out", folder / f"check-{name}")
        store = folder / f"{name}.consents.sqlite"
        node(home, "consent", "import", folder / f"{name}.consents.csv", "--store", store)
        node(home, "card", "--mapping", folder / f"{name}.toml", "--out", folder / f"{name}.card.json")
    return homes


def agree(folder: Path, homes: dict[str, Path], draft: str = DRAFT) -> str:
    """A contract that everyone approved and signed; its job number."""
    coordinator = folder / "home-coordinator"
    if not coordinator.exists():
        server(coordinator, "init")
    (folder / "draft.toml").write_text(draft, encoding="utf-8")
    job = server(coordinator, "job", "new", folder / "draft.toml").split()[1].rstrip(",")
    server(coordinator, "job", "sign", job)
    first, second = folder / f"first-{job[:8]}", folder / f"second-{job[:8]}"
    server(coordinator, "job", "invite", job, "--out", first)
    files = []
    for name, home in homes.items():
        node(home, "job", "receive", first / f"{job[:8]}.{name}.contract.json", "--out", folder)
        key = folder / f"{name}.approver.key"
        node(home, "job", "approve", job, "--as", APPROVER, "--key", key, "--out", folder)
        files.append(folder / f"{job}.{name}.signature.json")
    server(coordinator, "job", "sign", job, *files)
    server(coordinator, "job", "invite", job, "--out", second)
    for name, home in homes.items():
        node(home, "job", "receive", second / f"{job[:8]}.{name}.contract.json", "--out", folder)
        label = ("--label", "bad12") if PARTIES[name] == "bank" else ()
        table = ("--mapping", folder / f"{name}.toml", "--check", folder / f"check-{name}", "--data-set", "main")
        node(home, "job", "data", job, *table, "--consents", folder / f"{name}.consents.sqlite", *label)
    return job


def run(folder: Path, homes: dict[str, Path], job: str, expect: int = 0) -> str:
    """Serve every vault as a process of its own, start the job; what the coordinator said."""
    sockets = {name: folder / f"{name}.sock" for name in homes}
    serving = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from fl_clients.cli import main; main()",
                "job",
                "serve",
                job,
                "--socket",
                str(path),
            ],
            env=os.environ | {"XINYI_HOME": str(homes[name])},
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, path in sockets.items()
    ]
    try:
        deadline = time.monotonic() + 90
        while not all(path.exists() for path in sockets.values()):
            assert time.monotonic() < deadline, [process.poll() for process in serving]
            time.sleep(0.2)
        vaults = [word for name, path in sockets.items() for word in ("--vault", f"{name}={path}")]
        return server(folder / "home-coordinator", "job", "start", job, *vaults, expect=expect)
    finally:
        for process in serving:
            if expect:
                process.terminate()
            process.wait(timeout=60)
