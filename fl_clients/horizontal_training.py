"""A bank's app in a horizontal job: prepares its rows, trains, counts its scores. `secure_mod` wraps it.

    rounds 1 and 2      nobody trains; the evaluation sums the statistics that make the inputs (`models.standardising`)
    rounds 3 ...        train from the shared parameters; the evaluation sums two score histograms: validation, held out
Guarantee: only what `secure_mod` encrypts leaves. With `personalised` the last layer never leaves the bank,
and after the last round each bank trains on by itself, as far as its own validation rows gain.
Every bank stops by itself, and all in the same round, when the AUC of the summed validation histogram has not risen for
`patience` rounds; then updates are zero. The best round's parameters are the result, and each bank picks them itself.
Every step is a pure function of (parameters, rows, plan, bank, round), so the plaintext twin uses the same ones.
Sources: Arivazhagan et al. 2019 (personal layers), Wang et al. 2019 (training on by oneself).
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from pydantic import BaseModel, ConfigDict, Field

from fl_clients.data import BankData, LabelledRows
from fl_clients.horizontal_terms import HorizontalTerms
from fl_clients.secure_mod import MODEL, BankOf, ServerStep, bank_from_node_config, opened_counts, secure_mod
from models import standardising
from models.binning import ColumnSpec
from models.errors import DataError
from models.fixed_point import SCORE_BITS
from models.local_training import LocalSettings, train
from models.nets import NetKind, NetSpec, head_size, initial_vector, net_spec, scores
from models.score_histogram import EDGES, ScoreHistogram
from models.server_optimisers import fed_adam, fed_avg, fed_yogi
from models.standardising import PASSES, Inputs, Preparation
from privacy.errors import Refused

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

VALIDATION_SHARE = 0.15
OWN_ROUNDS = 20
"""How often a bank goes over its rows by itself at the end of a personalised job."""

HISTOGRAM = 2 * (len(EDGES) - 1)
"""Numbers of one score histogram; an evaluation brings validation and held out, one after the other."""

_KEPT = "xinyi.training"
STEPS: Mapping[str, ServerStep] = {"fedavg": fed_avg, "fedprox": fed_avg, "fedadam": fed_adam, "fedyogi": fed_yogi}


class TrainingPlan(BaseModel):
    """What all banks train. `digest` stands in the purpose of the terms; `columns`: the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    net: NetKind
    strategy: str = Field(default="fedavg", pattern="^(fedavg|fedprox|fedadam|fedyogi)$")
    columns: tuple[ColumnSpec, ...] = Field(min_length=1)
    personalised: bool = False
    rounds: int = Field(default=20, ge=1, le=500)
    """Rounds of training, without the two that prepare the inputs."""
    patience: int = Field(default=6, ge=1)
    passes: int = Field(default=1, ge=1, le=100)
    learning_rate: float = Field(default=0.002, gt=0, le=1)
    proximal: float = Field(default=0.1, ge=0)
    """Strength of FedProx; without effect under the other strategies."""
    seed: int = Field(default=42, ge=0)
    """Of the first parameters and of the order of rows; it protects nothing."""

    @property
    def digest(self) -> str:
        """SHA-256 of the plan, hex."""
        return hashlib.sha256(b"xinyi training plan 1\x00" + self.model_dump_json().encode()).hexdigest()

    @property
    def spec(self) -> NetSpec:
        return net_spec(self.net, self.columns)

    @property
    def local(self) -> LocalSettings:
        proximal = self.proximal if self.strategy == "fedprox" else 0.0
        return LocalSettings(passes=self.passes, learning_rate=self.learning_rate, proximal=proximal)

    @property
    def own_local(self) -> LocalSettings:
        """Of a bank that trains on by itself."""
        return LocalSettings(passes=self.passes, learning_rate=self.learning_rate)

    @property
    def server_step(self) -> ServerStep:
        return STEPS[self.strategy]

    @property
    def all_rounds(self) -> int:
        """Rounds of the job."""
        return PASSES + self.rounds

    @property
    def counts(self) -> int:
        """Integers of an evaluation."""
        return max(2 * HISTOGRAM, standardising.counts_length(self.columns))

    def initial(self) -> tuple[Float32, Float32]:
        """(shared, own) parameters at the start; `own` is the last layer if personalised, else empty."""
        vector = initial_vector(self.spec, self.seed)
        shared = len(vector) - (head_size(self.spec) if self.personalised else 0)
        if shared == 0:
            raise Refused(f"a personalised {self.net} network without categories shares nothing; choose mlp or resnet")
        return vector[:shared], vector[shared:]

    def seed_of(self, bank: str, number: int) -> int:
        """Seed of a bank's order of rows in a round."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}|{number}|{bank}".encode()).digest()[:8], "big")


@dataclass(frozen=True, kw_only=True, repr=False)
class BankRows:
    """SECRET. A bank's rows as networks take them, with labels. Validation rows are taken from the training rows."""

    training: tuple[Inputs, npt.NDArray[np.int8]]
    validation: tuple[Inputs, npt.NDArray[np.int8]]
    held_out: tuple[Inputs, npt.NDArray[np.int8]]


@dataclass(frozen=True, kw_only=True, repr=False)
class Best:
    """The best round so far: its parameters and its validation AUC; -1 before the first."""

    shared: Float32
    own: Float32
    auc: float = -1.0
    round_number: int = 0

    def after(self, number: int, counts: Int64, shared: Float32, own: Float32) -> "Best":
        """With the opened counts of round `number` and the parameters they were made from."""
        now = validation_auc(counts)
        return Best(shared=shared, own=own, auc=now, round_number=number) if now > self.auc else self

    def is_over(self, number: int, patience: int) -> bool:
        """Whether the evaluation of round `number` says to stop."""
        return number > PASSES and number - max(self.round_number, PASSES) >= patience


def histograms(counts: Int64) -> tuple[ScoreHistogram, ScoreHistogram]:
    """(validation, held out) of the opened counts of a round after the preparation."""
    return (
        ScoreHistogram.from_vector(counts[:HISTOGRAM]),
        ScoreHistogram.from_vector(counts[HISTOGRAM : 2 * HISTOGRAM]),
    )


def validation_auc(counts: Int64) -> float:
    """AUC of the summed validation rows; -1 where one class is absent."""
    validation, _ = histograms(counts)
    return validation.auc() if validation.is_usable else -1.0


def statistics(plan: TrainingPlan, table: LabelledRows, number: int, first: Int64) -> Int64:
    """Counts of preparation round `number` (1 or 2), int64[plan.counts]. `first`: the opened sums of round 1."""
    made = (
        standardising.first_pass(plan.columns, table.columns)
        if number == 1
        else standardising.second_pass(plan.columns, table.columns, first[: _first_length(plan)])
    )
    return _padded(plan, made)


def preparation(plan: TrainingPlan, opened: Mapping[str, Int64]) -> Preparation:
    """From the opened counts of the two preparation rounds, by step."""
    first, second = (opened[f"evaluate.{number}"] for number in range(1, PASSES + 1))
    length = standardising.counts_length(plan.columns)
    return standardising.prepare(plan.columns, first[: _first_length(plan)], second[:length])


def bank_rows(prepared: Preparation, data: BankData) -> BankRows:
    """Cut and prepare a bank's rows. Validation: the VALIDATION_SHARE of the training ids with the smallest hash."""
    inputs = prepared.inputs(data.training.columns)
    keys = [hashlib.sha256(f"validation|{identifier}".encode()).digest() for identifier in data.training.ids]
    chosen = np.array([key[0] * 256 + key[1] < VALIDATION_SHARE * 65536 for key in keys], np.bool_)
    label = data.training.label
    return BankRows(
        training=(inputs.take(~chosen), label[~chosen]),
        validation=(inputs.take(chosen), label[chosen]),
        held_out=(prepared.inputs(data.held_out.columns), data.held_out.label),
    )


def trained(
    plan: TrainingPlan, bank: str, number: int, rows: BankRows, shared: Float32, own: Float32
) -> tuple[Float32, Float32]:
    """(shared, own) parameters after a bank's training in round `number`."""
    inputs, label = rows.training
    vector = np.concatenate([shared, own])
    after = train(plan.spec, vector, inputs, label, plan.local, seed=plan.seed_of(bank, number), shared=len(shared))
    return after[: len(shared)], after[len(shared) :]


def tuned(plan: TrainingPlan, bank: str, rows: BankRows, best: Best) -> Best:
    """The end of a personalised job: the bank trains all parameters by itself and keeps those with the least loss on
    its own validation rows, the given ones among them. Nothing of this leaves. Without validation rows: as given."""
    if len(rows.validation[0]) == 0:
        return best
    vector = np.concatenate([best.shared, best.own])
    kept, least = vector, _loss(plan, vector, rows)
    inputs, label = rows.training
    for number in range(plan.all_rounds + 1, plan.all_rounds + 1 + OWN_ROUNDS):
        vector = train(plan.spec, vector, inputs, label, plan.own_local, seed=plan.seed_of(bank, number))
        loss = _loss(plan, vector, rows)
        if loss < least:
            kept, least = vector, loss
    return replace(best, shared=kept[: len(best.shared)], own=kept[len(best.shared) :])


def _loss(plan: TrainingPlan, vector: Float32, rows: BankRows) -> float:
    inputs, label = rows.validation
    logit = scores(plan.spec, vector, inputs) / float(1 << SCORE_BITS)
    return float(np.mean(np.logaddexp(0.0, logit) - label * logit))


def score_counts(plan: TrainingPlan, rows: BankRows, shared: Float32, own: Float32) -> Int64:
    """Both score histograms of a bank, int64[plan.counts]."""
    vector = np.concatenate([shared, own])
    parts = [
        ScoreHistogram.of(scores(plan.spec, vector, inputs), label).to_vector()
        for inputs, label in (rows.validation, rows.held_out)
    ]
    return _padded(plan, np.concatenate(parts))


def weight(data: BankData) -> int:
    """Weight of a bank in the average: its training rows, validation included."""
    return len(data.training.label)


def _first_length(plan: TrainingPlan) -> int:
    return 2 * sum(spec.kind == "numeric" for spec in plan.columns)


def _padded(plan: TrainingPlan, counts: Int64) -> Int64:
    return np.concatenate([counts, np.zeros(plan.counts - len(counts), np.int64)])


# --- the app ----------------------------------------------------------------------------------------------------------

DataOf = Callable[[str], BankData]
"""Bank name -> its table."""

Keep = Callable[[str, Best, Mapping[str, Int64]], None]
"""What a bank does with the result: (bank, best parameters, opened counts by step)."""


@dataclass
class _Prepared:
    """Rows of the banks in this process, prepared once. SECRET."""

    rows: dict[str, BankRows] = field(default_factory=dict, repr=False)


def horizontal_app(
    terms: HorizontalTerms,
    plan: TrainingPlan,
    data_of: DataOf,
    keep: Keep,
    bank_of: BankOf = bank_from_node_config,
) -> ClientApp:
    """The ClientApp of a bank, secure aggregation around it. `Refused` if the terms were made for another plan."""
    if plan.digest not in terms.purpose:
        raise Refused("the purpose of the terms does not name the digest of this training plan; agree on one plan")
    cache = _Prepared()

    def finished(context: Context, model: ArrayRecord, counts: Mapping[str, Int64]) -> None:
        name, _ = bank_of(context)
        best, own = _recall(context, plan)
        best = _judged(best, plan.all_rounds, counts, model["vector"].numpy(), own)
        if plan.personalised:
            best = tuned(plan, name, rows_of(name, _consenting(data_of(name)), counts), best)
        keep(name, best, counts)

    app = ClientApp(mods=[secure_mod(terms, bank_of, server_step=plan.server_step, finished=finished)])

    def rows_of(name: str, data: BankData, opened: Mapping[str, Int64]) -> BankRows:
        # consent is asked in every message; the prepared rows of before serve as long as it has not changed
        key = hashlib.sha256("|".join([name, *data.training.ids, "#", *data.held_out.ids]).encode()).hexdigest()
        if key not in cache.rows:
            cache.rows[key] = bank_rows(preparation(plan, opened), data)
        return cache.rows[key]

    @app.train()
    def train_round(message: Message, context: Context) -> Message:
        name, _ = bank_of(context)
        data, number = _consenting(data_of(name)), _round(message)
        shared = message.content.array_records["arrays"]["vector"].numpy()
        best, own = _recall(context, plan)
        if number > PASSES:
            opened = opened_counts(context)
            best = _judged(best, number - 1, opened, shared, own)
            if not best.is_over(number - 1, plan.patience):
                shared, own = trained(plan, name, number, rows_of(name, data, opened), shared, own)
            _remember(context, best, own)
        return _reply(message, {"arrays": {"vector": shared}}, weight(data))

    @app.evaluate()
    def evaluate_round(message: Message, context: Context) -> Message:
        name, _ = bank_of(context)
        data, number, opened = _consenting(data_of(name)), _round(message), opened_counts(context)
        if number <= PASSES:
            counts = statistics(plan, data.training, number, opened.get("evaluate.1", np.zeros(0, np.int64)))
        else:
            _, own = _recall(context, plan)
            shared = context.state.array_records[MODEL]["vector"].numpy()
            counts = score_counts(plan, rows_of(name, data, opened), shared, own)
        return _reply(message, {"counts": {"counts": counts}}, weight(data))

    return app


def _judged(best: Best, number: int, opened: Mapping[str, Int64], shared: Float32, own: Float32) -> Best:
    counts = opened.get(f"evaluate.{number}")
    return best if counts is None or number <= PASSES else best.after(number, counts, shared, own)


def _consenting(data: BankData) -> BankData:
    """The rows whose enterprises consent now."""
    kept = replace(data, training=_kept(data.training, data), held_out=_kept(data.held_out, data))
    if weight(kept) < 1:
        raise DataError("no training row with consent; a bank without rows cannot take part")
    return kept


def _kept(rows: LabelledRows, data: BankData) -> LabelledRows:
    live = data.consent(rows.ids)
    if live.all():
        return rows
    return LabelledRows(
        ids=[identifier for identifier, is_live in zip(rows.ids, live, strict=True) if is_live],
        label=rows.label[live],
        columns={name: column[live] for name, column in rows.columns.items()},
    )


def _round(message: Message) -> int:
    return int(str(message.content.config_records["config"]["server-round"]))


def _reply(message: Message, arrays: Mapping[str, Mapping[str, npt.NDArray[np.generic]]], rows: int) -> Message:
    records: dict[str, ArrayRecord | MetricRecord] = {
        name: ArrayRecord({key: Array(values) for key, values in record.items()}) for name, record in arrays.items()
    }
    return Message(RecordDict({**records, "metrics": MetricRecord({"num-examples": rows})}), reply_to=message)


def _recall(context: Context, plan: TrainingPlan) -> tuple[Best, Float32]:
    """(best so far, own parameters now)."""
    if _KEPT not in context.state.array_records:
        shared, own = plan.initial()
        return Best(shared=shared, own=own), own
    kept = context.state.array_records[_KEPT]
    auc, number = kept["judged"].numpy()
    return Best(
        shared=kept["shared"].numpy(), own=kept["best_own"].numpy(), auc=float(auc), round_number=int(number)
    ), kept["own"].numpy()


def _remember(context: Context, best: Best, own: Float32) -> None:
    context.state[_KEPT] = ArrayRecord(
        {
            "shared": Array(best.shared),
            "best_own": Array(best.own),
            "judged": Array(np.array([best.auc, float(best.round_number)])),
            "own": Array(own),
        }
    )
