"""Alignment of a job: private set intersection between every bank and every feature owner, one object per party.

Three steps, the same for all parties. Two-way: points, tags, nothing. One-sided (one side publishes keyed values once,
the other queries obliviously): values and queries, answers, claims. The form with the fewest multiplications that the
contract allows is taken; it follows from the list sizes in the roster, so every party takes the same.

Afterwards a bank knows which of its rows each owner knows; an owner knows its own row (or none) for each position of
the bank's list, whose order the bank drew afresh for this job: training rows first, then held-out rows.
"""

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_clients.contract import Contract
from fl_clients.data import Consent
from fl_clients.protocol import Letter, Request, Step, StepKind
from fl_clients.session import Session
from privacy.errors import Refused
from privacy.private_set_intersection import (
    Exchange,
    Publisher,
    Querier,
    Sizes,
    TwoWaySide,
    chunk_count,
    padded_size,
)

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

MATCH_STEPS = tuple(Step(kind=StepKind.MATCH, index=index) for index in (1, 2, 3))


def announced_size(contract: Contract, rows: int) -> int:
    """A party's list size as everybody may see it: rounded up to the contract's bucket."""
    return padded_size(rows, contract.alignment.bucket)


def without_revoked(ids: Sequence[str], consent: Consent) -> list[str]:
    """The list for the alignment: whoever revoked since the job began keeps a place, but as a number nobody knows."""
    live = consent(ids)
    return [name if is_live else secrets.token_hex(32) for name, is_live in zip(ids, live.tolist(), strict=True)]


class Matching:
    """SECRET (ids, scalars). One party's side of all its intersections in one job."""

    def __init__(self, session: Session, ids: Sequence[str], order: Int64 | None) -> None:
        self._session = session
        contract, me = session.contract, session.me
        banks = [bank.name for bank in contract.banks]
        owners = [owner.name for owner in contract.owners]
        self._is_bank = me in banks
        self._peers = owners if self._is_bank else banks
        self._form = session.roster.matching_form
        self._two_way: dict[str, TwoWaySide] = {}
        self._queriers: dict[str, Querier] = {}
        self._publisher: Publisher | None = None
        mine, bucket = announced_size(contract, len(ids)), contract.alignment.bucket
        if mine != session.roster.announcements[me].list_size:
            raise Refused(f"{me} announced another list size than its {len(ids)} ids make; start the job again")
        publishers = {"two-way": (), "owners publish": owners, "banks publish": banks}[self._form]
        if self._form == "two-way":
            for peer in self._peers:
                pair = (me, peer) if self._is_bank else (peer, me)
                exchange = Exchange(job=contract.hash, first=pair[0], second=(pair[1],), form="two-way")
                self._two_way[peer] = TwoWaySide(ids, order, exchange=exchange, sizes=self._sizes(mine, peer))
        elif me in publishers:
            exchange = Exchange(job=contract.hash, first=me, second=tuple(self._peers), form="one-sided")
            self._publisher = Publisher(ids, order, exchange=exchange, size=mine, bucket=bucket)
            for peer in self._peers:
                self._publisher.expect(peer, session.roster.announcements[peer].list_size)
        else:
            own_side = banks if self._is_bank else owners
            for peer in self._peers:
                exchange = Exchange(job=contract.hash, first=peer, second=tuple(own_side), form="one-sided")
                self._queriers[peer] = Querier(ids, order, exchange=exchange, sizes=self._sizes(mine, peer))

    def __repr__(self) -> str:
        return "Matching(secret)"

    def _sizes(self, mine: int, peer: str) -> Sizes:
        return Sizes(
            mine=mine,
            peer=self._session.roster.announcements[peer].list_size,
            bucket=self._session.contract.alignment.bucket,
        )

    def step(self, step: Step, request: Request) -> tuple[Letter, ...]:
        """Perform step 1, 2 or 3: letters to every peer."""
        before = MATCH_STEPS[step.index - 2] if step.index > 1 else None
        arrived: dict[str, Any] = {}
        if before is not None and self._expects_mail(before):
            arrived = self._session.letters(request, before, self._peers)
        letters = []
        for peer in self._peers:
            chunks = self._one(step.index, peer, arrived.get(peer))
            if chunks is not None:
                letters.append(self._session.letter(request, peer, chunks))
        return tuple(letters)

    def _expects_mail(self, step: Step) -> bool:
        """Whether my peers write to me in this step."""
        match step.index:
            case 1:
                return True
            case 2:
                return bool(self._two_way or self._queriers)
            case _:
                return self._publisher is not None

    def _one(self, index: int, peer: str, arrived: list[bytes] | None) -> list[bytes] | None:
        """What goes to one peer in this step (None: nothing), after taking in what came from it."""
        announcements = self._session.roster.announcements
        mine = announcements[self._session.me].list_size
        theirs = announcements[peer].list_size
        if side := self._two_way.get(peer):
            if index == 1:
                return [side.chunk(at) for at in range(chunk_count(mine))]
            if index == 2:
                for at, chunk in enumerate(_chunks(arrived, theirs, peer)):
                    side.receive_chunk(at, chunk)
                return [side.tag_chunk(at) for at in range(chunk_count(theirs))]
            for at, chunk in enumerate(_chunks(arrived, mine, peer)):
                side.receive_tag_chunk(at, chunk)
            return None
        if publisher := self._publisher:
            if index == 1:
                return [publisher.value_chunk(at) for at in range(chunk_count(mine))]
            if index == 2:
                for at, chunk in enumerate(_chunks(arrived, theirs, peer)):
                    publisher.receive_query_chunk(peer, at, chunk)
                return [publisher.answer_chunk(peer, at) for at in range(chunk_count(theirs))]
            return None
        querier = self._queriers[peer]
        if index == 1:
            return [querier.query_chunk(at) for at in range(chunk_count(mine))]
        if index == 2:
            for at, chunk in enumerate(_chunks(arrived, theirs, peer)):
                querier.receive_value_chunk(at, chunk)
            return None
        for at, chunk in enumerate(_chunks(arrived, mine, peer)):
            querier.receive_answer_chunk(at, chunk)
        return [querier.claim_chunk(at) for at in range(chunk_count(mine))]

    def finish(self, request: Request) -> None:
        """Take the claims of the last step, where this party publishes; then the secrets are forgotten."""
        if self._publisher is not None:
            claims = self._session.letters(request, MATCH_STEPS[2], self._peers)
            for peer in self._peers:
                theirs = self._session.roster.announcements[peer].list_size
                for at, chunk in enumerate(_chunks(claims[peer], theirs, peer)):
                    self._publisher.receive_claim_chunk(peer, at, chunk)

    def known(self, owner: str) -> Bool:
        """A bank's result: bool[n] by row of its id list, whether the owner knows it."""
        if self._publisher is not None:
            return self._publisher.known(owner)
        return self._two_way[owner].known() if self._two_way else self._queriers[owner].known()

    def rows(self, bank: str) -> Int64:
        """An owner's result: int64[n], its own row for each position of the bank's list, -1 for none."""
        announced = self._session.roster.announcements[bank]
        rows = announced.training_rows + announced.held_out_rows
        if self._publisher is not None:
            return self._publisher.rows_of_peer(bank, rows)
        return self._two_way[bank].rows_of_peer(rows) if self._two_way else self._queriers[bank].rows_of_peer(rows)

    def erase(self) -> None:
        """Forget every scalar: who took this machine later could otherwise try out all codes."""
        for side in self._two_way.values():
            side.erase()
        for querier in self._queriers.values():
            querier.erase()
        if self._publisher is not None:
            self._publisher.erase()


def _chunks(arrived: object, entries: int, peer: str) -> list[bytes]:
    if not isinstance(arrived, list) or len(arrived) != chunk_count(entries):
        raise Refused(f"{peer} sent other chunks than its announced list size makes; it or the wire is broken")
    return arrived
