"""A vault that survives a kill: it begins a job anew or goes on from its checkpoint, and never releases a step twice.

Before a step the vault writes what it was asked (a digest); after it, before the reply leaves, its state and the
reply. Killed in between, it does the step once more, for the same request only: the first reply never left, so nothing
is released twice, and another content under the same attempt stays refused. Killed later, it repeats the stored reply,
byte for byte. At the end of the job (closed or refused) key and state are destroyed; model and last reply are kept.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fl_clients.bank import Bank
from fl_clients.checkpoint import Checkpoint
from fl_clients.contract import Contract
from fl_clients.feature_owner import FeatureOwner
from fl_clients.frozen import freeze_role
from fl_clients.protocol import Audience, Request, Step, StepKind
from fl_clients.vault import Outgoing, PartyRole, Vault, VaultState
from privacy.errors import Refused
from privacy.identity import SigningIdentity

_ROLE, _REPLY, _VAULT, _BEGUN = "role.", "reply.", "vault", "begun"


class Recovery:
    """SECRET. The vault's book over a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._begun: dict[tuple[str, int], bytes] = {}
        self._names: set[str] = set()

    def __repr__(self) -> str:
        return f"Recovery({self._checkpoint!r})"

    def begin(self, step: str, attempt: int, digest: bytes) -> None:
        """Write that the step begins. `Refused` when it began before a kill with other content."""
        before = self._begun.get((step, attempt))
        if before == digest:
            return
        if before is not None:
            raise Refused(f"step {step} attempt {attempt} was asked with other content before this vault restarted")
        begun = {**self._begun, (step, attempt): digest}
        self._checkpoint.write({_BEGUN: begun})
        self._begun = begun

    def done(self, state: VaultState, role: PartyRole, key: tuple[str, int]) -> None:
        """Write the state after a step, with its reply."""
        if not isinstance(role, Bank | FeatureOwner):
            raise Refused(f"a {type(role).__name__} has no form in a checkpoint")
        frozen = {f"{_ROLE}{name}": value for name, value in freeze_role(role).items()}
        removed = tuple(self._names - frozen.keys())
        where = (state.done, state.participants)
        reply = {f"{_REPLY}{key[0]}.{key[1]}": (key, *state.stored[key])}
        self._checkpoint.write({**frozen, **reply, _VAULT: where, _BEGUN: {}}, removed)
        self._names = set(frozen)
        self._begun = {}

    def close(self, state: VaultState, role: PartyRole) -> None:
        """The job is over: keep the last replies and the model, destroy the rest."""
        kept = self._checkpoint.closed() or {"model": _model(role)}
        last = dict(state.stored) if state.stopped is None else {}
        if state.stopped is not None:
            last = {key: reply for key, reply in state.stored.items() if key[0] == state.stopped}
        kept |= {"done": state.done, "participants": state.participants, "stopped": state.stopped, "stored": last}
        self._checkpoint.close(kept)

    def take(self, parts: Mapping[str, Any]) -> tuple[VaultState | None, dict[str, Any]]:
        """What `Checkpoint.read` gave: the vault's state (None before the first step) and the role's parts."""
        self._begun = dict(parts.get(_BEGUN, {}))
        if _VAULT not in parts:
            return None, {}
        done, participants = parts[_VAULT]
        stored = {key: (digest, reply) for name, (key, digest, reply) in _replies(parts)}
        role = {name.removeprefix(_ROLE): value for name, value in parts.items() if name.startswith(_ROLE)}
        self._names = {f"{_ROLE}{name}" for name in role}
        return VaultState(done=done, participants=participants, stopped=None, stored=stored), role


def _replies(parts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in parts.items() if name.startswith(_REPLY)]


def _model(role: PartyRole) -> object:
    """The institution's own model file, before the role forgets it; None where no model was reached."""
    if isinstance(role, ClosedRole):
        return role.model_file
    try:
        if isinstance(role, Bank | FeatureOwner):
            return {"file": role.model(), "digest": role.model_digest()}
    except Refused:
        return None
    return None


class ClosedRole:
    """What is left of a bank or a feature owner after the job: its model, to close again after another's death."""

    def __init__(self, side: Audience, model_file: Any) -> None:
        self.side: Audience = side
        self.model_file = model_file

    def perform(self, step: Step, request: Request) -> Outgoing:
        del request
        if step.kind is not StepKind.CLOSE or self.model_file is None:
            raise Refused(f"step {step.name}: the job is over here and its keys are destroyed; start a new one")
        return Outgoing(released={"model": self.model_file["digest"]})

    def destroy(self) -> None:
        """Nothing is left to forget."""


def open_vault(
    *,
    party: str,
    contract: Contract,
    identity: SigningIdentity,
    checkpoint: Checkpoint,
    fresh: Callable[[], Bank | FeatureOwner],
    thaw: Callable[[Mapping[str, Any]], Bank | FeatureOwner],
) -> Vault:
    """The vault of a job: new (`fresh` makes its role), as it stood before a kill (`thaw`), or closed."""
    book = Recovery(checkpoint)
    kept = checkpoint.closed()
    role: PartyRole
    if kept is not None:
        checkpoint.destroy()  # a kill may have come between keeping and destroying
        is_bank = any(bank.name == party for bank in contract.banks)
        role = ClosedRole("banks" if is_bank else "owners", kept["model"])
        state = VaultState(
            done=kept["done"], participants=kept["participants"], stopped=kept["stopped"], stored=kept["stored"]
        )
        return Vault(party=party, contract=contract, identity=identity, role=role, book=None, state=state)
    found, parts = book.take(checkpoint.read()) if checkpoint.exists else (None, {})
    role = fresh() if found is None else thaw(parts)
    return Vault(party=party, contract=contract, identity=identity, role=role, book=book, state=found)
