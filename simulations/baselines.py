"""What a federation is measured against: models trained in the clear, all judged on the same held-out rows.

`alone`                 each bank trains on its own rows and own columns, and is judged on everybody's held-out rows
`label_holder_columns`  all banks' rows pooled, own columns only: what horizontal training could reach
`pooled_boosting`       all rows, all columns, gradient boosting: what a place that holds everything could reach
`pooled_lr`             all rows, all columns, the logistic regression of data/README.md ("Protocol")
`label_holder_lr`       the same regression on the label holders' own columns

The first three are one estimator family with one setting, so their differences come from rows and columns, not from the
model. With few defaults that boosting overfits: put `label_holder_lr` beside it when a gain is claimed. None is tuned.
None of this exists outside a simulation: it needs every party's rows in one place.
Sources: data/README.md (settings); Hanley & McNeil 1982 (AUC as the Mann-Whitney share); scikit-learn's estimators.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from simulations.federation_folder import Federation, pooled_frame

LEAST_TRAINING_ROWS = 50  # a bank below this trains no model of its own
CLIP = 5.0  # standard deviations, pooled_lr

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """One model on the held-out rows: score [n] (higher = riskier), AUC, KS, training rows."""

    score: Scores
    auc: float
    ks: float
    training_rows: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Baselines:
    """All baselines and the label [n] of the held-out rows, in the row order of `pooled_frame`.

    alone: by bank; None where the bank has fewer than LEAST_TRAINING_ROWS training rows or one class only.
    """

    label: npt.NDArray[np.int8]
    alone: Mapping[str, Judged | None]
    label_holder_columns: Judged
    pooled_boosting: Judged
    pooled_lr: Judged
    label_holder_lr: Judged


def auc(y: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Area under the ROC curve: P(score of a 1 > score of a 0) + P(equal) / 2, exact. Refuses one class, and NaN."""
    label, value = _both(y, score)
    _, place, counts = np.unique(value, return_inverse=True, return_counts=True)
    positives = np.bincount(place[label], minlength=counts.size)
    negatives = counts - positives
    # twice the Mann-Whitney count: an integer, so the sum is exact
    doubled = 2 * int(positives @ (np.cumsum(negatives) - negatives)) + int(positives @ negatives)
    return doubled / (2 * int(positives.sum()) * int(negatives.sum()))


def ks(y: npt.ArrayLike, score: npt.ArrayLike) -> float:
    """Kolmogorov-Smirnov distance: largest difference of the two classes' score distributions, over distinct scores."""
    label, value = _both(y, score)
    _, place, counts = np.unique(value, return_inverse=True, return_counts=True)
    positives = np.bincount(place[label], minlength=counts.size)
    negatives = counts - positives
    gap = np.cumsum(positives) / positives.sum() - np.cumsum(negatives) / negatives.sum()
    return float(np.max(np.abs(gap)))


def measure(federation: Federation) -> Baselines:
    """Train and judge all baselines of a federation (seconds to a minute; one pooled table in memory)."""
    frame, y, held_out, bank = pooled_frame(federation)
    own = [name for name in frame.columns if name.startswith(f"{federation.label_holder}.")]
    categorical = [
        f"{party}.{column.name}"
        for party, columns in federation.columns.items()
        for column in columns
        if column.kind == "categorical"
    ]
    own_columns = frame[own]
    training = ~held_out
    alone: dict[str, Judged | None] = {}
    for table in federation.banks:
        mine = training & (bank == table.name)
        enough = int(mine.sum()) >= LEAST_TRAINING_ROWS and np.unique(y[mine]).size == 2
        alone[table.name] = (
            _judge(_boosting(own_columns, categorical), own_columns, y, mine, held_out) if enough else None
        )
    c, sign_log1p = federation.baseline.c, federation.baseline.sign_log1p
    return Baselines(
        label=y[held_out],
        alone=alone,
        label_holder_columns=_judge(_boosting(own_columns, categorical), own_columns, y, training, held_out),
        pooled_boosting=_judge(_boosting(frame, categorical), frame, y, training, held_out),
        pooled_lr=_judge(_logistic(frame, categorical, c, sign_log1p), frame, y, training, held_out),
        label_holder_lr=_judge(_logistic(own_columns, categorical, c, sign_log1p), own_columns, y, training, held_out),
    )


def _both(y: npt.ArrayLike, score: npt.ArrayLike) -> tuple[npt.NDArray[np.bool_], Scores]:
    label, value = np.asarray(y), np.asarray(score, dtype=np.float64)
    if label.shape != value.shape or label.ndim != 1:
        raise ValueError(f"label has shape {label.shape}, score {value.shape}; both must be [n]")
    if not np.isin(label, (0, 1)).all() or np.unique(label).size != 2:
        raise ValueError("AUC and KS need labels 0 and 1, both present")
    if np.isnan(value).any():
        raise ValueError(f"{int(np.isnan(value).sum())} scores are NaN; every row needs a score")
    return label == 1, value


def _judge(
    model: Any, frame: Any, y: npt.NDArray[np.int8], training: npt.NDArray[np.bool_], held_out: npt.NDArray[np.bool_]
) -> Judged:
    model.fit(frame[training], y[training])
    score = np.asarray(model.predict_proba(frame[held_out])[:, 1], dtype=np.float64)
    label = y[held_out]
    return Judged(score=score, auc=auc(label, score), ks=ks(label, score), training_rows=int(training.sum()))


def _boosting(frame: Any, categorical: list[str]) -> Any:
    """Histogram gradient boosting; categories become ordinal codes in order of name, missing stays missing."""
    chosen = [name for name in frame.columns if name in set(categorical)]
    codes = {name: _levels(frame[name]) for name in chosen}
    return make_pipeline(
        FunctionTransformer(_ordinal, kw_args={"codes": codes}),
        HistGradientBoostingClassifier(
            max_leaf_nodes=15,
            learning_rate=0.06,
            max_iter=250,
            l2_regularization=1.0,
            early_stopping=False,
            random_state=42,
        ),
    )


def _levels(column: Any) -> dict[str, int]:
    # names only, no labels: the held-out rows' categories may be among them
    names = sorted({value for value in column.tolist() if isinstance(value, str)})
    return {name: code for code, name in enumerate(names)}


def _ordinal(frame: Any, codes: Mapping[str, Mapping[str, int]]) -> npt.NDArray[np.float64]:
    columns = [frame[name].map(codes[name]) if name in codes else frame[name] for name in frame.columns]
    return np.column_stack([np.asarray(column, dtype=np.float64) for column in columns])


def _logistic(frame: Any, categorical: list[str], c: float, sign_log1p: tuple[str, ...]) -> Any:
    """The `baseline_lr` protocol: (sign-log1p) -> median and missing indicator -> standardise -> clip; one-hot; L2."""
    names = list(frame.columns)
    chosen = [name for name in names if name in set(categorical)]
    logged = [name for name in names if name in set(sign_log1p)]
    plain = [name for name in names if name not in {*chosen, *logged}]
    numeric = [SimpleImputer(strategy="median", add_indicator=True), StandardScaler(), FunctionTransformer(_clip)]
    parts = [
        ("logged", make_pipeline(FunctionTransformer(_signed_log1p), *numeric), logged),
        ("plain", make_pipeline(*numeric), plain),
        (
            "codes",
            make_pipeline(
                FunctionTransformer(_name_missing),
                OneHotEncoder(min_frequency=20, handle_unknown="infrequent_if_exist"),
            ),
            chosen,
        ),
    ]
    return make_pipeline(ColumnTransformer([part for part in parts if part[2]]), LogisticRegression(C=c, max_iter=2000))


def _signed_log1p(x: Any) -> Any:
    return np.sign(x) * np.log1p(np.abs(x))


def _clip(x: Any) -> Any:
    return np.clip(x, -CLIP, CLIP)


def _name_missing(frame: Any) -> Any:
    return pd.DataFrame(frame).astype(object).where(lambda cells: cells.notna(), "\0missing")
