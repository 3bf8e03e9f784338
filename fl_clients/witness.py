"""How the parties of a job watch each other's audit logs: signed heads go round at the end of each stage.

A party's head comes with a proof that it continues the head shown before (RFC 6962, consistency), and with its
countersignatures of the heads that it was shown. Every party logs the heads of the others and the countersignatures of
its own, so a log that is cut, altered or forked afterwards contradicts the logs of all others.

Guarantee: a head that does not continue the one before, or is not signed by its party, is `Refused`. Against: a party
that rewrites its history, with the coordinator's help or without. Not against: all other parties together.
Source: RFC 6962 (signed tree heads), Laurie 2014; witness cosigning as in Syta et al. 2016 (CoSi), one by one.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fl_clients.contract import Contract
from privacy.audit_format import (
    Entry,
    SignedHead,
    countersign,
    verify_countersignature,
    verify_head,
)
from privacy.audit_log import AuditLog
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.merkle import verify_consistency


class Witness:
    """What one party has seen of the others' logs in one run of a job."""

    def __init__(self, contract: Contract, me: str, identity: SigningIdentity, log: AuditLog) -> None:
        self._contract = contract
        self._me = me
        self._identity = identity
        self._log = log
        self._seen: dict[str, SignedHead] = {}
        self._countersigned: dict[str, str] = {}
        self._shown: list[SignedHead] = []
        self._times: Counter[str] = Counter()
        self._before = self._of_earlier_jobs()

    @property
    def seen(self) -> dict[str, SignedHead]:
        """The last head of every other party."""
        return dict(self._seen)

    @property
    def own(self) -> SignedHead | None:
        """The last head that this party showed the others."""
        return self._shown[-1] if self._shown else None

    def shown_by(self, party: str) -> int:
        """How often the party's log was shown in this run."""
        return self._times[party]

    def _of_earlier_jobs(self) -> dict[str, SignedHead]:
        """The last head of each party that this log witnessed in any job, where the party still has the same key."""
        found: dict[str, SignedHead] = {}
        for entry in self._log.entries(kind="witness"):
            for party, told in entry.body["heads"].items():
                head = SignedHead.from_json(told)
                with suppress(Refused):
                    verify_head(self._contract.identity_of(party), head)
                    found[party] = head
        return found

    def take(self, heads: Sequence[dict[str, Any]]) -> tuple[Entry, ...]:
        """Check the others' heads, countersign them; returns what to log. `Refused` names the party that is wrong."""
        seen: dict[str, Any] = {}
        by: dict[str, dict[str, str]] = {}
        for shown in heads:
            head = self._checked(shown)
            self._seen[head.party] = head
            self._times[head.party] += 1
            seen[head.party] = head.to_json()
            self._countersigned[head.party] = countersign(self._identity, head).hex()
            for size, signature in self._of_mine(shown, head.party).items():
                by.setdefault(size, {})[head.party] = signature
        entries = []
        if seen:
            entries.append(Entry(kind="witness", job=self._contract.job, body={"heads": seen}))
        for own in self._shown:
            if names := by.get(str(own.size)):
                body = {"head": own.to_json(), "by": names}
                entries.append(Entry(kind="countersigned", job=self._contract.job, body=body))
        return tuple(entries)

    def show(self, head: SignedHead) -> dict[str, Any]:
        """This party's own head for the others, with the proof that it continues the one shown before."""
        first = self._shown[-1].size if self._shown else 0
        proof = self._log.consistency(first, head.size) if first else ()
        self._shown.append(head)
        signatures, self._countersigned = self._countersigned, {}
        return {
            "head": head.to_json(),
            "first": first,
            "proof": [item.hex() for item in proof],
            "countersigned": {
                party: {"size": self._seen[party].size, "signature": signature}
                for party, signature in signatures.items()
            },
        }

    def _checked(self, shown: dict[str, Any]) -> SignedHead:
        head = SignedHead.from_json(shown.get("head"))
        party = head.party
        if party == self._me or party not in {other.name for other in self._contract.parties}:
            raise Refused(f"a head of {party!r} came to {self._me}; heads of the other parties are expected")
        try:
            verify_head(self._contract.identity_of(party), head)
        except Refused as error:
            raise Refused(f"the head of {party}'s audit log is not signed by {party}: {error}") from None
        before = self._seen.get(party)
        if before is None:
            earlier = self._before.get(party)
            if earlier is not None and _contradict(earlier, head):
                raise Refused(_rewritten(party, earlier, head))
            return head
        if _contradict(before, head):
            raise Refused(_rewritten(party, before, head))
        try:
            proof = tuple(bytes.fromhex(item) for item in shown["proof"])
            if shown["first"] != before.size:
                raise Refused(f"the proof begins at {shown['first']}, the head before was of {before.size} entries")
            verify_consistency(before.size, before.root, head.size, head.root, proof)
        except (KeyError, TypeError, ValueError, Refused) as error:
            raise Refused(
                f"no proof came that the audit log of {party} ({head.size} entries) continues the one it showed before "
                f"({before.size} entries): {error}; either {party} rewrote its history or the coordinator altered the "
                "proof, stop the job and compare the logs (`xinyi-audit verify`)"
            ) from None
        return head

    def _of_mine(self, shown: dict[str, Any], party: str) -> dict[str, str]:
        """Size of my head -> the party's countersignature of it, checked; none where it has seen none of mine yet."""
        told = shown.get("countersigned", {})
        mine = told.get(self._me) if isinstance(told, dict) else None
        if mine is None:
            return {}
        try:
            size, signature = int(mine["size"]), str(mine["signature"])
            own = next((head for head in self._shown if head.size == size), None)
            if own is None:
                raise Refused("it is of a head that was never shown")
            verify_countersignature(self._contract.identity_of(party), own, bytes.fromhex(signature))
        except (KeyError, TypeError, ValueError, Refused) as error:
            raise Refused(f"the countersignature of {party} on the log of {self._me} is wrong: {error}") from None
        return {str(size): signature}


def _contradict(earlier: SignedHead, later: SignedHead) -> bool:
    """Two signed heads that no append-only log can have in this order."""
    return later.size < earlier.size or (later.size == earlier.size and later.root != earlier.root)


def _rewritten(party: str, earlier: SignedHead, later: SignedHead) -> str:
    return (
        f"the audit log of {party} had {earlier.size} entries at {earlier.time} and shows {later.size} with another "
        "history now, both signed by it: its history was rewritten, stop the job and call the auditor"
    )
