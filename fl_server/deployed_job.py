"""A job over the network: driven inside Flower's ServerApp, followed by the command that started it.

Flower carries one message to every node, which asks the vault to open its lane; all steps go over the lanes. Which node
belongs to which party the coordinator's book says (it was written at enrolment), never the node.
Guarantee: only current members whose identity is the contract's are asked; who is revoked in mid-run is asked no more.
The run's folder has progress.json (what the command shows) beside `result`.
"""

import json
import logging
import time
from pathlib import Path

from flwr.serverapp import Grid

from fl_clients.contract import Contract
from fl_server import enrolment, job_folder, superlink
from fl_server.coordinator import Coordinator, JobStoppedError, Watch
from fl_server.enrolment import Book
from fl_server.lane import LaneGrid, open_lanes, serve_lane
from fl_server.run_store import write_outcome
from privacy.errors import Refused
from privacy.private_file import read_private, write_private

LOGGER = logging.getLogger(__name__)

PROGRESS = "progress.json"
_LOOK_S, _ASK_FLOWER_S = 0.2, 5.0


def nodes_of(book: Book, contract: Contract) -> dict[str, int]:
    """Party -> Flower node, by the book; `Refused` names a party that is no member, or one of another identity."""
    members = {member.name: member for member in book.current()}
    nodes = {}
    for party in contract.parties:
        member = members.get(party.name)
        if member is None:
            raise Refused(f"{party.name} of the contract is no member; invite it: xinyi-server invite {party.name}")
        if member.identity != party.identity:
            raise Refused(f"the member {party.name} has another identity than the contract's; draw up a new contract")
        nodes[party.name] = int(member.node_id)
    return nodes


def _members(home: Path, contract: Contract) -> set[str]:
    """Parties that are members now."""
    identities = {party.name: party.identity for party in contract.parties}
    book = enrolment.read_book(home)
    return {member.name for member in book.current() if identities.get(member.name) == member.identity}


def drive(control: Grid, home: Path, job: str, use: int) -> None:
    """Drive run `use` of a job over the lanes; its result is in the run's folder. `JobStoppedError` says why not."""
    signed = job_folder.load(home, job)
    contract, folder = signed.contract, job_folder.run_folder(home, signed, use)

    def watch(done: int, total: int, step: str) -> None:
        _write(folder, {"done": done, "total": total, "step": step})

    try:
        signed.check_all()
        settings = enrolment.settings_of(home)
        identity = job_folder.coordinator_identity(home)
        nodes = nodes_of(enrolment.read_book(home), contract)
        lane = LaneGrid(contract, identity, lambda party: party in _members(home, contract))
        certificate, key = (read_private(path) for path in enrolment.public_certificate(home))
        clients = read_private(home / "ca" / "ca.crt")
        with serve_lane(
            lane, f"{settings.bind}:{settings.lane_port}", ca=clients, key=key, certificate=certificate
        ) as port:
            try:
                open_lanes(control, lane, f"{settings.host}:{port}", nodes)
                outcome = Coordinator(grid=lane, signed=signed, identity=identity, use=use, watch=watch).run()
                write_outcome(folder / job_folder.RESULT, signed, outcome)
            except JobStoppedError as error:
                lane.close(f"the job stopped: {error}"[:300])
                raise
            lane.close("the job is done")
    except (JobStoppedError, Refused, OSError) as error:
        LOGGER.error("job %s run %d stopped: %s", contract.job[:8], use, error)
        _write(folder, {"stopped": str(error)})
        raise
    _write(folder, {"finished": True})


def follow(home: Path, run: str, out: Path, watch: Watch) -> None:
    """Show a run's progress until it ends; `JobStoppedError` with the reason where it came to nothing."""
    folder, asked = out.parent, time.monotonic()
    while True:
        said = _read(folder)
        if "stopped" in said:
            raise JobStoppedError(str(said["stopped"]))
        if "finished" in said:
            return
        if "step" in said:
            watch(int(str(said["done"])), int(str(said["total"])), str(said["step"]))
        if time.monotonic() - asked > _ASK_FLOWER_S:
            state = next((item for item in superlink.runs(home) if str(item["run-id"]) == run), {})
            if "finished" in str(state.get("status")) and not {"stopped", "finished"} & set(_read(folder)):
                why = f"{state['status']} {state.get('status-details', '')}"
                raise JobStoppedError(f"Flower's run {run} ended: {' '.join(why.split())}; see {home / 'logs'}")
            asked = time.monotonic()
        time.sleep(_LOOK_S)


def _write(folder: Path, said: dict[str, object]) -> None:
    write_private(folder / PROGRESS, json.dumps(said, ensure_ascii=False).encode())


def _read(folder: Path) -> dict[str, object]:
    path = folder / PROGRESS
    if not path.exists():
        return {}
    said = json.loads(path.read_bytes())
    return said if isinstance(said, dict) else {}
