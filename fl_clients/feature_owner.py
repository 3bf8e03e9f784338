"""A feature owner (PBOC, public credit) in a job: what it computes and lets out in each step.

Its features, bins and weights never leave. It sees sums over banks of residuals in its own bins; banks see its scores
only summed with those of the other owners and, in training, noised.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from fl_clients.contract import Contract
from fl_clients.data import AlignedRows, Bool, OwnerData
from fl_clients.matching import Matching, announced_size, without_revoked
from fl_clients.protocol import Audience, Letter, Request, Step, StepKind
from fl_clients.roster import Roster
from fl_clients.session import Session
from fl_clients.vault import Openings, Outgoing
from models import scorecard
from models.binning import Tower, cells, fit_column
from models.fixed_point import RESIDUAL_BITS
from privacy import blind_aggregate, blind_sum
from privacy.errors import Refused
from privacy.masks import OneTimePad, pairwise_mask
from privacy.noise import ForwardNoise

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


LEAST_ROWS_PER_BIN = 20
"""Outside simulation: aligned rows at least this many times the used bins, which bound the rank of A."""


class FeatureOwner:
    """SECRET (features, pads, weights). One feature owner's role in one job."""

    side: Audience = "owners"

    def __init__(self, *, name: str, contract: Contract, data: OwnerData, noise: ForwardNoise) -> None:
        self._name = name
        self._contract = contract
        live = data.consent(data.ids)
        self._data = OwnerData(
            ids=[name for name, is_live in zip(data.ids, live.tolist(), strict=True) if is_live],
            columns={column: values[live] for column, values in data.columns.items()},
            consent=data.consent,
        )
        self._noise = noise
        self._session = Session(contract, name)
        self._begun: set[Step] = set()
        self._salt = os.urandom(32)
        self._pads = OneTimePad()
        self._matching: Matching | None = None
        self._aligned: dict[str, AlignedRows] = {}
        self._tower: Tower | None = None
        self._cells: dict[str, Int32] = {}
        self._cross_tab: Int64 = np.zeros((0, 0), np.int64)
        self._factor: npt.NDArray[np.float64] | None = None
        self._bank_keys: dict[str, bytes] = {}
        self._designs: dict[str, blind_aggregate.OwnerDesign] = {}
        self._weights: Int64 = np.zeros(0, np.int64)
        self._step: Int64 = np.zeros(0, np.int64)
        self._direction: Int64 = np.zeros(0, np.int64)
        self._steps_taken = 0

    def __repr__(self) -> str:
        return f"FeatureOwner({self._name!r})"

    @property
    def roster(self) -> Roster:
        """Everyone's announcements; `Refused` before they are there."""
        return self._session.roster

    def perform(self, step: Step, request: Request) -> Outgoing:
        outgoing = self._perform(step, request)
        self._begun.add(step)
        return outgoing

    def _perform(self, step: Step, request: Request) -> Outgoing:
        match step.kind:
            case StepKind.JOIN:
                size = announced_size(self._contract, len(self._data.ids))
                return Outgoing(posts=(self._session.announce(request, size),))
            case StepKind.ROSTER:
                self._session.admit_roster(request)
                return Outgoing()
            case StepKind.MATCH:
                if self._matching is None:
                    self._take_bank_keys(request)
                    ids = without_revoked(self._data.ids, self._data.consent)
                    self._matching = Matching(self._session, ids, None)
                return Outgoing(letters=self._matching.step(step, request))
            case StepKind.PREPARE:
                return self._prepare(request)
            case StepKind.AGGREGATE:
                return self._aggregate(step, request)
            case StepKind.DIRECTION:
                return self._find_direction(step, request)
            case StepKind.SCORE:
                return self._score(step, request)
            case StepKind.CLOSE:
                return Outgoing(released={"model": self.model_digest()})
            case _:
                raise Refused(f"step {step.name} is not for a feature owner")

    def destroy(self) -> None:
        """Forget keys, pads and rows; the model stays."""
        if self._matching is not None:
            self._matching.erase()
            self._matching = None
        self._cross_tab = np.zeros((0, 0), np.int64)
        del self._session, self._pads, self._data, self._aligned, self._cells, self._designs, self._noise

    def _prepare(self, request: Request) -> Outgoing:
        """Fit the bins, place every bank's rows in them; the banks learn how many bins there are."""
        session, contract = self._session, self._contract
        if self._matching is None:
            raise Refused("no alignment yet")
        self._matching.finish(request)
        for bank in contract.banks:
            rows, training = self._matching.rows(bank.name), session.roster.announcements[bank.name].training_rows
            self._aligned[bank.name] = AlignedRows(training=rows[:training], held_out=rows[training:])
        self._matching.erase()
        self._matching = None
        self._check_sharing()
        live = self._live()
        for bank in contract.banks:
            self._drop_revoked(bank.name, live)
        if not any((aligned.training >= 0).any() for aligned in self._aligned.values()):
            raise Refused(f"no enterprise of the banks is known to {self._name}; leave it out of the job")
        model = contract.model
        # bins from all rows of the owner's own table; no label and no bank's list takes part
        self._tower = Tower(
            features=tuple(
                fit_column(column.spec, self._data.columns[column.name], model.max_bins_owner, model.least_count)
                for column in contract.party(self._name).columns
            ),
            has_no_file=True,
        )
        self._cells = {bank.name: self._place(bank.name, held_out=False) for bank in contract.banks}
        bins = self._tower.rows
        self._cross_tab = np.sum([scorecard.cross_tab(own, bins) for own in self._cells.values()], axis=0)
        self._check_rows()
        self._weights = np.zeros(bins, np.int64)
        self._step = np.zeros(bins, np.int64)
        letters = [session.letter(request, bank, {"bins": bins}) for bank in request.participants]
        return Outgoing(letters=tuple(letters), openings=self._openings())

    def _openings(self) -> tuple[Openings, ...]:
        """What the banks will see of scores: each round of every known training row, the held-out rows once."""

        def known(kind: str, times: int, rows: list[Int64]) -> Openings:
            index = np.concatenate(rows)
            return Openings(kind=kind, ids=[self._data.ids[at] for at in index[index >= 0].tolist()], times=times)

        aligned = self._aligned.values()
        return (
            known("noised direction", self._contract.model.rounds, [one.training for one in aligned]),
            known("exact score", 1, [one.held_out for one in aligned]),
        )

    def _check_sharing(self) -> None:
        """With epsilon no enterprise may be known to more banks than the noise was made for."""
        privacy = self._contract.privacy
        if privacy.epsilon is None:
            return
        times = np.zeros(len(self._data.ids), np.int64)
        for aligned in self._aligned.values():
            rows = np.concatenate([aligned.training, aligned.held_out])
            times[rows[rows >= 0]] += 1
        if times.size and int(times.max()) > privacy.banks_per_enterprise:
            raise Refused(
                f"some enterprises are customers of more than {privacy.banks_per_enterprise} banks: epsilon would not "
                "hold for them; raise banks_per_enterprise in the contract"
            )

    def _live(self) -> Bool:
        return self._data.consent(self._data.ids)

    def _drop_revoked(self, bank: str, live: Bool) -> bool:
        """Enterprises without live consent are unknown from here on; says whether training rows were among them."""

        def kept(rows: Int64) -> Int64:
            return np.where((rows >= 0) & live[np.maximum(rows, 0)], rows, -1)

        before = self._aligned[bank]
        self._aligned[bank] = AlignedRows(training=kept(before.training), held_out=kept(before.held_out))
        return not np.array_equal(self._aligned[bank].training, before.training)

    def _check_rows(self) -> None:
        """Too few aligned rows for the number of bins would let an owner solve for labels (PROTOCOL)."""
        used = int(np.count_nonzero(np.diagonal(self._cross_tab)))
        known = sum(int((cells[:, 0] >= 0).sum()) for cells in self._cells.values())
        if not self._contract.simulation and known < LEAST_ROWS_PER_BIN * used:
            raise Refused(
                f"fewer than {LEAST_ROWS_PER_BIN} aligned rows a used bin of {self._name}, which outside simulation "
                "would let it solve for labels: use fewer columns or bins, or more customers"
            )

    def _place(self, bank: str, held_out: bool) -> Int32:
        aligned = self._aligned[bank]
        index = aligned.held_out if held_out else aligned.training
        known = index >= 0
        columns = {name: values[np.where(known, index, 0)] for name, values in self._data.columns.items()}
        return cells(self._fitted(), columns, known)

    def _fitted(self) -> Tower:
        if self._tower is None:
            raise Refused(f"{self._name} has no bins yet")
        return self._tower

    def _aggregate(self, step: Step, request: Request) -> Outgoing:
        """Encrypted residuals times this owner's 0/1 matrix, masked and flooded, back to each bank."""
        session = self._session
        residual_step = Step(kind=StepKind.RESIDUAL, round_number=step.round_number)
        banks = request.participants
        news = session.letters(request, residual_step, banks, same_exchange=True)
        residuals = session.posts(request, residual_step, banks, "owners", same_exchange=True)
        if step.round_number == 1:
            self._precondition(self._agreed(news, "positives"))
            self._make_designs(request, residuals)
        else:
            self._take_step(step.round_number - 1, self._agreed(news, "alphas"))
        parameters = session.roster.aggregate_parameters
        self._pads.erase(step.name)
        self._forget_revoked(banks)
        letters = []
        for bank in banks:
            design = self._designs[bank]
            pad = self._pads.take(step.name, request.attempt, bank, design.layout.rows, parameters.log_t)
            product = design.multiply(residuals[bank]["residual"], pad)
            letters.append(session.letter(request, bank, {"product": product}))
        return Outgoing(letters=tuple(letters))

    def _forget_revoked(self, banks: Sequence[str]) -> None:
        """Rows whose consent was revoked since the last round leave the matrix."""
        live = self._live()  # asked once a step: a large register takes seconds
        for bank in banks:
            if not self._drop_revoked(bank, live):
                continue
            self._cells[bank] = self._place(bank, held_out=False)
            old = self._designs[bank]
            self._designs[bank] = blind_aggregate.OwnerDesign(
                self._cells[bank], old.layout, old.parameters, self._bank_keys[bank]
            )

    def _agreed(self, news: Mapping[str, dict[str, object]], what: str) -> object:
        told = {bank: content.get(what) for bank, content in news.items()}
        first = next(iter(told.values()))
        if first is None or any(other != first for other in told.values()):
            raise Refused(f"the banks {sorted(told)} tell {self._name} different {what}; somebody is wrong, stop")
        return first

    def _precondition(self, positives: object) -> None:
        roster = self._session.roster
        rows = roster.training_rows
        if not isinstance(positives, int) or not 0 < positives < rows:
            raise Refused(f"a number of positives outside 1..{rows - 1}; the banks' base rate is damaged")
        self._factor = scorecard.preconditioner(
            self._cross_tab,
            self._fitted(),
            Fraction(positives, rows),
            self._contract.settings.penalty,
            roster.noise_stds.gradient,
        )

    def _take_bank_keys(self, request: Request) -> None:
        keys = self._session.posts(request, Step(kind=StepKind.ROSTER), request.participants, "owners")
        self._bank_keys = {bank: content["bank_key"] for bank, content in keys.items()}

    def _make_designs(self, request: Request, residuals: Mapping[str, dict[str, object]]) -> None:
        parameters = self._session.roster.aggregate_parameters
        for bank in request.participants:
            packing = int(str(residuals[bank]["rows_per_ciphertext"]))
            layout = blind_aggregate.Layout(
                samples=len(self._cells[bank]),
                rows=self._fitted().rows,
                rows_per_ciphertext=packing,
                degree=parameters.degree,
            )
            design = blind_aggregate.OwnerDesign(self._cells[bank], layout, parameters, self._bank_keys[bank])
            self._designs[bank] = design

    def _take_step(self, round_number: int, alphas: object) -> None:
        """Once per round: a step that is run again brings the same step sizes."""
        if self._steps_taken >= round_number:
            return
        if not isinstance(alphas, list) or len(alphas) != (3 if round_number == 1 else 4):
            raise Refused(f"step sizes of round {round_number} have the wrong form")
        previous = int(alphas[2]) if len(alphas) == 4 else 0
        self._weights, self._step = scorecard.take_step(
            self._weights, self._direction, self._step, int(alphas[1]), previous
        )
        self._steps_taken = round_number

    def _find_direction(self, step: Step, request: Request) -> Outgoing:
        """Unmask S, solve for the direction, hand every bank its customers' part: noised, masked, sealed."""
        session = self._session
        parameters = session.roster.aggregate_parameters
        open_step = Step(kind=StepKind.OPEN, round_number=step.round_number)
        aggregate = Step(kind=StepKind.AGGREGATE, round_number=step.round_number).name
        contents = session.letters(request, open_step, request.participants)
        bins = self._fitted().rows
        answers, pads = [], []
        for bank in request.participants:
            answer = np.frombuffer(contents[bank]["answer"], dtype="<u8")
            if answer.shape != (bins,):
                raise Refused(f"{bank} answered {answer.size} sums for {bins} bins")
            answers.append(answer)
            pads.append(self._pads.recall(aggregate, bank))
        sums = blind_aggregate.unmask(answers, pads, parameters)
        banks = len(request.participants)
        noise_std = session.roster.total_std(session.roster.std("sums") * (1 << RESIDUAL_BITS), banks)
        limit = (session.roster.rows(request.participants) << RESIDUAL_BITS) + 12 * noise_std + 1
        if int(np.abs(sums).max()) > limit:
            raise Refused(
                "the unmasked sums leave their bound: an answer was damaged or the banks' masks do not cancel"
            )
        self._pads.erase(aggregate)
        settings = self._contract.settings
        if self._factor is None:
            raise Refused(f"{self._name} has no preconditioner yet")
        self._direction = scorecard.direction(self._factor, sums, self._weights, self._fitted(), settings.penalty)
        spread = scorecard.spread(self._cross_tab, self._direction, session.roster.training_rows)
        std = round(settings.forward_noise * spread)
        noise = self._noise.draw(f"forward/r{step.round_number}/{self._name}", len(self._data.ids), std)
        letters = []
        for bank in request.participants:
            index = self._aligned[bank].training
            part = scorecard.apply(self._cells[bank], self._direction)
            part = part + np.where(index >= 0, noise[np.maximum(index, 0)], 0)
            letters.append(self._share(step, request, bank, np.append(part, np.int64(spread))))
        return Outgoing(letters=tuple(letters))

    def _share(self, step: Step, request: Request, bank: str, values: Int64) -> Letter:
        owners = tuple(owner.name for owner in self._contract.owners)
        mask = pairwise_mask(
            self._name,
            self._session.keys,
            self._session.public_of(owners),
            job=self._contract.hash,
            step=step.name,
            attempt=request.attempt,
            participants=owners,
            receiver=bank,
            length=len(values),
            modulus_bits=blind_sum.MODULUS_BITS,
            alone_is_visible=len(owners) == 1,
        )
        return self._session.letter(request, bank, {"share": blind_sum.masked_share(values, mask, len(owners))})

    def _score(self, step: Step, request: Request) -> Outgoing:
        """The last step sizes; then exact partial scores of the held-out rows, summed blindly over owners."""
        news = self._session.letters(request, Step(kind=StepKind.FINISH), request.participants)
        self._take_step(self._contract.model.rounds, self._agreed(news, "alphas"))
        if step not in self._begun:
            # once: scoring again with one enterprise less would give this owner's part of it by difference
            live = self._live()
            for bank in request.participants:
                self._drop_revoked(bank, live)
        letters = []
        for bank in request.participants:
            part = scorecard.apply(self._place(bank, held_out=True), self._weights)
            letters.append(self._share(step, request, bank, part))
        return Outgoing(letters=tuple(letters))

    def model(self) -> dict[str, object]:
        """The owner's tower, for its own model file: bins and integer weights (2^-16 logit)."""
        return {
            "party": self._name,
            "contract": self._contract.hash.hex(),
            "tower": self._fitted().to_json(),
            "weights": self._weights.tolist(),
            "salt": self._salt.hex(),
        }

    def model_digest(self) -> str:
        return hashlib.sha256(repr(sorted(self.model().items(), key=lambda item: item[0])).encode()).hexdigest()
