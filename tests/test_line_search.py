"""Laws of the line search: bounds, partition, and that it does what Newton's method on the rows would do."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import line_search as ls
from models.errors import DataError
from models.fixed_point import Int8, Int64, logit_of_rate, round_shift

LAW = settings(derandomize=True, deadline=None, max_examples=50)
EDGE = ls.CLIP * 128


@LAW
@given(st.integers(-(2**40), 2**40), st.integers(1, 2**40))
def test_normalise_rounds_and_clips(d: int, scale: int) -> None:
    got = int(ls.normalise(np.array([d]), scale)[0])
    assert got == max(-EDGE, min(EDGE, math.floor(Fraction(128 * d, scale) + Fraction(1, 2))))


def case(n: int, rate: float, seed: int, k: int = 3) -> tuple[list[Int64], list[int], Int64, Int8]:
    """Directions of very different sizes, some skewed, and labels that follow them."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(k - 1, n))
    base[0] += np.where(rng.random(n) < 0.03, 6.0, 0.0)  # a tail, as rare bins make it
    z = math.log(rate / (1 - rate)) + base[0] + 0.5 * base[-1]
    label = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(np.int8)
    sizes = [2.0 ** (16 + 3 - 2 * i) for i in range(k - 1)]
    directions = [np.rint(b * s).astype(np.int64) for b, s in zip(base, sizes, strict=True)]
    scales = [int(np.sqrt((d.astype(float) ** 2).mean())) + 1 for d in directions]
    score = np.full(n, logit_of_rate(int(label.sum()), n), dtype=np.int64)
    return directions, scales, score, label


def loss(score: Int64, label: Int8) -> float:
    z = score / 2**16
    return float((np.logaddexp(0, z) - label * z).mean())


def search(
    directions: list[Int64],
    scales: list[int],
    score: Int64,
    label: Int8,
    steps: int,
    noise: tuple = (0.0, 0.0),
    seed: int = 0,
):  # type: ignore[no-untyped-def,type-arg]
    rng = np.random.default_rng(seed)
    rows = ls.design(directions, scales)
    k = rows.shape[1]
    a = (0.0,) * k
    trail = []
    for _ in range(steps):
        candidate = ls.advance(score, directions, ls.alphas(a, scales))
        trail.append(loss(candidate, label))
        total = ls.moments(rows, candidate, label)
        drawn = np.concatenate([rng.normal(size=k) * noise[0], rng.normal(size=len(total) - k) * noise[1]])
        a = ls.update(a, total + np.rint(drawn).astype(np.int64), len(label), *noise)
    trail.append(loss(ls.advance(score, directions, ls.alphas(a, scales)), label))
    return a, trail


@pytest.mark.parametrize("rate", [0.5, 0.2, 0.02, 0.003])
def test_every_inner_step_lowers_the_loss_also_on_rare_defaults(rate: float) -> None:
    for seed in range(3):
        directions, scales, score, label = case(20_000, rate, seed)
        _, trail = search(directions, scales, score, label, ls.INNER_STEPS)
        assert all(after < before for before, after in pairwise(trail))
        _, best = search(directions, scales, score, label, 60)
        gained = (trail[0] - trail[-1]) / (trail[0] - best[-1])
        assert gained > 0.9, (rate, seed, gained)


def test_it_converges_to_the_optimum_of_the_rows() -> None:
    directions, scales, score, label = case(20_000, 0.2, 7)
    directions[0] = np.clip(directions[0], -3 * scales[0], 3 * scales[0])  # without a tail clipping changes nothing
    a, _ = search(directions, scales, score, label, 60)
    x = np.column_stack([*(d / s for d, s in zip(directions, scales, strict=True)), np.ones(len(label))])
    best = np.zeros(3)
    for _ in range(50):
        p = 1 / (1 + np.exp(-(score / 2**16 + x @ best)))
        best += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (label - p))
    assert np.abs(np.array(a) - best).max() < 0.02


def test_a_constant_direction_and_a_zero_direction_do_no_harm() -> None:
    directions, scales, score, label = case(5000, 0.1, 1)
    for extra, scale in (
        (np.full(5000, 2**17), 2**17 + 1),
        (np.zeros(5000, dtype=np.int64), 1),
        (directions[0], scales[0]),
    ):
        _, trail = search([*directions, extra], [*scales, scale], score, label, ls.INNER_STEPS)
        assert all(after < before for before, after in pairwise(trail))


def test_large_noise_shortens_the_step_instead_of_breaking_it() -> None:
    directions, scales, score, label = case(20_000, 0.02, 3)
    gradient, curvature = (100 * s for s in ls.sensitivities(3))
    for seed in range(5):
        _, trail = search(directions, scales, score, label, ls.INNER_STEPS, (gradient, curvature), seed)
        assert trail[-1] < trail[0] * 1.02
    a, _ = search(directions, scales, score, label, ls.INNER_STEPS, (gradient * 1e4, curvature * 1e4), 1)
    assert max(abs(x) for x in a) < 8.0


@LAW
@given(st.integers(0, 10**6), st.integers(0, 400))
def test_moments_add_up_over_any_partition_and_are_those_of_the_rows(seed: int, cut: int) -> None:
    directions, scales, score, label = case(400, 0.3, seed)
    rows = ls.design(directions, scales)
    whole = ls.moments(rows, score, label)
    parts = ls.moments(rows[:cut], score[:cut], label[:cut]) + ls.moments(rows[cut:], score[cut:], label[cut:])
    assert (whole == parts).all()
    x, p = rows / 128, 1 / (1 + np.exp(-score / 2**16))
    gradient = x.T @ (label - p)
    assert np.abs(whole[:3] / 2**19 - gradient).max() <= 400 * ls.CLIP * 2**-11
    hessian = (x * (p * (1 - p))[:, None]).T @ x
    assert np.abs(whole[3:] / 2**22 - hessian[np.triu_indices(3)]).max() <= 400 * ls.CLIP**2 * 2**-8


@LAW
@given(st.integers(2, 4), st.integers(-(2**20), 2**20), st.integers(0, 1), st.data())
def test_sensitivities_bound_every_row(k: int, z: int, y: int, data: st.DataObject) -> None:
    x = data.draw(st.lists(st.integers(-EDGE, EDGE), min_size=k - 1, max_size=k - 1))
    got = ls.moments(np.array([[*x, 128]]), np.array([z]), np.array([y], dtype=np.int8)).astype(float)
    gradient, curvature = ls.sensitivities(k)
    assert np.linalg.norm(got[:k]) <= gradient
    assert np.linalg.norm(got[k:]) <= curvature


def test_sensitivities_are_attained_and_sums_fit_46_bits() -> None:
    for k in (2, 3, 4):
        row = np.array([[*[EDGE] * (k - 1), 128]])
        gradient, curvature = ls.sensitivities(k)
        hit = ls.moments(row, np.array([-(2**21)]), np.array([1], dtype=np.int8)).astype(float)
        assert np.linalg.norm(hit[:k]) == pytest.approx(gradient)
        hit_curvature = ls.moments(row, np.array([0]), np.array([1], dtype=np.int8))
        assert np.linalg.norm(hit_curvature[k:].astype(float)) == pytest.approx(curvature)
        assert max(np.abs(hit).max(), np.abs(hit_curvature).max()) * ls.ROWS_LIMIT < 2**46


def test_the_score_advances_by_rounded_step_sizes_and_unclipped_directions() -> None:
    directions, scales, score, _ = case(300, 0.3, 2)
    steps = ls.alphas((0.7, -0.2, 0.1), scales)
    expected = score + round_shift(directions[0] * steps[0], 24) + round_shift(directions[1] * steps[1], 24) + steps[2]
    assert (ls.advance(score, directions, steps) == expected).all()
    assert steps[2] == round(0.1 * 2**16)
    assert steps[0] == round(0.7 * 2**40 / scales[0])
    assert (ls.total_step(directions, steps) == expected - score - steps[2]).all()


@LAW
@given(st.lists(st.integers(1, 2**30), min_size=1, max_size=5))
def test_scales(spreads: list[int]) -> None:
    assert ls.owner_scale(spreads) == max(1, math.isqrt(2 * sum(spreads) ** 2))
    assert ls.owner_scale(spreads, 0.0) == sum(spreads)
    assert abs(ls.owner_scale(spreads, 2.0) - math.sqrt(5) * sum(spreads)) <= 1 + 1e-6 * sum(spreads)
    assert ls.previous_scale((2**24, -(2**23), 99), (10, 20)) == 20
    assert ls.previous_scale((0, 0, 99), (10, 20)) == 1


def test_update_has_the_published_bits() -> None:
    total = np.array([12345678, -987654321, 5555555, 10**9, 2 * 10**8, -(10**7), 3 * 10**9, 10**6, 4 * 10**8])
    a = ls.update((0.25, -0.5, 0.125), total, 10_000, 1000.0, 2000.0)
    assert [x.hex() for x in a] == ["0x1.6bc7d7c919ce7p-2", "-0x1.e316238442296p-1", "0x1.2d550516986fcp-3"]


def test_malformed_input_is_refused() -> None:
    zeros = np.zeros(9, dtype=np.int64)
    with pytest.raises(DataError, match="scale 0"):
        ls.normalise(zeros, 0)
    with pytest.raises(DataError, match="exceeds 3 scales"):
        ls.moments(np.full((1, 2), EDGE + 1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int8))
    with pytest.raises(DataError, match="exceed 1048576"):
        ls.moments(np.zeros((2**20 + 1, 1), dtype=np.int64), zeros, np.zeros(9, dtype=np.int8))
    with pytest.raises(DataError, match="moments for 2"):
        ls.update((0.0, 0.0), zeros, 5)
    with pytest.raises(DataError, match="rows_total"):
        ls.update((0.0, 0.0, 0.0), zeros, 2**20 + 1)
    with pytest.raises(DataError, match="diverged"):
        ls.alphas((0.0, 65.0), (1,))
    with pytest.raises(DataError, match="coordinates"):
        ls.alphas((0.0, 0.0), (1, 1))
    with pytest.raises(DataError, match="step sizes"):
        ls.advance(zeros, [zeros], (1,))
    with pytest.raises(DataError, match="one scale"):
        ls.design([zeros], [1, 2])
    with pytest.raises(DataError, match="at least one direction"):
        ls.sensitivities(1)
