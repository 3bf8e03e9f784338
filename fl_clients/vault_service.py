"""The vault as a gRPC service on a Unix socket of the institution's own machine (mode 0600: only its user connects)."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from fl_clients.courier import CHANNEL_OPTIONS, HANDLE, WHO, Call


@contextmanager
def serve(party: str, handle: Call, socket: Path) -> Iterator[None]:
    """Serve a party's vault while the context is open; steps are handled one at a time."""
    server = grpc.server(ThreadPoolExecutor(max_workers=1), options=CHANNEL_OPTIONS)

    def method(name: str) -> str:
        return name.rsplit("/", 1)[1]

    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "xinyi.Vault",
                {
                    method(HANDLE): grpc.unary_unary_rpc_method_handler(lambda request, _: handle(request)),
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
