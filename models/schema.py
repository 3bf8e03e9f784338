"""The shared schema: which fields the parties mean by which names, in which units, how sensitive, and known when.

One data file for each kind of party under `models/schema/`; this module reads and checks them, converts units and loan
tiers, and writes the catalogue page (`docs/data-catalogue.md`). It promises that two institutions that map onto the
same schema version mean the same quantity in the same unit.

Point-in-time rule of a field (`time`):
    identifier    never a feature
    application   known when the enterprise applies
    snapshot      as of the row's snapshot date, which must not be after the cut-off
    dated         itself a date or a year, which must not be after the cut-off
    outcome       seen after the cut-off: for labels only, never a feature
    derived       computed from other fields, never mapped (regime flags)
Cut-off of a row: the end of the month before its application date (取数截止申请日期上月月末), or the table's own.

Sources: GB 32100-2015, GB/T 4754-2017, GB/T 2260, JR/T 0197-2020 (levels), the second-generation enterprise credit
report, 国办发〔2021〕52号. No conformance is claimed.
"""

import difflib
import hashlib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from models.errors import DataError

PartyKind = Literal["bank", "pboc", "public_credit"]
FieldType = Literal["uscc", "text", "number", "integer", "flag", "code", "date", "regime"]
Time = Literal["identifier", "application", "snapshot", "dated", "outcome", "derived"]

KINDS: tuple[PartyKind, ...] = get_args(PartyKind)
HIGHEST_LEVEL = 4
REGIME_CODES = (("0", "before"), ("1", "since"))
MISSING_FIVE_TIERS = frozenset({"6", "9"})
"""Some feeds write 6 or 9 for unknown or not yet classified: missing, not a tier."""

_FOLDER = Path(__file__).parent / "schema"
_UNITS: Mapping[str, tuple[str, int, int]] = {
    # unit: (dimension, numerator, denominator of one such unit in the dimension's first unit)
    "yuan": ("money", 1, 1),
    "thousand_yuan": ("money", 1_000, 1),
    "wan_yuan": ("money", 10_000, 1),
    "million_yuan": ("money", 1_000_000, 1),
    "yi_yuan": ("money", 100_000_000, 1),
    "share": ("share", 1, 1),
    "percent": ("share", 1, 100),
    "permille": ("share", 1, 1_000),
    "kwh": ("energy", 1, 1),
    "wan_kwh": ("energy", 10_000, 1),
    "months": ("span", 1, 1),
    "years": ("span", 12, 1),
    "days": ("days", 1, 1),
    "count": ("count", 1, 1),
    "persons": ("persons", 1, 1),
    "year": ("year", 1, 1),
    "ratio": ("ratio", 1, 1),
    "tonne": ("tonne", 1, 1),
    "m3": ("m3", 1, 1),
}
_MUST_BE_STATED = frozenset({"money", "share", "energy", "span"})
_UNIT_ZH = {
    "yuan": "元",
    "thousand_yuan": "千元",
    "wan_yuan": "万元",
    "million_yuan": "百万元",
    "yi_yuan": "亿元",
    "percent": "%",
    "permille": "‰",
    "kwh": "千瓦时",
    "wan_kwh": "万千瓦时",
}


@dataclass(frozen=True, kw_only=True)
class CodeList:
    """Codes of a field: `values` code -> Chinese name, in order; `missing`: codes that mean "not known"."""

    name: str
    zh: str
    source: str
    values: Mapping[str, str]
    missing: tuple[str, ...] = ()

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(self.values)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of the schema.

    unit: of numbers. codes: of type "code" with a list, else `pattern` (a regular expression that fits a whole code).
    least, most: hard limits in the field's unit. typical: where the median of the positive values of a real table is
    expected, in the field's unit. boundary, of: of a regime flag, the day a rule changed and the field it concerns.
    level: sensitivity 1-4. Raises ValueError where these contradict each other.
    """

    name: str
    zh: str
    block: str
    type: FieldType
    level: int
    time: Time
    source: str
    unit: str | None = None
    codes: CodeList | None = None
    pattern: str | None = None
    least: float = -math.inf
    most: float = math.inf
    typical: tuple[float, float] | None = None
    personal: bool = False
    required: bool = False
    aliases: tuple[str, ...] = ()
    boundary: date | None = None
    of: str | None = None

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise ValueError(f"field {self.name}: {what}")

        if not re.fullmatch("[a-z][a-z0-9_]*", self.name):
            refuse("a name has small letters, digits and _ only")
        if self.type not in get_args(FieldType) or self.time not in get_args(Time):
            refuse(f"type {self.type!r}, time {self.time!r}: see models/schema.py for what there is")
        if not 1 <= self.level <= HIGHEST_LEVEL:
            refuse(f"level={self.level}, must be 1 to {HIGHEST_LEVEL}; level 5 data is not for this use")
        if (self.unit is not None) != (self.type in ("number", "integer")):
            refuse("numbers need a unit, other types have none")
        if self.unit is not None and self.unit not in _UNITS:
            refuse(f"unit {self.unit!r} is none of {', '.join(_UNITS)}")
        if (self.type == "code") != ((self.codes is not None) or (self.pattern is not None)):
            refuse("a code needs a code list or a pattern, other types have none")
        if (self.type == "regime") != (self.boundary is not None and self.of is not None):
            refuse("a regime flag needs `boundary` and `of`, other types have none")
        if (self.type == "regime") != (self.time == "derived"):
            refuse("regime flags, and nothing else, are derived")
        if not self.least <= self.most:
            refuse(f"range {self.least} to {self.most} is empty")
        if self.personal and self.level < HIGHEST_LEVEL:
            refuse(f"personal data has level {HIGHEST_LEVEL}, not {self.level}")

    @property
    def is_feature(self) -> bool:
        """Whether the point-in-time rule lets the field be a model's input."""
        return self.time in ("application", "snapshot", "dated", "derived")


@dataclass(frozen=True, kw_only=True)
class Schema:
    """All fields of one kind of party. `digest`: SHA-256 (hex) of its data file, for contracts and receipts."""

    kind: PartyKind
    version: str
    zh: str
    fields: tuple[Field, ...]
    digest: str

    def __post_init__(self) -> None:
        names = [field.name for field in self.fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"schema {self.kind}: {', '.join(twice)} defined twice")
        for field in self.fields:
            if field.of is not None and field.of not in names:
                raise ValueError(f"schema {self.kind}: {field.name} concerns {field.of}, which is no field")

    def field(self, name: str) -> Field:
        """DataError with the nearest names where there is no such field."""
        for field in self.fields:
            if field.name == name:
                return field
        near = ", ".join(sorted(nearest(name, [field.name for field in self.fields]))) or "none near"
        raise DataError(
            f"schema {self.kind} {self.version} has no field {name!r} (near: {near}); see docs/data-catalogue.md"
        )

    def has(self, name: str) -> bool:
        return any(field.name == name for field in self.fields)


@cache
def load_schema(kind: str) -> Schema:
    """The schema of a kind of party ("bank", "pboc", "public_credit"). DataError for another kind."""
    known = {name: name for name in KINDS}
    if kind not in known:
        raise DataError(f"no schema {kind!r}; there are {', '.join(KINDS)}")
    return parse_schema((_FOLDER / f"{kind}.toml").read_bytes())


def parse_schema(content: bytes) -> Schema:
    """The schema in a data file's bytes. ValueError says what is wrong in it."""
    document = tomllib.loads(content.decode())
    lists = {
        name: CodeList(
            name=name,
            zh=item["zh"],
            source=item["source"],
            values=item["values"],
            missing=tuple(item.get("missing", ())),
        )
        for name, item in document.get("codes", {}).items()
    }
    fields = tuple(_field(item, block, lists) for block in document["block"] for item in block["fields"])
    return Schema(
        kind=document["kind"],
        version=document["version"],
        zh=document["zh"],
        fields=fields,
        digest=hashlib.sha256(content).hexdigest(),
    )


def _field(item: Mapping[str, Any], block: Mapping[str, Any], lists: Mapping[str, CodeList]) -> Field:
    known = set(Field.__dataclass_fields__) - {"block", "least", "most"} | {"range"}
    if odd := set(item) - known:
        raise ValueError(f"field {item.get('name')}: unknown key {', '.join(sorted(odd))}")
    if "codes" in item and item["codes"] not in lists:
        raise ValueError(f"field {item['name']}: no code list {item['codes']!r} in this file")
    least, most = item.get("range", (-math.inf, math.inf))
    typical = item.get("typical")
    return Field(
        name=item["name"],
        zh=item["zh"],
        block=block["name"],
        type=item["type"],
        level=item.get("level", block["level"]),
        time=item.get("time", block["time"]),
        source=item.get("source", block["source"]),
        unit=item.get("unit"),
        codes=lists[item["codes"]] if "codes" in item else None,
        pattern=item.get("pattern"),
        least=least,
        most=most,
        typical=(typical[0], typical[1]) if typical is not None else None,
        personal=item.get("personal", False),
        required=item.get("required", False),
        aliases=tuple(item.get("aliases", ())),
        boundary=item.get("boundary"),
        of=item.get("of"),
    )


def unit_factor(source: str, target: str) -> tuple[int, int]:
    """(numerator, denominator) that turn a number in `source` units into `target` units, in lowest terms.

    DataError for an unknown unit, or for units of different dimensions (yuan are no shares).
    """
    for unit in (source, target):
        if unit not in _UNITS:
            raise DataError(f"unit {unit!r} is not known; there are {', '.join(_UNITS)}")
    (dimension, up, down), (other, target_up, target_down) = _UNITS[source], _UNITS[target]
    if dimension != other:
        raise DataError(f"a number in {source} ({dimension}) cannot become {target} ({other})")
    numerator, denominator = up * target_down, down * target_up
    divisor = math.gcd(numerator, denominator)
    return numerator // divisor, denominator // divisor


def must_state_unit(field: Field) -> bool:
    """Whether a mapping has to name the unit of its own column: wherever another unit of the kind is in use."""
    return field.unit is not None and _UNITS[field.unit][0] in _MUST_BE_STATED


def units_like(unit: str) -> tuple[str, ...]:
    """All units of the same dimension."""
    return tuple(other for other, (dimension, _, _) in _UNITS.items() if dimension == _UNITS[unit][0])


def unit_zh(unit: str) -> str:
    return _UNIT_ZH.get(unit, unit)


def three_from_five(tier: str) -> str | None:
    """Three-class loan tier (1 normal, 2 watch, 3 non-performing) of a five-class one; None for unknown (6, 9).

    The way back does not exist: non-performing may be substandard, doubtful or loss. ValueError for another code.
    """
    if tier in MISSING_FIVE_TIERS:
        return None
    if tier not in ("1", "2", "3", "4", "5"):
        raise ValueError(f"five-class tier {tier!r}: must be 1 to 5, or 6 or 9 for unknown")
    return min(tier, "3")


def nearest(name: str, names: Sequence[str], count: int = 3) -> list[str]:
    """Up to `count` of `names` that look like `name`."""
    return difflib.get_close_matches(name, names, n=count, cutoff=0.6)


def catalogue() -> str:
    """The catalogue page (Markdown): every field of every schema."""
    lines = [
        "# Data catalogue 数据目录",
        "",
        "Generated from `models/schema/*.toml` by `xinyi-node data catalogue`; do not edit. How it is used is told in",
        "`docs/data-in.md`. Levels are proposals after JR/T 0197-2020: the owner classifies its own data.",
        "",
    ]
    for schema in map(load_schema, KINDS):
        features = sum(field.is_feature for field in schema.fields)
        lines += [
            f"## {schema.kind} {schema.zh} (version {schema.version})",
            "",
            f"{len(schema.fields)} fields, {features} of them may be features. Digest `{schema.digest[:16]}`.",
            "",
            "| field | 中文 | type, unit | codes or range | level | personal | known when | source |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_row(field) for field in schema.fields]
        lines.append("")
    return "\n".join(lines)


def _row(field: Field) -> str:
    kind = field.type + (f", {unit_zh(field.unit)}" if field.unit else "") + (", required" if field.required else "")
    return (
        f"| `{field.name}` | {field.zh} | {kind} | {_values(field)} | {field.level} | "
        f"{'yes' if field.personal else ''} | {field.time} | {field.source} |"
    )


def _values(field: Field) -> str:
    if field.codes is not None:
        text = " ".join(f"{code} {name}" for code, name in field.codes.values.items())
        return text + (f" (missing: {' '.join(field.codes.missing)})" if field.codes.missing else "")
    if field.pattern is not None:
        return "`" + field.pattern.replace("|", "\\|") + "`"
    if field.boundary is not None:
        return f"`{field.of}` by the rule before (0) or since (1) {field.boundary}"
    if math.isinf(field.least) and math.isinf(field.most):
        return ""
    return f"{field.least:g} to {field.most:g}"
