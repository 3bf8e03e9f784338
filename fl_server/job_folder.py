"""The coordinator's home and the jobs in it: contracts and the signatures that they have so far.

    HOME    identity.key (0600)    jobs/<job>/contract.json
Guarantee: a signature enters only if it is its signer's over this very contract; nothing here is secret but the key.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from fl_clients.contract import COORDINATOR, SignedContract
from privacy.errors import Refused
from privacy.identity import SigningIdentity
from privacy.passphrase import FILE_VARIABLE, for_key
from privacy.private_file import private_folder, write_private

HOME_VARIABLE = "XINYI_SERVER_HOME"
DEFAULT_HOME = Path("~/.xinyi-server")
IDENTITY, JOBS, CONTRACT, RUNS, RESULT = "identity.key", "jobs", "contract.json", "runs", "result"

_FILE_NAME = re.compile(r"\w[\w .-]*")


def server_home(given: Path | None) -> Path:
    """The home that was asked for: the option, else the environment's, else ~/.xinyi-server."""
    return (given or Path(os.environ.get(HOME_VARIABLE, str(DEFAULT_HOME)))).expanduser()


def create_server_home(home: Path, passphrase: bytes | None = None) -> SigningIdentity:
    """Make a home with a fresh identity; one that exists is `Refused`."""
    if (home / IDENTITY).exists():
        raise Refused(f"{home} is the home of a coordinator already; choose another folder")
    private_folder(home)
    private_folder(home / JOBS)
    identity = SigningIdentity.generate()
    identity.save(home / IDENTITY, passphrase)
    return identity


def coordinator_identity(home: Path) -> SigningIdentity:
    """The coordinator's key; asks for its passphrase where it has one."""
    key = home / IDENTITY
    if not key.exists():
        raise Refused(f"{home} is no home of a coordinator; make one with `xinyi-server init`")
    return SigningIdentity.load(key, for_key(key, FILE_VARIABLE))


def save(home: Path, signed: SignedContract) -> Path:
    """Keep a job's contract; another contract under a known number is `Refused`."""
    folder = private_folder(home / JOBS / signed.contract.job)
    path = folder / CONTRACT
    if path.exists() and _read(path).contract.hash != signed.contract.hash:
        raise Refused(f"job {signed.contract.job} has another contract; a changed contract is a new job")
    write_private(path, signed.model_dump_json(indent=1).encode())
    return path


def load(home: Path, job: str) -> SignedContract:
    """A job's contract, by its number or an unambiguous beginning of it."""
    found = [folder for folder in _folders(home) if folder.name.startswith(job)]
    if len(found) != 1 or not job:
        raise Refused(f"job {job!r}: {'unknown' if not found else 'ambiguous'}; see `xinyi-server job list`")
    return _read(found[0] / CONTRACT)


def load_all(home: Path) -> tuple[SignedContract, ...]:
    """Every job's contract, in the order of expiry."""
    every = [_read(folder / CONTRACT) for folder in _folders(home)]
    return tuple(sorted(every, key=lambda signed: (signed.contract.expires, signed.contract.job)))


def with_signatures(signed: SignedContract, files: Sequence[Path]) -> SignedContract:
    """The contract with the signatures in `files` (as `xinyi-node job approve` writes them), each checked."""
    for path in files:
        brought = _read(path)
        if brought.contract.hash != signed.contract.hash:
            raise Refused(
                f"{path.name} signs contract {brought.contract.hash.hex()[:16]} of job {brought.contract.job[:8]}, "
                f"this is {signed.contract.hash.hex()[:16]} of {signed.contract.job[:8]}; ask for one of this"
            )
        for signer, signature in brought.signatures.items():
            if signer not in signed.signatures:
                signed = signed.added(signer, signature)
    return signed


def missing(signed: SignedContract) -> tuple[str, ...]:
    """Whose signature is not there yet."""
    return tuple(signer for signer in signed.contract.signers if signer not in signed.signatures)


def invite(signed: SignedContract, out: Path) -> tuple[Path, ...]:
    """One file for every party: the contract with the signatures so far; the coordinator's must be there."""
    signed.check(COORDINATOR)
    odd = [party.name for party in signed.contract.parties if not _FILE_NAME.fullmatch(party.name)]
    if odd:  # a card could name a file outside the folder
        raise Refused(f"party {odd[0]!r} cannot be the name of a file; have it take letters, digits, blanks, . _ -")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for party in signed.contract.parties:
        path = out / f"{signed.contract.job[:8]}.{party.name}.contract.json"
        path.write_text(signed.model_dump_json(indent=1), encoding="utf-8")
        written.append(path)
    return tuple(written)


def begin_run(home: Path, signed: SignedContract) -> tuple[int, Path]:
    """(number of the run, folder for its result): a number is given once, also when the run comes to nothing.

    `Refused` when the contract's uses are spent; every vault counts them as well.
    """
    runs = private_folder(home / JOBS / signed.contract.job / RUNS)
    use = 1 + max((int(path.name) for path in runs.iterdir() if path.name.isdecimal()), default=0)
    if use > signed.contract.uses:
        raise Refused(
            f"job {signed.contract.job[:8]} was run {use - 1} times, its contract allows {signed.contract.uses}; a "
            "further run needs a new contract"
        )
    (runs / str(use)).mkdir(mode=0o700)
    return use, runs / str(use) / RESULT


def run_folder(home: Path, signed: SignedContract, use: int) -> Path:
    """The folder that `begin_run` made for run number `use`."""
    folder = home / JOBS / signed.contract.job / RUNS / str(use)
    if not folder.is_dir():
        raise Refused(f"run {use} of job {signed.contract.job[:8]} was never begun; use `xinyi-server job start`")
    return folder


def _folders(home: Path) -> list[Path]:
    jobs = home / JOBS
    return sorted(path for path in jobs.iterdir() if (path / CONTRACT).exists()) if jobs.is_dir() else []


def _read(path: Path) -> SignedContract:
    try:
        return SignedContract.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise Refused(f"{path} is no signed contract: {first['msg']}") from None
