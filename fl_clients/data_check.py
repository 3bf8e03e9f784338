"""Check a mapped table before any job sees it, write a local report, and later read the same table again, or refuse.

`check_table` goes once over the batches and says, one line each, what is wrong: malformed and repeated codes, cells of
the wrong type, values outside the field's limits, features dated after the cut-off, units that look wrong by 10,000,
"no file" confused with zero, drift against the last check. Errors refuse the table, warnings do not. Nothing leaves the
machine.

`load_checked` reads the table for a job and compares the content hash of the check: a table, mapping or schema that
changed since is refused. The hash does not depend on the order of rows (databases have none): SHA-256 over the sorted
128-bit BLAKE2b digests of the converted rows. It is a fingerprint of enumerable data: it stays here.

Drift is the population stability index sum((p - q) ln(p / q)) over about ten groups of the last check, each count
raised by one half so that empty groups stay finite; above 0.1 a shift is worth a look, above 0.25 it is warned about.

Memory: 32 bytes a row for hash and duplicates, everything else is counted batch by batch.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, ValidationError

from fl_clients.mapping import (
    HIT_FIELDS,
    SHOWN_ROWS,
    Bools,
    Converted,
    Problem,
    Problems,
    TableMapping,
    body_checks_hold,
    convert,
)
from models import schema as schemas
from models import uscc
from models.errors import DataError
from models.schema import Field, Schema

Days = npt.NDArray[np.datetime64]
Words = npt.NDArray[np.uint64]

DRIFT_LOOK, DRIFT_WARN = 0.1, 0.25
LEAST_ROWS_FOR_UNITS = 20
MISSING_SHIFT = 0.1
ROWS_SHIFT = 0.5

_BINS_PER_DECADE, _LOWEST_DECADE, _DECADES = 20, -6, 21
_BINS = _BINS_PER_DECADE * _DECADES
_CODE_BYTES = uscc.LENGTH
_NOT_A_DAY = np.datetime64("NaT", "D")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finding(_Frozen):
    """One line for the institution. Errors refuse the table."""

    severity: Literal["error", "warning"]
    field: str
    text: str


class ColumnSummary(_Frozen):
    """What the check saw of one field. histogram: signed log bin -> rows, of numbers; codes: code -> rows, of codes.

    least, median, most: in the field's unit, as text for dates. The median is read from the histogram (within 6 %).
    """

    field: str
    zh: str
    source: str
    type: str
    unit: str | None
    level: int
    personal: bool
    time: str
    missing: int
    least: float | str | None = None
    median: float | None = None
    most: float | str | None = None
    histogram: dict[int, int] = {}
    codes: dict[str, int] = {}
    drift: float | None = None


class Receipt(_Frozen):
    """The outcome of a check, kept locally: for the next check's drift, and for `load_checked`."""

    version: Literal[1] = 1
    checked_on: date
    source: str
    schema_kind: str
    schema_version: str
    schema_digest: str
    mapping_digest: str
    rows: int
    usable_rows: int
    enterprises: int
    personal_codes: int
    inner_check_fails: int
    repeated_enterprises: int
    content_hash: str
    columns: tuple[ColumnSummary, ...]
    findings: tuple[Finding, ...]
    compared_with: date | None = None

    @property
    def refused(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def repeated_rows(self) -> int:
        """Rows beyond the first of each enterprise."""
        return self.usable_rows - self.enterprises


# --- checking ---


def check_table(
    mapping: TableMapping, schema: Schema, batches: Iterable[pa.RecordBatch], *, last: Receipt | None, today: date
) -> Receipt:
    """Go over the mapped batches once. `last`: the receipt of the check before, for drift. Errors are findings."""
    problems: Problems = {}
    tallies = {item.name: _Tally(item) for item in _present(mapping, schema)}
    fingerprint = _Fingerprint()
    rows = personal = inner_fails = 0
    for converted in _converted(mapping, schema, batches, problems):
        rows += converted.rows
        usable = converted.kept(converted.columns["uscc"] != b"")
        codes = usable.columns["uscc"]
        fingerprint.add(usable)
        personal += int(np.char.startswith(codes, b"92").sum())
        inner_fails += int((~body_checks_hold(codes)).sum())
        for name, tally in tallies.items():
            if name != "uscc":
                tally.add(usable.columns[name])
        _check_dates(usable, mapping, schema, today, problems)
        _check_hits(usable, schema, problems)
        _check_tiers(usable, schema, problems)
    enterprises, repeated = fingerprint.enterprises()
    columns = [tally.summary(mapping, rows=fingerprint.rows) for tally in tallies.values()]
    comparable = last if last is not None and last.schema_kind == schema.kind and last.usable_rows else None
    if comparable is not None:
        before = {column.field: column for column in comparable.columns}
        columns = [_with_drift(column, before.get(column.field)) for column in columns]
    findings = [
        *_row_findings(mapping, rows, fingerprint.rows, enterprises, repeated),
        *_rule_findings(mapping, schema),
        *_problem_findings(mapping, schema, problems),
        *_unit_findings(mapping, schema, columns, comparable),
        *_column_findings(schema, columns, fingerprint.rows),
        *_code_findings(personal, inner_fails),
        *(_drift_findings(columns, fingerprint.rows, comparable) if comparable is not None else ()),
    ]
    return Receipt(
        checked_on=today,
        source=mapping.source.describe(),
        schema_kind=schema.kind,
        schema_version=schema.version,
        schema_digest=schema.digest,
        mapping_digest=mapping.digest,
        rows=rows,
        usable_rows=fingerprint.rows,
        enterprises=enterprises,
        personal_codes=personal,
        inner_check_fails=inner_fails,
        repeated_enterprises=repeated,
        content_hash=fingerprint.content_hash(mapping, schema),
        columns=tuple(columns),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity != "error")),
        compared_with=comparable.checked_on if comparable is not None else None,
    )


def _present(mapping: TableMapping, schema: Schema) -> list[Field]:
    """The mapped fields and the regime flags that follow from them, in the schema's order."""
    dated = "snapshot_date" in mapping.columns or "application_date" in mapping.columns
    return [
        item
        for item in schema.fields
        if item.name in mapping.columns or (item.time == "derived" and item.of in mapping.columns and dated)
    ]


def _converted(
    mapping: TableMapping, schema: Schema, batches: Iterable[pa.RecordBatch], problems: Problems
) -> Iterator[Converted]:
    first_row = 1
    for batch in batches:
        yield convert(batch, mapping, schema, first_row, problems)
        first_row += batch.num_rows


class _Tally:
    """Running counts of one field."""

    def __init__(self, wanted: Field) -> None:
        self._field = wanted
        self._missing = 0
        self._histogram = np.zeros(2 * _BINS + 1, np.int64)
        self._codes: dict[int, int] = {}
        self._least: Any = None
        self._most: Any = None

    def add(self, cells: Any) -> None:
        if isinstance(cells, pa.Array):
            self._missing += cells.null_count
            return
        if cells.dtype == np.int16:
            for value, count in zip(*np.unique(cells, return_counts=True), strict=True):
                if value < 0:
                    self._missing += int(count)
                else:
                    self._codes[int(value)] = self._codes.get(int(value), 0) + int(count)
            return
        known = cells[~(np.isnat(cells) if cells.dtype.kind == "M" else np.isnan(cells))]
        self._missing += len(cells) - len(known)
        if not len(known):
            return
        self._least = known.min() if self._least is None else min(self._least, known.min())
        self._most = known.max() if self._most is None else max(self._most, known.max())
        values = known.astype(np.float64)
        self._histogram += np.bincount(_log_bins(values) + _BINS, minlength=2 * _BINS + 1)

    def summary(self, mapping: TableMapping, rows: int) -> ColumnSummary:
        wanted = self._field
        item = mapping.columns.get(wanted.name)
        if item is None:
            source = f"computed from {wanted.of}"
        elif item.source is None:
            source = f"constant {item.constant}"
        else:
            source = item.source
        names = _code_names(wanted)
        is_date = wanted.type == "date"
        return ColumnSummary(
            field=wanted.name,
            zh=wanted.zh,
            source=source,
            type=wanted.type,
            unit=wanted.unit,
            level=wanted.level,
            personal=wanted.personal,
            time=wanted.time,
            missing=self._missing if rows else 0,
            least=None if self._least is None else str(self._least) if is_date else float(self._least),
            median=None if is_date else _median(self._histogram),
            most=None if self._most is None else str(self._most) if is_date else float(self._most),
            histogram={int(b) - _BINS: int(self._histogram[b]) for b in np.flatnonzero(self._histogram)},
            codes={names[value]: count for value, count in sorted(self._codes.items())},
        )


def _code_names(wanted: Field) -> tuple[str, ...]:
    return wanted.codes.codes if wanted.codes is not None else tuple(code for code, _ in schemas.REGIME_CODES)


def _log_bins(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Signed log bin of each value: 0 for zero, 20 bins a decade from 1e-6 to 1e15 on either side."""
    size = np.abs(values)
    with np.errstate(divide="ignore"):
        place = np.floor((np.log10(size) - _LOWEST_DECADE) * _BINS_PER_DECADE)
    place = np.where(size > 0, np.clip(place, 0, _BINS - 1) + 1, 0)
    return (np.sign(values) * place).astype(np.int64)


def _bin_value(number: int) -> float:
    """The middle of a signed log bin."""
    if number == 0:
        return 0.0
    return float(np.sign(number)) * 10 ** ((abs(number) - 0.5) / _BINS_PER_DECADE + _LOWEST_DECADE)


def _median(histogram: npt.NDArray[np.int64]) -> float | None:
    total = int(histogram.sum())
    if total == 0:
        return None
    place = int(np.searchsorted(np.cumsum(histogram), (total + 1) // 2))
    return _bin_value(place - _BINS)


def _positive_median(column: ColumnSummary) -> tuple[float, int]:
    """(median of the positive values, how many there are)."""
    histogram = np.zeros(2 * _BINS + 1, np.int64)
    for number, count in column.histogram.items():
        if number > 0:
            histogram[number + _BINS] = count
    median = _median(histogram)
    return (median if median is not None else 0.0), int(histogram.sum())


class _Fingerprint:
    """128-bit digests of rows, and codes packed to 85 bits, of the whole table."""

    def __init__(self) -> None:
        self._digests: list[Words] = []
        self._codes: list[Words] = []
        self.rows = 0

    def add(self, converted: Converted) -> Words:
        """The digests of the batch's rows, uint64[n, 2]."""
        digests = row_digests(converted)
        self._digests.append(digests)
        self._codes.append(_packed(converted.columns["uscc"]))
        self.rows += converted.rows
        return digests

    def enterprises(self) -> tuple[int, int]:
        """(different enterprises, enterprises in more than one row)."""
        if not self.rows:
            return 0, 0
        codes = np.concatenate(self._codes)
        ordered = codes[np.lexsort((codes[:, 1], codes[:, 0]))]
        starts = np.flatnonzero(np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)])
        lengths = np.diff(np.r_[starts, len(ordered)])
        return len(starts), int((lengths > 1).sum())

    def content_hash(self, mapping: TableMapping, schema: Schema) -> str:
        """SHA-256 (hex) over mapping, schema and the sorted row digests."""
        digests = np.concatenate(self._digests) if self._digests else np.zeros((0, 2), np.uint64)
        ordered = digests[np.lexsort((digests[:, 1], digests[:, 0]))]
        head = f"xinyi table 1|{mapping.digest}|{schema.digest}|{self.rows}|".encode()
        return hashlib.sha256(head + ordered.astype(">u8").tobytes()).hexdigest()


def row_digests(converted: Converted) -> Words:
    """BLAKE2b-128 of each row of converted cells, uint64[n, 2]; fields in the order of their names."""
    if not converted.rows:
        return np.zeros((0, 2), np.uint64)
    parts = [_cell_bytes(converted.columns[name], converted.rows) for name in sorted(converted.columns)]
    parts += [_cell_bytes(converted.known_on[name], converted.rows) for name in sorted(converted.known_on)]
    matrix = np.ascontiguousarray(np.concatenate(parts, axis=1))
    width = matrix.shape[1]
    content = matrix.tobytes()
    digest = hashlib.blake2b
    packed = b"".join(
        [digest(content[at : at + width], digest_size=16).digest() for at in range(0, len(content), width)]
    )
    return np.frombuffer(packed, ">u8").astype(np.uint64).reshape(-1, 2)


def _cell_bytes(cells: Any, rows: int) -> npt.NDArray[np.uint8]:
    """uint8[n, w]: cells in a fixed width, equal where they are equal; texts by their digest."""
    if isinstance(cells, pa.Array):
        encoded = cells.dictionary_encode()
        table = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in encoded.dictionary.to_pylist()]
        known = np.frombuffer(b"".join([*table, bytes(16)]), np.uint8).reshape(-1, 16)
        return np.asarray(known[encoded.indices.fill_null(len(table)).to_numpy(zero_copy_only=False)])
    if cells.dtype == np.float64:
        cells = np.where(np.isnan(cells), np.nan, cells)  # one NaN pattern
        return np.asarray(cells.astype("<f8").view(np.uint8).reshape(rows, 8))
    if cells.dtype.kind == "M":
        return np.asarray(cells.astype("datetime64[D]").astype("<i8").view(np.uint8).reshape(rows, 8))
    if cells.dtype == np.int16:
        return np.asarray(cells.astype("<i2").view(np.uint8).reshape(rows, 2))
    return np.asarray(np.ascontiguousarray(cells).view(np.uint8).reshape(rows, _CODE_BYTES))


_PLACES = np.zeros(256, np.uint64)
_PLACES[np.frombuffer(uscc.ALPHABET.encode(), np.uint8)] = np.arange(len(uscc.ALPHABET), dtype=np.uint64)


def _packed(codes: npt.NDArray[np.bytes_]) -> Words:
    """Valid codes as uint64[n, 2], five bits a character; the check character follows from the others."""
    letters = np.ascontiguousarray(codes).view(np.uint8).reshape(len(codes), _CODE_BYTES)
    words = np.zeros((len(codes), 2), np.uint64)
    for place in range(_CODE_BYTES - 1):
        half = 0 if place < 12 else 1
        words[:, half] = (words[:, half] << np.uint64(5)) | _PLACES[letters[:, place]]
    return words


# --- rules over several fields ---


def cut_offs(converted: Converted, mapping: TableMapping) -> Days:
    """Each row's cut-off: the end of the month before its application, else the table's; NaT where there is neither."""
    fixed = np.datetime64(mapping.rows.cut_off) if mapping.rows.cut_off is not None else _NOT_A_DAY
    applied = converted.columns.get("application_date")
    if applied is None:
        return np.full(converted.rows, fixed, "datetime64[D]")
    ends = applied.astype("datetime64[M]").astype("datetime64[D]") - np.timedelta64(1, "D")
    return np.asarray(np.where(np.isnat(applied), fixed, ends), "datetime64[D]")


def _note(problems: Problems, name: str, what: str, wrong: Bools, converted: Converted) -> None:
    places = np.flatnonzero(wrong)
    if len(places):
        problems.setdefault((name, what), Problem()).add(converted.numbers[places])


def _check_dates(converted: Converted, mapping: TableMapping, schema: Schema, today: date, problems: Problems) -> None:
    cut = cut_offs(converted, mapping)
    columns = converted.columns
    now = np.datetime64(today)
    if "application_date" in columns:
        applied = columns["application_date"]
        _note(problems, "application_date", "no application date and no cut_off", np.isnat(cut), converted)
        _note(problems, "application_date", "in the future", applied > now, converted)
    for name in columns:
        wanted = schema.field(name)
        if name == "application_date" or wanted.time != "dated":
            continue
        if wanted.type == "date":
            _note(problems, name, "after the cut-off", columns[name] > cut, converted)
            if name == "snapshot_date" and _needs_snapshot(mapping, schema):
                _note(
                    problems,
                    name,
                    "empty: cannot show when the features were known",
                    np.isnat(columns[name]),
                    converted,
                )
        else:
            years = cut.astype("datetime64[Y]").astype(np.int64) + 1970
            with np.errstate(invalid="ignore"):
                late = ~np.isnat(cut) & (columns[name] > years)
            _note(problems, name, "after the cut-off", late, converted)
    for name, known_on in converted.known_on.items():
        _note(problems, name, "known only after the cut-off (dated_by)", known_on > cut, converted)


def _needs_snapshot(mapping: TableMapping, schema: Schema) -> bool:
    return any(schema.field(name).time == "snapshot" for name in mapping.columns)


def _is_missing(cells: Any) -> Bools:
    if isinstance(cells, pa.Array):
        return np.asarray(cells.is_null().to_numpy(zero_copy_only=False))
    if cells.dtype == np.int16:
        return np.asarray(cells < 0)
    return np.asarray(np.isnat(cells) if cells.dtype.kind == "M" else np.isnan(cells))


def _check_hits(converted: Converted, schema: Schema, problems: Problems) -> None:
    for name in HIT_FIELDS:
        if name not in converted.columns:
            continue
        hit = converted.columns[name]
        others = [
            _is_missing(cells)
            for other, cells in converted.columns.items()
            if other not in HIT_FIELDS
            and schema.field(other).time in ("snapshot", "dated")
            and other != "snapshot_date"
        ]
        _note(problems, name, "empty: say 1 (has a file) or 0 (no file)", np.isnan(hit), converted)
        if others:
            nothing = np.logical_and.reduce(others)
            _note(
                problems, name, "0 (no file) beside other values; no file is not zero", (hit == 0) & ~nothing, converted
            )
            _note(problems, name, "1 (has a file) and every other field empty", (hit == 1) & nothing, converted)


def _check_tiers(converted: Converted, schema: Schema, problems: Problems) -> None:
    """The worst of the account rows (five classes) against the summary (three classes)."""
    if not {"summary_tier", "account_tier"} <= set(converted.columns):
        return
    account, summary = converted.columns["account_tier"], converted.columns["summary_tier"]
    codes = schema.field("account_tier").codes
    if codes is None:
        raise ValueError("account_tier has no code list")
    three = np.array([int(schemas.three_from_five(code) or 0) - 1 for code in codes.codes] + [-1])[account]
    wrong = (three >= 0) & (summary >= 0) & (three != summary)
    _note(problems, "account_tier", "another class than summary_tier (five against three)", wrong, converted)


# --- findings ---

_ONLY_WARNED = (
    "1 (has a file) and every other field empty",
    "another class than summary_tier (five against three)",
)
_OF_CODES = ("malformed code", "empty")


def _error(name: str, text: str) -> Finding:
    return Finding(severity="error", field=name, text=text)


def _warning(name: str, text: str) -> Finding:
    return Finding(severity="warning", field=name, text=text)


def _row_findings(mapping: TableMapping, rows: int, usable: int, enterprises: int, repeated: int) -> Iterator[Finding]:
    if not rows:
        yield _error("", "the table is empty; check the source")
    elif not usable:
        yield _error("uscc", f"none of {rows:,} rows has a valid unified social credit code; is it the right column?")
    if repeated:
        text = f"{repeated:,} enterprises are in more than one row ({usable - enterprises:,} rows too many)"
        rules = mapping.rows
        if rules.duplicates == "refuse":
            yield _error(
                "uscc", f'{text}; say in [rows] duplicates = "latest" or "worst" and `by`, or select one row each'
            )
        else:
            yield _warning("uscc", f"{text}; the {rules.duplicates} by {rules.by} is kept, as [rows] says")


def _rule_findings(mapping: TableMapping, schema: Schema) -> Iterator[Finding]:
    if "application_date" not in mapping.columns and mapping.rows.cut_off is None:
        yield _error("", "no cut-off: map application_date, or write cut_off = YYYY-MM-DD in [rows]")
    if "snapshot_date" not in mapping.columns and _needs_snapshot(mapping, schema):
        yield _error(
            "snapshot_date",
            "no snapshot date: cannot show that the features were known at the cut-off; map snapshot_date "
            "(a column, or constant = YYYY-MM-DD)",
        )


def _problem_findings(mapping: TableMapping, schema: Schema, problems: Problems) -> Iterator[Finding]:
    for (name, what), problem in problems.items():
        wanted = schema.field(name)
        shown = ", ".join(f"{row:,}" for row in problem.rows)
        more = " ..." if problem.count > SHOWN_ROWS else ""
        examples = f": {', '.join(problem.examples)}" if problem.examples else ""
        text = f"{wanted.zh} {name}: {problem.count:,} rows {what}{examples} (row {shown}{more})"
        if name == "uscc" and what in _OF_CODES and mapping.rows.malformed_codes == "drop":
            yield _warning(name, f"{text}; left out, as [rows] malformed_codes says")
        elif what in _ONLY_WARNED:
            yield _warning(name, text)
        else:
            yield _error(name, text + _hint(what))


def _hint(what: str) -> str:
    if what in _OF_CODES:
        return '; mend them, or say malformed_codes = "drop" in [rows]'
    if what == "unknown code":
        return "; translate in `codes`, or list under `missing`"
    if what.startswith(("not a ", "neither")):
        return "; mend them, or list what means unknown under `missing`"
    if what.startswith(("below", "above")):
        return "; wrong unit, or a code for unknown (list it under `missing`)?"
    if "cut-off" in what:
        return "; a feature from after the decision betrays the outcome: refused"
    return ""


def _suspected_factor(wanted: Field, median: float) -> int | None:
    """The factor by which a median is off its typical range, if dividing or multiplying by it mends that."""
    if wanted.typical is None or wanted.unit is None:
        return None
    low, high = wanted.typical
    factor = 100 if wanted.unit in schemas.units_like("share") else 10_000
    if low <= median <= high:
        return None
    return factor if low <= median * factor <= high or low <= median / factor <= high else None


def _unit_findings(
    mapping: TableMapping, schema: Schema, columns: Sequence[ColumnSummary], last: Receipt | None
) -> Iterator[Finding]:
    before = {column.field: column for column in last.columns} if last is not None else {}
    for column in columns:
        wanted = schema.field(column.field)
        item = mapping.columns.get(column.field)
        if item is None or wanted.unit is None or not schemas.must_state_unit(wanted):
            continue
        median, count = _positive_median(column)
        if count < LEAST_ROWS_FOR_UNITS:
            continue
        unit = schemas.unit_zh(wanted.unit)
        text = None
        if (factor := _suspected_factor(wanted, median)) is not None:
            text = f"median {median:,.4g} {unit} looks wrong by a factor {factor:,}"
        elif column.field in before:
            old, old_count = _positive_median(before[column.field])
            ratio = median / old if old_count >= LEAST_ROWS_FOR_UNITS else 1.0
            if max(ratio, 1 / ratio) >= 1_000:
                text = f"median {median:,.4g} {unit}, at the last check {old:,.4g} {unit}: has the unit changed?"
        if text is not None:
            line = f"{wanted.zh} {wanted.name}: {text} (the mapping says {item.unit})"
            if item.unit_confirmed:
                yield _warning(wanted.name, f"{line}; confirmed in the mapping")
            else:
                yield _error(wanted.name, f"{line}; mend `unit`, or write unit_confirmed = true after looking")


def _column_findings(schema: Schema, columns: Sequence[ColumnSummary], rows: int) -> Iterator[Finding]:
    for column in columns:
        if rows and column.missing == rows and column.field != "uscc":
            yield _warning(column.field, f"{column.zh} {column.field}: empty in all rows")
        if column.personal:
            yield _warning(column.field, f"{column.zh} {column.field}: personal data; needs separate consent (PIPL 23)")
        if schema.field(column.field).type == "regime" and len(column.codes) > 1:
            boundary = schema.field(column.field).boundary
            yield _warning(
                column.field,
                f"{column.zh} {column.field}: rows from before and since {boundary}, when the rule changed: a break",
            )


def _code_findings(personal: int, inner_fails: int) -> Iterator[Finding]:
    if personal:
        yield _warning("uscc", f"{personal:,} rows are individuals' businesses (92...): personal data under the PIPL")
    if inner_fails:
        yield _warning(
            "uscc", f"{inner_fails:,} codes are valid but fail the inner GB 11714 check character; look at them"
        )


# --- drift ---


def population_stability_index(before: Sequence[int], after: Sequence[int]) -> float:
    """sum((p - q) ln(p / q)) over groups, each count raised by 1/2. ValueError for different or no groups."""
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} groups before, {len(after)} after; must be the same, at least one")
    p, q = (np.asarray(counts, float) + 0.5 for counts in (before, after))
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * np.log(p / q)).sum())


def _with_drift(column: ColumnSummary, before: ColumnSummary | None) -> ColumnSummary:
    if before is None or before.type != column.type or column.type in ("text", "uscc", "date"):
        return column
    if column.codes or before.codes:
        codes = sorted(set(column.codes) | set(before.codes))
        groups = ([before.codes.get(c, 0) for c in codes], [column.codes.get(c, 0) for c in codes])
    elif before.histogram and column.histogram:
        groups = _ten_groups(before.histogram, column.histogram)
    else:
        return column
    drift = population_stability_index([*groups[0], before.missing], [*groups[1], column.missing])
    return column.model_copy(update={"drift": drift})


def _ten_groups(before: Mapping[int, int], after: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """Both histograms in about ten groups that hold equal shares of `before`."""
    bins = sorted(set(before) | set(after))
    total, run = sum(before.values()), 0
    groups: tuple[list[int], list[int]] = ([0], [0])
    for number in bins:
        groups[0][-1] += before.get(number, 0)
        groups[1][-1] += after.get(number, 0)
        run += before.get(number, 0)
        if run >= total * len(groups[0]) / 10 and number != bins[-1] and len(groups[0]) < 10:
            groups[0].append(0)
            groups[1].append(0)
    return groups


def _drift_findings(columns: Sequence[ColumnSummary], rows: int, last: Receipt) -> Iterator[Finding]:
    change = rows / last.usable_rows - 1
    if abs(change) > ROWS_SHIFT:
        yield _warning(
            "", f"{rows:,} usable rows, {last.usable_rows:,} at the check of {last.checked_on} ({change:+.0%})"
        )
    before = {column.field: column for column in last.columns}
    for column in columns:
        # with few rows the index is above zero by chance: its mean is (groups - 1)(1/n + 1/m)
        chance = 3 * 10 * (1 / max(1, rows) + 1 / last.usable_rows)
        if column.drift is not None and column.drift > DRIFT_WARN + chance:
            yield _warning(
                column.field,
                f"{column.zh} {column.field}: population stability index {column.drift:.2f} against the check of "
                f"{last.checked_on} (above {DRIFT_WARN})",
            )
        old = before.get(column.field)
        if old is not None and rows:
            shift = column.missing / rows - old.missing / last.usable_rows
            if abs(shift) > MISSING_SHIFT:
                yield _warning(
                    column.field, f"{column.zh} {column.field}: share of empty cells changed by {shift:+.0%}"
                )
    for name in sorted(set(before) - {column.field for column in columns}):
        yield _warning(name, f"{before[name].zh} {name}: was mapped at the check of {last.checked_on}, no longer is")


# --- receipts and report ---


def save_receipt(receipt: Receipt, path: Path) -> None:
    """Write it readable by its owner only (it has histograms of the data); the old one is replaced whole."""
    part = path.with_name(path.name + ".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(receipt.model_dump(mode="json"), file, ensure_ascii=False, indent=1)
    part.replace(path)


def load_receipt(path: Path) -> Receipt:
    """DataError where there is none, or it is no receipt of this version."""
    try:
        return Receipt.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no receipt {path}; run `data check` first") from None
    except (ValidationError, UnicodeDecodeError):
        raise DataError(f"{path.name}: is no receipt of a check by this version; run `data check` again") from None


def render(receipt: Receipt) -> str:
    """The report page: self-contained HTML, no script, everything escaped, no row's values and no codes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("data_check.html.j2").render(
        receipt=receipt, look=DRIFT_LOOK, warn=DRIFT_WARN, unit_zh=schemas.unit_zh
    )


# --- reading the checked table ---


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckedTable:
    """One row per enterprise, sorted by code. columns: field -> float64[n] (NaN missing) or object[n] of str or None.

    Dates have become months before the row's cut-off.
    """

    codes: npt.NDArray[np.str_]
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"CheckedTable({len(self.codes)} rows, {len(self.columns)} columns)"

    def kept(self, keep: Bools) -> "CheckedTable":
        """Only the rows where `keep` is true, for instance those with live consent."""
        if keep.shape != self.codes.shape or keep.dtype != np.bool_:
            raise ValueError(f"keep: {keep.dtype}{keep.shape}, must be bool{self.codes.shape}")
        return CheckedTable(codes=self.codes[keep], columns={name: cells[keep] for name, cells in self.columns.items()})


def load_checked(
    mapping: TableMapping,
    schema: Schema,
    batches: Iterable[pa.RecordBatch],
    receipt: Receipt,
    *,
    features: Sequence[str],
    labels: Sequence[str] = (),
) -> CheckedTable:
    """The table that was checked, for a job. Refuses (DataError) a refused check, and any change since the check.

    features: fields that the point-in-time rule allows as features; labels: fields of outcome. An enterprise in several
    rows keeps one, by the mapping's rule; of rows that tie, one chosen by their content, whatever their order.
    """
    if receipt.refused:
        raise DataError(
            f"the check of {receipt.checked_on} refused this table ({len(receipt.errors)} errors); mend it first"
        )
    if (receipt.mapping_digest, receipt.schema_digest) != (mapping.digest, schema.digest):
        raise DataError(f"mapping or schema changed since the check of {receipt.checked_on}; run `data check` again")
    for name in (*features, *labels):
        wanted = schema.field(name)
        if name not in {item.name for item in _present(mapping, schema)}:
            raise DataError(f"field {name!r} is not mapped here; map it, or leave it out of the job")
        if name in features and not wanted.is_feature:
            raise DataError(
                f"{wanted.zh} {name!r} ({wanted.time}) is no feature: it is seen after the cut-off or names rows"
            )
        if name in labels and wanted.time != "outcome":
            raise DataError(f"{wanted.zh} {name!r} ({wanted.time}) is no outcome and cannot make a label")
    problems: Problems = {}
    fingerprint = _Fingerprint()
    names = (*features, *labels)
    codes: list[npt.NDArray[np.bytes_]] = []
    cells: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    orders: list[npt.NDArray[np.float64]] = []
    digests: list[Words] = []
    for converted in _converted(mapping, schema, batches, problems):
        usable = converted.kept(converted.columns["uscc"] != b"")
        digests.append(fingerprint.add(usable))
        codes.append(usable.columns["uscc"])
        cut = cut_offs(usable, mapping)
        for name in names:
            cells[name].append(_model_cells(usable.columns[name], schema.field(name), cut))
        if mapping.rows.by is not None:
            orders.append(_order(usable.columns[mapping.rows.by]))
    if fingerprint.content_hash(mapping, schema) != receipt.content_hash:
        raise DataError(
            f"the table changed since the check of {receipt.checked_on} ({receipt.usable_rows:,} usable rows then, "
            f"{fingerprint.rows:,} now); run `data check` again"
        )
    every = np.concatenate(codes)
    tie = np.concatenate(digests)
    keys: tuple[npt.NDArray[Any], ...] = (tie[:, 1], tie[:, 0])
    if orders:
        keys = (*keys, np.concatenate(orders))
    order = np.lexsort((*keys, every))
    ordered = every[order]
    last = np.r_[ordered[1:] != ordered[:-1], True]  # the greatest by rule, then by content
    chosen = order[last]
    return CheckedTable(
        codes=every[chosen].astype(f"U{_CODE_BYTES}"),
        columns={name: np.concatenate(parts)[chosen] for name, parts in cells.items()},
    )


def _order(cells: Any) -> npt.NDArray[np.float64]:
    """Greater is later or worse; missing is least."""
    if cells.dtype.kind == "M":
        days = cells.astype("datetime64[D]").astype(np.float64)
        return np.where(np.isnat(cells), -np.inf, days)
    values = cells.astype(np.float64)
    return np.where(np.isnan(values), -np.inf, values)


def _model_cells(cells: Any, wanted: Field, cut: Days) -> npt.NDArray[Any]:
    if isinstance(cells, pa.Array):
        return np.array(cells.to_pylist(), object)
    if cells.dtype == np.int16:
        return np.asarray(np.array([*_code_names(wanted), None], object)[cells])
    if cells.dtype.kind == "M":
        months = (cut - cells).astype("timedelta64[D]").astype(np.float64) / 30.4375
        return np.asarray(np.where(np.isnat(cells) | np.isnat(cut), np.nan, months))
    return np.asarray(cells, np.float64)
