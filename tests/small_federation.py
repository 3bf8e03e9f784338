"""A small generated federation for whole runs in tests, and what tests need around a run: pooled data, wire taps.

The rows do not depend on the number of banks: the same enterprises are cut into as many banks as asked for. There are
missing cells, special codes, atoms and categories, and every owner lacks a part of the banks' enterprises (left join).
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import msgpack
import numpy as np
import numpy.typing as npt
from flwr.app import Message

from fl_clients.bank import Bank
from fl_clients.contract import PrivacyTerms
from fl_clients.courier import client_app, from_record
from fl_clients.data import LabelledRows
from fl_clients.feature_owner import FeatureOwner
from fl_clients.protocol import Letter, Request, Step, decode_reply, decode_request, encode_request, schedule
from fl_clients.session import Session
from fl_server.coordinator import Coordinator, Outcome
from fl_server.memory_grid import MemoryGrid
from models.scorecard import ScorecardSettings
from privacy import blind_aggregate, blind_sum, secure_sum
from simulations.federation_folder import BankTable, BaselineSettings, Column, Federation, OwnerTable
from simulations.job import Parties, make_parties, noise_totals
from simulations.run import pool
from simulations.twin import TwinResult, run_twin

OWNER_NAMES = ("pboc", "tax", "customs")
OWNER_COLUMNS: dict[str, tuple[Column, ...]] = {
    "pboc": (
        Column(name="utilisation", kind="numeric"),
        Column(name="bureau_score", kind="numeric", codes=(-1.0,)),
        Column(name="grade", kind="categorical"),
    ),
    "tax": (Column(name="tax_paid", kind="numeric"), Column(name="late_filings", kind="numeric")),
    "customs": (Column(name="exports", kind="numeric"),),
}
BANK_COLUMNS = (
    Column(name="turnover", kind="numeric"),
    Column(name="overdue_days", kind="numeric", codes=(-99.0, -98.0)),
    Column(name="industry", kind="categorical", categories=("build", "farm", "other", "retail")),
)


def small_federation(banks: int = 3, owners: int = 2, enterprises: int = 1500, seed: int = 7) -> Federation:
    """A federation of `banks` banks and `owners` (1..3) feature owners over `enterprises` enterprises."""
    rng = np.random.default_rng(seed)
    n = enterprises
    # what a leak of ids would look like: 18 characters as a USCC has them, without order
    ids = np.array([f"91{310000 + number % 97:06d}MA{number:07X}K" for number in rng.permutation(n) + 1_000_000])
    risk = rng.normal(size=n)

    def column(scale: float, missing: float) -> npt.NDArray[np.float64]:
        values = np.exp(rng.normal(size=n) * 0.7 + scale * risk + 8.0)
        values[rng.random(n) < missing] = np.nan
        return values

    overdue = np.floor(np.exp(rng.normal(size=n) + 0.8 * risk)).astype(np.float64)
    overdue[rng.random(n) < 0.1] = -99.0
    overdue[rng.random(n) < 0.03] = -98.0
    industry = rng.choice(
        np.array(["retail", "build", "farm", "other", None], dtype=object), n, p=[0.4, 0.3, 0.2, 0.05, 0.05]
    )
    bureau = 600.0 - 40.0 * risk + 30.0 * rng.normal(size=n)
    bureau[rng.random(n) < 0.1] = -1.0
    grade = np.array(["A", "B", "C"], dtype=object)[np.clip(np.digitize(risk + rng.normal(size=n), [-0.5, 0.5]), 0, 2)]
    full = {
        "turnover": column(-0.4, 0.1),
        "overdue_days": overdue,
        "industry": industry,
        "utilisation": column(0.6, 0.05),
        "bureau_score": bureau,
        "grade": grade,
        "tax_paid": column(-0.5, 0.2),
        "late_filings": rng.poisson(np.exp(0.5 * risk)).astype(np.float64),
        "exports": column(-0.3, 0.4),
    }
    label = (rng.random(n) < 1 / (1 + np.exp(1.4 - 1.2 * risk))).astype(np.int8)
    held_out = rng.random(n) < 0.3
    known = {name: rng.random(n) < share for name, share in zip(OWNER_NAMES, (0.9, 0.8, 0.5), strict=True)}
    bank_of = rng.random(n)  # one draw whatever the number of banks
    names = OWNER_NAMES[:owners]
    # every tenth enterprise is no bank's customer, but known to owners
    customer = rng.random(n) >= 0.1
    tables = []
    for number in range(banks):
        mine = customer & (np.floor(bank_of * banks).astype(np.int64) == number)
        columns = {c.name: full[c.name][mine] for c in BANK_COLUMNS}
        tables.append(
            BankTable(
                name=f"bank{number + 1}", ids=ids[mine], label=label[mine], held_out=held_out[mine], columns=columns
            )
        )
    return Federation(
        name="small",
        folder_hash="0" * 64,
        label_holder="bank",
        banks=tuple(tables),
        owners=tuple(
            OwnerTable(
                name=name,
                role="pboc" if name == "pboc" else "public_credit",
                ids=ids[known[name]],
                columns={c.name: full[c.name][known[name]] for c in OWNER_COLUMNS[name]},
            )
            for name in names
        ),
        columns={"bank": BANK_COLUMNS, **{name: OWNER_COLUMNS[name] for name in names}},
        baseline=BaselineSettings(),
        synthetic=True,
        note="generated by the tests",
        warnings=(),
    )


def small_parties(
    federation: Federation,
    *,
    rounds: int = 2,
    epsilon: float | None = None,
    least_banks: int | None = None,
    forward_noise: float = 1.0,
    max_bins: int = 6,
) -> Parties:
    """Parties of a job with few bins, ready to run."""
    settings = ScorecardSettings(
        rounds=rounds,
        max_bins_bank=max_bins,
        max_bins_owner=max_bins,
        forward_noise=forward_noise,
        cross_tabs=epsilon is None,
    )
    spare = 0 if least_banks is None else 2  # a job that may lose banks pays for the reruns in advance
    return make_parties(federation, settings, PrivacyTerms(epsilon=epsilon, spare_attempts=spare), least_banks)


Call = Callable[[bytes], bytes]
Tap = Callable[[str, bytes, Call], bytes]
"""(party, request, the vault's call) -> reply, in place of the wire to a vault; may raise, as a dead node."""


def untouched(party: str, data: bytes, call: Call) -> bytes:
    """The tap of an honest wire."""
    del party
    return call(data)


class LossyGrid(MemoryGrid):
    """A `MemoryGrid` whose silent nodes answer nothing in time: a timeout has no reply at all, not an error reply."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        return [reply for reply in replies if not _is_silent(reply)]


SILENT = b"no answer in time"


def _is_silent(reply: Message) -> bool:
    if reply.has_error() or "payload" not in reply.content.array_records:
        return False
    return from_record(reply.content) == SILENT


def run_tapped(parties: Parties, tap: Tap = untouched, transcript: list[bytes] | None = None) -> Outcome:
    """Drive the job with `tap` on every wire."""
    names = dict(enumerate(parties.vaults, start=10))

    def vault_of(name: str) -> tuple[str, Call]:
        return name, lambda data: tap(name, data, parties.vaults[name].handle)

    app = client_app(lambda context: vault_of(names[context.node_id]))
    grid = LossyGrid(app, {node: {"vault": name} for node, name in names.items()}, transcript)
    return Coordinator(grid=grid, signed=parties.signed, identity=parties.coordinator).run()


class _Halt(BaseException):
    """Not an Exception: the in-memory grid takes those for a dead node."""


def run_until(parties: Parties, step: str) -> dict[str, bytes]:
    """Drive the job up to `step`, which is delivered to nobody; returns every request of that step by party.

    Only for steps whose audience is asked after all others have answered, as the coordinator does it.
    """
    requests: dict[str, bytes] = {}
    audience = next(
        item.audience for exchange in schedule(parties.contract) for item in exchange if item.step.name == step
    )
    expected = {"banks": set(parties.banks), "owners": set(parties.owners), "all": set(parties.vaults)}[audience]

    def tap(party: str, data: bytes, call: Call) -> bytes:
        if decode_request(data, parties.contract).step != step:
            return call(data)
        requests[party] = data
        if set(requests) == expected:
            raise _Halt
        raise ConnectionError("halted")

    with suppress(_Halt):
        run_tapped(parties, tap)
    assert set(requests) == expected
    return requests


def resigned(parties: Parties, data: bytes, **changes: Any) -> bytes:
    """A request with other fields, signed by the coordinator: what a malicious coordinator can send."""
    return encode_request(replace(decode_request(data, parties.contract), **changes), parties.coordinator)


def refusal_of(parties: Parties, party: str, reply: bytes) -> str | None:
    """The reason, if `reply` is a refusal signed by `party` that releases nothing; None if it is an answer."""
    _, body, _, _ = msgpack.unpackb(reply, max_bin_len=1 << 31)
    plain = msgpack.unpackb(body, max_bin_len=1 << 31)
    asked = Request(job=parties.contract.hash, step=plain["step"], attempt=plain["attempt"], participants=())
    answer = decode_reply(reply, parties.contract, party, asked)
    if answer.refused is not None:
        assert (answer.letters, answer.posts, answer.summand, answer.released) == ((), (), None, {})
        assert "\n" not in answer.refused
    return answer.refused


def assert_equals_twin(federation: Federation, parties: Parties, outcome: Outcome) -> None:
    """Every party's model is the twin's: bins, integer weights, intercept. A model that learned nothing fails."""
    twin = twin_of(federation, parties, outcome)
    for name, bank in parties.banks.items():
        model = bank.model()
        assert model["weights"] == twin.bank_weights.tolist(), name
        assert model["intercept"] == twin.intercept, name
        assert model["tower"] == twin.bank.to_json(), name
    for name, owner in parties.owners.items():
        model = owner.model()
        assert model["weights"] == twin.owner_weights[name].tolist(), name
        assert model["tower"] == twin.owners[name].to_json(), name
    # a run in which nothing is learned would be equal as well
    assert any(twin.bank_weights)
    assert all(any(weights) for weights in twin.owner_weights.values())


def twin_of(federation: Federation, parties: Parties, outcome: Outcome) -> TwinResult:
    """The plaintext twin of a run, with the noise that the run drew."""
    return run_twin(
        pool(federation), parties.contract.settings, noise_totals(parties, outcome), outcome.roster.noise_stds
    )


def weights_of(parties: Parties) -> dict[str, list[int]]:
    """Integer weights by party; a bank's intercept last."""
    weights: dict[str, list[int]] = {}
    for name, bank in parties.banks.items():
        model = bank.model()
        weights[name] = [*model["weights"], model["intercept"]]  # type: ignore[misc]
    for name, owner in parties.owners.items():
        weights[name] = list(owner.model()["weights"])  # type: ignore[call-overload]
    return weights


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """One request of a run and its reply, as bytes."""

    party: str
    step: str
    attempt: int
    request: bytes
    reply: bytes


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One thing that a party saw in plaintext, or had before it went out.

    kind: "letter" and "post" (opened mail), "total" (an opened secure sum), "S" (an unmasked aggregate), "answers" (the
    banks' answers and the pads it came from), "z" (an opened blind sum); its own: "v" (a bank's residuals before
    encryption), "part" (an owner's partial scores before masking; sender = the receiving bank), "summand" (a bank's
    noised integers before masks), "cells" (an owner's 0/1 matrix; sender = the bank).
    """

    party: str
    step: str
    kind: str
    sender: str
    content: Any


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """A whole run: what the coordinator handled (`transcript`), every exchange, what each party saw in plaintext."""

    federation: Federation
    parties: Parties
    outcome: Outcome
    transcript: tuple[bytes, ...]
    exchanged: tuple[Exchanged, ...]
    seen: tuple[Seen, ...]
    sessions: Mapping[str, Session]
    training: Mapping[str, LabelledRows]
    """Each bank's training rows in the order of the job; `held_out` likewise."""
    held_out: Mapping[str, LabelledRows]
    aligned: Mapping[str, Mapping[str, npt.NDArray[np.int64]]]
    """Owner -> bank -> this owner's row of each of the bank's rows, training rows first; -1 = unknown."""

    def of(self, kind: str, party: str, step: str | None = None) -> list[Seen]:
        return [s for s in self.seen if (s.kind, s.party) == (kind, party) and step in (None, s.step)]


def record(federation: Federation, parties: Parties, tap: Tap = untouched) -> RecordedRun:
    """Run the job and record it. The taps only look: what the parties compute is unchanged."""
    exchanged: list[Exchanged] = []
    seen: list[Seen] = []
    transcript: list[bytes] = []
    roles = {**parties.banks, **parties.owners}
    # kept here, for the vaults forget them at the end
    sessions = {name: role._session for name, role in roles.items()}
    training = {name: bank._training for name, bank in parties.banks.items()}
    held_out = {name: bank._held_out for name, bank in parties.banks.items()}
    aligned: dict[str, dict[str, npt.NDArray[np.int64]]] = {}
    now = ["", ""]  # party and step being handled; the in-memory grid handles one message at a time

    def note(kind: str, sender: str, content: Any) -> None:
        seen.append(Seen(party=now[0], step=now[1], kind=kind, sender=sender, content=content))

    def watched(party: str, data: bytes, call: Call) -> bytes:
        def inner(passed: bytes) -> bytes:
            request = decode_request(passed, parties.contract)
            now[:] = [party, request.step]
            reply = call(passed)
            exchanged.append(
                Exchanged(party=party, step=request.step, attempt=request.attempt, request=passed, reply=reply)
            )
            return reply

        return tap(party, data, inner)

    letters, posts, open_sum = Session.letters, Session.posts, Bank._open_sum
    share, pack = FeatureOwner._share, secure_sum.pack
    unmask, encrypt, open_blind = blind_aggregate.unmask, blind_aggregate.BankKey.encrypt, blind_sum.open_sum

    def note_letters(self: Session, *args: Any, **kwargs: Any) -> Any:
        contents = letters(self, *args, **kwargs)
        for sender, content in contents.items():
            note("letter", sender, content)
        return contents

    def note_posts(self: Session, *args: Any, **kwargs: Any) -> Any:
        contents = posts(self, *args, **kwargs)
        for sender, content in contents.items():
            note("post", sender, content)
        return contents

    def note_total(self: Bank, request: Request) -> Any:
        total = open_sum(self, request)
        note("total", "", total)
        return total

    def note_unmasked(*args: Any) -> Any:
        sums = unmask(*args)
        owner = parties.owners[now[0]]
        note("answers", "", (args[0], args[1]))
        note("S", "", sums)
        for bank, cells in owner._cells.items():
            note("cells", bank, cells)
        aligned[now[0]] = {
            bank: np.concatenate([rows.training, rows.held_out]) for bank, rows in owner._aligned.items()
        }
        return sums

    def note_encrypted(self: Any, values: Any, packing: int) -> bytes:
        note("v", "", values.copy())
        return encrypt(self, values, packing)

    def note_blind(*args: Any) -> Any:
        total = open_blind(*args)
        note("z", "", total)
        return total

    def note_part(self: FeatureOwner, step: Step, request: Request, bank: str, values: Any) -> Letter:
        note("part", bank, values.copy())
        return share(self, step, request, bank, values)

    def note_summand(values: Any, largest: int, parameters: Any) -> Any:
        note("summand", "", values.copy())
        return pack(values, largest, parameters)

    with (
        patch.object(FeatureOwner, "_share", note_part),
        patch.object(secure_sum, "pack", note_summand),
        patch.object(Session, "letters", note_letters),
        patch.object(Session, "posts", note_posts),
        patch.object(Bank, "_open_sum", note_total),
        patch.object(blind_aggregate, "unmask", note_unmasked),
        patch.object(blind_aggregate.BankKey, "encrypt", note_encrypted),
        patch.object(blind_sum, "open_sum", note_blind),
    ):
        outcome = run_tapped(parties, watched, transcript)
    return RecordedRun(
        federation=federation,
        parties=parties,
        outcome=outcome,
        transcript=tuple(transcript),
        exchanged=tuple(exchanged),
        seen=tuple(seen),
        sessions=sessions,
        training=training,
        held_out=held_out,
        aligned=aligned,
    )
