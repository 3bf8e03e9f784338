"""A contract from a draft: a TOML file that names purpose, terms and the cards of the parties.

Nothing that is protective has a default here but those of the contract itself; what the draft leaves out of [model] is
the scorecard's default. Times are UTC or have their zone.

    purpose = "..."   scenario = "..."   label = "90 days overdue within 12 months"
    days = 30   uses = 1   retention_days = 365   least_banks = 3
    parties = ["bank1.card.json", ...]                files beside the draft, from `xinyi-node card`
    [privacy] epsilon = 1.0          [model] rounds = 3          [columns] banks = ["..."]   pboc = ["..."]
"""

import tomllib
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl_clients.contract import (
    AlignmentTerms,
    Contract,
    HETerms,
    LabelTerms,
    ModelTerms,
    Moment,
    PartyTerms,
    PrivacyTerms,
    all_releases,
)
from models.scorecard import ScorecardSettings
from privacy.errors import Refused

BANKS = "banks"
"""In [columns]: all banks, which bring the same ones."""


class Draft(BaseModel):
    """The TOML file. `columns`: party (or "banks") -> the columns asked of it; a party not named: all of its card."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    purpose: str
    scenario: str
    label: str
    simulation: bool = False
    not_before: Moment | None = None
    days: int = Field(ge=1)
    uses: int = 1
    retention_days: int
    least_banks: int
    parties: tuple[str, ...] = Field(min_length=2)
    columns: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    privacy: PrivacyTerms
    alignment: AlignmentTerms = AlignmentTerms()
    he: HETerms = HETerms()


def contract_of(draft_file: Path, *, job: str, coordinator: bytes, now: datetime) -> Contract:
    """The contract that a draft describes, for a new job number. `Refused` says what is wrong in which file."""
    draft = _read(Draft, draft_file, tomllib.loads(_text(draft_file)))
    cards = [_card(draft_file.parent / name) for name in draft.parties]
    begin = draft.not_before or now
    known = {field: value for field, value in asdict(ScorecardSettings()).items() if field in ModelTerms.model_fields}
    try:
        return Contract(
            job=job,
            purpose=draft.purpose,
            scenario=draft.scenario,
            label=LabelTerms(definition=draft.label),
            simulation=draft.simulation,
            not_before=begin,
            expires=begin + timedelta(days=draft.days),
            uses=draft.uses,
            retention_days=draft.retention_days,
            coordinator_identity=coordinator.hex(),
            parties=tuple(_asked(card, draft) for card in _checked(cards, draft)),
            model=ModelTerms.model_validate({**known, **draft.model}),
            privacy=draft.privacy,
            alignment=draft.alignment,
            he=draft.he,
            releases=all_releases(),
            least_banks=draft.least_banks,
        )
    except ValidationError as error:
        raise Refused(f"{draft_file.name}: {_first(error)}") from None


def _checked(cards: list[PartyTerms], draft: Draft) -> list[PartyTerms]:
    names = {card.name for card in cards} | {BANKS}
    if odd := sorted(set(draft.columns) - names):
        raise Refused(f"[columns] names {', '.join(odd)}, whose card is not among the parties")
    return cards


def _asked(card: PartyTerms, draft: Draft) -> PartyTerms:
    """The card with only the columns that the draft asks of it, in the draft's order."""
    key = BANKS if card.role == "bank" and card.name not in draft.columns else card.name
    if key not in draft.columns:
        return card
    offered = {column.name: column for column in card.columns}
    if lacking := [name for name in draft.columns[key] if name not in offered]:
        raise Refused(f"{card.name} does not offer {', '.join(lacking)}; its card has {', '.join(offered)}")
    return card.model_copy(update={"columns": tuple(offered[name] for name in draft.columns[key])})


def _card(path: Path) -> PartyTerms:
    try:
        return PartyTerms.model_validate_json(_text(path))
    except ValidationError as error:
        raise Refused(f"{path.name} is no card: {_first(error)}") from None


def _read(model: type[Draft], path: Path, values: dict[str, Any]) -> Draft:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise Refused(f"{path.name}: {_first(error)}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: {error}; give a readable file") from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
