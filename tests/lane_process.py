"""A vault or the coordinator of a test job as a process of its own: `python -m tests.lane_process FOLDER NAME`.

The folder is written by the test: contract.json, FOLDER/NAME.key (identity), NAME.pem and NAME.tls (TLS), ca.pem, port,
session. Every reply that a vault lets out is noted in NAME.log by step, attempt and hash.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from fl_clients.bank import Bank
from fl_clients.checkpoint import Checkpoint
from fl_clients.contract import Contract
from fl_clients.data import OwnerData, everyone
from fl_clients.feature_owner import FeatureOwner
from fl_clients.frames import read_opening
from fl_clients.frozen import thaw_bank, thaw_owner
from fl_clients.lane import TLS, Lane
from fl_clients.protocol import decode_request
from fl_clients.recovery import open_vault
from fl_server.coordinator import Coordinator, JobStoppedError
from fl_server.lane import LaneGrid, serve_lane
from privacy.identity import SigningIdentity
from privacy.noise import KeyedForwardNoise, SystemNoise
from simulations.job import _bank_data
from tests.small_federation import small_federation

PAUSE_S = float(os.environ.get("XINYI_TEST_PAUSE", "0.1"))
"""A step takes so long before and after it is done, for kills to fall on both."""


def coordinate(folder: Path, contract: Contract, identity: SigningIdentity) -> None:
    grid = LaneGrid(contract, identity, (folder / "session").read_bytes())
    address = f"localhost:{(folder / 'port').read_text()}"
    for party in contract.parties:
        (folder / f"{party.name}.opening").write_bytes(grid.opening(party.name, address))
    ca, key, certificate = ((folder / name).read_bytes() for name in ("ca.pem", "coordinator.tls", "coordinator.pem"))
    with serve_lane(grid, address, ca=ca, key=key, certificate=certificate):
        (folder / "coordinator.up").touch()
        try:
            outcome = Coordinator(
                grid=grid, contract=contract, identity=identity, timeout_s=120, folder=folder / "state"
            ).run()
        except JobStoppedError as error:
            (folder / "stopped").write_text(str(error))
            grid.close(str(error))
            return
        # written before the vaults are told that it is over
        (folder / "receipts.new").write_text(json.dumps(dict(outcome.receipts)))
        (folder / "receipts.new").rename(folder / "receipts.json")
        grid.close("the job is done")
        time.sleep(1)


def take_part(folder: Path, name: str, contract: Contract, identity: SigningIdentity) -> None:
    parties = contract.parties
    federation = small_federation(
        banks=len(contract.banks), owners=len(contract.owners), enterprises=int((folder / "enterprises").read_text())
    )
    assert {party.name for party in parties} == {x.name for x in (*federation.banks, *federation.owners)}
    tables = {table.name: table for table in federation.banks}
    owners = {table.name: table for table in federation.owners}

    def fresh() -> Bank | FeatureOwner:
        if name in tables:
            return Bank(name=name, contract=contract, data=_bank_data(tables[name]), noise=SystemNoise())
        data = OwnerData(ids=owners[name].ids.tolist(), columns=owners[name].columns)
        return FeatureOwner(name=name, contract=contract, data=data, noise=KeyedForwardNoise(os.urandom(32)))

    def thaw(parts: Mapping[str, Any]) -> Bank | FeatureOwner:
        if name in tables:
            return thaw_bank(parts, name=name, contract=contract, consent=everyone, noise=SystemNoise())
        return thaw_owner(parts, name=name, contract=contract, consent=everyone)

    checkpoint = Checkpoint(folder / name, job=contract.hash, party=name)
    vault = open_vault(party=name, contract=contract, identity=identity, checkpoint=checkpoint, fresh=fresh, thaw=thaw)

    def handle(data: bytes) -> bytes:
        request = decode_request(data, contract)
        time.sleep(PAUSE_S)
        reply = vault.handle(data)
        with (folder / f"{name}.log").open("a") as log:
            log.write(f"{request.step} {request.attempt} {sha256(reply).hexdigest()}\n")
        time.sleep(PAUSE_S)
        return reply

    while not (folder / f"{name}.opening").exists():
        time.sleep(0.05)
    opening = read_opening((folder / f"{name}.opening").read_bytes(), contract, name)
    ca, key, certificate = ((folder / file).read_bytes() for file in ("ca.pem", f"{name}.tls", f"{name}.pem"))
    lane = Lane(
        opening=opening,
        contract=contract,
        identity=identity,
        handle=handle,
        tls=TLS(ca=ca, key=key, certificate=certificate),
    )
    lane.start()
    (folder / f"{name}.up").touch()
    lane.wait()


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    contract = Contract.model_validate_json((folder / "contract.json").read_text(encoding="utf-8"))
    identity = SigningIdentity.load(folder / f"{name}.key")
    if name == "coordinator":
        coordinate(folder, contract, identity)
    else:
        take_part(folder, name, contract, identity)


if __name__ == "__main__":
    main()
