"""The app that the coordinator ships through Flower: two files that import what each institution installed itself.

Guarantee: a node runs this bundle and no other. Every institution builds the bundle from its own installation (the
same bytes everywhere: stored, not compressed, fixed dates), signs its hash with a key that it makes for this one
signature and throws away, and gives its SuperNode that key as the only trusted entity. Nobody, the institution
included, can ever sign a second hash with it.
Against: the coordinator, or whoever takes over its SuperLink, shipping other code to the nodes.
Assumes: the SuperNode's program is the institution's own (it checks once per run). Flower does not sign the run
config: the bundle takes nothing from it that reaches a vault.
Source: Flower 1.41 trusted entities (Ed25519 over 8-byte time || SHA-256 of the bundle).
"""

import base64
import hashlib
import io
import zipfile
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import BaseModel, ConfigDict

VERSION = "1.0.0"
"""Of the bundle, not of Xinyi: it changes when a byte of the bundle does."""
APP = "@xinyi/courier"
PINNED_HASH = "7ab39d8604fbd2503608ff974986b93f68ed94e9cf3caef5d708113d0da0d286"
"""SHA-256 of the bundle of this release; a test holds the source to it."""

_PYPROJECT = f"""\
[project]
name = "courier"
version = "{VERSION}"
description = "Carries the steps of Xinyi between the coordinator and the institutions' vaults; holds no code of them"
license = "Apache-2.0"
dependencies = ["flwr>=1.41.0"]

[tool.flwr.app]
publisher = "xinyi"

[tool.flwr.app.components]
serverapp = "xinyi_courier.server_app:app"
clientapp = "xinyi_courier.client_app:app"

[tool.flwr.app.config]
job = ""
use = 0
"""
_FILES = {
    "pyproject.toml": _PYPROJECT,
    "xinyi_courier/__init__.py": "",
    "xinyi_courier/client_app.py": 'from fl_clients.courier import app\n\n__all__ = ["app"]\n',
    "xinyi_courier/server_app.py": 'from fl_server.server_app import app\n\n__all__ = ["app"]\n',
}
_DATE = (1980, 1, 1, 0, 0, 0)


class Approval(BaseModel):
    """An institution's signature of the bundle, in the form that Flower checks. All of it is public."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key_id: str
    public_key: str
    """OpenSSH form."""
    signature: str
    """Base64 (URL alphabet) of 64 bytes."""
    signed_at: int
    """Seconds since 1970, UTC."""
    bundle: str
    """SHA-256 of the bundle, hex."""


def bundle() -> bytes:
    """The bundle (a Flower FAB): the same bytes at every institution of one release."""
    out = io.BytesIO()
    manifest = []
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for path, text in _FILES.items():
            data = text.encode()
            _write(archive, path, data)
            manifest.append(f"{path},{hashlib.sha256(data).hexdigest()},{len(data) * 8}")
        _write(archive, ".info/CONTENT", "\n".join(manifest).encode())
    return out.getvalue()


def _write(archive: zipfile.ZipFile, path: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(path, _DATE)
    entry.create_system = 3  # the same on every operating system
    archive.writestr(entry, data)


def bundle_hash() -> str:
    return hashlib.sha256(bundle()).hexdigest()


def approve(now: datetime) -> Approval:
    """Sign the bundle of this installation with a key that exists for this call only."""
    key = Ed25519PrivateKey.generate()
    public = key.public_key()
    signed_at = int(now.timestamp())
    digest = hashlib.sha256(bundle()).digest()
    signature = key.sign(signed_at.to_bytes(8, "big") + digest)
    return Approval(
        key_id=f"fpk_{hashlib.sha256(public.public_bytes_raw()).hexdigest()[:32]}",
        public_key=public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
        signature=base64.urlsafe_b64encode(signature).decode().rstrip("="),
        signed_at=signed_at,
        bundle=digest.hex(),
    )
