"""A Flower strategy that adds ciphertexts: the coordinator of a horizontal job, which never sees an update or a model.

    strategy = SecureStrategy(terms=terms, identity=identity)         with `secure_mod` in the ClientApp
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=3)
Each round's encrypted sum goes back to the banks with the next message; the banks decrypt it and hold the model, so the
result of `start` has none. Against the coordinator itself: see `fl_clients.horizontal_bank`.
A bank that fails before a sum is handed out is left out for the rest of the job, and the step is run again with fresh
masks by the others, as long as the terms' least number of banks is left; else one line says who failed and why.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgpack
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fl_clients.horizontal_terms import (
    Announcement,
    Answer,
    Handed,
    Header,
    HorizontalTerms,
    bytes_in,
    bytes_of,
    bytes_record,
    encode_roster,
    participants_hash,
    read_answer,
    read_roster,
    sign_header,
    step_kind,
)
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.secure_sum import add_ciphertexts

LOGGER = logging.getLogger(__name__)

WAIT_S = 120.0

_MOST_NAMES = 10


class RoundStoppedError(Exception):
    """The job cannot go on: one line that names the banks and says why."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One attempt of one step. Seconds at the coordinator, waiting for the banks included; bytes of sums and mail."""

    step: str
    attempt: int
    participants: tuple[str, ...]
    seconds: float
    bytes_up: int
    bytes_down: int


class SecureStrategy(Strategy):
    """State of one job at the coordinator: who takes part, and the encrypted sum that the banks wait for.

    `evaluate`: also run Flower's evaluation trip after each round, whose counts are summed as the terms say; `wait_s`:
    how long to wait for the banks' nodes.
    `costs`: what every step took. `failed`: bank -> why it was left out. `released`: (step, bank) -> the metrics
    that the terms let out.
    """

    def __init__(
        self, *, terms: HorizontalTerms, identity: SigningIdentity, evaluate: bool = False, wait_s: float = WAIT_S
    ) -> None:
        if identity.public.hex() != terms.coordinator_identity:
            raise Refused("the coordinator's identity key is not the one in the terms; use the key that was agreed")
        if evaluate and terms.counts is None:
            raise Refused("evaluation without `counts` in the terms: nothing says what may be summed")
        self.terms = terms
        self.costs: list[StepCost] = []
        self.failed: dict[str, str] = {}
        self.released: dict[tuple[str, str], dict[str, object]] = {}
        self._identity = identity
        self._evaluate = evaluate
        self._wait_s = wait_s
        self._nodes: dict[str, int] = {}
        self._participants: tuple[str, ...] = ()
        self._handed: Handed | None = None
        self._summed = b""
        self._proofs: dict[str, bytes] = {}
        self._grid: Grid | None = None
        self._timeout = 3600.0
        self._sent = (0.0, 0)

    def summary(self) -> None:
        """Log who takes part, in Flower's manner."""
        LOGGER.info("secure sum over %s of %s banks", len(self._participants), len(self.terms.banks))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Set up keys, run the rounds as every Flower strategy does, hand out the last sum.

        `initial_arrays`: public, the same at all banks. The result holds no arrays: the model is at the banks.
        """
        if evaluate_fn is not None:
            raise Refused("evaluate_fn: the coordinator has no model to evaluate; let the banks sum counts instead")
        if num_rounds < 1:
            raise Refused(f"{num_rounds} rounds; give 1 or more")
        self._grid, self._timeout = grid, timeout
        self._set_up()
        result = super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config)
        for step in ("close", "check"):
            self._collect(step, 0, self._ask(step, 0, "train", RecordDict()))
        return result

    # the rounds, as Flower calls them

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of a round: the global model travels in the first only, then the encrypted sum of the last step."""
        self._grid = grid
        content = RecordDict({"config": _with_round(config, server_round)})
        if server_round == 1:
            content["arrays"] = arrays
        return self._messages(f"train.{server_round}", 0, "train", content)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the ciphertexts; a step that lost a bank is run again here. No arrays: the coordinator has none."""
        return None, self._sum(f"train.{server_round}", "train", replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages of an evaluation, if this strategy evaluates."""
        if not self._evaluate:
            return []
        content = RecordDict({"config": _with_round(config, server_round)})
        return self._messages(f"evaluate.{server_round}", 0, "evaluate", content)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Add the encrypted counts."""
        return self._sum(f"evaluate.{server_round}", "evaluate", replies) if self._evaluate else None

    def _sum(self, step: str, message_type: str, replies: Iterable[Message]) -> MetricRecord | None:
        for attempt in range(self.terms.most_attempts):
            answers, summands = self._collect(step, attempt, replies)
            if set(answers) == set(self._participants) and self._add(step, attempt, summands):
                self._proofs = {bank: answer.proof for bank, answer in answers.items()}
                return self._released(step)
            self._participants = tuple(bank for bank in self._participants if bank in answers and bank in summands)
            self._check_left(step)
            if attempt + 1 < self.terms.most_attempts:
                replies = self._ask(step, attempt + 1, message_type, RecordDict(), again=True)
        raise RoundStoppedError(
            f"step {step}: {self.terms.most_attempts} attempts, in each a bank failed: {self._why()}"
        )

    def _add(self, step: str, attempt: int, summands: dict[str, bytes]) -> bool:
        """Add up; False after taking out the banks whose bytes cannot be added."""
        parameters = self.terms.plan(step_kind(step) or "train").parameters
        try:
            self._summed = add_ciphertexts(list(summands.values()), parameters)
        except Refused as error:
            for bank, data in list(summands.items()):
                try:
                    add_ciphertexts([data], parameters)
                except Refused as own:
                    self._fail(bank, str(own))
                    del summands[bank]
            if set(summands) == set(self._participants):  # each is sound alone: they differ in length
                raise RoundStoppedError(f"step {step}: {error}") from None
            return False
        self._handed = Handed(
            step=step,
            attempt=attempt,
            participants=self._participants,
            digest=hashlib.sha256(self._summed).digest(),
        )
        return True

    def _released(self, step: str) -> MetricRecord | None:
        records = [values for (of_step, _), values in self.released.items() if of_step == step]
        names = set.intersection(*(set(values) for values in records)) if records else set()
        means: dict[str, int | float | list[int] | list[float]] = {
            name: sum(float(str(values[name])) for values in records) / len(records)
            for name in sorted(names)
            if all(isinstance(values[name], int | float) for values in records)
        }
        return MetricRecord(means) if means else None

    # set-up

    def _set_up(self) -> None:
        """Three trips: job keys, the common key by the first bank, admission with proof of the same key at all."""
        nodes = self._wait_for_nodes()
        everybody = tuple(bank.name for bank in self.terms.banks)
        self._participants = everybody
        announcements: dict[str, Announcement] = {}
        for reply in self._send("join", 0, "train", RecordDict(), nodes):
            answer = self._answer(reply, "join", 0)
            if isinstance(answer, str):
                continue
            try:
                bank, public, signature = msgpack.unpackb(bytes_of(reply.content))
                item = Announcement(bank=bank, public=public, signature=signature)
                read_roster(encode_roster((item,)), self.terms)
            except (Refused, ValueError, TypeError) as error:
                self._fail(answer.bank, str(error))
                continue
            if bank == answer.bank and bank not in announcements:
                announcements[bank] = item
                self._nodes[bank] = reply.metadata.src_node_id
        for bank in everybody:
            if bank not in announcements:
                self._fail(bank, "it did not join")
        self._close_costs("join", 0, 0)
        self._participants = tuple(bank for bank in everybody if bank in announcements)
        self._check_left("join")
        roster = encode_roster(tuple(announcements[bank] for bank in self._participants))
        maker = self._participants[0]
        replies = self._send("key", 0, "train", RecordDict(), [self._nodes[maker]], mail=roster)
        answers, mails = self._collect("key", 0, replies, of=(maker,))
        if maker not in answers:
            raise RoundStoppedError(f"step key: {self._why()}; start again without it")
        try:
            fingerprint, signature, encrypted, sealed = msgpack.unpackb(mails[maker])
        except (ValueError, TypeError):
            raise RoundStoppedError(f"step key: {maker} sent a malformed key letter; start again without it") from None
        mail = bytes(msgpack.packb([roster, fingerprint, signature, encrypted]))
        replies = self._send("admit", 0, "train", RecordDict(), self._participant_nodes(), mail=mail, letters=sealed)
        answers, _ = self._collect("admit", 0, replies)
        self._participants = tuple(bank for bank in self._participants if bank in answers)
        self._check_left("admit")
        self._proofs = {bank: answer.proof for bank, answer in answers.items()}

    def _wait_for_nodes(self) -> list[int]:
        assert self._grid is not None  # noqa: S101  start() sets it
        deadline = time.monotonic() + self._wait_s
        while True:
            nodes = list(self._grid.get_node_ids())
            if len(nodes) >= len(self.terms.banks) or time.monotonic() > deadline:
                return nodes
            time.sleep(0.2)

    # messages

    def _participant_nodes(self) -> list[int]:
        return [self._nodes[bank] for bank in self._participants]

    def _ask(
        self, step: str, attempt: int, message_type: str, content: RecordDict, again: bool = False
    ) -> list[Message]:
        assert self._grid is not None  # noqa: S101  start() sets it
        messages = self._messages(step, attempt, message_type, content, again)
        return list(self._grid.send_and_receive(messages, timeout=self._timeout))

    def _send(
        self,
        step: str,
        attempt: int,
        message_type: str,
        content: RecordDict,
        nodes: list[int],
        mail: bytes = b"",
        letters: Mapping[str, bytes] | None = None,
    ) -> list[Message]:
        """A trip of set-up: the same mail to all, a sealed letter to each."""
        assert self._grid is not None  # noqa: S101  start() sets it
        header = Header(
            job=self.terms.hash,
            step=step,
            attempt=attempt,
            participants=self._participants,
            mail_digest=hashlib.sha256(mail).digest(),
        )
        data, signature = sign_header(header, self._identity)
        payload = bytes_record(mail)
        names = {node: bank for bank, node in self._nodes.items()}
        messages = []
        for node in nodes:
            letter = (letters or {}).get(names.get(node, ""), b"")
            told = ConfigRecord({"header": data, "signature": signature, "letter": letter})
            record = RecordDict({**content, "xinyi": told, "payload": payload})
            messages.append(Message(record, dst_node_id=node, message_type=message_type))
        self._sent = (time.perf_counter(), len(messages) * len(mail))
        return list(self._grid.send_and_receive(messages, timeout=self._timeout))

    def _messages(
        self, step: str, attempt: int, message_type: str, content: RecordDict, again: bool = False
    ) -> list[Message]:
        """One message to each participant, with the sum that waits to be opened (not when a step is run again)."""
        handed = None if again else self._handed
        payload = self._summed if handed is not None else b""
        header = Header(
            job=self.terms.hash,
            step=step,
            attempt=attempt,
            participants=self._participants,
            handed=handed,
            proofs={} if again else {bank: self._proofs.get(bank, b"") for bank in self._participants},
        )
        data, signature = sign_header(header, self._identity)
        told, record = ConfigRecord({"header": data, "signature": signature}), bytes_record(payload)
        nodes = self._participant_nodes()
        self._sent = (time.perf_counter(), len(nodes) * len(payload))
        return [
            Message(
                RecordDict({**content, "xinyi": told, "payload": record}), dst_node_id=node, message_type=message_type
            )
            for node in nodes
        ]

    def _collect(
        self, step: str, attempt: int, replies: Iterable[Message], of: tuple[str, ...] | None = None
    ) -> tuple[dict[str, Answer], dict[str, bytes]]:
        """Sound answers and what they bring, by bank, in the order of the participants; who failed is in `costs`."""
        wanted = self._participants if of is None else of
        answers: dict[str, Answer] = {}
        brought: dict[str, bytes] = {}
        failed: dict[str, str] = {}
        names = {node: bank for bank, node in self._nodes.items()}
        for reply in replies:
            bank = names.get(reply.metadata.src_node_id, "")
            answer = self._answer(reply, step, attempt)
            if isinstance(answer, str):
                failed[bank] = answer
            elif answer.bank != bank or bank not in wanted:
                failed[bank] = f"its node answers as {answer.bank}"
            else:
                answers[bank] = answer
                brought[bank] = bytes_of(reply.content)
                metrics = reply.content.metric_records.get("metrics")
                if metrics:
                    self.released[step, bank] = dict(metrics)
        self._close_costs(step, attempt, sum(map(len, brought.values())))
        for bank in wanted:
            if bank not in answers:
                self._fail(bank, failed.get(bank, f"no reply within {self._timeout:.0f} s"))
        if step in ("close", "check") and len(answers) < self.terms.least_banks:
            raise RoundStoppedError(f"step {step}: too few banks opened the last sum: {self._why()}")
        if step == "close":
            self._participants = tuple(bank for bank in wanted if bank in answers)
            self._proofs = {bank: answer.proof for bank, answer in answers.items()}
            self._handed = None
        order = [bank for bank in wanted if bank in answers]
        return {bank: answers[bank] for bank in order}, {bank: brought[bank] for bank in order}

    def _answer(self, reply: Message, step: str, attempt: int) -> Answer | str:
        """A signed answer to exactly this step, attempt and list of participants; else why not."""
        if reply.has_error():
            return f"its app failed ({reply.error.reason})"
        sent = reply.content.config_records.get("xinyi")
        if sent is None:
            return "its app has no secure_mod"
        try:
            answer = read_answer(bytes_in(sent, "answer"), bytes_in(sent, "signature"), self.terms)
        except Refused as error:
            return str(error)
        if answer.refused:
            return answer.refused
        expected = (step, attempt, participants_hash(self._participants))
        if (answer.step, answer.attempt, answer.participants_hash) != expected:
            return f"it sent what belongs to step {answer.step} attempt {answer.attempt}, asked was {step} {attempt}"
        if hashlib.sha256(bytes_of(reply.content)).digest() != answer.brings:
            return "what it sent is not what it signed"
        return answer

    def _close_costs(self, step: str, attempt: int, bytes_up: int) -> None:
        started, bytes_down = self._sent
        self.costs.append(
            StepCost(
                step=step,
                attempt=attempt,
                participants=self._participants,
                seconds=time.perf_counter() - started,
                bytes_up=bytes_up,
                bytes_down=bytes_down,
            )
        )

    def _fail(self, bank: str, reason: str) -> None:
        self.failed[bank] = reason
        LOGGER.warning("%s is left out: %s", bank, reason)

    def _why(self) -> str:
        """Who failed and why, on one line; many banks with one reason are named once."""
        banks_of: dict[str, list[str]] = {}
        for bank, reason in self.failed.items():
            banks_of.setdefault(reason, []).append(bank)
        return "; ".join(
            f"{', '.join(banks[:_MOST_NAMES])}{f' and {more} more' if (more := len(banks) - _MOST_NAMES) > 0 else ''}: "
            f"{reason}"
            for reason, banks in banks_of.items()
        )

    def _check_left(self, step: str) -> None:
        left = len(self._participants)
        if left < self.terms.least_banks:
            raise RoundStoppedError(
                f"step {step}: {left} of {len(self.terms.banks)} banks left, the terms need {self.terms.least_banks}; "
                f"{self._why()}"
            )


def _with_round(config: ConfigRecord, server_round: int) -> ConfigRecord:
    return ConfigRecord({**config, "server-round": server_round})
