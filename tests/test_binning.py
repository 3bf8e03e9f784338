"""Laws of bins, of the design and of the banks' shared bins."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import shared_bins as sb
from models.binning import (
    ColumnSpec,
    FeatureBins,
    Tower,
    assign,
    category_list,
    cells,
    fit_categorical,
    fit_column,
    fit_numeric,
    value_counts,
)
from models.errors import DataError

LAW = settings(derandomize=True, deadline=None, max_examples=60)
numbers = st.one_of(
    st.integers(-20, 20).map(float),
    st.floats(-1e6, 1e6, allow_subnormal=False),
    st.sampled_from([0.0, float("nan"), -7.0]),
)
columns = st.lists(numbers, min_size=1, max_size=200).map(lambda xs: np.array(xs, dtype=np.float64))


def local_counts(bins: FeatureBins, column: np.ndarray) -> np.ndarray:
    return np.bincount(assign(bins, column), minlength=bins.size)


@LAW
@given(columns, st.integers(2, 12), st.sampled_from([(), (-7.0,), (-7.0, 0.0)]))
def test_numeric_bins_are_a_partition(column: np.ndarray, max_bins: int, codes: tuple[float, ...]) -> None:
    bins = fit_numeric("x", *value_counts(column), max_bins, codes)
    local = assign(bins, column)
    assert local.min() >= 0
    assert local.max() < bins.size
    assert bins.ordered <= max_bins
    assert ((local == bins.size - 1) == np.isnan(column)).all()
    for i, code in enumerate(bins.codes):
        assert ((local == bins.ordered + i) == (column == code)).all()
    plain = ~np.isnan(column) & ~np.isin(column, codes)
    order = np.argsort(column[plain], kind="stable")
    assert (np.diff(local[plain][order]) >= 0).all()
    for atom in bins.atoms:
        assert len(np.unique(column[plain][local[plain] == atom])) == 1
    touched = {i for pair in bins.neighbours for i in pair}
    assert not touched & set(bins.atoms)
    assert max(touched, default=0) < bins.ordered
    assert len(bins.labels()) == bins.size == len(set(bins.labels()))
    assert FeatureBins.from_json(json.loads(json.dumps(bins.to_json()))) == bins


@LAW
@given(columns, st.integers(2, 12), st.randoms(use_true_random=False))
def test_bins_do_not_depend_on_the_order_of_rows(column: np.ndarray, max_bins: int, random: object) -> None:
    shuffled = column.tolist()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fit_numeric("x", *value_counts(column), max_bins) == fit_numeric(
        "x", *value_counts(np.array(shuffled)), max_bins
    )


def test_atoms_have_their_own_bins_and_labels() -> None:
    rng = np.random.default_rng(0)
    column = np.concatenate([np.zeros(5000), rng.lognormal(size=3000).round(3), np.full(1500, 2.0), -rng.random(900)])
    bins = fit_numeric("x", *value_counts(column), 8)
    labels = bins.labels()
    assert [labels[a] for a in bins.atoms] == ["= 0", "= 2"]
    assert local_counts(bins, column)[list(bins.atoms)].tolist() == [5000, 1500]
    atom = bins.atoms[0]
    assert (atom - 1, atom) not in bins.neighbours
    assert (atom, atom + 1) not in bins.neighbours
    assert labels[atom + 1].startswith("(0, ")
    assert labels[-1] == "missing"


def test_neighbouring_atoms_leave_no_empty_bin_between() -> None:
    column = np.repeat(np.arange(40.0), [100, 90, 80, 70, *[3] * 36])
    bins = fit_numeric("x", *value_counts(column), 10)
    assert bins.atoms == (0, 1, 2, 3)
    assert bins.labels()[:5] == ("< 1", "[1, 2)", "[2, 3)", "= 3", "(3, 10)")
    assert local_counts(bins, column)[:-1].min() > 0


def test_quantile_bins_have_equal_mass() -> None:
    column = np.random.default_rng(1).normal(size=16_000)
    counts = local_counts(fit_numeric("x", *value_counts(column), 16), column)
    assert counts[:-1].tolist() == [1000] * 16


def test_few_values_get_one_bin_each() -> None:
    column = np.array([0.0, 1, 1, 2, 5, np.nan])
    bins = fit_numeric("x", *value_counts(column), 4)
    assert local_counts(bins, column).tolist() == [1, 2, 1, 1, 1]
    assert bins.labels() == ("< 1", "[1, 2)", "[2, 5)", ">= 5", "missing")


@pytest.mark.parametrize("empty", [np.array([]), np.array([np.nan, np.nan])])
def test_a_column_without_values_still_has_bins(empty: np.ndarray) -> None:
    bins = fit_numeric("x", *value_counts(empty), 4)
    assert bins.size == 2
    assert assign(bins, np.array([3.0, np.nan])).tolist() == [0, 1]


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="2 infinite"):
        value_counts(np.array([1.0, np.inf, -np.inf]))
    bins = FeatureBins(name="x", kind="numeric", edges=(1.0,))
    with pytest.raises(DataError, match="'x': 1 infinite"):
        assign(bins, np.array([np.inf]))
    with pytest.raises(DataError, match="holds text"):
        assign(bins, np.array(["a"], dtype=object))
    one = np.array([1], dtype=np.int64)
    with pytest.raises(DataError, match="negative count"):
        fit_numeric("x", np.array([1.0]), -one, 4)
    with pytest.raises(DataError, match="ascending"):
        fit_numeric("x", np.array([2.0, 1.0]), np.array([1, 1]), 4)
    with pytest.raises(DataError, match="max_bins 1"):
        fit_numeric("x", np.array([1.0]), one, 1)
    with pytest.raises(DataError, match="upper ends"):
        fit_numeric("x", np.array([1.0]), one, 4, uppers=np.array([1.0]))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "text"},
        {"kind": "numeric", "edges": (2.0, 1.0)},
        {"kind": "numeric", "edges": (float("nan"),)},
        {"kind": "numeric", "categories": ("a",)},
        {"kind": "categorical", "edges": (1.0,)},
        {"kind": "categorical", "categories": ("a", "a")},
        {"kind": "numeric", "atoms": (3,)},
    ],
)
def test_malformed_bins_are_refused(fields: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(DataError, match="'x'"):
        FeatureBins(name="x", **fields)
    with pytest.raises(DataError, match="malformed"):
        FeatureBins.from_json({"name": "x"})


def test_categories_rare_unknown_and_missing() -> None:
    column = np.array(["b", "a", "b", None, "c", "b", "a", float("nan")], dtype=object)
    bins = fit_categorical("job", *category_list(column), 16, 2)
    assert bins.labels() == ("a", "b", "other", "missing")
    assert assign(bins, column).tolist() == [1, 0, 1, 3, 2, 1, 0, 3]
    assert bins.neighbours == ()
    assert fit_categorical("job", *category_list(column), 2, 1).categories == ("a", "b")
    assert fit_column(ColumnSpec(name="job", kind="categorical"), column, 16, 2) == bins


def tower(has_no_file: bool = True) -> Tower:
    x = FeatureBins(name="x", kind="numeric", edges=(0.0, 1.0), codes=(-7.0,))
    return Tower(features=(x, FeatureBins(name="job", kind="categorical", categories=("a",))), has_no_file=has_no_file)


def test_cells_of_a_tower() -> None:
    table = {"x": np.array([-1.0, 0.5, -7.0, np.inf]), "job": np.array(["a", "z", None, "a"], dtype=object)}
    got = cells(tower(), table, np.array([True, True, True, False]))
    assert got.tolist() == [[0, 5, -1], [1, 6, -1], [3, 7, -1], [-1, -1, 8]]
    assert tower().rows == 9
    assert tower().offsets == (0, 5)
    left, right = tower().neighbours()
    assert (left.tolist(), right.tolist()) == ([0, 1], [1, 2])
    assert Tower.from_json(json.loads(json.dumps(tower().to_json()))) == tower()


def test_cells_refuse_what_does_not_fit() -> None:
    table = {"x": np.zeros(2), "job": np.array(["a", "b"], dtype=object)}
    assert cells(tower(False), table).shape == (2, 2)
    with pytest.raises(DataError, match="without a file"):
        cells(tower(False), table, np.array([True, False]))
    with pytest.raises(DataError, match="'job' is missing"):
        cells(tower(), {"x": np.zeros(2)})
    with pytest.raises(DataError, match="lengths"):
        cells(tower(), {"x": np.zeros(2), "job": np.array(["a"], dtype=object)})
    with pytest.raises(DataError, match="listed twice"):
        Tower(features=tower().features + tower().features, has_no_file=True)


# --- shared bins -------------------------------------------------------------------------------------------------


SPECS = (
    ColumnSpec(name="amount", kind="numeric"),
    ColumnSpec(name="year", kind="numeric"),
    ColumnSpec(name="count", kind="numeric", codes=(98.0,)),
    ColumnSpec(name="job", kind="categorical", categories=("a", "b", "rare")),
)


def bank_rows(n: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(5)
    amount = np.where(rng.random(n) < 0.3, 0.0, rng.lognormal(3, 2, n) * rng.choice([-1, 1], n, p=[0.2, 0.8]))
    amount[rng.random(n) < 0.05] = np.nan
    count = rng.poisson(1.5, n).astype(float)
    count[rng.random(n) < 0.02] = 98.0
    job = np.array(["a", "b", "rare", None, "new"], dtype=object)[rng.choice(5, n, p=[0.5, 0.4, 0.002, 0.05, 0.048])]
    table = {"amount": amount, "year": rng.integers(1996, 2007, n).astype(float), "count": count, "job": job}
    return table, (rng.random(n) < 0.1).astype(np.int8)


def run_levels(tables: list[tuple[dict[str, np.ndarray], np.ndarray]], noise_std: float = 0.0) -> sb.SharedBinning:
    rng = np.random.default_rng(9)
    rows = sum(len(label) for _, label in tables)
    state = sb.SharedBinning(specs=SPECS, rows=rows, max_bins=16, least_count=20, noise_std=noise_std)
    for _ in range(sb.LEVELS):
        parts = [sb.level_counts(state, table, label) for table, label in tables]
        total = np.sum(parts, axis=0)
        state = sb.with_level(state, total + np.rint(rng.normal(size=len(total)) * noise_std).astype(np.int64))
    return state


def test_shared_bins_do_not_depend_on_how_rows_are_split() -> None:
    table, label = bank_rows(6000)
    cut = np.random.default_rng(0).integers(0, 3, len(label))
    banks = [({k: v[cut == b] for k, v in table.items()}, label[cut == b]) for b in range(3)]
    one, three = run_levels([(table, label)]), run_levels(banks)
    assert all((a == b).all() for a, b in zip(one.released, three.released, strict=True))
    assert one.positives == int(label.sum())
    tower_one, counts = sb.fit_shared(one)
    tower_three, counts_three = sb.fit_shared(three)
    assert tower_one == tower_three
    assert (counts == counts_three).all()


def test_shared_counts_are_those_of_the_final_bins() -> None:
    table, label = bank_rows(6000)
    fitted, counts = sb.fit_shared(run_levels([(table, label)]))
    expected = np.concatenate([local_counts(feature, table[feature.name]) for feature in fitted.features])
    assert counts.tolist() == expected.tolist()


def test_shared_bins_resolve_years_atoms_and_quantiles() -> None:
    table, label = bank_rows(20_000)
    amount, year, count, job = sb.fit_shared(run_levels([(table, label)]))[0].features
    assert year.edges == tuple(float(y) for y in range(1997, 2007))
    assert [amount.labels()[a] for a in amount.atoms] == ["= 0"]
    assert count.codes == (98.0,)
    assert job.categories == ("a", "b", "rare")
    own = fit_numeric("amount", *value_counts(table["amount"]), 16)
    heaviest = local_counts(amount, table["amount"])[[i for i in range(amount.ordered) if i not in amount.atoms]].max()
    own_heaviest = local_counts(own, table["amount"])[[i for i in range(own.ordered) if i not in own.atoms]].max()
    assert heaviest < 2 * own_heaviest


def test_shared_bins_withstand_noise() -> None:
    table, label = bank_rows(20_000)
    fitted, counts = sb.fit_shared(run_levels([(table, label)], noise_std=30.0))
    assert counts.min() >= 0
    for feature, offset in zip(fitted.features, fitted.offsets, strict=True):
        released, exact = counts[offset : offset + feature.size], local_counts(feature, table[feature.name])
        assert np.abs(released - exact).max() < 30 * 60  # noise of at most a few hundred merged cells
        if feature.kind == "numeric":
            assert 4 <= feature.ordered <= 16
            assert exact[: feature.ordered].max() < 20_000 * 0.45
    assert fitted.features[0].labels()[fitted.features[0].atoms[0]] == "= 0"
    assert "rare" not in fitted.features[3].categories


def test_noise_alone_makes_no_bins() -> None:
    rng = np.random.default_rng(3)
    noise = np.rint(rng.normal(size=sb.GRID) * 40.0).astype(np.int64)
    assert len(sb._significant(sb.GRID_CELLS, noise, 40.0)[0]) <= 25  # of 2051 cells, half of which are positive
    spec = ColumnSpec(name="x", kind="numeric")
    column = rng.integers(1000, 2000, 20_000).astype(float)
    state = sb.SharedBinning(specs=(spec,), rows=20_000, max_bins=16, least_count=20, noise_std=40.0)
    for _ in range(sb.LEVELS):
        exact = sb.level_counts(state, {"x": column}, np.zeros(20_000, dtype=np.int8))
        state = sb.with_level(state, exact + np.rint(rng.normal(size=len(exact)) * 40.0).astype(np.int64))
    edges = sb.fit_shared(state)[0].features[0].edges
    outside = [edge for edge in edges if not 900 <= edge <= 2100]
    assert len(outside) <= 3
    assert len(edges) - len(outside) >= 10


def test_the_third_level_resolves_values_that_agree_in_four_digits() -> None:
    values = 1.0 + np.arange(10) * 2e-5
    column = np.repeat(values, 50)
    spec = ColumnSpec(name="x", kind="numeric", codes=(-9.0, -8.0))
    column = np.concatenate([column, np.full(7, -9.0), np.full(5, -8.0), np.full(3, np.nan)])
    label = np.zeros(len(column), dtype=np.int8)
    state = sb.SharedBinning(specs=(spec,), rows=len(column), max_bins=16, least_count=20)
    for _ in range(3):
        state = sb.with_level(state, sb.level_counts(state, {"x": column}, label))
    fitted, counts = sb.fit_shared(state)
    assert counts.tolist() == [50] * 10 + [7, 5, 3]
    assert assign(fitted.features[0], values).tolist() == list(range(10))
    assert assign(fitted.features[0], np.array([-9.0, -8.0, np.nan])).tolist() == [10, 11, 12]


def test_extreme_values_fall_into_the_end_cells() -> None:
    spec = SPECS[0]
    counts = sb.grid_counts(spec, np.array([-1e300, 1e300, 0.0, -0.0, 1e-300, -1e-300, np.nan]))
    assert counts[0] == counts[sb.GRID - 1] == 1
    assert counts[sb.GRID] == 1
    assert counts.sum() == 7
    zero = np.flatnonzero(sb.GRID_CELLS[:, 0] == 0.0)[0]
    assert counts[zero] == 2
    assert sb.GRID == 2051


def test_single_values_and_end_cells_are_never_refined() -> None:
    zero = int(np.flatnonzero(sb.GRID_CELLS[:, 0] == 0.0)[0])
    counts = np.zeros(sb.GRID, dtype=np.int64)
    counts[[0, zero, sb.GRID - 1]] = 1000
    assert len(sb.heavy(counts, sb.GRID_CELLS, 1.0)) == 0
    counts[zero + 1] = 1000
    refined = sb.heavy(counts, sb.GRID_CELLS, 1.0)
    assert refined[:, 1].tolist() == [2.0**-20]
    pieces = sb.pieces(refined)
    assert len(pieces) == sb.PIECES
    assert (pieces[1:, 0] == pieces[:-1, 1]).all()
    assert (pieces[:, 0] < pieces[:, 1]).all()


def test_levels_are_refused_out_of_order() -> None:
    table, label = bank_rows(100)
    state = sb.SharedBinning(specs=SPECS, rows=100, max_bins=16, least_count=20)
    with pytest.raises(DataError, match="level 1 is not released"):
        sb.fit_shared(state)
    with pytest.raises(DataError, match="level 1 has"):
        sb.with_level(state, np.zeros(3, dtype=np.int64))
    with pytest.raises(DataError, match="'amount' is missing"):
        sb.level_counts(state, {}, label)
    done = run_levels([(table, label)])
    assert sb.level_size(done) == 0
    with pytest.raises(DataError, match="already"):
        sb.level_counts(done, table, label)
    table["year"] = np.full(100, np.inf)
    with pytest.raises(DataError, match="'year': 100 infinite"):
        sb.level_counts(state, table, label)
