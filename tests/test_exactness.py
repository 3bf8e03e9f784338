"""PROTOCOL rule 5: a federated run gives the integers of its plaintext twin, whatever the cut into banks; and the noise
that epsilon promises is really in what the banks send."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import chi2

from models.fixed_point import RESIDUAL_BITS
from models.score_histogram import ScoreHistogram
from models.scorecard import gather
from privacy.noise import discrete_gaussian
from simulations.federation_folder import locate
from simulations.run import pool
from tests.small_federation import (
    RecordedRun,
    assert_equals_twin,
    record,
    run_tapped,
    small_federation,
    small_parties,
    twin_of,
    weights_of,
)


@pytest.mark.parametrize(
    ("banks", "owners", "rounds", "epsilon"),
    [
        (1, 1, 1, None),
        (1, 2, 4, 3.0),
        (2, 3, 4, None),
        (2, 1, 1, 3.0),
        (3, 2, 1, 3.0),
        (3, 1, 4, None),
        (7, 3, 1, None),
        (7, 1, 4, 3.0),
    ],
)
def test_weights_equal_the_twins_as_integers(banks: int, owners: int, rounds: int, epsilon: float | None) -> None:
    federation = small_federation(banks=banks, owners=owners, enterprises=1200)
    parties = small_parties(federation, rounds=rounds, epsilon=epsilon)
    outcome = run_tapped(parties)
    assert_equals_twin(federation, parties, outcome)
    assert bool(parties.noise.tape) == (epsilon is not None)


def test_the_data_has_every_kind_of_column_and_rows_without_a_file() -> None:
    """What the test above promises to cover; without it a change of the generator would go unnoticed."""
    federation = small_federation()
    pooled = pool(federation)
    assert {spec.kind for spec in pooled.specs} == {"numeric", "categorical"}
    assert np.isnan(pooled.columns["turnover"]).any()
    assert (pooled.columns["overdue_days"] == -99.0).any()
    assert any(value is None for value in pooled.columns["industry"])
    for owner in pooled.owners.values():
        assert (owner.index == -1).any()
        assert (owner.index >= 0).any()
        assert len(np.unique(owner.index)) - 1 < len(owner.columns[owner.specs[0].name]), "owner knows others' firms"


def test_the_release_is_the_histogram_of_the_exact_scores(exact_run: RecordedRun) -> None:
    """Held-out rows are scored exactly: the pooled histogram of the twin's scores is the one released."""
    run, twin = exact_run, twin_of(exact_run.federation, exact_run.parties, exact_run.outcome)
    held = [bank.held_out for bank in run.federation.banks]
    banks = list(zip(run.federation.banks, held, strict=True))
    ids = np.concatenate([bank.ids[rows] for bank, rows in banks])
    columns = {
        column.name: np.concatenate([bank.columns[column.name][rows] for bank, rows in banks])
        for column in run.federation.columns["bank"]
    }
    score = twin.score(columns, {o.name: (o.columns, locate(ids, o.ids)) for o in run.federation.owners})
    label = np.concatenate([bank.label[rows] for bank, rows in banks])
    assert list(run.outcome.histogram) == ScoreHistogram.of(score, label).to_vector().tolist()


def test_the_cut_into_banks_does_not_matter() -> None:
    """Same rows as 2 and as 5 banks, without noise: the same integers everywhere."""
    weights = []
    for banks in (2, 5):
        federation = small_federation(banks=banks, owners=2)
        parties = small_parties(federation, rounds=2, forward_noise=0.0)
        run_tapped(parties)
        found = weights_of(parties)
        assert len({tuple(found[bank]) for bank in parties.banks}) == 1
        weights.append((found["bank1"], *(found[owner] for owner in parties.owners)))
    assert weights[0] == weights[1]


# --- noise on the wire -----------------------------------------------------------------------------------------------


def variance_fits(samples: npt.NDArray[np.float64], std: float, error: float = 1e-9) -> bool:
    """Whether the mean square of zero-mean Gaussian samples is that of `std`, two-sided chi-square test at `error`."""
    statistic = float(np.sum(samples**2)) / std**2
    low, high = chi2.ppf([error / 2, 1 - error / 2], len(samples))
    return bool(low <= statistic <= high)


@pytest.fixture(scope="module")
def noisy_run() -> RecordedRun:
    """Many bins and rounds: many draws of the banks' noise in one run."""
    federation = small_federation(banks=3, owners=3)
    return record(federation, small_parties(federation, rounds=8, epsilon=3.0, max_bins=16))


def noise_on_the_wire(run: RecordedRun) -> npt.NDArray[np.float64]:
    """Unmasked S minus the exact S, all owners and rounds."""
    differences = []
    for owner in run.parties.owners:
        for number, seen in enumerate(run.of("S", owner), start=1):
            exact = np.zeros(len(seen.content), np.int64)
            for bank in run.parties.banks:
                [residuals] = run.of("v", bank, f"r{number}.residual")
                [cells] = [s.content for s in run.of("cells", owner, seen.step) if s.sender == bank]
                exact += gather(cells, residuals.content, len(exact))
            differences.append(seen.content - exact)
    return np.concatenate(differences).astype(np.float64)


def test_unmasked_sums_carry_the_planned_noise(noisy_run: RecordedRun) -> None:
    roster = noisy_run.outcome.roster
    assert roster.plan is not None
    noise = noise_on_the_wire(noisy_run)
    assert len(noise) > 400
    planned = roster.plan.stds["sums"] * (1 << RESIDUAL_BITS)
    total = roster.total_std(planned, 3)
    assert total > planned, "colluding banks subtract their shares, so all shares make more than the plan"
    assert variance_fits(noise, total)
    # the check can fail: it tells half and double the variance apart with these many draws
    assert not variance_fits(noise, total * 2**0.5)
    assert not variance_fits(noise, total / 2**0.5)


def test_after_the_tolerated_colluders_subtract_their_shares_the_planned_noise_is_left(noisy_run: RecordedRun) -> None:
    """n - 2 of 3 banks, so one, subtracts what it drew itself."""
    roster = noisy_run.outcome.roster
    assert roster.plan is not None
    assert noisy_run.parties.contract.colluding(3) == 1
    own = [
        noisy_run.parties.noise.tape[f"sum/r{number}.owner.{owner}/0/bank1"]
        for owner in noisy_run.parties.owners
        for number in range(1, 9)
    ]
    left = noise_on_the_wire(noisy_run) - np.concatenate(own)
    assert variance_fits(left, roster.plan.stds["sums"] * (1 << RESIDUAL_BITS))


def test_secure_sums_carry_the_planned_noise(noisy_run: RecordedRun) -> None:
    """Opened totals are the exact sums plus the tape (the twin proves it, bit for bit); so the tape is the noise."""
    assert_equals_twin(noisy_run.federation, noisy_run.parties, noisy_run.outcome)
    roster, tape = noisy_run.outcome.roster, noisy_run.parties.noise.tape
    assert roster.plan is not None
    scaled: dict[str, list[npt.NDArray[np.float64]]] = {}
    for tag, share in tape.items():
        release = tag.split("/")[1]
        match release.split("."):
            case ["bins", _, _]:
                std, kind = roster.std("bins"), "bins"
            case ["evaluate", _]:
                std, kind = roster.std("histogram"), "histogram"
            case [_, "residual", _]:
                std, kind = roster.std("sums") * (1 << RESIDUAL_BITS), "own sums"
            case [number, "search", _, part]:
                name = "gradient" if part == "0" else "curvature"
                std, kind = roster.std(f"search.{number[1:]}.{name}"), f"search {name}"
            case [_, "owner", _]:
                continue
            case _:
                raise AssertionError(f"unknown release {release}")
        scaled.setdefault(kind, []).append(share / roster.share(std, 3))
    assert set(scaled) == {"bins", "histogram", "own sums", "search gradient", "search curvature"}
    for kind, shares in scaled.items():
        assert variance_fits(np.concatenate(shares), 1.0), kind


def test_shares_of_different_banks_and_steps_are_different_draws(noisy_run: RecordedRun) -> None:
    tape = noisy_run.parties.noise.tape
    drawn = [share.tobytes() for share in tape.values() if len(share) >= 8]
    assert len(drawn) > 50
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("factor", [0.5**0.5, 2**0.5])
def test_the_variance_test_rejects_half_and_double_the_variance(factor: float) -> None:
    std = 1000.0
    assert variance_fits(discrete_gaussian(std, 600).astype(np.float64), std)
    assert not variance_fits(discrete_gaussian(std * factor, 600).astype(np.float64), std)


def test_without_epsilon_nothing_is_added(exact_run: RecordedRun) -> None:
    """The counterpart: the same measurement on a run without epsilon gives exactly zero."""
    assert not noise_on_the_wire(exact_run).any()
    assert exact_run.parties.noise.tape == {}
