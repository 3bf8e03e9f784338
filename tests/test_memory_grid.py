"""The in-memory grid against the abstract interface of Flower's `Grid`: messages, replies, errors, unknown nodes."""

import inspect

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fl_clients.courier import client_app, from_record, to_record
from fl_server.coordinator import JobStoppedError, find_parties
from fl_server.memory_grid import MemoryGrid
from tests.small_federation import small_federation, small_parties

NODES = {10: {"vault": "a"}, 11: {"vault": "b"}}


def vault_of(context: Context) -> tuple[str, object]:
    name = str(context.node_config["vault"])

    def call(data: bytes) -> bytes:
        if data == b"die":
            raise RuntimeError("secret 4711")
        return name.encode() + b":" + data

    return name, call


def grid_of(transcript: list[bytes] | None = None, app: ClientApp | None = None) -> MemoryGrid:
    return MemoryGrid(app or client_app(vault_of), NODES, transcript)  # type: ignore[arg-type]


def step(grid: MemoryGrid, node: int, data: bytes) -> Message:
    return grid.create_message(to_record(data), "train.step", node, "1")


def test_every_abstract_method_of_flower_is_there_with_its_parameters() -> None:
    assert Grid.__abstractmethods__ >= {"push_messages", "pull_messages", "send_and_receive", "get_node_ids"}
    assert not MemoryGrid.__abstractmethods__
    for name in Grid.__abstractmethods__:
        abstract, own = getattr(Grid, name), getattr(MemoryGrid, name)
        if isinstance(abstract, property):
            assert isinstance(own, property)
            continue
        assert list(inspect.signature(own).parameters) == list(inspect.signature(abstract).parameters), name
    assert isinstance(grid_of(), Grid)


def test_the_grid_has_the_identity_that_flower_stamps_on_messages() -> None:
    grid_of()
    assert (TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id) == (1, 1, 1)
    with pytest.raises(RuntimeError, match="no Flower run"):
        _ = grid_of().run


def test_messages_reach_their_node_and_replies_come_back_under_its_name() -> None:
    grid = grid_of()
    assert sorted(grid.get_node_ids()) == [10, 11]
    assert sorted(node.node_id for node in grid.get_nodes()) == [10, 11]
    replies = list(grid.send_and_receive([step(grid, 10, b"x"), step(grid, 11, b"y")], timeout=1))
    assert [(reply.metadata.src_node_id, from_record(reply.content)) for reply in replies] == [
        (10, b"a:x"),
        (11, b"b:y"),
    ]
    assert all(not reply.has_error() for reply in replies)


def test_push_and_pull_apart_and_a_reply_is_pulled_once() -> None:
    grid = grid_of()
    identifiers = list(grid.push_messages([step(grid, 11, b"1"), step(grid, 11, b"2")]))
    assert len(set(identifiers)) == 2
    [second] = grid.pull_messages([identifiers[1]])
    assert from_record(second.content) == b"b:2"
    assert second.metadata.reply_to_message_id == identifiers[1]
    assert list(grid.pull_messages([identifiers[1], "unknown"])) == []
    assert len(list(grid.pull_messages(identifiers))) == 1


def test_a_node_that_raises_gives_an_error_reply_without_its_words() -> None:
    grid = grid_of()
    dead, alive = grid.send_and_receive([step(grid, 10, b"die"), step(grid, 11, b"x")])
    assert dead.has_error()
    assert dead.metadata.src_node_id == 10
    assert dead.error.code == 2
    assert "4711" not in str(dead.error.reason), "an exception's text may hold data"
    assert from_record(alive.content) == b"b:x", "the others are served"


def test_an_unknown_node_or_message_type_gives_an_error_reply() -> None:
    grid = grid_of()
    [unknown] = grid.send_and_receive([step(grid, 99, b"x")])
    assert unknown.has_error()
    [query] = grid.send_and_receive([Message(RecordDict(), dst_node_id=10, message_type="query.nothing")])
    assert query.has_error()


def test_the_transcript_holds_every_request_and_every_reply_in_order() -> None:
    transcript: list[bytes] = []
    grid = grid_of(transcript)
    list(grid.send_and_receive([step(grid, 10, b"x"), step(grid, 10, b"die"), step(grid, 11, b"")]))
    assert transcript == [b"x", b"a:x", b"die", b"", b"b:"]


def test_payloads_of_any_bytes_survive_the_record() -> None:
    for payload in (b"", b"\x00", bytes(range(256)) * 300):
        assert from_record(to_record(payload)) == payload


def test_parties_are_found_by_name_and_the_missing_are_named() -> None:
    contract = small_parties(small_federation(enterprises=200), rounds=1).contract
    names = [party.name for party in contract.parties]

    def grid(known: list[str]) -> MemoryGrid:
        nodes = dict(enumerate([*known, "stranger"], start=5))
        app = client_app(lambda context: (nodes[context.node_id], bytes))
        return MemoryGrid(app, {node: {} for node in nodes})

    found = find_parties(grid(names), contract, wait_s=0)
    assert found == {name: number for number, name in enumerate(names, start=5)}
    with pytest.raises(JobStoppedError, match="bank2, tax") as caught:
        find_parties(grid([name for name in names if name not in ("bank2", "tax")]), contract, wait_s=0)
    assert "bank1" not in str(caught.value)


def test_two_nodes_that_claim_one_name_do_not_replace_each_other() -> None:
    contract = small_parties(small_federation(enterprises=200), rounds=1).contract
    names = [party.name for party in contract.parties]
    nodes = dict(enumerate([*names, names[0]], start=5))
    app = client_app(lambda context: (nodes[context.node_id], bytes))
    assert find_parties(MemoryGrid(app, {node: {} for node in nodes}), contract, wait_s=0)[names[0]] == 5
