"""The same job over other wires: a vault behind a Unix socket, and Flower's simulation engine on Ray."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from fl_clients.courier import CHANNEL_OPTIONS, HANDLE, WHO
from fl_clients.protocol import Reply, decode_reply, decode_request, encode_request
from fl_clients.protocol import Request as StepRequest
from fl_clients.vault_service import serve
from simulations import demo_federation
from tests.small_federation import small_federation, small_parties


def test_a_vault_answers_over_its_socket_and_only_its_user_may_connect(tmp_path: Path) -> None:
    federation = small_federation(banks=2, owners=2, enterprises=300)
    parties = small_parties(federation, rounds=1)
    contract = parties.contract
    request = StepRequest(job=contract.hash, step="join", attempt=0, participants=("bank1", "bank2"))
    data = encode_request(request, parties.coordinator)
    socket = tmp_path / "bank1.sock"
    with serve("bank1", parties.vaults["bank1"].handle, socket):
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        with grpc.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS) as channel:
            assert channel.unary_unary(WHO)(b"", timeout=20) == b"bank1"
            first = channel.unary_unary(HANDLE)(data, timeout=20)
            again = channel.unary_unary(HANDLE)(data, timeout=20)
            garbage = channel.unary_unary(HANDLE)(b"no message", timeout=20)
    assert first == again
    reply: Reply = decode_reply(first, contract, "bank1", decode_request(data, contract))
    assert reply.refused is None
    assert len(reply.posts) == 1
    assert b"no protocol message" in garbage
    assert not socket.exists()


@pytest.mark.slow
def test_the_job_runs_over_flowers_simulation_engine_and_is_exact(tmp_path: Path) -> None:
    folder = demo_federation.generate(tmp_path / "federation", 3, 600)
    command = [sys.executable, "-m", "simulations.cli", "run", str(folder), "--wire", "ray", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["wire"] == "ray"
    assert result["exact"] is True
