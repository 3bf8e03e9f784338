"""Baselines: exact AUC and KS against slow twins, and known figures of the real sets."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from threadpoolctl import threadpool_limits

from simulations.baselines import Baselines, auc, ks, measure
from simulations.federation_folder import BankTable, BaselineSettings, Column, Federation, OwnerTable, load

DATA = Path(os.environ.get("XINYI_DATA", Path(__file__).parents[1] / "../shared/data"))
real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"real data sets not found at {DATA}; set XINYI_DATA to their folder"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # small fits: threads wait for each other longer than they work, on a shared machine many times longer
    with threadpool_limits(1):
        yield


labelled_scores = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40).filter(
    lambda rows: len({label for label, _ in rows}) == 2
)


@given(labelled_scores)
@settings(derandomize=True, deadline=None)
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[bool, int]]) -> None:
    bad = [score for label, score in rows if label]
    good = [score for label, score in rows if not label]
    pairs = sum((b > g) + 0.5 * (b == g) for b in bad for g in good) / (len(bad) * len(good))
    labels, scores = zip(*rows, strict=True)
    assert auc(labels, scores) == pytest.approx(pairs, abs=1e-15)
    assert auc(labels, [-score for score in scores]) == pytest.approx(1 - pairs, abs=1e-12)


@given(labelled_scores)
@settings(derandomize=True, deadline=None)
def test_ks_is_the_largest_gap_over_thresholds(rows: list[tuple[bool, int]]) -> None:
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    gaps = [abs((scores[labels] <= t).mean() - (scores[~labels] <= t).mean()) for t in scores]
    assert ks(labels, scores) == pytest.approx(max(gaps), abs=1e-12)


def test_against_scikit_learn_on_many_ties() -> None:
    rng = np.random.default_rng(1)
    y = rng.random(5000) < 0.1
    score = np.round(rng.normal(size=5000) + y, 1)
    assert auc(y, score) == pytest.approx(roc_auc_score(y, score), abs=1e-12)
    false_positive, true_positive, _ = roc_curve(y, score)
    assert ks(y, score) == pytest.approx(np.max(np.abs(true_positive - false_positive)), abs=1e-12)


def test_known_answers() -> None:
    assert auc([0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0]) == 1.0
    assert auc([0, 1, 0, 1], [5.0, 5.0, 5.0, 5.0]) == 0.5
    assert ks([0, 0, 1, 1], [1.0, 2.0, 3.0, 4.0]) == 1.0
    assert ks([0, 1, 0, 1], [5.0, 5.0, 5.0, 5.0]) == 0.0
    assert ks([1, 1, 0, 0], [1.0, 2.0, 3.0, 4.0]) == 1.0  # the distance has no sign, AUC has
    assert auc([1, 1, 0, 0], [1.0, 2.0, 3.0, 4.0]) == 0.0


@pytest.mark.parametrize("function", [auc, ks])
@pytest.mark.parametrize(
    ("y", "score", "message"),
    [
        ([0, 0], [1.0, 2.0], "both present"),
        ([0, 2], [1.0, 2.0], "labels 0 and 1"),
        ([0, 1], [1.0, np.nan], "1 scores are NaN"),
        ([0, 1, 1], [1.0, 2.0], "must be"),
    ],
)
def test_bad_input_is_refused(function: object, y: list[int], score: list[float], message: str) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match=message):
        function(y, score)


def _federation(sizes: dict[str, int], one_class: str | None = None) -> Federation:
    """y depends on x (bank), z (owner, 70 % known) and a category; bank by bank."""
    rng = np.random.default_rng(11)
    banks, known_ids, known_z = [], [], []
    for name, n in sizes.items():
        ids = np.array([f"{name}{i}" for i in range(n)])
        x, z = rng.normal(size=n), rng.normal(size=n)
        kind = rng.choice(np.array(["a", "b"], dtype=object), n)
        logit = x + 1.5 * z + np.where(kind == "a", 1.0, -1.0)
        label = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int8)
        kind[rng.random(n) < 0.1] = None
        if name == one_class:
            label[:] = 0
        columns = {"x": np.where(rng.random(n) < 0.1, np.nan, x), "kind": kind}
        banks.append(BankTable(name=name, ids=ids, label=label, held_out=np.arange(n) % 3 == 0, columns=columns))
        known = rng.random(n) < 0.7
        known_ids.append(ids[known])
        known_z.append(z[known])
    owner = OwnerTable(name="pboc", role="pboc", ids=np.concatenate(known_ids), columns={"z": np.concatenate(known_z)})
    return Federation(
        name="made up",
        folder_hash="",
        label_holder="bank",
        banks=tuple(banks),
        owners=(owner,),
        columns={
            "bank": (
                Column(name="x", kind="numeric"),
                Column(name="kind", kind="categorical", categories=("a", "b")),
            ),
            "pboc": (Column(name="z", kind="numeric"),),
        },
        baseline=BaselineSettings(c=1.0, sign_log1p=("pboc.z",)),
        synthetic=True,
        note="",
        warnings=(),
    )


def test_all_are_judged_on_the_same_rows() -> None:
    federation = _federation({"large": 900, "small": 600, "tiny": 60, "good": 300}, one_class="good")
    found = measure(federation)
    rows = sum(int(bank.held_out.sum()) for bank in federation.banks)
    assert len(found.label) == rows
    assert found.alone["tiny"] is None  # 40 training rows
    assert found.alone["good"] is None  # one class
    large = found.alone["large"]
    assert large is not None
    assert large.training_rows == 600
    for judged in (large, found.label_holder_columns, found.pooled_boosting, found.pooled_lr, found.label_holder_lr):
        assert judged.score.shape == (rows,)
        assert judged.auc == auc(found.label, judged.score)
        assert judged.ks == ks(found.label, judged.score)
    assert found.pooled_lr.auc > found.label_holder_lr.auc + 0.03  # the owner's column is worth something
    assert found.pooled_boosting.auc > found.label_holder_columns.auc + 0.03


def test_own_columns_only_ignore_the_owners() -> None:
    federation = _federation({"one": 400, "two": 400})
    blind = OwnerTable(
        name="pboc", role="pboc", ids=federation.owners[0].ids, columns={"z": np.zeros(len(federation.owners[0].ids))}
    )
    without = Federation(**{**vars(federation), "owners": (blind,)})
    a, b = measure(federation), measure(without)
    assert np.array_equal(a.label_holder_columns.score, b.label_holder_columns.score)
    assert np.array_equal(a.label_holder_lr.score, b.label_holder_lr.score)
    assert not np.array_equal(a.pooled_boosting.score, b.pooled_boosting.score)


def test_column_order_of_codes_and_missing_survives_pandas(tmp_path: Path) -> None:
    """A folder of text categories only, with a missing cell and a category that training never saw."""
    n = 300
    kind = np.where(np.arange(n) % 2 == 0, "even", "odd").astype(object)
    kind[:3] = [None, "only held out", "even"]
    frame = pd.DataFrame(
        {"id": range(n), "y": (np.arange(n) // 2) % 2, "kind": kind, "fate_test": (np.arange(n) < 60).astype(int)}
    )
    frame.to_csv(tmp_path / "bank.csv", index=False)
    (tmp_path / "split.json").write_text(
        '{"id": "id", "label": "y", "label_file": "bank.csv", "categorical": ["kind"],'
        ' "parties": {"bank": {"file": "bank.csv", "columns": ["kind"]}}}'
    )
    found = measure(load(tmp_path, banks=1))
    assert found.pooled_boosting.auc == found.label_holder_columns.auc
    assert 0.4 < found.pooled_lr.auc < 0.6


@real_data
def test_real_figures() -> None:
    """Documented: HMEQ .906 / .962 over 5 folds; FATE's horizontal split on its own test rows."""
    hmeq = measure(load(DATA / "hmeq"))
    assert hmeq.pooled_lr.auc == pytest.approx(0.906, abs=0.015)
    assert hmeq.pooled_boosting.auc == pytest.approx(0.962, abs=0.015)
    assert hmeq.label_holder_columns.auc == pytest.approx(0.756, abs=0.03)
    homo: Baselines = measure(load(DATA / "fate_default_credit" / "split_homo.json"))
    # FATE's own test rows, so the documented figures are reproduced, not resembled (.7314, .7856)
    assert homo.pooled_lr.auc == pytest.approx(0.7314, abs=0.0005)
    assert homo.pooled_boosting.auc == pytest.approx(0.7856, abs=0.0005)
    assert [judged is not None and round(judged.auc, 3) for judged in homo.alone.values()] == pytest.approx(
        [0.776, 0.775, 0.778], abs=0.002
    )
