"""A Flower mod that puts encrypted, masked and quantised aggregation around a ClientApp of one's own.

    app = ClientApp(mods=[secure_mod(terms, bank_of)])            with SecureStrategy(terms=...) in the ServerApp

The app trains as it always did: it is given the global model and replies with its own; the mod sends the difference
into the secure sum, opens the last sum, and runs the server's step here, at the bank. The coordinator sees ciphertexts
only (`fl_clients.horizontal_bank` says what is guaranteed). What the app replies beside that stays at the bank, except
the metrics that the terms release by name.
What the app is given: "arrays" (global model), "config", and after an evaluation "counts" (its opened sums).
What it replies to `train`: "arrays" (its model) or "update" (the difference itself), and a metric "num-examples" (rows:
the weight); with differential privacy also a config record "privacy", its claim (see `_check_claim`).
What it replies to `evaluate`: "counts", one int64 array as long as the terms say, and "num-examples".
"""

import copy
import hashlib
import logging
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from fl_clients.horizontal_bank import Charge, HorizontalBank, Memory, decode_memory, encode_memory
from fl_clients.horizontal_terms import (
    Answer,
    Header,
    HorizontalTerms,
    bytes_in,
    bytes_of,
    bytes_record,
    participants_hash,
    read_header,
    sign_answer,
    step_kind,
)
from models.errors import DataError
from privacy.errors import Refused
from privacy.gaussian_table import TableNoise
from privacy.identity import SigningIdentity
from privacy.noise import NoiseSource
from privacy.update_sum import Contribution, clip_l2, quantise

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

LOGGER = logging.getLogger(__name__)

ServerState = Mapping[str, Float64]
"""What the server's optimiser would keep, at every bank: "vector" is the global model, float64[parameters]; others as
the step likes (moments)."""

ServerStep = Callable[[ServerState, Float64], ServerState]
"""(state, average update float64[parameters]) -> next state. A pure function: all banks must reach the same bits."""

BankOf = Callable[[Context], tuple[str, SigningIdentity]]
"""Which bank a node is: (its name in the terms, its identity)."""

Finished = Callable[[Context, ArrayRecord, Mapping[str, Int64]], None]
"""Called once at the end of the job, at each bank: (context, final model, opened counts by step)."""

MODEL, COUNTS = "xinyi.model", "xinyi.counts"
"""Records in `Context.state` that the app may read: the global model, and the opened counts by step."""

_MEMORY, _VECTORS = "xinyi.memory", "xinyi.vectors"


def federated_average(state: ServerState, average: Float64) -> ServerState:
    """FedAvg: the average update is added to the global model."""
    return {"vector": state["vector"] + average}


def bank_from_node_config(context: Context) -> tuple[str, SigningIdentity]:
    """A deployed bank: node config `party` (its name in the terms) and `identity` (path of its key file, mode 0600)."""
    config = context.node_config
    if "party" not in config or "identity" not in config:
        raise Refused('this node does not say who it is; start it with --node-config \'party="..." identity="..."\'')
    return str(config["party"]), SigningIdentity.load(Path(str(config["identity"])))


def secure_mod(
    terms: HorizontalTerms,
    bank_of: BankOf = bank_from_node_config,
    *,
    server_step: ServerStep = federated_average,
    noise: Callable[[], NoiseSource] = TableNoise,
    finished: Finished | None = None,
) -> Mod:
    """The mod. Put it first in the list, so that it is the last to touch what leaves.

    A refusal is a reply too, signed, with its reason in one line; the coordinator leaves the bank out and runs the step
    again. After a refusal within a step the job is over at this bank: its keys are gone from its memory.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        name, identity = bank_of(context)
        sent = message.content.config_records.get("xinyi")
        if sent is None:
            raise Refused("a message without a header of the job: this app answers to SecureStrategy only")
        bank = HorizontalBank(name=name, terms=terms, identity=identity, memory=_recall(context), noise=noise())
        header, content, brings = None, RecordDict(), b""
        again, refused = False, ""
        try:
            header = read_header(bytes_in(sent, "header"), bytes_in(sent, "signature"), terms)
            payload = bytes_of(message.content)
            if hashlib.sha256(payload).digest() != (header.handed.digest if header.handed else header.mail_digest):
                raise Refused(f"step {header.step}: the mail is not what the coordinator signed; it was damaged")
            if header.step not in ("join", "key", "admit"):
                again = bank.check_place(header)
        except Refused as error:
            return _reply(message, bank, header, RecordDict(), b"", str(error))
        try:
            if header.step in ("join", "key", "admit"):
                brings = _set_up(bank, header, payload, bytes_in(sent, "letter"))
            else:
                content, brings = _step(bank, header, again, payload, message, context, call_next, server_step)
                if header.step == "check" and finished is not None:
                    finished(context, context.state.array_records[MODEL], opened_counts(context))
        except (Refused, DataError) as error:
            refused = str(error)
        except Exception as error:
            # the message may quote a value: only the kind of error leaves, only its place is logged
            where = "".join(traceback.format_tb(error.__traceback__))
            LOGGER.error("step %s: %s\n%s", header.step, type(error).__name__, where)
            refused = f"its app failed ({type(error).__name__})"
        proof = b""
        if refused:
            content, brings = RecordDict(), b""
            bank.stop(refused)
        else:
            proof = bank.proof()
            if header.step == "check":
                bank.stop("it is over")
        _remember(context, bank.memory)
        return _reply(message, bank, header, content, brings, refused, proof)

    return mod


def charges(context: Context) -> tuple[Charge, ...]:
    """Every attempt that left this bank so far, for its ledger."""
    return _recall(context).charges


def opened_counts(context: Context) -> dict[str, Int64]:
    """Step ("evaluate.3") -> the opened counts of all banks, int64[counts]; index 0 to the end as the app gave them."""
    records = context.state.array_records
    return {step: array.numpy() for step, array in records[COUNTS].items()} if COUNTS in records else {}


def _set_up(bank: HorizontalBank, header: Header, payload: bytes, letter: bytes) -> bytes:
    if header.step == "join":
        return bank.join()
    if header.step == "key":
        return bank.make_key(header, payload)
    bank.admit(header, payload, letter)
    return b""


def _step(
    bank: HorizontalBank,
    header: Header,
    again: bool,
    payload: bytes,
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
    server_step: ServerStep,
) -> tuple[RecordDict, bytes]:
    """(released metrics, summand) of a step after set-up; its state is in the context and the bank's memory."""
    terms = bank.terms
    if again:
        kept = bank.memory.contribution
        if kept is None:
            raise Refused(f"step {header.step}: nothing was kept to run it again")
        return RecordDict(), bank.summand(header, kept, bank.memory.model)
    bank.check_proofs(header)
    opened = bank.open_sum(header, payload)
    if opened is not None:
        step, total = opened
        if step_kind(step) == "train":
            _advance(context, dict(server_step(_vectors(context), total.average(terms.plan("train")))))
        else:
            _keep_counts(context, step, total.counts)
    kind = step_kind(header.step)
    if kind is None:
        return RecordDict(), b""
    if MODEL not in context.state.array_records:
        _take_initial(context, message.content, terms)
    state = context.state.array_records
    given = RecordDict({"arrays": state[MODEL], "config": message.content.config_records.get("config", ConfigRecord())})
    if opened is not None and len(opened[1].counts):
        given["counts"] = ArrayRecord({"counts": Array(opened[1].counts)})
    inner = copy.copy(message)  # only a ServerApp may make messages
    inner.content = given
    reply = call_next(inner, context)
    if reply.has_error():
        raise Refused("its app replied with an error")
    metrics = reply.content.metric_records
    made = _train_part(bank, header.step, reply.content, state[MODEL]) if kind == "train" else _counts(reply.content)
    released = {
        key: value for record in metrics.values() for key, value in record.items() if key in terms.released_metrics
    }
    digest = hashlib.sha256(_vectors(context)["vector"].tobytes()).digest()
    return RecordDict({"metrics": MetricRecord(released)}), bank.summand(header, made, digest)


def _train_part(bank: HorizontalBank, step: str, content: RecordDict, model: ArrayRecord) -> Contribution:
    terms = bank.terms
    _check_claim(terms, content)
    if terms.noise is not None and "update" not in content.array_records:
        # the difference of two rounded models would carry rounding errors of the model, which no clip bounds
        raise Refused('with noise shares the app must reply "update" (the mean of the clipped gradients), not "arrays"')
    if "update" in content.array_records:
        update = _flat(content.array_records["update"], model)
    elif "arrays" in content.array_records:
        update = _flat(content.array_records["arrays"], model) - _flat(model, model)
    else:
        raise Refused('the app\'s reply to train has neither "arrays" nor "update"')
    if terms.l2_clip is not None:
        update = clip_l2(update, terms.l2_clip)
    # a mean of gradients of norm C has at most norm C: a claim that cannot hold is refused
    if terms.noise is not None and float(np.linalg.norm(update)) > terms.noise.record_l2_clip * (1 + 1e-6):
        raise Refused("the update is longer than the mean of clipped gradients can be; clip each record's gradient")
    values = quantise(update, _rows(content), terms.plan("train"), terms.rounding_key(bank.name, step))
    return Contribution(values=values, weight=_rows(content), counts=np.zeros(0, np.int64))


def _check_claim(terms: HorizontalTerms, content: RecordDict) -> None:
    """The app's claim must be the one that the terms' privacy is built on; every other combination is `Refused`.

    Noise shares: {"kind": "clipped-gradient", "record-l2-clip": C} (one step, each record's gradient clipped to C, in
    units of the update). Own noise: {"kind": "dp-sgd"} (its own full claim, e.g. by Opacus). Neither: no claim.
    """
    claim = content.config_records.get("privacy", ConfigRecord())
    kind = str(claim.get("kind", ""))
    expected = "clipped-gradient" if terms.noise else "dp-sgd" if terms.own_noise else ""
    if kind != expected:
        raise Refused(
            f"the app claims {kind or 'no privacy'}, the terms are for {expected or 'no privacy'}: noise shares "
            "go with one-step clipped gradients only, and DP-SGD with each bank's own noise only"
        )
    if terms.noise is not None and claim.get("record-l2-clip") != terms.noise.record_l2_clip:
        raise Refused(
            f"the app clips each record to {claim.get('record-l2-clip')!r}, the terms to {terms.noise.record_l2_clip}"
        )


def _counts(content: RecordDict) -> Contribution:
    found = content.array_records.get("counts")
    arrays = [] if found is None else [array.numpy() for array in found.values()]
    if len(arrays) != 1 or arrays[0].dtype != np.int64:
        raise Refused(
            'the app\'s reply to evaluate must have "counts" with one int64 array; anything else is not summed'
        )
    return Contribution(values=np.zeros(0, np.int64), weight=_rows(content), counts=arrays[0].reshape(-1))


def _rows(content: RecordDict) -> int:
    found = [record["num-examples"] for record in content.metric_records.values() if "num-examples" in record]
    if len(found) != 1 or not isinstance(found[0], int | float) or int(found[0]) != found[0]:
        raise Refused('the app\'s reply needs one metric "num-examples", the number of its rows: it is the weight')
    return int(found[0])


def _flat(arrays: ArrayRecord, model: ArrayRecord) -> Float64:
    """All arrays as one vector, float64, in the order of the model; other names, shapes or kinds: `Refused`."""
    if set(arrays) != set(model):
        raise Refused(f"the app replies arrays {sorted(set(arrays) ^ set(model))} that only one side knows")
    parts = []
    for name, expected in model.items():
        if tuple(arrays[name].shape) != tuple(expected.shape):
            raise Refused(
                f"array {name!r} has shape {tuple(arrays[name].shape)}, the model has {tuple(expected.shape)}"
            )
        values = arrays[name].numpy()
        if values.dtype.kind != "f":
            raise Refused(f"array {name!r} is of {values.dtype}, only floating point can be averaged; keep it local")
        parts.append(values.reshape(-1).astype(np.float64))
    return np.concatenate(parts) if parts else np.zeros(0)


def _take_initial(context: Context, content: RecordDict, terms: HorizontalTerms) -> None:
    model = content.array_records.get("arrays")
    if model is None:
        raise Refused("the first round brings no model; start the strategy with initial_arrays")
    vector = _flat(model, model)
    if len(vector) != terms.parameters or not np.isfinite(vector).all():
        raise Refused(f"the initial model has {len(vector)} values, the terms say {terms.parameters}, all finite")
    context.state[MODEL] = model
    context.state[_VECTORS] = ArrayRecord({"vector": Array(vector)})


def _advance(context: Context, state: dict[str, Float64]) -> None:
    vector, model = state["vector"], context.state.array_records[MODEL]
    if vector.dtype != np.float64 or len(vector) != sum(int(np.prod(item.shape)) for item in model.values()):
        raise Refused("the server step must return float64 of the model's length")
    if not np.isfinite(vector).all():
        raise Refused("the server step left values that are not finite; lower its learning rate")
    arrays, place = {}, 0
    for name, item in model.items():
        size = int(np.prod(item.shape))
        arrays[name] = Array(vector[place : place + size].reshape(item.shape).astype(item.dtype))
        place += size
    context.state[MODEL] = ArrayRecord(arrays)
    context.state[_VECTORS] = ArrayRecord({key: Array(values) for key, values in state.items()})


def _vectors(context: Context) -> dict[str, Float64]:
    return {key: array.numpy() for key, array in context.state.array_records[_VECTORS].items()}


def _keep_counts(context: Context, step: str, counts: Int64) -> None:
    kept = {key: Array(values) for key, values in opened_counts(context).items()}
    context.state[COUNTS] = ArrayRecord({**kept, step: Array(counts)})


def _recall(context: Context) -> Memory:
    records = context.state.array_records
    return decode_memory(records[_MEMORY]["bytes"].data) if _MEMORY in records else Memory()


def _remember(context: Context, memory: Memory) -> None:
    context.state[_MEMORY] = bytes_record(encode_memory(memory))


def _reply(
    message: Message,
    bank: HorizontalBank,
    header: Header | None,
    content: RecordDict,
    brings: bytes,
    refused: str,
    proof: bytes = b"",
) -> Message:
    answer = Answer(
        job=bank.terms.hash,
        step=header.step if header else "",
        attempt=header.attempt if header else 0,
        bank=bank.name,
        participants_hash=participants_hash(header.participants) if header else b"",
        brings=hashlib.sha256(brings).digest(),
        proof=proof,
        refused=refused,
    )
    data, signature = sign_answer(answer, bank.identity)
    content["xinyi"] = ConfigRecord({"answer": data, "signature": signature})
    content["payload"] = bytes_record(brings)
    return Message(content, reply_to=message)
