"""The coordinator: drives the schedule of a job over any Flower `Grid`, relays mail, adds ciphertexts.

It holds no secret but its signing identity and sees no plaintext beyond row counts and what the contract releases.
A bank that dies voids the exchange it died in; the exchange is run again with the survivors if the contract allows. A
party that refuses, a feature owner that dies, or too few banks stop the job with one line that names the party.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgpack
from flwr.app import Message
from flwr.serverapp import Grid

from fl_clients import certificate
from fl_clients.contract import COORDINATOR, Contract, SignedContract
from fl_clients.courier import from_record, to_record
from fl_clients.protocol import (
    Audience,
    Exchange,
    Letter,
    Post,
    Reply,
    Request,
    Step,
    StepKind,
    decode_reply,
    encode_request,
    schedule,
    verify_post,
)
from fl_clients.roster import Announcement, Roster
from privacy.audit_format import parse_canonical, utc_text
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.parameters import choose_sum
from privacy.secure_sum import add_ciphertexts

STEP_TIMEOUT_S = 600.0


class JobStoppedError(Exception):
    """The job cannot go on: one line that names the party and says why."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step cost. Seconds are wall time at the coordinator, bytes those of the messages."""

    step: str
    attempt: int
    audience: Audience
    participants: tuple[str, ...]
    messages: int
    seconds: float
    bytes_out: int
    bytes_in: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the coordinator holds at the end. `histogram`: the pooled score histogram that the contract releases."""

    roster: Roster
    histogram: tuple[int, ...]
    receipts: Mapping[str, str]
    steps: tuple[StepRecord, ...]
    bytes_by_pair: Mapping[tuple[str, str], int]
    participants: tuple[str, ...]
    certificate: Mapping[str, Any]
    """{"body": ..., "signatures": ...}, checked: signed by every party that was there to the end."""


Watch = Callable[[int, int, str], None]
"""Called with (exchanges done, exchanges in all, name of the next step)."""


def find_parties(grid: Grid, contract: Contract, wait_s: float = 60.0) -> dict[str, int]:
    """Node by party name; waits until every party is there, else `JobStoppedError` names the missing."""
    wanted = {party.name for party in contract.parties}
    found: dict[str, int] = {}
    deadline = time.monotonic() + wait_s
    while True:
        unknown = [node for node in grid.get_node_ids() if node not in found.values()]
        from flwr.app import RecordDict

        messages = [Message(RecordDict(), dst_node_id=node, message_type="query.who") for node in unknown]
        for reply in grid.send_and_receive(messages, timeout=wait_s) if messages else []:
            if reply.has_error():
                continue
            name = str(reply.content.config_records["who"]["party"])
            if name in wanted and name not in found:
                found[name] = reply.metadata.src_node_id
        if set(found) == wanted:
            return found
        if time.monotonic() > deadline:
            raise JobStoppedError(f"not connected after {wait_s:.0f} s: {', '.join(sorted(wanted - set(found)))}")
        time.sleep(0.2)


@dataclass
class _Mail:
    """Mail on its way, and the sum to hand out next."""

    letters: list[Letter] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    summed: bytes | None = None

    def copy(self) -> "_Mail":
        return _Mail(list(self.letters), list(self.posts), self.summed)


class Coordinator:
    """One job from first to last step."""

    def __init__(
        self,
        *,
        grid: Grid,
        signed: SignedContract,
        identity: SigningIdentity,
        use: int = 1,
        watch: Watch = lambda done, total, step: None,
        timeout_s: float = STEP_TIMEOUT_S,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        contract = signed.contract
        if identity.public.hex() != contract.coordinator_identity:
            raise JobStoppedError("the contract names another coordinator; use the identity it was written for")
        try:
            signed.check_all()
        except Refused as error:
            raise JobStoppedError(str(error)) from None
        self._grid = grid
        self._signed = signed
        self._use = use
        self._clock = clock
        self._contract = contract
        self._identity = identity
        self._watch = watch
        self._timeout_s = timeout_s
        self._owners = tuple(owner.name for owner in contract.owners)
        self._participants = tuple(bank.name for bank in contract.banks)
        self._mail = _Mail()
        self._steps: list[StepRecord] = []
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._announcements: dict[str, Announcement] = {}
        self._models: dict[str, str] = {}
        self._receipts: dict[str, Mapping[str, Any]] = {}
        self._heads: dict[str, Mapping[str, Any]] = {}
        self._unseen: dict[str, list[tuple[str, dict[str, Any]]]] = {party.name: [] for party in contract.parties}
        """Receiver -> (sender, head) that it has not been shown yet, in order."""
        self._certificate: bytes | None = None
        self._signatures: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._histograms: list[tuple[int, ...]] = []

    def run(self) -> Outcome:
        """Drive every step; `JobStoppedError` when the job cannot go on."""
        self._nodes = find_parties(self._grid, self._contract)
        exchanges = schedule(self._contract)
        for done, exchange in enumerate(exchanges):
            self._watch(done, len(exchanges), exchange[0].step.name)
            self._run_exchange(exchange)
        self._watch(len(exchanges), len(exchanges), "done")
        if not self._histograms or len(set(self._histograms)) != 1:
            raise JobStoppedError("the banks released different pooled histograms; one of them is wrong")
        return Outcome(
            roster=Roster(self._contract, self._announcements),
            histogram=self._histograms[0],
            receipts=self._models,
            steps=tuple(self._steps),
            bytes_by_pair=dict(self._pairs),
            participants=self._participants,
            certificate=self._signed_certificate(),
        )

    def _write_certificate(self) -> bytes:
        """The body that every party checks and signs in the last step."""
        present = {*self._participants, *self._owners}
        return certificate.body_of(
            signed=self._signed,
            roster=Roster(self._contract, self._announcements),
            use=self._use,
            participants=self._participants,
            receipts={name: receipt for name, receipt in self._receipts.items() if name in present},
            heads={name: head for name, head in self._heads.items() if name in present},
            finished=utc_text(self._clock()),
        )

    def _signed_certificate(self) -> dict[str, Any]:
        if self._certificate is None:
            raise JobStoppedError("the job ended without a certificate")
        mine = certificate.sign_body(self._certificate, self._identity)
        signatures = {COORDINATOR: mine, **self._signatures}
        whole = {"body": parse_canonical(self._certificate), "signatures": signatures}
        try:
            certificate.check(whole)
        except Refused as error:
            raise JobStoppedError(f"the certificate does not hold: {error}") from None
        return whole

    def _run_exchange(self, exchange: Exchange) -> None:
        before = self._mail.copy()
        attempt = 0
        while True:
            summands: dict[str, bytes] = {}
            lost: list[str] = []
            if exchange[0].step.kind is StepKind.CERTIFY:
                self._certificate, self._signatures = self._write_certificate(), {}
            for scheduled in exchange:
                lost = self._run_step(scheduled.step, scheduled.audience, attempt, summands)
                if lost:
                    break
            if not lost:
                break
            self._drop(lost, exchange)
            self._mail = before.copy()
            attempt += 1
        if summands:
            try:
                ordered = [summands[bank] for bank in self._participants]
                self._mail.summed = add_ciphertexts(ordered, choose_sum(parties=len(self._contract.banks)))
            except Refused as error:
                raise JobStoppedError(f"{self._damaged(summands)}: {error}") from None

    def _damaged(self, summands: Mapping[str, bytes]) -> str:
        """Whose ciphertexts cannot be added, or have another number than the first bank's."""
        parameters = choose_sum(parties=len(self._contract.banks))
        first = summands[self._participants[0]]
        for bank in self._participants:
            try:
                add_ciphertexts([summands[bank]], parameters)
                add_ciphertexts([first, summands[bank]], parameters)
            except Refused:
                return bank
        return ", ".join(self._participants)

    def _drop(self, lost: list[str], exchange: Exchange) -> None:
        names = ", ".join(lost)
        why = ", ".join(sorted({self._reasons.get(party, "no answer") for party in lost}))
        step = exchange[0].step
        left = tuple(bank for bank in self._participants if bank not in lost)
        if set(lost) & set(self._owners):
            raise JobStoppedError(
                f"{names} died in step {step.name} ({why}); a feature owner cannot be left out, start again"
            )
        if step.kind in (StepKind.JOIN, StepKind.ROSTER, StepKind.MATCH):
            raise JobStoppedError(f"{names} died before the job began ({why}); start again when it is back")
        if len(left) < self._contract.least_banks:
            raise JobStoppedError(
                f"{names} died in step {step.name} ({why}); {len(left)} banks are left and the contract needs "
                f"{self._contract.least_banks}: start again"
            )
        self._participants = left

    def _audience(self, audience: Audience) -> tuple[str, ...]:
        match audience:
            case "banks":
                return self._participants
            case "owners":
                return self._owners
            case "all":
                return (*self._participants, *self._owners)

    def _run_step(self, step: Step, audience: Audience, attempt: int, summands: dict[str, bytes]) -> list[str]:
        """Ask every party of the audience; returns the parties that died."""
        parties = self._audience(audience)
        requests: dict[str, Request] = {}
        messages = []
        sizes: dict[str, int] = {}
        for party in parties:
            request = self._request(step, attempt, party)
            data = encode_request(request, self._identity)
            requests[party] = request
            sizes[party] = len(data)
            self._count(COORDINATOR, party, len(data), (*request.letters, *request.posts))
            messages.append(
                Message(to_record(data), dst_node_id=self._nodes[party], message_type="train.step", ttl=self._timeout_s)
            )
        self._take_delivered(parties)
        started = time.perf_counter()
        replies = self._collect(messages, parties)
        seconds = time.perf_counter() - started
        bytes_in = 0
        for party, data in replies.items():
            bytes_in += len(data)
            reply = self._read(data, party, requests[party])
            self._count(party, COORDINATOR, len(data))
            try:
                self._take(reply, step, summands)
            except (Refused, KeyError, TypeError, ValueError) as error:
                raise JobStoppedError(f"{party} sent a bad reply to step {step.name}: {error}") from None
        self._steps.append(
            StepRecord(
                step=step.name,
                attempt=attempt,
                audience=audience,
                participants=self._participants,
                messages=len(parties) + len(replies),
                seconds=seconds,
                bytes_out=sum(sizes.values()),
                bytes_in=bytes_in,
            )
        )
        return [party for party in parties if party not in replies]

    def _request(self, step: Step, attempt: int, party: str) -> Request:
        is_bank = party in self._participants
        side = "banks" if is_bank else "owners"
        present = {*self._participants, *self._owners}
        return Request(
            job=self._contract.hash,
            step=step.name,
            attempt=attempt,
            participants=self._participants,
            letters=tuple(x for x in self._mail.letters if x.receiver == party and x.sender in present),
            posts=tuple(x for x in self._mail.posts if x.audience in (side, "all") and x.sender in present),
            use=self._use,
            summed=self._mail.summed if is_bank else None,
            heads=tuple(head for sender, head in self._unseen[party] if sender in present),
            certificate=self._certificate,
        )

    def _take_delivered(self, parties: Iterable[str]) -> None:
        """What was handed out is not handed out again (a void exchange starts from its own copy)."""
        receivers = set(parties)
        for party in parties:
            self._unseen[party] = []
        sides = {"banks"} if receivers & set(self._participants) else set()
        sides |= {"owners"} if receivers & set(self._owners) else set()
        self._mail.letters = [letter for letter in self._mail.letters if letter.receiver not in receivers]
        self._mail.posts = [
            post
            for post in self._mail.posts
            if post.audience not in sides and (post.audience != "all" or len(sides) < 2)
        ]
        if "banks" in sides:
            self._mail.summed = None

    def _collect(self, messages: list[Message], parties: tuple[str, ...]) -> dict[str, bytes]:
        by_node = {self._nodes[party]: party for party in parties}
        replies: dict[str, bytes] = {}
        for reply in self._grid.send_and_receive(messages, timeout=self._timeout_s):
            party = by_node[reply.metadata.src_node_id]
            if reply.has_error():
                self._reasons[party] = str(reply.error.reason)
            else:
                replies[party] = from_record(reply.content)
        return replies

    def _read(self, data: bytes, party: str, request: Request) -> Reply:
        try:
            reply = decode_reply(data, self._contract, party, request)
        except Refused as error:
            raise JobStoppedError(f"{party}: {error}") from None
        if reply.refused is not None:
            raise JobStoppedError(f"{party} refused step {request.step}: {reply.refused}")
        return reply

    def _take(self, reply: Reply, step: Step, summands: dict[str, bytes]) -> None:
        """Mail in another party's name would not open; stopping here names the one who sent it."""
        brought: list[Letter | Post] = [*reply.letters, *reply.posts]
        for mail in brought:
            if mail.sender != reply.party or mail.step != step.name:
                raise Refused(f"mail of {mail.sender} for step {mail.step} came from {reply.party}")
        self._mail.letters.extend(reply.letters)
        self._mail.posts.extend(reply.posts)
        if reply.summand is not None:
            summands[reply.party] = reply.summand
        if step.kind is StepKind.JOIN:
            for post in reply.posts:
                self._announcements[reply.party] = Announcement(**msgpack.unpackb(verify_post(post, self._contract)))
        if step.kind is StepKind.RELEASE:
            self._histograms.append(tuple(reply.released["histogram"]))
        if step.kind is StepKind.CLOSE:
            self._models[reply.party] = str(reply.released["model"])
            self._receipts[reply.party] = dict(reply.released["receipt"])
        if step.kind is StepKind.CERTIFY:
            self._signatures[reply.party] = str(reply.released["signature"])
        if reply.head is not None:
            self._heads[reply.party] = reply.head["head"]
            for receiver, heads in self._unseen.items():
                if receiver != reply.party:
                    heads.append((reply.party, reply.head))

    def _count(self, source: str, target: str, size: int, relayed: Iterable[Letter | Post] = ()) -> None:
        """Bytes by pair: what was relayed to a party counts from its author, the rest from whom it came on the wire."""
        for mail in relayed:
            inner = len(mail.sealed) if isinstance(mail, Letter) else len(mail.content)
            size -= inner
            self._pairs[(mail.sender, target)] += inner
        self._pairs[(source, target)] += size
