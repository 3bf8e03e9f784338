"""The privacy certificate as a page for people: one self-contained HTML file, of what certificate.json says.

Nothing on the page is computed beyond formatting, and the page proves nothing: `xinyi-audit certificate FILE` checks
the JSON file.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from privacy.audit_format import canonical


def certificate_page(certificate: Mapping[str, Any]) -> str:
    """HTML of a certificate ({"body": ..., "signatures": ...})."""
    body = certificate["body"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("certificate.html.j2").render(
        body=body,
        contract=body["contract"]["contract"],
        facts=body["facts"],
        signatures=certificate["signatures"],
        digest=hashlib.sha256(canonical(body)).hexdigest(),
        released=_released(body["receipts"]),
    )


def _released(receipts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, int]]]:
    """(release and receiver, party -> times) over all receipts."""
    names = sorted({name for receipt in receipts.values() for name in receipt["released"]})
    return [
        (name, {party: int(receipt["released"].get(name, 0)) for party, receipt in receipts.items()}) for name in names
    ]
