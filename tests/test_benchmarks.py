"""Smoke tests of the benchmarks at tiny size: what they compare is compared rightly. No times are asserted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from simulations import demo_federation
from simulations.benchmarks import kernel, main_job, secure_sum
from simulations.benchmarks.__main__ import app

TINY = kernel.Size(rows=600, features=3, bins=4)


def test_kernel_is_exact_against_the_clear_sums_and_python_paillier() -> None:
    (figures,) = kernel.measure((TINY,), repeats=1, sample_rows=12)
    assert figures.exact
    assert figures.ours.exact
    assert figures.paillier.exact
    assert figures.paillier.sample_rows == 12
    assert figures.ours.hiding_bits >= 40
    assert figures.ours.bytes_up > 2 * 8 * TINY.rows
    assert figures.ratio == pytest.approx(2 * figures.ratio_if_packed)


def test_kernel_notices_a_wrong_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "unmask", lambda answers, pads, parameters: np.zeros(TINY.sums, np.int64))
    assert not kernel.measure_ours(TINY, repeats=1).exact


def test_python_paillier_without_gmpy2_is_no_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phe.util.HAVE_GMP", False)
    with pytest.raises(ModuleNotFoundError, match="pip install gmpy2"):
        kernel.measure_paillier(TINY, sample_rows=2)


def test_paillier_is_scaled_linearly_in_rows_and_bins() -> None:
    baseline = kernel.Paillier(sample_rows=10, encryption=3.0, addition=0.5, decryption=2.0, exact=True)
    # 2 vectors x (100 encryptions + (100 x 2 - 8) additions + 8 decryptions)
    assert baseline.total(kernel.Size(rows=100, features=2, bins=4)) == 2 * (100 * 3.0 + 192 * 0.5 + 8 * 2.0)


def test_kernel_refuses_an_empty_size() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        kernel.Size(rows=0, features=3, bins=4)


def test_secure_sum_is_exact_and_smaller_than_ckks() -> None:
    ckks, *ours = secure_sum.measure(secure_sum.Size(parameters=9_000, banks=3))
    assert 0 < ckks.error < secure_sum.LARGEST_CKKS_ERROR
    assert not ckks.exact
    assert [line.name for line in ours] == [
        "values of 24 bits",
        "sums of 24 bits",
        "values of 16 bits",
        "sums of 16 bits",
    ]
    for line in ours:
        assert line.exact
        assert line.error == 0
        assert line.bytes_per_parameter < ckks.bytes_per_parameter / 4
    # at three banks 1, 2, 2 and 3 values share a coefficient
    assert ours[3].bytes_up < ours[2].bytes_up < ours[0].bytes_up


def test_secure_sum_needs_two_banks() -> None:
    with pytest.raises(ValueError, match="two banks"):
        secure_sum.Size(parameters=10, banks=1)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> main_job.Figures:
    folder = demo_federation.generate(tmp_path_factory.mktemp("bench") / "demo", seed=42, enterprises=1_000)
    told: list[str] = []
    (figures,) = main_job.measure([folder], seeds=(42,), bars={}, tell=told.append)
    assert len(told) == 1
    assert "demo, seed 42" in told[0]
    return figures


def test_main_job_is_exact_and_has_its_own_peak_memory(job: main_job.Figures) -> None:
    assert job.exact
    assert 0.5 < job.auc <= 1
    assert 0 < job.ks <= 1
    assert 0.5 < job.pooled.auc_lr <= 1
    assert job.megabytes_sent > 1
    assert job.megabytes_peak > 50
    assert job.ratio == job.seconds / job.twin_seconds


def test_bars_count_the_seeds_that_meet_them(job: main_job.Figures) -> None:
    pooled = main_job.Pooled(auc_lr=0.75, ks_lr=0.4, auc_boosting=0.77, ks_boosting=0.4)
    good = replace(job, seed=1, auc=0.76, pooled=pooled, seconds=3.0, megabytes_peak=500.0)
    bad = replace(job, seed=2, auc=0.74, pooled=pooled, seconds=5.0, megabytes_peak=500.0)
    noisy = [replace(good, epsilon=main_job.EPSILON, auc=0.755), replace(bad, epsilon=main_job.EPSILON, auc=0.70)]
    bars = {"demo": main_job.Bars(boosting=0.015, seconds=4.0, megabytes=400.0, epsilon_loss=0.01)}
    met = {verdict.bar: verdict.seeds_met for verdict in main_job.verdicts([good, bad, *noisy], bars)}
    assert met == {
        "pooled LR - AUC": 1,
        "pooled boosting - AUC": 1,
        "seconds": 1,
        "peak MB": 0,
        "AUC lost at epsilon 3": 1,
    }
    worst = {verdict.bar: verdict.worst for verdict in main_job.verdicts([good, bad, *noisy], bars)}
    assert worst["AUC lost at epsilon 3"] == pytest.approx(0.04)
    assert main_job.verdicts([good], {}) == []


def test_command_writes_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "figures" / "bench.json"
    parts = ["--only", "kernel", "--only", "secure-sum", "--only", "horizontal"]
    run = CliRunner().invoke(app, ["--quick", *parts, "--out", str(out)])
    assert run.exit_code == 0, run.output
    figures = json.loads(out.read_text())
    assert figures["quick"] is True
    assert figures["kernel"][0]["ours"]["exact"] is True
    assert [line["exact"] for line in figures["secure_sum"]] == [False, True, True, True, True]
    assert figures["horizontal"]["pieces"]["exact"] is True
    assert figures["horizontal"]["pieces"]["smaller"] > 5
    (rounds,) = figures["horizontal"]["rounds"]
    assert rounds["plain"] > 0
    assert rounds["ratio"] == rounds["secure"] / rounds["plain"]
    assert "main_job" not in figures
    assert "Secure sum" in run.output


def test_command_names_data_that_is_absent(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["--only", "main-job", "--data", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert run.output.count("skipped: no") == len(main_job.SETS)


def test_command_fails_when_a_figure_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "unmask", lambda answers, pads, parameters: np.zeros(len(pads[0]), np.int64))
    run = CliRunner().invoke(app, ["--quick", "--only", "kernel"])
    assert run.exit_code == 1
    assert "NOT EXACT" in run.output
