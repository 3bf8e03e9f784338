"""Secure aggregation over Flower: the five-line example, exactness, dropout, bad input, one opening per step."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from fl_clients import horizontal_bank
from fl_clients.horizontal_bank import decode_memory
from fl_clients.horizontal_terms import bytes_of, bytes_record
from fl_clients.secure_mod import COUNTS, MODEL, ServerState, charges, opened_counts, secure_mod
from fl_server.memory_grid import MemoryGrid
from fl_server.secure_strategy import RoundStoppedError, SecureStrategy
from privacy.errors import Refused
from privacy.gaussian_table import TableNoise
from privacy.identity import SigningIdentity
from privacy.noise import RecordedNoise
from privacy.update_sum import Contribution, quantise, sum_updates_in_the_clear
from simulations.horizontal_parties import HorizontalParties, make_horizontal

Float64 = npt.NDArray[np.float64]

SIZE = 30
TARGETS = {f"bank_{place}": np.random.default_rng(place).uniform(-1, 1, SIZE) for place in range(4)}
ROWS = {name: 100 * (place + 1) for place, name in enumerate(TARGETS)}


def parties(banks: int = 4, **settings: Any) -> HorizontalParties:
    defaults: dict[str, Any] = {"parameters": SIZE, "clip": 4.0, "largest_weight": 500, "least_banks": 2}
    return make_horizontal(tuple(TARGETS)[:banks], **(defaults | settings))


def initial() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros((5, 4), np.float32)), "b": Array(np.full(10, 0.5, np.float32))})


def flat(arrays: ArrayRecord) -> Float64:
    return np.concatenate([array.numpy().reshape(-1) for array in arrays.values()]).astype(np.float64)


def halfway(vector: Float64, name: str) -> Float64:
    """A bank's local training: half the way to its own target, in float32 as torch would."""
    return (vector.astype(np.float32) + (TARGETS[name].astype(np.float32) - vector.astype(np.float32)) / 2).astype(
        np.float64
    )


def shaped(vector: Float64) -> ArrayRecord:
    return ArrayRecord(
        {
            "w": Array(vector[:20].reshape(5, 4).astype(np.float32)),
            "b": Array(vector[20:].astype(np.float32)),
        }
    )


Break = Callable[[str, int, RecordDict], RecordDict]


def make_app(made: HorizontalParties, breaks: Break | None = None, **mod_settings: Any) -> ClientApp:
    app = ClientApp(mods=[secure_mod(made.terms, made.bank_of, **mod_settings)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name, _ = made.bank_of(context)
        vector = halfway(flat(message.content.array_records["arrays"]), name)
        metrics = MetricRecord({"num-examples": ROWS[name], "loss": 0.25, "secret-loss": 1.0})
        content = RecordDict({"arrays": shaped(vector), "metrics": metrics})
        number = int(str(message.content.config_records["config"]["server-round"]))
        return Message(breaks(name, number, content) if breaks else content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        name, _ = made.bank_of(context)
        counts = np.array([1, 2, ROWS[name]], np.int64)
        content = RecordDict(
            {
                "counts": ArrayRecord({"histogram": Array(counts)}),
                "metrics": MetricRecord({"num-examples": ROWS[name]}),
            }
        )
        return Message(content, reply_to=message)

    return app


class Wire(MemoryGrid):
    """Everything that passes the coordinator, and a hand that can change it."""

    def __init__(self, app: ClientApp, made: HorizontalParties) -> None:
        super().__init__(app, made.nodes())
        self.passed: list[Message] = []
        self.touch: Callable[[Message], Message | None] = lambda message: message

    def contexts(self) -> list[Context]:
        return list(self._contexts.values())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        replies = list(self.pull_messages(self.push_messages(sent)))
        self.passed += [*sent, *replies]
        return [kept for reply in replies if (kept := self.touch(reply)) is not None]


def run(
    made: HorizontalParties, app: ClientApp, rounds: int = 3, evaluate: bool = False, touch: Any = None
) -> tuple[Wire, SecureStrategy]:
    wire = Wire(app, made)
    if touch is not None:
        wire.touch = touch
    strategy = SecureStrategy(terms=made.terms, identity=made.coordinator, evaluate=evaluate, wait_s=1.0)
    strategy.start(grid=wire, initial_arrays=initial(), num_rounds=rounds)
    return wire, strategy


def twin(made: HorizontalParties, rounds: int, names: Callable[[int], list[str]]) -> Float64:
    """The same training with sums in the clear."""
    plan = made.terms.plan("train")
    vector = flat(initial())
    for number in range(1, rounds + 1):
        parts = []
        for name in names(number):
            given = flat(shaped(vector))
            update = flat(shaped(halfway(given, name))) - given
            values = quantise(update, ROWS[name], plan, made.terms.rounding_key(name, f"train.{number}"))
            parts.append(Contribution(values=values, weight=ROWS[name], counts=np.zeros(0, np.int64)))
        vector = vector + sum_updates_in_the_clear(parts, [], plan).average(plan)
    return vector


def step_of(message: Message) -> str:
    """The step that a reply answers, from its signed answer."""
    return str(msgpack.unpackb(message.content.config_records["xinyi"]["answer"])["step"])


def models(wire: Wire) -> list[Float64]:
    return [context.state.array_records["xinyi.vectors"]["vector"].numpy() for context in wire.contexts()]


def test_every_bank_reaches_the_bits_of_the_plaintext_twin() -> None:
    made = parties()
    wire, strategy = run(made, make_app(made))
    expected = twin(made, 3, lambda _: list(TARGETS))
    for model in models(wire):
        assert np.array_equal(model, expected)
    # and quantisation costs little: the float average of the same training
    vector = flat(initial())
    for _ in range(3):
        updates = [halfway(vector, name) - vector for name in TARGETS]
        vector = vector + np.average(updates, axis=0, weights=list(ROWS.values()))
    assert np.abs(vector - expected).max() < 1e-4
    assert isinstance(strategy, Strategy)
    assert strategy.failed == {}


def test_the_coordinator_sees_neither_updates_nor_models_nor_metrics_that_are_not_released() -> None:
    made = parties(released_metrics=("loss",))
    wire, strategy = run(made, make_app(made), rounds=2)
    assert set(strategy.released["train.1", "bank_0"]) == {"loss"}
    seen = [message.content for message in wire.passed if not message.has_error()]
    # the initial model is public and travels in round 1 only; nothing else is an array of numbers
    arrays = [name for content in seen for name in content.array_records if name != "payload"]
    assert arrays == ["arrays"] * 4
    assert not any("secret-loss" in record for content in seen for record in content.metric_records.values())
    states = [context.state.array_records["xinyi.memory"]["bytes"].data for context in wire.contexts()]
    assert all(len(state) < 1_000 for state in states), "keys are gone from the banks' memory at the end"


def test_the_servers_optimiser_runs_at_the_banks() -> None:
    def momentum(state: ServerState, average: Float64) -> ServerState:
        velocity = 0.5 * state.get("velocity", np.zeros(SIZE)) + average
        return {"vector": state["vector"] + velocity, "velocity": velocity}

    made = parties()
    kept: list[dict[str, Any]] = []
    app = make_app(
        made,
        server_step=momentum,
        finished=lambda _, model, counts: kept.append({"model": flat(model), "counts": counts}),
    )
    wire, _ = run(made, app)
    first, *others = models(wire)
    assert all(np.array_equal(first, other) for other in others)
    assert not np.array_equal(first, twin(made, 3, lambda _: list(TARGETS)))
    assert len(kept) == 4
    assert np.array_equal(kept[0]["model"], flat(wire.contexts()[0].state.array_records[MODEL]))


def test_counts_are_summed_exactly_and_given_to_the_app() -> None:
    made = parties(counts={"length": 3, "largest": 1000})
    wire, _ = run(made, make_app(made), rounds=2, evaluate=True)
    for context in wire.contexts():
        assert COUNTS in context.state.array_records
        found = opened_counts(context)
        assert {step: counts.tolist() for step, counts in found.items()} == {
            "evaluate.1": [4, 8, 1000],
            "evaluate.2": [4, 8, 1000],
        }


def test_counts_beyond_their_bound_are_refused_at_the_bank() -> None:
    made = parties(counts={"length": 3, "largest": 350})
    wire, strategy = run(made, make_app(made), rounds=2, evaluate=True)
    assert list(strategy.failed) == ["bank_3"]
    assert "350" in strategy.failed["bank_3"]
    assert opened_counts(wire.contexts()[0])["evaluate.1"].tolist() == [3, 6, 600]


def altered(name: str, number: int, change: Callable[[RecordDict], None]) -> Break:
    def breaks(bank: str, at: int, content: RecordDict) -> RecordDict:
        if (bank, at) == (name, number):
            change(content)
        return content

    return breaks


def put(value: float) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        vector = flat(content.array_records["arrays"])
        vector[7] = value
        content["arrays"] = shaped(vector)

    return change


def reshape(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord({"w": Array(np.zeros((4, 5), np.float32)), "b": Array(np.zeros(10, np.float32))})


def rename(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord({"w": Array(np.zeros((5, 4), np.float32))})


def integers(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord({"w": Array(np.zeros((5, 4), np.int64)), "b": Array(np.zeros(10, np.float32))})


def claim(content: RecordDict) -> None:
    content["privacy"] = ConfigRecord({"kind": "dp-sgd"})


def crash(content: RecordDict) -> None:
    raise ValueError("row 17: 6217 0000 1111")


def no_rows(content: RecordDict) -> None:
    content["metrics"] = MetricRecord({"loss": 1.0})


def too_many_rows(content: RecordDict) -> None:
    content["metrics"] = MetricRecord({"num-examples": 501})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put(np.nan), "not finite"),
        (put(np.inf), "not finite"),
        (put(9.0), "beyond the clip 4"),
        (reshape, "shape (4, 5)"),
        (rename, "['b']"),
        (integers, "int64"),
        (claim, "dp-sgd"),
        (crash, "ValueError"),
        (no_rows, "num-examples"),
        (too_many_rows, "1..500"),
    ],
)
def test_a_bank_with_bad_input_refuses_itself_and_the_round_survives(
    change: Callable[[RecordDict], None], reason: str
) -> None:
    made = parties()
    wire, strategy = run(made, make_app(made, altered("bank_1", 2, change)))
    assert list(strategy.failed) == ["bank_1"]
    assert reason in strategy.failed["bank_1"]
    assert "6217" not in strategy.failed["bank_1"]
    gone = decode_memory(wire.contexts()[1].state.array_records["xinyi.memory"]["bytes"].data)
    assert (gone.job_key, gone.consortium, gone.contribution) == (b"", b"", None)
    assert reason in gone.stopped
    left = [name for name in TARGETS if name != "bank_1"]
    expected = twin(made, 3, lambda number: left if number >= 2 else list(TARGETS))
    kept = [context for context in wire.contexts() if context.node_config["partition-id"] != 1]
    for context in kept:
        assert np.array_equal(context.state.array_records["xinyi.vectors"]["vector"].numpy(), expected)
        # every attempt that left the bank is charged
        assert [(item.step, item.attempt, item.participants) for item in charges(context)] == [
            ("train.1", 0, 4),
            ("train.2", 0, 4),
            ("train.2", 1, 3),
            ("train.3", 0, 3),
        ]


def test_too_few_banks_stop_the_job_with_one_line_that_names_them() -> None:
    made = parties(least_banks=4)
    with pytest.raises(RoundStoppedError, match=r"train\.2: 3 of 4 banks left.*bank_1.*not finite"):
        run(made, make_app(made, altered("bank_1", 2, put(np.nan))))


def test_a_bank_that_never_answers_is_left_out() -> None:
    made = parties()
    node = 12

    def silent(reply: Message) -> Message | None:
        return None if reply.metadata.src_node_id == node and step_of(reply) == "train.2" else reply

    _, strategy = run(made, make_app(made), touch=silent)
    assert list(strategy.failed) == ["bank_2"]
    assert "no reply" in strategy.failed["bank_2"]


def test_another_rounds_ciphertext_is_refused_and_the_round_survives() -> None:
    made = parties()
    old: dict[str, Message] = {}

    def replay(reply: Message) -> Message:
        if reply.metadata.src_node_id != 13:
            return reply
        old.setdefault(step_of(reply), reply)
        if step_of(reply) != "train.2":
            return reply
        # the bank's own answer of round 1, signature and all
        return Message(old["train.1"].content, reply_to=reply_target(reply))

    _, strategy = run(made, make_app(made), touch=replay)
    assert list(strategy.failed) == ["bank_3"]
    assert "train.1" in strategy.failed["bank_3"]


def reply_target(reply: Message) -> Message:
    asked = Message(RecordDict(), dst_node_id=reply.metadata.src_node_id, message_type="train")
    asked.metadata.__dict__["_message_id"] = "again"
    return asked


def test_a_signed_ciphertext_of_another_round_does_not_open() -> None:
    """A bank that signs an old ciphertext as new: nobody opens the sum, all stop, and the line says why."""
    made = parties()
    real = horizontal_bank.HorizontalBank.summand
    kept: dict[str, bytes] = {}

    def cheating(self: Any, header: Any, contribution: Any, model: bytes) -> bytes:
        made_now = real(self, header, contribution, model)
        if self.name != "bank_0":
            return made_now
        return kept.setdefault("first", made_now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(horizontal_bank.HorizontalBank, "summand", cheating)
        with pytest.raises(RoundStoppedError, match="of another round"):
            run(made, make_app(made))


def test_a_client_without_the_key_is_left_out() -> None:
    made = parties()

    def forget(reply: Message) -> Message:
        if reply.metadata.src_node_id == 11 and step_of(reply) == "train.1":
            wire.contexts()[1].state.clear()  # its node was restarted
        return reply

    wire = Wire(make_app(made), made)
    wire.touch = forget
    strategy = SecureStrategy(terms=made.terms, identity=made.coordinator, wait_s=1.0)
    strategy.start(grid=wire, initial_arrays=initial(), num_rounds=2)
    assert list(strategy.failed) == ["bank_1"]
    assert "no key of this job" in strategy.failed["bank_1"]


def test_a_damaged_ciphertext_is_refused() -> None:
    made = parties()

    def damage(reply: Message) -> Message:
        if reply.metadata.src_node_id == 10 and step_of(reply) == "train.1":
            payload = bytearray(bytes_of(reply.content))
            payload[len(payload) // 2] ^= 1
            reply.content["payload"] = bytes_record(bytes(payload))
        return reply

    _, strategy = run(made, make_app(made), touch=damage)
    assert strategy.failed == {"bank_0": "what it sent is not what it signed"}


class Twice(SecureStrategy):
    """A coordinator that deviates."""

    def ask_again(self, step: str, attempt: int, participants: tuple[str, ...]) -> list[str]:
        self._participants = participants
        replies = self._ask(step, attempt, "train", RecordDict(), again=True)
        return [str(self._answer(reply, step, attempt)) for reply in replies]


def after_round(made: HorizontalParties, rounds: int) -> tuple[Wire, Twice]:
    """A coordinator in the middle of a job: the sum of the last round is added, not yet handed out."""
    wire = Wire(make_app(made), made)
    strategy = Twice(terms=made.terms, identity=made.coordinator, wait_s=1.0)
    strategy._grid = wire
    strategy._set_up()
    for number in range(1, rounds + 1):
        messages = strategy.configure_train(number, initial(), ConfigRecord(), wire)
        strategy.aggregate_train(number, wire.send_and_receive(messages))
    return wire, strategy


def test_a_step_is_not_run_again_with_the_same_banks() -> None:
    _, strategy = after_round(parties(), 1)
    assert all("no bank failed" in answer for answer in strategy.ask_again("train.1", 1, tuple(TARGETS)))


def test_an_opened_step_is_not_run_again() -> None:
    _, strategy = after_round(parties(), 2)
    answers = strategy.ask_again("train.1", 1, tuple(TARGETS)[:3])
    assert all("it is over" in answer for answer in answers)


def test_the_last_step_is_not_run_again_once_it_is_open() -> None:
    _, strategy = after_round(parties(), 1)
    strategy._collect("close", 0, strategy._ask("close", 0, "train", RecordDict()))
    assert strategy.failed == {}
    answers = strategy.ask_again("train.1", 1, tuple(TARGETS)[:3])
    assert all("its sum was opened" in answer for answer in answers)


def test_after_a_rerun_the_first_attempts_sum_is_not_opened() -> None:
    """Two subsets of one step: the coordinator invents a failure, then hands out the sum of all."""
    made = parties()
    wire, strategy = after_round(made, 1)
    # the banks cannot know that nobody failed, so they answer
    assert all("refused=''" in answer for answer in strategy.ask_again("train.1", 1, tuple(TARGETS)[:3]))
    replies = wire.send_and_receive(strategy.configure_train(2, initial(), ConfigRecord(), wire))
    answers = [strategy._answer(reply, "train.2", 0) for reply in replies]
    assert len(answers) == 3
    assert all("awaits that of train.1" in str(answer) for answer in answers)


def test_attempts_have_a_limit() -> None:
    made = parties(most_attempts=2)
    _, strategy = after_round(made, 1)
    strategy.ask_again("train.1", 1, tuple(TARGETS)[:3])
    assert all("at most 2" in a for a in strategy.ask_again("train.1", 2, tuple(TARGETS)[:2]))


def test_a_coordinator_that_hands_different_sums_to_banks_is_found() -> None:
    made = parties()
    _, strategy = after_round(made, 2)
    strategy._proofs["bank_2"] = bytes(32)
    messages = strategy.configure_train(3, initial(), ConfigRecord(), strategy._grid)  # type: ignore[arg-type]
    replies = strategy._grid.send_and_receive(messages)  # type: ignore[union-attr]
    answers = [str(strategy._answer(reply, "train.3", 0)) for reply in replies]
    assert all("bank_2 does not prove" in answer for answer in answers)


def test_banks_with_different_models_open_nothing() -> None:
    made = parties()
    wire = Wire(make_app(made), made)
    strategy = SecureStrategy(terms=made.terms, identity=made.coordinator, wait_s=1.0)
    real = wire.push_messages

    def lie(messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        for message in sent:
            if "arrays" in message.content.array_records and message.metadata.dst_node_id == 12:
                message.content["arrays"] = shaped(np.ones(SIZE))
        return real(sent)

    wire.push_messages = lie  # type: ignore[method-assign]
    with pytest.raises(RoundStoppedError, match="same model"):
        strategy.start(grid=wire, initial_arrays=initial(), num_rounds=2)


def test_a_stranger_neither_coordinates_nor_takes_part() -> None:
    made = parties()
    with pytest.raises(Refused, match="not the one in the terms"):
        SecureStrategy(terms=made.terms, identity=SigningIdentity.generate())
    imposter = replace(made, identities={**made.identities, "bank_1": SigningIdentity.generate()})
    _, strategy = run(made, make_app(imposter))
    assert list(strategy.failed) == ["bank_1"]


NOISE = {"record_l2_clip": 0.5, "noise_multiplier": 2.0, "colluding_banks": 1}


def fed_sgd(made: HorizontalParties, clip: float, scale: float = 1.0, **settings: Any) -> ClientApp:
    app = ClientApp(mods=[secure_mod(made.terms, made.bank_of, **settings)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        name, _ = made.bank_of(context)
        direction = TARGETS[name] / np.linalg.norm(TARGETS[name])
        content = RecordDict(
            {
                "update": ArrayRecord(
                    {"w": Array(scale * direction[:20].reshape(5, 4)), "b": Array(scale * direction[20:])}
                ),
                "metrics": MetricRecord({"num-examples": ROWS[name]}),
                "privacy": ConfigRecord({"kind": "clipped-gradient", "record-l2-clip": clip}),
            }
        )
        return Message(content, reply_to=message)

    return app


def test_noise_shares_reach_the_sum_and_equal_their_tape() -> None:
    made = parties(noise=NOISE)
    tape = RecordedNoise(TableNoise())
    wire, _ = run(made, fed_sgd(made, 0.5, 0.5, noise=lambda: tape), rounds=1)
    plan = made.terms.plan("train")
    assert len(tape.tape) == 4
    total = sum(tape.tape.values())
    values = [
        quantise(
            0.5 * TARGETS[name] / np.linalg.norm(TARGETS[name]),
            ROWS[name],
            plan,
            made.terms.rounding_key(name, "train.1"),
        )
        for name in TARGETS
    ]
    expected = flat(initial()) + (sum(values) + total) * (plan.grid / sum(ROWS.values()))
    assert all(np.array_equal(model, expected) for model in models(wire))
    assert {item.noise_multiplier for item in charges(wire.contexts()[0])} == {2.0}


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        (lambda made: make_app(made), "no privacy"),
        (lambda made: make_app(made, altered("bank_0", 1, claim)), "dp-sgd"),
        (lambda made: fed_sgd(made, 0.7, 0.5), "0.7"),
        (lambda made: fed_sgd(made, 0.5, 0.9), "longer than"),
    ],
)
def test_noise_shares_without_their_claim_are_refused(
    app: Callable[[HorizontalParties], ClientApp], reason: str
) -> None:
    made = parties(noise=NOISE)
    with pytest.raises(RoundStoppedError, match=reason):
        run(made, app(made), rounds=1)


def test_terms_refuse_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="noise shares beside"):
        parties(noise=NOISE, own_noise=True)
    with pytest.raises(ValueError, match="one must be honest"):
        parties(noise={**NOISE, "colluding_banks": 2})
    with pytest.raises(ValueError, match="least_banks=9"):
        parties(least_banks=9)
    with pytest.raises(Refused, match="they would overflow"):
        make_horizontal(
            tuple(f"bank_{place}" for place in range(600)),
            parameters=SIZE,
            clip=1.0,
            largest_weight=10,
            values_per_coefficient=3,
        )


def test_secrets_have_no_repr() -> None:
    made = parties()
    wire, _ = after_round(made, 1)
    memory = decode_memory(wire.contexts()[0].state.array_records["xinyi.memory"]["bytes"].data)
    assert memory.contribution is not None
    assert memory.job_key
    for secret in (made, memory, memory.contribution):
        shown = repr(secret)
        assert "secret" in shown
        assert len(shown) < 80
