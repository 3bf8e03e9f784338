"""Sums of model updates: exact as in clear, unbiased rounding, overflow refused beforehand, noise as stated."""

import math
import os

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.errors import Refused
from privacy.update_sum import (
    Contribution,
    NoiseShares,
    UpdatePlan,
    choose_update,
    clip_l2,
    packed,
    quantise,
    sum_updates,
    sum_updates_in_the_clear,
    unpacked,
)

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
KEY = bytes(range(32))


def plan_of(banks: int = 3, length: int = 50, values: int = 2, counts: int = 0) -> UpdatePlan:
    return choose_update(
        banks=banks,
        length=length,
        clip=2.0,
        largest_weight=1_000,
        values_per_coefficient=values,
        counts=counts,
        largest_count=500 if counts else 0,
    )


def masks_of(plan: UpdatePlan, banks: int) -> list[UInt64]:
    drawn = [np.frombuffer(os.urandom(8 * plan.coefficients), np.uint64).copy() for _ in range(banks - 1)]
    last = np.zeros(plan.coefficients, np.uint64)
    for mask in drawn:
        last -= mask
    return [mask & np.uint64(plan.parameters.mask) for mask in [*drawn, last]]


@settings(derandomize=True, max_examples=25, deadline=None)
@given(banks=st.integers(2, 5), length=st.integers(0, 5_000), values=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_encrypted_sums_are_those_in_the_clear(banks: int, length: int, values: int, seed: int) -> None:
    plan = plan_of(banks, length, values, counts=4)
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(banks):
        update = rng.uniform(-2, 2, length)
        update[rng.random(length) < 0.2] = rng.choice([-2.0, 2.0])  # at the bound
        weight = int(rng.integers(1, 1_001))
        part = quantise(update, weight, plan, rng.bytes(32))
        parts.append(Contribution(values=part, weight=weight, counts=rng.integers(-500, 501, 4)))
    masks = masks_of(plan, banks)
    opened, clear = sum_updates(parts, masks, plan), sum_updates_in_the_clear(parts, masks, plan)
    assert np.array_equal(opened.values, clear.values)
    assert np.array_equal(opened.counts, clear.counts)
    assert opened.weight == clear.weight == sum(part.weight for part in parts)
    assert np.array_equal(opened.average(plan), clear.average(plan))


@pytest.mark.parametrize(("banks", "values"), [(2, 1), (10, 2), (10, 3), (173, 2), (173, 3), (1000, 2)])
def test_the_largest_updates_of_all_banks_do_not_overflow(banks: int, values: int) -> None:
    plan = choose_update(banks=banks, length=3, clip=1.0, largest_weight=9, values_per_coefficient=values)
    for sign in (-1, 1):
        part = Contribution(
            values=np.full(3, sign * plan.largest_value), weight=plan.largest_weight, counts=np.zeros(0, np.int64)
        )
        total = packed(part, plan) * np.uint64(banks) & np.uint64(plan.parameters.mask)
        assert unpacked(total, plan).values.tolist() == [sign * banks * plan.largest_value] * 3


def test_two_and_three_values_share_a_coefficient() -> None:
    assert [plan_of(10, 1_000, values).coefficients for values in (1, 2, 3)] == [1_001, 501, 335]


def test_rounding_is_unbiased_and_the_same_everywhere() -> None:
    plan = plan_of(length=200_000)
    wanted = 0.3 * plan.grid / 1_000  # 0.3 of a step for a bank of 1,000 rows
    rounded = quantise(np.full(200_000, wanted), 1_000, plan, KEY)
    assert set(rounded.tolist()) == {0, 1}
    assert abs(rounded.mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 200_000)
    assert np.array_equal(rounded, quantise(np.full(200_000, wanted), 1_000, plan, KEY))
    assert not np.array_equal(rounded, quantise(np.full(200_000, wanted), 1_000, plan, KEY[::-1]))
    # known answer: other machines must round alike
    assert np.flatnonzero(rounded[:32]).tolist() == [5, 8, 12, 17, 20, 29, 31]


def test_the_average_is_within_the_stated_rounding_error() -> None:
    plan = plan_of(banks=3, length=20_000)
    rng = np.random.default_rng(5)
    weights = [100, 400, 1_000]
    updates = [rng.uniform(-2, 2, 20_000) for _ in weights]
    parts = [
        Contribution(values=quantise(u, w, plan, rng.bytes(32)), weight=w, counts=np.zeros(0, np.int64))
        for u, w in zip(updates, weights, strict=True)
    ]
    error = sum_updates_in_the_clear(parts, [], plan).average(plan) - np.average(updates, axis=0, weights=weights)
    stated = plan.grid * math.sqrt(3) / (2 * sum(weights))
    assert 0.5 * stated < error.std() < stated
    assert abs(error.mean()) < 5 * stated / math.sqrt(20_000)


@pytest.mark.parametrize(
    ("update", "weight", "reason"),
    [
        (np.zeros(49), 10, "shape"),
        (np.zeros((5, 10)), 10, "shape"),
        (np.full(50, np.nan), 10, "50 of 50 values of the update are not finite"),
        (np.full(50, -np.inf), 10, "not finite"),
        (np.full(50, 2.0000001), 10, "beyond the clip 2"),
        (np.zeros(50), 0, "weight"),
        (np.zeros(50), 1_001, "weight"),
    ],
)
def test_a_bad_update_is_refused_before_encryption(update: npt.NDArray[np.float64], weight: int, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        quantise(update, weight, plan_of(), KEY)


def test_counts_and_shapes_are_checked() -> None:
    plan = plan_of(counts=2)
    good = np.zeros(50, np.int64)
    for counts in (np.array([501, 0]), np.array([0, -501])):
        with pytest.raises(Refused, match="bound 500"):
            packed(Contribution(values=good, weight=1, counts=counts), plan)
    with pytest.raises(Refused, match="the plan has"):
        packed(Contribution(values=good[1:], weight=1, counts=np.zeros(2, np.int64)), plan)


@pytest.mark.parametrize(
    ("given_settings", "reason"),
    [
        ({"banks": 1}, "at least 2 banks"),
        ({"clip": math.inf}, "finite clip"),
        ({"largest_weight": 0}, "weight of 1"),
        ({"length": 0}, "neither"),
        ({"values_per_coefficient": 4}, "1, 2 or 3"),
        ({"banks": 521, "values_per_coefficient": 3}, "they would overflow"),
        ({"largest_weight": 1 << 46}, "a coefficient has"),
        ({"noise": (1.0, 1e6)}, "they would overflow"),
        ({"noise": (1e-9, 1e-3)}, "noise shares"),
    ],
)
def test_the_chooser_refuses_beforehand(given_settings: dict[str, object], reason: str) -> None:
    defaults: dict[str, object] = {"banks": 10, "length": 100, "clip": 1.0, "largest_weight": 100}
    noise = given_settings.pop("noise", None)
    if isinstance(noise, tuple):
        given_settings = {
            "noise": NoiseShares(record_l2_clip=noise[0], noise_multiplier=noise[1], colluding=1, least_banks=5)
        }
    with pytest.raises(Refused, match=reason):
        choose_update(**(defaults | given_settings))  # type: ignore[arg-type]


def test_noise_fits_and_keeps_its_size_when_banks_collude_or_fail() -> None:
    noise = NoiseShares(record_l2_clip=1.0, noise_multiplier=1.5, colluding=2, least_banks=4)
    plan = choose_update(banks=10, length=1_000, clip=1.0, largest_weight=100, noise=noise)
    total = 1.5 * (1.0 / plan.grid + math.sqrt(1_000))
    for participants in range(4, 11):
        share = plan.share_std(participants)
        assert share * math.sqrt(participants - 2) == pytest.approx(total)
        # 12 standard deviations of all shares together and the largest values of all banks fit
        assert participants * plan.largest_value + 12 * share * math.sqrt(participants) <= plan.largest_sum
    with pytest.raises(Refused, match="3 banks share"):
        plan.share_std(3)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 300))
def test_one_record_moves_the_sum_by_the_stated_sensitivity_at_most(seed: int, length: int) -> None:
    noise = NoiseShares(record_l2_clip=0.5, noise_multiplier=1.0, colluding=1, least_banks=2)
    plan = choose_update(banks=2, length=length, clip=1.0, largest_weight=20, noise=noise)
    rng = np.random.default_rng(seed)
    records = rng.normal(size=(20, length))
    records *= 0.5 / np.linalg.norm(records, axis=1, keepdims=True)
    without = records.copy()
    without[0] = 0
    key = rng.bytes(32)
    moved = quantise(records.mean(axis=0), 20, plan, key) - quantise(without.mean(axis=0), 20, plan, key)
    assert np.linalg.norm(moved) <= plan.sensitivity
    assert np.linalg.norm(moved) >= 0.5 / plan.grid - math.sqrt(length)


def test_clip_l2_shortens_only_what_is_longer() -> None:
    assert clip_l2(np.array([3.0, 4.0]), 1.0) == pytest.approx([0.6, 0.8])
    assert clip_l2(np.array([0.3, 0.4]), 1.0).tolist() == [0.3, 0.4]
    assert np.isnan(clip_l2(np.array([np.nan]), 1.0)).all()
