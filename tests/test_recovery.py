"""Kill and go on: vaults and coordinator are made anew from disk at every step, and the result is the twin's."""

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_clients.bank import Bank
from fl_clients.checkpoint import DATABASE, KEY, Checkpoint
from fl_clients.contract import AlignmentTerms
from fl_clients.courier import client_app
from fl_clients.data import everyone
from fl_clients.feature_owner import FeatureOwner
from fl_clients.frozen import STATES, decode, encode, freeze_role, thaw_bank, thaw_owner
from fl_clients.protocol import Step, StepKind, decode_request, schedule
from fl_clients.recovery import Recovery, open_vault
from fl_clients.vault import NotSavedError, Vault
from fl_server.coordinator import Coordinator, JobStoppedError, Outcome
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.ristretto import Scalar
from simulations.job import Parties
from simulations.memory_grid import MemoryGrid
from tests.small_federation import (
    Call,
    assert_equals_twin,
    refusal_of,
    resigned,
    small_federation,
    small_parties,
)

FEDERATION = small_federation(banks=2, owners=2, enterprises=500)


@dataclass
class Homes:
    """Vaults over checkpoints in folders; `revive` makes one anew from its disk, as a restarted process does."""

    parties: Parties
    folder: Path
    vaults: dict[str, Vault] = field(default_factory=dict)
    roles: dict[str, Bank | FeatureOwner] = field(default_factory=dict)
    identities: dict[str, SigningIdentity] = field(default_factory=dict)
    revived: int = 0

    def __post_init__(self) -> None:
        self.roles = {**self.parties.banks, **self.parties.owners}
        self.identities = {name: vault._identity for name, vault in self.parties.vaults.items()}
        for name in self.parties.vaults:
            self.revive(name)
        self.revived = 0

    def checkpoint(self, name: str) -> Checkpoint:
        return Checkpoint(self.folder / name, job=self.parties.contract.hash, party=name)

    def revive(self, name: str) -> None:
        contract = self.parties.contract

        def fresh() -> Bank | FeatureOwner:
            return self.roles[name]

        def thaw(parts: Mapping[str, Any]) -> Bank | FeatureOwner:
            if name in self.parties.banks:
                bank = thaw_bank(parts, name=name, contract=contract, consent=everyone, noise=self.parties.noise)
                self.parties.banks[name] = self.roles[name] = bank
                return bank
            owner = thaw_owner(parts, name=name, contract=contract, consent=everyone, noise=self.parties.forward_noise)
            self.parties.owners[name] = self.roles[name] = owner
            return owner

        self.vaults[name] = open_vault(
            party=name,
            contract=contract,
            identity=self.identities[name],
            checkpoint=self.checkpoint(name),
            fresh=fresh,
            thaw=thaw,
        )
        self.revived += 1


Tap = Callable[[str, bytes, Call], bytes]


class _KilledError(BaseException):
    """The coordinator dies: no Exception, which the in-memory grid takes for a dead node."""


def drive(homes: Homes, tap: Tap, folder: Path | None = None) -> Outcome:
    names = dict(enumerate(homes.vaults, start=10))

    def vault_of(name: str) -> tuple[str, Call]:
        return name, lambda data: tap(name, data, lambda passed: homes.vaults[name].handle(passed))

    app = client_app(lambda context: vault_of(names[context.node_id]))
    grid = MemoryGrid(app, {node: {"vault": name} for node, name in names.items()})
    return Coordinator(
        grid=grid, contract=homes.parties.contract, identity=homes.parties.coordinator, folder=folder
    ).run()


@pytest.mark.parametrize(("epsilon", "one_sided"), [(None, True), (3.0, False)])
def test_every_vault_is_killed_before_and_after_every_step_and_the_model_is_the_twins(
    tmp_path: Path, epsilon: float | None, one_sided: bool
) -> None:
    """Killed before it answers, and after: its reply is then repeated byte for byte by the new process."""
    rounds = 1 if one_sided else 2
    parties = small_parties(FEDERATION, rounds=rounds, epsilon=epsilon, alignment=AlignmentTerms(one_sided=one_sided))
    homes = Homes(parties, tmp_path)

    def tap(party: str, data: bytes, call: Call) -> bytes:
        homes.revive(party)
        first = call(data)
        homes.revive(party)
        assert call(data) == first
        step = decode_request(data, homes.parties.contract).step
        other = call(resigned(homes.parties, data, summed=b"other"))
        assert refusal_of(homes.parties, party, other) is not None, step
        return first

    outcome = drive(homes, tap)
    assert homes.revived > 100
    for name in homes.vaults:
        kept = homes.checkpoint(name).closed()
        assert kept["model"]["digest"] == outcome.receipts[name]
        assert not (tmp_path / name / KEY).exists()
        assert not (tmp_path / name / DATABASE).exists()
    assert_equals_twin(FEDERATION, homes.parties, outcome)


def test_the_coordinator_is_killed_in_every_step_and_goes_on_from_its_disk(tmp_path: Path) -> None:
    """Killed once after each vault's answer, which it never saw: asked again, the vault repeats it."""
    homes = Homes(small_parties(FEDERATION, rounds=1), tmp_path / "vaults")
    killed: set[tuple[str, str]] = set()
    answers: dict[tuple[str, str], bytes] = {}

    def tap(party: str, data: bytes, call: Call) -> bytes:
        key = (party, decode_request(data, homes.parties.contract).step)
        reply = call(data)
        assert answers.setdefault(key, reply) == reply, "a restart must not make a vault answer anew"
        if key not in killed:
            killed.add(key)
            raise _KilledError
        return reply

    outcome = None
    for _ in range(500):
        try:
            outcome = drive(homes, tap, tmp_path / "coordinator")
            break
        except _KilledError:
            continue
    assert outcome is not None
    sides = {"banks": 2, "owners": 2, "all": 4}
    assert len(killed) == sum(
        sides[item.audience] for exchange in schedule(homes.parties.contract) for item in exchange
    )
    assert_equals_twin(FEDERATION, homes.parties, outcome)
    assert stat.S_IMODE((tmp_path / "coordinator" / "coordinator.state").stat().st_mode) == 0o600


def test_a_coordinator_that_dropped_a_bank_does_not_ask_with_it_again_after_a_restart(tmp_path: Path) -> None:
    federation = small_federation(banks=3, owners=2, enterprises=600)
    homes = Homes(small_parties(federation, rounds=1, least_banks=2), tmp_path / "vaults")
    asked: list[tuple[str, int, tuple[str, ...]]] = []
    state = {"killed": False}

    def tap(party: str, data: bytes, call: Call) -> bytes:
        request = decode_request(data, homes.parties.contract)
        asked.append((request.step, request.attempt, request.participants))
        if party == "bank2" and request.step == "r1.open" and not state["killed"]:
            raise ConnectionError("dead")
        if request.step == "r1.aggregate" and request.attempt == 1 and not state["killed"]:
            state["killed"] = True
            raise _KilledError
        return call(data)

    with pytest.raises(_KilledError):
        drive(homes, tap, tmp_path / "coordinator")
    place = len(asked)
    drive(homes, tap, tmp_path / "coordinator")
    assert asked[place] == ("r1.residual", 1, ("bank1", "bank3"))
    assert all("bank2" not in participants for _, _, participants in asked[place:])


# --- the checkpoint --------------------------------------------------------------------------------------------------


def stopped_at(tmp_path: Path, step: str) -> tuple[Homes, dict[str, bytes]]:
    homes = Homes(small_parties(FEDERATION, rounds=1), tmp_path)
    waiting: dict[str, bytes] = {}

    def tap(party: str, data: bytes, call: Call) -> bytes:
        if decode_request(data, homes.parties.contract).step == step:
            waiting[party] = data
            if len(waiting) == 2:
                raise _KilledError
            raise ConnectionError("halted")
        return call(data)

    with pytest.raises(_KilledError):
        drive(homes, tap)
    return homes, waiting


def test_a_step_that_a_kill_interrupted_is_done_for_the_same_request_only(tmp_path: Path) -> None:
    homes, waiting = stopped_at(tmp_path, "bins.2")
    data = waiting["bank1"]

    class _Dies(Recovery):
        def done(self, *args: Any) -> None:
            raise _KilledError

    vault = homes.vaults["bank1"]
    book = vault._book
    assert isinstance(book, Recovery)
    book.__class__ = _Dies
    with pytest.raises(_KilledError):
        vault.handle(data)
    homes.revive("bank1")
    changed = homes.vaults["bank1"].handle(resigned(homes.parties, data, posts=()))
    assert "before this vault restarted" in str(refusal_of(homes.parties, "bank1", changed))
    assert refusal_of(homes.parties, "bank1", homes.vaults["bank1"].handle(data)) is None


def test_a_refusal_for_good_outlives_a_restart_and_destroys_the_key(tmp_path: Path) -> None:
    homes, waiting = stopped_at(tmp_path, "bins.2")
    altered = resigned(homes.parties, waiting["bank1"], summed=b"\x90")
    reason = homes.vaults["bank1"].handle(altered)
    assert refusal_of(homes.parties, "bank1", reason) is not None
    assert not (tmp_path / "bank1" / KEY).exists()
    homes.revive("bank1")
    assert homes.vaults["bank1"].handle(altered) == reason
    later = homes.vaults["bank1"].handle(waiting["bank1"])
    assert refusal_of(homes.parties, "bank1", later) is not None


def test_a_full_disk_holds_the_reply_back_and_a_free_one_lets_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes, waiting = stopped_at(tmp_path, "bins.2")
    with monkeypatch.context() as patched:

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError("no space left on device")

        patched.setattr(Recovery, "done", full)
        for _ in range(2):
            with pytest.raises(NotSavedError, match="no space"):
                homes.vaults["bank1"].handle(waiting["bank1"])
    reply = homes.vaults["bank1"].handle(waiting["bank1"])
    assert refusal_of(homes.parties, "bank1", reply) is None
    homes.revive("bank1")
    assert homes.vaults["bank1"].handle(waiting["bank1"]) == reply


def test_the_checkpoint_is_closed_to_others_and_refuses_every_change(tmp_path: Path) -> None:
    homes, _ = stopped_at(tmp_path, "r1.search.1")
    folder = tmp_path / "bank1"
    for file in (KEY, DATABASE):
        assert stat.S_IMODE((folder / file).stat().st_mode) == 0o600
    raw = b"".join(path.read_bytes() for path in folder.iterdir() if path.name != KEY)
    role = homes.roles["bank1"]
    assert role._session.keys.private_bytes() not in raw
    assert FEDERATION.banks[0].ids[0].encode() not in raw
    assert b"overdue_days" not in raw
    contract = homes.parties.contract
    for other in (
        Checkpoint(folder, job=b"\x01" * 32, party="bank1"),
        Checkpoint(folder, job=contract.hash, party="bank2"),
    ):
        with pytest.raises(Refused, match="does not open"):
            other.read()
    (folder / KEY).chmod(0o644)
    with pytest.raises(Refused, match="mode 0644"):
        homes.checkpoint("bank1").read()
    (folder / KEY).chmod(0o600)
    checkpoint = homes.checkpoint("bank1")
    names = list(checkpoint.read())
    database = checkpoint._open()
    for name in [*names[:8], "manifest"]:
        (sealed,) = database.execute("SELECT sealed FROM part WHERE name = ?", (name,)).fetchone()
        damaged = bytearray(sealed)
        damaged[len(sealed) // 2] ^= 1
        database.execute("UPDATE part SET sealed = ? WHERE name = ?", (bytes(damaged), name))
        with pytest.raises(Refused, match="does not open"):
            homes.checkpoint("bank1").read()
        database.execute("UPDATE part SET sealed = ? WHERE name = ?", (sealed, name))
    # an older part put back in place of a newer one
    (before,) = database.execute("SELECT sealed FROM part WHERE name = 'role._score'").fetchone()
    checkpoint.write({"role._score": np.arange(3)})
    database.execute("UPDATE part SET sealed = ? WHERE name = 'role._score'", (before,))
    with pytest.raises(Refused, match="does not open"):
        homes.checkpoint("bank1").read()


def test_what_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, job=b"\x00" * 32, party="bank1")
    still, moving = np.arange(100_000), {"a": np.arange(10)}
    checkpoint.write({"still": still, "moving": moving})
    moving["b"] = np.arange(5)
    checkpoint.write({"still": still, "moving": moving})
    again = Checkpoint(tmp_path, job=b"\x00" * 32, party="bank1")
    found = again.read()
    assert again._generations == {"still": 1, "moving": 2}
    assert np.array_equal(found["still"], still)
    assert found["moving"].keys() == {"a", "b"}


def test_values_come_back_as_they_were_and_others_are_refused() -> None:
    values: list[object] = [
        *(None, True, 3, -(1 << 70), 1.5, "text", b"bytes", (1, (2,)), [1, [2]], {1, 2}, {("a", 0): b"x"}),
        Step(kind=StepKind.SEARCH, round_number=2, index=3),
    ]
    for value in values:
        back = decode(encode(value))
        assert back == value
        assert type(back) is type(value)
    array = np.array(["retail", None, "build"], dtype=object)
    assert decode(encode(array)).tolist() == array.tolist()
    scalar = Scalar()
    assert bytes(decode(encode(scalar))._buffer.raw) == bytes(scalar._buffer.raw)  # type: ignore[union-attr]
    for strange in (object(), len, SigningIdentity.generate()):
        with pytest.raises(Refused, match="no form"):
            encode(strange)


def test_an_attribute_that_the_checkpoint_does_not_list_is_refused_not_lost(tmp_path: Path) -> None:
    homes, _ = stopped_at(tmp_path, "prepare")
    matching = homes.roles["bank1"]._matching
    assert matching is not None
    side = next(side for side in (*matching._queriers.values(), matching._publisher) if side is not None)
    assert set(vars(side)) == set(STATES[type(side)])
    side.__dict__["_news"] = 1
    with pytest.raises(Refused, match="_news"):
        encode(side)
    matching.__dict__["_news"] = 1
    with pytest.raises(Refused, match="Matching has other"):
        freeze_role(homes.roles["bank1"])


def test_a_state_of_another_contract_or_a_damaged_one_stops_the_coordinator_with_one_line(tmp_path: Path) -> None:
    homes = Homes(small_parties(FEDERATION, rounds=1), tmp_path / "vaults")
    drive(homes, lambda party, data, call: call(data), tmp_path / "coordinator")
    other = Homes(small_parties(FEDERATION, rounds=1), tmp_path / "others")
    with pytest.raises(JobStoppedError, match="another contract"):
        drive(other, lambda party, data, call: call(data), tmp_path / "coordinator")
    path = tmp_path / "coordinator" / "coordinator.state"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(JobStoppedError, match="damaged"):
        drive(homes, lambda party, data, call: call(data), tmp_path / "coordinator")
