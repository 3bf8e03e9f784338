"""The vault process of an institution: listens on the Unix socket of its home and answers for the jobs it approved.

A request names its job by the contract's hash; which vault answers is decided here, from what this institution's
people approved, never by the asker. Without an approved job every step is refused.
"""

import argparse
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from fl_clients.courier import CHANNEL_OPTIONS, HANDLE, WHO
from fl_clients.enrolment import name_and_role, socket_path
from privacy.errors import Refused


@contextmanager
def serve(name: str, handle: Callable[[bytes], bytes], path: Path) -> Iterator[None]:
    """Answer on the socket while the context is open, one step at a time. A stale socket of a killed vault is replaced.

    `handle` may raise `Refused`: the caller gets its line as FAILED_PRECONDITION.
    """

    def step(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return handle(request)
        except Refused as refused:
            print(f"refused: {refused}", flush=True)  # a refusal holds no secret
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(refused))
            raise

    server = grpc.server(ThreadPoolExecutor(max_workers=1), options=CHANNEL_OPTIONS)
    methods = {
        HANDLE.rsplit("/", 1)[1]: grpc.unary_unary_rpc_method_handler(step),
        WHO.rsplit("/", 1)[1]: grpc.unary_unary_rpc_method_handler(lambda _, __: name.encode()),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("xinyi.Vault", methods),))
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
        server.start()
    finally:
        os.umask(before)
    try:
        yield
    finally:
        server.stop(grace=1).wait()
        path.unlink(missing_ok=True)


def _no_job(_: bytes) -> bytes:
    raise Refused("no job is approved here; the institution's people decide with `xinyi-node job approve`")


def main() -> None:
    parser = argparse.ArgumentParser(description="The vault of an institution")
    parser.add_argument("--home", type=Path, required=True)
    home = parser.parse_args().home
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with serve(name_and_role(home)[0], _no_job, socket_path(home)):
        stop.wait()


if __name__ == "__main__":
    main()
