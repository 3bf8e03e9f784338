"""The direction of imports: simulations, fl_server -> fl_clients -> models, privacy; no secret at the coordinator."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("simulations", "fl_server", "fl_clients", "models", "privacy")
MAY_IMPORT = {
    "simulations": set(ROOMS),
    "fl_server": {"fl_server", "fl_clients", "models", "privacy"},
    "fl_clients": {"fl_clients", "models", "privacy"},
    "models": {"models"},
    "privacy": {"privacy"},
}
PROTOCOL_MODULES = {
    *("fl_clients.contract", "fl_clients.protocol", "fl_clients.roster", "fl_clients.courier"),
    *("fl_clients.certificate", "fl_clients.who_sees_what"),
    *("fl_clients.app_bundle", "fl_clients.invite", "fl_clients.processes", "fl_clients.tls", "fl_clients.frames"),
    "fl_clients.horizontal_terms",
}
SECRET_TYPES = {
    *("JobKeys", "BankKey", "ConsortiumKey", "OneTimePad", "SystemNoise", "KeyedForwardNoise", "RecordedNoise"),
    *("Institution", "JobBook", "Ledger", "AuditLog"),
    *("Session", "Bank", "FeatureOwner", "Vault", "OwnerDesign", "BankData", "OwnerData", "LabelledRows"),
    *("HorizontalBank", "Memory", "TableNoise", "Contribution"),
}
FLOWER_FREE = ("models", "privacy")
HEAVY = ("torch", "tenseal", "privacy", "models")


@dataclass(frozen=True)
class Import:
    """One imported module, and the name taken from it ("" for the module itself)."""

    module: str
    name: str
    line: int


def imports(source: str) -> Iterator[Import]:
    """Every import anywhere in a module, functions and TYPE_CHECKING blocks included, dynamic ones by their text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, "", node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import("." * node.level + (node.module or ""), alias.name, node.lineno)
        elif isinstance(node, ast.Call) and _called(node) in ("__import__", "import_module"):
            first = node.args[0] if node.args else None
            text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else "?"
            yield Import(text, "", node.lineno)


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def violations(room: str, module: str, source: str) -> list[str]:
    """What a module of `room` imports against the rules; empty when it keeps them."""
    found = []
    for item in imports(source):
        top = item.module.split(".")[0]
        # `from fl_clients import vault` imports the module fl_clients.vault
        target = f"{item.module}.{item.name}" if item.module in ROOMS and item.name else item.module
        where = f"{module}:{item.line} imports {target}"
        if item.module.startswith("."):
            found.append(f"{where}: write absolute imports, relative ones hide the room")
        if item.module == "?":
            found.append(f"{where}: a computed module name cannot be checked")
        if top == "tests":
            found.append(f"{where}: no room may import tests")
        if top in ROOMS and top not in MAY_IMPORT[room]:
            found.append(f"{where}: {room} may not import {top}")
        if room in FLOWER_FREE and top in ("flwr", "grpc", "ray"):
            found.append(f"{where}: {room} knows no network")
        if room == "fl_server":
            if top == "fl_clients" and not any(target == m or target.startswith(f"{m}.") for m in PROTOCOL_MODULES):
                found.append(f"{where}: of fl_clients the coordinator may import the protocol only")
            if item.name in SECRET_TYPES:
                found.append(f"{where}: {item.name} holds secrets of institutions")
        if module.endswith("fl_clients/courier.py") and top in (*HEAVY, "numpy", "pandas"):
            found.append(f"{where}: the courier computes nothing")
    return found


def attributes_of_secrets(source: str) -> list[str]:
    """Secret types reached as `module.Type`, which an import of the module alone would hide."""
    return sorted(
        {
            node.attr
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and node.attr in SECRET_TYPES
        }
    )


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_keeps_the_direction_of_imports(room: str) -> None:
    files = modules(room)
    assert len(files) >= 3, f"no modules found in {room}; the test looks in the wrong place"
    found = [line for path in files for line in violations(room, str(path.relative_to(ROOT)), path.read_text("utf-8"))]
    assert found == []


def test_the_coordinator_reaches_no_secret_type_as_an_attribute_either() -> None:
    for path in modules("fl_server"):
        assert attributes_of_secrets(path.read_text("utf-8")) == [], path.name


@pytest.mark.parametrize(
    ("room", "source", "word"),
    [
        ("models", "import flwr", "knows no network"),
        ("models", "from privacy.masks import stream", "may not import privacy"),
        ("privacy", "from models.errors import DataError", "may not import models"),
        ("privacy", "def f():\n    from flwr.app import Message", "knows no network"),
        ("fl_clients", "from fl_server.coordinator import Coordinator", "may not import fl_server"),
        ("fl_clients", "import simulations.job", "may not import simulations"),
        ("fl_clients", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import simulations", "may not import"),
        ("fl_server", "from fl_clients.vault import Vault", "protocol only"),
        ("fl_server", "from fl_clients import bank", "protocol only"),
        ("fl_server", "import fl_clients.session", "protocol only"),
        ("fl_server", "from privacy.sealing import JobKeys", "holds secrets"),
        ("fl_server", "from privacy.secure_sum import ConsortiumKey as K", "holds secrets"),
        ("fl_server", "from simulations.twin import run_twin", "may not import simulations"),
        ("models", "import importlib\nimportlib.import_module('privacy.masks')", "may not import privacy"),
        ("models", "__import__('pri' + 'vacy')", "cannot be checked"),
        ("fl_clients", "from . import bank", "relative"),
        ("privacy", "from tests.small_federation import small_federation", "may import tests"),
    ],
)
def test_a_planted_violation_is_found(room: str, source: str, word: str) -> None:
    found = violations(room, f"{room}/planted.py", source)
    assert found, f"not detected: {source}"
    assert any(word in line for line in found), found


def test_a_planted_courier_that_computes_is_found_and_an_honest_module_is_not() -> None:
    assert violations("fl_clients", "fl_clients/courier.py", "import numpy as np")
    assert violations("fl_clients", "fl_clients/courier.py", "from privacy.sealing import JobKeys")
    assert attributes_of_secrets("import privacy.sealing as s\nkeys = s.JobKeys.generate()") == ["JobKeys"]
    honest = "import numpy as np\nfrom privacy.errors import Refused\nfrom fl_clients.protocol import Step\n"
    assert violations("fl_server", "fl_server/honest.py", honest) == []
    assert violations("fl_clients", "fl_clients/honest.py", honest) == []


def test_the_names_of_the_secret_types_exist() -> None:
    """A rename would turn the check above into one that cannot fail."""
    defined = {
        node.name
        for room in ("fl_clients", "privacy")
        for path in modules(room)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    assert defined >= SECRET_TYPES


def test_the_courier_loads_no_cryptography_of_ours_and_no_numerics() -> None:
    code = (
        "import sys; import fl_clients.courier; "
        f"print(sorted(m for m in sys.modules if m.split('.')[0] in {HEAVY!r} or m.startswith('fl_clients.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "['fl_clients.courier']"
