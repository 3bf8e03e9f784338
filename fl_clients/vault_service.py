"""The vault as a gRPC service on a Unix socket of the institution's own machine (mode 0600: only its user connects)."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from fl_clients.courier import CHANNEL_OPTIONS, HANDLE, LANE, WHO, Call
from fl_clients.vault import VaultFailedError
from privacy.errors import Refused


@contextmanager
def serve(party: str, handle: Call, socket: Path, open_lane: Callable[[bytes], None] | None = None) -> Iterator[None]:
    """Serve a party's vault while the context is open; steps are handled one at a time.

    `handle` may raise `Refused` or `VaultFailedError`: the caller gets its line. `open_lane`: takes the coordinator's
    signed opening and returns at once, or raises `Refused`; None: every step comes as a message.
    """

    def step(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return handle(request)
        except (Refused, VaultFailedError) as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise

    def lane(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            if open_lane is None:
                raise Refused("this vault has no lane; its steps come as messages")
            open_lane(request)
        except Refused as refused:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(refused))
        return party.encode()

    server = grpc.server(ThreadPoolExecutor(max_workers=1), options=CHANNEL_OPTIONS)

    def method(name: str) -> str:
        return name.rsplit("/", 1)[1]

    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "xinyi.Vault",
                {
                    method(HANDLE): grpc.unary_unary_rpc_method_handler(step),
                    method(LANE): grpc.unary_unary_rpc_method_handler(lane),
                    method(WHO): grpc.unary_unary_rpc_method_handler(lambda request, _: party.encode()),
                },
            ),
        )
    )
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{socket}")
        server.start()
    finally:
        os.umask(before)
    try:
        yield
    finally:
        server.stop(grace=1).wait()
