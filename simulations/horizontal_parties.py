"""Banks of a simulated horizontal job: fresh identities, terms, and which bank a virtual node is, in memory or on Ray.

The banks run the programs that they would run in production. On Ray a message may reach any process, so the identities
lie in key files (mode 0600) of a private folder of this run; everything else a bank keeps is in its `Context.state`.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context

from fl_clients.horizontal_terms import BankTerms, HorizontalTerms
from fl_clients.secure_mod import BankOf
from privacy.errors import Refused
from privacy.identity import SigningIdentity


@dataclass(frozen=True, kw_only=True)
class HorizontalParties:
    """SECRET (holds identities). Everyone in a simulated job."""

    terms: HorizontalTerms
    coordinator: SigningIdentity
    identities: Mapping[str, SigningIdentity]

    def __repr__(self) -> str:
        return f"HorizontalParties({len(self.identities)} banks, secret)"

    def nodes(self) -> dict[int, dict[str, Any]]:
        """Node id -> node config, as Flower's simulation engine numbers partitions; for `MemoryGrid`."""
        return {10 + place: {"partition-id": place} for place in range(len(self.identities))}

    def bank_of(self, context: Context) -> tuple[str, SigningIdentity]:
        """For `secure_mod` in this process."""
        name = list(self.identities)[int(context.node_config["partition-id"])]
        return name, self.identities[name]

    def save(self, folder: Path) -> BankOf:
        """Write the identities into `folder` (made, mode 0700); the `bank_of` of processes that may read it."""
        folder.mkdir(mode=0o700, parents=True)
        names = tuple(self.identities)
        for place, identity in enumerate(self.identities.values()):
            identity.save(folder / f"{place}.pem")

        def bank_of(context: Context) -> tuple[str, SigningIdentity]:
            place = int(context.node_config["partition-id"])
            return names[place], SigningIdentity.load(folder / f"{place}.pem")

        return bank_of


def make_horizontal(
    names: tuple[str, ...], *, purpose: str = "simulation of horizontal training", **settings: Any
) -> HorizontalParties:
    """Fresh identities and terms. `settings`: the fields of `HorizontalTerms` beyond job, parties and purpose."""
    identities = {name: SigningIdentity.generate() for name in names}
    coordinator = SigningIdentity.generate()
    given = {"least_banks": len(names)} | settings
    unknown = set(given) - set(HorizontalTerms.model_fields)
    if unknown:
        raise Refused(f"terms have no {sorted(unknown)}; see HorizontalTerms")
    terms = HorizontalTerms(
        job=secrets.token_hex(16),
        purpose=purpose,
        coordinator_identity=coordinator.public.hex(),
        banks=tuple(BankTerms(name=name, identity=key.public.hex()) for name, key in identities.items()),
        **given,
    )
    return HorizontalParties(terms=terms, coordinator=coordinator, identities=identities)
