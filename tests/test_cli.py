"""The commands as a user runs them: one clear line and exit code 2 for bad input, nothing half-written."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fl_clients.cli import app as node_app
from fl_server.cli import app as server_app
from simulations import cli, demo_federation, job

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_federation.generate(tmp_path_factory.mktemp("data") / "federation", 5, 900)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("run") / "out"
    result = RUNNER.invoke(cli.app, ["run", str(folder), "--out", str(out), "--rounds", "2"])
    assert result.exit_code == 0, result.output
    return out, result.output


def fails(arguments: list[str], out: Path) -> str:
    """The one line of a refused run; checks exit code 2 and that nothing was written."""
    result = RUNNER.invoke(cli.app, ["run", *arguments, "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not out.exists()
    assert [path for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")] == []
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def edited(folder: Path, target: Path, change: dict[str, object]) -> Path:
    """A copy of the federation folder with other values in split.json."""
    shutil.copytree(folder, target)
    split = json.loads((target / "split.json").read_text())
    (target / "split.json").write_text(json.dumps(split | change))
    return target


def rewritten(folder: Path, target: Path, name: str, change: object) -> Path:
    """A copy of the folder in which one table was changed by `change(frame) -> frame`."""
    shutil.copytree(folder, target)
    frame = change(pd.read_csv(target / name, dtype=object))  # type: ignore[operator]
    frame.to_csv(target / name, index=False)
    return target


def label_file(folder: Path) -> tuple[str, dict[str, object]]:
    split = json.loads((folder / "split.json").read_text())
    return split["label_file"], split


def test_a_run_writes_everything_the_issue_names(finished: tuple[Path, str]) -> None:
    out, _ = finished
    result = json.loads((out / "result.json").read_text())
    for metric in ("auc", "ks"):
        figures = result[metric]
        assert len(figures["alone"]) == 3
        for name in ("federated", "pooled_twin", "label_holder_columns", "pooled_boosting"):
            assert 0.0 <= figures[name] <= 1.0
        assert figures["federated"] == figures["pooled_twin"]
    assert result["exact"] is True
    assert result["rounds"] == 2
    assert result["seconds"]["total"] > 0 < result["seconds"]["twin"]
    assert result["bytes"]["total"] > result["bytes"]["coordinator_in"] > 0
    assert result["messages"] > 50
    assert result["privacy"]["epsilon"] is None
    he = result["privacy"]["he"]
    assert (he["scheme"], he["n"], he["log_q"], he["security_bits"]) == ("BFV", 8192, 198, 128)
    assert he["log_t"] >= 20
    assert he["flooding_bits"] >= 40
    assert result["rows"]["training"] > result["rows"]["held_out"] > 0
    assert result["peak_memory_mb"] > 50
    assert "<html" in (out / "report.html").read_text()


def test_bytes_by_pair_add_up_to_the_total(finished: tuple[Path, str]) -> None:
    result = json.loads((finished[0] / "result.json").read_text())
    assert sum(result["bytes_by_pair"].values()) == result["bytes"]["total"]


def test_one_model_file_per_party_holds_only_that_partys_columns(finished: tuple[Path, str], folder: Path) -> None:
    split = json.loads((folder / "split.json").read_text())
    files = {path.stem: json.loads(path.read_text()) for path in (finished[0] / "models").iterdir()}
    owners = list(split["parties"])[1:]
    assert len(files) == 3 + len(owners)
    for model in files.values():
        columns = {feature["name"] for feature in model["tower"]["features"]}
        party = model["party"] if model["party"] in owners else next(iter(split["parties"]))
        assert columns == set(split["parties"][party]["columns"])
        assert ("intercept" in model) == (model["party"] not in owners)


def test_the_console_shows_table_bytes_epsilon_and_stand_ins(finished: tuple[Path, str]) -> None:
    _, text = finished
    for words in ("Federated", "Pooled twin", "Pooled gradient boosting", "exact: yes", "epsilon: none", "stand-in:"):
        assert words in text
    assert "SYNTHETIC" in text


def test_a_second_run_replaces_the_first(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for rounds in ("1", "2"):
        assert RUNNER.invoke(cli.app, ["run", str(folder), "--out", str(out), "--rounds", rounds]).exit_code == 0
    assert json.loads((out / "result.json").read_text())["rounds"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_the_user_is_never_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    result = RUNNER.invoke(cli.app, ["run", str(folder), "--out", str(out), "--rounds", "1"])
    assert result.exit_code == 2
    assert "holds no earlier run" in result.stderr
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_epsilon_is_met_and_printed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = RUNNER.invoke(cli.app, ["run", str(folder), "--out", str(out), "--rounds", "1", "--epsilon", "3"])
    assert result.exit_code == 0, result.output
    assert "epsilon: 3 " in result.output
    figures = json.loads((out / "result.json").read_text())
    assert figures["exact"] is True
    assert 2.9 < figures["privacy"]["epsilon_spent"] <= 3.0
    assert figures["privacy"]["delta"] == pytest.approx(1 / (10 * figures["rows"]["training"]))


def test_unknown_column(folder: Path, tmp_path: Path) -> None:
    split = json.loads((folder / "split.json").read_text())
    first = next(iter(split["parties"]))
    split["parties"][first]["columns"] = ["nowhere_at_all"]
    data = edited(folder, tmp_path / "data", split)
    assert "nowhere_at_all" in fails([str(data)], tmp_path / "out")


def test_leaky_column(folder: Path, tmp_path: Path) -> None:
    split = json.loads((folder / "split.json").read_text())
    first = next(iter(split["parties"]))
    leaky = split["parties"][first]["columns"][0]
    data = edited(folder, tmp_path / "data", {"never_use_as_features": [leaky]})
    assert leaky in fails([str(data)], tmp_path / "out")


def test_labels_other_than_0_and_1(folder: Path, tmp_path: Path) -> None:
    name, split = label_file(folder)

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[3, str(split["label"])] = "2"
        return frame

    data = rewritten(folder, tmp_path / "data", name, change)
    assert "label" in fails([str(data)], tmp_path / "out")


def test_one_class_only(folder: Path, tmp_path: Path) -> None:
    name, split = label_file(folder)
    data = rewritten(folder, tmp_path / "data", name, lambda frame: frame.assign(**{str(split["label"]): "0"}))
    assert "class" in fails([str(data)], tmp_path / "out")


def test_duplicate_ids_are_counted_and_not_printed(folder: Path, tmp_path: Path) -> None:
    name, split = label_file(folder)
    ids: list[str] = []

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        ids.append(frame[str(split["id"])][0])
        return pd.concat([frame, frame.iloc[:2]])

    data = rewritten(folder, tmp_path / "data", name, change)
    line = fails([str(data)], tmp_path / "out")
    assert "2" in line
    assert ids[0] not in line


def test_infinite_values(folder: Path, tmp_path: Path) -> None:
    split = json.loads((folder / "split.json").read_text())
    party = list(split["parties"])[1]
    terms = split["parties"][party]
    column = next(name for name in terms["columns"] if name not in split.get("categorical", []))

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[0, column] = "inf"
        return frame

    data = rewritten(folder, tmp_path / "data", terms["file"], change)
    assert column in fails([str(data)], tmp_path / "out")


def test_no_overlap(folder: Path, tmp_path: Path) -> None:
    split = json.loads((folder / "split.json").read_text())
    party = list(split["parties"])[1]
    name, id_column = split["parties"][party]["file"], split["id"]
    data = rewritten(folder, tmp_path / "data", name, lambda frame: frame.assign(**{id_column: "X" + frame[id_column]}))
    assert party in fails([str(data)], tmp_path / "out")


def test_an_unreadable_file_and_a_wrong_encoding(folder: Path, tmp_path: Path) -> None:
    name, _ = label_file(folder)
    data = edited(folder, tmp_path / "gone", {})
    (data / name).unlink()
    assert name in fails([str(data)], tmp_path / "out")
    data = edited(folder, tmp_path / "encoded", {})
    raw = (data / name).read_bytes()
    text = gzip.decompress(raw).decode() if name.endswith(".gz") else raw.decode()
    header, rest = text.split("\n", 1)
    latin = f"{header}\n{rest}".replace("0", "中", 1).encode("gb18030")
    (data / name).write_bytes(gzip.compress(latin) if name.endswith(".gz") else latin)
    assert "UTF-8" in fails([str(data)], tmp_path / "out")


def test_no_folder_no_split_and_bad_options(folder: Path, tmp_path: Path) -> None:
    assert "nothing" in fails([str(tmp_path / "nothing")], tmp_path / "out")
    assert "other.json" in fails([str(folder), "--split", "other.json"], tmp_path / "out")
    assert "pigeon" in fails([str(folder), "--wire", "pigeon"], tmp_path / "out")
    assert "epsilon" in fails([str(folder), "--epsilon", "-1"], tmp_path / "out")


def test_a_party_that_dies_stops_the_run_with_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: object, step: object, request: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr(job.FeatureOwner, "_find_direction", dies)
    line = fails([str(folder), "--rounds", "1"], tmp_path / "out")
    assert "pboc" in line
    assert "direction" in line


def test_few_parties_are_allowed_with_a_warning_of_what_becomes_visible(folder: Path, tmp_path: Path) -> None:
    split = json.loads((folder / "split.json").read_text())
    parties = dict(list(split["parties"].items())[:2])
    change = {"parties": parties}
    data = edited(folder, tmp_path / "data", change)
    split = json.loads((data / "split.json").read_text())
    for key in ("horizontal_key", "horizontal_groups"):
        split.pop(key, None)
    (data / "split.json").write_text(json.dumps(split))
    result = RUNNER.invoke(cli.app, ["run", str(data), "--banks", "2", "--rounds", "1", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "warning: one feature owner" in text
    assert "warning: two banks" in text or "fewer than 3 banks" in text or "2 banks" in text


def test_the_seed_moves_the_split_and_nothing_else_repeats(folder: Path, tmp_path: Path) -> None:
    results = []
    for number in range(2):
        out = tmp_path / str(number)
        assert (
            RUNNER.invoke(cli.app, ["run", str(folder), "--seed", "9", "--rounds", "1", "--out", str(out)]).exit_code
            == 0
        )
        results.append(json.loads((out / "result.json").read_text()))
    assert results[0]["rows"] == results[1]["rows"]
    assert results[0]["auc"]["pooled_boosting"] == results[1]["auc"]["pooled_boosting"]
    # forward noise and keys are fresh, whatever the seed
    assert results[0]["contract"] != results[1]["contract"]
    weights = [json.loads((tmp_path / str(n) / "models" / "pboc.json").read_text())["weights"] for n in range(2)]
    assert not np.array_equal(*weights)


def test_the_other_console_scripts(finished: tuple[Path, str], tmp_path: Path) -> None:
    result = RUNNER.invoke(server_app, ["explain", str(finished[0] / "contract.json")])
    assert result.exit_code == 0
    assert "raw rows of" in result.output
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert RUNNER.invoke(server_app, ["explain", str(bad)]).exit_code == 2
    key = tmp_path / "identity.key"
    first = RUNNER.invoke(node_app, ["identity", str(key)])
    second = RUNNER.invoke(node_app, ["identity", str(key)])
    assert first.exit_code == 0
    assert first.output == second.output
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    assert RUNNER.invoke(node_app, ["identity", str(key)]).exit_code == 2
