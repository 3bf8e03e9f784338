"""Vaults and coordinator as processes over TLS: random SIGKILLs, and the model is that of an unharmed run."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fl_clients.checkpoint import DATABASE, KEY, Checkpoint
from simulations.job import Parties, model_files
from tests.small_federation import run_tapped, small_federation, small_parties
from tests.test_lane import Authority

KILLS = 24
ENTERPRISES = 400


def written(folder: Path) -> Parties:
    """A job whose model does not depend on any draw: no epsilon, no forward noise."""
    parties = small_parties(small_federation(banks=2, owners=2, enterprises=ENTERPRISES), rounds=2, forward_noise=0.0)
    authority = Authority()
    (folder / "contract.json").write_text(parties.contract.model_dump_json())
    (folder / "enterprises").write_text(str(ENTERPRISES))
    (folder / "session").write_bytes(os.urandom(32))
    (folder / "ca.pem").write_bytes(authority.pem)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    identities = {"coordinator": parties.coordinator, **{n: v._identity for n, v in parties.vaults.items()}}
    for name, identity in identities.items():
        identity.save(folder / f"{name}.key")
        tls = authority.issue(name)
        (folder / f"{name}.tls").write_bytes(tls.key)
        (folder / f"{name}.pem").write_bytes(tls.certificate)
    return parties


def started(folder: Path, name: str) -> "subprocess.Popen[bytes]":
    (folder / f"{name}.up").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    with (folder / f"{name}.err").open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.lane_process", str(folder), name], stderr=errors, env=environment
        )


def wait_for(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_a_job_outlives_sigkills_of_every_process_and_gives_the_same_model(tmp_path: Path) -> None:
    parties = written(tmp_path)
    names = ["coordinator", *parties.vaults]
    dice = random.Random(5)
    running = {name: started(tmp_path, name) for name in names}
    kills: list[str] = []
    result, stopped = tmp_path / "receipts.json", tmp_path / "stopped"
    try:
        assert all(wait_for(tmp_path / f"{name}.up", 60) for name in names)
        while len(kills) < KILLS and not result.exists() and not stopped.exists():
            time.sleep(dice.uniform(0, 0.5))
            # one to three at once, every process at least once; now and then one dies while others still start
            untouched = [name for name in names if name not in kills]
            victims = (untouched + dice.sample(names, 3))[:1] + dice.sample(names, dice.randint(0, 2))
            for name in dict.fromkeys(victims):
                running[name].send_signal(signal.SIGKILL)
                assert running[name].wait() == -signal.SIGKILL or result.exists()
                kills.append(name)
                print(f"{time.monotonic():.1f} killed {name}")
                running[name] = started(tmp_path, name)
            if dice.random() < 0.8:
                for name in victims:
                    wait_for(tmp_path / f"{name}.up", 30)
        assert not stopped.exists(), stopped.read_text()
        assert wait_for(result, 120), {name: (tmp_path / f"{name}.err").read_text()[-800:] for name in names}
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    assert len(kills) >= 20, "the job was over before enough had been killed"
    assert set(kills) == set(names)
    receipts = json.loads(result.read_text())
    # the unharmed run: the same rows in memory, other keys, other orders, the same integers
    run_tapped(parties)
    for name, model in model_files(parties).items():
        log = [line.split() for line in (tmp_path / f"{name}.log").read_text().splitlines()]
        replies: dict[tuple[str, str], str] = {}
        for step, attempt, digest in log:
            assert attempt == "0"
            assert replies.setdefault((step, attempt), digest) == digest, f"{name} released {step} twice"
        kept: Any = Checkpoint(tmp_path / name, job=parties.contract.hash, party=name).closed()
        assert kept["model"]["digest"] == receipts[name]
        found = kept["model"]["file"]
        assert {**found, "salt": ""} == {**model, "salt": ""}
        assert any(found["weights"])
        assert not (tmp_path / name / KEY).exists()
        assert not (tmp_path / name / DATABASE).exists()
