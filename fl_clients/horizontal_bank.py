"""A bank's side of a horizontal job: keys, order of steps, its summand, and the opening of the sum.

Guarantee: of this bank's update only the sum with the other participants' can be opened, by banks, once a step. A step
is run again only with fewer participants than before (somebody failed), with fresh masks and noise, as the next
attempt, before its sum was opened; so two different subsets of one step are never opened by a
bank that follows the protocol.
Against: the coordinator and the other banks (semi-honest), as long as two other participants follow the protocol.
Not covered: a coordinator that invents a failure and has one bank decrypt both attempts learns the difference, which is
the update of the bank it left out, with that bank's noise. Its signature under both lists stays with every bank.
Everything between two messages is in `Memory`, which the institution keeps (Flower: `Context.state`).
Source: PROTOCOL rules 6 to 10; hybrid sealing of the common key (a random key for the letter, sealed to each bank).
"""

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import lru_cache

import msgpack
import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fl_clients.horizontal_terms import (
    Handed,
    Header,
    HorizontalTerms,
    announce,
    participants_hash,
    read_roster,
    step_kind,
    step_order,
)
from privacy.errors import Refused
from privacy.identity import SigningIdentity, verify
from privacy.masks import pairwise_mask
from privacy.noise import NoiseSource
from privacy.parameters import choose_sum
from privacy.sealing import KEY_BYTES, Context, JobKeys, encode_fields
from privacy.secure_sum import ConsortiumKey
from privacy.update_sum import Contribution, OpenedSum, UpdatePlan, packed, unpacked

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

_RECEIVER = "consortium"
_NONCE = bytes(12)  # the key of the letter is fresh, so its one nonce may be fixed


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One attempt that left this bank: what a ledger charges. `noise_multiplier` 0: no noise shares."""

    step: str
    attempt: int
    participants: int
    noise_multiplier: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """SECRET. What a bank remembers of a job between two messages.

    `step`, `attempt`, `participants`: of the last summand that left; `is_open`: its sum was opened. `claim`: what this
    bank opened last, which the others must prove to have opened too. `model`: digest of the model that the last summand
    was made from; it is bound into the sum, which opens only if all banks had the same.
    """

    job_key: bytes = b""
    consortium: bytes = b""
    roster: bytes = b""
    step: str = ""
    attempt: int = 0
    participants: tuple[str, ...] = ()
    is_open: bool = True
    claim: bytes = b""
    model: bytes = b""
    stopped: str = ""
    charges: tuple[Charge, ...] = ()
    contribution: Contribution | None = None

    def __repr__(self) -> str:
        return f"Memory(step {self.step!r}, attempt {self.attempt}, secret)"


class HorizontalBank:
    """SECRET. One bank in one job; made anew for every message from its `Memory`."""

    def __init__(
        self, *, name: str, terms: HorizontalTerms, identity: SigningIdentity, memory: Memory, noise: NoiseSource
    ) -> None:
        if terms.identity(name) != identity.public:
            raise Refused(f"the identity key of {name!r} is not the one in the terms; use the key that was agreed")
        self.name = name
        self.terms = terms
        self.identity = identity
        self.memory = memory
        self._noise = noise

    def __repr__(self) -> str:
        return f"HorizontalBank({self.name!r}, job {self.terms.job})"

    # set-up

    def join(self) -> bytes:
        """A fresh job key; returns the signed announcement, msgpack [bank, public, signature]. Once a job."""
        if self.memory.job_key:
            raise Refused(f"{self.name} joined job {self.terms.job} before; a new start needs a new job")
        keys = JobKeys.generate()
        self.memory = replace(self.memory, job_key=keys.secret_bytes())
        made = announce(self.name, keys.public, self.terms, self.identity)
        return bytes(msgpack.packb([made.bank, made.public, made.signature]))

    def make_key(self, header: Header, roster: bytes) -> bytes:
        """As the maker: a fresh common key, encrypted once, its letter key sealed to every other bank.

        Returns msgpack [fingerprint, signature, encrypted key, {bank: sealed letter key}].
        """
        publics = self._admissible(header, roster)
        if self.name != header.participants[0]:
            raise Refused(f"{self.name} is asked to make the common key, {header.participants[0]} is the first bank")
        key = ConsortiumKey(choose_sum(parties=len(self.terms.banks)))
        letter_key = os.urandom(KEY_BYTES)
        sealed = {
            other: self._keys().seal(publics[other], self._letter(header.participants, self.name, other), letter_key)
            for other in header.participants
            if other != self.name
        }
        encrypted = ChaCha20Poly1305(letter_key).encrypt(_NONCE, key.secret_bytes(), self.terms.hash)
        fingerprint = bytes.fromhex(key.fingerprint())
        signature = self.identity.sign(b"horizontal consortium key", self._vouched(fingerprint, header.participants))
        self.memory = replace(self.memory, consortium=key.secret_bytes())
        return bytes(msgpack.packb([fingerprint, signature, encrypted, sealed]))

    def admit(self, header: Header, mail: bytes, letter: bytes) -> None:
        """Take roster and common key. `mail`: msgpack [roster, fingerprint, signature, encrypted key]."""
        roster, fingerprint, signature, encrypted = _fields(mail, 4)
        publics = self._admissible(header, roster)
        maker = header.participants[0]
        verify(
            self.terms.identity(maker),
            b"horizontal consortium key",
            self._vouched(fingerprint, header.participants),
            signature,
        )
        if self.name != maker:
            letter_key = self._keys().open(publics[maker], self._letter(header.participants, maker, self.name), letter)
            try:
                secret = ChaCha20Poly1305(letter_key).decrypt(_NONCE, encrypted, self.terms.hash)
            except (InvalidTag, ValueError):
                raise Refused(f"the common key of {maker} does not open; it was altered, start the job again") from None
            self.memory = replace(self.memory, consortium=secret)
        if bytes.fromhex(self._consortium().fingerprint()) != fingerprint:
            raise Refused(f"the common key is not the one that {maker} signed; stop the job")
        claim = encode_fields([b"admitted", self.terms.hash, hashlib.sha256(roster).digest(), fingerprint])
        self.memory = replace(self.memory, roster=roster, participants=header.participants, claim=claim)

    def _admissible(self, header: Header, roster: bytes) -> Mapping[str, bytes]:
        if self.memory.roster:
            raise Refused(f"{self.name} was admitted to job {self.terms.job} before; a new start needs a new job")
        publics = read_roster(roster, self.terms)
        if tuple(publics) != header.participants or publics.get(self.name) != self._keys().public:
            raise Refused(f"the roster names other banks or another job key for {self.name}; stop the job")
        if len(publics) < self.terms.least_banks:
            raise Refused(f"{len(publics)} banks joined, the terms need {self.terms.least_banks}")
        return publics

    def _letter(self, participants: tuple[str, ...], sender: str, receiver: str) -> Context:
        return Context(
            job=self.terms.hash,
            step="key",
            attempt=0,
            participants=participants,
            sender=sender,
            receiver=receiver,
            label="consortium key",
        )

    def _vouched(self, fingerprint: bytes, participants: tuple[str, ...]) -> bytes:
        return encode_fields([self.terms.hash, participants_hash(participants), fingerprint])

    # steps

    def check_place(self, header: Header) -> bool:
        """`Refused` unless this header's step may come now; True if it runs the last step again."""
        memory = self.memory
        if memory.stopped:
            raise Refused(f"{self.name} stopped this job: {memory.stopped}")
        if not memory.roster:
            raise Refused(
                f"{self.name} has no key of this job: it was never admitted, or its node lost its state; it cannot "
                "take part, start a new job"
            )
        if self.name not in header.participants:
            raise Refused(f"{self.name} was left out of the job; a bank that failed does not come back")
        if not set(header.participants) <= set(memory.participants):
            raise Refused(f"step {header.step}: banks come back that had been left out")
        if len(header.participants) < self.terms.least_banks:
            raise Refused(
                f"step {header.step}: {len(header.participants)} banks left, the terms need {self.terms.least_banks}"
            )
        if header.step == memory.step:
            self._check_again(header)
            return True
        if memory.step and step_order(header.step) <= step_order(memory.step):
            raise Refused(f"step {header.step} comes after {memory.step}; it is over, its sum was or will be opened")
        if header.attempt != 0:
            raise Refused(f"step {header.step} begins with attempt {header.attempt}, expected 0")
        awaited = self._awaited()
        if header.handed != awaited and (awaited is None or header.handed is None or not _same(header.handed, awaited)):
            raise Refused(
                f"step {header.step} hands out the sum of "
                f"{header.handed.step if header.handed else 'nothing'}, {self.name} awaits that of "
                f"{awaited.step if awaited else 'nothing'} with the participants it was made for"
            )
        return False

    def _check_again(self, header: Header) -> None:
        memory = self.memory
        if memory.is_open:
            raise Refused(f"step {header.step}: its sum was opened; no second one is made of it")
        if header.attempt != memory.attempt + 1:
            raise Refused(
                f"step {header.step} attempt {header.attempt} was asked, {self.name} is at attempt {memory.attempt}; "
                "an answer is given once"
            )
        if header.attempt >= self.terms.most_attempts:
            raise Refused(f"step {header.step}: attempt {header.attempt + 1} of at most {self.terms.most_attempts}")
        if set(header.participants) == set(memory.participants):
            raise Refused(f"step {header.step} is asked again though no bank failed")
        if header.handed is not None:
            raise Refused(f"step {header.step} is run again and hands out a sum; it can only do one")

    def _awaited(self) -> Handed | None:
        memory = self.memory
        if memory.is_open:
            return None
        return Handed(step=memory.step, attempt=memory.attempt, participants=memory.participants, digest=b"")

    def check_proofs(self, header: Header) -> None:
        """Every participant has opened what this bank opened (or holds its key and roster): else `Refused`."""
        if not self.memory.claim:
            return
        expected = _proofs(self._key_at(), self.memory.claim, header.participants)
        for bank, proof in zip(header.participants, expected, strict=True):
            if not hmac.compare_digest(header.proofs.get(bank, b""), proof):
                raise Refused(
                    f"step {header.step}: {bank} does not prove that it has the same key and opened the same sum as "
                    f"{self.name}; the coordinator or {bank} deviates, stop the job"
                )

    def proof(self) -> bytes:
        """For the other key holders: that this bank opened what it opened. Empty before admission."""
        return _proofs(self._key_at(), self.memory.claim, (self.name,))[0] if self.memory.claim else b""

    def open_sum(self, header: Header, summed: bytes) -> tuple[str, OpenedSum] | None:
        """Open the sum that the header hands out: (its step, the sum); None if it hands out none."""
        handed = header.handed
        if handed is None:
            return None
        if hashlib.sha256(summed).digest() != handed.digest:
            raise Refused(f"the sum of {handed.step} is not the one that the coordinator signed; it was damaged")
        plan = self._plan(handed.step)
        residues = self._consortium().open(summed, plan.coefficients + 1)
        expected = _check_values(self._key_at(), self._made_of(handed), handed.participants)
        if int(residues[-1]) != expected & plan.parameters.mask:
            raise Refused(
                f"the sum of {handed.step} is not that of attempt {handed.attempt} and {len(handed.participants)} "
                "banks, all with the same model: a ciphertext is damaged or of another round, or models or attempts "
                "differ"
            )
        opened = unpacked(residues[:-1], plan)
        claim = encode_fields([b"opened", self._place(handed), hashlib.sha256(residues.tobytes()).digest()])
        self.memory = replace(self.memory, is_open=True, claim=claim, contribution=None)
        return handed.step, opened

    def summand(self, header: Header, contribution: Contribution, model: bytes) -> bytes:
        """This bank's masked and encrypted part of the step's sum. `contribution`: without noise; kept for a rerun.

        `model`: SHA-256 of the global model that it was made from.
        """
        self.memory = replace(self.memory, model=model)
        plan = self._plan(header.step)
        here = Handed(step=header.step, attempt=header.attempt, participants=header.participants, digest=b"")
        noised = contribution
        multiplier = 0.0
        if plan.noise is not None:
            std = plan.share_std(len(header.participants))
            tag = f"{self.terms.hash.hex()}/{header.step}/{header.attempt}/{self.name}"
            noised = replace(contribution, values=contribution.values + self._noise.gaussian(tag, std, plan.length))
            multiplier = plan.noise.noise_multiplier
        residues = np.append(
            packed(noised, plan), np.uint64(_check_values(self._key_at(), self._made_of(here), (self.name,)))
        )
        publics = read_roster(self.memory.roster, self.terms)
        mask = pairwise_mask(
            self.name,
            self._keys(),
            {other: publics[other] for other in header.participants if other != self.name},
            job=self.terms.hash,
            step=header.step,
            attempt=header.attempt,
            participants=header.participants,
            receiver=_RECEIVER,
            length=len(residues),
            modulus_bits=plan.parameters.log_t,
        )
        charge = Charge(
            step=header.step,
            attempt=header.attempt,
            participants=len(header.participants),
            noise_multiplier=multiplier,
        )
        self.memory = replace(
            self.memory,
            step=header.step,
            attempt=header.attempt,
            participants=header.participants,
            is_open=False,
            contribution=contribution,
            charges=(*self.memory.charges, charge),
        )
        return self._consortium().encrypt((residues + mask) & np.uint64(plan.parameters.mask))

    def stop(self, reason: str) -> None:
        """The job is over at this bank: keys and the kept contribution go, the reason stays."""
        self.memory = Memory(stopped=reason, charges=self.memory.charges)

    def _plan(self, step: str) -> UpdatePlan:
        kind = step_kind(step)
        if kind is None:
            raise Refused(f"step {step} has no sum")
        return self.terms.plan(kind)

    def _place(self, here: Handed) -> bytes:
        return encode_fields(
            [self.terms.hash, here.step.encode(), here.attempt.to_bytes(8, "big"), participants_hash(here.participants)]
        )

    def _made_of(self, here: Handed) -> bytes:
        return encode_fields([self._place(here), self.memory.model])

    def _keys(self) -> JobKeys:
        if not self.memory.job_key:
            raise Refused(f"{self.name} has no job key; it must join first")
        return JobKeys.restore(self.memory.job_key)

    def _key_at(self) -> tuple[int, bytes]:
        if not self.memory.consortium:
            raise Refused(f"{self.name} has no common key of this job; it cannot open or add to a sum")
        return len(self.terms.banks), self.memory.consortium

    def _consortium(self) -> ConsortiumKey:
        return _consortium_key(self._key_at())


# All banks of a job have the same key and open the same sum: a process that simulates many of them does this once.


@lru_cache(maxsize=2)
def _consortium_key(key: tuple[int, bytes]) -> ConsortiumKey:
    banks, secret = key
    return ConsortiumKey(choose_sum(parties=banks), secret)


@lru_cache(maxsize=4)
def _proofs(key: tuple[int, bytes], claim: bytes, banks: tuple[str, ...]) -> tuple[bytes, ...]:
    """What each bank says, who knows the key and opened what `claim` says."""
    consortium = _consortium_key(key)
    return tuple(consortium.digest(encode_fields([b"proof", claim, bank.encode()])) for bank in banks)


@lru_cache(maxsize=4)
def _check_values(key: tuple[int, bytes], made_of: bytes, banks: tuple[str, ...]) -> int:
    """The sum of the banks' check values."""
    consortium = _consortium_key(key)
    return sum(consortium.check_value(encode_fields([made_of, bank.encode()])) for bank in banks)


def _same(handed: Handed, awaited: Handed) -> bool:
    return (handed.step, handed.attempt, handed.participants) == (awaited.step, awaited.attempt, awaited.participants)


def _fields(mail: bytes, count: int) -> list[bytes]:
    try:
        fields = msgpack.unpackb(mail, max_bin_len=1 << 26)
    except Exception:
        fields = None
    if not isinstance(fields, list) or len(fields) != count or not all(isinstance(part, bytes) for part in fields):
        raise Refused("the mail of the job's opening is malformed; the coordinator runs another version")
    return fields


def encode_memory(memory: Memory) -> bytes:
    """SECRET bytes for the institution's own store."""
    kept = memory.contribution
    fields = {name: getattr(memory, name) for name in _PLAIN_FIELDS}
    fields["charges"] = [[item.step, item.attempt, item.participants, item.noise_multiplier] for item in memory.charges]
    fields["contribution"] = None if kept is None else [kept.values.tobytes(), kept.weight, kept.counts.tobytes()]
    return bytes(msgpack.packb(fields))


def decode_memory(data: bytes) -> Memory:
    """Inverse of `encode_memory`."""
    fields = msgpack.unpackb(data, use_list=False, max_bin_len=1 << 31)
    kept = fields.pop("contribution")
    charges = tuple(
        Charge(step=step, attempt=attempt, participants=participants, noise_multiplier=multiplier)
        for step, attempt, participants, multiplier in fields.pop("charges")
    )
    contribution = None
    if kept is not None:
        values, counts = np.frombuffer(kept[0], np.int64), np.frombuffer(kept[2], np.int64)
        contribution = Contribution(values=values, weight=kept[1], counts=counts)
    return Memory(**fields, charges=charges, contribution=contribution)


_PLAIN_FIELDS = tuple(item.name for item in dataclass_fields(Memory) if item.name not in ("charges", "contribution"))
