"""Laws of the score histogram: it adds like a sum of rows; its metrics are those of the pooled rows within bounds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score, roc_curve

from models.errors import DataError
from models.score_histogram import (
    EDGES,
    FINEST_CELLS,
    SCORE_SCALE,
    ScoreHistogram,
    wilson_interval,
)

law = settings(derandomize=True, deadline=None, max_examples=60)

rows_strategy = st.lists(
    st.tuples(st.integers(-20 * SCORE_SCALE, 20 * SCORE_SCALE), st.integers(0, 1)), min_size=0, max_size=60
)
narrow_strategy = st.lists(  # scores within a tenth of a logit: many ties
    st.tuples(st.integers(-2 * SCORE_SCALE, -2 * SCORE_SCALE + SCORE_SCALE // 10), st.integers(0, 1)),
    min_size=2,
    max_size=60,
)


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in rows], dtype=np.int64), np.array([y for _, y in rows], dtype=np.int8)


def of(rows: list[tuple[int, int]]) -> ScoreHistogram:
    return ScoreHistogram.of(*columns(rows))


def both_labels(rows: list[tuple[int, int]]) -> bool:
    return len({y for _, y in rows}) == 2


def sample(n: int, bad: float, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = (rng.random(n) < bad).astype(np.int8)
    logit = rng.normal(np.where(label == 1, 1.1, 0.0) * spread + math.log(bad), spread)
    return np.round(logit * SCORE_SCALE).astype(np.int64), label


def exact_ks(score: np.ndarray, label: np.ndarray) -> float:
    fpr, tpr, _ = roc_curve(label, score, drop_intermediate=False)
    return float(np.abs(tpr - fpr).max())


# Layout


def test_edges_are_public_ascending_and_contain_every_merged_layout() -> None:
    assert len(EDGES) == FINEST_CELLS + 1 == 2049
    assert EDGES[0] == -16 * SCORE_SCALE
    assert EDGES[-1] == 12 * SCORE_SCALE
    assert sorted({int(width) for width in np.diff(EDGES)}) == [SCORE_SCALE // 128, SCORE_SCALE // 32]
    with pytest.raises(ValueError, match="read-only"):
        EDGES[0] = 0


@pytest.mark.parametrize(
    ("score", "cell"),
    [
        (-(2**60), 0),
        (int(EDGES[0]) - 1, 0),
        (int(EDGES[1]) - 1, 0),
        (int(EDGES[1]), 1),
        (0, 256 + 8 * 128),
        (-1, 256 + 8 * 128 - 1),
        (int(EDGES[-1]), FINEST_CELLS - 1),
        (2**60, FINEST_CELLS - 1),
    ],
)
def test_a_score_falls_into_the_half_open_cell_that_holds_it(score: int, cell: int) -> None:
    for label in (0, 1):
        counts = of([(score, label)]).counts
        assert counts[cell, label] == 1
        assert counts.sum() == 1


# Sums


@law
@given(rows_strategy, st.lists(st.integers(0, 3), min_size=60, max_size=60))
def test_histogram_of_a_union_is_the_sum_over_any_partition(rows: list[tuple[int, int]], part: list[int]) -> None:
    total = of([])
    for number in range(4):
        total = total + of([row for row, p in zip(rows, part, strict=False) if p == number])
    assert total == of(rows)
    assert hash(total) == hash(of(rows))


@law
@given(rows_strategy, st.sampled_from([1, 2, 16, 1024]))
def test_vector_roundtrip_and_merging_commutes_with_adding(rows: list[tuple[int, int]], factor: int) -> None:
    first, second = of(rows[::2]), of(rows[1::2])
    merged = (first + second).merged(factor)
    assert merged == first.merged(factor) + second.merged(factor)
    assert merged.cells == FINEST_CELLS // factor
    assert len(merged.edges) == merged.cells + 1
    vector = merged.to_vector()
    assert vector.dtype == np.int64
    assert len(vector) <= 4096
    assert int(vector.sum()) == len(rows)
    assert ScoreHistogram.from_vector(vector) == merged


def test_counts_cannot_be_changed_through_the_vector_or_the_source() -> None:
    source = of([(0, 1), (5, 0)]).counts.copy()
    histogram = ScoreHistogram(counts=source)
    source[:] = 7
    histogram.to_vector()[:] = 9
    assert histogram.counts.sum() == 2
    with pytest.raises(ValueError, match="read-only"):
        histogram.counts[0, 0] = 1


# Metrics against the exact ones of the pooled rows


@law
@given(st.one_of(rows_strategy, narrow_strategy).filter(both_labels), st.sampled_from([1, 4, 64, 1024]))
def test_auc_and_ks_are_within_their_bounds(rows: list[tuple[int, int]], factor: int) -> None:
    score, label = columns(rows)
    histogram = of(rows).merged(factor)
    assert abs(histogram.auc() - roc_auc_score(label, score)) <= histogram.auc_error_bound() + 1e-12
    assert histogram.gini() == pytest.approx(2 * histogram.auc() - 1)
    exact = exact_ks(score, label)
    assert histogram.ks() - 1e-12 <= exact <= histogram.ks() + histogram.ks_error_bound() + 1e-12


@law
@given(narrow_strategy.filter(both_labels))
def test_auc_is_exact_for_scores_at_the_edges(rows: list[tuple[int, int]]) -> None:
    score, label = columns(rows)
    rounded = (score // (SCORE_SCALE // 128)) * (
        SCORE_SCALE // 128
    )  # every cell holds one value: its ties are true ties
    histogram = ScoreHistogram.of(rounded, label)
    assert histogram.auc() == pytest.approx(roc_auc_score(label, rounded), abs=1e-12)
    assert histogram.ks() == pytest.approx(exact_ks(rounded, label), abs=1e-12)


@pytest.mark.parametrize(("spread", "error"), [(1.0, 1e-4), (0.1, 1e-3)])
def test_binning_costs_almost_no_auc(spread: float, error: float) -> None:
    score, label = sample(20_000, 0.1, seed=3, spread=spread)
    histogram = ScoreHistogram.of(score, label)
    assert abs(histogram.auc() - roc_auc_score(label, score)) < error
    assert histogram.auc_error_bound() < 0.01


def test_perfect_reversed_and_useless_scores() -> None:
    low, high = -SCORE_SCALE, SCORE_SCALE
    assert of([(low, 0), (high, 1)]).auc() == 1.0
    assert of([(low, 1), (high, 0)]).auc() == 0.0
    assert of([(low, 1), (high, 0)]).ks() == 1.0
    assert of([(low, 1), (low, 0)]).auc() == 0.5
    assert of([(low, 1), (low, 0)]).auc_error_bound() == 0.5
    assert of([(low, 1), (low, 0)]).ks() == 0.0


def test_auc_counts_beyond_int64_pairs() -> None:
    counts = np.zeros((FINEST_CELLS, 2), dtype=np.int64)
    counts[10, 0] = counts[20, 1] = 2**40  # 2**80 pairs
    assert ScoreHistogram(counts=counts).auc() == 1.0


def test_roc_and_ks_curve_agree_with_the_metrics() -> None:
    score, label = sample(5_000, 0.2, seed=5)
    histogram = ScoreHistogram.of(score, label)
    fpr, tpr = histogram.roc()
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    assert np.trapezoid(tpr, fpr) == pytest.approx(histogram.auc(), abs=1e-12)
    threshold, good, bad = histogram.ks_curve()
    assert len(threshold) == len(good) == len(bad)
    assert np.abs(good - bad).max() == pytest.approx(histogram.ks(), abs=1e-15)
    assert threshold[0] <= score.min() / SCORE_SCALE
    assert threshold[-1] > score.max() / SCORE_SCALE
    at = len(threshold) // 2
    below = score < threshold[at] * SCORE_SCALE
    assert bad[at] == pytest.approx(label[below].sum() / label.sum())


def test_lift_adds_up_and_ranks_by_risk() -> None:
    score, label = sample(5_000, 0.2, seed=6)
    rows = ScoreHistogram.of(score, label).lift()
    assert [row.group for row in rows] == list(range(1, 11))
    assert sum(row.rows for row in rows) == 5_000
    assert sum(row.bads for row in rows) == label.sum()
    assert all(abs(row.share_of_rows - 0.1) < 0.01 for row in rows)
    assert rows[-1].cumulative_share_of_bads == 1.0
    assert rows[-1].cumulative_lift == pytest.approx(1.0)
    first = rows[0]
    riskiest = np.sort(score)[::-1][: round(first.rows)]
    assert first.bads == label[score >= riskiest[-1]].sum()
    assert first.lift == pytest.approx((first.bads / first.rows) / (label.sum() / 5_000))
    assert rows[0].lift > rows[-1].lift


def test_calibration_of_a_calibrated_score_and_of_one_that_is_too_low() -> None:
    rng = np.random.default_rng(7)
    logit = rng.normal(-2.0, 1.0, 40_000)
    label = (rng.random(40_000) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    score = np.round(logit * SCORE_SCALE).astype(np.int64)
    rows = ScoreHistogram.of(score, label).calibration()
    assert len(rows) == 10
    assert sum(row.observed_low <= row.predicted <= row.observed_high for row in rows) >= 8
    assert [row.predicted for row in rows] == sorted(row.predicted for row in rows)
    order = np.argsort(score)[: round(rows[0].rows)]
    assert rows[0].predicted == pytest.approx(float(np.mean(1 / (1 + np.exp(-logit[order])))), abs=0.001)
    too_low = ScoreHistogram.of(score - SCORE_SCALE, label).calibration()
    assert all(row.observed > row.predicted for row in too_low)


def test_brier_score() -> None:
    score, label = sample(5_000, 0.2, seed=8)
    exact = brier_score_loss(label, 1 / (1 + np.exp(-score / SCORE_SCALE)))
    assert ScoreHistogram.of(score, label).brier() == pytest.approx(exact, abs=1e-4)


def test_few_distinct_scores_give_fewer_groups_and_no_empty_ones() -> None:
    rows = of([(-3 * SCORE_SCALE, 0)] * 80 + [(-3 * SCORE_SCALE, 1)] * 5 + [(0, 1)] * 15).lift()
    assert [row.rows for row in rows] == [15, 85]
    assert [row.bad_rate for row in rows] == [1.0, 5 / 85]


# Noise


def noised(histogram: ScoreHistogram, std: float, seed: int) -> ScoreHistogram:
    # A test stands in for the secure sum here; real noise never comes from numpy.random.
    noise = np.round(np.random.default_rng(seed).normal(0, std, histogram.counts.shape)).astype(np.int64)
    return histogram + ScoreHistogram(counts=noise)


@pytest.mark.parametrize("bad", [0.1, 0.5, 0.9])
def test_noised_auc_is_unbiased_and_its_standard_deviation_is_predicted(bad: float) -> None:
    histogram = ScoreHistogram.of(*sample(30_000, bad, seed=9)).merged(16)
    errors = np.array([noised(histogram, 4.0, seed).auc() - histogram.auc() for seed in range(300)])
    predicted = histogram.auc_noise_std(4.0)
    assert abs(errors.mean()) < 4 * predicted / math.sqrt(300)
    assert 0.85 < errors.std() / predicted < 1.15
    assert noised(histogram, 4.0, 1).auc_noise_std(4.0) == pytest.approx(predicted, rel=0.2)
    assert histogram.auc_noise_std(0.0) == 0.0


@law
@given(st.integers(0, 10_000), st.sampled_from([1, 16, 64]), st.sampled_from([1.0, 5.0, 50.0]))
def test_metrics_of_a_noised_histogram_stay_in_range(seed: int, factor: int, std: float) -> None:
    noisy = noised(ScoreHistogram.of(*sample(2_000, 0.3, seed=10)).merged(factor), std, seed)
    assert noisy.counts.min() < 0
    if noisy.counts.sum(axis=0).min() <= 0:
        with pytest.raises(DataError, match="noise less"):
            noisy.auc()
        return
    assert 0 <= noisy.auc() <= 1
    assert 0 <= noisy.brier() <= 1
    assert 0 <= noisy.ks() <= 1
    fpr, tpr = noisy.roc()
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    for row in noisy.calibration():
        assert 0 <= row.observed_low <= row.observed <= row.observed_high <= 1
    lift = noisy.lift()
    assert all(0 <= row.bad_rate <= 1 for row in lift)
    assert sum(row.rows for row in lift) == pytest.approx(noisy.counts.sum())


def test_projection_leaves_an_exact_histogram_alone_and_is_the_nearest_one_otherwise() -> None:
    counts = np.zeros((FINEST_CELLS // 512, 2), dtype=np.int64)
    counts[:, 0] = [10, 5, 2, 3]
    counts[:, 1] = [1, -3, 4, 10]
    _, good, bad = ScoreHistogram(counts=counts).ks_curve()
    np.testing.assert_allclose(good, np.array([0, 10, 15, 17, 20]) / 20)
    # Three is owed: one each from the three positive cells, so (0, 0, 3, 9) with the same sum of 12.
    np.testing.assert_allclose(bad, np.array([0, 0, 0, 3, 12]) / 12)


# Wilson


def test_wilson_interval_known_answers() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0000, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


@pytest.mark.parametrize(("positives", "rows"), [(1, 0), (-1, 5), (6, 5), (math.nan, 5)])
def test_wilson_interval_refuses(positives: float, rows: float) -> None:
    with pytest.raises(ValueError, match="positives"):
        wilson_interval(positives, rows)


# Refusals


@pytest.mark.parametrize(
    "counts",
    [
        np.zeros((FINEST_CELLS, 2), dtype=np.int32),
        np.zeros((FINEST_CELLS, 2)),
        np.zeros((FINEST_CELLS, 3), dtype=np.int64),
        np.zeros((1000, 2), dtype=np.int64),
        np.zeros((1, 2), dtype=np.int64),
        np.zeros(FINEST_CELLS, dtype=np.int64),
    ],
)
def test_other_layouts_are_refused(counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match="counts"):
        ScoreHistogram(counts=counts)


def test_bad_input_is_refused() -> None:
    score, label = np.array([1, 2], dtype=np.int64), np.array([0, 1], dtype=np.int8)
    with pytest.raises(ValueError, match="expected int64"):
        ScoreHistogram.of(score.astype(np.float64), label)
    with pytest.raises(ValueError, match="one label per score"):
        ScoreHistogram.of(score, label[:1])
    with pytest.raises(DataError, match="labels other"):
        ScoreHistogram.of(score, label * 2)
    with pytest.raises(ValueError, match="merge both"):
        ScoreHistogram.of(score, label) + ScoreHistogram.of(score, label).merged(2)
    for factor in (0, -2, 3, 2048, 4096):
        with pytest.raises(ValueError, match="power of two"):
            ScoreHistogram.of(score, label).merged(factor)
    with pytest.raises(ValueError, match="even length"):
        ScoreHistogram.from_vector(np.zeros(5, dtype=np.int64))
    with pytest.raises(ValueError, match="groups"):
        ScoreHistogram.of(score, label).lift(0)
    with pytest.raises(ValueError, match="noise_std"):
        ScoreHistogram.of(score, label).auc_noise_std(-1.0)


@pytest.mark.parametrize("label", [0, 1])
def test_metrics_need_both_labels(label: int) -> None:
    histogram = of([(5, label), (9, label)])
    for metric in (histogram.auc, histogram.ks, histogram.roc, histogram.lift, histogram.calibration, histogram.brier):
        with pytest.raises(DataError, match="at least one of each"):
            metric()
