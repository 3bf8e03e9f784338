"""The vault: the institution's own process that holds data, keys and policy, and decides before anything leaves.

It has one call, `handle(bytes) -> bytes`; there is none that returns rows. It is a state machine over the schedule of
`protocol`: a step out of order is refused; a repeated request gets the stored reply, byte for byte; the same step with
other bytes is refused (one pad on two inputs would leak their difference); an exchange is run again only with the next
attempt and a subset of its participants, and only as long as its result was not opened. A step that fails once the
party began it ends the job here: asked again and again with altered mail, even refusals would answer questions about
what the mail opens to (a reaction attack on the key).

Before a reply leaves: the contract must be signed by all, valid now, with a use left, and list the release and its
receiver (job book); its cost must be reserved (ledger); the reply's hash must be on disk in the audit log. Where one of
these fails nothing leaves. A refusal is logged as well.
"""

import hashlib
import logging
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from fl_clients import certificate
from fl_clients.certificate import Receipt
from fl_clients.contract import SignedContract
from fl_clients.institution import Institution
from fl_clients.job_book import JobState, check_valid
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
    ends_stage,
    released_in,
    reply_body,
    schedule,
    sign_post,
)
from fl_clients.roster import Roster
from fl_clients.witness import Witness
from models.errors import DataError
from privacy.audit_format import Entry, check_body, utc_text
from privacy.charges import Budget, ExactCharge, charges_of
from privacy.errors import Refused
from privacy.ledger import Reservation
from privacy.score_openings import enterprise_keys

LOGGER = logging.getLogger(__name__)


MOST_REFUSALS = 1000
"""Refusals of one run that are logged one by one; of more, each power of two: asking must not fill the disk."""

MALFORMED = (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError)


class VaultFailedError(Exception):
    """A step failed inside the vault; says the kind of error and nothing else. The party counts as dead."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Openings:
    """Scores that a feature owner is about to open: `times` for each of `ids` (an enterprise of two banks: twice)."""

    kind: str
    ids: Sequence[str]
    times: int


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """What a step lets out, before signing."""

    letters: tuple[Letter, ...] = ()
    posts: tuple[Post, ...] = ()
    summand: bytes | None = None
    released: dict[str, object] | None = None
    openings: tuple[Openings, ...] = ()


class PartyRole(Protocol):
    """A bank or a feature owner: its part of each step, called in order, once per attempt."""

    side: Audience

    @property
    def roster(self) -> Roster:
        """Everyone's announcements; `Refused` before the step that brings them."""
        ...

    def perform(self, step: Step, request: Request) -> Outgoing: ...

    def model_digest(self) -> str: ...

    def destroy(self) -> None: ...


@dataclass(frozen=True)
class _Position:
    """The last step that was done: exchange and place in it (of this party's own schedule), and its attempt."""

    exchange: int
    place: int
    attempt: int


EXACT = ExactCharge(name="exact sums", count=1)
"""What a job without epsilon costs: everything. Only a simulation may."""


@dataclass(frozen=True, kw_only=True)
class DataTerms:
    """The institution's own word on the data of a job: its name in the ledger, and what may be spent of it in all."""

    data_set: str
    budget: Budget
    exact_allowed: bool = False
    """SIMULATION ONLY: a job without epsilon may spend what has no number."""
    most_openings: int | None = None
    """Score openings of one enterprise over all jobs; of feature owners."""


class Vault:
    """One institution's vault for one run of a job."""

    def __init__(self, *, institution: Institution, signed: SignedContract, role: PartyRole, data: DataTerms) -> None:
        contract = signed.contract
        self.party = institution.name
        if contract.party(self.party).identity != institution.identity.public.hex():
            raise Refused(
                f"the identity key of {self.party!r} is not the one in the contract; use the key that was agreed"
            )
        signed.check_all()
        self.contract = contract
        self._signed = signed
        self._institution = institution
        self._identity = institution.identity
        self._role = role
        self._data = data
        self._schedule: list[list[Step]] = []
        for exchange in schedule(contract):
            own = [item.step for item in exchange if item.audience in (role.side, "all")]
            if own:
                self._schedule.append(own)
        self._done = _Position(-1, 0, 0)
        self._participants = tuple(bank.name for bank in contract.banks)
        self._stored: dict[tuple[str, int], tuple[bytes, bytes]] = {}
        self._stopped: str | None = None
        self._forgotten = False
        self._ended = False
        self._state = JobState.AUTHORISED
        self._use = 0
        self._witness = Witness(contract, self.party, self._identity, institution.log)
        self._reservation: Reservation | None = None
        self._roster: Roster | None = None
        self._released: Counter[str] = Counter()
        self._messages, self._bytes_in, self._bytes_out = 0, 0, 0
        self._refusals = 0
        self._receipt: dict[str, object] = {}
        self._entries: list[Entry] = []

    def __repr__(self) -> str:
        return f"Vault({self.party!r}, job {self.contract.job})"

    @property
    def use(self) -> int:
        """The run of the contract that this is, from 1; 0 before the first step."""
        return self._use

    @property
    def is_closed(self) -> bool:
        """Whether the run came to its end: keys and rows are gone, the model is final."""
        return bool(self._receipt.get("model"))

    @property
    def is_certified(self) -> bool:
        """Whether this party signed the run's certificate, the last thing that it is asked for."""
        return any(step == StepKind.CERTIFY for step, _ in self._stored)

    def handle(self, data: bytes) -> bytes:
        """Answer one request. A refusal is an answer too: signed, logged, with its reason in one line.

        Raises `VaultFailedError`, and nothing leaves, when something breaks inside or the audit log cannot be written.
        """
        try:
            request = decode_request(data, self.contract)
        except Refused as error:
            return self._refusal("", 0, str(error))
        key = (request.step, request.attempt)
        digest = hashlib.sha256(data).digest()
        if key in self._stored:
            stored_digest, reply = self._stored[key]
            if stored_digest == digest:
                return reply
            return self._refusal(*key, f"step {request.step} attempt {request.attempt} was asked with other content")
        if self._stopped is not None:
            if not self._ended:  # the books could not be written when it stopped: they may now
                self._fail(f"stopped in step {self._stopped}")
            return self._refusal(*key, f"{self.party} stopped this job in step {self._stopped}; start a new one")
        try:
            position, step = self._admit(request)
            self._check_use(step, request)
        except Refused as error:
            return self._refusal(*key, str(error))
        self._stopped = step.name  # until the step is done
        self._entries = []
        self._messages += 1
        self._bytes_in += len(data)
        try:
            self._check_terms(step)
            self._entries.extend(self._witness.take(request.heads))
            self._check_heads(step, request)
            with self._own_limits():
                self._enter(step, request)
            outgoing = self._perform(step, request)
            with self._own_limits():
                self._charge(step, outgoing)
            if step.kind is StepKind.CLOSE:
                outgoing = self._close(outgoing)
        except (Refused, DataError) as error:
            return self._refuse_for_good(key, digest, str(error))
        except Exception as error:
            # the message may quote a value: only the kind of error leaves, only its place is logged
            where = "".join(traceback.format_tb(error.__traceback__))
            LOGGER.error("step %s: %s\n%s", request.step, type(error).__name__, where)
            if isinstance(error, MALFORMED):
                # signed or sealed by a party, yet not of the form that the step needs
                return self._refuse_for_good(
                    key, digest, f"the mail of step {request.step} is malformed ({type(error).__name__})"
                )
            self._fail(f"{type(error).__name__} in step {step.name}")
            raise VaultFailedError(type(error).__name__) from None
        reply = self._send(step, request, outgoing, digest)
        self._stopped = None
        self._done = position
        self._participants = request.participants
        if step.kind in (StepKind.CLOSE, StepKind.CERTIFY):
            self._stored.clear()
        self._stored[key] = (digest, reply)
        return reply

    @contextmanager
    def _own_limits(self) -> Iterator[None]:
        """What job book and ledger say stays here: a coordinator must not probe the budget by asking."""
        try:
            yield
        except Refused as error:
            self._note("refusal", {"limits": _loggable(str(error)), "use": self._use})
            raise Refused(
                f"the limits of {self.party} do not allow this run; its own people find the reason in its audit log"
            ) from None

    # --- before anything leaves ------------------------------------------------------------------------------------

    def _check_use(self, step: Step, request: Request) -> None:
        if step.kind is not StepKind.JOIN and request.use != self._use:
            raise Refused(f"step {request.step} is of run {request.use}, here is run {self._use}")

    def _check_terms(self, step: Step) -> None:
        """The contract must be valid now and list what this step lets out."""
        if step.kind not in (StepKind.CLOSE, StepKind.CERTIFY):
            # what remains after expiry is to destroy, and to say so
            check_valid(self.contract, self._institution.clock())
        for release, receiver in released_in(step.kind):
            if receiver not in self.contract.receivers(release):
                raise Refused(
                    f"step {step.name} would release {release} to {receiver}, which the contract does not list "
                    f"({', '.join(self.contract.receivers(release)) or 'nobody'}); sign another contract"
                )

    def _check_heads(self, step: Step, request: Request) -> None:
        """Every other party that is still there must have shown its log at each stage that ended before this step."""
        ended: Counter[str] = Counter()
        for item in (item for exchange in schedule(self.contract) for item in exchange):
            if item.step == step:
                break
            if ends_stage(item.step):
                ended.update(["banks", "owners"] if item.audience == "all" else [item.audience])
        for party in self.contract.parties:
            side = "banks" if party.role == "bank" else "owners"
            if party.name == self.party or (side == "banks" and party.name not in request.participants):
                continue
            if self._witness.shown_by(party.name) < ended[side]:
                raise Refused(
                    f"step {step.name}: {party.name} showed its audit log {self._witness.shown_by(party.name)} times, "
                    f"{ended[side]} stages have ended; the coordinator withholds heads, or {party.name} shows none"
                )

    def _enter(self, step: Step, request: Request) -> None:
        """Collect at the first step, apply once sums are released; each transition is counted before it is used."""
        jobs, now = self._institution.jobs, self._institution.clock()
        if step.kind is StepKind.JOIN and self._use == 0:
            jobs.begin_use(self.contract, request.use, now)
            self._use = request.use
            self._enter_state(JobState.COLLECTING)
        elif step.kind in (StepKind.PREPARE, StepKind.BINS) and self._state is JobState.COLLECTING:
            jobs.apply(self.contract, now)
            self._enter_state(JobState.APPLYING)

    def _enter_state(self, state: JobState) -> None:
        self._note("state", {"from": str(self._state), "to": str(state), "use": self._use})
        self._state = state

    def _perform(self, step: Step, request: Request) -> Outgoing:
        if step.kind is StepKind.CERTIFY:
            return self._certify(request)
        outgoing = self._role.perform(step, request)
        if step.kind is StepKind.ROSTER:
            self._roster = self._role.roster
            self._check_encryption(self._roster)
        return outgoing

    def _check_encryption(self, roster: Roster) -> None:
        """Encryption at least as strong as signed."""
        floor, used = self.contract.he, roster.aggregate_parameters
        if used.security_bits < floor.security_bits or used.hiding_bits < floor.flooding_bits:
            raise Refused(
                f"this job's encryption has {used.security_bits} bits of security and {used.hiding_bits} of flooding, "
                f"the contract asks for {floor.security_bits} and {floor.flooding_bits}; use fewer rows or columns"
            )
        if roster.sum_parameters.security_bits < floor.security_bits:
            raise Refused(f"the secure sum has {roster.sum_parameters.security_bits} bits of security, below the floor")

    def _charge(self, step: Step, outgoing: Outgoing) -> None:
        """Reserve before the first release, take each release off the reservation; what is reserved is spent."""
        ledger, now = self._institution.ledger, self._institution.clock()
        if step.kind is StepKind.ROSTER and self._role.side == "banks" and self._roster is not None:
            plan = self._roster.plan
            self._reservation = ledger.reserve(
                job=self.contract.job,
                use=self._use,
                data_set=self._data.data_set,
                charges=charges_of(plan) if plan is not None else (EXACT,),
                budget=self._data.budget,
                exact_allowed=self.contract.simulation and self._data.exact_allowed,
                now=now,
            )
            self._note_ledger(ledger.spent(self._data.data_set, self._data.budget.delta).epsilon)
        for opening in outgoing.openings:
            ledger.open_scores(
                job=self.contract.job,
                use=self._use,
                data_set=self._data.data_set,
                kind=opening.kind,
                keys=enterprise_keys(opening.ids, self._institution.openings_key),
                times=opening.times,
                most_total=self._data.most_openings,
                now=now,
            )
        if outgoing.openings:
            self._note_ledger(None)
        performed = Roster.released_in(step.name)
        if performed:
            if self._reservation is None:
                raise Refused(f"step {step.name} releases what was never reserved in the ledger of {self.party}")
            if self._reservation.charges != (EXACT,):
                ledger.commit(self._reservation, dict.fromkeys(performed, 1), now=now)

    def _note_ledger(self, epsilon: float | None) -> None:
        """What the ledger holds from here on: if it is put back to an older state, this shows it."""
        head = self._institution.ledger.head()
        shown = None if epsilon is None else f"{epsilon:.6g}"
        body = {"data_set": self._data.data_set, "count": head.count, "digest": head.digest, "epsilon": shown}
        self._note("reservation", body)

    def _note(self, kind: str, body: dict[str, object]) -> None:
        self._entries.append(Entry(kind=kind, job=self.contract.job, body=body))

    def _send(self, step: Step, request: Request, outgoing: Outgoing, digest: bytes) -> bytes:
        """Log, then sign: the reply exists once its hash is on disk."""
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
        body = reply_body(reply)
        releases = [f"{release} to {receiver}" for release, receiver in released_in(step.kind)]
        self._note(
            "release",
            {
                "use": self._use,
                "step": request.step,
                "attempt": request.attempt,
                "request": digest.hex(),
                "reply": hashlib.sha256(body).hexdigest(),
                "bytes": len(body),
                "receivers": sorted({receiver for _, receiver in released_in(step.kind)}),
                "releases": releases,
            },
        )
        entries, self._entries = self._entries, []
        try:
            head = self._institution.log.append(entries)
        except Refused as error:
            self._forget()
            raise VaultFailedError(f"{type(error).__name__}: the audit log of {self.party} cannot be written") from None
        self._released.update(releases)
        self._bytes_out += len(body)
        return encode_reply(body, self._identity, self._witness.show(head) if ends_stage(step) else None)

    def stop(self, reason: str) -> None:
        """End the run without being asked: the process stops, or the contract expired. Logged; once."""
        if self._use and not self._ended:
            self._stopped = self._stopped or reason
            self._fail(reason)

    # --- the end ---------------------------------------------------------------------------------------------------

    def _close(self, outgoing: Outgoing) -> Outgoing:
        """Destroy, and say so: the receipt goes to the coordinator, the entry into the log."""
        model = str((outgoing.released or {})["model"])
        self._end("closed", model)
        return Outgoing(released={"model": model, "receipt": self._receipt})

    def _end(self, reason: str, model: str | None = None) -> None:
        """Keys, pads, alignments, rows and stored replies go; job book and log say so. Once."""
        if self._ended:
            return
        self._forget()
        institution = self._institution
        now = institution.clock()
        data_set, budget = self._data.data_set, self._data.budget
        spent: dict[str, object] = {"data_set": data_set}
        if self._role.side == "banks":
            spent["epsilon"] = _number(institution.ledger.spent(data_set, budget.delta).epsilon)
            spent["delta"] = budget.delta
        else:
            spent["score_openings"] = {
                str(times): count for times, count in institution.ledger.openings(data_set).histogram.items()
            }
        receipt = Receipt(
            party=self.party,
            contract=self.contract.hash.hex(),
            use=self._use,
            model=model,
            destroyed=DESTROYED,
            released=dict(sorted(self._released.items())),
            messages=self._messages,
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            spent=spent,
            time=utc_text(now),
        )
        self._receipt = certificate.sign_receipt(receipt, self._identity)
        self._note("destruction", {"receipt": self._receipt, "reason": _loggable(reason)})
        if self._state in (JobState.COLLECTING, JobState.APPLYING):
            institution.jobs.destroy(self.contract, reason, now)
            self._enter_state(JobState.DESTROYED)

    def _fail(self, reason: str) -> None:
        """End without an answer; what the books cannot take does not stop the destruction, nor turn into a reply."""
        try:
            self._end(reason)
            self._institution.log.append(self._entries)
            self._entries = []
        except Refused as error:
            LOGGER.error("job %s: %s", self.contract.job, error)

    def _forget(self) -> None:
        """What must not outlive the job leaves memory."""
        if not self._forgotten:
            self._role.destroy()
            self._stored.clear()
        self._forgotten = True

    def _certify(self, request: Request) -> Outgoing:
        """Check the certificate against what this party knows, and sign it."""
        if request.certificate is None:
            raise Refused("the last step brings no certificate")
        body = certificate.read_body(request.certificate)
        if body.signed.contract.hash != self.contract.hash or body.use != self._use:
            raise Refused("the certificate is of another contract or run")
        if self._roster is None or dict(body.roster.announcements) != dict(self._roster.announcements):
            raise Refused("the certificate has other announcements than this party saw")
        if body.participants != request.participants:
            raise Refused(f"the certificate names {list(body.participants)}, this step {list(request.participants)}")
        if dict(body.receipts[self.party]) != self._receipt:
            raise Refused(f"the receipt of {self.party} in the certificate is not the one it gave")
        seen = self._witness.seen | {self.party: self._witness.own}
        for party, head in body.heads.items():
            if seen.get(party) != head:
                raise Refused(f"the head of {party} in the certificate is not the last one that {self.party} saw")
        self._note("certificate", {"hash": hashlib.sha256(request.certificate).hexdigest(), "use": self._use})
        return Outgoing(released={"signature": certificate.sign_body(request.certificate, self._identity)})

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

    def _refuse_for_good(self, key: tuple[str, int], digest: bytes, reason: str) -> bytes:
        """The job is over at this vault: keys, pads and rows go, the refusal stays."""
        step = self._stopped
        try:
            self._end(f"refused step {step}: {reason}")
        except Refused as error:  # the books cannot be written: memory is clean all the same
            LOGGER.error("job %s: %s", self.contract.job, error)
        refusal = self._refusal(*key, reason)
        self._stored[key] = (digest, refusal)
        return refusal

    def _refusal(self, step: str, attempt: int, reason: str) -> bytes:
        self._refusals += 1
        if self._refusals <= MOST_REFUSALS or self._refusals.bit_count() == 1:
            body = {"step": _loggable(step), "attempt": attempt, "reason": _loggable(reason), "use": self._use}
            self._note("refusal", body | {"number": self._refusals})
        entries, self._entries = self._entries, []
        try:
            if entries:
                self._institution.log.append(entries)
        except Refused:
            # no answer, and what the run holds stays: whoever asks out of order must not be able to end it
            raise VaultFailedError(f"the audit log of {self.party} cannot be written") from None
        reply = Reply(job=self.contract.hash, step=step, attempt=attempt, party=self.party, refused=reason)
        return encode_reply(reply_body(reply), self._identity)


def _loggable(text: str) -> str:
    """A text as the audit log takes it: one that could hold the code of an enterprise, or is too long, as its hash."""
    shown = text[:2000]
    try:
        check_body("refusal", {"text": shown})
    except Refused:
        return f"not shown, SHA-256 {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()}"
    return shown


DESTROYED = ("job keys", "encryption keys", "pads and masks", "noise shares", "alignment", "rows", "stored replies")
"""What a vault erases at the end of a run. Its model stays: it is what the job was for."""


def _number(epsilon: float) -> float | str:
    """An infinite epsilon in words: JSON has no infinity."""
    return epsilon if epsilon < float("inf") else "infinite"
