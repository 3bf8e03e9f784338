"""Horizontal training as a whole: exactness, personal layers, early stopping, consent, what leaves, the command."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message
from typer.testing import CliRunner

from fl_clients.data import BankData
from fl_clients.horizontal_training import (
    HISTOGRAM,
    Best,
    TrainingPlan,
    horizontal_app,
    tuned,
    validation_auc,
    weight,
)
from fl_server.horizontal_report import MODELS, render
from fl_server.memory_grid import MemoryGrid
from fl_server.secure_strategy import RoundStoppedError, SecureStrategy
from models.errors import DataError
from models.score_histogram import ScoreHistogram
from models.standardising import PASSES
from privacy.errors import Refused
from simulations import cli, demo_federation
from simulations.federation_folder import Federation, load
from simulations.horizontal import (
    HorizontalRun,
    Judged,
    bank_data,
    is_exact,
    make_parties,
    make_plan,
    run_encrypted,
    run_horizontal,
)
from simulations.horizontal_twin import held_out_scores, replay
from tests.small_federation import small_federation

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def federation() -> Federation:
    return small_federation(banks=3, owners=1, enterprises=900)


@pytest.fixture(scope="module")
def finished(federation: Federation) -> HorizontalRun:
    return run_horizontal(federation, make_plan(federation, net="mlp", rounds=5, learning_rate=0.01))


def test_the_encrypted_run_is_the_twin_and_near_the_float_run(finished: HorizontalRun) -> None:
    result = finished.result
    assert result["exact"] is True
    auc = result["auc"]
    assert auc["federated"] == auc["rounded_twin"]
    assert abs(auc["federated"] - auc["float"]) < 0.005
    assert auc["federated"] > 0.6
    assert set(auc) == {"federated", "rounded_twin", "float", "alone", "pooled"}
    assert [row["round"] for row in result["by_round"]] == [1, 2, 3, 4, 5]
    best = result["by_round"][result["best_round"] - 1]
    assert best["validation_auc"] == max(row["validation_auc"] for row in result["by_round"])
    # the summed histogram has the AUC of all rows up to its cells
    assert abs(best["held_out_auc"] - auc["federated"]) < 0.005
    assert set(finished.files) == {"result.json", "report.html", "terms.json", "plan.json", "models/shared.json"}


@pytest.mark.parametrize(
    "chosen",
    [
        {"net": "mlp", "strategy": "fedadam"},
        {"net": "logistic", "strategy": "fedyogi"},
        {"net": "resnet", "strategy": "fedprox", "personalised": True},
    ],
    ids=lambda chosen: chosen["strategy"],
)
def test_every_strategy_is_exact_with_the_sums_of_every_round(federation: Federation, chosen: dict[str, Any]) -> None:
    plan = make_plan(federation, rounds=2, **chosen)
    data = bank_data(federation)
    parties = make_parties(plan, data)
    best, counts, _ = run_encrypted(plan, parties, data)
    twin = replay(plan, parties.terms, data, rounded=True)
    assert is_exact(best, counts, twin)
    start, own = plan.initial()
    name = next(iter(best))
    assert not np.array_equal(best[name].shared, start), "something was learned"
    # what the flag is for: one bit in one bank's parameters
    bent = best[name].shared.copy()
    bent[0] = np.nextafter(bent[0], np.float32(9))
    assert not is_exact(best | {name: replace(best[name], shared=bent)}, counts, twin)
    owns = [found.own for found in best.values()]
    if plan.personalised:
        assert parties.terms.parameters == len(start)
        assert len(owns[0]) == len(own) > 0
        assert not np.array_equal(owns[0], owns[1])
    else:
        assert all(len(part) == 0 for part in owns)


def test_the_float_run_does_not_pass_for_the_rounded_one(federation: Federation) -> None:
    plan = make_plan(federation, net="logistic", rounds=2)
    data = bank_data(federation)
    parties = make_parties(plan, data)
    best, counts, _ = run_encrypted(plan, parties, data)
    assert not is_exact(best, counts, replay(plan, parties.terms, data, rounded=False))


class Listening(MemoryGrid):
    """Keeps every reply."""

    replies: list[Message]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        found = list(super().send_and_receive(messages, timeout=timeout))
        self.replies = [*getattr(self, "replies", []), *found]
        return found


def test_nothing_leaves_a_bank_but_signed_answers_and_ciphertexts(federation: Federation) -> None:
    plan = make_plan(federation, net="mlp", rounds=1, personalised=True)
    data = bank_data(federation)
    parties = make_parties(plan, data)
    found: dict[str, Best] = {}
    app = horizontal_app(
        parties.terms, plan, data.__getitem__, lambda name, best, _: found.update({name: best}), parties.bank_of
    )
    grid = Listening(app, parties.nodes())
    shared, _ = plan.initial()
    SecureStrategy(terms=parties.terms, identity=parties.coordinator, evaluate=True).start(
        grid=grid, initial_arrays=ArrayRecord({"vector": Array(shared)}), num_rounds=plan.all_rounds
    )
    assert len(grid.replies) == 3 * (3 + 2 * plan.all_rounds + 2) - 2  # the common key is made by one bank
    for reply in grid.replies:
        assert set(reply.content) <= {"xinyi", "payload", "metrics"}
        assert not reply.content.metric_records.get("metrics")
    sent = b"".join(reply.content.array_records["payload"]["bytes"].data for reply in grid.replies)
    assert set(found) == set(data)
    for best in found.values():
        assert len(best.own)
        assert best.own.tobytes()[:16] not in sent
        assert best.shared.tobytes()[:16] not in sent


def test_terms_for_another_plan_are_refused(federation: Federation) -> None:
    plan = make_plan(federation, net="mlp", rounds=1)
    data = bank_data(federation)
    terms = make_parties(plan, data).terms
    other = make_plan(federation, net="mlp", rounds=2)
    with pytest.raises(Refused, match="digest of this training plan"):
        horizontal_app(terms, other, data.__getitem__, lambda *_: None)


def test_banks_stop_by_themselves_in_the_same_round(federation: Federation) -> None:
    plan = make_plan(federation, net="mlp", rounds=8, patience=1, learning_rate=0.1)
    data = bank_data(federation)
    parties = make_parties(plan, data)
    best, counts, _ = run_encrypted(plan, parties, data)
    assert len({found.round_number for found in best.values()}) == 1
    round_number = next(iter(best.values())).round_number
    assert round_number < plan.all_rounds - 1
    opened = counts[next(iter(counts))]
    stopped = opened[f"evaluate.{round_number + 1}"]
    assert not np.array_equal(opened[f"evaluate.{round_number}"], stopped)
    for number in range(round_number + 2, plan.all_rounds + 1):
        assert np.array_equal(opened[f"evaluate.{number}"], stopped), "nobody trains after the stop"


def histogram_counts(auc_is_high: bool) -> np.ndarray:
    score = np.array([0, 65536], np.int64)
    label = np.array([0, 1] if auc_is_high else [1, 0], np.int8)
    return np.concatenate([ScoreHistogram.of(score, label).to_vector(), np.zeros(HISTOGRAM, np.int64)])


def test_the_best_round_is_the_first_with_the_highest_validation_auc() -> None:
    a, b, none = (np.full(3, value, np.float32) for value in (1, 2, 0))
    best = Best(shared=none, own=none)
    assert validation_auc(np.zeros(2 * HISTOGRAM, np.int64)) == -1.0
    best = best.after(3, histogram_counts(False), a, none)
    assert (best.auc, best.round_number) == (0.0, 3)
    best = best.after(4, histogram_counts(True), b, none)
    assert best.after(5, histogram_counts(True), a, none) is best
    assert np.array_equal(best.shared, b)
    assert [best.is_over(number, 2) for number in (4, 5, 6)] == [False, False, True]
    assert not best.is_over(PASSES, 1)


def test_a_bank_trains_on_by_itself_only_as_far_as_its_own_validation_rows_gain(federation: Federation) -> None:
    plan = make_plan(federation, net="mlp", rounds=1, personalised=True)
    run = replay(plan, make_parties(plan, bank_data(federation)).terms, bank_data(federation), rounded=True)
    name, rows = next(iter(run.rows.items()))
    shared, own = plan.initial()
    start = Best(shared=shared, own=own, auc=0.5, round_number=3)

    def loss(best: Best) -> float:
        logit = held_out_scores(plan, best, rows.validation[0]) / 65536
        return float(np.mean(np.logaddexp(0, logit) - rows.validation[1] * logit))

    better = tuned(plan, name, rows, start)
    assert loss(better) < loss(start)
    assert (better.auc, better.round_number) == (0.5, 3)
    inputs, label = rows.training
    misleading = replace(rows, training=(inputs, (1 - label).astype(np.int8)))
    trained_well = run.best[name]
    assert loss(tuned(plan, name, misleading, trained_well)) <= loss(trained_well)
    none = np.zeros(len(rows.validation[1]), np.bool_)
    blind = replace(rows, validation=(rows.validation[0].take(none), rows.validation[1][none]))
    assert tuned(plan, name, blind, start) is start


def test_rows_without_consent_take_no_part(federation: Federation) -> None:
    plan = make_plan(federation, net="logistic", rounds=2)
    whole = bank_data(federation)
    name = next(iter(whole))
    live = set(whole[name].training.ids[::2]) | set(whole[name].held_out.ids)
    asked = whole | {name: replace(whole[name], consent=lambda ids: np.array([i in live for i in ids], np.bool_))}
    table = next(table for table in federation.banks if table.name == name)
    kept = np.array([identifier in live for identifier in table.ids.tolist()])
    cut = replace(
        table,
        ids=table.ids[kept],
        label=table.label[kept],
        held_out=table.held_out[kept],
        columns={column: values[kept] for column, values in table.columns.items()},
    )
    fewer = replace(federation, banks=tuple(cut if bank.name == name else bank for bank in federation.banks))
    parties = make_parties(plan, whole)
    best, counts, _ = run_encrypted(plan, parties, asked)
    assert is_exact(best, counts, replay(plan, parties.terms, bank_data(fewer), rounded=True))
    assert not is_exact(best, counts, replay(plan, parties.terms, whole, rounded=True))


def test_a_bank_that_fails_stops_the_job_with_its_name_and_no_value(federation: Federation) -> None:
    plan = make_plan(federation, net="mlp", rounds=2)
    data = bank_data(federation)
    parties = make_parties(plan, data)
    broken = list(data)[1]

    class Tables(dict[str, BankData]):
        asked = 0

        def __getitem__(self, name: str) -> BankData:
            self.asked += name == broken
            if self.asked > 5:
                raise OSError("row 17 of customer 4711 is damaged")
            return super().__getitem__(name)

    with pytest.raises(RoundStoppedError, match=broken) as stopped:
        run_encrypted(plan, parties, Tables(data))
    assert "OSError" in str(stopped.value)
    assert "4711" not in str(stopped.value)


def test_federations_and_plans_that_cannot_be_trained_are_refused(federation: Federation) -> None:
    with pytest.raises(DataError, match="at least 2 banks"):
        bank_data(replace(federation, banks=federation.banks[:1]))
    bank = federation.banks[0]
    idle = replace(bank, held_out=np.ones(len(bank.ids), np.bool_))
    with pytest.raises(DataError, match="no training rows"):
        bank_data(replace(federation, banks=(idle, *federation.banks[1:])))
    plan = make_plan(federation, net="logistic", personalised=True)
    assert len(plan.initial()[0]) > 0, "the embeddings are shared"
    with pytest.raises(Refused, match="shares nothing"):
        TrainingPlan(net="logistic", columns=plan.columns[:1], personalised=True).initial()


def test_own_rows_are_weighted_and_banks_of_one_class_left_out() -> None:
    good = (np.array([1, 2, 3, 4], np.int64), np.array([0, 0, 1, 1], np.int8))
    bad = (np.array([2, 1], np.int64), np.array([0, 1], np.int8))
    one_class = (np.array([9], np.int64), np.array([1], np.int8))
    judged = Judged.of_scores({"a": good, "b": bad, "c": one_class})
    assert judged.auc_own_rows == pytest.approx(4 / 6)
    assert 0.5 < judged.auc < 1


# --- the command and the page -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_federation.generate(tmp_path_factory.mktemp("data") / "federation", 5, 900)


def test_the_command_trains_and_writes_figures_report_and_models(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model", "mlp", "--strategy", "fedadam", "--personalised", "--rounds", "2", "--out", str(out)]
    done = RUNNER.invoke(cli.app, ["run", str(folder), *arguments])
    assert done.exit_code == 0, done.output
    result = json.loads((out / "result.json").read_text())
    assert (result["model"], result["strategy"], result["personalised"]) == ("mlp", "fedadam", True)
    assert result["exact"] is True
    assert "not_personalised" in result["auc"]
    assert "exact: yes" in done.output
    assert done.stderr == ""
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "SYNTHETIC" in page
    assert len(list((out / "models").glob("own_*.json"))) == len(result["rows"])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--model", "forest"], "forest"),
        (["--model", "mlp", "--strategy", "magic"], "magic"),
        (["--model", "mlp", "--epsilon", "3"], "no differential privacy"),
        (["--model", "mlp", "--wire", "ray"], "runs in memory"),
        (["--strategy", "fedadam"], "give --model"),
        (["--personalised"], "give --model"),
        (["--rounds", "9"], "at most 8"),
        (["--model", "mlp", "--banks", "1"], "2 banks"),
    ],
)
def test_options_that_do_nothing_or_weaken_are_refused(
    folder: Path, tmp_path: Path, arguments: list[str], word: str
) -> None:
    if "--banks" in arguments:
        split = json.loads((folder / "split.json").read_text())
        split.pop("horizontal_key"), split.pop("horizontal_groups")
        for file in folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "split.json").write_text(json.dumps(split))
        folder = tmp_path
    done = RUNNER.invoke(cli.app, ["run", str(folder), *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_page_escapes_names_and_is_loud_about_a_difference(finished: HorizontalRun) -> None:
    page = finished.files["report.html"]
    assert page == render(finished.result), "the same figures give the same bytes"
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "").replace(
        "https://matplotlib", ""
    )
    assert all(MODELS[key][0] in page for key in finished.result["auc"])
    changed = finished.result | {"exact": False, "data": finished.result["data"] | {"name": "<script>"}}
    page = render(changed)
    assert "NOT equal" in page
    assert "<script>" not in page
    with pytest.raises(ValueError, match="expected federated"):
        render(finished.result | {"auc": {"pooled": 0.5}})


def test_the_weight_of_a_bank_is_its_training_rows(federation: Federation) -> None:
    data = bank_data(federation)
    assert [weight(table) for table in data.values()] == [int((~bank.held_out).sum()) for bank in federation.banks]


# --- real data --------------------------------------------------------------------------------------------------------

DATA = Path("/work/shared/data")


@pytest.mark.slow
def test_three_banks_of_fate_reach_the_pooled_network() -> None:
    if not (DATA / "fate_default_credit").is_dir():
        pytest.skip(f"no test data in {DATA}")
    federation = load(DATA / "fate_default_credit", split="split_homo.json")
    result = run_horizontal(federation, make_plan(federation, net="mlp")).result
    assert result["exact"] is True
    assert abs(result["auc"]["federated"] - result["auc"]["float"]) < 0.001
    assert result["auc"]["federated"] > result["auc"]["pooled"] - 0.003


@pytest.mark.slow
def test_personalised_banks_of_sba_beat_themselves_alone_and_the_plain_average() -> None:
    if not (DATA / "sba_loans").is_dir():
        pytest.skip(f"no test data in {DATA}")
    federation = load(DATA / "sba_loans")
    result = run_horizontal(federation, make_plan(federation, net="mlp", personalised=True)).result
    assert result["exact"] is True
    own = result["auc_own_rows"]
    assert own["federated"] > max(own["alone"], own["not_personalised"])
