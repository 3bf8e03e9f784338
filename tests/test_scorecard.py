"""Laws of the tower: cross-tabs, the factor, directions and steps."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import cholesky
from models import scorecard as sc
from models.binning import FeatureBins, Tower
from models.errors import DataError

LAW = settings(derandomize=True, deadline=None, max_examples=50)
PENALTY = sc.Penalty(ridge=2.0, smoothness=20.0)


def tower(sizes: tuple[int, ...] = (5, 3), has_no_file: bool = True) -> Tower:
    """Numeric features with the given numbers of bins (the last of each is "missing")."""
    features = tuple(
        FeatureBins(name=f"x{i}", kind="numeric", edges=tuple(float(e) for e in range(size - 2)))
        for i, size in enumerate(sizes)
    )
    return Tower(features=features, has_no_file=has_no_file)


def random_cells(t: Tower, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, f.size, n) + o for f, o in zip(t.features, t.offsets, strict=True)]
    cells = np.column_stack([*columns, np.full(n, -1)]).astype(np.int32)
    unknown = rng.random(n) < 0.2
    cells[unknown] = -1
    cells[unknown, -1] = t.rows - 1
    return cells


def dense(cells: np.ndarray, bins: int) -> np.ndarray:
    a = np.zeros((bins, len(cells)), dtype=np.int64)
    for i, row in enumerate(cells):
        for r in row:
            if r >= 0:
                a[r, i] += 1
    return a


@LAW
@given(st.integers(0, 10**6), st.integers(0, 60), st.integers(0, 60))
def test_sums_over_rows_are_those_of_the_dense_design_and_add_up(seed: int, n: int, cut: int) -> None:
    t = tower()
    cells = random_cells(t, n, seed)
    a = dense(cells, t.rows)
    values = np.random.default_rng(seed).integers(-(2**19), 2**19, n)
    cross = sc.cross_tab(cells, t.rows)
    assert (cross == a @ a.T).all()
    assert (sc.cross_tab(cells[:cut], t.rows) + sc.cross_tab(cells[cut:], t.rows) == cross).all()
    assert (sc.gather(cells, values, t.rows) == a @ values).all()
    assert (sc.bin_counts(cells, t.rows) == np.diag(cross)).all()
    assert (sc.from_upper(sc.upper(cross), t.rows) == cross).all()
    weights = np.random.default_rng(seed).integers(-(2**26), 2**26, t.rows)
    assert (sc.apply(cells, weights) == a.T @ weights).all()


@LAW
@given(st.integers(0, 10**6), st.integers(1, 200))
def test_spread_is_the_root_mean_square_and_the_bound_bounds_it(seed: int, n: int) -> None:
    t = tower()
    cells = random_cells(t, n, seed)
    d = np.random.default_rng(seed).integers(-(2**20), 2**20, t.rows)
    exact = np.sqrt((sc.apply(cells, d).astype(float) ** 2).mean())
    got = sc.spread(sc.cross_tab(cells, t.rows), d, n)
    assert exact - 1e-3 <= got <= exact + 1.001
    assert sc.spread_bound(t, sc.bin_counts(cells, t.rows), d, n) >= exact
    assert sc.spread(sc.cross_tab(cells, t.rows), np.zeros_like(d), n) == 1


def spd(r: int, seed: int) -> np.ndarray:
    """A positive definite matrix of integers: the same on every machine."""
    i, j = np.meshgrid(np.arange(r), np.arange(r + 3), indexing="ij")
    m = ((i + seed) * (j + 2) * 7919 + 31 * i * i + i * j * j) % 19 - 9
    return (m @ m.T + np.eye(r, dtype=np.int64)).astype(np.float64)


@pytest.mark.parametrize("r", [1, 7, 95, 96, 97, 200])
def test_factor_and_solve_agree_with_lapack(r: int) -> None:
    a = spd(r, r)
    lower = cholesky.factor(a)
    assert np.allclose(lower, np.linalg.cholesky(a), rtol=1e-9, atol=1e-9)
    b = np.arange(r, dtype=np.float64)
    assert np.allclose(a @ cholesky.solve(lower, b), b, atol=1e-5)


def test_factor_has_the_published_bits_for_any_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    a = spd(130, 3)
    digests = set()
    for tile in (96, 1, 17, 500):
        monkeypatch.setattr(cholesky, "_TILE", tile)
        lower = cholesky.factor(a)
        x = cholesky.solve(lower, np.arange(130, dtype=np.float64))
        digests.add(hashlib.sha256(lower.astype("<f8").tobytes() + x.astype("<f8").tobytes()).hexdigest())
    assert digests == {"538ee3ad89988cfa5143969a902f4095b2374bddb4124ffbed43a2bd3a9a5a89"}


def test_factor_refuses_what_is_not_positive_definite() -> None:
    with pytest.raises(DataError, match="pivot 1 is"):
        cholesky.factor(np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(DataError, match="pivot 0 is nan"):
        cholesky.factor(np.array([[np.nan]]))
    with pytest.raises(DataError, match="not square"):
        cholesky.factor(np.zeros((2, 3)))
    with pytest.raises(DataError, match="right-hand side"):
        cholesky.solve(np.eye(2), np.ones(3))


def test_direction_solves_the_penalised_normal_equations() -> None:
    t = tower((6, 4))
    cells = random_cells(t, 500, 1)
    cross = sc.cross_tab(cells, t.rows)
    rng = np.random.default_rng(2)
    gradient, weights = rng.integers(-(2**24), 2**24, t.rows), rng.integers(-(2**16), 2**16, t.rows)
    lower = sc.preconditioner(cross, t, Fraction(1, 5), PENALTY, sum_noise_std=3.0)
    got = sc.direction(lower, gradient, weights, t, PENALTY) / 2**16
    penalty = np.eye(t.rows) * PENALTY.ridge
    for i, j in [(0, 1), (1, 2), (2, 3), (3, 4), (6, 7), (7, 8)]:  # ordered bins of the two features, never "missing"
        penalty[[i, j], [i, j]] += PENALTY.smoothness
        penalty[i, j] -= PENALTY.smoothness
        penalty[j, i] -= PENALTY.smoothness
    right = gradient / 2**19 - penalty @ (weights / 2**16)
    smooth = (penalty - np.eye(t.rows) * PENALTY.ridge) * (1 + sc.NOISE_SMOOTHNESS * 3.0 / PENALTY.smoothness)
    ridge = np.eye(t.rows) * (PENALTY.ridge + 3.0)
    expected = np.linalg.solve(0.16 * cross + smooth + ridge, right)
    assert np.abs(got - expected).max() <= 2**-16


def test_directions_stay_in_their_bound() -> None:
    t = tower()
    lower = sc.preconditioner(np.zeros((t.rows, t.rows), dtype=np.int64), t, 0.5, sc.Penalty(ridge=1.0, smoothness=0.0))
    gradient = np.zeros(t.rows, dtype=np.int64)
    gradient[0] = 1024 << 19
    zeros = np.zeros(t.rows, dtype=np.int64)
    assert sc.direction(lower, gradient, zeros, t, sc.Penalty(ridge=1.0, smoothness=0.0))[0] == sc.DIRECTION_LIMIT
    gradient[0] += 1 << 19
    with pytest.raises(DataError, match="exceeds 1024 logits"):
        sc.direction(lower, gradient, zeros, t, sc.Penalty(ridge=1.0, smoothness=0.0))


def test_diagonal_blocks_take_noisy_counts() -> None:
    t = tower((2,), has_no_file=False)
    assert sc.diagonal_blocks(t, np.array([5, -3])).tolist() == [[5, 0], [0, 0]]
    with pytest.raises(DataError, match="bin counts"):
        sc.diagonal_blocks(t, np.array([5]))


@LAW
@given(
    st.lists(st.integers(-(2**26), 2**26), min_size=1, max_size=5),
    st.integers(-(2**26), 2**26),
    st.integers(-(2**26), 2**26),
)
def test_steps_are_rounded_products(d: list[int], alpha: int, alpha_previous: int) -> None:
    direction, previous = np.array(d), np.array(d[::-1])
    weights, step = sc.take_step(np.ones(len(d), dtype=np.int64), direction, previous, alpha, alpha_previous)
    exact = [(alpha * a + alpha_previous * b) / 2**24 for a, b in zip(d, d[::-1], strict=True)]
    assert np.abs(step - np.array(exact)).max() <= 1.0 + 1e-3
    assert (weights == step + 1).all()


def test_steps_refuse_to_overflow() -> None:
    with pytest.raises(DataError, match="overflows"):
        sc.scaled(np.array([2**30]), 2**32)
    assert sc.scaled(np.array([0]), 2**70).tolist() == [0]


def test_malformed_input_is_refused() -> None:
    t = tower()
    cross = np.eye(t.rows, dtype=np.int64)
    for rate in (0.0, 1.0, float("nan")):
        with pytest.raises(DataError, match="base rate"):
            sc.preconditioner(cross, t, rate, PENALTY)
    with pytest.raises(DataError, match="cross-tab of shape"):
        sc.preconditioner(cross[:2, :2], t, 0.5, PENALTY)
    with pytest.raises(DataError, match="must not be negative"):
        sc.preconditioner(cross, t, 0.5, PENALTY, sum_noise_std=-1.0)
    with pytest.raises(DataError, match="outside -1"):
        sc.cross_tab(np.array([[t.rows]], dtype=np.int32), t.rows)
    with pytest.raises(DataError, match="outside -1"):
        sc.apply(np.array([[t.rows]], dtype=np.int32), np.zeros(t.rows, dtype=np.int64))
    with pytest.raises(DataError, match="2\\*\\*53"):
        sc.gather(np.zeros((2, 1), dtype=np.int32), np.array([2**52, 0]), 1)
    with pytest.raises(DataError, match="upper triangle"):
        sc.from_upper(np.zeros(4, dtype=np.int64), 2)
    with pytest.raises(DataError, match="ridge"):
        sc.Penalty(ridge=0.0, smoothness=1.0)
    with pytest.raises(DataError, match="rounds"):
        sc.ScorecardSettings(rounds=0)
    with pytest.raises(DataError, match="smoothness"):
        sc.ScorecardSettings(smoothness=-1.0)
    with pytest.raises(DataError, match="round 3"):
        sc.NoiseStds(search=((1.0, 1.0), (1.0, 1.0))).search_of(3)
    assert sc.NoiseStds().search_of(3) == (0.0, 0.0)
