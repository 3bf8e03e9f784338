"""The five lines of docs/horizontal.md, run as they stand there."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fl_server.memory_grid import MemoryGrid
from privacy.identity import SigningIdentity

PAGE = (Path(__file__).parents[1] / "docs" / "horizontal.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def test_the_five_lines_train_a_model_that_only_banks_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    coordinator = SigningIdentity.generate()
    coordinator.save(tmp_path / "coordinator.pem")
    terms = json.loads(block("json terms"))
    terms["coordinator_identity"] = coordinator.public.hex()
    nodes = {}
    for node, bank in enumerate(terms["banks"]):
        identity = SigningIdentity.generate()
        identity.save(tmp_path / f"{bank['name']}.pem")
        bank["identity"] = identity.public.hex()
        nodes[node] = {"party": bank["name"], "identity": str(tmp_path / f"{bank['name']}.pem")}
    (tmp_path / "terms.json").write_text(json.dumps(terms))
    client: dict[str, object] = {}
    server: dict[str, object] = {}
    exec(block("python client"), client)
    exec(block("python server"), server)
    grid = MemoryGrid(client["app"], nodes)  # type: ignore[arg-type]
    server["app"](grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}))  # type: ignore[operator]
    models = [context.state.array_records["xinyi.model"]["weights"].numpy() for context in grid._contexts.values()]
    # half the way to 1 in each of three rounds
    assert all(np.abs(model - 0.875).max() < 1e-5 for model in models)
    assert np.array_equal(models[0], models[1])


def test_the_lines_are_five() -> None:
    assert re.findall(r"# (\d)\b", block("python client") + block("python server")) == ["1", "2", "3", "4", "5"]
