"""The coordinator: drives the schedule of a job over any Flower `Grid`, relays mail, adds ciphertexts.

It holds no secret but its signing identity and sees no plaintext beyond row counts and what the contract releases.
A bank that dies voids the exchange it died in; the exchange is run again with the survivors if the contract allows. A
party that refuses, a feature owner that dies, or too few banks stop the job with one line that names the party.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import msgpack
from flwr.app import Message
from flwr.serverapp import Grid

from fl_clients.contract import Contract
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
from fl_server.job_state import JobState, Mail, StepRecord, read_state, write_state
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.parameters import choose_sum
from privacy.secure_sum import add_ciphertexts

COORDINATOR = "coordinator"
STEP_TIMEOUT_S = 600.0


class JobStoppedError(Exception):
    """The job cannot go on: one line that names the party and says why."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the coordinator holds at the end. `histogram`: the pooled score histogram that the contract releases."""

    roster: Roster
    histogram: tuple[int, ...]
    receipts: Mapping[str, str]
    steps: tuple[StepRecord, ...]
    bytes_by_pair: Mapping[tuple[str, str], int]
    participants: tuple[str, ...]


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


class Coordinator:
    """One job from first to last step."""

    def __init__(
        self,
        *,
        grid: Grid,
        contract: Contract,
        identity: SigningIdentity,
        watch: Watch = lambda done, total, step: None,
        timeout_s: float = STEP_TIMEOUT_S,
        folder: Path | None = None,
    ) -> None:
        """`folder`: where the state is kept after every exchange, to go on from after a restart; None: nowhere."""
        if identity.public.hex() != contract.coordinator_identity:
            raise JobStoppedError("the contract names another coordinator; use the identity it was written for")
        self._grid = grid
        self._contract = contract
        self._identity = identity
        self._watch = watch
        self._timeout_s = timeout_s
        self._owners = tuple(owner.name for owner in contract.owners)
        self._participants = tuple(bank.name for bank in contract.banks)
        self._mail = Mail()
        self._steps: list[StepRecord] = []
        self._pairs: Counter[tuple[str, str]] = Counter()
        self._announcements: dict[str, Announcement] = {}
        self._receipts: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        self._histograms: list[tuple[int, ...]] = []
        self._folder = folder
        self._done = 0
        self._attempt = 0
        if folder is not None:
            self._resume(folder)

    def _resume(self, folder: Path) -> None:
        """Take up a job where it was left."""
        try:
            state = read_state(folder, self._contract.hash)
        except Refused as error:
            raise JobStoppedError(str(error)) from None
        if state is None:
            return
        self._done, self._attempt, self._participants = state.done, state.attempt, state.participants
        self._mail, self._steps, self._pairs = state.mail, list(state.steps), state.pairs
        self._announcements = {name: Announcement(**told) for name, told in state.announcements.items()}
        self._receipts = dict(state.receipts)
        self._histograms = list(state.histograms)

    def _keep(self, mail: Mail) -> None:
        """Write where the job stands: exchange `_done` is asked next, with this mail."""
        if self._folder is None:
            return
        state = JobState(
            done=self._done,
            attempt=self._attempt,
            participants=self._participants,
            mail=mail,
            steps=tuple(self._steps),
            pairs=self._pairs,
            announcements={name: asdict(told) for name, told in self._announcements.items()},
            receipts=self._receipts,
            histograms=tuple(self._histograms),
        )
        try:
            write_state(self._folder, self._contract.hash, state)
        except OSError as error:
            raise JobStoppedError(
                f"the coordinator cannot write its state to {self._folder} ({error.strerror}); free disk space and "
                "start the job again: it goes on from the last finished step"
            ) from None

    def run(self) -> Outcome:
        """Drive every step; `JobStoppedError` when the job cannot go on."""
        self._nodes = find_parties(self._grid, self._contract)
        exchanges = schedule(self._contract)
        for done, exchange in enumerate(exchanges[self._done :], start=self._done):
            self._watch(done, len(exchanges), exchange[0].step.name)
            self._run_exchange(exchange)
            self._done, self._attempt = done + 1, 0
            self._keep(self._mail)
        self._watch(len(exchanges), len(exchanges), "done")
        if not self._histograms or len(set(self._histograms)) != 1:
            raise JobStoppedError("the banks released different pooled histograms; one of them is wrong")
        return Outcome(
            roster=Roster(self._contract, self._announcements),
            histogram=self._histograms[0],
            receipts=self._receipts,
            steps=tuple(self._steps),
            bytes_by_pair=dict(self._pairs),
            participants=self._participants,
        )

    def _run_exchange(self, exchange: Exchange) -> None:
        before = self._mail.copy()
        while True:
            summands: dict[str, bytes] = {}
            lost: list[str] = []
            for scheduled in exchange:
                lost = self._run_step(scheduled.step, scheduled.audience, self._attempt, summands)
                if lost:
                    break
            if not lost:
                break
            self._drop(lost, exchange)
            self._mail = before.copy()
            self._attempt += 1
            # before the survivors are asked: after a restart nobody is asked with the longer list again
            self._keep(before)
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
            summed=self._mail.summed if is_bank else None,
        )

    def _take_delivered(self, parties: Iterable[str]) -> None:
        """What was handed out is not handed out again (a void exchange starts from its own copy)."""
        receivers = set(parties)
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
            self._receipts[reply.party] = str(reply.released["model"])

    def _count(self, source: str, target: str, size: int, relayed: Iterable[Letter | Post] = ()) -> None:
        """Bytes by pair: what was relayed to a party counts from its author, the rest from whom it came on the wire."""
        for mail in relayed:
            inner = len(mail.sealed) if isinstance(mail, Letter) else len(mail.content)
            size -= inner
            self._pairs[(mail.sender, target)] += inner
        self._pairs[(source, target)] += size
