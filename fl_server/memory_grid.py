"""Flower's `Grid` in this process: no network, no daemon, 0.1 ms a round trip; the same ServerApp and ClientApp code.

A ClientApp that raises makes an error reply, as a dead SuperNode does in a deployment. `transcript` keeps every byte
string that passes the coordinator, for tests of what it can see.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fl_clients.courier import from_record

LOGGER = logging.getLogger(__name__)

CLIENT_APP_RAISED = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


class MemoryGrid(Grid):
    """`nodes`: node id -> the node's config as its ClientApp sees it."""

    def __init__(
        self, client_app: ClientApp, nodes: Mapping[int, dict[str, Any]], transcript: list[bytes] | None = None
    ) -> None:
        # flwr 1.41 stamps messages with the identity of the running task; here this process is it
        TaskIdentity.run_id = 1
        TaskIdentity.task_id = 1
        TaskIdentity.node_id = 1
        self._app = client_app
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config=dict(config), state=RecordDict(), run_config={})
            for node, config in nodes.items()
        }
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self._transcript = transcript
        self._run: Run | None = None

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        if self._run is None:
            raise RuntimeError("no Flower run in the in-memory grid")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identifiers = []
        for message in messages:
            self._sent += 1
            identifier = str(self._sent)
            message.metadata.__dict__["_message_id"] = identifier
            self._record(message)
            try:
                reply = self._app(message=message, context=self._contexts[message.metadata.dst_node_id])
            except Exception as error:
                LOGGER.debug("node %s died", message.metadata.dst_node_id, exc_info=True)
                reply = Message(Error(CLIENT_APP_RAISED, type(error).__name__), reply_to=message)
            self._record(reply)
            self._replies[identifier] = reply
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(identifier) for identifier in message_ids if identifier in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _record(self, message: Message) -> None:
        if self._transcript is not None and not message.has_error() and "payload" in message.content.array_records:
            self._transcript.append(from_record(message.content))
