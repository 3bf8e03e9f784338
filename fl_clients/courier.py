"""The Flower ClientApp: a courier. It hands a step's bytes to the institution's vault and the vault's bytes back.

It holds no key, reads no data, imports neither torch nor tenseal; what it carries is signed and sealed.
"""

import os
from collections.abc import Callable
from pathlib import Path

import grpc
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

HANDLE = "/xinyi.Vault/Handle"
WHO = "/xinyi.Vault/Who"
LANE = "/xinyi.Vault/Lane"
"""Brings the coordinator's signed opening of a lane; the vault checks it, opens the lane and returns at once."""
SOCKET_FOLDER = "XINYI_VAULTS"
"""Environment variable: the folder of the vaults' sockets, in a simulation with many nodes on one machine."""

CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

Call = Callable[[bytes], bytes]
"""A vault's one call."""


def to_record(payload: bytes) -> RecordDict:
    """Bytes as a Flower array (Flower sends arrays in chunks; byte strings in a ConfigRecord it does not)."""
    array = Array(dtype="uint8", shape=(len(payload),), stype="bytes", data=payload)
    return RecordDict({"payload": ArrayRecord({"bytes": array})})


def from_record(content: RecordDict) -> bytes:
    return content.array_records["payload"]["bytes"].data


def client_app(
    vault_of: Callable[[Context], tuple[str, Call]], lane_of: Callable[[Context], Call] | None = None
) -> ClientApp:
    """A courier to the vault that `vault_of` finds for this node: (party name, its call).

    `lane_of`: the vault's call that opens a lane; without it the node has none and every step comes as a message.
    """
    app = ClientApp()

    if lane_of is not None:

        @app.query("lane")
        def lane(message: Message, context: Context) -> Message:
            return Message(to_record(lane_of(context)(from_record(message.content))), reply_to=message)

    @app.query("who")
    def who(message: Message, context: Context) -> Message:
        return Message(RecordDict({"who": ConfigRecord({"party": vault_of(context)[0]})}), reply_to=message)

    @app.train("step")
    def step(message: Message, context: Context) -> Message:
        return Message(to_record(vault_of(context)[1](from_record(message.content))), reply_to=message)

    return app


Calls = Callable[[str, bytes], bytes]
"""A vault's calls: method, payload."""


def _calls_at(address: str) -> Calls:
    def call(method: str, payload: bytes) -> bytes:
        with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            reply: bytes = channel.unary_unary(method)(payload, wait_for_ready=True, timeout=3600)
            return reply

    return call


def vault_at(address: str) -> tuple[str, Call]:
    """(party name, its call) of the vault that listens at a gRPC address (unix:/path)."""
    call = _calls_at(address)
    return call(WHO, b"").decode(), lambda payload: call(HANDLE, payload)


def _address(context: Context) -> str:
    """Of the vault's Unix socket: node config `vault`, or socket number of the partition."""
    address = str(context.node_config.get("vault", ""))
    if not address:
        folder = Path(os.environ[SOCKET_FOLDER])
        address = f"unix:{folder / str(context.node_config['partition-id'])}.sock"
    return address


def _socket_lane(context: Context) -> Call:
    call = _calls_at(_address(context))
    return lambda payload: call(LANE, payload)


app = client_app(lambda context: vault_at(_address(context)), _socket_lane)
