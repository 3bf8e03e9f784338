"""The made-up federation: reproducible, loadable, labelled as invented, and shaped as it says."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from threadpoolctl import threadpool_limits

from models.errors import DataError
from models.uscc import parse
from simulations.baselines import measure
from simulations.demo_federation import BANKS, COVERAGE, NO_LIMIT, generate
from simulations.federation_folder import Federation, load, locate


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # small fits: threads wait for each other longer than they work, on a shared machine many times longer
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("demo"), seed=1)


@pytest.fixture(scope="module")
def federation(folder: Path) -> Federation:
    return load(folder)


def _bytes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first = _bytes(generate(tmp_path / "a", seed=3, enterprises=400))
    assert first == _bytes(generate(tmp_path / "b", seed=3, enterprises=400))
    other = _bytes(generate(tmp_path / "c", seed=4, enterprises=400))
    assert all(first[name] != other[name] for name in first if name.endswith(".csv"))
    assert set(first) == {"README.txt", "split.json", "bank.csv", *(f"{name}.csv" for name in COVERAGE)}


def test_it_says_that_it_is_invented(folder: Path, federation: Federation) -> None:
    assert federation.synthetic
    assert "invented" in federation.note
    readme = (folder / "README.txt").read_text(encoding="utf-8")
    assert readme.startswith("SYNTHETIC DATA")
    assert "虚构" in readme
    assert "seed 1, 20000 enterprises" in readme


def test_shape(federation: Federation) -> None:
    assert federation.warnings == ()
    assert [bank.name for bank in federation.banks] == list(BANKS)
    assert [(owner.name, owner.role) for owner in federation.owners] == [
        ("pboc", "pboc"),
        ("public_tax", "public_credit"),
        ("public_court", "public_credit"),
    ]
    assert sum(len(bank.ids) for bank in federation.banks) == pytest.approx(20_000 * 0.985, rel=0.01)
    for bank in federation.banks:
        assert bank.label.mean() == pytest.approx(BANKS[bank.name][1], abs=0.012)
    label = np.concatenate([bank.label for bank in federation.banks])
    assert 0.03 < label.mean() < 0.05
    ids = np.concatenate([bank.ids for bank in federation.banks])
    for owner in federation.owners:
        assert (locate(ids, owner.ids) >= 0).mean() == pytest.approx(COVERAGE[owner.name], abs=0.03)
        assert (locate(owner.ids, ids) < 0).sum() > 1000  # firms that no bank knows


def test_codes_are_valid_and_nobodys(folder: Path) -> None:
    ids = pd.read_csv(folder / "bank.csv", usecols=["uscc"])["uscc"]
    assert ids.is_unique
    codes = [parse(text) for text in ids[:2000]]
    assert all(code.body_check_holds for code in codes)
    assert all(code.code[2:4] == "99" for code in codes)  # no such region
    assert 0.02 < np.mean([code.personal for code in codes]) < 0.3


def test_columns_are_shaped_like_the_field(folder: Path, federation: Federation) -> None:
    bank, pboc, tax, court = (pd.read_csv(folder / f"{name}.csv") for name in ("bank", *COVERAGE))
    assert bank["debt_to_assets"].isna().mean() == pytest.approx(0.34, abs=0.08)
    assert (bank["inflow_months_12m"] == 12).mean() > 0.55  # an atom
    assert (pboc["cyc_used_share"] == NO_LIMIT).mean() == pytest.approx(0.3, abs=0.03)
    assert (court["enforcement_cnt_24m"] == 0).mean() > 0.8
    assert ((court["enforcement_amt_24m"] > 0) <= (court["enforcement_cnt_24m"] > 0)).all()
    grades = tax["tax_credit_grade"].value_counts(normalize=True)
    assert grades["A"] == pytest.approx(0.083, abs=0.02)
    assert grades["C"] + grades["D"] == pytest.approx(0.091, abs=0.02)
    assert (pboc["open_lender_cnt"] <= pboc["lender_cnt"]).all()
    for frame in (bank, pboc, tax, court):
        numeric = frame.select_dtypes("number").drop(columns=["cyc_used_share", "inv_growth_yoy"], errors="ignore")
        assert (numeric.drop(columns="ss_headcount_chg_12m", errors="ignore").fillna(0) >= 0).all().all()
    schema = {column.name: column for columns in federation.columns.values() for column in columns}
    assert schema["cyc_used_share"].codes == (NO_LIMIT,)
    assert schema["guarantee_mode"].categories == ("credit", "guarantee", "mixed", "mortgage", "pledge")


def test_the_leak_is_a_leak_and_is_refused(folder: Path, tmp_path: Path) -> None:
    bank = pd.read_csv(folder / "bank.csv")
    assert (bank.loc[bank["bad12"] == 1, "dpd_max_12m"] >= 90).all()
    assert (bank.loc[bank["bad12"] == 0, "dpd_max_12m"] <= 30).all()
    assert bank.loc[bank["bad12"].isna(), "dpd_max_12m"].between(31, 89).all()
    split = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    split["parties"]["bank"]["columns"].append("dpd_max_12m")
    (tmp_path / "split.json").write_text(json.dumps(split), encoding="utf-8")
    with pytest.raises(DataError, match="dpd_max_12m"):
        load(tmp_path)


def test_every_party_is_worth_something(federation: Federation) -> None:
    """Stand-alone about .70-.75, all parties about .80 (one split of 250 defaults: standard error about .015)."""
    found = measure(federation)
    assert 0.69 < found.label_holder_lr.auc < 0.78
    assert 0.76 < found.pooled_lr.auc < 0.85
    assert found.pooled_boosting.auc > found.label_holder_columns.auc + 0.03
    assert all(judged is not None and judged.auc > 0.6 for judged in found.alone.values())


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty and no demo federation"):
        generate(tmp_path, seed=1, enterprises=400)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "split.json").write_text('{"note": "my own"}')
    with pytest.raises(DataError, match="nothing was written"):
        generate(tmp_path, seed=1, enterprises=400)


def test_its_own_folder_is_written_anew(tmp_path: Path) -> None:
    generate(tmp_path, seed=1, enterprises=400)
    first = _bytes(tmp_path)
    generate(tmp_path, seed=2, enterprises=400)
    assert _bytes(tmp_path) != first


def test_too_few_enterprises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 300"):
        generate(tmp_path, seed=1, enterprises=299)
    load(generate(tmp_path, seed=1, enterprises=300))
