"""The vault process of an institution: listens on the Unix socket of its home and answers for the jobs it approved.

Its log has no row, no value and no secret. It never asks for a passphrase: nobody sits in front of it.
"""

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path

from fl_clients.enrolment import socket_path
from fl_clients.institution import open_institution
from fl_clients.passphrase import institution_passphrase
from fl_clients.served_jobs import ServedJobs
from fl_clients.vault_service import serve
from privacy.errors import Refused

LOOK_S = 60.0
"""Seconds between two looks for expired contracts."""


def unattended_passphrase(home: Path) -> bytes | None:
    """The identity's passphrase, from a file or the keyring; `Refused` where somebody would have to type it."""

    def nobody(prompt: str) -> str:
        raise Refused(
            f"{prompt.strip().rstrip(':')}: the vault cannot ask; set XINYI_PASSPHRASE_FILE, or use a keyring"
        )

    return institution_passphrase(home, nobody)


def run(home: Path) -> None:
    """Serve until SIGTERM or SIGINT. A stale socket of a killed vault is replaced."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    path = socket_path(home)
    institution = open_institution(home, unattended_passphrase(home))
    jobs = ServedJobs(institution)
    path.unlink(missing_ok=True)
    try:
        with serve(institution.name, jobs.answer, path, jobs.open_lane):
            while not stop.wait(LOOK_S):
                jobs.end_expired()
        jobs.close()
    finally:
        path.unlink(missing_ok=True)
        institution.close()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = argparse.ArgumentParser(description="The vault of an institution")
    parser.add_argument("--home", type=Path, required=True)
    try:
        run(parser.parse_args().home)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
