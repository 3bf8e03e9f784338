"""A bank (label holder) in a job: what it computes and lets out in each step.

Its labels and residuals leave only encrypted under its own key; whatever it adds to a sum carries its noise share and
its pairwise masks; it sees owners' scores only summed over owners and, in training, noised.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from fl_clients.contract import Contract
from fl_clients.data import BankData, Bool, LabelledRows
from fl_clients.matching import Matching, announced_size, without_revoked
from fl_clients.protocol import Audience, Letter, Post, Request, Step, StepKind
from fl_clients.roster import Roster
from fl_clients.session import Session
from fl_clients.vault import Outgoing
from models import line_search, scorecard
from models.binning import Tower, cells
from models.fixed_point import CURVATURE_BITS, RESIDUAL_BITS, logit_of_rate, residual
from models.score_histogram import ScoreHistogram
from models.shared_bins import SharedBinning, fit_shared, level_counts, level_size, with_level
from privacy import blind_aggregate, blind_sum, secure_sum
from privacy.errors import Refused
from privacy.masks import pairwise_mask
from privacy.noise import NoiseSource
from privacy.parameters import rows_per_ciphertext
from privacy.permutation import random_order
from privacy.sealing import encode_fields
from privacy.secure_sum import ConsortiumKey

Int64 = npt.NDArray[np.int64]

NOISY_CELLS_MERGED = 16
"""With epsilon this many neighbouring cells of the score histogram are released as one (costs .0005 AUC)."""

LARGEST_MOMENT = (line_search.CLIP << line_search.DIRECTION_BITS) ** 2 << (CURVATURE_BITS - 2)
"""One row's largest contribution to the line search: q <= 1/4 times two clipped directions."""


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A secure sum that this bank took part in and has not opened."""

    step: str
    attempt: int
    participants: tuple[str, ...]
    length: int
    largest: int


class Bank:
    """SECRET (labels, keys). One bank's role in one job."""

    side: Audience = "banks"

    def __init__(self, *, name: str, contract: Contract, data: BankData, noise: NoiseSource) -> None:
        self._name = name
        self._contract = contract
        self._noise = noise
        self._session = Session(contract, name)
        # a fresh order per job: the file's leaks dates and labels (PROTOCOL rule 11)
        self._consent = data.consent
        data = _consented(data)
        training, held_out = random_order(len(data.training.label)), random_order(len(data.held_out.label))
        self._training = _in_order(data.training, training)
        self._held_out = _in_order(data.held_out, held_out)
        self._ids = [*data.training.ids, *data.held_out.ids]
        self._order = np.concatenate([training, len(training) + held_out])
        self._matching: Matching | None = None
        self.known_rows: dict[str, int] = {}
        """Own rows that each owner knows, once aligned; for this institution's eyes."""
        self._bank_key: blind_aggregate.BankKey | None = None
        self._consortium: ConsortiumKey | None = None
        self._pending: _Pending | None = None
        self._begun: set[Step] = set()
        self._extra: dict[str, int] = {}
        self._salt = os.urandom(32)
        self._opened: tuple[str, bytes] | None = None
        self._confirmed = True
        self._owner_bins: dict[str, int] = {}
        self._shared: SharedBinning | None = None
        self._tower: Tower | None = None
        self._cells: npt.NDArray[np.int32] | None = None
        self._factor: npt.NDArray[np.float64] | None = None
        self._bin_counts: Int64 = np.zeros(0, np.int64)
        self._weights: Int64 = np.zeros(0, np.int64)
        self._step: Int64 = np.zeros(0, np.int64)
        self._intercept = 0
        self._score: Int64 = np.zeros(0, np.int64)
        self._row_step: Int64 | None = None
        self._row_step_scale = 1
        self._directions: list[Int64] = []
        self._scales: list[int] = []
        self._direction: Int64 = np.zeros(0, np.int64)
        self._a: tuple[float, ...] = ()
        self._alphas: tuple[int, ...] = ()
        self._released: Int64 = np.zeros(0, np.int64)
        self.histogram: ScoreHistogram | None = None

    def __repr__(self) -> str:
        return f"Bank({self._name!r})"

    @property
    def roster(self) -> Roster:
        """Everyone's announcements; `Refused` before they are there."""
        return self._session.roster

    def perform(self, step: Step, request: Request) -> Outgoing:
        if step in self._begun:
            self._charge_again(step)
        elif not self._confirmed:
            self._confirm(request)
        outgoing = self._perform(step, request)
        self._begun.add(step)
        return outgoing

    def _charge_again(self, step: Step) -> None:
        """A release that is run again costs once more; the contract says how many are paid for."""
        spare = self._contract.privacy.spare_attempts
        if self._contract.privacy.epsilon is None:
            return
        for release in Roster.released_in(step.name):
            self._extra[release] = self._extra.get(release, 0) + 1
            if self._extra[release] > spare:
                raise Refused(
                    f"step {step.name} would be released again, {self._extra[release]} times beyond the plan; the "
                    f"contract pays for {spare} (spare_attempts): start a new job without the bank that dropped"
                )

    def _perform(self, step: Step, request: Request) -> Outgoing:
        match step.kind:
            case StepKind.JOIN:
                return self._join(request)
            case StepKind.ROSTER:
                return self._make_keys(request)
            case StepKind.MATCH:
                return self._match(step, request)
            case StepKind.BINS:
                return self._bins_level(step, request)
            case StepKind.CROSS_TAB:
                return self._cross_tab(step, request)
            case StepKind.RESIDUAL:
                return self._residual(step, request)
            case StepKind.OPEN:
                return self._open_aggregates(step, request)
            case StepKind.SEARCH:
                return self._search(step, request)
            case StepKind.FINISH:
                return self._finish(step, request)
            case StepKind.EVALUATE:
                return self._evaluate(step, request)
            case StepKind.RELEASE:
                return self._release(step, request)
            case StepKind.CLOSE:
                return Outgoing(released={"model": self.model_digest()})
            case _:
                raise Refused(f"step {step.name} is not for a bank")

    def destroy(self) -> None:
        """Forget keys and rows; the model stays."""
        self._bank_key = None
        self._consortium = None
        self._row_step = None
        self._shared = None
        if self._matching is not None:
            self._matching.erase()
            self._matching = None
        del self._ids, self._order
        del self._session, self._training, self._held_out, self._cells, self._score, self._directions, self._noise

    # --- opening the job -------------------------------------------------------------------------------------------

    def _join(self, request: Request) -> Outgoing:
        training, held_out = len(self._training.label), len(self._held_out.label)
        size = announced_size(self._contract, training + held_out)
        return Outgoing(posts=(self._session.announce(request, size, training, held_out),))

    def _match(self, step: Step, request: Request) -> Outgoing:
        """Private set intersection with every owner; the list is in this job's order, training rows first."""
        if self._matching is None:
            self._take_consortium_key(request)
            self._matching = Matching(self._session, without_revoked(self._ids, self._consent), self._order)
        return Outgoing(letters=self._matching.step(step, request), posts=self._opened_post(request))

    def _take_owner_bins(self, request: Request) -> None:
        owners = [owner.name for owner in self._contract.owners]
        contents = self._session.letters(request, Step(kind=StepKind.PREPARE), owners)
        self._owner_bins = {name: int(content["bins"]) for name, content in contents.items()}

    def _end_matching(self, request: Request) -> None:
        if self._matching is None:
            raise Refused("no alignment yet")
        self._matching.finish(request)
        for owner in self._contract.owners:
            self.known_rows[owner.name] = int(self._matching.known(owner.name).sum())
        self._matching.erase()
        self._matching = None

    def _make_keys(self, request: Request) -> Outgoing:
        """Fresh BFV key for the aggregates; the first bank makes the consortium key and seals it to the others."""
        session = self._session
        session.admit_roster(request)
        self._bank_key = blind_aggregate.BankKey(session.roster.aggregate_parameters)
        posts = [session.post(request, "owners", {"bank_key": self._bank_key.public})]
        letters: list[Letter] = []
        if self._name == request.participants[0]:
            self._consortium = ConsortiumKey(session.roster.sum_parameters)
            fingerprint = self._consortium.fingerprint()
            posts.append(session.post(request, "banks", {"fingerprint": fingerprint, "maker": self._name}))
            secret = {"secret": self._consortium.secret_bytes()}
            letters = [session.letter(request, bank, secret) for bank in request.participants if bank != self._name]
        return Outgoing(posts=tuple(posts), letters=tuple(letters))

    def _take_consortium_key(self, request: Request) -> None:
        """The consortium key: sealed to this bank, its fingerprint signed by its maker."""
        session, roster_step = self._session, Step(kind=StepKind.ROSTER)
        if self._consortium is None:
            maker = self._contract.banks[0].name
            signed = session.posts(request, roster_step, [maker], "banks")[maker]["fingerprint"]
            secret = session.letters(request, roster_step, [maker])[maker]["secret"]
            self._consortium = ConsortiumKey(session.roster.sum_parameters, secret)
            if self._consortium.fingerprint() != signed:
                self._consortium = None
                raise Refused(f"the consortium key is not the one that {maker} signed; stop the job")
        # every bank confirms the key by this digest, compared in the next step like an opened sum
        self._remember(roster_step.name, self._consortium.fingerprint().encode())

    # --- secure sums -----------------------------------------------------------------------------------------------

    def _summand(
        self, step: Step, request: Request, values: Int64, largest: int, stds: Sequence[tuple[int, float]] = ()
    ) -> bytes:
        """Noise share, pairwise masks, encryption. `stds`: (count, total std) by part; `largest`: exact bound."""
        session = self._session
        banks = request.participants
        noised = values.astype(np.int64)
        tail = 0.0
        if stds:
            parts = []
            for part, (count, std) in enumerate(stds):
                share = session.roster.share(std, len(banks))
                tag = f"sum/{step.name}.{part}/{request.attempt}/{self._name}"
                parts.append(self._noise.gaussian(tag, share, count))
                tail = max(tail, 12 * session.roster.total_std(std, len(banks)))
            noised = noised + np.concatenate(parts)
        largest += int(tail) + 1
        parameters = session.roster.sum_parameters
        self._pending = _Pending(
            step=step.name, attempt=request.attempt, participants=banks, length=len(values), largest=largest
        )
        packed = secure_sum.pack(noised, largest, parameters)
        checked = np.append(packed, np.uint64(self._check_value(self._pending, self._name)))
        mask = self._pairwise_mask(step, request, "consortium", len(checked), parameters.log_t)
        return self._key().encrypt((checked + mask) & np.uint64(parameters.mask))

    def _check_value(self, pending: _Pending, bank: str) -> int:
        names = encode_fields(name.encode() for name in pending.participants)
        roster = self._session.roster.digest
        fields = (
            self._contract.hash,
            roster,
            pending.step.encode(),
            str(pending.attempt).encode(),
            names,
            bank.encode(),
        )
        return self._key().check_value(encode_fields(fields))

    def _live(self, rows: LabelledRows) -> Bool:
        return self._consent(rows.ids)

    def _own_key(self) -> blind_aggregate.BankKey:
        if self._bank_key is None:
            raise Refused("no key of this job yet")
        return self._bank_key

    def _key(self) -> ConsortiumKey:
        if self._consortium is None:
            raise Refused("no consortium key yet")
        return self._consortium

    def _pairwise_mask(
        self, step: Step, request: Request, receiver: str, length: int, bits: int
    ) -> npt.NDArray[np.uint64]:
        return pairwise_mask(
            self._name,
            self._session.keys,
            self._session.public_of(request.participants),
            job=self._contract.hash,
            step=step.name,
            attempt=request.attempt,
            participants=request.participants,
            receiver=receiver,
            length=length,
            modulus_bits=bits,
            alone_is_visible=len(self._contract.banks) == 1,
        )

    def _open_sum(self, request: Request) -> Int64:
        """Open the pending secure sum, which this request brings. Once: a step that is run again does not come here."""
        pending = self._pending
        if pending is None:
            raise Refused(f"step {request.step}: no secure sum is pending")
        if request.summed is None:
            raise Refused(f"step {request.step}: the sum of {pending.step} is missing")
        parameters = self._session.roster.sum_parameters
        length = secure_sum.packed_length(pending.length, pending.largest, parameters)
        opened = self._key().open(request.summed, length + 1)
        expected = sum(self._check_value(pending, bank) for bank in pending.participants) & parameters.mask
        if int(opened[-1]) != expected:
            raise Refused(
                f"the sum of {pending.step} is not that of attempt {pending.attempt} and banks "
                f"{list(pending.participants)}: a ciphertext was damaged or the coordinator mixed attempts"
            )
        total = secure_sum.unpack(opened[:-1], pending.length, pending.largest, parameters)
        self._remember(pending.step, total.tobytes())
        self._pending = None
        return total

    def _remember(self, step: str, opened: bytes) -> None:
        self._opened = (step, self._key().digest(opened))
        self._confirmed = len(self._contract.banks) == 1

    def _opened_post(self, request: Request) -> tuple[Post, ...]:
        """The digest of what was opened last, for the other banks (PROTOCOL rule 9)."""
        if self._opened is None:
            return ()
        step, digest = self._opened
        return (self._session.post(request, "banks", {"opened": step, "digest": digest}),)

    def _confirm(self, request: Request) -> None:
        """Every other bank must have opened what this one opened; else somebody was lied to."""
        if self._opened is None:
            raise Refused("nothing was opened that others could confirm")
        step, digest = self._opened
        for bank in request.participants:
            if bank == self._name:
                continue
            told = [
                content["digest"]
                for content in self._session.posts_of(request, bank, "banks")
                if content.get("opened") == step
            ]
            if not told:
                raise Refused(f"{bank} did not confirm the sum of {step}; stop the job")
            if any(other != digest for other in told):
                raise Refused(f"{bank} opened another sum of {step} than {self._name}: the coordinator lied; stop")
        self._confirmed = True

    # --- shared bins -----------------------------------------------------------------------------------------------

    def _bins_level(self, step: Step, request: Request) -> Outgoing:
        session = self._session
        training = self._training
        if step in self._begun:
            pass
        elif step.index == 1:
            self._end_matching(request)
            self._take_owner_bins(request)
            self._shared = SharedBinning(
                specs=tuple(column.spec for column in self._contract.banks[0].columns),
                rows=session.roster.training_rows,
                max_bins=self._contract.model.max_bins_bank,
                least_count=self._contract.model.least_count,
                noise_std=session.roster.noise_stds.bins,
            )
        else:
            self._shared = with_level(self._binning(), self._open_sum(request))
        state = self._binning()
        live = self._live(training)
        columns = {name: values[live] for name, values in training.columns.items()}
        counts = level_counts(state, columns, training.label[live]) if level_size(state) else np.zeros(0, np.int64)
        std = session.roster.std("bins")
        summand = self._summand(
            step, request, counts, session.roster.training_rows, [(len(counts), std)] if std else ()
        )
        return Outgoing(summand=summand, posts=self._opened_post(request))

    def _binning(self) -> SharedBinning:
        if self._shared is None:
            raise Refused("the shared bins have not been begun")
        return self._shared

    def _fit(self, last_level: Int64) -> None:
        self._shared = with_level(self._binning(), last_level)
        self._tower, self._bin_counts = fit_shared(self._shared)
        self._cells = cells(self._tower, self._training.columns)
        self._weights = np.zeros(self._tower.rows, np.int64)
        self._step = np.zeros(self._tower.rows, np.int64)
        self._intercept = logit_of_rate(self._shared.positives, self._session.roster.training_rows)
        self._score = np.full(len(self._training.label), self._intercept, np.int64)

    def _cross_tab(self, step: Step, request: Request) -> Outgoing:
        if step not in self._begun:
            self._fit(self._open_sum(request))
        tower, own = self._fitted()
        counts = scorecard.upper(scorecard.cross_tab(own[self._live(self._training)], tower.rows))
        summand = self._summand(step, request, counts, self._session.roster.training_rows)
        return Outgoing(summand=summand, posts=self._opened_post(request))

    def _fitted(self) -> tuple[Tower, npt.NDArray[np.int32]]:
        if self._tower is None or self._cells is None:
            raise Refused("the bank tower has no bins yet")
        return self._tower, self._cells

    def _precondition(self, total: Int64) -> None:
        settings, roster = self._contract.settings, self._session.roster
        if settings.cross_tabs:
            cross = scorecard.from_upper(total, self._fitted()[0].rows)
        else:
            self._fit(total)
            cross = scorecard.diagonal_blocks(self._fitted()[0], self._bin_counts)
        base_rate = Fraction(self._binning().positives, roster.training_rows)
        self._factor = scorecard.preconditioner(
            cross, self._fitted()[0], base_rate, settings.penalty, roster.noise_stds.gradient
        )

    # --- a round ---------------------------------------------------------------------------------------------------

    def _residual(self, step: Step, request: Request) -> Outgoing:
        """Encrypt v for the owners; the bank tower's own sums go into a secure sum."""
        session = self._session
        if step not in self._begun:
            total = self._open_sum(request)
            if step.round_number == 1:
                self._precondition(total)
            else:
                self._end_round(total, step.round_number - 1)
        owners = [owner.name for owner in self._contract.owners]
        # a row whose consent was revoked meanwhile counts for nothing from here on
        values = np.where(self._live(self._training), residual(self._score, self._training.label), 0)
        tower, own = self._fitted()
        packing = self._packing()
        encrypted = self._own_key().encrypt(values, packing)
        posts = [session.post(request, "owners", {"residual": encrypted, "rows_per_ciphertext": packing})]
        first = step.round_number == 1
        news: dict[str, object] = {"positives": self._binning().positives} if first else {"alphas": list(self._alphas)}
        letters = [session.letter(request, owner, news) for owner in owners]
        own_sums = scorecard.gather(own, values, tower.rows)
        std = session.roster.std("sums") * (1 << RESIDUAL_BITS)
        largest = session.roster.training_rows << RESIDUAL_BITS
        summand = self._summand(step, request, own_sums, largest, [(tower.rows, std)] if std else ())
        return Outgoing(posts=(*posts, *self._opened_post(request)), letters=tuple(letters), summand=summand)

    def _packing(self) -> int:
        return rows_per_ciphertext(
            bank_rows=len(self._training.label),
            matrix_rows=sum(self._owner_bins.values()),
            owners=len(self._owner_bins),
        )

    def _open_aggregates(self, step: Step, request: Request) -> Outgoing:
        """Decrypt the owners' masked products; return them with noise share and pairwise masks, sealed to the owner."""
        session = self._session
        parameters = session.roster.aggregate_parameters
        aggregate = Step(kind=StepKind.AGGREGATE, round_number=step.round_number)
        contents = session.letters(request, aggregate, self._owner_bins, same_exchange=True)
        letters = []
        key = self._own_key()
        for owner, bins in self._owner_bins.items():
            layout = blind_aggregate.Layout(
                samples=len(self._training.label),
                rows=bins,
                rows_per_ciphertext=self._packing(),
                degree=parameters.degree,
            )
            answer = key.open(contents[owner]["product"], layout)
            std = session.roster.std("sums") * (1 << RESIDUAL_BITS)
            if std:
                share = session.roster.share(std, len(request.participants))
                tag = f"sum/r{step.round_number}.owner.{owner}/{request.attempt}/{self._name}"
                noise = self._noise.gaussian(tag, share, bins)
                answer = answer + blind_aggregate.to_residues(noise, parameters)
            answer = answer + self._pairwise_mask(step, request, owner, bins, parameters.log_t)
            answer = answer & np.uint64(parameters.mask)
            letters.append(session.letter(request, owner, {"answer": answer.astype("<u8").tobytes()}))
        return Outgoing(letters=tuple(letters))

    def _search(self, step: Step, request: Request) -> Outgoing:
        """One inner step of the line search: the sums of gradient and curvature at the present step sizes."""
        session = self._session
        if step not in self._begun:
            total = self._open_sum(request)
            if step.index == 1:
                self._begin_search(step, request, total)
            else:
                self._a = self._update(total, step.round_number)
        rows = line_search.design(self._directions, self._scales)
        trial = line_search.advance(self._score, self._directions, line_search.alphas(self._a, self._scales))
        live = self._live(self._training)
        values = line_search.moments(rows[live], trial[live], self._training.label[live])
        gradient, curvature = self._search_stds(step.round_number)
        k = len(self._a)
        stds = [(k, gradient), (len(values) - k, curvature)] if gradient else ()
        largest = session.roster.training_rows * LARGEST_MOMENT
        summand = self._summand(step, request, values, largest, stds)
        return Outgoing(summand=summand, posts=self._opened_post(request))

    def _search_stds(self, round_number: int) -> tuple[float, float]:
        roster = self._session.roster
        return roster.std(f"search.{round_number}.gradient"), roster.std(f"search.{round_number}.curvature")

    def _begin_search(self, step: Step, request: Request, own_sums: Int64) -> None:
        session = self._session
        direction_step = Step(kind=StepKind.DIRECTION, round_number=step.round_number)
        contents = session.letters(request, direction_step, self._owner_bins)
        rows = len(self._training.label)
        shares = [contents[owner]["share"] for owner in self._owner_bins]
        # the last number is the sum of the owners' spreads: it scales the clipping of the line search
        summed = blind_sum.open_sum(shares, rows + 1)
        owners_direction, owners_spread = summed[:-1], int(summed[-1])
        tower, own = self._fitted()
        if self._factor is None:
            raise Refused("the bank tower has no preconditioner yet")
        self._direction = scorecard.direction(
            self._factor, own_sums, self._weights, tower, self._contract.settings.penalty
        )
        bound = scorecard.spread_bound(tower, self._bin_counts, self._direction, session.roster.training_rows)
        self._directions = [scorecard.apply(own, self._direction), owners_direction]
        self._scales = [bound, line_search.owner_scale([owners_spread], self._contract.settings.forward_noise)]
        if self._row_step is not None:
            self._directions.append(self._row_step)
            self._scales.append(self._row_step_scale)
        self._a = (0.0,) * (len(self._directions) + 1)

    def _update(self, total: Int64, round_number: int) -> tuple[float, ...]:
        roster = self._session.roster
        return line_search.update(self._a, total, roster.training_rows, *roster.noise_stds.search_of(round_number))

    def _end_round(self, total: Int64, round_number: int) -> None:
        """The last sum of a line search: fix the step sizes, take the step."""
        self._a = self._update(total, round_number)
        self._alphas = line_search.alphas(self._a, self._scales)
        self._score = line_search.advance(self._score, self._directions, self._alphas)
        self._row_step = line_search.total_step(self._directions, self._alphas)
        self._row_step_scale = line_search.previous_scale(self._alphas, self._scales)
        previous = self._alphas[2] if len(self._alphas) == 4 else 0
        self._weights, self._step = scorecard.take_step(
            self._weights, self._direction, self._step, self._alphas[0], previous
        )
        self._intercept += self._alphas[-1]

    def _finish(self, step: Step, request: Request) -> Outgoing:
        if step not in self._begun:
            self._end_round(self._open_sum(request), self._contract.model.rounds)
        letters = [self._session.letter(request, owner, {"alphas": list(self._alphas)}) for owner in self._owner_bins]
        return Outgoing(letters=tuple(letters), posts=self._opened_post(request))

    # --- held-out rows ---------------------------------------------------------------------------------------------

    def _evaluate(self, step: Step, request: Request) -> Outgoing:
        """Score the held-out rows by an exact blind sum; their histogram goes into a secure sum."""
        session = self._session
        contents = session.letters(request, Step(kind=StepKind.SCORE), self._owner_bins)
        held_out: LabelledRows = self._held_out
        shares = [contents[owner]["share"] for owner in self._owner_bins]
        tower, _ = self._fitted()
        score = self._intercept + scorecard.apply(cells(tower, held_out.columns), self._weights)
        live = self._live(held_out)
        # the scores of enterprises that revoked meanwhile are dropped unseen
        score = np.where(live, score + blind_sum.open_sum(shares, len(held_out.label)), 0)
        histogram = ScoreHistogram.of(score[live], held_out.label[live])
        std = session.roster.std("histogram")
        # noise adds up over cells: with epsilon fewer, wider cells measure better
        vector = (histogram.merged(NOISY_CELLS_MERGED) if std else histogram).to_vector()
        announced = session.roster.announcements.values()
        largest = max(1, sum(announcement.held_out_rows for announcement in announced))
        summand = self._summand(step, request, vector, largest, [(len(vector), std)] if std else ())
        return Outgoing(summand=summand)

    def _release(self, step: Step, request: Request) -> Outgoing:
        """Open the pooled histogram; the contract lets the coordinator have it."""
        if step not in self._begun:
            self._released = self._open_sum(request)
            self.histogram = ScoreHistogram.from_vector(self._released)
        return Outgoing(released={"histogram": self._released.tolist()}, posts=self._opened_post(request))

    # --- what the institution keeps --------------------------------------------------------------------------------

    def model(self) -> dict[str, object]:
        """The bank tower, for the institution's own model file: bins and integer weights (2^-16 logit)."""
        if self._tower is None:
            raise Refused("no model yet; train first")
        return {
            "party": self._name,
            "contract": self._contract.hash.hex(),
            "tower": self._tower.to_json(),
            "weights": self._weights.tolist(),
            "intercept": self._intercept,
            "salt": self._salt.hex(),
        }

    def model_digest(self) -> str:
        return hashlib.sha256(repr(sorted(self.model().items(), key=lambda item: item[0])).encode()).hexdigest()


def _consented(data: BankData) -> BankData:
    """Only enterprises with live consent take part in anything."""
    parts = []
    for rows in (data.training, data.held_out):
        live = data.consent(rows.ids)
        columns = {name: values[live] for name, values in rows.columns.items()}
        ids = [name for name, is_live in zip(rows.ids, live.tolist(), strict=True) if is_live]
        parts.append(LabelledRows(ids=ids, label=rows.label[live], columns=columns))
    if not len(parts[0].label):
        raise Refused("no enterprise has live consent for the job's purpose; import the consents first")
    return BankData(training=parts[0], held_out=parts[1], consent=data.consent)


def _in_order(rows: LabelledRows, order: Int64) -> LabelledRows:
    return LabelledRows(
        ids=[rows.ids[at] for at in order.tolist()],
        label=rows.label[order],
        columns={name: values[order] for name, values in rows.columns.items()},
    )
