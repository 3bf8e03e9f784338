"""Federation folders: what loads, how rows are cut, and that bad input is one clear line without data in it."""

import dataclasses
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import DataError
from simulations.federation_folder import (
    BankTable,
    Federation,
    load,
    locate,
    pooled_frame,
    stratified_hold_out,
)

DATA = Path(os.environ.get("XINYI_DATA", Path(__file__).parents[1] / "../shared/data"))
real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"real data sets not found at {DATA}; set XINYI_DATA to their folder"
)
N = 600


def _write(folder: Path, frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        frame.to_csv(folder / name, index=False)
    (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")
    return folder


def _bank_frame() -> pd.DataFrame:
    rng = np.random.default_rng(5)
    return pd.DataFrame(
        {
            "uscc": [f"SECRET{i:04d}" for i in range(N)],
            "bad": np.tile([0, 0, 0, 1], N // 4),
            "city": np.tile(["wuhan", "xian", "other"], N // 3),
            "amount": rng.normal(size=N),
            "mode": np.tile(["credit", "NA", "", "mortgage"], N // 4),
            "leak": rng.normal(size=N),
        }
    )


def _owner_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "uscc": [f"SECRET{i:04d}" for i in range(100, N + 50)],
            "overdue": np.where(np.arange(N - 50) % 10 == 0, -99, np.arange(N - 50) % 7),
            "cases": np.where(np.arange(N - 50) % 2 == 0, np.nan, 3),
            "grade": np.tile(["A", "B"], (N - 50) // 2),
        }
    )


def _split() -> dict[str, Any]:
    return {
        "id": "uscc",
        "label": "bad",
        "label_file": "bank.csv",
        "parties": {
            "bank": {"file": "bank.csv", "columns": ["amount", "mode"]},
            "pboc": {"file": "owner.csv", "columns": ["overdue", "grade"]},
            "public_court": {"file": "owner.csv", "columns": ["cases"]},
        },
        "horizontal_key": "city",
        "horizontal_groups": ["xian", "wuhan"],
        "categorical": ["mode", "grade"],
        "missing_codes": {"overdue": [-99]},
        "missing_means_zero": ["cases"],
        "never_use_as_features": ["leak"],
        "baseline_lr": {"C": 0.5, "sign_log1p_columns": ["amount", "cases"]},
    }


Change = Callable[[dict[str, pd.DataFrame], dict[str, Any]], None]


def _folder(tmp_path: Path, change: Change | None = None) -> Path:
    frames, split = {"bank.csv": _bank_frame(), "owner.csv": _owner_frame()}, _split()
    if change is not None:
        change(frames, split)
    return _write(tmp_path / "fed", frames, split)


# ---- what loads ----


def test_tables_of_every_party(tmp_path: Path) -> None:
    fed = load(_folder(tmp_path))
    assert [bank.name for bank in fed.banks] == ["xian", "wuhan", "rest"]
    assert [len(bank.ids) for bank in fed.banks] == [200, 200, 200]
    assert fed.label_holder == "bank"
    assert [(owner.name, owner.role) for owner in fed.owners] == [("pboc", "pboc"), ("public_court", "public_credit")]
    owner = fed.owners[0]
    assert len(owner.ids) == N - 50  # the 50 firms without a loan are there, too
    assert owner.columns["overdue"].dtype == np.float64
    assert -99.0 in owner.columns["overdue"]  # codes stay in place
    assert fed.columns["pboc"][0].codes == (-99.0,)
    assert fed.columns["bank"][1].categories == ("NA", "credit", "mortgage")  # "NA" is a code here, "" is missing
    assert fed.columns["pboc"][1].categories == ()  # an owner's codes are its own
    assert None in fed.banks[0].columns["mode"].tolist()
    assert (fed.baseline.c, fed.baseline.sign_log1p) == (0.5, ("bank.amount", "public_court.cases"))


def test_missing_means_zero_only_where_the_owner_has_the_row(tmp_path: Path) -> None:
    fed = load(_folder(tmp_path))
    cases = fed.owners[1].columns["cases"]
    assert set(cases.tolist()) == {0.0, 3.0}
    assert fed.columns["public_court"][0].missing_means_zero
    frame, *_ = pooled_frame(fed)
    assert not frame["public_court.cases"].isna().any()  # joined: absent firms have no cases
    assert frame["pboc.overdue"].isna().sum() > 100  # absent firms, and the code


def test_pooled_frame_joins_by_id(tmp_path: Path) -> None:
    fed = load(_folder(tmp_path))
    frame, y, held_out, bank = pooled_frame(fed)
    assert list(frame.columns) == ["bank.amount", "bank.mode", "pboc.overdue", "pboc.grade", "public_court.cases"]
    assert len(frame) == len(y) == len(held_out) == len(bank) == N
    source = _bank_frame().set_index("uscc")
    owner = _owner_frame().set_index("uscc")
    ids = np.concatenate([table.ids for table in fed.banks])
    assert np.array_equal(frame["bank.amount"], source.loc[ids, "amount"])
    assert np.array_equal(y, source.loc[ids, "bad"])
    grade = owner["grade"].reindex(ids)
    assert (frame["pboc.grade"].isna().to_numpy() == grade.isna().to_numpy()).all()
    assert (frame["pboc.grade"].dropna().to_numpy() == grade.dropna().to_numpy()).all()
    assert not np.isin(frame["pboc.overdue"], [-99]).any()


def test_locate_finds_rows() -> None:
    found = locate(np.array(["b", "x", "a"]), np.array(["a", "b"]))
    assert found.tolist() == [1, -1, 0]


def test_random_banks_by_hash(tmp_path: Path) -> None:
    def no_key(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        del split["horizontal_key"], split["horizontal_groups"]

    folder = _folder(tmp_path, no_key)
    four = load(folder, banks=4)
    assert [bank.name for bank in four.banks] == ["bank_1", "bank_2", "bank_3", "bank_4"]
    assert sum(len(bank.ids) for bank in four.banks) == N
    assert min(len(bank.ids) for bank in four.banks) > 100
    again, other = load(folder, banks=4), load(folder, banks=4, seed=7)
    assert all((a.ids == b.ids).all() for a, b in zip(four.banks, again.banks, strict=True))
    assert set(four.banks[0].ids.tolist()) != set(other.banks[0].ids.tolist())
    with pytest.raises(ValueError, match="banks is 0"):
        load(folder, banks=0)


def test_rows_without_a_label_are_not_the_banks(tmp_path: Path) -> None:
    def unlabelled(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        frames["bank.csv"]["bad"] = frames["bank.csv"]["bad"].astype("Int64")
        frames["bank.csv"].loc[:9, "bad"] = pd.NA
        split["parties"]["public_court"] = {"file": "bank.csv", "columns": ["leak"]}
        split["never_use_as_features"] = []
        split["missing_means_zero"] = []

    fed = load(_folder(tmp_path, unlabelled))
    assert sum(len(bank.ids) for bank in fed.banks) == N - 10
    assert len(fed.owners[1].ids) == N  # an owner in the label file has all its rows


def test_register_as_label_file(tmp_path: Path) -> None:
    """Own columns in another file: labelled enterprises with a record in some party's file (bdci2017_enterprise)."""

    def register(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        bank = frames["bank.csv"]
        frames["register.csv"] = bank[["uscc", "bad", "city"]]
        frames["bank.csv"] = bank[["uscc", "amount", "mode"]].iloc[50:80]
        split["label_file"] = "register.csv"

    fed = load(_folder(tmp_path, register))
    ids = {i for bank in fed.banks for i in bank.ids.tolist()}
    assert ids == {f"SECRET{i:04d}" for i in [*range(50, 80), *range(100, N)]}
    assert sum(int(np.isnan(bank.columns["amount"]).sum()) for bank in fed.banks) == N - 100
    assert any("500 of 530 label-holder rows have no record in bank.csv" in line for line in fed.warnings)


def test_alternative_parties(tmp_path: Path) -> None:
    def alternative(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        split["alternative_parties"] = {"bank": ["mode"], "tax": ["amount"], "pboc": ["grade"]}

    folder = _folder(tmp_path, alternative)
    fed = load(folder, alternative=True)
    assert [owner.name for owner in fed.owners] == ["tax", "pboc"]
    assert len(fed.owners[0].ids) == N
    assert [owner.name for owner in load(folder).owners] == ["pboc", "public_court"]


def test_parquet_gzip_and_byte_order_mark_give_the_same_tables(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    plain = load(folder)
    text = (folder / "owner.csv").read_bytes()
    (folder / "owner.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text))
    bank = _bank_frame()
    bank["mode"] = bank["mode"].replace("", None)
    bank.to_parquet(folder / "bank.parquet")
    renamed = json.dumps(_split()).replace("owner.csv", "owner.csv.gz").replace("bank.csv", "bank.parquet")
    (folder / "split_other.json").write_text(renamed, encoding="utf-8")
    other = load(folder, split="split_other.json")
    assert other.name == f"{folder.name}/other"
    assert load(folder / "split_other.json").name == other.name
    assert other.folder_hash != plain.folder_hash
    first, second = pooled_frame(plain), pooled_frame(other)
    pd.testing.assert_frame_equal(first[0], second[0])
    assert all(np.array_equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


def test_whole_number_ids_agree_between_csv_and_parquet(tmp_path: Path) -> None:
    def numbers(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        for frame in frames.values():
            frame["uscc"] = frame["uscc"].str[6:].astype(int)
        split["parties"]["public_court"]["file"] = "owner.parquet"

    folder = _folder(tmp_path, numbers)
    owner = _owner_frame()
    owner["uscc"] = owner["uscc"].str[6:].astype(float)
    owner.to_parquet(folder / "owner.parquet")
    fed = load(folder)
    assert "100" in fed.owners[1].ids
    assert (locate(fed.owners[1].ids, fed.owners[0].ids) >= 0).all()


def test_folder_hash_follows_every_byte(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    before = load(folder).folder_hash
    assert load(folder, seed=7).folder_hash == before
    with (folder / "owner.csv").open("a") as file:
        file.write("SECRET9999,1,,A\n")
    assert load(folder).folder_hash != before


def test_nothing_prints_rows(tmp_path: Path) -> None:
    fed = load(_folder(tmp_path))
    assert "SECRET" not in repr(fed)
    assert repr(fed.banks[0]) == "BankTable('xian', 200 rows, 2 columns)"


# ---- held out ----


def test_held_out_is_stratified_and_independent_of_row_order() -> None:
    ids = np.array([f"id{i}" for i in range(1000)])
    label = (np.arange(1000) % 10 == 0).astype(np.int8)
    mask = stratified_hold_out(ids, label, seed=1)
    assert mask.sum() == 300
    assert mask[label == 1].sum() == 30
    order = np.random.default_rng(3).permutation(1000)
    assert (stratified_hold_out(ids[order], label[order], seed=1) == mask[order]).all()
    assert (stratified_hold_out(ids, label, seed=2) != mask).any()


def test_held_out_known_answer() -> None:
    # pins the rule: SHA-256 of "seed|id", smallest 30 % per class
    ids = np.array([f"E{i}" for i in range(10)])
    mask = stratified_hold_out(ids, np.zeros(10, dtype=np.int8), seed=42)
    assert np.flatnonzero(mask).tolist() == [0, 2, 7]


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(0, 5))
@settings(derandomize=True, deadline=None)
def test_both_sides_hold_every_class_of_two_rows(label: list[bool], seed: int) -> None:
    y = np.array(label, dtype=np.int8)
    mask = stratified_hold_out([f"i{i}" for i in range(len(y))], y, seed)
    for value in np.unique(y):
        if (y == value).sum() >= 2:
            assert 0 < mask[y == value].sum() < (y == value).sum()


def test_fate_test_column_wins_over_the_hash(tmp_path: Path) -> None:
    def marked(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        frames["bank.csv"]["fate_test"] = (np.arange(N) < 100).astype(int)

    fed = load(_folder(tmp_path, marked))
    held = {i for bank in fed.banks for i in bank.ids[bank.held_out].tolist()}
    assert held == {f"SECRET{i:04d}" for i in range(100)}


def test_test_group_is_held_out_and_spread(tmp_path: Path) -> None:
    def grouped(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        split["test_group"] = "other"

    fed = load(_folder(tmp_path, grouped))
    assert [bank.name for bank in fed.banks] == ["xian", "wuhan"]
    assert sum(int(bank.held_out.sum()) for bank in fed.banks) == 200
    assert all(int((~bank.held_out).sum()) == 200 for bank in fed.banks)
    assert all(int(bank.held_out.sum()) > 60 for bank in fed.banks)


# ---- bad input: one line each, nothing of the data in it ----


def _drop_column(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["owner.csv"] = frames["owner.csv"].rename(columns={"grade": "grades"})


def _no_header(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frame = frames["owner.csv"].astype(str)
    frames["owner.csv"] = frame.iloc[1:].set_axis(frame.iloc[0].tolist(), axis=1)


def _semicolons(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frame = frames["owner.csv"]
    joined = frame.fillna(0).astype(str).agg(";".join, axis=1)
    frames["owner.csv"] = pd.DataFrame({";".join(frame.columns): joined})


def _two_lines(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"]["pboc"]["file"] = "owner\n.csv"


def _missing_file(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"]["pboc"]["file"] = "absent.csv"


def _outside(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"]["pboc"]["file"] = "../owner.csv"


def _other_suffix(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["owner.xlsx"] = frames["owner.csv"]
    split["parties"]["pboc"]["file"] = "owner.xlsx"


def _duplicates(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["owner.csv"] = pd.concat([frames["owner.csv"], frames["owner.csv"].iloc[:3]])


def _odd_labels(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["bank.csv"].loc[:4, "bad"] = 2


def _text_label(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["label"] = "city"
    del split["horizontal_key"], split["horizontal_groups"]


def _one_class(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["bank.csv"]["bad"] = 0


def _one_class_in_training(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["bank.csv"]["fate_test"] = frames["bank.csv"]["bad"]
    frames["bank.csv"].loc[0, "fate_test"] = 1


def _no_overlap(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["owner.csv"]["uscc"] = "X" + frames["owner.csv"]["uscc"]


def _infinite(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["bank.csv"].loc[:1, "amount"] = np.inf


def _words(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["bank.csv"]["amount"] = frames["bank.csv"]["amount"].astype(str)
    frames["bank.csv"].loc[:6, "amount"] = "1,200"


def _leak(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"]["bank"]["columns"].append("leak")


def _label_as_feature(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"]["bank"]["columns"].append("bad")


def _no_columns(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"]["pboc"]["columns"] = []


def _two_owners_of_a_column(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"]["public_court"]["columns"].append("grade")


def _no_label_file(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    del split["label_file"]


def _no_parties(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"] = {}


def _unknown_group(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["horizontal_groups"].append("lhasa")


def _owner_named_like_a_bank(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"]["xian"] = split["parties"].pop("pboc")


def _empty_table(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["owner.csv"] = frames["owner.csv"].iloc[:0]


def _no_ids(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["owner.csv"]["uscc"] = None


def _long_id(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    frames["owner.csv"].loc[0, "uscc"] = "SECRET" * 1000


def _bad_c(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["baseline_lr"] = {"C": 0}


def _bad_codes(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["missing_codes"] = ["-99"]


def _zero_category(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["missing_means_zero"] = ["grade"]


def _key_as_number(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
    split["parties"]["bank"]["columns"].append("city")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_column, "column 'grade' is not among the 4 columns of owner.csv; did you mean 'grades'?"),
        (_no_header, "column 'uscc' is not among the 4 columns of owner.csv"),
        (_two_lines, "must be a non-empty text in one line"),
        (_semicolons, "is it separated by ';' or tabs"),
        (_missing_file, "file absent.csv is missing in"),
        (_outside, "leaves the federation folder"),
        (_other_suffix, "owner.xlsx is neither .csv, .csv.gz nor .parquet"),
        (_duplicates, "owner.csv: 3 rows repeat an id of column 'uscc'"),
        (_odd_labels, "label column 'bad' of bank.csv has 5 values other than 0 and 1"),
        (_text_label, "column 'city' of bank.csv has 600 cells that are not numbers"),
        (_one_class, "has one class only in 600 labelled rows"),
        (_one_class_in_training, "training rows (by fate_test) do not hold both classes"),
        (_no_overlap, "owner 'pboc' knows none of the banks' 600 enterprises"),
        (_infinite, "column 'amount' of bank.csv has 2 infinite values"),
        (_words, "column 'amount' of bank.csv has 7 cells that are not numbers"),
        (_leak, "lists 'leak', which never_use_as_features forbids"),
        (_label_as_feature, "lists 'bad' (id, label or test mark) as a feature"),
        (_no_columns, "party 'pboc' has no columns"),
        (_two_owners_of_a_column, "column 'grade' of owner.csv belongs to both 'pboc' and 'public_court'"),
        (_no_label_file, "split.json lacks 'label_file'"),
        (_no_parties, "'parties' must be an object"),
        (_unknown_group, "horizontal group 'lhasa' of column 'city' has no labelled rows"),
        (_owner_named_like_a_bank, "'xian' is the name of a bank and of a feature owner"),
        (_empty_table, "owner.csv has a header but no rows"),
        (_no_ids, "owner.csv: no row has an id"),
        (_long_id, "an id has 6000 characters, more than 128"),
        (_bad_c, "a number C above 0"),
        (_bad_codes, "'missing_codes' must be a list of numbers"),
        (_zero_category, "'grade' is categorical, so missing_means_zero has no meaning"),
        (_key_as_number, "'city' is the horizontal key and a feature"),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load(_folder(tmp_path, change))
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert "SECRET" not in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("split.json", b"{'id': 1}", "split.json is not JSON: Expecting property name"),
        ("split.json", b"[]", "must hold a JSON object"),
        ("split.json", b'{"id": "a", "id": "b"}', "has the key 'id' twice"),
        ("owner.csv", "uscc,overdue,cases,grade\n企业一,1,2,甲\n".encode("gb18030"), "it looks like GB18030"),
        ("owner.csv", "uscc,overdue\n".encode("utf-16"), "it looks like UTF-16"),
        ("owner.csv", b"uscc,\xff\xff\xff\x00\xfe", "a damaged or binary file"),
        ("owner.csv", b"", "not among the 0 columns of owner.csv"),
        ("owner.csv", b"uscc,overdue,cases,grade\nSECRET0100,1,2,A,5,6\n", "is not a readable CSV table"),
        ("owner.csv", b'uscc,overdue,cases,grade\nSECRET0100,1,2,"A\n', "is not a readable CSV table"),
        ("owner.csv", b"uscc,uscc,overdue,cases,grade\nSECRET0100,1,1,2,A\n", "has the column 'uscc' 2 times"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = _folder(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv.gz", "parquet"])
def test_damaged_containers(tmp_path: Path, suffix: str) -> None:
    folder = _folder(tmp_path)
    content = gzip.compress((folder / "owner.csv").read_bytes())
    (folder / f"owner.{suffix}").write_bytes(content[: len(content) // 2])
    text = (folder / "split.json").read_text().replace("owner.csv", f"owner.{suffix}")
    (folder / "split.json").write_text(text)
    with pytest.raises(DataError, match=f"owner.{suffix} is not a"):
        load(folder)


def test_absent_folder_and_alternative(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a directory"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"file split\.json is missing"):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match="has no 'alternative_parties'"):
        load(_folder(tmp_path), alternative=True)


def test_tables_refuse_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="'label' has 1 rows, the ids have 2"):
        BankTable(
            name="b",
            ids=np.array(["a", "b"]),
            label=np.zeros(1, dtype=np.int8),
            held_out=np.zeros(2, dtype=np.bool_),
            columns={},
        )


# ---- what is only risky ----


def test_clean_folder_has_no_warnings(tmp_path: Path) -> None:
    def plenty(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        bank = frames["bank.csv"]
        copies = [bank.assign(uscc=bank["uscc"] + f"_{k}") for k in "ab"]
        frames["bank.csv"] = pd.concat([bank, *copies])
        owner = frames["owner.csv"]
        frames["owner.csv"] = pd.concat([owner, *(owner.assign(uscc=owner["uscc"] + f"_{k}") for k in "ab")])

    assert load(_folder(tmp_path, plenty)).warnings == ()


def _warned(fed: Federation, *pieces: str) -> None:
    for piece in pieces:
        assert any(piece in line for line in fed.warnings), (piece, fed.warnings)


def test_small_federations_are_warned_about(tmp_path: Path) -> None:
    def small(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        del split["parties"]["public_court"]
        split["missing_means_zero"] = []
        split["horizontal_groups"] = ["wuhan"]
        frames["owner.csv"] = frames["owner.csv"].iloc[:40]
        split["note_"] = "typing error"
        bank = frames["bank.csv"]
        bank.loc[bank["city"] == "wuhan", "bad"] = 0
        bank.loc[3, "uscc"] = ""

    fed = load(_folder(tmp_path, small))
    assert [bank.name for bank in fed.banks] == ["wuhan", "rest"]
    _warned(
        fed,
        "two banks: each can subtract itself",
        "banks see that owner's score",
        "owner 'pboc' knows 6.7% of the banks' enterprises",
        "bank 'wuhan' has one class only in training",
        "fewer than 200",
        "keys that are not understood and have no effect: note_",
        "bank.csv: 1 of 600 rows have no id",
    )


def test_one_bank_and_no_owner(tmp_path: Path) -> None:
    def lonely(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        split["parties"] = {"bank": split["parties"]["bank"]}
        del split["horizontal_key"], split["horizontal_groups"]
        split["missing_codes"] = []

    fed = load(_folder(tmp_path, lonely), banks=1)
    _warned(fed, "one bank ('bank_1')", "no feature owner")
    assert pooled_frame(fed)[0].shape == (N, 2)


def test_shared_names_in_different_files_are_two_columns(tmp_path: Path) -> None:
    def shared(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        frames["owner.csv"]["amount"] = 1.0
        split["parties"]["pboc"]["columns"].append("amount")

    fed = load(_folder(tmp_path, shared))
    frame, *_ = pooled_frame(fed)
    assert {"bank.amount", "pboc.amount"} <= set(frame.columns)
    _warned(fed, "occur at more than one party")


def test_roles_by_name(tmp_path: Path) -> None:
    def renamed(frames: dict[str, pd.DataFrame], split: dict[str, Any]) -> None:
        split["parties"]["public_credit_tax"] = split["parties"].pop("pboc")
        split["parties"]["credit_bureau"] = split["parties"].pop("public_court")

    roles = [owner.role for owner in load(_folder(tmp_path, renamed)).owners]
    assert roles == ["public_credit", "pboc"]


# ---- real data ----

ROWS = {  # data/README.md: rows used, features, positive rate
    "bdci2017_enterprise/split.json": (17_662, 32, 0.078),
    "cumcm2020_sme/split.json": (123, 42, 0.220),
    "sba_loans/split_national.json": (17_378, 15, 0.498),
    "slovak_sme/split.json": (13_036, 63, 0.019),
    "fate_breast/split.json": (569, 30, 0.627),
    "fate_default_credit/split_homo.json": (30_000, 23, 0.221),
    "fate_give_credit/split.json": (150_000, 10, 0.067),
    "superlender_ng/split.json": (4_368, 22, 0.218),
    "lendingclub2018/split.json": (31_766, 37, 0.254),
}


@real_data
@pytest.mark.parametrize("split", ROWS)
def test_real_sets_have_the_documented_rows(split: str) -> None:
    rows, features, positive = ROWS[split]
    frame, y, held_out, _ = pooled_frame(load(DATA / split))
    assert frame.shape == (rows, features)
    assert y.mean() == pytest.approx(positive, abs=0.0006)
    assert 0.19 < held_out.mean() < 0.31


@real_data
def test_real_special_cases() -> None:
    bdci = load(DATA / "bdci2017_enterprise")
    assert [(owner.name, len(owner.ids)) for owner in bdci.owners] == [
        ("court", 10_324),
        ("procurement", 8_042),
        ("licence", 4_973),
    ]
    assert pooled_frame(bdci)[0].isna().to_numpy().mean() == pytest.approx(0.389, abs=0.0006)  # its README
    give = load(DATA / "fate_give_credit", alternative=True)
    assert [owner.role for owner in give.owners] == ["pboc", "public_credit"]
    assert sum(int(bank.held_out.sum()) for bank in give.banks) == 30_000
    homo = load(DATA / "fate_default_credit" / "split_homo.json")
    assert [int((~bank.held_out).sum()) for bank in homo.banks] == [8_000, 8_000, 8_000]
    heloc = load(DATA / "heloc_fico")
    assert heloc.columns["bank_balances"][0].codes == (-9.0, -8.0, -7.0)
    assert pooled_frame(heloc)[0].isna().to_numpy().mean() == pytest.approx(0.109, abs=0.0006)


@real_data
def test_leaky_columns_of_real_sets_are_refused(tmp_path: Path) -> None:
    split = json.loads((DATA / "sba_loans" / "split.json").read_text(encoding="utf-8"))
    split["parties"]["bank"]["columns"].append("term_months_leaky")
    (tmp_path / "split.json").write_text(json.dumps(split), encoding="utf-8")
    with pytest.raises(DataError, match="term_months_leaky"):
        load(tmp_path)


def test_federation_is_frozen(tmp_path: Path) -> None:
    fed = load(_folder(tmp_path))
    with pytest.raises(dataclasses.FrozenInstanceError):
        fed.name = "other"  # type: ignore[misc]
