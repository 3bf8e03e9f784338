"""The jobs that one vault process answers for: found by the contract's hash, each with its own vault and lane.

Which vault answers is decided here, from what this institution's people approved, never by the asker. The job book is
asked each time, so a job that was approved a moment ago is served without a restart. A vault is made when the first
step comes; the first step of a later run of the same job ends the vault of the run before it.
Guarantee: no step and no opening of a lane gets past this unless the coordinator of an approved contract signed it.
"""

import logging
import threading
from pathlib import Path

from fl_clients import frames, job_vault, protocol
from fl_clients.institution import Institution
from fl_clients.job_book import JobEntry, JobState
from fl_clients.job_vault import JobVault
from fl_clients.lane import TLS, LaneOpener
from fl_clients.protocol import StepKind, decode_request
from fl_clients.vault import VaultFailedError
from models.errors import DataError
from privacy.errors import Refused
from privacy.private_file import read_private

LOGGER = logging.getLogger(__name__)


class ServedJobs:
    """SECRET (identity, rows). The vaults of an open institution. Steps are handled one at a time, of all jobs."""

    def __init__(self, institution: Institution) -> None:
        self._institution = institution
        self._step = threading.Lock()
        self._vaults: dict[bytes, JobVault] = {}
        self._lane = threading.Lock()
        self._openers: dict[bytes, LaneOpener] = {}

    def __repr__(self) -> str:
        return f"ServedJobs({self._institution.name!r})"

    def handle(self, data: bytes) -> bytes:
        """The answer of the job's vault; `Refused` where no job here has the contract that the request names."""
        with self._step:
            try:
                return self._vault(data).handle(data)
            except Refused as error:
                LOGGER.error("refused: %s", error)
                raise

    def answer(self, data: bytes) -> bytes:
        """As `handle`, for the wire: the own log has the reason; a coordinator must not probe limits by asking."""
        try:
            return self.handle(data)
        except Refused:
            raise VaultFailedError("the institution's own log says why") from None

    def open_lane(self, data: bytes) -> None:
        """Open the lane of a job as the coordinator's signed opening says, and return."""
        try:
            entry = self._entry(frames.contract_named(data))
            entry.signed.check_all()
            job_vault.read_binding(self._institution, entry)
            with self._lane:
                opener = self._openers.get(entry.contract.hash)
                if opener is None:
                    opener = self._openers[entry.contract.hash] = LaneOpener(
                        contract=entry.contract,
                        party=self._institution.name,
                        identity=self._institution.identity,
                        handle=self.answer,
                        tls=lane_tls(self._institution.home),
                    )
            opener.open(data)
        except Refused as error:
            LOGGER.error("no lane: %s", error)
            raise
        LOGGER.info("job %s: lane opened", entry.contract.job[:8])

    def end_expired(self) -> None:
        """End the runs whose contract has expired: what they hold must not outlive it."""
        now = self._institution.clock()
        with self._step:
            for vault in self._vaults.values():
                if now >= vault.vault.contract.expires:
                    vault.vault.stop("the contract expired")

    def close(self) -> None:
        """End every lane and every run that is not over."""
        with self._lane:
            for opener in self._openers.values():
                if opener.lane is not None:
                    opener.lane.close()
        with self._step:
            for vault in self._vaults.values():
                vault.close("the institution stopped its vault")

    def _vault(self, data: bytes) -> JobVault:
        """The vault that a request is for; made for the first step of a run."""
        contract, step = protocol.address_of(data)
        known = self._vaults.get(contract)
        if step != StepKind.JOIN:
            if known is None:
                raise Refused(f"step {step[:64]}: no run of this contract was begun since the vault started")
            return known
        entry = self._entry(contract)
        request = decode_request(data, entry.contract)
        if known is not None and request.use <= known.vault.use:
            return known
        if known is not None:
            known.close(f"the coordinator began run {request.use}")
            del self._vaults[contract]
        try:
            made = job_vault.job_vault(self._institution, entry.contract.job)
        except (DataError, OSError) as error:
            raise Refused(f"the table of job {entry.contract.job[:8]} cannot be used: {error}") from None
        self._vaults[contract] = made
        LOGGER.info("job %s: vault made for run %d", entry.contract.job[:8], request.use)
        return made

    def _entry(self, contract: bytes) -> JobEntry:
        entry = self._institution.jobs.with_contract(contract)
        if entry is None or entry.state in (JobState.NOTIFIED, JobState.REFUSED):
            raise Refused(
                f"no job with contract {contract.hex()[:16]} is approved here; the institution's people decide with "
                "`xinyi-node job approve`"
            )
        return entry


def lane_tls(home: Path) -> TLS:
    """What the institution shows on the lane, and the CA that it expects there."""
    folder = home / "tls"
    if not (folder / "lane.crt").exists():
        raise Refused(f"{home} has no certificate of the lane; join the federation: xinyi-node join FILE")
    return TLS(
        ca=read_private(folder / "root.crt"),
        key=read_private(folder / "lane.key"),
        certificate=read_private(folder / "lane.crt"),
    )
