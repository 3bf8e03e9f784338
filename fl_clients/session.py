"""What a party knows of a job while it runs: its job key, the roster, and the mail of the other parties."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgpack

from fl_clients.contract import Contract
from fl_clients.protocol import Audience, Letter, Post, Request, Step, StepKind, verify_post
from fl_clients.roster import Announcement, Roster
from privacy.errors import Refused
from privacy.private_set_intersection import padded_size
from privacy.sealing import Context, JobKeys


class Session:
    """SECRET (holds the job key). A party's side of a job: writing and reading mail."""

    def __init__(self, contract: Contract, me: str) -> None:
        self.contract = contract
        self.me = me
        self.keys = JobKeys.generate()
        self._roster: Roster | None = None

    def __repr__(self) -> str:
        return f"Session({self.me!r}, job {self.contract.job})"

    @property
    def roster(self) -> Roster:
        if self._roster is None:
            raise Refused("no roster yet; the job has not been opened")
        return self._roster

    def public_of(self, parties: Iterable[str]) -> dict[str, bytes]:
        return {name: self.roster.announcements[name].public for name in parties if name != self.me}

    def letter(self, request: Request, receiver: str, content: object) -> Letter:
        context = Context(
            job=self.contract.hash,
            step=request.step,
            attempt=request.attempt,
            participants=request.participants,
            sender=self.me,
            receiver=receiver,
            label="letter",
        )
        sealed = self.keys.seal(self.roster.announcements[receiver].public, context, bytes(msgpack.packb(content)))
        return Letter(
            sender=self.me,
            receiver=receiver,
            step=request.step,
            attempt=request.attempt,
            participants=request.participants,
            sealed=sealed,
        )

    def post(self, request: Request, audience: Audience, content: object) -> Post:
        return Post(
            sender=self.me,
            audience=audience,
            step=request.step,
            attempt=request.attempt,
            content=bytes(msgpack.packb(content)),
            signature=b"",
        )

    def letters(
        self, request: Request, step: Step, senders: Iterable[str], same_exchange: bool = False
    ) -> dict[str, Any]:
        """Contents by sender: exactly one letter of `step` from each of `senders`, else `Refused`.

        All are of one attempt with one list of participants: masks of two attempts do not cancel. `same_exchange`: it
        must be this very attempt and these participants.
        """
        contents: dict[str, Any] = {}
        written = {(letter.attempt, letter.participants) for letter in request.letters if letter.step == step.name}
        if len(written) > 1:
            raise Refused(f"the letters of {step.name} are of attempts {sorted(a for a, _ in written)}; expected one")
        for letter in request.letters:
            if letter.step != step.name:
                continue
            if letter.receiver != self.me:
                raise Refused(f"a letter of {letter.sender} for {letter.receiver} was delivered to {self.me}")
            if same_exchange and (letter.attempt, letter.participants) != (request.attempt, request.participants):
                raise Refused(f"a letter of {letter.sender} belongs to attempt {letter.attempt}, not {request.attempt}")
            if letter.sender in contents or letter.sender not in self.roster.announcements:
                raise Refused(f"unexpected letter of {letter.sender} in step {request.step}")
            context = Context(
                job=self.contract.hash,
                step=letter.step,
                attempt=letter.attempt,
                participants=letter.participants,
                sender=letter.sender,
                receiver=self.me,
                label="letter",
            )
            opened = self.keys.open(self.roster.announcements[letter.sender].public, context, letter.sealed)
            contents[letter.sender] = _content(opened, letter.sender, step.name)
        _expect(contents, senders, step, request)
        return contents

    def posts(
        self, request: Request, step: Step, senders: Iterable[str], audience: Audience, same_exchange: bool = False
    ) -> dict[str, Any]:
        """Contents by sender of signed posts of `step`; at least those of `senders` (others are left aside)."""
        wanted = set(senders)
        contents: dict[str, Any] = {}
        for post in request.posts:
            if post.step != step.name or post.audience != audience or post.sender not in wanted:
                continue
            if same_exchange and post.attempt != request.attempt:
                raise Refused(f"a post of {post.sender} belongs to attempt {post.attempt}, not {request.attempt}")
            if post.sender in contents:
                raise Refused(f"two posts of {post.sender} for step {step.name}")
            contents[post.sender] = _content(verify_post(post, self.contract), post.sender, step.name)
        _expect(contents, wanted, step, request)
        return contents

    def posts_of(self, request: Request, sender: str, audience: Audience) -> list[dict[str, Any]]:
        """Every signed post of one sender that this request brings."""
        return [
            _content(verify_post(post, self.contract), sender, request.step)
            for post in request.posts
            if post.sender == sender and post.audience == audience
        ]

    def announce(self, request: Request, list_size: int, training_rows: int = 0, held_out_rows: int = 0) -> Post:
        content = {
            "public": self.keys.public,
            "list_size": list_size,
            "training_rows": training_rows,
            "held_out_rows": held_out_rows,
        }
        return self.post(request, "all", content)

    def admit_roster(self, request: Request) -> None:
        """Take everyone's announcement; one missing, one too many, or not signed by its identity: `Refused`."""
        names = [party.name for party in self.contract.parties]
        contents = self.posts(request, Step(kind=StepKind.JOIN), names, "all")
        announcements = {name: Announcement(**contents[name]) for name in names}
        if announcements[self.me].public != self.keys.public:
            raise Refused(f"the roster names another job key for {self.me}; somebody altered it, stop the job")
        for party in self.contract.parties:
            size, most = announcements[party.name].list_size, party.most_enterprises
            if size > padded_size(most, self.contract.alignment.bucket):
                raise Refused(f"{party.name} brings a list of {size} ids to the alignment, its contract allows {most}")
        for bank in self.contract.banks:
            if announcements[bank.name].training_rows < 1:
                raise Refused(f"{bank.name} brings no training rows; leave it out of the contract")
        self._roster = Roster(self.contract, announcements)


def _content(data: bytes, sender: str, step: str) -> Any:
    """A map, or the list of chunks of an alignment; anything else is the sender's fault and said so."""
    try:
        content = msgpack.unpackb(data, max_bin_len=1 << 31)
    except Exception:
        content = None
    if not isinstance(content, dict | list) or (isinstance(content, list) and not step.startswith("match.")):
        raise Refused(f"{sender} sent mail of the wrong form in step {step}; its program is broken or another version")
    return content


def _expect(contents: Mapping[str, Any], senders: Iterable[str], step: Step, request: Request) -> None:
    wanted = set(senders)
    if set(contents) != wanted:
        missing = sorted(wanted - set(contents))
        extra = sorted(set(contents) - wanted)
        raise Refused(
            f"step {request.step} needs mail of {step.name} from {sorted(wanted)}: missing {missing}, too many {extra}"
        )
