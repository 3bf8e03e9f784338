"""The vault: the institution's own process that holds data, keys and policy, and decides before anything leaves.

It has one call, `handle(bytes) -> bytes`; there is none that returns rows. It is a state machine over the schedule of
`protocol`: a step out of order is refused; a repeated request gets the stored reply, byte for byte; the same step with
other bytes is refused (one pad on two inputs would leak their difference); an exchange is run again only with the next
attempt and a subset of its participants, and only as long as its result was not opened. A step that fails once the
party began it ends the job here: asked again and again with altered mail, even refusals would answer questions about
what the mail opens to (a reaction attack on the key).
"""

import hashlib
import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fl_clients.contract import Contract
from fl_clients.protocol import (
    Audience,
    Letter,
    Post,
    Reply,
    Request,
    Step,
    StepKind,
    decode_request,
    encode_reply,
    schedule,
    sign_post,
)
from models.errors import DataError
from privacy.errors import Refused
from privacy.identity import SigningIdentity

LOGGER = logging.getLogger(__name__)


MALFORMED = (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError)


class VaultFailedError(Exception):
    """A step failed inside the vault; says the kind of error and nothing else. The party counts as dead."""


class NotSavedError(VaultFailedError):
    """The state after a step could not be written to disk: no reply leaves. Asking again tries to write again."""


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """What a step lets out, before signing."""

    letters: tuple[Letter, ...] = ()
    posts: tuple[Post, ...] = ()
    summand: bytes | None = None
    released: dict[str, object] | None = None


class PartyRole(Protocol):
    """A bank or a feature owner: its part of each step, called in order, once per attempt."""

    side: Audience

    def perform(self, step: Step, request: Request) -> Outgoing: ...

    def destroy(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class VaultState:
    """Where a vault stands, without its role: what a restart needs."""

    done: tuple[int, int, int]
    """Exchange, place in it, attempt."""
    participants: tuple[str, ...]
    stopped: str | None
    stored: dict[tuple[str, int], tuple[bytes, bytes]]


class StepBook(Protocol):
    """Where a vault writes before it acts and before it answers (`recovery`). Raises `Refused`."""

    def begin(self, step: str, attempt: int, digest: bytes) -> None: ...

    def done(self, state: VaultState, role: PartyRole, key: tuple[str, int]) -> None: ...

    def close(self, state: VaultState, role: PartyRole) -> None: ...


@dataclass(frozen=True)
class _Position:
    """The last step that was done: exchange and place in it (of this party's own schedule), and its attempt."""

    exchange: int
    place: int
    attempt: int


class Vault:
    """One institution's vault for one job."""

    def __init__(
        self,
        *,
        party: str,
        contract: Contract,
        identity: SigningIdentity,
        role: PartyRole,
        book: StepBook | None = None,
        state: VaultState | None = None,
    ) -> None:
        """`book`: where every step is written, for a restart; `state`: where the vault stood when it was killed."""
        if contract.party(party).identity != identity.public.hex():
            raise Refused(f"the identity key of {party!r} is not the one in the contract; use the key that was agreed")
        self.party = party
        self.contract = contract
        self._identity = identity
        self._role = role
        self._schedule: list[list[Step]] = []
        for exchange in schedule(contract):
            own = [item.step for item in exchange if item.audience in (role.side, "all")]
            if own:
                self._schedule.append(own)
        self._done = _Position(-1, 0, 0)
        self._participants = tuple(bank.name for bank in contract.banks)
        self._stored: dict[tuple[str, int], tuple[bytes, bytes]] = {}
        self._stopped: str | None = None
        self._destroyed = False
        self._book = book
        self._unsaved: tuple[str, int] | None = None
        if state is not None:
            self._done = _Position(*state.done)
            self._participants = state.participants
            self._stopped = state.stopped
            self._stored = dict(state.stored)

    def __repr__(self) -> str:
        return f"Vault({self.party!r}, job {self.contract.job})"

    def handle(self, data: bytes) -> bytes:
        """Answer one request. A refusal is an answer too: signed, with its reason in one line."""
        try:
            request = decode_request(data, self.contract)
        except Refused as error:
            return self._refusal("", 0, str(error))
        key = (request.step, request.attempt)
        digest = hashlib.sha256(data).digest()
        self._save()
        if key in self._stored:
            stored_digest, reply = self._stored[key]
            if stored_digest == digest:
                return reply
            return self._refusal(*key, f"step {request.step} attempt {request.attempt} was asked with other content")
        if self._stopped is not None:
            return self._refusal(*key, f"{self.party} stopped this job in step {self._stopped}; start a new one")
        try:
            position, step = self._admit(request)
        except Refused as error:
            return self._refusal(*key, str(error))
        if self._book is not None:
            try:
                self._book.begin(*key, digest)
            except OSError as error:
                raise NotSavedError(str(error)) from None
            except Refused as error:
                return self._refusal(*key, str(error))
        self._stopped = step.name  # until the step is done
        try:
            outgoing = self._role.perform(step, request)
        except (Refused, DataError) as error:
            return self._refuse_for_good(key, digest, str(error))
        except Exception as error:
            # the message may quote a value: only the kind of error leaves, only its place is logged
            where = "".join(traceback.format_tb(error.__traceback__))
            LOGGER.error("step %s: %s\n%s", request.step, type(error).__name__, where)
            self._destroy()
            if isinstance(error, MALFORMED):
                # signed or sealed by a party, yet not of the form that the step needs
                return self._refuse_for_good(
                    key, digest, f"the mail of step {request.step} is malformed ({type(error).__name__})"
                )
            self._unsaved = key
            self._save()
            raise VaultFailedError(type(error).__name__) from None
        self._stopped = None
        self._done = position
        self._participants = request.participants
        reply = self._sign(request, outgoing)
        self._stored[key] = (digest, reply)
        self._unsaved = key
        if step.kind is StepKind.CLOSE:
            self._stored = {key: (digest, reply)}
        self._save()
        if step.kind is StepKind.CLOSE:
            self._destroy()
        return reply

    @property
    def state(self) -> VaultState:
        done = (self._done.exchange, self._done.place, self._done.attempt)
        return VaultState(done=done, participants=self._participants, stopped=self._stopped, stored=self._stored)

    def _save(self) -> None:
        """Write the last step, if it is not yet written: before that nothing leaves."""
        if self._unsaved is None or self._book is None:
            return
        over = self._stopped is not None or self._unsaved[0] == StepKind.CLOSE
        try:
            if over:
                self._book.close(self.state, self._role)
            else:
                self._book.done(self.state, self._role, self._unsaved)
        except OSError as error:
            raise NotSavedError(str(error)) from None
        self._unsaved = None
        if over:
            self._destroy()

    def _destroy(self) -> None:
        """Once: a bank that dies while closing makes the others close again."""
        if not self._destroyed:
            self._role.destroy()
        self._destroyed = True

    def _admit(self, request: Request) -> tuple[_Position, Step]:
        """Where in the schedule this request stands; `Refused` when it may not come now."""
        done = self._done
        candidates: list[tuple[_Position, Step]] = []
        if done.exchange >= 0:
            current = self._schedule[done.exchange]
            if done.place + 1 < len(current):
                candidates.append((_Position(done.exchange, done.place + 1, done.attempt), current[done.place + 1]))
            candidates.append((_Position(done.exchange, 0, request.attempt), current[0]))
            finished = done.place + 1 == len(current)
        else:
            finished = True
        if finished and done.exchange + 1 < len(self._schedule):
            # another party may have died before this one was asked: a first attempt may carry any number
            candidates.append((_Position(done.exchange + 1, 0, request.attempt), self._schedule[done.exchange + 1][0]))
        for position, step in candidates:
            if step.name != request.step or position.attempt != request.attempt:
                continue
            again = position.exchange == done.exchange and position.place == 0
            if again and request.attempt <= done.attempt:
                break
            self._check_participants(request.participants)
            if again and set(request.participants) == set(self._participants):
                # fresh noise without a death could be asked for until its mean is exact
                raise Refused(f"step {request.step} is asked again though no bank dropped; the stored reply was sent")
            return position, step
        expected = " or ".join(sorted({step.name for _, step in candidates})) or "nothing, the job is closed"
        raise Refused(
            f"step {request.step} attempt {request.attempt} is out of order at {self.party}: expected {expected}"
        )

    def _check_participants(self, participants: Sequence[str]) -> None:
        if not set(participants) <= set(self._participants) or len(set(participants)) != len(participants):
            raise Refused(f"participants {list(participants)} are no subset of {list(self._participants)}")
        if tuple(participants) != tuple(name for name in self._participants if name in participants):
            raise Refused("participants are not in the order of the contract")
        if len(participants) < self.contract.least_banks:
            raise Refused(f"{len(participants)} banks left, the contract needs {self.contract.least_banks}")
        if self._role.side == "banks" and self.party not in participants:
            raise Refused(f"{self.party} was left out of the job; a bank that dropped does not come back")

    def _sign(self, request: Request, outgoing: Outgoing) -> bytes:
        reply = Reply(
            job=self.contract.hash,
            step=request.step,
            attempt=request.attempt,
            party=self.party,
            letters=outgoing.letters,
            posts=tuple(sign_post(post, self.contract, self._identity) for post in outgoing.posts),
            summand=outgoing.summand,
            released=outgoing.released or {},
        )
        return encode_reply(reply, self._identity)

    def _refuse_for_good(self, key: tuple[str, int], digest: bytes, reason: str) -> bytes:
        """The job is over at this vault: keys, pads and rows go, the refusal stays."""
        refusal = self._refusal(*key, reason)
        self._stored[key] = (digest, refusal)
        self._unsaved = key
        self._destroy()
        self._save()
        return refusal

    def _refusal(self, step: str, attempt: int, reason: str) -> bytes:
        reply = Reply(job=self.contract.hash, step=step, attempt=attempt, party=self.party, refused=reason)
        return encode_reply(reply, self._identity)
