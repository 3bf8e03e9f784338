"""One simulated job: contract, identities and vaults of every party in this process, and the coordinator.

The parties run the programs that they would run in production; only the wire and the alignment differ.
"""

import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fl_clients import institution as homes
from fl_clients.bank import Bank
from fl_clients.contract import (
    COORDINATOR,
    AlignmentTerms,
    ColumnTerms,
    Contract,
    LabelTerms,
    ModelTerms,
    PartyTerms,
    PrivacyTerms,
    Role,
    SignedContract,
    all_releases,
)
from fl_clients.courier import SOCKET_FOLDER, client_app
from fl_clients.courier import app as socket_courier
from fl_clients.data import BankData, LabelledRows, OwnerData
from fl_clients.feature_owner import FeatureOwner
from fl_clients.institution import Institution
from fl_clients.vault import DataTerms, Vault
from fl_clients.vault_service import serve
from fl_server.coordinator import STEP_TIMEOUT_S, Coordinator, JobStoppedError, Outcome, Watch
from fl_server.memory_grid import MemoryGrid
from fl_server.server_app import server_app
from models.scorecard import ScorecardSettings
from privacy.accounting import default_delta
from privacy.audit_format import Entry
from privacy.charges import Budget
from privacy.identity import SigningIdentity
from privacy.noise import KeyedForwardNoise, RecordedForwardNoise, RecordedNoise, SystemNoise
from simulations.federation_folder import BankTable, Federation

Wire = Literal["memory", "ray"]
Int64 = npt.NDArray[np.int64]

DEFAULT_ALIGNMENT = AlignmentTerms()
VALID = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Parties:
    """Everyone in a simulated job. `banks` and `owners` are the roles inside the vaults, for their own model files."""

    signed: SignedContract
    coordinator: SigningIdentity
    institutions: dict[str, Institution]
    vaults: dict[str, Vault]
    banks: dict[str, Bank]
    owners: dict[str, FeatureOwner]
    noise: RecordedNoise
    forward_noise: RecordedForwardNoise
    folder: "tempfile.TemporaryDirectory[str]"
    """Of the institutions' homes."""

    @property
    def contract(self) -> Contract:
        return self.signed.contract


def make_contract(
    federation: Federation,
    settings: ScorecardSettings,
    privacy: PrivacyTerms,
    identities: Mapping[str, SigningIdentity],
    coordinator: SigningIdentity,
    least_banks: int | None = None,
    alignment: AlignmentTerms = DEFAULT_ALIGNMENT,
) -> Contract:
    """The contract of a simulated job over this federation; by default no bank may be left out."""

    def terms(party: str) -> tuple[ColumnTerms, ...]:
        return tuple(
            ColumnTerms(name=c.name, kind=c.kind, special_codes=c.codes, categories=c.categories)
            for c in federation.columns[party]
        )

    banks = [
        PartyTerms(
            name=bank.name,
            role="bank",
            identity=identities[bank.name].public.hex(),
            columns=terms(federation.label_holder),
            most_enterprises=max(1, len(bank.ids)),
        )
        for bank in federation.banks
    ]
    owners = [
        PartyTerms(
            name=owner.name,
            role=owner.role,
            identity=identities[owner.name].public.hex(),
            columns=terms(owner.name),
            most_enterprises=max(1, len(owner.ids)),
        )
        for owner in federation.owners
    ]
    now = homes.system_clock()
    return Contract(
        job=secrets.token_hex(16),
        purpose="simulation of joint credit-risk modelling",
        scenario="simulation",
        label=LabelTerms(definition=f"{federation.name}: 1 = default, as the folder defines it"),
        simulation=True,
        not_before=now,
        expires=now + VALID,
        uses=1,
        retention_days=0,
        releases=all_releases(),
        coordinator_identity=coordinator.public.hex(),
        parties=(*banks, *owners),
        model=ModelTerms(
            rounds=settings.rounds,
            max_bins_bank=settings.max_bins_bank,
            max_bins_owner=settings.max_bins_owner,
            least_count=settings.least_count,
            ridge=settings.ridge,
            smoothness=settings.smoothness,
            forward_noise=settings.forward_noise,
        ),
        privacy=privacy,
        alignment=alignment,
        least_banks=len(banks) if least_banks is None else least_banks,
    )


def make_parties(
    federation: Federation,
    settings: ScorecardSettings,
    privacy: PrivacyTerms,
    least_banks: int | None = None,
    alignment: AlignmentTerms = DEFAULT_ALIGNMENT,
) -> Parties:
    """Fresh institutions with homes of their own, one contract that all sign, one vault each with its own table.

    The homes (identity, audit log, ledger) are in a temporary folder that goes with the object.
    """
    roles: dict[str, Role] = {bank.name: "bank" for bank in federation.banks}
    roles |= {owner.name: owner.role for owner in federation.owners}
    folder = tempfile.TemporaryDirectory(prefix="xinyi-homes-")
    institutions = {
        name: _institution(Path(folder.name) / str(number), name, role)
        for number, (name, role) in enumerate(roles.items())
    }
    identities = {name: institution.identity for name, institution in institutions.items()}
    coordinator = SigningIdentity.generate()
    contract = make_contract(federation, settings, privacy, identities, coordinator, least_banks, alignment)
    signed = SignedContract(contract=contract).signed(COORDINATOR, coordinator)
    for name, identity in identities.items():
        signed = signed.signed(name, identity)
    for institution in institutions.values():
        admit(institution, signed)
    noise = RecordedNoise(SystemNoise())
    forward_noise = RecordedForwardNoise(KeyedForwardNoise(os.urandom(32)))
    banks = {
        table.name: Bank(name=table.name, contract=contract, data=_bank_data(table), noise=noise)
        for table in federation.banks
    }
    owners = {
        table.name: FeatureOwner(
            name=table.name,
            contract=contract,
            data=OwnerData(ids=table.ids.tolist(), columns=table.columns),
            noise=forward_noise,
        )
        for table in federation.owners
    }
    data = data_terms(contract, sum(int((~table.held_out).sum()) for table in federation.banks))
    vaults = {
        name: Vault(institution=institutions[name], signed=signed, role=role, data=data)
        for name, role in _roles(banks, owners)
    }
    return Parties(
        signed=signed,
        coordinator=coordinator,
        institutions=institutions,
        folder=folder,
        vaults=vaults,
        banks=banks,
        owners=owners,
        noise=noise,
        forward_noise=forward_noise,
    )


def _institution(home: Path, name: str, role: Role) -> Institution:
    homes.create(home, name, role)
    return homes.open_institution(home)


def admit(institution: Institution, signed: SignedContract) -> None:
    """SIMULATION ONLY: what a person at the institution does, notified and authorised without anybody reading."""
    contract, now = signed.contract, institution.clock()
    institution.jobs.receive(signed, now)
    institution.jobs.authorise(signed, now)
    institution.log.append(
        [
            Entry(
                kind="contract",
                job=contract.job,
                body={
                    "contract": contract.model_dump(mode="json"),
                    "hash": contract.hash.hex(),
                    "signatures": signed.signatures,
                },
            ),
            Entry(kind="state", job=contract.job, body={"from": "notified", "to": "authorised"}),
        ]
    )


def data_terms(contract: Contract, training_rows: int) -> DataTerms:
    """SIMULATION ONLY: a data set that this one job may spend up."""
    epsilon = contract.privacy.epsilon or 1.0
    delta = contract.privacy.delta or default_delta(training_rows)
    budget = Budget(epsilon_job=epsilon, epsilon_total=epsilon, delta=delta)
    return DataTerms(data_set="simulated", budget=budget, exact_allowed=True)


def _bank_data(table: BankTable) -> BankData:
    def rows(mask: npt.NDArray[np.bool_]) -> LabelledRows:
        columns = {name: values[mask] for name, values in table.columns.items()}
        return LabelledRows(ids=table.ids[mask].tolist(), label=table.label[mask], columns=columns)

    return BankData(training=rows(~table.held_out), held_out=rows(table.held_out))


def _roles(banks: Mapping[str, Bank], owners: Mapping[str, FeatureOwner]) -> list[tuple[str, Bank | FeatureOwner]]:
    return [*banks.items(), *owners.items()]


def run_in_memory(parties: Parties, watch: Watch, transcript: list[bytes] | None = None) -> Outcome:
    """Drive the job over the in-memory `Grid`."""
    names = dict(enumerate(parties.vaults, start=10))
    courier = client_app(lambda context: _vault_call(parties, names[context.node_id]))
    grid = MemoryGrid(courier, {node: {"vault": name} for node, name in names.items()}, transcript)
    return Coordinator(
        grid=grid, signed=parties.signed, identity=parties.coordinator, watch=watch, timeout_s=STEP_TIMEOUT_S
    ).run()


def _vault_call(parties: Parties, name: str) -> tuple[str, Callable[[bytes], bytes]]:
    return name, parties.vaults[name].handle


@contextmanager
def _sockets(parties: Parties, folder: Path) -> Iterator[None]:
    """Every vault behind its own Unix socket, as in a deployment."""
    with ExitStack() as stack:
        for number, vault in enumerate(parties.vaults.values()):
            stack.enter_context(serve(vault.party, vault.handle, folder / f"{number}.sock"))
        yield


@contextmanager
def _ray(folder: Path) -> Iterator[None]:
    """A Ray runtime that Flower's engine finds and uses. `RAY_ADDRESS` names a running cluster instead.

    Ray must start before any gRPC server of this process: it forks, and gRPC does not survive that.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    environment = {"PYTHONPATH": os.pathsep.join(sys.path), SOCKET_FOLDER: str(folder)}
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": environment},
    )
    try:
        yield
    finally:
        ray.shutdown()


def run_on_ray(parties: Parties, watch: Watch) -> Outcome:
    """Drive the job over Flower's simulation engine: messages run in Ray actors and reach the vaults by gRPC."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    outcomes: list[Outcome] = []
    stopped: list[JobStoppedError] = []

    def keep(run: Callable[[], Outcome]) -> None:
        try:
            outcomes.append(run())
        except JobStoppedError as error:
            stopped.append(error)

    with (
        tempfile.TemporaryDirectory(prefix="xinyi-") as folder,
        _ray(Path(folder)),
        _sockets(parties, Path(folder)),
    ):
        run_simulation(
            server_app=server_app(parties.signed, parties.coordinator, keep, watch, STEP_TIMEOUT_S),
            client_app=socket_courier,
            num_supernodes=len(parties.vaults),
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    if stopped:
        raise stopped[0]
    if not outcomes:
        raise JobStoppedError("the Flower simulation ended without a result; see its log above")
    return outcomes[0]


def noise_totals(parties: Parties, outcome: Outcome) -> dict[str, Int64]:
    """The tape for the plaintext twin: every bank's noise of the attempts that counted, summed over banks."""
    last = {step.step: step for step in outcome.steps}
    totals: dict[str, Int64] = {}
    for tag, drawn in parties.noise.tape.items():
        _, release, attempt, bank = tag.split("/", 3)
        name, part = _twin_tag(release)
        step = last[_step_of(release)]
        if int(attempt) == step.attempt and bank in step.participants:
            key = f"{name}#{part}"
            totals[key] = totals.get(key, np.zeros(len(drawn), np.int64)) + drawn
    joined = dict(parties.forward_noise.tape)
    for key in sorted(totals):
        name = key.split("#")[0]
        joined[name] = np.concatenate([joined[name], totals[key]]) if name in joined else totals[key]
    return joined


def _step_of(release: str) -> str:
    """The step in which a release was drawn: "r1.owner.x" -> "r1.open", "r1.search.2.0" -> "r1.search.2"."""
    parts = release.split(".")
    return f"{parts[0]}.open" if len(parts) > 2 and parts[1] == "owner" else ".".join(parts[:-1])


def _twin_tag(release: str) -> tuple[str, str]:
    """The twin's name of a release and the part of it."""
    parts = release.split(".")
    if len(parts) > 2 and parts[1] == "owner":
        return f"sum/{release}", "0"
    match parts[:-1]:
        case ["bins", level]:
            return f"sum/bins-{level}", parts[-1]
        case [round_name, "residual"]:
            return f"sum/{round_name}.own", parts[-1]
        case other:
            return f"sum/{'.'.join(other)}", parts[-1]


def model_files(parties: Parties) -> dict[str, dict[str, Any]]:
    """What every institution would write to its own model file."""
    return {name: role.model() for name, role in _roles(parties.banks, parties.owners)}
