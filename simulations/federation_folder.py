"""Load a *federation folder*: files of one data set and a `split.json` that says which party owns which column.

What comes out is what each institution would hold in a real federation: one table per bank (label holder) and one per
feature owner, never joined. `pooled_frame` joins them in plaintext, for baselines only.

`split.json`
    id, label, label_file       names of the id column, of the 0/1 label column, and of the file that has the label
    parties                     {name: {file, columns}}; the FIRST is the label holder, the others are feature owners
    rows                        text for people. The rule behind it: the label holder's rows are the labelled rows of
                                `label_file`; where its own columns live in another file, the label file is a register
                                and only enterprises with a record in at least one party's file are kept
    horizontal_key, _groups     column of `label_file` that cuts the label holder into named banks (and "rest");
                                without it, rows fall to `banks` banks by a seeded hash of the id
    test_group                  value of the horizontal key whose rows are all held out (spread over banks by hash)
    categorical                 columns that are codes, not numbers
    missing_codes               values that are codes, not quantities. They stay in the tables (and get bins of their
                                own) and become missing in `pooled_frame`
    missing_means_zero          an empty cell of an enterprise that *is* in the file means zero (counts, amounts): its
                                owner fills it at load time. An enterprise absent from an owner's file stays "no file"
                                in the tables; `pooled_frame` has zero there
    never_use_as_features       refused when a party lists one
    baseline_lr, alternative_parties, note, synthetic

Held out (one rule, in this order): `test_group`; a column `fate_test` of the label file (1 = test); else per label
class the 30 % of ids with the smallest SHA-256 of "seed|id". The seed reaches data splits, nothing else (PROTOCOL 10).
Errors are `DataError`: one line, no ids, no labels, no cell values. Nothing is repaired silently; what is only risky is
a line in `Federation.warnings`.
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.binning import ColumnSpec
from models.errors import DataError

HELD_OUT_SHARE = 0.3
FEW_ROWS = 200  # a bank below this is warned about: its own figures are noise
FEW_COVERED = 0.5  # an owner knowing less than this share of the banks' rows is warned about
MAX_ID_CHARS = 128  # ids are kept as fixed-width text; one long cell would blow up memory
MAX_CATEGORIES = 10_000  # of one label-holder column; more looks like an id
NUMERIC_NA = ["", "NA", "N/A", "NaN", "nan", "NULL", "null", "None"]
KNOWN_KEYS = frozenset(
    {
        *("id", "label", "label_file", "rows", "parties", "alternative_parties", "never_use_as_features"),
        *("horizontal_key", "horizontal_groups", "test_group", "categorical", "missing_codes", "missing_means_zero"),
        *("baseline_lr", "note", "synthetic"),
    }
)

Cells = npt.NDArray[Any]
"""One column: float64 with NaN for missing, or an object array of str with None for missing."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One feature column as parties may know it: no values, except the public code list of a bank's categorical.

    codes: numeric values that are codes (special bins). categories: sorted union over the banks, empty for owners.
    missing_means_zero: the table has zero in its empty cells; joined tables have it for absent enterprises, too.
    """

    name: str
    kind: Literal["numeric", "categorical"]
    codes: tuple[float, ...] = ()
    categories: tuple[str, ...] = ()
    missing_means_zero: bool = False

    @property
    def spec(self) -> ColumnSpec:
        """The column as the training loop takes it."""
        return ColumnSpec(name=self.name, kind=self.kind, codes=self.codes, categories=self.categories)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BankTable:
    """One bank: ids [n] text, label [n] int8 0/1, held_out [n] bool, columns name -> [n]."""

    name: str
    ids: npt.NDArray[np.str_]
    label: npt.NDArray[np.int8]
    held_out: npt.NDArray[np.bool_]
    columns: Mapping[str, Cells] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _same_length(self.name, len(self.ids), {"label": self.label, "held_out": self.held_out, **self.columns})

    def __repr__(self) -> str:
        return f"BankTable({self.name!r}, {len(self.ids)} rows, {len(self.columns)} columns)"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OwnerTable:
    """One feature owner: every row of its file that has an id, also enterprises that no bank knows."""

    name: str
    role: Literal["pboc", "public_credit"]
    ids: npt.NDArray[np.str_]
    columns: Mapping[str, Cells] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _same_length(self.name, len(self.ids), self.columns)

    def __repr__(self) -> str:
        return f"OwnerTable({self.name!r}, {self.role}, {len(self.ids)} rows, {len(self.columns)} columns)"


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """Pooled logistic regression of the data set: inverse penalty C, and `party.column` names taken as sign-log1p."""

    c: float = 1.0
    sign_log1p: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """All parties of one folder. `columns` by party; the label holder's entry holds for every bank."""

    name: str
    folder_hash: str
    label_holder: str
    banks: tuple[BankTable, ...]
    owners: tuple[OwnerTable, ...]
    columns: Mapping[str, tuple[Column, ...]]
    baseline: BaselineSettings
    synthetic: bool
    note: str
    warnings: tuple[str, ...]


def load(
    folder: Path | str, *, split: str = "split.json", banks: int = 3, seed: int = 42, alternative: bool = False
) -> Federation:
    """Load the federation of `folder` (a directory, or a split file in it).

    banks: number of banks where `split` names no horizontal key. alternative: use `alternative_parties`.
    Raises DataError (bad folder) and ValueError (bad argument).
    """
    if banks < 1:
        raise ValueError(f"banks is {banks}, must be at least 1")
    folder = Path(folder)
    if folder.is_file():
        folder, split = folder.parent, folder.name
    plan, notes, digest = _read_plan(folder, split, alternative)
    tables = _read_tables(folder, plan, notes, digest)
    holder = plan.parties[0]
    rows = _label_holder_rows(plan, tables, notes)
    ids = _ids_of(rows)
    label = rows["label"].to_numpy(dtype=np.int8)
    if np.unique(label).size < 2:
        raise DataError(
            f"label column {plan.label!r} of {plan.label_file} has one class only in {len(label)} labelled rows: "
            "a model needs both 0 and 1"
        )
    held_out = _held_out(plan, rows, ids, label, seed)
    own = _own_columns(plan, holder, tables, ids, rows, notes)
    bank_of = _bank_of(plan, rows, ids, banks, seed)
    bank_tables = tuple(
        _bank_table(name, bank_of == name, ids, label, held_out, own) for name in _bank_names(bank_of, plan)
    )
    owners = tuple(_owner_table(plan, party, tables[party.file], notes) for party in plan.parties[1:])
    _check_federation(plan, bank_tables, owners, notes)
    return Federation(
        name=folder.resolve().name + ("" if split == "split.json" else "/" + Path(split).stem.removeprefix("split_")),
        folder_hash=digest.hexdigest(),
        label_holder=holder.name,
        banks=bank_tables,
        owners=owners,
        columns={p.name: _schema(plan, p, own if p is holder else None) for p in plan.parties},
        baseline=_baseline(plan),
        synthetic=plan.synthetic,
        note=plan.note,
        warnings=tuple(dict.fromkeys(notes)),
    )


def stratified_hold_out(
    ids: Sequence[str] | npt.NDArray[np.str_], label: npt.NDArray[np.int8], seed: int, share: float = HELD_OUT_SHARE
) -> npt.NDArray[np.bool_]:
    """Held-out mask [n]: per class the `share` of ids with the smallest SHA-256 of "seed|id".

    A function of the set of (id, label) and the seed, not of row order. A class of two or more rows has at least one
    row on either side.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}, must lie between 0 and 1")
    keys = _hashes(ids, f"{seed}|")
    mask = np.zeros(len(keys), dtype=np.bool_)
    for value in np.unique(label):
        members = np.flatnonzero(label == value)
        count = min(max(round(share * members.size), 1), members.size - 1)
        mask[members[np.argsort(keys[members], kind="stable")[:count]]] = True
    return mask


def locate(ids: npt.NDArray[np.str_], owner_ids: npt.NDArray[np.str_]) -> npt.NDArray[np.int64]:
    """Row of each id in `owner_ids` (distinct), -1 where the owner does not know it. Plaintext: simulation only."""
    found: npt.NDArray[np.int64] = pd.Index(owner_ids).get_indexer(pd.Index(ids)).astype(np.int64)
    return found


def pooled_frame(
    federation: Federation,
) -> tuple[Any, npt.NDArray[np.int8], npt.NDArray[np.bool_], npt.NDArray[np.str_]]:
    """(DataFrame of all features as `party.column`, y, held_out, bank name), joined in plaintext. For baselines only.

    Rows bank by bank in table order. Unknown at an owner = missing (zero for `missing_means_zero`); special codes are
    missing (data/README.md, protocol).
    """
    banks = federation.banks
    ids = np.concatenate([bank.ids for bank in banks])
    data: dict[str, Cells] = {}
    for column in federation.columns[federation.label_holder]:
        cells = np.concatenate([bank.columns[column.name] for bank in banks])
        data[f"{federation.label_holder}.{column.name}"] = _as_baseline(cells, column)
    for owner in federation.owners:
        index = locate(ids, owner.ids)
        for column in federation.columns[owner.name]:
            data[f"{owner.name}.{column.name}"] = _as_baseline(_take(owner.columns[column.name], index), column)
    return (
        pd.DataFrame(data),
        np.concatenate([bank.label for bank in banks]),
        np.concatenate([bank.held_out for bank in banks]),
        np.concatenate([np.full(len(bank.ids), bank.name) for bank in banks]),
    )


# ---- split.json ----


@dataclass(frozen=True, kw_only=True)
class _Party:
    name: str
    file: str
    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The validated content of split.json."""

    id: str
    label: str
    label_file: str
    parties: tuple[_Party, ...]
    horizontal_key: str | None
    horizontal_groups: tuple[str, ...]
    test_group: str | None
    categorical: frozenset[str]
    missing_codes: Mapping[str, tuple[float, ...]]
    missing_means_zero: frozenset[str]
    baseline_c: float
    sign_log1p: frozenset[str] | None  # None: all numeric columns
    synthetic: bool
    note: str


def _read_plan(folder: Path, split: str, alternative: bool) -> tuple[_Plan, list[str], "hashlib._Hash"]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a directory; give a federation folder (a directory with split.json)")
    raw = _read_bytes(folder, split)
    digest = hashlib.sha256(_digest_line(split, raw))
    try:
        doc = json.loads(_text(raw, split), object_pairs_hook=lambda pairs: _distinct_keys(split, pairs))
    except json.JSONDecodeError as error:
        raise DataError(f"{split} is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{split} is nested too deeply to be a split file") from None
    if not isinstance(doc, dict):
        raise DataError(f"{split} must hold a JSON object, it holds {type(doc).__name__}")
    notes = []
    unknown = sorted(set(doc) - KNOWN_KEYS)
    if unknown:
        notes.append(f"{split} has keys that are not understood and have no effect: {', '.join(unknown)}")
    parties = _parties(doc, split)
    names = frozenset(column for party in parties for column in party.columns)
    if alternative:
        parties = _alternative(doc, split, parties)
        names |= {column for party in parties for column in party.columns}
    plan = _Plan(
        id=_string(doc, "id", split),
        label=_string(doc, "label", split),
        label_file=_string(doc, "label_file", split),
        parties=parties,
        horizontal_key=_string(doc, "horizontal_key", split) if "horizontal_key" in doc else None,
        horizontal_groups=_strings(doc, "horizontal_groups", split),
        test_group=_string(doc, "test_group", split) if "test_group" in doc else None,
        categorical=frozenset(_strings(doc, "categorical", split)),
        missing_codes=_missing_codes(doc, split, names),
        missing_means_zero=frozenset(_strings(doc, "missing_means_zero", split)),
        baseline_c=_baseline_c(doc, split),
        sign_log1p=_sign_log1p(doc, split),
        synthetic=doc.get("synthetic") is True,
        note=_string(doc, "note", split) if "note" in doc else "",
    )
    _check_plan(plan, frozenset(_strings(doc, "never_use_as_features", split)), split, notes)
    return plan, notes, digest


def _distinct_keys(split: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys; a party named twice would vanish without a word
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DataError(f"{split} has the key {key[:40]!r} twice in one object")
        found[key] = value
    return found


def _string(doc: Mapping[str, Any], key: str, split: str) -> str:
    if key not in doc:
        raise DataError(f"{split} lacks {key!r}")
    if not isinstance(doc[key], str) or not doc[key].strip() or not doc[key].isprintable():
        raise DataError(f"{split}: {key!r} must be a non-empty text in one line")
    return str(doc[key])


def _strings(doc: Mapping[str, Any], key: str, split: str) -> tuple[str, ...]:
    value = doc.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) and v and v.isprintable() for v in value):
        raise DataError(f"{split}: {key!r} must be a list of texts, each in one line")
    twice = sorted({v for v in value if value.count(v) > 1})
    if twice:
        raise DataError(f"{split}: {key!r} names {twice[0]!r} twice")
    return tuple(value)


def _parties(doc: Mapping[str, Any], split: str) -> tuple[_Party, ...]:
    value = doc.get("parties")
    if not isinstance(value, dict) or not value:
        raise DataError(f"{split}: 'parties' must be an object {{name: {{file, columns}}}} with the label holder first")
    found = []
    for name, body in value.items():
        if not name.strip() or not name.isprintable():
            raise DataError(f"{split}: a party needs a name, a text in one line")
        if not isinstance(body, dict):
            raise DataError(f"{split}: party {name!r} must be an object with 'file' and 'columns'")
        columns = _strings(body, "columns", f"{split}, party {name!r}")
        if not columns:
            raise DataError(f"{split}: party {name!r} has no columns; give it some or leave it out")
        found.append(_Party(name=name, file=_string(body, "file", f"{split}, party {name!r}"), columns=columns))
    return tuple(found)


def _alternative(doc: Mapping[str, Any], split: str, parties: tuple[_Party, ...]) -> tuple[_Party, ...]:
    value = doc.get("alternative_parties")
    if not isinstance(value, dict) or not value:
        raise DataError(f"{split} has no 'alternative_parties' (an object {{name: [columns]}})")
    found = []
    for name in value:
        columns = _strings(value, name, f"{split}, alternative_parties")
        if not columns:
            raise DataError(f"{split}: alternative party {name!r} has no columns; give it some or leave it out")
        files = {party.file for party in parties if set(columns) & set(party.columns)}
        if len(files) > 1:
            raise DataError(
                f"{split}: alternative party {name!r} has columns of {len(files)} files; name one file's columns"
            )
        found.append(
            _Party(name=name, file=files.pop() if files else _string(doc, "label_file", split), columns=columns)
        )
    return tuple(found)


def _missing_codes(doc: Mapping[str, Any], split: str, names: frozenset[str]) -> dict[str, tuple[float, ...]]:
    """Codes by column; a plain list in split.json holds for every column, an object {column: list} for those."""
    value = doc.get("missing_codes", [])
    by_column = value if isinstance(value, dict) else dict.fromkeys(names, value)
    for codes in by_column.values():
        if not isinstance(codes, list) or any(isinstance(c, bool) or not isinstance(c, int | float) for c in codes):
            raise DataError(
                f"{split}: 'missing_codes' must be a list of numbers, or an object {{column: list of numbers}}"
            )
    unknown = sorted(set(by_column) - names)
    if unknown:
        raise DataError(f"{split}: 'missing_codes' names {unknown[0]!r}, which is no party's column")
    return {column: tuple(sorted({float(c) for c in codes})) for column, codes in by_column.items()}


def _baseline_c(doc: Mapping[str, Any], split: str) -> float:
    body = doc.get("baseline_lr", {})
    c = body.get("C", 1.0) if isinstance(body, dict) else None
    if isinstance(c, bool) or not isinstance(c, int | float) or not 0 < c < float("inf"):
        raise DataError(f"{split}: 'baseline_lr' must be an object with a number C above 0")
    return float(c)


def _sign_log1p(doc: Mapping[str, Any], split: str) -> frozenset[str] | None:
    body = doc.get("baseline_lr", {})
    if body.get("sign_log1p_columns") == "all numeric":
        return None
    return frozenset(_strings(body, "sign_log1p_columns", f"{split}, baseline_lr"))


def _check_plan(plan: _Plan, never: frozenset[str], split: str, notes: list[str]) -> None:
    seen: dict[tuple[str, str], str] = {}
    for party in plan.parties:
        leaky = sorted(set(party.columns) & never)
        if leaky:
            raise DataError(
                f"{split}: party {party.name!r} lists {leaky[0]!r}, which never_use_as_features forbids (leak)"
            )
        for column in party.columns:
            if column in (plan.id, plan.label, "fate_test"):
                raise DataError(f"{split}: party {party.name!r} lists {column!r} (id, label or test mark) as a feature")
            if column == plan.horizontal_key and party.file == plan.label_file and column not in plan.categorical:
                raise DataError(f"{split}: {column!r} is the horizontal key and a feature; list it as categorical too")
            other = seen.setdefault((party.file, column), party.name)
            if other != party.name:
                raise DataError(
                    f"{split}: column {column!r} of {party.file} belongs to both {other!r} and {party.name!r}"
                )
    owners_of: dict[str, list[str]] = {}
    for party in plan.parties:
        for column in party.columns:
            owners_of.setdefault(column, []).append(party.name)
    shared = [column for column, names in owners_of.items() if len(names) > 1]
    if shared:
        notes.append(
            f"{len(shared)} column names (the first: {shared[0]}) occur at more than one party, in different files; "
            "they are taken as different columns, named party.column"
        )
    for key, names in (("categorical", plan.categorical), ("missing_means_zero", plan.missing_means_zero)):
        unknown = sorted(names - set(owners_of))
        if unknown:
            notes.append(f"{split}: {key!r} names columns of no party, without effect: {', '.join(unknown)}")
    both = sorted(plan.categorical & plan.missing_means_zero)
    if both:
        raise DataError(f"{split}: {both[0]!r} is categorical, so missing_means_zero has no meaning for it")
    if plan.horizontal_key is None and (plan.horizontal_groups or plan.test_group):
        raise DataError(f"{split} names horizontal_groups or test_group but no horizontal_key")
    if plan.test_group in plan.horizontal_groups:
        raise DataError(f"{split}: test_group {plan.test_group!r} is also a horizontal group")


def _schema(plan: _Plan, party: _Party, own: Mapping[str, Cells] | None) -> tuple[Column, ...]:
    """Columns of a party; `own` (the label holder's cells) gives the public code lists."""
    found = []
    for name in party.columns:
        if name not in plan.categorical:
            codes, zero = plan.missing_codes.get(name, ()), name in plan.missing_means_zero
            found.append(Column(name=name, kind="numeric", codes=codes, missing_means_zero=zero))
            continue
        categories = tuple(sorted({c for c in own[name] if c is not None})) if own is not None else ()
        if len(categories) > MAX_CATEGORIES:
            raise DataError(
                f"categorical column {name!r} of {party.name!r} has {len(categories)} distinct values, more than "
                f"{MAX_CATEGORIES}: it looks like an id"
            )
        found.append(Column(name=name, kind="categorical", categories=categories))
    return tuple(found)


def _baseline(plan: _Plan) -> BaselineSettings:
    numeric = [(p.name, c) for p in plan.parties for c in p.columns if c not in plan.categorical]
    listed = plan.sign_log1p
    chosen = [f"{party}.{column}" for party, column in numeric if listed is None or column in listed]
    return BaselineSettings(c=plan.baseline_c, sign_log1p=tuple(chosen))


# ---- files ----


def _read_bytes(folder: Path, name: str) -> bytes:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise DataError(f"file name {name!r} leaves the federation folder; use a name inside it")
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise DataError(f"file {name} is missing in {folder}") from None
    except OSError as error:
        raise DataError(f"file {name} cannot be read: {error.strerror}") from None


def _digest_line(name: str, raw: bytes) -> bytes:
    return f"{hashlib.sha256(raw).hexdigest()}  {name}\n".encode()


def _text(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(
            f"{name} is not UTF-8, it looks like {_looks_like(raw)}; save it as UTF-8 (in Excel: 'CSV UTF-8')"
        ) from None


def _looks_like(raw: bytes) -> str:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return "a damaged or binary file"
    return "GB18030 (GBK)"


def _read_tables(folder: Path, plan: _Plan, notes: list[str], digest: "hashlib._Hash") -> dict[str, Any]:
    """One DataFrame per file, indexed by id text; columns that some party or the split needs; numbers as float64."""
    wanted: dict[str, list[str]] = {plan.label_file: [plan.label]}
    if plan.horizontal_key is not None:
        wanted[plan.label_file].append(plan.horizontal_key)
    for party in plan.parties:
        wanted.setdefault(party.file, []).extend(party.columns)
    tables = {}
    for name in sorted(wanted):
        raw = _read_bytes(folder, name)
        digest.update(_digest_line(name, raw))
        texts = plan.categorical | {plan.id}
        if name == plan.label_file and plan.horizontal_key is not None:
            texts |= {plan.horizontal_key}
        optional = ["fate_test"] if name == plan.label_file else []
        frame = _read_frame(raw, name, [plan.id, *dict.fromkeys(wanted[name])], optional, texts)
        tables[name] = _index_by_id(frame, plan.id, name, notes)
    return tables


def _read_frame(raw: bytes, name: str, needed: list[str], optional: list[str], texts: frozenset[str]) -> Any:
    if name.endswith(".parquet"):
        frame = _parquet(raw, name)
        header = [str(column) for column in frame.columns]
    elif name.endswith((".csv", ".csv.gz")):
        text = _text(_unzip(raw, name) if name.endswith(".gz") else raw, name)
        header = next(csv.reader(io.StringIO(text[: 1 << 20])), [])
        frame = None
    else:
        raise DataError(f"file {name} is neither .csv, .csv.gz nor .parquet")
    _check_header(header, name, needed)
    needed = needed + [column for column in optional if column in header]
    if frame is None:
        frame = _csv(text, name, needed, texts)
    frame = frame[needed]
    if frame.empty:
        raise DataError(f"file {name} has a header but no rows")
    return pd.DataFrame(
        {c: _as_text(frame[c], name) if c in texts else _as_number(frame[c], name) for c in needed}, columns=needed
    )


def _check_header(header: list[str], name: str, needed: list[str]) -> None:
    for column in needed:
        if header.count(column) > 1:
            raise DataError(f"file {name} has the column {column!r} {header.count(column)} times")
        if column not in header:
            only = header[0] if len(header) == 1 else ""
            hint = "; is it separated by ';' or tabs? use commas" if ";" in only or "\t" in only else ""
            # only names close to the wanted one are quoted: without a header line, the first line is somebody's data
            near = difflib.get_close_matches(column, header, n=1, cutoff=0.7)
            hint = hint or (f"; did you mean {near[0]!r}?" if near else "")
            raise DataError(f"column {column!r} is not among the {len(header)} columns of {name}{hint}")


def _unzip(raw: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error):
        raise DataError(f"{name} is not a complete gzip file; copy it again or write it as .csv") from None


def _csv(text: str, name: str, columns: list[str], texts: frozenset[str]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                io.StringIO(text),
                dtype={column: str for column in columns if column in texts},
                keep_default_na=False,  # "NA" and "None" are codes in a categorical column
                na_values={column: [""] if column in texts else NUMERIC_NA for column in columns},
                index_col=False,
                low_memory=False,
            )
    except (
        pd.errors.ParserError,
        pd.errors.ParserWarning,
        pd.errors.EmptyDataError,
        ValueError,
        OverflowError,
    ) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name} is not a readable CSV table: {reason}") from None


def _parquet(raw: bytes, name: str) -> Any:
    try:
        return pd.read_parquet(io.BytesIO(raw))
    except Exception:
        # pyarrow raises a family of its own for damaged files; the message may quote bytes of the file
        raise DataError(f"{name} is not a readable parquet file") from None


def _as_text(column: Any, name: str) -> Any:
    """Object series of stripped str, None for missing. Whole numbers lose a trailing .0 (parquet)."""
    if pd.api.types.is_float_dtype(column.dtype):
        whole = column.dropna()
        if not np.all(np.isfinite(whole)) or not np.all(whole == np.floor(whole)):
            raise DataError(f"column {column.name!r} of {name} is used as text but holds fractions")
        column = column.astype("Int64")
    values = [None if v is None or v is pd.NA or v != v else str(v).strip() or None for v in column.tolist()]
    return pd.Series(values, dtype=object)


def _as_number(column: Any, name: str) -> Any:
    if not pd.api.types.is_numeric_dtype(column.dtype):  # bool counts as numeric
        filled = column[column.notna()]
        bad = int(pd.to_numeric(filled, errors="coerce").isna().sum())
        if bad:
            raise DataError(
                f"column {column.name!r} of {name} has {bad} cells that are not numbers; clean them, "
                "or list it as categorical"
            )
        column = pd.to_numeric(column, errors="coerce")
    values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    infinite = int(np.isinf(values).sum())
    if infinite:
        raise DataError(f"column {column.name!r} of {name} has {infinite} infinite values; leave such cells empty")
    return pd.Series(values)


def _index_by_id(frame: Any, id_column: str, name: str, notes: list[str]) -> Any:
    empty = int(frame[id_column].isna().sum())
    if empty:
        notes.append(f"{name}: {empty} of {len(frame)} rows have no id and are left out")
        frame = frame[frame[id_column].notna()]
    if frame.empty:
        raise DataError(f"{name}: no row has an id in column {id_column!r}")
    longest = int(frame[id_column].str.len().max())
    if longest > MAX_ID_CHARS:
        raise DataError(
            f"{name}: an id has {longest} characters, more than {MAX_ID_CHARS}; is {id_column!r} the id column?"
        )
    copies = int(frame[id_column].duplicated().sum())
    if copies:
        raise DataError(f"{name}: {copies} rows repeat an id of column {id_column!r}; keep one row per enterprise")
    return frame.set_index(id_column)


# ---- parties ----


def _label_holder_rows(plan: _Plan, tables: Mapping[str, Any], notes: list[str]) -> Any:
    """Frame by id with columns label, group, fate_test of the label holder's rows, in file order."""
    table = tables[plan.label_file]
    label = table[plan.label]
    odd = int((label.notna() & ~label.isin([0, 1])).sum())
    if odd:
        raise DataError(f"label column {plan.label!r} of {plan.label_file} has {odd} values other than 0 and 1")
    keep = label.notna()
    if not keep.any():
        raise DataError(f"label column {plan.label!r} of {plan.label_file} is empty")
    if plan.parties[0].file != plan.label_file:
        recorded = np.zeros(len(table), dtype=np.bool_)
        for party in plan.parties:
            recorded |= table.index.isin(tables[party.file].index)
        keep &= recorded
        if not keep.any():
            raise DataError(f"no labelled row of {plan.label_file} has a record in a party's file; do the ids agree?")
    table = table[keep]
    rows = pd.DataFrame({"label": table[plan.label].astype(np.int8)}, index=table.index)
    rows["group"] = table[plan.horizontal_key] if plan.horizontal_key is not None else None
    if "fate_test" in table.columns:
        if not table["fate_test"].isin([0, 1]).all():
            raise DataError(f"column 'fate_test' of {plan.label_file} must be 0 or 1 in every labelled row")
        rows["fate_test"] = table["fate_test"]
    return rows


def _ids_of(frame: Any) -> npt.NDArray[np.str_]:
    return np.asarray(frame.index.tolist(), dtype=np.str_)


def _hashes(ids: Sequence[str] | npt.NDArray[np.str_], prefix: str) -> npt.NDArray[np.uint64]:
    digests = (hashlib.sha256(f"{prefix}{i}".encode()).digest()[:8] for i in ids)
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def _held_out(
    plan: _Plan, rows: Any, ids: npt.NDArray[np.str_], label: npt.NDArray[np.int8], seed: int
) -> npt.NDArray[np.bool_]:
    if plan.test_group is not None:
        mask = np.asarray(rows["group"] == plan.test_group, dtype=np.bool_)
        source = f"test_group {plan.test_group!r}"
    elif "fate_test" in rows.columns:
        mask = np.asarray(rows["fate_test"] == 1, dtype=np.bool_)
        source = "fate_test"
    else:
        mask = stratified_hold_out(ids, label, seed)
        source = "the hash of the id"
    for part, name in ((mask, "held-out"), (~mask, "training")):
        if np.unique(label[part]).size < 2:
            raise DataError(
                f"the {int(part.sum())} {name} rows (by {source}) do not hold both classes: no model can be "
                f"{'judged' if name == 'held-out' else 'trained'}"
            )
    return mask


def _own_columns(
    plan: _Plan, holder: _Party, tables: Mapping[str, Any], ids: npt.NDArray[np.str_], rows: Any, notes: list[str]
) -> dict[str, Cells]:
    table = tables[holder.file]
    index = table.index.get_indexer(rows.index)
    lost = int((index < 0).sum())
    if lost:
        notes.append(
            f"{lost} of {len(ids)} label-holder rows have no record in {holder.file}: their own columns are missing"
        )
    cells = {name: _take(table[name].to_numpy(), index) for name in holder.columns}
    return {name: _zero_filled(plan, name, values) for name, values in cells.items()}


def _take(values: Cells, index: npt.NDArray[Any]) -> Cells:
    """values[index], missing where the index is -1."""
    out: Cells = values[index]
    out[index < 0] = None if values.dtype == object else np.nan
    return out


def _zero_filled(plan: _Plan, name: str, values: Cells) -> Cells:
    return np.where(np.isnan(values), 0.0, values) if name in plan.missing_means_zero else values


def _as_baseline(cells: Cells, column: Column) -> Cells:
    if column.codes:
        cells = np.where(np.isin(cells, column.codes), np.nan, cells)
    return np.where(np.isnan(cells), 0.0, cells) if column.missing_means_zero else cells


def _bank_of(plan: _Plan, rows: Any, ids: npt.NDArray[np.str_], banks: int, seed: int) -> npt.NDArray[np.str_]:
    """Name of each row's bank [n]."""
    if plan.horizontal_key is None:
        names = np.asarray([f"bank_{number + 1}" for number in range(banks)])
        return np.take(names, _hashes(ids, f"{seed}|bank|") % np.uint64(banks))
    group = rows["group"].to_numpy(dtype=object)
    is_test = group == plan.test_group if plan.test_group is not None else np.zeros(len(group), dtype=np.bool_)
    groups = plan.horizontal_groups or tuple(sorted({g for g in group[~is_test] if g is not None}))
    absent = [name for name in groups if not np.any(group == name)]
    if absent:
        raise DataError(f"horizontal group {absent[0]!r} of column {plan.horizontal_key!r} has no labelled rows")
    found = np.asarray([g if g in set(groups) else "rest" for g in group], dtype=np.str_)
    if is_test.any():
        present = np.asarray([name for name in (*groups, "rest") if np.any(found[~is_test] == name)])
        if not present.size:
            raise DataError(f"test_group {plan.test_group!r} holds every row: nothing is left to train on")
        spread = present[_hashes(ids, f"{seed}|bank|") % np.uint64(present.size)]
        found = np.where(is_test, spread, found)
    return found


def _bank_names(bank_of: npt.NDArray[np.str_], plan: _Plan) -> list[str]:
    """Banks in the order split.json names them, others in order of name, "rest" last."""
    listed = {name: place for place, name in enumerate(plan.horizontal_groups)}
    present = [str(name) for name in np.unique(bank_of)]
    return sorted(present, key=lambda name: (name == "rest", listed.get(name, len(listed)), _natural(name)))


def _natural(name: str) -> tuple[int, str]:
    tail = name.removeprefix("bank_")
    return (int(tail), "") if tail.isdecimal() else (0, name)


def _bank_table(
    name: str,
    mine: npt.NDArray[np.bool_],
    ids: npt.NDArray[np.str_],
    label: npt.NDArray[np.int8],
    held_out: npt.NDArray[np.bool_],
    own: Mapping[str, Cells],
) -> BankTable:
    columns = {column: cells[mine] for column, cells in own.items()}
    return BankTable(name=name, ids=ids[mine], label=label[mine], held_out=held_out[mine], columns=columns)


def _owner_table(plan: _Plan, party: _Party, table: Any, notes: list[str]) -> OwnerTable:
    columns = {name: _zero_filled(plan, name, table[name].to_numpy()) for name in party.columns}
    for name, cells in columns.items():
        if bool(pd.isna(cells).all()):
            notes.append(f"column {name!r} of owner {party.name!r} is empty in every row")
    return OwnerTable(name=party.name, role=_role(party.name), ids=_ids_of(table), columns=columns)


def _role(name: str) -> Literal["pboc", "public_credit"]:
    """A bureau by its name; "public_credit_..." is public in spite of the word credit."""
    lower = name.lower()
    is_bureau = "public" not in lower and any(word in lower for word in ("pboc", "bureau", "credit"))
    return "pboc" if is_bureau else "public_credit"


def _same_length(name: str, rows: int, arrays: Mapping[str, Cells]) -> None:
    for column, values in arrays.items():
        if len(values) != rows:
            raise ValueError(f"table {name!r}: {column!r} has {len(values)} rows, the ids have {rows}")


# ---- what the table must also say ----


def _check_federation(
    plan: _Plan, banks: tuple[BankTable, ...], owners: tuple[OwnerTable, ...], notes: list[str]
) -> None:
    names = [bank.name for bank in banks]
    for owner in owners:
        if owner.name in names:
            raise DataError(f"{owner.name!r} is the name of a bank and of a feature owner; rename one")
    for bank in banks:
        training = ~bank.held_out
        if not training.any():
            raise DataError(f"bank {bank.name!r} has no training rows; merge it with another or use fewer banks")
        if int(training.sum()) < FEW_ROWS:
            notes.append(f"bank {bank.name!r} has {int(training.sum())} training rows, fewer than {FEW_ROWS}")
        if np.unique(bank.label[training]).size < 2:
            notes.append(f"bank {bank.name!r} has one class only in training: alone it cannot train a model")
    if len(banks) == 1:
        notes.append(f"one bank ({names[0]!r}): S is that bank's own sum, nothing is pooled over banks")
    elif len(banks) == 2:
        notes.append("two banks: each can subtract itself from a pooled sum and see the other's; secrecy needs three")
    ids = np.concatenate([bank.ids for bank in banks])
    if not owners:
        notes.append("no feature owner: only the banks train together (horizontal)")
    elif len(owners) == 1:
        notes.append(
            f"one feature owner ({owners[0].name!r}): banks see that owner's score, there is no second one to hide it"
        )
    for owner in owners:
        known = locate(ids, owner.ids) >= 0
        share = float(known.mean())
        if not known.any():
            raise DataError(
                f"owner {owner.name!r} knows none of the banks' {len(ids)} enterprises; do both files use the same id?"
            )
        if share < FEW_COVERED:
            notes.append(
                f"owner {owner.name!r} knows {share:.1%} of the banks' enterprises; the others score without it"
            )
        blind = [bank.name for bank in banks if not np.any(locate(bank.ids, owner.ids) >= 0)]
        if blind:
            notes.append(f"owner {owner.name!r} knows no enterprise of bank {', '.join(map(repr, blind))}")


__all__ = [
    "BankTable",
    "BaselineSettings",
    "Column",
    "Federation",
    "OwnerTable",
    "load",
    "locate",
    "pooled_frame",
    "stratified_hold_out",
]
