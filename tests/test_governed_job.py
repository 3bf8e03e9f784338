"""The journey of a real job by the commands alone, and what the people at an institution can stop."""

import json
import re
import shutil
import stat
from pathlib import Path

import pytest

from fl_clients.audit_cli import app as audit_app
from fl_clients.institution import JOBS
from tests.governed_job import APPROVER, DRAFT, PARTIES, agree, command, node, prepare, run, server


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("governed")
    return folder, prepare(folder)


@pytest.fixture(scope="module")
def finished(ready: tuple[Path, dict[str, Path]]) -> tuple[Path, dict[str, Path], str, Path]:
    folder, homes = ready
    job = agree(folder, homes)
    said = run(folder, homes, job)
    result = next((folder / "home-coordinator" / JOBS / job / "runs" / "1").iterdir())
    assert f"run 1 of 1: {result}" in said
    return folder, homes, job, result


def test_a_job_runs_from_card_to_certificate(finished: tuple[Path, dict[str, Path], str, Path]) -> None:
    folder, homes, job, result = finished
    whole = json.loads((result / "certificate.json").read_text())
    assert set(whole["signatures"]) == {"coordinator", *PARTIES}
    said = command(audit_app, "certificate", result / "certificate.json", home=folder)
    assert "valid" in said
    assert "epsilon 8" in said
    logs = [home / "audit" for home in homes.values()]
    assert "clean" in command(audit_app, "verify", *logs, home=folder)
    for name, home in homes.items():
        model = home / JOBS / job / "model.1.json"
        assert stat.S_IMODE(model.stat().st_mode) == 0o600
        assert any(json.loads(model.read_text())["weights"]), name
        assert "destroyed" in node(home, "job", "list")
    assert "8 of 12, left 4" in node(homes["bank1"], "budget")
    assert re.search(r"main +│ 2 ", node(homes["pboc"], "budget"))


def test_no_party_of_the_run_left_a_row_or_a_secret_in_what_it_published(
    finished: tuple[Path, dict[str, Path], str, Path],
) -> None:
    folder, homes, _, result = finished
    codes = [line.split(",")[0].strip('"') for line in (folder / "bank1.csv").read_text().splitlines()[1:200]]
    published = [path for path in result.rglob("*") if path.is_file()]
    published += [path for home in homes.values() for path in (home / "audit").iterdir()]
    assert len(published) > 8
    for path in published:
        text = path.read_text(encoding="utf-8")
        assert not any(code in text for code in codes), path
        assert "PRIVATE KEY" not in text


def test_the_same_job_again_is_refused_by_coordinator_and_vaults(
    finished: tuple[Path, dict[str, Path], str, Path],
) -> None:
    folder, homes, job, _ = finished
    assert "its contract allows 1" in run(folder, homes, job, expect=2)
    # a coordinator that forgets its runs meets the vaults' own count
    shutil.rmtree(folder / "home-coordinator" / "jobs" / job / "runs")
    assert "was begun here already" in run(folder, homes, job, expect=2)


def test_a_second_job_beyond_the_budget_is_refused_before_anybody_signs(
    finished: tuple[Path, dict[str, Path], str, Path],
) -> None:
    folder, homes, _, _ = finished
    coordinator = folder / "home-coordinator"
    (folder / "again.toml").write_text(DRAFT, encoding="utf-8")
    job = server(coordinator, "job", "new", folder / "again.toml").split()[1].rstrip(",")
    server(coordinator, "job", "sign", job)
    server(coordinator, "job", "invite", job, "--out", folder / "again")
    home = homes["bank1"]
    node(home, "job", "receive", folder / "again" / f"{job[:8]}.bank1.contract.json", "--out", folder)
    key = folder / "bank1.approver.key"
    said = node(home, "job", "approve", job, "--as", APPROVER, "--key", key, "--out", folder, expect=2)
    assert "epsilon" in said
    assert not (folder / f"{job}.bank1.signature.json").exists()
    said = node(home, "job", "refuse", job, "--as", APPROVER, "--key", key, "--reason", "budget spent")
    assert "refused" in said
    assert "refused" in node(home, "job", "list")
