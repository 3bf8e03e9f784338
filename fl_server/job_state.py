"""The coordinator's state of a job on its disk: restarted, it goes on from the last finished exchange.

Written whole to a new file, synchronised, then renamed: after a kill the file is the old state or the new one. It holds
what the coordinator holds anyway (sealed letters, signed posts, ciphertexts, row counts) and no secret. A restart
repeats the exchange it was killed in with the very same bytes (signatures are deterministic), so vaults that answered
repeat their stored replies. Against: kills and power cuts; a disk that lies is found by the digest. Not against whoever
may write this file: such a one could only do what a dishonest coordinator can.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from fl_clients.protocol import Audience, Letter, Post
from privacy.errors import Refused

VERSION = 1
FILE = "coordinator.state"


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What one step cost. Seconds are wall time at the coordinator, bytes those of the messages."""

    step: str
    attempt: int
    audience: Audience
    participants: tuple[str, ...]
    messages: int
    seconds: float
    bytes_out: int
    bytes_in: int


@dataclass
class Mail:
    """Mail on its way, and the sum to hand out next."""

    letters: list[Letter] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    summed: bytes | None = None

    def copy(self) -> "Mail":
        return Mail(list(self.letters), list(self.posts), self.summed)


@dataclass(frozen=True, kw_only=True)
class JobState:
    """Where a job stands before exchange number `done` is asked in `attempt`."""

    done: int
    attempt: int
    participants: tuple[str, ...]
    mail: Mail
    steps: tuple[StepRecord, ...]
    pairs: Counter[tuple[str, str]]
    announcements: Mapping[str, Mapping[str, Any]]
    receipts: Mapping[str, str]
    histograms: tuple[tuple[int, ...], ...]


def write_state(folder: Path, job: bytes, state: JobState) -> None:
    """Replace the state in `folder`; raises `OSError` when the disk does not take it (the old state stays)."""
    body = msgpack.packb(
        {
            "done": state.done,
            "attempt": state.attempt,
            "participants": state.participants,
            "letters": [vars(letter) for letter in state.mail.letters],
            "posts": [vars(post) for post in state.mail.posts],
            "summed": state.mail.summed,
            "steps": [vars(step) for step in state.steps],
            "pairs": [[*pair, size] for pair, size in state.pairs.items()],
            "announcements": {name: dict(told) for name, told in state.announcements.items()},
            "receipts": dict(state.receipts),
            "histograms": state.histograms,
        }
    )
    data = msgpack.packb([VERSION, job, hashlib.sha256(body).digest(), body])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = folder / f"{FILE}.new"
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / FILE)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(folder: Path, job: bytes) -> JobState | None:
    """The last state, None where the job has not begun. `Refused` for a damaged file or one of another contract."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        version, of_job, digest, body = msgpack.unpackb(path.read_bytes(), max_bin_len=1 << 31)
        whole = version == VERSION and hashlib.sha256(body).digest() == digest
    except (ValueError, TypeError, msgpack.UnpackException):
        whole = False
    if not whole:
        raise Refused(f"{path} is damaged or of another version; remove it and start a new job")
    if of_job != job:
        raise Refused(f"{path} belongs to another contract; give this job a folder of its own")
    plain = msgpack.unpackb(body, max_bin_len=1 << 31)
    return JobState(
        done=plain["done"],
        attempt=plain["attempt"],
        participants=tuple(plain["participants"]),
        mail=Mail(
            [Letter(**{**letter, "participants": tuple(letter["participants"])}) for letter in plain["letters"]],
            [Post(**post) for post in plain["posts"]],
            plain["summed"],
        ),
        steps=tuple(StepRecord(**{**step, "participants": tuple(step["participants"])}) for step in plain["steps"]),
        pairs=Counter({(source, target): size for source, target, size in plain["pairs"]}),
        announcements=plain["announcements"],
        receipts=plain["receipts"],
        histograms=tuple(tuple(histogram) for histogram in plain["histograms"]),
    )
